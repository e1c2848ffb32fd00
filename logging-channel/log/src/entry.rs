//! The records of the log.

use crate::checkpoint::PieceKind;
use crate::point::{ClockRate, CodeAddress, ExecutionPoint, VirtualTime, WallTime};
use serde::{Deserialize, Serialize};

/// Most data a disk completion carries: devices split or refuse larger reads. A megabyte is more
/// than Linux asks of a virtio disk in one request, and keeps one entry from filling the channel.
pub const MAX_DISK_DATA: usize = 1 << 20;
/// Most bytes of one entropy request.
pub const MAX_ENTROPY: usize = 4096;
/// Most console bytes of one entry; more are split over several.
pub const MAX_CONSOLE_INPUT: usize = 4096;

/// Most bytes of one piece of a checkpoint in the log: a full batch of pages, none of them packed.
pub const MAX_CHECKPOINT_PART: usize = 257 << 10;
/// Most bytes of one network packet: the largest that segmentation offload makes, 64 KiB of IP behind
/// an Ethernet header with a VLAN tag.
pub const MAX_PACKET: usize = (64 << 10) + 18;
/// Most packets of one entry.
pub const MAX_PACKETS: usize = 64;
/// Most bytes of all packets of one entry: far more than come while the guest takes one interrupt,
/// and little beside a channel's buffer.
pub const MAX_PACKET_BYTES: usize = 256 << 10;
/// Most bytes of one entry of exits: a few hundred of them.
pub const MAX_EXITS: usize = 64 << 10;

/// The place of an output in the guest's history of outputs, counted from 1.
///
/// Both sides count the same outputs, so the same number names the same output.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct OutputSequence(pub u64);

/// The place of an entry in the log, counted from 1.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct EntrySequence(pub u64);

/// A place in the log and in the guest's run: what a checkpoint stands for, and where a session
/// begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LogPosition {
    /// The last entry before this place; 0 at the beginning of a log.
    pub entry: EntrySequence,
    /// Where the guest is.
    pub point: ExecutionPoint,
}

impl LogPosition {
    /// The beginning of a log, with the guest at `point`.
    pub const fn start_of_log(point: ExecutionPoint) -> Self {
        Self { entry: EntrySequence(0), point }
    }
}

/// The number of the reign. Every go-live takes the next one from the arbiter.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Generation(pub u64);

/// Names one request of one device; both sides number requests alike.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct RequestId(pub u64);

/// What the sender of a packet has left to be done: the fields of `struct virtio_net_hdr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PacketOffload {
    /// `VIRTIO_NET_HDR_F_…`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_…`.
    pub gso_type: u8,
    /// Length of the headers in bytes, a hint.
    pub header_len: u16,
    /// Payload bytes of each segment.
    pub segment_size: u16,
    /// Where the checksummed bytes begin.
    pub checksum_start: u16,
    /// Where, from there, the checksum goes.
    pub checksum_offset: u16,
}

impl PacketOffload {
    /// Bytes of `struct virtio_net_hdr`, without the count of buffers.
    pub const LEN: usize = 10;

    /// As `struct virtio_net_hdr` (virtio specification §5.1.6): little-endian.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let Self { flags, gso_type, header_len, segment_size, checksum_start, checksum_offset } =
            self;
        let mut bytes = [0; Self::LEN];
        bytes[..2].copy_from_slice(&[flags, gso_type]);
        let words = [header_len, segment_size, checksum_start, checksum_offset];
        for (bytes, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// From `struct virtio_net_hdr`.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let word = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            header_len: word(2),
            segment_size: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        }
    }
}

/// An Ethernet frame.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Packet {
    /// What is left to be done; the default for a packet that is ready for the wire.
    pub offload: PacketOffload,
    /// The frame from its destination address on, without a check sequence; at most [`MAX_PACKET`]
    /// bytes.
    pub frame: Vec<u8>,
}

/// An input from the outside world, which only the primary can place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Arrival {
    /// Guest time is corrected. Time never runs backwards: `time` is not before the
    /// guest's time at the entry's point.
    ClockSync {
        /// Guest time from this point on.
        time: VirtualTime,
        /// Its rate from this point on.
        rate: ClockRate,
    },
    /// A disk request ended.
    DiskCompletion {
        /// Which device.
        disk: u8,
        /// Which request of that device.
        request: RequestId,
        /// The virtio-blk status byte (0 is success).
        status: u8,
        /// The data of a read, at most [`MAX_DISK_DATA`] bytes; empty for other requests.
        data: Vec<u8>,
    },
    /// An entropy request was filled.
    Entropy {
        /// Which request.
        request: RequestId,
        /// The random bytes, at most [`MAX_ENTROPY`].
        data: Vec<u8>,
    },
    /// Bytes typed at the console, at most [`MAX_CONSOLE_INPUT`].
    ConsoleInput(Vec<u8>),
    /// The world's time here: what the real-time clock tells from here on, as far as the guest has not
    /// set it to something else. Guest time is as before.
    WallClock {
        /// The world's time.
        time: WallTime,
    },
    /// Packets from the network, for one interrupt: 1 to [`MAX_PACKETS`] of them, together at most
    /// [`MAX_PACKET_BYTES`].
    Packets(Vec<Packet>),
}

/// A compact summary of the machine's state at one point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateDigest {
    /// The general registers RAX to R15 in hardware order, then RIP and RFLAGS: enough to
    /// say in the report what differs.
    pub registers: [u64; 18],
    /// Hash of the whole CPU state.
    pub cpu: u64,
    /// Hash of all device state.
    pub devices: u64,
    /// Hash of all memory: the sum of its pages' hashes.
    pub memory: u64,
    /// The same sum, each page's hash times its place: together they name a page that differs alone.
    pub places: u64,
    /// How many pages are not all zero.
    pub pages: u32,
}

/// Why a machine was stopped on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// The guest switched the machine off.
    GuestPowerOff,
    /// The operator stopped the pair.
    Operator,
    /// The guest was reset, and does not start any more.
    CannotBoot,
    /// The guest was reset, and that was to end it.
    Reboot,
}

/// One record of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// An input and the point at which it arrived.
    Arrival {
        /// Where the guest was.
        point: ExecutionPoint,
        /// What came.
        arrival: Arrival,
    },
    /// Every output up to `output` was produced at or before `point`. Once the backup has
    /// acknowledged this entry, those outputs may be released (the output rule, §2.2 of the paper).
    OutputMark {
        /// Where the guest was when the mark was made.
        point: ExecutionPoint,
        /// The last output the mark covers.
        output: OutputSequence,
    },
    /// Every output up to `output` has been let out.
    Released {
        /// The last output that is out.
        output: OutputSequence,
    },
    /// The guest has reached `point` with no other input before it.
    Progress {
        /// The backup may run up to here.
        point: ExecutionPoint,
    },
    /// The state at `point`.
    Digest {
        /// Where it was taken.
        point: ExecutionPoint,
        /// What it was.
        digest: StateDigest,
    },
    /// What the guest exited for since the last entry of this kind, up to `point`: a backup compares
    /// it with its own exits. The engine's own encoding, which the channel does not look into.
    Exits {
        /// The last exit's point, or a later one.
        point: ExecutionPoint,
        /// The exits, at most [`MAX_EXITS`] bytes.
        exits: Vec<u8>,
    },
    /// `point` lies behind a conditional branch, and this is where that branch is: so a backup need not
    /// look at every instruction on its way there. Only of use to who has not reached the point yet, and
    /// no more than a hint: the point's number alone says which place it is.
    Landing {
        /// The place.
        point: ExecutionPoint,
        /// Where the branch in front of it is.
        branch: CodeAddress,
    },
    /// Another backup started from here: whatever is cached of memory is forgotten on every side, so
    /// that all walk alike, and a digest window begins.
    Flush {
        /// Where.
        point: ExecutionPoint,
    },
    /// A piece of a checkpoint: what has changed since the last one, and the state. It names a place
    /// by what the machine is there, and stands for everything the guest did up to it. The pieces of
    /// one follow each other with nothing but watermarks between, and only its end makes it count.
    CheckpointPart {
        /// Which kind of piece.
        piece: PieceKind,
        /// The piece, encoded, at most [`MAX_CHECKPOINT_PART`] bytes.
        bytes: Vec<u8>,
    },
    /// The machine stops here on purpose; this is no failure.
    Stop {
        /// Where.
        point: ExecutionPoint,
        /// Why.
        reason: StopReason,
    },
}

impl Entry {
    /// The point up to which this entry lets a backup run; `None` for an entry that says
    /// nothing about the guest's progress.
    pub fn point(&self) -> Option<ExecutionPoint> {
        match self {
            Self::Arrival { point, .. }
            | Self::OutputMark { point, .. }
            | Self::Progress { point }
            | Self::Digest { point, .. }
            | Self::Exits { point, .. }
            | Self::Landing { point, .. }
            | Self::Flush { point }
            | Self::Stop { point, .. } => Some(*point),
            Self::Released { .. } | Self::CheckpointPart { .. } => None,
        }
    }
}
