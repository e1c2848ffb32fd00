//! The options of a side of a pair.

use crate::machine_options::{SideOptions, fresh_id, make_side, open_disks};
use crate::options::{ArbiterOption, DiskOption};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vmft_backup::arbiter::{Arbiter, DirectoryArbiter};
use vmft_backup::identity::fingerprint;
use vmft_backup::side::Side;
use vmft_logging_channel::detector::DetectorConfig;
use vmft_logging_channel::entry::Generation;
use vmft_logging_channel::fingerprint::Identity;
use vmft_logging_channel::transport::{PeerAddress, PrimaryConfig};
use vmft_vmm::board::DiskConfig;

/// How the two sides find out about each other and who may go on.
#[derive(Debug, Clone, Args)]
pub struct PairOptions {
    /// Who decides which side goes on: a directory on storage that both hosts share. Default: the
    /// first writable disk's path with `.vmft` added
    #[arg(long, value_name = "dir=PATH", help_heading = "Pair")]
    pub arbiter: Option<ArbiterOption>,
    /// Take the peer for lost after so much silence, in milliseconds. A closed connection is noticed
    /// at once
    #[arg(long, value_name = "MS", default_value_t = 300,
          value_parser = clap::value_parser!(u64).range(40..=60_000), help_heading = "Pair")]
    pub suspect_after: u64,
}

impl PairOptions {
    /// Opens the arbiter's directory.
    pub fn open_arbiter(&self, disks: &[DiskOption], new_pair: bool) -> Result<DirectoryArbiter> {
        let default = || -> Option<PathBuf> {
            let disk = disks.iter().find(|disk| !disk.read_only)?;
            let mut path = disk.path.clone().into_os_string();
            path.push(".vmft");
            Some(path.into())
        };
        let chosen = self.arbiter.as_ref().map(|arbiter| arbiter.directory.clone());
        let Some(directory) = chosen.or_else(default) else {
            bail!("a pair without a writable disk needs --arbiter dir=PATH on shared storage");
        };
        Ok(DirectoryArbiter::open(&directory, new_pair)?)
    }

    /// When the peer is suspected.
    pub fn detector(&self) -> DetectorConfig {
        DetectorConfig {
            suspect_after: Duration::from_millis(self.suspect_after),
            ..DetectorConfig::default()
        }
    }

    /// Where backups may join a side.
    pub fn primary_config(&self, listen: PeerAddress, identity: Identity) -> PrimaryConfig {
        PrimaryConfig { detector: self.detector(), ..PrimaryConfig::new(listen, identity) }
    }
}

/// A side of a pair, before it runs.
#[derive(Debug)]
pub struct PairSide {
    /// The process.
    pub side: Side,
    /// Who decides generations.
    pub arbiter: Arc<dyn Arbiter>,
    /// What the other side must match; the generation is the last one decided.
    pub identity: Identity,
}

/// What a disk looks like to the guest.
pub fn disk_configs(disks: &[vmft_vmm::world::DiskFile]) -> Vec<DiskConfig> {
    let config = |(index, disk): (usize, &vmft_vmm::world::DiskFile)| DiskConfig {
        capacity: vmft_vmm::board::Bytes(disk.size()),
        read_only: disk.read_only(),
        serial: format!("vmft-disk{index}"),
    };
    disks.iter().enumerate().map(config).collect()
}

/// Opens what a side of a pair needs.
pub fn open(
    pair: &PairOptions,
    options: &SideOptions,
    disks: &[DiskOption],
    role: &str,
    new_pair: bool,
) -> Result<PairSide> {
    let files = open_disks(disks, new_pair)?;
    let arbiter = pair.open_arbiter(disks, new_pair)?;
    let name = arbiter.pair(&fresh_id()?)?;
    let pair_id = name.parse().context("the arbiter's directory has no proper pair name")?;
    let identity = Identity {
        pair: pair_id,
        generation: Generation(arbiter.latest()?.0),
        fingerprint: fingerprint(&disk_configs(&files)),
    };
    let side = make_side(options, files, role)?;
    Ok(PairSide { side, arbiter: Arc::new(arbiter), identity })
}
