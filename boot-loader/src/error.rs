//! Why nothing of a disk can be booted.

use std::io;

/// Why nothing of a disk can be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootDiskError {
    /// The disk.
    #[error("the disk cannot be read")]
    Io(#[source] io::Error),
    /// So much was read of it that its file systems must be going round in circles.
    #[error("its file systems lead nowhere: more than {0} MiB were read")]
    Endless(u64),
    /// There is no kernel that a boot loader would find.
    #[error("{}", nothing(*is_meant_to_boot, found))]
    Nothing {
        /// It is partitioned for a boot loader all the same.
        is_meant_to_boot: bool,
        /// What is on it, for people; empty for a disk without a file system.
        found: Vec<String>,
    },
    /// No entry has that name or number.
    #[error("no boot entry is called {wanted}; there are {}", entries.join(", "))]
    NoSuchEntry {
        /// What was asked for.
        wanted: String,
        /// Number and title of each.
        entries: Vec<String>,
    },
    /// An entry names a file that no file system of the disk has.
    #[error(
        "boot entry {entry} names {path}, which is on no file system of the disk that can be read"
    )]
    Missing {
        /// Title of the entry.
        entry: String,
        /// The file.
        path: String,
    },
    /// A file that is too large for what it is.
    #[error("{path} has {size} bytes, which is too much for {what}: it may have {limit}")]
    TooLarge {
        /// The file.
        path: String,
        /// What it is to be.
        what: &'static str,
        /// Its size.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A file system that contradicts itself.
    #[error("{path} cannot be read: {reason}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

fn nothing(is_meant_to_boot: bool, found: &[String]) -> String {
    let what = match is_meant_to_boot {
        true => "it is partitioned to be booted, but no boot loader's entry or /vmlinuz is found",
        false => "no boot loader's entry or /vmlinuz is found",
    };
    match found.is_empty() {
        true => format!("{what}: it has no file system"),
        false => format!("{what} on it; it has {}", found.join(", ")),
    }
}
