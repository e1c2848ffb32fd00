//! `scripts/bench`: measures what the project promises, prints a table, writes JSON.
//!
//! It starts the `vmft` beside it, with the default guest (on `kvm`, with the probe), as a user would. Everything it starts it
//! ends. Its verdict is the table's: a figure that misses its goal is no error.

mod epochs;
mod exits;
mod figure;
mod host;
mod joins;
mod kvm;
mod lab;
mod measure;
mod minimal;
mod network;
mod qemu;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use figure::Figure;
use kvm::KvmLinux;
use lab::Lab;
use measure::Effort;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use vmft_guest_images::packages::{HOST_PACKAGES, ensure_packages};
use vmft_guest_images::{Cache, default_guest};

/// The figures of the `kvm` engine, whose guests are not the default one.
const KVM: &str = "kvm-";
/// Those of a Linux, which many a KVM cannot run: they are measured where they are asked for.
const KVM_LINUX: &str = "kvm-linux-";

/// Those that compare with QEMU: they are measured where that is asked for.
const QEMU: &str = "qemu-";

/// What there is to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Rival {
    /// QEMU's TCG, by CPU time, with the same guest
    Qemu,
}

/// Measures the figures the project promises.
#[derive(Debug, Parser)]
#[command(name = "vmft-bench", version, max_term_width = 100)]
struct Options {
    /// Only these figures; those measured together come together
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Compare with another emulator, and measure nothing else but what --only names
    #[arg(long, value_enum, value_name = "NAME")]
    against: Option<Rival>,
    /// Name the figures and end
    #[arg(long)]
    list: bool,
    /// Fewer and shorter runs
    #[arg(long)]
    quick: bool,
    /// Where the JSON goes
    #[arg(long, value_name = "FILE", default_value = "target/bench/figures.json")]
    json: PathBuf,
    /// A Linux that can be followed on --engine kvm, for the figures kvm-linux-*: a directory with
    /// `vmlinuz`, `initramfs.cpio` and perhaps `cmdline`. Default: the lockstep kernel, if it was built
    #[arg(long, value_name = "DIR")]
    kvm_guest: Option<PathBuf>,
    /// The program to measure. Default: the `vmft` beside this one
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

impl Options {
    fn wanted(&self) -> Result<Vec<&'static str>> {
        if self.only.is_empty() && self.against == Some(Rival::Qemu) {
            return Ok(qemu::NAMES.to_vec());
        }
        if self.only.is_empty() {
            // What this host cannot do is left out, but never what was asked for by name.
            let kvm = Path::new(vmft_kvm::trust::DEVICE).exists();
            let can = |name: &&str| {
                let guest = !name.starts_with(KVM_LINUX) || self.kvm_guest.is_some();
                guest && (kvm || !name.starts_with(KVM)) && !name.starts_with(QEMU)
            };
            return Ok(names().filter(can).collect());
        }
        let find = |name: &String| {
            let known = names().find(|known| known == name);
            known.with_context(|| format!("no figure is called {name}; --list names them"))
        };
        self.only.iter().map(find).collect()
    }

    fn kvm_linux(&self) -> Result<Option<KvmLinux>> {
        Ok(match &self.kvm_guest {
            Some(directory) => Some(KvmLinux::of(directory)),
            None => KvmLinux::lockstep(&Cache::from_environment()?),
        })
    }

    fn program(&self) -> Result<PathBuf> {
        let program = match &self.program {
            Some(program) => std::path::absolute(program)?,
            None => std::env::current_exe()?.with_file_name("vmft"),
        };
        if !program.is_file() {
            bail!("{} is not there; build it, or use scripts/bench", program.display());
        }
        Ok(program)
    }
}

/// What goes into the JSON.
#[derive(Debug, Serialize)]
struct Results<'a> {
    version: &'static str,
    host: &'a host::Host,
    quick: bool,
    figures: &'a [Figure],
}

/// A group of figures that are measured together.
type Part = (&'static [&'static str], fn(&mut Lab, &Effort, &[&str]) -> Result<Vec<Figure>>);

const PARTS: &[Part] = &[
    (&["boot-speed", "boot-to-prompt"], |lab, effort, _| measure::boot(lab, effort)),
    (&["restore-to-prompt"], |lab, effort, _| measure::restore(lab, effort)),
    (&["compute-speed"], |lab, effort, _| measure::compute_speed(lab, effort)),
    (&["protected-compute", "protected-fork", "protected-disk"], measure::ratios),
    (
        &["log-idle", "log-compute", "execution-lag", "output-delay", "memory-overhead"],
        |lab, effort, _| measure::steady(lab, effort),
    ),
    (&["kill-to-output"], |lab, effort, _| measure::failover(lab, effort)),
    (network::NAMES, |lab, effort, wanted| network::figures(lab.program(), effort, wanted)),
    (&["join-pause"], |lab, effort, _| joins::pause(lab, effort)),
    (&["join-speed"], |lab, effort, _| joins::speed(lab, effort)),
    (&["kill-to-protected"], |lab, effort, _| joins::protected_again(lab, effort)),
    (&["snapshot-save", "snapshot-restore"], |lab, effort, _| joins::snapshots(lab, effort)),
    (&["checkpoint-fork", "checkpoint-bytes"], |lab, effort, _| epochs::epochs(lab, effort)),
    (qemu::NAMES, |lab, effort, wanted| qemu::figures(lab.program(), effort, wanted)),
    (&["kvm-exit-cost", "kvm-recording"], |_, effort, _| exits::exits(effort)),
    (&["kvm-protected-compute", "kvm-protected-exits"], |lab, effort, _| {
        kvm::probe(lab.program(), effort)
    }),
    (&["kvm-linux-compute", "kvm-linux-fork", "kvm-linux-disk"], |lab, effort, _| {
        kvm::linux(lab.kvm_linux()?, lab.program(), effort)
    }),
];

/// Every figure, in the order they are measured.
fn names() -> impl Iterator<Item = &'static str> {
    PARTS.iter().flat_map(|(names, _)| *names).copied()
}

fn bench(options: &Options) -> Result<()> {
    let wanted = options.wanted()?;
    if wanted.iter().any(|name| !name.starts_with(KVM)) {
        let mut progress = vmft::progress::terminal();
        ensure_packages(HOST_PACKAGES, &mut progress)?;
        default_guest(&Cache::from_environment()?, &mut progress)?;
    }
    ctrlc::set_handler(|| lab::INTERRUPTED.store(true, Ordering::Relaxed))?;
    let effort = if options.quick { Effort::QUICK } else { Effort::FULL };
    let mut host = host::Host::now();
    let mut lab = Lab::open(options.program()?, options.kvm_linux()?)?;
    let mut figures = Vec::new();
    println!("{}", Figure::head());
    for (names, measure) in PARTS {
        if !names.iter().any(|name| wanted.contains(name)) {
            continue;
        }
        let measured = measure(&mut lab, &effort, &wanted)
            .with_context(|| format!("measuring {}", names.join(", ")))?;
        for figure in measured {
            println!("{}", figure.line());
            figures.push(figure);
        }
        host.finish();
        let results = Results {
            version: env!("CARGO_PKG_VERSION"),
            host: &host,
            quick: options.quick,
            figures: &figures,
        };
        write_json(&options.json, &results)?;
    }
    println!("{}", host.line());
    println!("written to {}", options.json.display());
    Ok(())
}

fn write_json(path: &Path, results: &Results<'_>) -> Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let text = serde_json::to_string_pretty(results)?;
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

fn main() -> ExitCode {
    vmft_vmm::machine::abort_on_panics();
    let options = Options::parse();
    if options.list {
        names().for_each(|name| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    match bench(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmft-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
