//! `vmft replay`.

use crate::engine_options::CompilerOptions;
use crate::options::SerialOption;
use crate::remedy::Remedy;
use crate::sandbox_options::{Named, SandboxOptions, end_start, files_of};
use crate::terminal::say;
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_backup::follower::ReplayGate;
use vmft_backup::identity::check_version;
use vmft_backup::recorded::RecordedLog;
use vmft_log::point::ExecutionPoint;
use vmft_sandbox::Use;
use vmft_vmm::inputs::Replaying;
use vmft_vmm::machine::RunEnd;
use vmft_vmm::outputs::KeptOutputs;
use vmft_vmm::snapshot;
use vmft_vmm::world::console::{ConsoleHub, ConsoleTarget, EarlyInput};

/// Options of `vmft replay`.
#[derive(Debug, Args)]
pub struct ReplayOptions {
    /// The log file
    #[arg(value_name = "FILE")]
    log: PathBuf,
    /// Stop at this point: on soft, after so many instructions
    #[arg(long, value_name = "POINT")]
    to: Option<u64>,
    /// Where the replayed console goes: null, tty or file=PATH
    #[arg(long, value_name = "WHERE", default_value = "null")]
    serial: SerialOption,
    /// Write a snapshot of the machine where the replay ends
    #[arg(long, value_name = "DIR")]
    snapshot: Option<PathBuf>,
    #[command(flatten)]
    compiler: CompilerOptions,
    #[command(flatten)]
    sandbox: SandboxOptions,
}

/// Replays a log offline.
pub fn replay(options: &ReplayOptions) -> Result<ExitCode> {
    options.compiler.apply()?;
    let path = options.log.display();
    if matches!(options.serial.0, ConsoleTarget::Socket(_)) {
        bail!("a replay has no console to attach to; give --serial null, tty or file=PATH");
    }
    if let Some(directory) = options.snapshot.as_ref().filter(|directory| directory.exists()) {
        bail!("{} exists; snapshots are not overwritten, name another", directory.display());
    }
    let log = Named(&options.log, Use::Read);
    options.sandbox.enter(files_of(&[&log, &options.serial.0]))?;
    let file = File::open(&options.log)
        .with_context(|| format!("opening log {path}"))
        .remedy(|| "name a file that `vmft record --log FILE` has written")?;
    let until = options.to.map_or(ExecutionPoint::NEVER, ExecutionPoint::new);
    let (header, mut machine, log) = RecordedLog::open(file, until)
        .with_context(|| format!("log {path}"))
        .remedy(|| "nothing of it can be replayed; record again with `vmft record --log FILE`")?;
    check_version(&header.identity.fingerprint, machine.config().engine).map_err(|mismatch| {
        anyhow!(
            "log {path} was recorded by another program or on another host: {mismatch}; replay it with \
             the vmft that recorded it, there"
        )
    })?;

    let started = Instant::now();
    let first = machine.point();
    let console = ConsoleHub::open(&options.serial.0, EarlyInput::Dropped)?;
    let kept = Arc::new(KeptOutputs::default());
    let gate = ReplayGate::showing(Arc::clone(&kept), Arc::clone(&console));
    end_start()?;
    let mut inputs = Replaying::new(log, kept, first, machine.ram().size());
    let end = machine.run(&mut inputs, &gate).and_then(|end| {
        if let RunEnd::Stopped(reason) = end {
            // The log must say so, too; where it ends before that is told below.
            let _ = inputs.stopped(machine.point(), machine.outputs(), reason)?;
            inputs.log().read_to_end();
        }
        Ok(end)
    });
    // However long its reader takes: Ctrl-C ends a replay.
    while !console.drain(Duration::from_secs(1)) {}
    console.close();

    let seconds = started.elapsed().as_secs_f64();
    let instructions = machine.point().since(first);
    say(&format!(
        "replayed {instructions} instructions from point {first} to {}: {} entries, \
         {} digests agree, {:.1} million instructions a second",
        machine.point(),
        inputs.log().entries_read(),
        inputs.digests(),
        instructions as f64 / seconds / 1e6,
    ))?;
    match end {
        Ok(RunEnd::Stopped(reason)) => say(&format!("the guest stopped: {reason:?}"))?,
        Ok(_) => {}
        Err(error) => {
            let report = anyhow::Error::from(error);
            bail!("{report:#}; to see it again: vmft replay {path} --to {}", machine.point());
        }
    }
    if let Some(damage) = inputs.log().damage() {
        let damage = damage.clone();
        return Err(damage).with_context(|| format!("log {path}")).remedy(|| {
            format!("what is good of it was replayed; `--to {}` ends there", machine.point())
        });
    }
    say(&format!("state {:016x}", machine.full_digest()))?;
    if let Some(directory) = &options.snapshot {
        snapshot::save(&mut machine, directory)?;
        say(&format!("snapshot {}", directory.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
