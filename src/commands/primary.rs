//! `vmft primary`.

use crate::arbiter_option::ArbiterPlace;
use crate::disk_images::{DisksOf, open_disks};
use crate::interrupt;
use crate::machine_options::{MachineOptions, SideOptions, make_side};
use crate::options::DiskOption;
use crate::pair_options::{self, ListenPlace, PairOptions};
use crate::sandbox_options::{ArbiterOf, end_start, files_of};
use crate::terminal;
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
use std::sync::Arc;
use vmft_backup::live::LiveDuties;
use vmft_backup::side::Side;
use vmft_backup::tell;
use vmft_logging_channel::transport::{LocalAddress, PeerAddress};
use vmft_vmm::machine::MachineConfig;
use vmft_vmm::world::console::EarlyInput;

/// Options of `vmft primary`.
#[derive(Debug, Args)]
pub struct PrimaryOptions {
    /// Where the backup joins: with tls: both sides show certificates (see `vmft keys`); without, only on
    /// this host (tcp:127.0.0.1:PORT, unix:PATH)
    #[arg(long, value_name = "tls:HOST:PORT[,tls_dir=DIR]", help_heading = "Pair")]
    listen: PeerAddress,
    /// Begin without a backup: the guest is unprotected until one joins
    #[arg(long, help_heading = "Pair")]
    no_wait: bool,
    /// How many backups follow at a time: outputs wait for all that do, and the guest waits for all of
    /// them at its start
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=8), help_heading = "Pair")]
    backups: u8,
    #[command(flatten)]
    pair: PairOptions,
    #[command(flatten)]
    machine: MachineOptions,
    #[command(flatten)]
    side: SideOptions,
}

impl PrimaryOptions {
    /// Its copies of disks, of which each side has one.
    pub fn copies(&self) -> Vec<DiskOption> {
        self.machine.disk.iter().filter(|disk| disk.mirror.is_some()).cloned().collect()
    }

    /// Where the arbiter is.
    ///
    /// # Errors
    /// It is not said, or cannot be the pair's.
    pub fn arbiter_place(&self) -> Result<ArbiterPlace> {
        self.pair.arbiter_place(&self.machine.disk)
    }
}

/// Where a side listens, as its operator is told.
fn told_address(address: &LocalAddress) -> String {
    match address {
        LocalAddress::Tcp(address) => format!("tcp:{address}"),
        unix @ LocalAddress::Unix(_) => unix.to_string(),
    }
}

/// Runs a guest that a backup can follow.
pub fn primary(options: &PrimaryOptions) -> Result<ExitCode> {
    let bounds = options.pair.bounds()?;
    let prepared = options.machine.prepare(options.pair.run_kind())?;
    let arbiter = ArbiterOf(&options.pair, &options.machine.disk);
    let files = files_of(&[&options.machine, &options.side, &options.listen, &arbiter]);
    options.side.sandbox.enter(files)?;
    let address = options.pair.address(&options.listen)?;
    let place = options.arbiter_place()?;
    place.check()?;
    options.pair.check_mirrors(&options.machine.disk)?;
    let open = open_disks(&options.machine.disks(), DisksOf::NewPair, options.side.disk_policy())?;
    let listen_place = ListenPlace::take(&address)?;
    let machine = options.machine.machine(prepared, &open.disks)?;
    let MachineConfig { engine, board } = machine.config().clone();
    let network = options.machine.network(&machine)?;
    let side = make_side(&options.side, open, network, "primary", EarlyInput::Waits)?;
    let side = Side { bounds, ..side };
    side.status.set_machine(&machine);
    interrupt::serve_side(&side, &options.side)?;

    // Everything has been checked: now the shared storage may change.
    let protection = options.pair.protection();
    let (arbiter, identity) = pair_options::begin_reign(&place, &side, engine, &board, protection)?;
    let generation = identity.generation;
    let address = told_address(listen_place.listener.local_address());
    let backups = usize::from(options.backups);
    let listen = options.pair.primary_config(listen_place, identity, backups);
    let terminal = terminal::attach(&options.side.serial.0, &side.console, &side.mailbox)?;
    if options.no_wait {
        tell!("unprotected until a backup joins at {address}");
    } else {
        tell!(
            "waiting for {} at {address}",
            match backups {
                1 => "a backup".to_owned(),
                count => format!("{count} backups"),
            }
        );
    }
    let share = Arc::clone(&arbiter);
    let duties = LiveDuties {
        arbiter,
        generation,
        listen: Some(listen),
        wait_for_backups: if options.no_wait { 0 } else { backups },
        protection,
    };
    end_start()?;
    let end = side.run_live(machine, duties);
    share.leave();
    let end = end.map_err(|error| super::run::with_advice(error, engine))?;
    drop(terminal);
    Ok(super::run::report(&end))
}
