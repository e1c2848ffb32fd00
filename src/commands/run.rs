//! `vmft run`.

use crate::disk_images::{DisksOf, open_disks};
use crate::engine_options::{ENGINE_REMEDY, RunKind};
use crate::interrupt;
use crate::machine_options::{MachineOptions, SideOptions, make_side};
use crate::sandbox_options::{end_start, files_of};
use crate::terminal;
use anyhow::{Result, anyhow};
use clap::Args;
use std::process::ExitCode;
use vmft_backup::events::{self, Ending, Event};
use vmft_backup::side::{SideEnd, SideError};
use vmft_backup::tell;
use vmft_log::entry::StopReason;
use vmft_vmm::engine::EngineKind;
use vmft_vmm::machine::MachineError;
use vmft_vmm::world::console::EarlyInput;

/// Options of `vmft run`.
#[derive(Debug, Args)]
pub struct RunOptions {
    #[command(flatten)]
    machine: MachineOptions,
    #[command(flatten)]
    side: SideOptions,
}

/// Runs a guest unprotected.
pub fn run(options: &RunOptions) -> Result<ExitCode> {
    let prepared = options.machine.prepare(RunKind::Free)?;
    let files = files_of(&[&options.machine, &options.side]);
    options.side.sandbox.enter(files)?;
    let open = open_disks(&options.machine.disks(), DisksOf::Alone, options.side.disk_policy())?;
    let machine = options.machine.machine(prepared, &open.disks)?;
    let network = options.machine.network(&machine)?;
    let side = make_side(&options.side, open, network, "machine", EarlyInput::Waits)?;
    side.status.set_machine(&machine);
    interrupt::serve_side(&side, &options.side)?;
    let _terminal = terminal::attach(&options.side.serial.0, &side.console, &side.mailbox)?;
    let engine = machine.config().engine;
    end_start()?;
    let end = side.run(machine).map_err(|error| with_advice(error, engine))?;
    Ok(report(&end))
}

/// Why a side could not go on; and where its engine is at fault, what to do.
pub fn with_advice(error: SideError, engine: EngineKind) -> anyhow::Error {
    let at_fault = matches!(error, SideError::Machine(MachineError::Engine(_)));
    let error = anyhow::Error::from(error);
    match engine {
        EngineKind::Kvm { .. } if at_fault => anyhow!("{error:#}; {ENGINE_REMEDY}"),
        _ => error,
    }
}

/// Says how a side ended; a side that halted because its peer goes on failed.
pub fn report(end: &SideEnd) -> ExitCode {
    let how = match end {
        SideEnd::Stopped(reason) => Ending::Stopped(*reason),
        SideEnd::Halted(why) => Ending::Halted(why.as_str().into()),
    };
    events::note(|| Event::End { how });
    match end {
        SideEnd::Stopped(StopReason::CannotBoot) => {
            tell!("stopped: the guest does not start");
            ExitCode::FAILURE
        }
        SideEnd::Stopped(reason) => {
            tracing::info!(?reason, "the guest stopped");
            ExitCode::SUCCESS
        }
        SideEnd::Halted(why) => {
            tell!("halted: {why}");
            ExitCode::FAILURE
        }
    }
}
