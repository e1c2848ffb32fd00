//! What a disk's threads are given to do, and how people are told of it.

use super::order::Extent;
use crate::board::DiskOperation;
use std::fmt;
use std::sync::mpsc::Sender;
use vmft_log::entry::RequestId;

/// What is to be done.
#[derive(Debug)]
pub(super) enum Job {
    /// A request; its result goes into the mailbox.
    Request(RequestId, DiskOperation),
    /// What another side has completed is written again.
    Rewrite { offset: u64, data: Vec<u8> },
    /// Everything before is done, and made durable; whoever waits for that is told.
    Settle(Option<Sender<()>>),
}

/// What a job does, and to which bytes; no bytes are all that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doing {
    pub(super) what: &'static str,
    offset: u64,
    len: u64,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.what, self.place())
    }
}

impl Doing {
    /// The bytes, for messages.
    pub(super) fn place(&self) -> String {
        match self.len {
            0 => "what was written".to_owned(),
            len => format!("{len} bytes at byte {}", self.offset),
        }
    }
}

impl Job {
    pub(super) fn extent(&self) -> Extent {
        let write = |offset: u64, data: &[u8]| Extent::Write {
            start: offset,
            end: offset + data.len() as u64,
        };
        match self {
            Self::Request(_, DiskOperation::Read { offset, len }) => {
                Extent::Read { start: *offset, end: offset + u64::from(*len) }
            }
            Self::Request(_, DiskOperation::Write { offset, data })
            | Self::Rewrite { offset, data } => write(*offset, data),
            Self::Request(_, DiskOperation::Flush) => Extent::Flush,
            Self::Settle(_) => Extent::Everything,
        }
    }

    pub(super) fn doing(&self) -> Doing {
        match self {
            Self::Request(_, DiskOperation::Read { offset, len }) => {
                Doing { what: "reading", offset: *offset, len: u64::from(*len) }
            }
            Self::Request(_, DiskOperation::Write { offset, data }) => {
                Doing { what: "writing", offset: *offset, len: data.len() as u64 }
            }
            Self::Rewrite { offset, data } => {
                Doing { what: "writing again", offset: *offset, len: data.len() as u64 }
            }
            Self::Request(_, DiskOperation::Flush) | Self::Settle(_) => {
                Doing { what: "making durable", offset: 0, len: 0 }
            }
        }
    }

    /// True if it changes what is on the disk.
    pub(super) fn writes(&self) -> bool {
        matches!(self, Self::Request(_, DiskOperation::Write { .. }) | Self::Rewrite { .. })
    }
}
