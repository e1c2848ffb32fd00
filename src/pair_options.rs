//! The options of a side of a pair.

use crate::arbiter_option::{ArbiterOption, ArbiterPlace};
use crate::engine_options::RunKind;
use crate::machine_options::fresh_id;
use crate::nbd_disk;
use crate::options::{DiskOption, DiskPlace};
use crate::pair_state;
use crate::protection_options::{LagOption, ProtectOption, TimeOption};
use crate::remedy::Remedy;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::sync::Arc;
use std::time::Duration;
use vmft_backup::arbiter::{Arbiter, DirectoryArbiter, EtcdArbiter, Verdict};
use vmft_backup::bounds::Bounds;
use vmft_backup::epoch::Protection;
use vmft_backup::identity::{Joining, fingerprint, joining_fingerprint, protecting};
use vmft_backup::lag::LagBound;
use vmft_backup::mirror::report::CopyRole;
use vmft_backup::side::Side;
use vmft_backup::storage;
use vmft_backup::tell;
use vmft_log::entry::Generation;
use vmft_logging_channel::detector::DetectorConfig;
use vmft_logging_channel::fingerprint::{Fingerprint, Identity};
use vmft_logging_channel::sender::SenderConfig;
use vmft_logging_channel::transport::{Listener, PeerAddress, PrimaryConfig, TransportError};
use vmft_vmm::board::{BoardConfig, Bytes, DiskConfig};
use vmft_vmm::engine::EngineKind;
use vmft_vmm::world::DiskFile;

/// How the two sides find out about each other and who may go on.
#[derive(Debug, Clone, Args)]
pub struct PairOptions {
    /// Who decides which side goes on: a directory on storage that both hosts share, the server of a disk,
    /// or the members of an etcd, where the pair has a name of its own; both with ,tls_dir=DIR for
    /// certificates, an etcd with ,insecure=on for none. Default: what goes with the first writable disk,
    /// its path with `.vmft` added or its server
    #[arg(
        long,
        value_name = "dir=PATH|nbd=HOST:PORT/NAME|etcd=HOST:PORT,…,name=PAIR",
        help_heading = "Pair"
    )]
    pub arbiter: Option<ArbiterOption>,
    /// Take the peer for lost after so much silence, in milliseconds. A closed connection is noticed
    /// at once
    #[arg(long, value_name = "MS", default_value_t = 300,
          value_parser = clap::value_parser!(u64).range(40..=60_000), help_heading = "Pair")]
    pub suspect_after: u64,
    /// How the guest is protected, alike on both sides: lockstep (the backup replays it), or checkpoint
    /// (the backup is sent what has changed; any kernel on any engine). An interval is 2ms to 1s
    #[arg(
        long,
        value_name = "lockstep|checkpoint[,interval=25ms]",
        default_value = "lockstep",
        help_heading = "Pair"
    )]
    pub protect: ProtectOption,
    /// How far a backup that replays may be behind: its primary is slowed, to half its speed there.
    /// Where that is not enough: slow it further, go on unprotected with a warning, or stop the guest until
    /// the backup is within the bound again. 50ms to 60s; default 120ms,then=slow
    #[arg(long, value_name = "TIME[,then=slow|unprotect|stop]", help_heading = "Pair")]
    pub max_lag: Option<LagOption>,
    /// Bound what a backup has to replay: while it is further behind than this, checkpoints go into the log
    /// as often, and it goes on from the newest instead of replaying up to it. 20ms to 60s; without it,
    /// everything is replayed
    #[arg(long, value_name = "TIME", help_heading = "Pair")]
    pub bound_replay: Option<TimeOption>,
    /// Let the channel go to other hosts without TLS (tcp: addresses that are not this host's): whoever
    /// reaches them can read the guest, change it and take it over
    #[arg(long, help_heading = "Pair")]
    pub insecure: bool,
}

impl PairOptions {
    /// How the guest is protected.
    pub fn protection(&self) -> Protection {
        self.protect.0
    }

    /// How far a backup may be behind, until an operator changes that.
    ///
    /// # Errors
    /// In checkpoint mode there is nothing to be bounded.
    pub fn bounds(&self) -> Result<Arc<Bounds>> {
        let given = [
            ("--max-lag", self.max_lag.is_some()),
            ("--bound-replay", self.bound_replay.is_some()),
        ];
        if let Some((option, _)) = given.iter().find(|(_, is_given)| *is_given)
            && self.protection() != Protection::Lockstep
        {
            bail!(
                "{option} is for --protect lockstep; by checkpoints a backup is never further behind than an \
                 epoch, whose interval= is the bound"
            );
        }
        let bound = self.max_lag.map_or_else(LagBound::default, |LagOption(bound)| bound);
        let bound = match self.bound_replay {
            Some(TimeOption(replay)) => {
                bound.with_replay_bound(replay).context("--bound-replay")?
            }
            None => bound,
        };
        Ok(Arc::new(Bounds::new(self.protection(), bound)))
    }

    /// What its machine is for.
    pub fn run_kind(&self) -> RunKind {
        self.protection().into()
    }

    /// Where the arbiter is.
    pub fn arbiter_place(&self, disks: &[DiskOption]) -> Result<ArbiterPlace> {
        let default = || -> Option<ArbiterPlace> {
            let disk = disks.iter().find(|disk| !disk.read_only)?;
            match &disk.place {
                DiskPlace::Image(path) => {
                    Some(ArbiterPlace::Directory(DirectoryArbiter::beside(path)))
                }
                DiskPlace::Export(export) => Some(ArbiterPlace::Export(export.clone())),
                DiskPlace::Seed(_) => None,
            }
        };
        let chosen = self.arbiter.as_ref().map(|ArbiterOption(place)| place.clone());
        if chosen.is_none() && disks.iter().any(|disk| disk.mirror.is_some()) {
            bail!(
                "with mirror=on each side has disks of its own, and who goes on is decided elsewhere: name that \
                 with --arbiter dir=PATH, on storage that both hosts share, nbd=HOST:PORT/NAME of a `vmft disk \
                 serve`, or etcd=HOST:PORT,…,name=PAIR"
            );
        }
        let Some(place) = chosen.or_else(default) else {
            bail!(
                "a pair without a writable disk needs --arbiter dir=PATH on shared storage, or that of a \
                 disk's server"
            );
        };
        // An export whose server is not the arbiter would take no writes of a pair.
        let other =
            disks.iter().filter(|disk| !disk.read_only).find_map(|disk| match &disk.place {
                DiskPlace::Export(export) if place != ArbiterPlace::Export(export.clone()) => {
                    Some(export)
                }
                _ => None,
            });
        if let Some(export) = other {
            bail!(
                "{export} takes the writes of whoever its own server knows as the winner of a generation: the \
                 arbiter of this pair is {place}; name a pair's one writable export as its arbiter"
            );
        }
        Ok(place)
    }

    /// What is said of the pair goes with disks of which each side has a copy.
    ///
    /// # Errors
    /// It does not.
    pub fn check_mirrors(&self, disks: &[DiskOption]) -> Result<()> {
        if self.bound_replay.is_some() && disks.iter().any(|disk| disk.mirror.is_some()) {
            bail!(
                "--bound-replay spares a backup parts of the replay, and it would not hear of what is written \
                 in them: it does not go with a disk's mirror=on"
            );
        }
        Ok(())
    }

    /// When the peer is suspected.
    pub fn detector(&self) -> DetectorConfig {
        DetectorConfig {
            suspect_after: Duration::from_millis(self.suspect_after),
            ..DetectorConfig::default()
        }
    }

    /// An address of the command line, if this side may use it. Says so where it may only because its
    /// operator has said that.
    ///
    /// # Errors
    /// For an address of another host, or open to others, without TLS.
    pub fn address(&self, given: &PeerAddress) -> Result<PeerAddress> {
        let address = PeerAddress { insecure: self.insecure, ..given.clone() };
        address.check()?;
        if address.is_exposed() {
            tell!("{address} is insecure: whoever reaches it can take the guest over");
        }
        Ok(address)
    }

    /// Where backups may join a side.
    pub fn primary_config(
        &self,
        place: ListenPlace,
        identity: Identity,
        backups: usize,
    ) -> PrimaryConfig {
        let ListenPlace { address, listener } = place;
        let detector = self.detector();
        PrimaryConfig {
            sender: sender(&detector),
            detector,
            listener: Some(listener),
            backups,
            ..PrimaryConfig::new(address, identity)
        }
    }
}

/// A port that was to be taken, or what to do.
pub(crate) fn taken(listener: Result<Listener, TransportError>) -> Result<Listener> {
    match listener {
        Err(error @ TransportError::Tls(_)) => {
            Err(error).remedy(|| "make certificates with `vmft keys`")
        }
        other => {
            other.remedy(|| "stop what listens there, or choose another address with --listen")
        }
    }
}

/// A port taken for backups, before anything on the shared storage is changed.
#[derive(Debug, Clone)]
pub struct ListenPlace {
    address: PeerAddress,
    /// The port.
    pub listener: Arc<Listener>,
}

impl ListenPlace {
    /// Takes the port.
    pub fn take(address: &PeerAddress) -> Result<Self> {
        let listener = taken(Listener::bind(address))?;
        Ok(Self { address: address.clone(), listener: Arc::new(listener) })
    }
}

/// What a side's fingerprint says of its storage.
fn with_storage(fingerprint: Fingerprint, place: &ArbiterPlace, disks: &[DiskFile]) -> Fingerprint {
    let directory = match place {
        ArbiterPlace::Directory(path) => Some(path.as_path()),
        ArbiterPlace::Export(_) | ArbiterPlace::Etcd(_) => None,
    };
    storage::on(fingerprint, directory, disks)
}

/// Begins a pair's next reign: the arbiter, and the identity with the generation just won. The last
/// step before a new primary runs, because from here on the shared storage is changed.
pub fn begin_reign(
    place: &ArbiterPlace,
    side: &Side,
    engine: EngineKind,
    board: &BoardConfig,
    protection: Protection,
) -> Result<(Arc<dyn Arbiter>, Identity)> {
    let arbiter = pair_state::take(place).remedy(|| match place {
        ArbiterPlace::Directory(_) => {
            "--arbiter dir=PATH names a directory on storage that both hosts share"
        }
        ArbiterPlace::Export(_) => "the arbiter of a disk's server comes from `vmft disk serve`",
        ArbiterPlace::Etcd(_) => {
            "--arbiter etcd= names the members of an etcd, and the pair by a name of its own; one whose sides \
             have died is in use for 20 s more"
        }
    })?;
    let name = arbiter.pair(&fresh_id()?)?;
    let latest = arbiter.latest()?;
    if !side.mirrors.is_empty() {
        let winner = arbiter.winner(latest)?;
        side.mirrors.check(&name, latest, winner.as_ref()).remedy(|| {
            "start the side whose copy has everything, and this one as its standby; or say force=on with \
             this disk, and lose that"
        })?;
    }
    let generation = Generation(latest.0 + 1);
    let fingerprint = protecting(fingerprint(engine, board), protection);
    let fingerprint = with_storage(fingerprint, place, &side.disks);
    let identity = identity(place, &name, generation, fingerprint)?;
    arbiter.share(&side.who)?;
    // Before the generation is won: then it is this side's copies alone that have what is written in it.
    side.mirrors.begin_live(&name, latest, &side.who)?;
    side.mirrors.show(&side.status, CopyRole::Live);
    if let Verdict::Lost { winner } = arbiter.try_win(generation, &side.who)? {
        bail!(
            "generation {} has just been won by {winner}; stop that one first, or join it with \
             `vmft backup`",
            generation.0
        );
    }
    Ok((arbiter, identity))
}

/// Finds the pair that a backup is to join, as what it says of itself. Changes nothing.
pub fn find_pair(
    place: &ArbiterPlace,
    joining: Joining<'_>,
    disks: &[DiskFile],
    protection: Protection,
) -> Result<(Arc<dyn Arbiter>, Identity)> {
    let arbiter: Arc<dyn Arbiter> = match place {
        ArbiterPlace::Directory(path) => Arc::new(DirectoryArbiter::open(path)?),
        ArbiterPlace::Export(export) => Arc::new(nbd_disk::open_arbiter(export)?),
        ArbiterPlace::Etcd(etcd) => {
            // Before anything is sent.
            etcd.check()?;
            Arc::new(EtcdArbiter::open(etcd)?)
        }
    };
    let name = arbiter.pair_name()?;
    let fingerprint = protecting(joining_fingerprint(joining), protection);
    let fingerprint = with_storage(fingerprint, place, disks);
    let identity = identity(place, &name, arbiter.latest()?, fingerprint)?;
    Ok((arbiter, identity))
}

fn identity(
    place: &ArbiterPlace,
    name: &str,
    generation: Generation,
    fingerprint: Fingerprint,
) -> Result<Identity> {
    let pair = name
        .parse()
        .with_context(|| format!("the arbiter {place} is damaged"))
        .remedy(|| "if no side of its pair is alive, remove its directory, or its keys in etcd")?;
    Ok(Identity { pair, generation, fingerprint })
}

/// What a disk looks like to the guest.
pub fn disk_configs(disks: &[DiskFile]) -> Vec<DiskConfig> {
    let config = |(index, disk): (usize, &DiskFile)| DiskConfig {
        capacity: Bytes(disk.size()),
        read_only: disk.read_only(),
        serial: format!("vmft-disk{index}"),
    };
    disks.iter().enumerate().map(config).collect()
}

/// How entries are sent. A backup that is silent is not given up before it is suspected: that it
/// acknowledges nothing says no more than its silence.
fn sender(detector: &DetectorConfig) -> SenderConfig {
    let default = SenderConfig::default();
    SenderConfig { stall_timeout: default.stall_timeout.max(detector.suspect_after), ..default }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_backup_is_not_given_up_before_it_is_suspected() {
        for milliseconds in [40, 300, 2_000, 60_000] {
            let suspect_after = Duration::from_millis(milliseconds);
            let detector = DetectorConfig { suspect_after, ..DetectorConfig::default() };
            assert!(sender(&detector).stall_timeout >= suspect_after);
        }
    }
}
