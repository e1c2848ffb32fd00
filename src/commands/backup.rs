//! `vmft backup` and `vmft standby`.

use crate::api::ShutdownHook;
use crate::arbiter_option::ArbiterPlace;
use crate::disk_images::{DisksOf, open_disks};
use crate::engine_options::{ENGINE_REMEDY, EngineOptions};
use crate::interrupt;
use crate::machine_options::{SideOptions, make_side};
use crate::net_options::NetOption;
use crate::options::{DiskOption, MemoryOption, disks_and_seed};
use crate::pair_options::{self, ListenPlace, PairOptions};
use crate::sandbox_options::{ArbiterOf, NamesFiles, end_start, files_of};
use crate::seed::SeedFiles;
use crate::terminal;
use anyhow::{Result, anyhow};
use clap::Args;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_backup::arbiter::{Arbiter, ArbiterError, RemoteError};
use vmft_backup::following::{BackupControl, BackupDuties, Patience};
use vmft_backup::identity::{Joining, MICROCODE, PROTECTION};
use vmft_backup::side::{Side, SideError};
use vmft_backup::storage::is_storage_field;
use vmft_backup::tell;
use vmft_log::foreign::ForeignText;
use vmft_logging_channel::fingerprint::{Identity, Mismatch};
use vmft_logging_channel::receiver::ReceiverConfig;
use vmft_logging_channel::transport::{BackupConfig, PeerAddress, TransportError};
use vmft_vmm::machine::StateError;
use vmft_vmm::world::OWN_COPY;
use vmft_vmm::world::console::EarlyInput;

/// How long to wait for the pair without a word about it, and between two looks.
const QUIET_WAIT: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(50);

/// Options of `vmft backup`.
#[derive(Debug, Args)]
pub struct BackupOptions {
    /// Where the primary listens: with tls: both sides show certificates (see `vmft keys`); without, only
    /// on this host (tcp:127.0.0.1:PORT, unix:PATH)
    #[arg(long, value_name = "tls:HOST:PORT[,tls_dir=DIR]", help_heading = "Pair")]
    primary: PeerAddress,
    /// Where the next backup may join once this side has gone live
    #[arg(long, value_name = "tls:HOST:PORT[,tls_dir=DIR]", help_heading = "Pair")]
    listen: Option<PeerAddress>,
    /// How long to try to reach the primary, in seconds
    #[arg(long, value_name = "S", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(..=86_400), help_heading = "Pair")]
    connect_timeout: u64,
    #[command(flatten)]
    follow: FollowOptions,
}

/// Options of `vmft standby`.
#[derive(Debug, Args)]
pub struct StandbyOptions {
    /// Where the sides of the pair listen, this one's own address left out: whichever is live and
    /// wants a backup is joined
    #[arg(long, required = true, num_args = 1.., value_name = "tls:HOST:PORT[,tls_dir=DIR]",
          help_heading = "Pair")]
    join: Vec<PeerAddress>,
    /// Where the next backup may join once this side has gone live
    #[arg(long, value_name = "tls:HOST:PORT[,tls_dir=DIR]", help_heading = "Pair")]
    listen: PeerAddress,
    #[command(flatten)]
    follow: FollowOptions,
}

/// What every side has that begins by following.
#[derive(Debug, Args)]
struct FollowOptions {
    /// How many backups may follow this side at a time once it has gone live: outputs wait for all
    /// that do
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=8), help_heading = "Pair")]
    backups: u8,
    /// A raw disk image, the same as the primary's; may be given several times. It is used without the
    /// host's cache, unless cache=writeback accepts what is lost with a host. With mirror=on it is this
    /// side's own copy, filled from the primary's; size= makes one where there is none
    #[arg(
        long,
        value_name = "path=FILE[,readonly=on|off][,cache=none|writeback][,format=raw][,mirror=on][,…]",
        help_heading = "Machine"
    )]
    disk: Vec<DiskOption>,
    /// The same files as the primary's
    #[arg(
        long,
        value_name = "USER-DATA[,meta-data=FILE][,network-config=FILE][,vendor-data=FILE]",
        help_heading = "Machine"
    )]
    seed: Option<SeedFiles>,
    /// Where the guest's network is connected once this side is live; needed if the primary has one
    #[arg(long, value_name = "tap=NAME|tap-fd=N|socket=PATH", help_heading = "Machine")]
    net: Option<NetOption>,
    /// The most memory that the primary's guest may have, 64M to 4G. It is taken as the guest's memory
    /// comes; by default a guest may have what any may
    #[arg(long, value_name = "size=BYTES", default_value = "size=4G", help_heading = "Machine")]
    memory: MemoryOption,
    /// Acknowledge so late, in milliseconds: to see that outputs wait
    #[arg(long, value_name = "MS", default_value_t = 0,
          value_parser = clap::value_parser!(u64).range(..=60_000), help_heading = "Experiments")]
    acknowledge_delay: u64,
    // A backup takes the primary's engine; named here, no other will do.
    #[command(flatten)]
    engine: EngineOptions,
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
    let patience = Patience::For(Duration::from_secs(options.connect_timeout));
    let primaries = vec![options.primary.clone()];
    follow(&options.follow, primaries, options.listen.as_ref(), patience)
}

/// Waits for a live side without a backup, follows it, and takes over when it is lost.
pub fn standby(options: &StandbyOptions) -> Result<ExitCode> {
    let (sides, listen) = (options.join.clone(), Some(&options.listen));
    follow(&options.follow, sides, listen, Patience::Standby)
}

fn follow(
    options: &FollowOptions,
    primaries: Vec<PeerAddress>,
    listen: Option<&PeerAddress>,
    patience: Patience,
) -> Result<ExitCode> {
    options.engine.compiler.apply()?;
    let bounds = options.pair.bounds()?;
    let disk_options = disks_and_seed(&options.disk, options.seed.as_ref());
    let arbiter = ArbiterOf(&options.pair, &options.disk);
    let mut files = files_of(&[&disk_options, &options.side, &arbiter]);
    for address in primaries.iter().chain(listen) {
        address.name_files(&mut files);
    }
    options.side.sandbox.enter(files)?;
    let used = |given: &PeerAddress| options.pair.address(given);
    let primaries = primaries.iter().map(used).collect::<Result<Vec<_>>>()?;
    let listen = listen.map(used).transpose()?;
    let arbiter_place = options.pair.arbiter_place(&options.disk)?;
    arbiter_place.check()?;
    let wanted = options.engine.wanted(options.pair.run_kind())?;
    options.pair.check_mirrors(&options.disk)?;
    let disks = open_disks(&disk_options, DisksOf::Joining, options.side.disk_policy())?;
    let network = NetOption::port_of_follower(options.net.as_ref())?;
    let place = listen.as_ref().map(ListenPlace::take).transpose()?;
    let role = if patience == Patience::Standby { "standby" } else { "backup" };
    let side = make_side(&options.side, disks, network, role, EarlyInput::Dropped)?;
    let side = Side { bounds, ..side };
    let control = Arc::new(BackupControl::default());
    let hook: Arc<dyn ShutdownHook> = Arc::clone(&control) as _;
    interrupt::serve_side_with(&side, &options.side, hook)?;
    if let Some(place) = &place {
        // Known before this side is live, so that others may be told.
        let address = place.listener.local_address().to_string();
        side.status.update(|status| status.listening = Some(address));
    }

    let protection = options.pair.protection();
    let configs = pair_options::disk_configs(&side.disks);
    let mac = options.net.as_ref().map(|net| net.mac);
    let joining = Joining { engine: wanted, disks: &configs, network: mac };
    let find = || pair_options::find_pair(&arbiter_place, joining, &side.disks, protection);
    let may_come = |error: &anyhow::Error| may_come(error, &arbiter_place);
    let Some((arbiter, identity)) = wait_for_pair(find, may_come, &control, patience)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let backups = usize::from(options.backups);
    let listen = place.map(|place| options.pair.primary_config(place, identity.clone(), backups));
    let nowhere = primaries.first().expect("at least one is given").clone();
    let channel = BackupConfig {
        receiver: ReceiverConfig {
            acknowledge_delay: Duration::from_millis(options.acknowledge_delay),
            ..ReceiverConfig::default()
        },
        detector: options.pair.detector(),
        ..BackupConfig::new(nowhere, identity)
    };
    let terminal = terminal::attach(&options.side.serial.0, &side.console, &side.mailbox)?;
    let memory = options.memory.size;
    let share = Arc::clone(&arbiter);
    let duties = BackupDuties { arbiter, channel, primaries, patience, memory, protection, listen };
    end_start()?;
    let end = side.follow(duties, &control).map_err(with_remedy);
    share.leave();
    drop(terminal);
    Ok(super::run::report(&end?))
}

/// Finds the pair, and waits for it if its primary is still starting. `None` if the operator stops
/// the side meanwhile.
fn wait_for_pair(
    find: impl Fn() -> Result<(Arc<dyn Arbiter>, Identity)>,
    may_come: impl Fn(&anyhow::Error) -> bool,
    control: &BackupControl,
    patience: Patience,
) -> Result<Option<(Arc<dyn Arbiter>, Identity)>> {
    let started = Instant::now();
    let mut told = false;
    while !control.is_leaving() {
        match find() {
            Err(error) if !patience.is_over(started.elapsed()) && may_come(&error) => {
                if !told && started.elapsed() > QUIET_WAIT {
                    tell!("{error:#}; {patience}");
                    told = true;
                }
                std::thread::sleep(POLL);
            }
            other => return other.map(Some),
        }
    }
    Ok(None)
}

/// True where the pair may be there later: its primary, or the service that is its arbiter, is starting.
fn may_come(error: &anyhow::Error, place: &ArbiterPlace) -> bool {
    let error = match error.downcast_ref() {
        Some(RemoteError::Arbiter(error)) => Some(error),
        _ => error.downcast_ref(),
    };
    match error {
        Some(ArbiterError::Absent { .. }) => true,
        Some(ArbiterError::Unreachable { .. }) => !matches!(place, ArbiterPlace::Directory(_)),
        _ => false,
    }
}

/// True if one side has a copy of the disk, and the other does not say so.
fn is_half_mirrored(mismatch: &Mismatch) -> bool {
    let is_copy = |told: &Option<ForeignText>| told.as_ref().is_some_and(|told| *told == *OWN_COPY);
    is_copy(&mismatch.primary) != is_copy(&mismatch.backup)
}

/// What to do about a primary that cannot be joined.
fn with_remedy(error: SideError) -> anyhow::Error {
    use vmft_logging_channel::handshake::{HandshakeError, Refusal};
    let remedy = match &error {
        SideError::Transport(TransportError::Handshake(
            HandshakeError::Refused(refusal) | HandshakeError::RefusedByPeer(refusal),
        )) => match refusal {
            Refusal::Undisclosed => {
                "name the primary's own disks and arbiter here, and --protect, --engine and --net as there"
            }
            Refusal::WrongPair { .. } => "name the primary's own disk and arbiter here",
            Refusal::Fingerprint(mismatch) if mismatch.field == "engine" => {
                "name the primary's --engine and --points here, or none"
            }
            Refusal::Fingerprint(mismatch) if mismatch.field == PROTECTION => {
                "give both sides the same --protect mode"
            }
            Refusal::Fingerprint(mismatch) if mismatch.field == MICROCODE => {
                "a guest that is followed on --engine kvm needs the same microcode on both hosts; \
                 --protect checkpoint does without"
            }
            Refusal::Fingerprint(mismatch) if mismatch.field == "host cpu" => {
                "a guest on --engine kvm needs the same CPU and KVM on both hosts; --engine soft runs \
                 on different ones"
            }
            Refusal::Fingerprint(mismatch) if mismatch.field.starts_with("network") => {
                "name with --net where the guest's network is connected on this host, without mac=, \
                 if the primary has one"
            }
            Refusal::Fingerprint(mismatch)
                if is_storage_field(&mismatch.field.to_string()) && is_half_mirrored(mismatch) =>
            {
                "say mirror=on of that disk on both sides, or on none"
            }
            Refusal::Fingerprint(mismatch) if is_storage_field(&mismatch.field.to_string()) => {
                "the image here is another file than the primary's, perhaps a copy: both sides must name \
                 the same image on storage that they share"
            }
            Refusal::OtherStorage => {
                "name the primary's own --disk or --arbiter here, on storage that both hosts share; a copy \
                 of it lets both sides go live"
            }
            Refusal::Fingerprint(_) => "give both sides the same --disk options and the same vmft",
            Refusal::WrongGeneration { .. } => "name the side that is live now with --primary",
            Refusal::WrongRole(_) => "name a primary's --listen address with --primary",
            Refusal::HasBackup | Refusal::NotAccepting(_) => "see `vmft status` of the primary",
            Refusal::Version { .. } | Refusal::Replayed => return error.into(),
        },
        SideError::State(StateError::Engine { .. }) => ENGINE_REMEDY,
        SideError::Transport(TransportError::Connect { source, .. })
            if matches!(**source, TransportError::Tls(_)) =>
        {
            "tls_dir= takes a directory that `vmft keys` has made, default ~/.config/vmft/tls"
        }
        SideError::Transport(TransportError::Connect { source, .. })
            if matches!(**source, TransportError::Certificate(_)) =>
        {
            return error.into();
        }
        SideError::Transport(
            TransportError::Connect { .. }
            | TransportError::Closed { .. }
            | TransportError::TimedOut { .. }
            | TransportError::Frame(_)
            | TransportError::Io(_),
        ) => "is a primary running there? --primary names its --listen address",
        _ => return error.into(),
    };
    anyhow!("{:#}; {remedy}", anyhow::Error::from(error))
}
