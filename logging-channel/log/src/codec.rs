//! Entries as bytes: the payload of an `Entries` frame, which is also a piece of a log file.
//!
//! ```text
//! batch = count u16 · first sequence varint · base point varint · entry × count
//! entry = kind u8 · fields
//! ```
//! A point is written as its distance from the previous point in the batch (the first one
//! from the base), because points never run backwards in a log. Frames, checksums and sessions
//! are not known here. `docs/protocol.md` lists the fields of every kind.

use crate::checkpoint::PieceKind;
use crate::entry::{
    Arrival, Entry, EntrySequence, MAX_CHECKPOINT_PART, MAX_CONSOLE_INPUT, MAX_DISK_DATA,
    MAX_ENTROPY, MAX_EXITS, MAX_PACKET, MAX_PACKET_BYTES, MAX_PACKETS, OutputSequence, Packet,
    PacketOffload, RequestId, StateDigest, StopReason,
};
use crate::point::{ClockRate, CodeAddress, ExecutionPoint, VirtualTime, WallTime};
use crate::wire::{Cursor, DecodeError, MAX_COUNT, put_varint};

/// Most bytes one encoded entry takes: the data of the largest disk read and its fields.
pub const MAX_ENTRY_BYTES: usize = MAX_DISK_DATA + 64;

/// What an entry costs in buffers beyond its encoded bytes: the decoded value and its place in
/// a queue. Part of the protocol, because both sides count the window in it.
pub const ENTRY_OVERHEAD: u64 = 256;

/// A batch is closed when its cost reaches this: large enough that frames cost nothing, small
/// enough that a frame is soon complete.
pub const BATCH_COST: u64 = 256 << 10;

/// The most a batch can cost: one short of being closed, and the largest entry.
pub const BATCH_COST_LIMIT: u64 = BATCH_COST + entry_cost(MAX_ENTRY_BYTES);

/// Most entries in one batch: its count is a 16-bit field.
pub const MAX_BATCH_ENTRIES: u16 = u16::MAX;

mod kind {
    pub const CLOCK_SYNC: u8 = 1;
    pub const DISK_COMPLETION: u8 = 2;
    pub const ENTROPY: u8 = 3;
    pub const CONSOLE_INPUT: u8 = 4;
    pub const OUTPUT_MARK: u8 = 5;
    pub const RELEASED: u8 = 6;
    pub const PROGRESS: u8 = 7;
    pub const DIGEST: u8 = 8;
    pub const STOP: u8 = 9;
    pub const EXITS: u8 = 24;
    pub const FLUSH: u8 = 10;
    pub const LANDING: u8 = 11;
    pub const CHECKPOINT_PART: u8 = 20;
    pub const PACKETS: u8 = 16;
    pub const WALL_CLOCK: u8 = 17;
}

/// Why something cannot be put into the log or on the wire. Nothing was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The entry's point lies before one already in the log.
    #[error("entry at point {point} after one at point {last}")]
    PointRunsBackwards {
        /// The last point in the log.
        last: ExecutionPoint,
        /// The entry's point.
        point: ExecutionPoint,
    },
    /// The entry carries more bytes than its kind may.
    #[error("{what} of {len} bytes, the limit is {limit}")]
    TooLarge {
        /// The data.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The most it may have.
        limit: usize,
    },
    /// A control message breaks its own rules; no receiver would take it.
    #[error("message is not valid: {0}")]
    Message(DecodeError),
}

/// What an entry of `encoded` bytes takes of a window or a buffer.
pub const fn entry_cost(encoded: usize) -> u64 {
    encoded as u64 + ENTRY_OVERHEAD
}

fn check_len(what: &'static str, len: usize, limit: usize) -> Result<(), EncodeError> {
    if len > limit {
        return Err(EncodeError::TooLarge { what, len, limit });
    }
    Ok(())
}

fn check(entry: &Entry, last: ExecutionPoint) -> Result<(), EncodeError> {
    if let Some(point) = entry.point().filter(|point| *point < last) {
        return Err(EncodeError::PointRunsBackwards { last, point });
    }
    match entry {
        Entry::Arrival { arrival: Arrival::DiskCompletion { data, .. }, .. } => {
            check_len("disk data", data.len(), MAX_DISK_DATA)
        }
        Entry::Arrival { arrival: Arrival::Entropy { data, .. }, .. } => {
            check_len("entropy", data.len(), MAX_ENTROPY)
        }
        Entry::Arrival { arrival: Arrival::ConsoleInput(data), .. } => {
            check_len("console input", data.len(), MAX_CONSOLE_INPUT)
        }
        Entry::CheckpointPart { bytes, .. } => {
            check_len("checkpoint piece", bytes.len(), MAX_CHECKPOINT_PART)
        }
        Entry::Arrival { arrival: Arrival::Packets(packets), .. } => check_packets(packets),
        Entry::Exits { exits, .. } => check_len("exits", exits.len(), MAX_EXITS),
        _ => Ok(()),
    }
}

fn check_packets(packets: &[Packet]) -> Result<(), EncodeError> {
    if packets.is_empty() {
        return Err(EncodeError::Message(NO_PACKETS));
    }
    check_len("packets", packets.len(), MAX_PACKETS)?;
    let total = packets.iter().map(|packet| packet.frame.len()).sum();
    check_len("packet bytes", total, MAX_PACKET_BYTES)?;
    packets.iter().try_for_each(|packet| check_len("packet", packet.frame.len(), MAX_PACKET))
}

const NO_PACKETS: DecodeError = DecodeError::Rule("no packet in a group of packets");

const NOT_CANONICAL: DecodeError = DecodeError::Rule("code address is not canonical");

/// A packet that is ready for the wire has a zero byte in front of its length, any other a one and
/// the fields of what is left to do.
fn encode_packet(packet: &Packet, out: &mut Vec<u8>) {
    let plain = packet.offload == PacketOffload::default();
    out.push(u8::from(!plain));
    if !plain {
        out.extend_from_slice(&packet.offload.to_bytes());
    }
    put_bytes(out, &packet.frame);
}

fn decode_packet(cursor: &mut Cursor<'_>) -> Result<Packet, DecodeError> {
    let offload = match cursor.byte("packet offload")? {
        0 => PacketOffload::default(),
        1 => {
            let offload = PacketOffload::from_bytes(cursor.array("packet offload")?);
            if offload == PacketOffload::default() {
                return Err(DecodeError::Rule("packet offload without content"));
            }
            offload
        }
        tag => return Err(DecodeError::Tag { what: "packet offload", tag }),
    };
    Ok(Packet { offload, frame: cursor.bytes("packet", MAX_PACKET)?.to_vec() })
}

fn decode_packets(cursor: &mut Cursor<'_>) -> Result<Vec<Packet>, DecodeError> {
    let count = cursor.bounded("packet count", MAX_PACKETS as u64)?;
    if count == 0 {
        return Err(NO_PACKETS);
    }
    let mut packets = Vec::new();
    let mut total = 0;
    for _ in 0..count {
        let packet = decode_packet(cursor)?;
        total += packet.frame.len();
        if total > MAX_PACKET_BYTES {
            return Err(DecodeError::Rule("more packet bytes than a group may have"));
        }
        packets.push(packet);
    }
    Ok(packets)
}

fn put_bytes(out: &mut Vec<u8>, data: &[u8]) {
    put_varint(out, data.len() as u64);
    out.extend_from_slice(data);
}

/// Appends `entry` to `out`, its point relative to `last`, which moves on to it.
///
/// # Errors
/// [`EncodeError`]; then neither `out` nor `last` has changed.
pub fn encode_entry(
    entry: &Entry,
    last: &mut ExecutionPoint,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    check(entry, *last)?;
    let distance = entry.point().map_or(0, |point| point.since(*last));
    let start = |out: &mut Vec<u8>, kind: u8| {
        out.push(kind);
        put_varint(out, distance);
    };
    match entry {
        Entry::Arrival { arrival, .. } => match arrival {
            Arrival::ClockSync { time, rate } => {
                start(out, kind::CLOCK_SYNC);
                put_varint(out, time.as_ns());
                put_varint(out, rate.raw());
            }
            Arrival::DiskCompletion { disk, request, status, data } => {
                start(out, kind::DISK_COMPLETION);
                out.push(*disk);
                put_varint(out, request.0);
                out.push(*status);
                put_bytes(out, data);
            }
            Arrival::Entropy { request, data } => {
                start(out, kind::ENTROPY);
                put_varint(out, request.0);
                put_bytes(out, data);
            }
            Arrival::ConsoleInput(data) => {
                start(out, kind::CONSOLE_INPUT);
                put_bytes(out, data);
            }
            Arrival::WallClock { time } => {
                start(out, kind::WALL_CLOCK);
                put_varint(out, time.as_unix_ns());
            }
            Arrival::Packets(packets) => {
                start(out, kind::PACKETS);
                put_varint(out, packets.len() as u64);
                packets.iter().for_each(|packet| encode_packet(packet, out));
            }
        },
        Entry::OutputMark { output, .. } => {
            start(out, kind::OUTPUT_MARK);
            put_varint(out, output.0);
        }
        Entry::Released { output } => {
            out.push(kind::RELEASED);
            put_varint(out, output.0);
        }
        Entry::CheckpointPart { piece, bytes } => {
            out.extend([kind::CHECKPOINT_PART, *piece as u8]);
            put_bytes(out, bytes);
        }
        Entry::Progress { .. } => start(out, kind::PROGRESS),
        Entry::Digest { digest, .. } => {
            start(out, kind::DIGEST);
            encode_digest(digest, out);
        }
        Entry::Exits { exits, .. } => {
            start(out, kind::EXITS);
            put_bytes(out, exits);
        }
        Entry::Landing { branch, .. } => {
            start(out, kind::LANDING);
            out.extend_from_slice(&branch.get().to_le_bytes());
        }
        Entry::Flush { .. } => start(out, kind::FLUSH),
        Entry::Stop { reason, .. } => {
            start(out, kind::STOP);
            out.push(match reason {
                StopReason::GuestPowerOff => 0,
                StopReason::Operator => 1,
                StopReason::CannotBoot => 2,
                StopReason::Reboot => 3,
            });
        }
    }
    *last = entry.point().unwrap_or(*last);
    Ok(())
}

fn encode_digest(digest: &StateDigest, out: &mut Vec<u8>) {
    for word in digest.registers {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for word in [digest.cpu, digest.devices, digest.memory, digest.places] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    put_varint(out, u64::from(digest.pages));
}

fn decode_digest(cursor: &mut Cursor<'_>) -> Result<StateDigest, DecodeError> {
    let mut registers = [0; 18];
    for register in &mut registers {
        *register = cursor.word64("digest")?;
    }
    Ok(StateDigest {
        registers,
        cpu: cursor.word64("digest")?,
        devices: cursor.word64("digest")?,
        memory: cursor.word64("digest")?,
        places: cursor.word64("digest")?,
        pages: decode_u32(cursor, "digest page count")?,
    })
}

fn decode_u32(cursor: &mut Cursor<'_>, what: &'static str) -> Result<u32, DecodeError> {
    let value = cursor.bounded(what, u64::from(u32::MAX))?;
    Ok(u32::try_from(value).expect("bounded by u32::MAX"))
}

fn decode_code_address(cursor: &mut Cursor<'_>) -> Result<CodeAddress, DecodeError> {
    let address = cursor.word64("code address")?;
    CodeAddress::try_from(address).map_err(|_| NOT_CANONICAL)
}

fn decode_arrival(kind: u8, cursor: &mut Cursor<'_>) -> Result<Arrival, DecodeError> {
    Ok(match kind {
        kind::CLOCK_SYNC => Arrival::ClockSync {
            time: VirtualTime::from_ns(cursor.varint("guest time")?),
            rate: ClockRate::from_raw(cursor.varint("clock rate")?),
        },
        kind::DISK_COMPLETION => Arrival::DiskCompletion {
            disk: cursor.byte("disk number")?,
            request: RequestId(cursor.varint("request")?),
            status: cursor.byte("disk status")?,
            data: cursor.bytes("disk data", MAX_DISK_DATA)?.to_vec(),
        },
        kind::ENTROPY => Arrival::Entropy {
            request: RequestId(cursor.varint("request")?),
            data: cursor.bytes("entropy", MAX_ENTROPY)?.to_vec(),
        },
        kind::CONSOLE_INPUT => {
            Arrival::ConsoleInput(cursor.bytes("console input", MAX_CONSOLE_INPUT)?.to_vec())
        }
        kind::WALL_CLOCK => {
            Arrival::WallClock { time: WallTime::from_unix_ns(cursor.varint("wall clock")?) }
        }
        kind::PACKETS => Arrival::Packets(decode_packets(cursor)?),
        tag => return Err(DecodeError::Tag { what: "entry kind", tag }),
    })
}

fn decode_checkpoint_part(cursor: &mut Cursor<'_>) -> Result<Entry, DecodeError> {
    let tag = cursor.byte("checkpoint piece")?;
    let piece = PieceKind::ALL.get(usize::from(tag)).copied();
    let piece = piece.ok_or(DecodeError::Tag { what: "checkpoint piece", tag })?;
    let bytes = cursor.bytes("checkpoint piece", MAX_CHECKPOINT_PART)?.to_vec();
    Ok(Entry::CheckpointPart { piece, bytes })
}

fn decode_entry(cursor: &mut Cursor<'_>, last: &mut ExecutionPoint) -> Result<Entry, DecodeError> {
    let kind = cursor.byte("entry kind")?;
    if kind == kind::RELEASED {
        return Ok(Entry::Released { output: OutputSequence(cursor.varint("output")?) });
    }
    if kind == kind::CHECKPOINT_PART {
        return decode_checkpoint_part(cursor);
    }
    let is_known = (kind::CLOCK_SYNC..=kind::LANDING).contains(&kind)
        || matches!(kind, kind::PACKETS | kind::EXITS | kind::WALL_CLOCK);
    if !is_known {
        return Err(DecodeError::Tag { what: "entry kind", tag: kind });
    }
    let distance = cursor.varint("point")?;
    let point = last
        .get()
        .checked_add(distance)
        .map(ExecutionPoint::new)
        .ok_or(DecodeError::Rule("point is out of range"))?;
    *last = point;
    Ok(match kind {
        kind::OUTPUT_MARK => {
            Entry::OutputMark { point, output: OutputSequence(cursor.varint("output")?) }
        }
        kind::PROGRESS => Entry::Progress { point },
        kind::FLUSH => Entry::Flush { point },
        kind::LANDING => Entry::Landing { point, branch: decode_code_address(cursor)? },
        kind::DIGEST => Entry::Digest { point, digest: decode_digest(cursor)? },
        kind::EXITS => Entry::Exits { point, exits: cursor.bytes("exits", MAX_EXITS)?.to_vec() },
        kind::STOP => Entry::Stop {
            point,
            reason: match cursor.byte("stop reason")? {
                0 => StopReason::GuestPowerOff,
                1 => StopReason::Operator,
                2 => StopReason::CannotBoot,
                3 => StopReason::Reboot,
                tag => return Err(DecodeError::Tag { what: "stop reason", tag }),
            },
        },
        arrival => Entry::Arrival { point, arrival: decode_arrival(arrival, cursor)? },
    })
}

/// Entries that follow each other in the log, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryBatch {
    /// The sequence of the first entry.
    pub first: EntrySequence,
    /// The last point in the log before this batch.
    pub base: ExecutionPoint,
    /// The entries, at least one, each with what it costs of the window (see [`ENTRY_OVERHEAD`]).
    pub entries: Vec<CostedEntry>,
}

/// An entry and what it costs of the window: its encoded bytes and [`ENTRY_OVERHEAD`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CostedEntry {
    /// The entry.
    pub entry: Entry,
    /// Its cost.
    pub cost: u64,
}

impl EntryBatch {
    /// The sequence of the last entry.
    pub fn last(&self) -> EntrySequence {
        EntrySequence(self.first.0 + self.entries.len() as u64 - 1)
    }

    /// The last point in the log after this batch.
    pub fn last_point(&self) -> ExecutionPoint {
        self.entries.iter().rev().find_map(|costed| costed.entry.point()).unwrap_or(self.base)
    }

    /// What the whole batch costs of the window.
    pub fn cost(&self) -> u64 {
        self.entries.iter().map(|costed| costed.cost).sum()
    }

    /// Reads the payload of an `Entries` frame.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(payload);
        let count = cursor.word16("entry count")?;
        if count == 0 {
            return Err(DecodeError::Rule("batch without entries"));
        }
        let first = cursor.varint("entry sequence")?;
        if first == 0 || first > MAX_COUNT {
            return Err(DecodeError::Rule("entry sequence is out of range"));
        }
        let base = ExecutionPoint::new(cursor.varint("base point")?);
        let mut last = base;
        // An entry takes at least two bytes, so a small frame cannot ask for much.
        let mut entries = Vec::with_capacity(usize::from(count).min(cursor.remaining() / 2 + 1));
        for _ in 0..count {
            let before = cursor.remaining();
            let entry = decode_entry(&mut cursor, &mut last)?;
            entries.push(CostedEntry { entry, cost: entry_cost(before - cursor.remaining()) });
        }
        cursor.finish()?;
        Ok(Self { first: EntrySequence(first), base, entries })
    }
}

/// Writes a batch entry by entry.
#[derive(Debug)]
pub struct BatchEncoder {
    bytes: Vec<u8>,
    /// Where the payload begins in `bytes`.
    start: usize,
    first: EntrySequence,
    count: u16,
    last_point: ExecutionPoint,
    cost: u64,
}

impl BatchEncoder {
    /// An empty batch at the end of `bytes`, whose content (room for a frame header) is kept.
    pub fn new(bytes: Vec<u8>, first: EntrySequence, base: ExecutionPoint) -> Self {
        let start = bytes.len();
        let mut bytes = bytes;
        bytes.extend_from_slice(&[0, 0]);
        put_varint(&mut bytes, first.0);
        put_varint(&mut bytes, base.get());
        Self { bytes, start, first, count: 0, last_point: base, cost: 0 }
    }

    /// Appends an entry.
    ///
    /// # Errors
    /// If the entry breaks a limit or its point runs backwards: then nothing is appended.
    ///
    /// # Panics
    /// If the batch has [`MAX_BATCH_ENTRIES`] already.
    pub fn push(&mut self, entry: &Entry) -> Result<EntrySequence, EncodeError> {
        assert!(self.count < MAX_BATCH_ENTRIES, "a batch is closed before it is full");
        let before = self.bytes.len();
        encode_entry(entry, &mut self.last_point, &mut self.bytes)?;
        self.cost += entry_cost(self.bytes.len() - before);
        let sequence = EntrySequence(self.first.0 + u64::from(self.count));
        self.count += 1;
        Ok(sequence)
    }

    /// What the batch costs of the window so far.
    pub const fn cost(&self) -> u64 {
        self.cost
    }

    /// How many entries it has so far.
    pub const fn count(&self) -> u16 {
        self.count
    }

    /// The bytes, ready to be sealed as a frame.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes[self.start..self.start + 2].copy_from_slice(&self.count.to_le_bytes());
        self.bytes
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
