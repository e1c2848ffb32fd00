//! What is said of a disk that fails.

use crate::world::Repeats;
use std::io;
use std::path::{Path, PathBuf};

/// What could not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DiskError {
    /// A request of the guest, named by what it does.
    Request(&'static str),
    /// What a predecessor has completed could not be written again.
    NotDurable,
}

/// Says a disk's errors, by the name its operator knows, once and then counted.
#[derive(Debug)]
pub(super) struct DiskErrors {
    path: PathBuf,
    repeats: Repeats,
}

impl DiskErrors {
    /// Of the image at `path`.
    pub(super) fn of(path: PathBuf) -> Self {
        Self { path, repeats: Repeats::new() }
    }

    /// The image.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// It happened at `place`, such as "4096 bytes at byte 512".
    pub(super) fn say(&self, what: DiskError, place: &str, error: &io::Error) {
        let (what, told) = match what {
            DiskError::Request(what) => (what, "the guest is told"),
            DiskError::NotDurable => {
                ("making durable what another side has completed,", "the guest's next flush fails")
            }
        };
        if let Some(times) = self.repeats.note(&format!("{what}: {error}")) {
            let path = self.path.display();
            tracing::error!("disk {path}: {what} {place}: {error}; {told}{times}");
        }
    }
}
