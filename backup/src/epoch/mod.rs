//! Checkpoint mode: the backup is kept by its primary's state, epoch by epoch, instead of replaying
//! its run. It protects what cannot be replayed: any kernel, on any engine.
//!
//! ```text
//!  the machine's thread        the epochs' thread                       the backup
//!  ────────────────────        ──────────────────                       ──────────
//!  runs                        waits until an epoch is due
//!  rests: copies what it       ◀── asks
//!   wrote, and its state ────▶    (if that is too much: sends it in rounds)
//!  runs on, outputs wait       packs and sends the pieces ────────────▶ puts them aside
//!                              sends the end, marks the outputs ──────▶ has the epoch whole: applies it
//!  outputs leave        ◀───────────────────────────────────────────── acknowledges
//! ```
//! An epoch is a checkpoint of what has changed since the last one, in pieces that are entries of the
//! log ([`Entry::CheckpointPart`](vmft_log::entry::Entry::CheckpointPart)); so numbering,
//! window, acknowledgement, watermarks and several backups are the log's. It carries the outputs that
//! were made in it, which leave when its end is acknowledged, and which the backup lets out again when
//! it goes live from it.
//!
//! **Disks.** A write is an output: it reaches the disk when the epoch that made it is safe, and the
//! guest is answered after that. A read is answered at once: one that overlaps a write on its way waits
//! for it in the device (`devices/virtio/block/requests.rs`), so no read can see what is still held back.
//! Whatever was on its way at the last whole epoch is asked for again at a go-live, as in lockstep.
//!
//! Here lives what the two sides do about epochs; who may go live, and what happens to outputs when a
//! side is lost, is the same in both modes and lives with its neighbours.

mod content;
mod follower;
mod following;
mod pace;
mod sender;
mod thread;

pub use pace::{Interval, IntervalError, MAX_INTERVAL, MIN_INTERVAL};
pub(crate) use sender::NoBackup;
pub(crate) use thread::{EpochSide, Epochs};

use std::fmt;

/// How a guest is protected. Both sides of a pair do the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protection {
    /// The backup replays the primary's run.
    #[default]
    Lockstep,
    /// The backup is sent what has changed, so often.
    Checkpoint(Interval),
}

impl fmt::Display for Protection {
    /// The mode, as the two sides compare it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lockstep => "lockstep",
            Self::Checkpoint(_) => "checkpoint",
        })
    }
}
