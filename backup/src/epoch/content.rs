//! What an epoch carries beside pages.

use serde::{Deserialize, Serialize};
use vmft_log::entry::{EntrySequence, LogPosition};
use vmft_log::point::ExecutionPoint;
use vmft_vmm::outputs::Output;

/// The state part of an epoch's checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EpochContent {
    /// The machine, encoded, without its memory and what it boots from.
    pub(super) machine: Vec<u8>,
    /// What the guest has put out since the epoch before, without disk requests: those are in the
    /// machine.
    pub(super) outputs: Vec<Output>,
}

impl EpochContent {
    pub(super) fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain state always encodes")
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, postcard::Error> {
        match postcard::take_from_bytes(bytes) {
            Ok((content, [])) => Ok(content),
            Ok(_) => Err(postcard::Error::DeserializeBadEncoding),
            Err(error) => Err(error),
        }
    }
}

/// The place of an epoch among those of one reign, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EpochNumber(pub(super) u64);

impl EpochNumber {
    /// How the end of an epoch's checkpoint names it, with the machine at `point`: in the log, a
    /// checkpoint's own number takes the place of an entry's.
    pub(super) const fn position(self, point: ExecutionPoint) -> LogPosition {
        LogPosition { entry: EntrySequence(self.0), point }
    }

    pub(super) const fn of(position: LogPosition) -> Self {
        Self(position.entry.0)
    }

    pub(super) const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}
