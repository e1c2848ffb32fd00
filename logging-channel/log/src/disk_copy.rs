//! A disk on its way to a backup that has a copy of its own.
//!
//! ```text
//! primary   Begin ─▶ … Data · Data · Reached … ─▶ Reached the end ─▶ Data (what is written since) …
//! backup    ◀─ digests of what its copy has, chunk by chunk
//! ```
//! A primary compares the digests with its own disk and sends what differs; what its guest writes meanwhile
//! to a place that it has passed, it sends after that. So a receiver applies pieces in the order in which they
//! come, and has the disk once the checkpoint of the join is complete.

use crate::control::{ControlMessage, decode_control};
use crate::entry::Generation;
use crate::wire::{Cursor, DecodeError, check_count, put_varint};
use lz4_flex::block::{compress, decompress};
use serde::{Deserialize, Serialize};

/// What a piece of a disk begins and ends at, in bytes.
pub const DISK_SECTOR: u64 = 512;
/// Most bytes of a disk in one piece.
pub const MAX_DISK_PIECE: usize = 256 << 10;
/// Most digests in one message: those of 256 MiB at the least.
pub const MAX_DISK_DIGESTS: usize = 4096;
/// Largest disk, in bytes: offsets in it are far from overflowing.
pub const MAX_DISK_SIZE: u64 = 1 << 56;
/// Bytes of the shortest chunk of which there is one digest.
pub const MIN_CHUNK: u64 = 64 << 10;
/// Most chunks of one disk: a primary keeps a digest of each.
pub const MAX_CHUNKS: u64 = 1 << 20;

/// Which copy of a disk it is: random, and made with the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyId(pub [u8; 16]);

/// What is said of a disk before it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCopyHeader {
    /// Its number on the board.
    pub disk: u8,
    /// Bytes.
    pub size: u64,
    /// Bytes of a chunk.
    pub chunk: u64,
    /// The primary's generation.
    pub generation: Generation,
    /// The primary's own copy.
    pub copy: CopyId,
}

impl DiskCopyHeader {
    /// The chunk of a disk of `size` bytes: the shortest that makes no more than [`MAX_CHUNKS`].
    pub const fn chunk_for(size: u64) -> u64 {
        let mut chunk = MIN_CHUNK;
        while size.div_ceil(chunk) > MAX_CHUNKS {
            chunk *= 2;
        }
        chunk
    }
}

impl ControlMessage for DiskCopyHeader {
    fn validate(&self) -> Result<(), DecodeError> {
        check_count("generation", self.generation.0)?;
        check_at(self.size, "size of a disk")?;
        if self.size == 0 || self.chunk != Self::chunk_for(self.size) {
            return Err(DecodeError::Rule(
                "a disk's chunks follow from its size, which is not zero",
            ));
        }
        Ok(())
    }
}

/// A piece of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskPiece {
    /// A disk begins.
    Begin(DiskCopyHeader),
    /// Bytes of it.
    Data {
        /// The disk's number.
        disk: u8,
        /// Where, in bytes.
        offset: u64,
        /// At most [`MAX_DISK_PIECE`].
        data: Vec<u8>,
    },
    /// Zeroes.
    Zeroes {
        /// The disk's number.
        disk: u8,
        /// Where, in bytes.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Up to here it is as on the primary, but for what is sent later.
    Reached {
        /// The disk's number.
        disk: u8,
        /// In bytes.
        offset: u64,
    },
}

const BEGIN: u8 = 0;
const PLAIN: u8 = 1;
const PACKED: u8 = 2;
const ZEROES: u8 = 3;
const REACHED: u8 = 4;

fn check_at(offset: u64, what: &'static str) -> Result<u64, DecodeError> {
    if offset > MAX_DISK_SIZE {
        return Err(DecodeError::Limit { what, found: offset, limit: MAX_DISK_SIZE });
    }
    if !offset.is_multiple_of(DISK_SECTOR) {
        return Err(DecodeError::Rule("a disk's pieces are whole sectors"));
    }
    Ok(offset)
}

impl DiskPiece {
    /// Appends the piece; data in its shortest form.
    pub fn encode(&self, mut out: Vec<u8>) -> Vec<u8> {
        match self {
            Self::Begin(header) => {
                out.push(BEGIN);
                postcard::to_extend(header, out).expect("a vector takes all a message has to write")
            }
            Self::Data { disk, offset, data } => {
                let packed = compress(data);
                let (kind, bytes) = match packed.len() < data.len() {
                    true => (PACKED, &packed),
                    false => (PLAIN, data),
                };
                out.extend([kind, *disk]);
                put_varint(&mut out, *offset);
                if kind == PACKED {
                    put_varint(&mut out, data.len() as u64);
                }
                out.extend_from_slice(bytes);
                out
            }
            Self::Zeroes { disk, offset, len } => {
                out.extend([ZEROES, *disk]);
                put_varint(&mut out, *offset);
                put_varint(&mut out, *len);
                out
            }
            Self::Reached { disk, offset } => {
                out.extend([REACHED, *disk]);
                put_varint(&mut out, *offset);
                out
            }
        }
    }

    /// Reads a piece.
    ///
    /// # Errors
    /// [`DecodeError`] for anything but exactly one piece within the limits.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(payload);
        let [kind] = cursor.array("kind of a disk's piece")?;
        if kind == BEGIN {
            return decode_control(cursor.take_rest()).map(Self::Begin);
        }
        let [disk] = cursor.array("number of a disk")?;
        let offset = check_at(cursor.varint("place on a disk")?, "place on a disk")?;
        let piece = match kind {
            PLAIN => Self::Data { disk, offset, data: checked(cursor.take_rest().to_vec())? },
            PACKED => {
                let len = cursor.varint("length of a disk's piece")?;
                let len = check_piece(len)?;
                let data = decompress(cursor.take_rest(), len);
                let data = data.map_err(|_| DecodeError::Compression)?;
                if data.len() != len {
                    return Err(DecodeError::Compression);
                }
                Self::Data { disk, offset, data: checked(data)? }
            }
            ZEROES => {
                let len = check_at(cursor.varint("length of zeroes")?, "length of zeroes")?;
                if len == 0 {
                    return Err(DecodeError::Rule("a disk's piece is not empty"));
                }
                Self::Zeroes { disk, offset, len }
            }
            REACHED => Self::Reached { disk, offset },
            tag => return Err(DecodeError::Tag { what: "kind of a disk's piece", tag }),
        };
        match cursor.remaining() {
            0 => Ok(piece),
            count => Err(DecodeError::Trailing { count }),
        }
    }
}

fn check_piece(len: u64) -> Result<usize, DecodeError> {
    let limit = MAX_DISK_PIECE as u64;
    if len > limit {
        return Err(DecodeError::Limit { what: "length of a disk's piece", found: len, limit });
    }
    Ok(len as usize)
}

fn checked(data: Vec<u8>) -> Result<Vec<u8>, DecodeError> {
    check_piece(data.len() as u64)?;
    if data.is_empty() || !(data.len() as u64).is_multiple_of(DISK_SECTOR) {
        return Err(DecodeError::Rule("a disk's pieces are whole sectors"));
    }
    Ok(data)
}

/// What a chunk holds: XXH3-128 with the seed of its message, or sixteen zero bytes for nothing but zeroes.
/// The seed is fresh with each join, so that no guest can make two chunks that look alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskDigest(pub [u8; 16]);

impl DiskDigest {
    /// Of zeroes.
    pub const ZEROES: Self = Self([0; 16]);

    /// Of a chunk's bytes.
    pub fn of(data: &[u8], seed: u64) -> Self {
        if data.iter().all(|byte| *byte == 0) {
            return Self::ZEROES;
        }
        let digest = xxhash_rust::xxh3::xxh3_128_with_seed(data, seed);
        // What is not zeroes never looks like that.
        Self(digest.max(1).to_le_bytes())
    }
}

/// What a backup's copy holds of a disk: consecutive chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskDigests {
    /// The disk's number.
    pub disk: u8,
    /// The seed, the same for all of this join.
    pub seed: u64,
    /// The number of the first chunk.
    pub first: u64,
    /// Their digests, at most [`MAX_DISK_DIGESTS`].
    pub digests: Vec<DiskDigest>,
}

impl DiskDigests {
    /// Appends them.
    pub fn encode(&self, mut out: Vec<u8>) -> Vec<u8> {
        out.push(self.disk);
        out.extend(self.seed.to_le_bytes());
        put_varint(&mut out, self.first);
        for DiskDigest(digest) in &self.digests {
            out.extend(digest);
        }
        out
    }

    /// Reads them.
    ///
    /// # Errors
    /// [`DecodeError`] for anything but whole digests, at least one and no more than there may be.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(payload);
        let [disk] = cursor.array("number of a disk")?;
        let seed = u64::from_le_bytes(cursor.array("seed of digests")?);
        let first = cursor.varint("number of a chunk")?;
        if first >= MAX_CHUNKS {
            let limit = MAX_CHUNKS - 1;
            return Err(DecodeError::Limit { what: "number of a chunk", found: first, limit });
        }
        let (digests, rest) = cursor.take_rest().as_chunks::<16>();
        if !rest.is_empty() || digests.is_empty() {
            return Err(DecodeError::Truncated { what: "digest of a chunk" });
        }
        if digests.len() > MAX_DISK_DIGESTS {
            let (found, limit) = (digests.len() as u64, MAX_DISK_DIGESTS as u64);
            return Err(DecodeError::Limit { what: "count of digests", found, limit });
        }
        let digests = digests.iter().copied().map(DiskDigest).collect();
        Ok(Self { disk, seed, first, digests })
    }
}

/// How a receiver gets on with disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DisksProgress {
    /// To be told to the primary.
    pub digests: Option<DiskDigests>,
    /// There is room for another piece.
    pub has_room: bool,
    /// All pieces so far are written.
    pub is_settled: bool,
}

impl DisksProgress {
    /// Of a receiver without disks.
    pub const fn none() -> Self {
        Self { digests: None, has_room: true, is_settled: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(size: u64) -> DiskCopyHeader {
        let chunk = DiskCopyHeader::chunk_for(size);
        DiskCopyHeader { disk: 1, size, chunk, generation: Generation(3), copy: CopyId([7; 16]) }
    }

    fn pieces() -> Vec<DiskPiece> {
        let noise: Vec<u8> =
            (0..512u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        vec![
            DiskPiece::Begin(header(1 << 30)),
            DiskPiece::Data { disk: 0, offset: 512, data: noise },
            DiskPiece::Data { disk: 2, offset: 1 << 40, data: vec![5; MAX_DISK_PIECE] },
            DiskPiece::Zeroes { disk: 0, offset: 0, len: 1 << 30 },
            DiskPiece::Reached { disk: 0, offset: 1 << 30 },
        ]
    }

    #[test]
    fn every_piece_comes_back_and_is_packed_where_that_is_shorter() {
        for piece in pieces() {
            let bytes = piece.encode(Vec::new());
            assert_eq!(DiskPiece::decode(&bytes), Ok(piece));
            assert!(bytes.len() < 2048);
            for cut in 0..bytes.len().min(40) {
                // A cut of plain data is shorter data, of whole sectors or none.
                assert!(DiskPiece::decode(&bytes[..cut]).is_err(), "cut at {cut}");
            }
        }
    }

    #[test]
    fn what_is_no_piece_of_a_disk_is_refused() {
        let data = |offset, len| {
            let piece = DiskPiece::Data { disk: 0, offset, data: vec![1; len] };
            DiskPiece::decode(&piece.encode(Vec::new()))
        };
        assert!(data(0, 512).is_ok());
        for (offset, len) in [(1, 512), (0, 511), (0, 0), (0, MAX_DISK_PIECE + 512), (1 << 57, 512)]
        {
            assert!(data(offset, len).is_err(), "{len} bytes at {offset}");
        }
        let begin = |header| DiskPiece::decode(&DiskPiece::Begin(header).encode(Vec::new()));
        assert!(begin(DiskCopyHeader { chunk: 512, ..header(1 << 30) }).is_err());
        assert!(begin(DiskCopyHeader { size: 513, ..header(1 << 30) }).is_err());
        assert!(begin(DiskCopyHeader { size: 0, ..header(1 << 30) }).is_err());
        // It says that it unpacks to more than there may be.
        let mut bomb = vec![PACKED, 0, 0];
        put_varint(&mut bomb, 1 << 40);
        assert!(matches!(DiskPiece::decode(&bomb), Err(DecodeError::Limit { .. })));
        assert!(matches!(DiskPiece::decode(&[9, 0, 0]), Err(DecodeError::Tag { .. })));
    }

    #[test]
    fn chunks_are_short_and_not_too_many() {
        assert_eq!(DiskCopyHeader::chunk_for(1 << 30), MIN_CHUNK);
        for size in [512, 1 << 36, (1 << 36) + 512, 1 << 40, MAX_DISK_SIZE] {
            let chunk = DiskCopyHeader::chunk_for(size);
            assert!(size.div_ceil(chunk) <= MAX_CHUNKS);
        }
    }

    #[test]
    fn digests_tell_contents_apart_and_zeroes_at_once() {
        let of = |byte| DiskDigest::of(&[byte; 4096], 17);
        assert_eq!(of(0), DiskDigest::ZEROES);
        assert_ne!(of(1), of(2));
        assert_ne!(of(1), DiskDigest::of(&[1; 4096], 18), "the seed counts");
        let digests = DiskDigests { disk: 3, seed: 9, first: 5, digests: vec![of(0), of(1)] };
        let bytes = digests.encode(Vec::new());
        assert_eq!(DiskDigests::decode(&bytes), Ok(digests.clone()));
        assert!(DiskDigests::decode(&bytes[..bytes.len() - 1]).is_err());
        assert!(DiskDigests::decode(&bytes[..10]).is_err(), "none");
        let many = DiskDigests { digests: vec![of(1); MAX_DISK_DIGESTS + 1], ..digests };
        assert!(DiskDigests::decode(&many.encode(Vec::new())).is_err());
    }

    proptest! {
        #[test]
        fn foreign_bytes_are_refused_or_are_a_piece(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(piece) = DiskPiece::decode(&bytes) {
                prop_assert_eq!(DiskPiece::decode(&piece.encode(Vec::new())), Ok(piece));
            }
            if let Ok(digests) = DiskDigests::decode(&bytes) {
                prop_assert_eq!(digests.encode(Vec::new()).len() <= bytes.len(), true);
            }
        }
    }
}
