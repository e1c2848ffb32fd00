//! Unpacks a kernel's payload.
//!
//! The kernel's build appends the unpacked length in four bytes after the compressed stream;
//! gzip ends with it by itself. It bounds what is unpacked and is compared with it. Memory is taken as it is
//! filled, since nothing but the stream itself shows that the length is true.

use super::{BootError, xz};
use std::borrow::Cow;
use std::fmt;
use std::io::{self, Read};

/// Unpacked bytes in one block of LZ4's legacy frame, all but the last block full.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;
/// Largest dictionary a stream may ask for: that of `xz -9`, twice.
const DICTIONARY_LIMIT: u64 = 128 << 20;
const LZMA_MEMORY_LIMIT_KIB: u32 = (DICTIONARY_LIMIT >> 10) as u32;

/// How a kernel's payload may be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// LZ4, legacy frame.
    Lz4,
    /// gzip.
    Gzip,
    /// xz, with the branch filter for x86.
    Xz,
    /// LZMA's older container.
    Lzma,
    /// Zstandard.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lz4 => "LZ4",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "LZMA",
            Self::Zstd => "zstd",
        })
    }
}

/// Unpacks `payload`, unless it is a plain ELF image.
pub(super) fn unpack(payload: &[u8], limit: u64) -> Result<Cow<'_, [u8]>, BootError> {
    if payload.starts_with(b"\x7FELF") {
        return Ok(Cow::Borrowed(payload));
    }
    let compression = recognise(payload)?;
    let damaged = |reason: String| BootError::Damaged { compression, reason };
    let (stream, trailer) = payload
        .split_last_chunk::<4>()
        .ok_or_else(|| damaged("it is shorter than its length field".to_owned()))?;
    let expected = u32::from_le_bytes(*trailer);
    if u64::from(expected) > limit {
        return Err(BootError::KernelTooLarge {
            needed: u64::from(expected).div_ceil(1 << 20),
            available: limit >> 20,
        });
    }
    let expected = usize::try_from(expected).map_err(|error| damaged(error.to_string()))?;
    let unpacked = match compression {
        Compression::Lz4 => unpack_lz4(stream, expected),
        Compression::Gzip => read_all(flate2::read::GzDecoder::new(payload), expected),
        Compression::Xz => unpack_xz(stream, expected),
        Compression::Lzma => unpack_lzma(stream, expected),
        Compression::Zstd => unpack_zstd(stream, expected),
    }
    .map_err(damaged)?;
    if unpacked.len() != expected {
        return Err(damaged(format!(
            "it unpacks to {} bytes instead of {expected}",
            unpacked.len()
        )));
    }
    Ok(Cow::Owned(unpacked))
}

/// The compression by its magic, as the kernel's `lib/decompress.c` knows them.
fn recognise(payload: &[u8]) -> Result<Compression, BootError> {
    const SUPPORTED: &[(&[u8], Compression)] = &[
        (&[0x02, 0x21, 0x4C, 0x18], Compression::Lz4),
        (&[0x1F, 0x8B], Compression::Gzip),
        (&[0xFD, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
        (&[0x5D, 0, 0], Compression::Lzma),
        (&[0x28, 0xB5, 0x2F, 0xFD], Compression::Zstd),
    ];
    const UNSUPPORTED: &[(&[u8], &str)] =
        &[(b"BZh", "bzip2"), (&[0x89, b'L', b'Z', b'O'], "LZO"), (&[0x1F, 0x9E], "old gzip")];
    if let Some((_, compression)) = SUPPORTED.iter().find(|(magic, _)| payload.starts_with(magic)) {
        return Ok(*compression);
    }
    let name = UNSUPPORTED.iter().find(|(magic, _)| payload.starts_with(magic));
    Err(BootError::UnsupportedCompression {
        compression: name.map_or("an unknown method", |(_, name)| name),
    })
}

/// Reads to the end, but never more than one byte beyond `expected`.
fn read_all(reader: impl Read, expected: usize) -> Result<Vec<u8>, String> {
    let mut unpacked = Vec::new();
    reader
        .take(expected as u64 + 1)
        .read_to_end(&mut unpacked)
        .map_err(|error: io::Error| error.to_string())?;
    Ok(unpacked)
}

/// LZ4's legacy frame: blocks with their packed length before them. It has no checksum.
fn unpack_lz4(stream: &[u8], expected: usize) -> Result<Vec<u8>, String> {
    let mut unpacked = Vec::new();
    let mut rest = stream.get(4..).unwrap_or_default();
    while !rest.is_empty() {
        let (length, blocks) =
            rest.split_first_chunk::<4>().ok_or("a block's length is cut short")?;
        let length = u32::from_le_bytes(*length) as usize;
        let block = blocks
            .get(..length)
            .ok_or_else(|| format!("a block of {length} bytes ends after {}", blocks.len()))?;
        let done = unpacked.len();
        // A byte of LZ4 stands for 255 at most.
        let room = LZ4_LEGACY_BLOCK.min(expected - done).min(block.len().saturating_mul(256));
        unpacked.resize(done + room, 0);
        let more = lz4_flex::block::decompress_into(block, &mut unpacked[done..])
            .map_err(|error| error.to_string())?;
        unpacked.truncate(done + more);
        rest = &blocks[length..];
    }
    Ok(unpacked)
}

fn unpack_xz(stream: &[u8], expected: usize) -> Result<Vec<u8>, String> {
    if !xz::dictionaries_are_within(stream, DICTIONARY_LIMIT) {
        let mib = DICTIONARY_LIMIT >> 20;
        return Err(format!("its dictionary is larger than {mib} MiB"));
    }
    read_all(lzma_rust2::XzReader::new(stream, false), expected)
}

fn unpack_lzma(stream: &[u8], expected: usize) -> Result<Vec<u8>, String> {
    let reader = lzma_rust2::LzmaReader::new_mem_limit(stream, LZMA_MEMORY_LIMIT_KIB, None)
        .map_err(|error| error.to_string())?;
    read_all(reader, expected)
}

/// Zstandard; the decoder leaves comparing the checksum to its caller.
fn unpack_zstd(stream: &[u8], expected: usize) -> Result<Vec<u8>, String> {
    let mut reader =
        ruzstd::decoding::StreamingDecoder::new(stream).map_err(|error| error.to_string())?;
    let unpacked = read_all(&mut reader, expected)?;
    let frame = reader.into_frame_decoder();
    let promised = frame.get_checksum_from_data();
    if promised.is_some() && frame.get_calculated_checksum() != promised {
        return Err("its checksum differs".to_owned());
    }
    Ok(unpacked)
}
