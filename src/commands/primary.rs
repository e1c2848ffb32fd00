//! `vmft primary`.

use crate::interrupt;
use crate::machine_options::{MachineOptions, SideOptions};
use crate::pair_options::{self, PairOptions, PairSide};
use crate::terminal;
use anyhow::{Result, bail};
use clap::Args;
use std::process::ExitCode;
use vmft_backup::arbiter::Verdict;
use vmft_backup::live::LiveDuties;
use vmft_logging_channel::entry::Generation;
use vmft_logging_channel::transport::PeerAddress;

/// Options of `vmft primary`.
#[derive(Debug, Args)]
pub struct PrimaryOptions {
    /// Where the backup joins; with tls_dir both sides show certificates (see `vmft tls-init`)
    #[arg(long, value_name = "tcp:HOST:PORT[,tls_dir=DIR]", help_heading = "Pair")]
    listen: PeerAddress,
    /// Begin without a backup: the guest is unprotected until one joins
    #[arg(long, help_heading = "Pair")]
    no_wait: bool,
    #[command(flatten)]
    pair: PairOptions,
    #[command(flatten)]
    machine: MachineOptions,
    #[command(flatten)]
    side: SideOptions,
}

/// Runs a guest that a backup can follow.
pub fn primary(options: &PrimaryOptions) -> Result<ExitCode> {
    let disks = &options.machine.disk;
    let opened = pair_options::open(&options.pair, &options.side, disks, "primary", true)?;
    let PairSide { side, arbiter, mut identity } = opened;
    let machine = options.machine.machine(&side.disks)?;
    side.status.set_guest_memory(machine.ram().host_ranges());

    let generation = Generation(identity.generation.0 + 1);
    if let Verdict::Lost { winner } = arbiter.try_win(generation, &side.who)? {
        bail!("generation {} has just been won by {winner}", generation.0);
    }
    identity.generation = generation;
    let listen = options.pair.primary_config(options.listen.clone(), identity);
    interrupt::serve_side(&side, options.side.api_socket.as_deref())?;
    if !options.no_wait {
        eprintln!("vmft: waiting for a backup at {}", options.listen);
    }
    let terminal = terminal::attach(&options.side.serial.0, &side.console, &side.mailbox)?;
    let duties =
        LiveDuties { arbiter, generation, listen: Some(listen), wait_for_backup: !options.no_wait };
    let end = side.run_live(machine, duties)?;
    drop(terminal);
    Ok(super::run::report(&end))
}
