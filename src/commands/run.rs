//! `vmft run`.

use crate::interrupt;
use crate::machine_options::{MachineOptions, SideOptions, make_side, open_disks};
use crate::terminal;
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
use vmft_backup::side::SideEnd;
use vmft_backup::tell;

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
    let disks = open_disks(&options.machine.disk, true)?;
    let machine = options.machine.machine(&disks)?;
    let side = make_side(&options.side, disks, "machine")?;
    side.status.set_guest_memory(machine.ram().host_ranges());
    interrupt::serve_side(&side, options.side.api_socket.as_deref())?;
    let _terminal = terminal::attach(&options.side.serial.0, &side.console, &side.mailbox)?;
    let end = side.run(machine)?;
    Ok(report(&end))
}

/// Says how a side ended; a side that halted because its peer goes on failed.
pub fn report(end: &SideEnd) -> ExitCode {
    match end {
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
