//! `vmft guest`.

use crate::options::SizeOption;
use crate::remedy::Remedy;
use crate::terminal::say;
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use vmft_guest_images::disk::DiskSize;
use vmft_guest_images::{
    Cache, DebianRelease, DebianServer, ProbeGuest, build_lockstep_guest, cmdline, default_guest,
    refresh_default_guest,
};

/// Options of `vmft guest`.
#[derive(Debug, Args)]
pub struct GuestOptions {
    /// Ask the package manager for newer versions
    #[arg(long)]
    refresh: bool,
    /// Build the lockstep kernel instead, which can be followed on --engine kvm: fetches Debian's
    /// source and a compiler, and takes some minutes
    #[arg(long, conflicts_with_all = ["refresh", "probe"])]
    lockstep: bool,
    /// Write the probe guest to this new file instead: a kernel that runs on every engine
    #[arg(long, value_name = "FILE", conflicts_with = "refresh")]
    probe: Option<PathBuf>,
    /// Print what the board needs on a kernel's command line, which every guest gets in front of
    /// its own words
    #[arg(long, conflicts_with_all = ["refresh", "lockstep", "probe"])]
    print_cmdline: bool,
    /// Make the disk of a Debian server instead, by Debian's own tools: with --output. The first of its kind
    /// takes some minutes, and is kept in the cache
    #[arg(long, value_name = "RELEASE", requires = "output",
          conflicts_with_all = ["refresh", "lockstep", "probe", "print_cmdline"])]
    debian: Option<ReleaseChoice>,
    /// Size of the server's disk
    #[arg(long, value_name = "SIZE", default_value = "4G", requires = "debian")]
    size: SizeOption,
    /// A package that the server has, such as postgresql; may be given several times
    #[arg(long, value_name = "NAME", requires = "debian")]
    package: Vec<PackageName>,
    /// Where the server's disk is written: a new file
    #[arg(long, value_name = "FILE", requires = "debian")]
    output: Option<PathBuf>,
}

/// A release of Debian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ReleaseChoice {
    /// Debian 12
    #[value(name = "12")]
    Bookworm,
    /// Debian 13
    #[value(name = "13")]
    Trixie,
}

/// The name of a package, which goes into a list of them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PackageName(String);

impl FromStr for PackageName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let plain =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+.-".contains(&byte);
        let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        match begins && name.bytes().all(plain) {
            true => Ok(Self(name.to_owned())),
            false => Err(format!("`{name}` is no package's name")),
        }
    }
}

fn debian(options: &GuestOptions, release: ReleaseChoice) -> Result<ExitCode> {
    let output = options.output.as_ref().context("--output names the disk")?;
    let server = DebianServer {
        release: match release {
            ReleaseChoice::Bookworm => DebianRelease::Bookworm,
            ReleaseChoice::Trixie => DebianRelease::Trixie,
        },
        size: DiskSize::from_bytes(options.size.0).context("--size")?,
        packages: options.package.iter().map(|PackageName(name)| name.clone()).collect(),
    };
    let cache = Cache::from_environment()?;
    server.write(&cache, output, &mut crate::progress::terminal())?;
    say(&format!("disk       {}", output.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Fetches or builds the default guest, builds the lockstep kernel, or makes the probe guest.
pub fn guest(options: &GuestOptions) -> Result<ExitCode> {
    if let Some(path) = &options.probe {
        File::create_new(path)
            .and_then(|mut file| file.write_all(&ProbeGuest::default().image()))
            .with_context(|| format!("writing the probe guest to {}", path.display()))
            .remedy(|| "--probe takes a path for a new file")?;
        say(&format!("kernel     {}", path.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(release) = options.debian {
        return debian(options, release);
    }
    if options.print_cmdline {
        say(cmdline::DEFAULT)?;
        return Ok(ExitCode::SUCCESS);
    }
    let cache = Cache::from_environment()?;
    let mut progress = crate::progress::terminal();
    let guest = if options.lockstep {
        build_lockstep_guest(&cache, &mut progress)?
    } else if options.refresh {
        refresh_default_guest(&cache, &mut progress)?
    } else {
        default_guest(&cache, &mut progress)?
    };
    drop(progress);
    say(&format!("kernel     {}", guest.kernel.display()))?;
    say(&format!("initramfs  {}", guest.initramfs.display()))?;
    Ok(ExitCode::SUCCESS)
}
