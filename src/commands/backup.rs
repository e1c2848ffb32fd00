//! `vmft backup`.

use crate::api::ShutdownHook;
use crate::interrupt;
use crate::machine_options::SideOptions;
use crate::options::DiskOption;
use crate::pair_options::{self, PairOptions, PairSide};
use crate::terminal;
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use vmft_backup::following::{BackupControl, BackupDuties};
use vmft_logging_channel::receiver::ReceiverConfig;
use vmft_logging_channel::transport::{BackupConfig, PeerAddress};

/// Options of `vmft backup`.
#[derive(Debug, Args)]
pub struct BackupOptions {
    /// Where the primary listens
    #[arg(long, value_name = "tcp:HOST:PORT[,tls_dir=DIR]", help_heading = "Pair")]
    primary: PeerAddress,
    /// Where the next backup may join once this side has gone live
    #[arg(long, value_name = "tcp:HOST:PORT[,tls_dir=DIR]", help_heading = "Pair")]
    listen: Option<PeerAddress>,
    /// How long to try to reach the primary, in seconds
    #[arg(long, value_name = "S", default_value_t = 60, help_heading = "Pair")]
    connect_timeout: u64,
    /// A disk image, the same as the primary's; may be given several times
    #[arg(long, value_name = "path=FILE[,readonly=on|off]", help_heading = "Machine")]
    disk: Vec<DiskOption>,
    /// Acknowledge so late, in milliseconds: to see that outputs wait
    #[arg(long, value_name = "MS", default_value_t = 0, help_heading = "Experiments")]
    acknowledge_delay: u64,
    #[command(flatten)]
    pair: PairOptions,
    #[command(flatten)]
    side: SideOptions,
}

impl ShutdownHook for BackupControl {
    fn shutdown(&self) {
        self.leave();
    }
}

/// Follows a primary, and takes over when it is lost.
pub fn backup(options: &BackupOptions) -> Result<ExitCode> {
    let opened = pair_options::open(&options.pair, &options.side, &options.disk, "backup", false)?;
    let PairSide { side, arbiter, identity } = opened;
    let listen = options.listen.clone();
    let listen = listen.map(|listen| options.pair.primary_config(listen, identity.clone()));
    let channel = BackupConfig {
        receiver: ReceiverConfig {
            acknowledge_delay: Duration::from_millis(options.acknowledge_delay),
            ..ReceiverConfig::default()
        },
        detector: options.pair.detector(),
        ..BackupConfig::new(options.primary.clone(), identity)
    };
    let control = Arc::new(BackupControl::default());
    let hook: Arc<dyn ShutdownHook> = Arc::clone(&control) as _;
    interrupt::serve_side_with(&side, options.side.api_socket.as_deref(), hook)?;
    let terminal = terminal::attach(&options.side.serial.0, &side.console, &side.mailbox)?;
    let duties = BackupDuties {
        arbiter,
        channel,
        connect_timeout: Duration::from_secs(options.connect_timeout),
        listen,
    };
    let end = side.follow(duties, &control)?;
    drop(terminal);
    Ok(super::run::report(&end))
}
