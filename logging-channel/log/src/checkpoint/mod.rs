//! The checkpoint stream: a machine's state and memory at one point, from which a backup (or a
//! replay) starts, or with which it goes on.
//!
//! ```text
//! Header · State × n (the fixed part) · Pages × n · State × n · End
//! ```
//! The state is opaque here, in two parts: one that never changes while the machine lives comes
//! first, the rest last. Pages come in between, while the machine may still run: a page that has
//! changed is sent again, and the last version counts. The end names the point and carries a digest
//! of everything before it; only when that agrees is the checkpoint complete. Until then the
//! receiver has handed pages to its sink and nothing else.
//!
//! The same stream carries what has changed since an earlier point: its [`MemoryBase`] says what
//! the receiver's memory holds before. Then the sink must be one that can be thrown away, such as
//! [`StagedPages`].
//!
//! A stream is a sequence of [`CheckpointPiece`]s; frames carry them on a channel and in files.
//! Reading guest memory and restoring a machine are the caller's.

mod pages;
mod reader;
mod staged;
mod writer;

pub use pages::{PageBatch, PageEncoder, PageEncoding};
pub use reader::{CheckpointError, CheckpointReader, CompleteCheckpoint};
pub use staged::{PageBase, StagedPages};
pub use writer::{CheckpointSource, CheckpointWriter, PageSource, WholeCheckpoint};

use crate::control::{ControlMessage, decode_control};
use crate::disk_copy::{DiskPiece, DisksProgress};
use crate::entry::LogPosition;
use crate::wire::{DecodeError, check_count};
use serde::{Deserialize, Serialize};
use std::fmt;
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;
/// Most pages in one piece: 256 KiB of memory.
pub const MAX_BATCH_PAGES: usize = 64;
/// Most bytes of state in one piece.
pub const MAX_STATE_CHUNK: usize = 256 << 10;
/// Most bytes of machine state, both parts: the CPU and devices of a machine take some kilobytes,
/// outstanding disk requests at most some megabytes; the rest is for the kernel and the initramfs,
/// which a reset boots from again and which are the fixed part.
pub const MAX_STATE: u64 = 256 << 20;
/// How often a stream may send all of memory: a sender gives up long before, and a receiver need
/// not listen for ever.
pub const MAX_PASSES: u64 = 64;

/// One page of guest memory.
pub type Page = [u8; PAGE_BYTES];

/// A page of zeroes.
pub(crate) const ZERO_PAGE: Page = [0; PAGE_BYTES];

/// A guest page number: physical address divided by [`PAGE_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageNumber(pub u64);

/// What the receiver's memory holds before the first page comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBase {
    /// Zeroes: the stream is the whole machine.
    Zeroes,
    /// The same machine's memory at an earlier point, which both sides know: the stream is what has
    /// changed since.
    Earlier,
}

/// What a checkpoint stream begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointHeader {
    /// What the pages change.
    pub base: MemoryBase,
    /// Bytes of the fixed part of the state.
    pub fixed_len: u64,
    /// The first page number that the machine's memory lies wholly below.
    pub page_limit: PageNumber,
}

/// What a checkpoint stream ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointEnd {
    /// Where the guest was, and where the log goes on.
    pub position: LogPosition,
    /// Bytes of the state, without the fixed part.
    pub state_len: u64,
    /// How many pages were sent; a page sent twice counts twice.
    pub pages: u64,
    /// XXH3-64 of the header's base (0 or 1), fixed length and page limit, the fixed part, each
    /// page's number and unpacked bytes in the order sent, the state, and the two numbers of the
    /// position (numbers as 64-bit little-endian words).
    pub digest: u64,
}

impl ControlMessage for CheckpointHeader {
    fn validate(&self) -> Result<(), DecodeError> {
        check_state_len(self.fixed_len)
    }
}

impl ControlMessage for CheckpointEnd {
    fn validate(&self) -> Result<(), DecodeError> {
        check_count("entry number", self.position.entry.0)?;
        check_state_len(self.state_len)
    }
}

fn check_state_len(found: u64) -> Result<(), DecodeError> {
    if found > MAX_STATE {
        return Err(DecodeError::Limit { what: "machine state", found, limit: MAX_STATE });
    }
    Ok(())
}

/// A piece of a checkpoint stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckpointPiece {
    /// It begins.
    Header(CheckpointHeader),
    /// Bytes of the state.
    State(Vec<u8>),
    /// Some of the memory.
    Pages(PageBatch),
    /// It is complete.
    End(CheckpointEnd),
}

/// What a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PieceKind {
    /// [`CheckpointPiece::Header`].
    Header,
    /// [`CheckpointPiece::State`].
    State,
    /// [`CheckpointPiece::Pages`].
    Pages,
    /// [`CheckpointPiece::End`].
    End,
}

impl PieceKind {
    /// All kinds, in the order of their numbers in the log.
    pub(crate) const ALL: [Self; 4] = [Self::Header, Self::State, Self::Pages, Self::End];
}

impl fmt::Display for PieceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::State => "state",
            Self::Pages => "pages",
            Self::End => "end",
        })
    }
}

impl CheckpointPiece {
    /// What it is.
    pub const fn kind(&self) -> PieceKind {
        match self {
            Self::Header(_) => PieceKind::Header,
            Self::State(_) => PieceKind::State,
            Self::Pages(_) => PieceKind::Pages,
            Self::End(_) => PieceKind::End,
        }
    }

    /// Appends the piece, without its kind.
    pub fn encode(&self, out: Vec<u8>) -> Vec<u8> {
        const VECTOR: &str = "a vector takes all a message has to write";
        match self {
            Self::Header(header) => postcard::to_extend(header, out).expect(VECTOR),
            Self::End(end) => postcard::to_extend(end, out).expect(VECTOR),
            Self::State(chunk) => [out.as_slice(), chunk].concat(),
            Self::Pages(batch) => batch.encode(out),
        }
    }

    /// Reads a piece of the kind.
    ///
    /// # Errors
    /// [`DecodeError`] for anything but exactly one piece.
    pub fn decode(kind: PieceKind, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(match kind {
            PieceKind::Header => Self::Header(decode_control(payload)?),
            PieceKind::State => Self::State(payload.to_vec()),
            PieceKind::Pages => Self::Pages(PageBatch::decode(payload)?),
            PieceKind::End => Self::End(decode_control(payload)?),
        })
    }
}

/// The sink would not take a page.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SinkRefusal(pub String);

/// Where a checkpoint's memory goes. What it has taken counts only once the checkpoint is
/// complete; before, it holds what the header's [`MemoryBase`] says.
pub trait CheckpointSink {
    /// A checkpoint begins.
    ///
    /// # Errors
    /// [`SinkRefusal`] if it does not fit, for instance a memory of another size or base.
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal>;
    /// One page; it takes the place of what was there.
    ///
    /// # Errors
    /// [`SinkRefusal`] if there is no such page.
    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal>;
    /// Copies what is there now.
    ///
    /// # Errors
    /// [`SinkRefusal`] if there is no such page.
    fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal>;
}

/// Where the memory goes that a backup joins with.
pub trait JoinSink: CheckpointSink {
    /// The checkpoint is complete: whatever following it takes must be had now, because from here on
    /// the primary counts on this backup.
    ///
    /// # Errors
    /// [`SinkRefusal`] if it is not to be had; the backup does not join.
    fn ready(&mut self, checkpoint: &CompleteCheckpoint) -> Result<(), SinkRefusal>;
    /// A piece of a disk, for a backup that has copies of its own. Does not wait for storage:
    /// [`Self::poll_disks`] says when there is room.
    ///
    /// # Errors
    /// [`SinkRefusal`] if there is no such disk, or its copy is not to be written.
    fn disk(&mut self, piece: DiskPiece) -> Result<(), SinkRefusal>;
    /// How the copies get on.
    ///
    /// # Errors
    /// [`SinkRefusal`] if their storage has failed.
    fn poll_disks(&mut self) -> Result<DisksProgress, SinkRefusal>;
}

/// A piece of what a backup joins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JoinPiece {
    /// Of the machine.
    Checkpoint(CheckpointPiece),
    /// Of a disk.
    Disk(DiskPiece),
}

impl From<CheckpointPiece> for JoinPiece {
    fn from(piece: CheckpointPiece) -> Self {
        Self::Checkpoint(piece)
    }
}

/// The running digest of a stream.
struct Digester {
    hash: Xxh3,
    pages: u64,
}

impl fmt::Debug for Digester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Digester").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl Digester {
    fn new(header: &CheckpointHeader) -> Self {
        let CheckpointHeader { base, fixed_len, page_limit } = *header;
        let base = match base {
            MemoryBase::Zeroes => 0,
            MemoryBase::Earlier => 1,
        };
        let mut digester = Self { hash: Xxh3::new(), pages: 0 };
        digester.numbers([base, fixed_len, page_limit.0]);
        digester
    }

    fn numbers(&mut self, numbers: impl IntoIterator<Item = u64>) {
        for number in numbers {
            self.hash.update(&number.to_le_bytes());
        }
    }

    fn state(&mut self, chunk: &[u8]) {
        self.hash.update(chunk);
    }

    fn page(&mut self, number: PageNumber, data: &Page) {
        self.numbers([number.0]);
        self.hash.update(data);
        self.pages += 1;
    }

    fn end(mut self, position: LogPosition, state_len: u64) -> CheckpointEnd {
        self.numbers([position.entry.0, position.point.get()]);
        CheckpointEnd { position, state_len, pages: self.pages, digest: self.hash.digest() }
    }
}

#[cfg(test)]
mod tests;
