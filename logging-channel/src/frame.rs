//! Frames: what travels on the channel and lies in a log file.
//!
//! ```text
//! 0      3         4      5        8         12              16               20
//! ├─"vmf"─┼─version─┼─kind─┼─length─┼─session─┼─header check──┼─payload check──┼─ payload …
//! ```
//! All numbers are little-endian. The header check is the CRC-32C of bytes 0 to 12, the payload
//! check that of the payload, so a damaged length is found before anyone waits for its bytes.
//! The header is the same in all versions up to its version byte. What a frame means, and when
//! it may be sent, is for the sessions; the payloads of the kinds are beside their types.

use crate::handshake::{Hello, HelloConfirm, HelloReply, Refusal};
use crate::log_file::LogHeader;
use crate::session::{Acknowledge, GoodbyeReason, Heartbeat, Progress, Reign, SessionId};
use std::fmt;
use vmft_log::checkpoint::{CheckpointPiece, MAX_STATE_CHUNK, PieceKind};
use vmft_log::codec::{BATCH_COST, BatchEncoder, EncodeError, EntryBatch, MAX_ENTRY_BYTES};
use vmft_log::control::{ControlMessage, decode_control};
use vmft_log::disk_copy::{DiskDigests, DiskPiece, MAX_DISK_DIGESTS, MAX_DISK_PIECE};
use vmft_log::wire::DecodeError;

/// The version of everything in this crate that is written to a wire or a file.
pub const PROTOCOL_VERSION: u8 = 3;
/// Bytes of a frame header.
pub const HEADER_LEN: usize = 20;
/// How every frame begins.
pub const MAGIC: [u8; 3] = *b"vmf";

/// Longest payload of an `Entries` frame: a nearly full batch, the largest entry, and the
/// batch's own fields.
pub const MAX_ENTRIES_PAYLOAD: usize = BATCH_COST as usize + MAX_ENTRY_BYTES + 32;
/// Longest payload of a control message: the largest fingerprint and then some. A stranger can
/// make the receiver hold this much and no more.
pub const MAX_CONTROL_PAYLOAD: usize = 64 << 10;
/// Longest payload of a `CheckpointPages` frame: its pages as they are, and their numbers.
pub const MAX_PAGES_PAYLOAD: usize = (256 << 10) + (1 << 10);
/// Longest payload of a `Disk` frame: its bytes, and where they go.
pub const MAX_DISK_PAYLOAD: usize = MAX_DISK_PIECE + 64;
/// Longest payload of a `DiskDigests` frame.
pub const MAX_DIGESTS_PAYLOAD: usize = 16 * MAX_DISK_DIGESTS + 32;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// A backup asks to follow.
    Hello = 1,
    /// The primary accepts.
    HelloReply = 2,
    /// The backup accepts as well.
    HelloConfirm = 3,
    /// A side will not.
    Refusal = 4,
    /// A side leaves on purpose; also the end of a whole log file.
    Goodbye = 5,
    /// A sign of life.
    Heartbeat = 6,
    /// What the backup has received.
    Acknowledge = 7,
    /// A piece of the log.
    Entries = 8,
    /// A checkpoint begins.
    CheckpointHeader = 9,
    /// A piece of the machine's state.
    CheckpointState = 10,
    /// Some of its memory.
    CheckpointPages = 11,
    /// The checkpoint is complete.
    CheckpointEnd = 12,
    /// A log file begins.
    LogHeader = 13,
    /// The primary has won a later generation.
    Reign = 14,
    /// How far a join is.
    Progress = 15,
    /// A piece of a disk of which the backup has a copy.
    Disk = 16,
    /// What a backup's copy of a disk holds.
    DiskDigests = 17,
}

impl FrameKind {
    const ALL: [Self; 17] = [
        Self::Hello,
        Self::HelloReply,
        Self::HelloConfirm,
        Self::Refusal,
        Self::Goodbye,
        Self::Heartbeat,
        Self::Acknowledge,
        Self::Entries,
        Self::CheckpointHeader,
        Self::CheckpointState,
        Self::CheckpointPages,
        Self::CheckpointEnd,
        Self::LogHeader,
        Self::Reign,
        Self::Progress,
        Self::Disk,
        Self::DiskDigests,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// True for what may come before a session is agreed on.
    const fn opens_a_stream(self) -> bool {
        matches!(self, Self::Hello | Self::HelloReply | Self::Refusal | Self::LogHeader)
    }

    /// The longest payload a frame of this kind may have, in bytes.
    pub const fn max_payload(self) -> usize {
        match self {
            Self::Entries => MAX_ENTRIES_PAYLOAD,
            Self::CheckpointState => MAX_STATE_CHUNK,
            Self::CheckpointPages => MAX_PAGES_PAYLOAD,
            Self::Disk => MAX_DISK_PAYLOAD,
            Self::DiskDigests => MAX_DIGESTS_PAYLOAD,
            Self::Hello | Self::HelloReply | Self::LogHeader => MAX_CONTROL_PAYLOAD,
            Self::Refusal | Self::Goodbye => 2048,
            Self::HelloConfirm
            | Self::Heartbeat
            | Self::Acknowledge
            | Self::Reign
            | Self::Progress
            | Self::CheckpointHeader
            | Self::CheckpointEnd => 64,
        }
    }
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Why bytes are no frame of this session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not the beginning of a frame.
    #[error("no frame begins with {found:02x?}")]
    Magic {
        /// The bytes in its place.
        found: [u8; 3],
    },
    /// A frame of another version.
    #[error("frame of protocol version {found}, this is version {PROTOCOL_VERSION}")]
    Version {
        /// Its version.
        found: u8,
    },
    /// The header is damaged.
    #[error("frame header is damaged")]
    HeaderChecksum,
    /// A frame of no known kind.
    #[error("unknown frame kind {found}")]
    Kind {
        /// The kind found.
        found: u8,
    },
    /// A frame larger than its kind may be.
    #[error("{kind} frame of {len} bytes, the limit is {limit}")]
    Length {
        /// Its kind.
        kind: FrameKind,
        /// The payload length it claims.
        len: usize,
        /// The most there may be.
        limit: usize,
    },
    /// A frame of another session.
    #[error("{kind} frame of session {found}, this is session {expected}")]
    Session {
        /// Its kind.
        kind: FrameKind,
        /// Its session.
        found: SessionId,
        /// This session.
        expected: SessionId,
    },
    /// A frame that has no place before a session is agreed on.
    #[error("{kind} frame before the handshake")]
    Early {
        /// Its kind.
        kind: FrameKind,
    },
    /// The payload is damaged.
    #[error("payload of {kind} frame is damaged")]
    PayloadChecksum {
        /// Its kind.
        kind: FrameKind,
    },
    /// The payload is whole but makes no sense.
    #[error("payload of {kind} frame is malformed")]
    Payload {
        /// Its kind.
        kind: FrameKind,
        /// What is wrong with it.
        #[source]
        source: DecodeError,
    },
}

/// A frame's content.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is documented at its kind and its content")]
pub enum Frame {
    Hello(Hello),
    HelloReply(HelloReply),
    HelloConfirm(HelloConfirm),
    Refusal(Refusal),
    Goodbye(GoodbyeReason),
    Heartbeat(Heartbeat),
    Acknowledge(Acknowledge),
    Entries(EntryBatch),
    Checkpoint(CheckpointPiece),
    LogHeader(LogHeader),
    Reign(Reign),
    Progress(Progress),
    Disk(DiskPiece),
    DiskDigests(DiskDigests),
}

impl Frame {
    /// What kind of frame this is.
    pub const fn kind(&self) -> FrameKind {
        match self {
            Self::Hello(_) => FrameKind::Hello,
            Self::HelloReply(_) => FrameKind::HelloReply,
            Self::HelloConfirm(_) => FrameKind::HelloConfirm,
            Self::Refusal(_) => FrameKind::Refusal,
            Self::Goodbye(_) => FrameKind::Goodbye,
            Self::Heartbeat(_) => FrameKind::Heartbeat,
            Self::Acknowledge(_) => FrameKind::Acknowledge,
            Self::Entries(_) => FrameKind::Entries,
            Self::Checkpoint(piece) => match piece.kind() {
                PieceKind::Header => FrameKind::CheckpointHeader,
                PieceKind::State => FrameKind::CheckpointState,
                PieceKind::Pages => FrameKind::CheckpointPages,
                PieceKind::End => FrameKind::CheckpointEnd,
            },
            Self::LogHeader(_) => FrameKind::LogHeader,
            Self::Reign(_) => FrameKind::Reign,
            Self::Progress(_) => FrameKind::Progress,
            Self::Disk(_) => FrameKind::Disk,
            Self::DiskDigests(_) => FrameKind::DiskDigests,
        }
    }

    /// The frame as bytes, to be sealed before it is sent.
    ///
    /// # Errors
    /// [`EncodeError`] if the content breaks a limit.
    pub fn encode(&self, session: SessionId) -> Result<UnsealedFrame, EncodeError> {
        let bytes = vec![0; HEADER_LEN];
        let bytes = match self {
            Self::Hello(message) => put_control(message, bytes)?,
            Self::HelloReply(message) => put_control(message, bytes)?,
            Self::HelloConfirm(message) => put_control(message, bytes)?,
            Self::Refusal(message) => put_control(message, bytes)?,
            Self::Goodbye(message) => put_control(message, bytes)?,
            Self::Heartbeat(message) => put_control(message, bytes)?,
            Self::Acknowledge(message) => put_control(message, bytes)?,
            Self::LogHeader(message) => put_control(message, bytes)?,
            Self::Reign(message) => put_control(message, bytes)?,
            Self::Progress(message) => put_control(message, bytes)?,
            Self::Checkpoint(piece) => piece.encode(bytes),
            Self::Disk(piece) => piece.encode(bytes),
            Self::DiskDigests(digests) => digests.encode(bytes),
            Self::Entries(batch) => {
                let mut encoder = BatchEncoder::new(bytes, batch.first, batch.base);
                for costed in &batch.entries {
                    encoder.push(&costed.entry)?;
                }
                encoder.finish()
            }
        };
        UnsealedFrame::new(self.kind(), session, bytes)
    }

    fn decode(kind: FrameKind, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(match kind {
            FrameKind::Hello => Self::Hello(decode_control(payload)?),
            FrameKind::HelloReply => Self::HelloReply(decode_control(payload)?),
            FrameKind::HelloConfirm => Self::HelloConfirm(decode_control(payload)?),
            FrameKind::Refusal => Self::Refusal(decode_control(payload)?),
            FrameKind::Goodbye => Self::Goodbye(decode_control(payload)?),
            FrameKind::Heartbeat => Self::Heartbeat(decode_control(payload)?),
            FrameKind::Acknowledge => Self::Acknowledge(decode_control(payload)?),
            FrameKind::Entries => Self::Entries(EntryBatch::decode(payload)?),
            FrameKind::CheckpointHeader => Self::piece(PieceKind::Header, payload)?,
            FrameKind::CheckpointState => Self::piece(PieceKind::State, payload)?,
            FrameKind::CheckpointPages => Self::piece(PieceKind::Pages, payload)?,
            FrameKind::CheckpointEnd => Self::piece(PieceKind::End, payload)?,
            FrameKind::LogHeader => Self::LogHeader(decode_control(payload)?),
            FrameKind::Reign => Self::Reign(decode_control(payload)?),
            FrameKind::Progress => Self::Progress(decode_control(payload)?),
            FrameKind::Disk => Self::Disk(DiskPiece::decode(payload)?),
            FrameKind::DiskDigests => Self::DiskDigests(DiskDigests::decode(payload)?),
        })
    }
}

impl Frame {
    fn piece(kind: PieceKind, payload: &[u8]) -> Result<Self, DecodeError> {
        CheckpointPiece::decode(kind, payload).map(Self::Checkpoint)
    }
}

fn put_control(message: &impl ControlMessage, bytes: Vec<u8>) -> Result<Vec<u8>, EncodeError> {
    message.validate().map_err(EncodeError::Message)?;
    Ok(postcard::to_extend(message, bytes).expect("a vector takes all a message has to write"))
}

/// A frame whose checksums are still to be computed: that is work for the thread that sends,
/// not for the one that made the frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsealedFrame {
    kind: FrameKind,
    session: SessionId,
    /// Room for the header, then the payload.
    bytes: Vec<u8>,
}

impl UnsealedFrame {
    /// `bytes` is [`HEADER_LEN`] bytes of any content, and the payload.
    pub(crate) fn new(
        kind: FrameKind,
        session: SessionId,
        bytes: Vec<u8>,
    ) -> Result<Self, EncodeError> {
        let (len, limit) = (bytes.len() - HEADER_LEN, kind.max_payload());
        if len > limit {
            return Err(EncodeError::TooLarge { what: "frame", len, limit });
        }
        Ok(Self { kind, session, bytes })
    }

    /// The kind of frame.
    pub const fn kind(&self) -> FrameKind {
        self.kind
    }

    /// Bytes of the frame, header included.
    #[expect(clippy::len_without_is_empty, reason = "a frame is never empty")]
    pub const fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Writes the header. The result is what goes on the wire.
    pub fn seal(mut self) -> Vec<u8> {
        let (header, payload) = self.bytes.split_at_mut(HEADER_LEN);
        let len = u32::try_from(payload.len()).expect("limited by the kind").to_le_bytes();
        header[0..3].copy_from_slice(&MAGIC);
        header[3] = PROTOCOL_VERSION;
        header[4] = self.kind as u8;
        header[5..8].copy_from_slice(&len[..3]);
        header[8..12].copy_from_slice(&self.session.0.to_le_bytes());
        let check = crc32c::crc32c(&header[..12]).to_le_bytes();
        header[12..16].copy_from_slice(&check);
        let check = crc32c::crc32c(payload).to_le_bytes();
        header[16..20].copy_from_slice(&check);
        self.bytes
    }
}

/// A checked header.
#[derive(Debug, Clone, Copy)]
struct Header {
    kind: FrameKind,
    len: usize,
    payload_check: u32,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn read_header(bytes: &[u8; HEADER_LEN], expected: SessionId) -> Result<Header, FrameError> {
    if bytes[0..3] != MAGIC {
        return Err(FrameError::Magic { found: [bytes[0], bytes[1], bytes[2]] });
    }
    if bytes[3] != PROTOCOL_VERSION {
        return Err(FrameError::Version { found: bytes[3] });
    }
    if crc32c::crc32c(&bytes[..12]) != word(bytes, 12) {
        return Err(FrameError::HeaderChecksum);
    }
    let kind = FrameKind::from_byte(bytes[4]).ok_or(FrameError::Kind { found: bytes[4] })?;
    if expected == SessionId::HANDSHAKE && !kind.opens_a_stream() {
        return Err(FrameError::Early { kind });
    }
    let len = u32::from_le_bytes([bytes[5], bytes[6], bytes[7], 0]) as usize;
    let limit = kind.max_payload();
    if len > limit {
        return Err(FrameError::Length { kind, len, limit });
    }
    let found = SessionId(word(bytes, 8));
    // A side that refuses the other has no session with it.
    let expected = if kind == FrameKind::Refusal { SessionId::HANDSHAKE } else { expected };
    if found != expected {
        return Err(FrameError::Session { kind, found, expected });
    }
    Ok(Header { kind, len, payload_check: word(bytes, 16) })
}

/// Finds frames in a stream of bytes.
///
/// After an error it finds no more: there is no telling where the next frame begins.
#[derive(Debug)]
pub struct FrameDecoder {
    session: SessionId,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that belong to frames already returned.
    consumed: usize,
    /// Bytes of the stream that belong to frames already returned.
    offset: u64,
    failed: Option<FrameError>,
}

impl FrameDecoder {
    /// A decoder at the start of a stream of `session`.
    pub const fn new(session: SessionId) -> Self {
        Self { session, buffer: Vec::new(), consumed: 0, offset: 0, failed: None }
    }

    /// From here on, frames must belong to `session`.
    pub const fn set_session(&mut self, session: SessionId) {
        self.session = session;
    }

    /// Takes more bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame; `None` until more bytes are fed.
    ///
    /// # Errors
    /// [`FrameError`], from then on always the same.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.decode_next().inspect_err(|error| {
            self.failed = Some(error.clone());
            self.buffer = Vec::new();
            self.consumed = 0;
        })
    }

    fn decode_next(&mut self) -> Result<Option<Frame>, FrameError> {
        let pending = &self.buffer[self.consumed..];
        let Some((header, rest)) = pending.split_first_chunk::<HEADER_LEN>() else {
            return check_beginning(pending).map(|()| None);
        };
        let header = read_header(header, self.session)?;
        let Some(payload) = rest.get(..header.len) else { return Ok(None) };
        if crc32c::crc32c(payload) != header.payload_check {
            return Err(FrameError::PayloadChecksum { kind: header.kind });
        }
        let frame = Frame::decode(header.kind, payload)
            .map_err(|source| FrameError::Payload { kind: header.kind, source })?;
        self.consumed += HEADER_LEN + header.len;
        self.offset += (HEADER_LEN + header.len) as u64;
        Ok(Some(frame))
    }

    /// Bytes held that belong to no frame yet.
    pub const fn pending(&self) -> usize {
        self.buffer.len() - self.consumed
    }

    /// Where in the stream the next frame begins, in bytes: everything before is good.
    pub const fn offset(&self) -> u64 {
        self.offset
    }
}

/// A stream that does not begin like a frame is refused at its first wrong byte.
fn check_beginning(pending: &[u8]) -> Result<(), FrameError> {
    let magic = &pending[..pending.len().min(MAGIC.len())];
    if !MAGIC.starts_with(magic) {
        let mut found = [0; 3];
        found[..magic.len()].copy_from_slice(magic);
        return Err(FrameError::Magic { found });
    }
    match pending.get(3) {
        Some(&found) if found != PROTOCOL_VERSION => Err(FrameError::Version { found }),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
