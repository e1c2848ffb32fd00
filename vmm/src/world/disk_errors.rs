//! What is said of a disk that fails.

use super::Repeats;
use std::io;
use std::path::PathBuf;

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

    /// `what` was to be done, at `place`, such as "4096 bytes at byte 512".
    pub(super) fn say(&self, what: &str, place: &str, error: &io::Error) {
        if let Some(times) = self.repeats.note(&format!("{what}: {error}")) {
            let path = self.path.display();
            tracing::error!("disk {path}: {what} {place}: {error}; the guest is told{times}");
        }
    }
}
