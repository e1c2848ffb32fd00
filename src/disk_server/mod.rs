//! A host that keeps disks for pairs: `vmft disk serve`.
//!
//! Each export has the arbiter's directory of its pair beside it. A connection writes in one
//! generation, and from the moment at which a later one is won, nothing of an older one reaches the
//! image ([`Gate`]).

mod gate;
mod serve;
mod visitor;

pub use gate::{Gate, Late};
pub use serve::{Service, serve};

use crate::disk_images::{check_format, disk_remedy};
use anyhow::{Result, anyhow};
use std::path::PathBuf;
use std::sync::Mutex;
use vmft_backup::arbiter::{Arbiter, DirectoryArbiter};
use vmft_vmm::world::{HostCache, Image};

/// What is to be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportConfig {
    /// By which clients ask for it.
    pub name: String,
    /// The image.
    pub path: PathBuf,
    /// The arbiter's directory of its pair.
    pub arbiter: PathBuf,
    /// Nobody may write to it.
    pub read_only: bool,
    /// Whether this host's cache has a part in it. What is in it is lost when the host loses its power.
    pub cache: HostCache,
}

/// An export that is served.
#[derive(Debug)]
pub struct ServedDisk {
    config: ExportConfig,
    image: Image,
    size: u64,
    gate: Gate,
    /// Held by whoever writes part of a unit: it reads the unit first.
    partial: Mutex<()>,
}

impl ServedDisk {
    /// Opens the image, and finds out which generation its pair is in.
    ///
    /// # Errors
    /// The image cannot be used, or its arbiter not be read.
    pub fn open(config: ExportConfig) -> Result<Self> {
        check_format(&config.path, config.read_only, false)?;
        let opened = Image::open(&config.path, config.read_only, config.cache);
        let (image, size) = opened.map_err(|error| {
            let remedy = disk_remedy(&error, true);
            anyhow!("{:#}{remedy}", anyhow::Error::from(error))
        })?;
        let latest = match config.arbiter.try_exists() {
            Ok(false) => 0,
            _ => match DirectoryArbiter::open(&config.arbiter) {
                Err(vmft_backup::arbiter::ArbiterError::Absent { .. }) => 0,
                opened => opened?.latest()?.0,
            },
        };
        Ok(Self { config, image, size, gate: Gate::new(latest), partial: Mutex::new(()) })
    }

    /// What it was opened as.
    pub fn config(&self) -> &ExportConfig {
        &self.config
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}
