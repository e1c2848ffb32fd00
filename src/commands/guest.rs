//! `vmft guest`.

use crate::remedy::Remedy;
use crate::terminal::say;
use anyhow::{Context, Result};
use clap::Args;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use vmft_guest_images::{
    Cache, ProbeGuest, build_lockstep_guest, cmdline, default_guest, refresh_default_guest,
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
    /// Print what the board needs on a kernel's command line, which every guest gets in front of its own words
    #[arg(long, conflicts_with_all = ["refresh", "lockstep", "probe"])]
    print_cmdline: bool,
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
