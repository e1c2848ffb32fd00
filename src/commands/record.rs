//! `vmft record`.

use crate::disk_images::{DisksOf, open_disks};
use crate::engine_options::RunKind;
use crate::interrupt;
use crate::machine_options::{MachineOptions, SideOptions, fresh_id, make_side};
use crate::remedy::Remedy;
use crate::sandbox_options::{end_start, files_of};
use crate::terminal;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use vmft_backup::identity::{fingerprint, nonce};
use vmft_backup::recorded::FileLog;
use vmft_backup::tell;
use vmft_log::entry::Generation;
use vmft_logging_channel::fingerprint::Identity;
use vmft_logging_channel::log_file::LogHeader;
use vmft_sandbox::outside_of_landlock;
use vmft_vmm::world::console::EarlyInput;

/// Options of `vmft record`.
#[derive(Debug, Args)]
pub struct RecordOptions {
    /// The log file to write; it must not exist
    #[arg(long, value_name = "FILE")]
    log: PathBuf,
    #[command(flatten)]
    machine: MachineOptions,
    #[command(flatten)]
    side: SideOptions,
}

/// Runs a guest and records it.
pub fn record(options: &RecordOptions) -> Result<ExitCode> {
    let prepared = options.machine.prepare(RunKind::Replayed)?;
    options.side.sandbox.enter(files_of(&[&options.machine, &options.side]))?;
    let open = open_disks(&options.machine.disks(), DisksOf::Alone, options.side.disk_policy())?;
    if options.log.exists() {
        bail!("log {} exists; logs are not overwritten, name a new file", options.log.display());
    }
    let mut machine = options.machine.machine(prepared, &open.disks)?;
    let engine = machine.config().engine;
    let network = options.machine.network(&machine)?;
    let side = make_side(&options.side, open, network, "recorder", EarlyInput::Waits)?;
    side.status.set_machine(&machine);
    interrupt::serve_side(&side, &options.side)?;

    let path = options.log.clone();
    let create = || OpenOptions::new().create_new(true).write(true).mode(0o600).open(path);
    let file = outside_of_landlock(create)
        .with_context(|| format!("creating log {}", options.log.display()))
        .remedy(|| "--log takes a path for a new file")?;
    let metadata = BTreeMap::from([("recorded on".into(), side.who.host.clone())]);
    let header = LogHeader {
        identity: Identity {
            pair: format!("record-{}", fresh_id()?).parse()?,
            generation: Generation(0),
            fingerprint: fingerprint(engine, &machine.config().board),
        },
        metadata,
        nonce: nonce()?,
    };
    let log = FileLog::create(file, header, &mut machine)
        .with_context(|| format!("writing log {}", options.log.display()))?;

    let terminal = terminal::attach(&options.side.serial.0, &side.console, &side.mailbox)?;
    end_start()?;
    let end = side.record(&mut machine, log.clone());
    let end = end.map_err(|error| super::run::with_advice(error, engine))?;
    drop(terminal);
    log.finish().with_context(|| format!("writing log {}", options.log.display()))?;
    let (point, state) = (machine.point(), machine.full_digest());
    tell!("recorded to {}, to point {point}; state {state:016x}", options.log.display());
    Ok(super::run::report(&end))
}
