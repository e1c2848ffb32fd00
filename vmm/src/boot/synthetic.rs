//! Made-up kernels for tests.

use lzma_rust2::{FilterType, LzmaOptions, LzmaWriter, XzOptions, XzWriter};
use std::io::Write;

/// Where the first segment of [`vmlinux`] goes, and its entry.
pub(crate) const TEXT: u64 = 0x100_0000;
/// Where its second segment goes.
pub(super) const DATA: u64 = 0x180_0000;
/// Length of the second segment in memory, most of it zero.
pub(super) const DATA_MEMORY: u64 = 0x30_0000;
/// Length of `TEXT`'s contents: enough for several LZ4 matches and no page multiple.
const TEXT_LEN: usize = 70_001;

/// Where the 512-byte sectors of real-mode code end in [`bzimage`].
const PROTECTED_MODE: usize = 2 * 512;
/// `payload_offset` in [`bzimage`].
const PAYLOAD_OFFSET: usize = 0x123;

/// What the first segment holds: compressible, and with calls that the x86 filter changes.
pub(super) fn text() -> Vec<u8> {
    let call = [0xE8, 0x10, 0x20, 0, 0, 0x90];
    (0..TEXT_LEN).map(|index| call[index % 6] ^ u8::from(index % 7 == 0)).collect()
}

/// What the second segment's file part holds.
pub(super) fn data() -> Vec<u8> {
    (0..5000u32).map(|index| ((index * index) >> 3) as u8).collect()
}

/// A segment of an ELF file.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) kind: u32,
    pub(crate) address: u64,
    pub(crate) contents: Vec<u8>,
    pub(crate) memory: u64,
}

/// The two segments of [`vmlinux`].
pub(super) fn parts() -> Vec<Part> {
    let text = Part { kind: 1, address: TEXT, contents: text(), memory: TEXT_LEN as u64 };
    let data = Part { kind: 1, address: DATA, contents: data(), memory: DATA_MEMORY };
    vec![text, data]
}

/// An executable ELF file for x86-64.
pub(crate) fn elf(parts: &[Part], entry: u64) -> Vec<u8> {
    let mut file = b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&2u16.to_le_bytes()); // ET_EXEC
    put(&62u16.to_le_bytes()); // EM_X86_64
    put(&1u32.to_le_bytes());
    put(&entry.to_le_bytes());
    put(&64u64.to_le_bytes()); // program headers
    put(&[0; 8 + 4]); // no section headers, no flags
    put(&64u16.to_le_bytes());
    put(&56u16.to_le_bytes());
    put(&(parts.len() as u16).to_le_bytes());
    put(&[0; 6]);
    let mut offset = 64 + 56 * parts.len() as u64;
    for part in parts {
        put(&part.kind.to_le_bytes());
        put(&7u32.to_le_bytes());
        for field in [
            offset,
            0xFFFF_FFFF_8000_0000u64.wrapping_add(part.address),
            part.address,
            part.contents.len() as u64,
            part.memory,
            0x1000,
        ] {
            put(&field.to_le_bytes());
        }
        offset += part.contents.len() as u64;
    }
    parts.iter().for_each(|part| put(&part.contents));
    file
}

/// The kernel that all tests load.
pub(crate) fn vmlinux() -> Vec<u8> {
    elf(&parts(), TEXT)
}

/// A bzImage of protocol 2.15 around a payload.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; PROTECTED_MODE + PAYLOAD_OFFSET];
    let mut put =
        |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]); // setup_sects
    put(0x1FE, &0xAA55u16.to_le_bytes());
    put(0x200, &[0xEB, 0x6A]); // the jump over the header
    put(0x202, b"HdrS");
    put(0x206, &0x20Fu16.to_le_bytes());
    put(0x211, &[1]); // loadflags
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(0x236, &0x7Fu16.to_le_bytes()); // xloadflags
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &(PAYLOAD_OFFSET as u32).to_le_bytes());
    put(0x24C, &(payload.len() as u32).to_le_bytes());
    file.extend_from_slice(payload);
    // What follows the payload in real files.
    file.resize(file.len().next_multiple_of(16), 0);
    file
}

/// Overwrites bytes of a file.
pub(super) fn patched(mut file: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
    file
}

/// Appends the length, as the kernel's build does for all but gzip.
fn with_length(mut packed: Vec<u8>, unpacked: &[u8]) -> Vec<u8> {
    packed.extend_from_slice(&(unpacked.len() as u32).to_le_bytes());
    packed
}

pub(super) fn lz4(unpacked: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4C, 0x18];
    for block in unpacked.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        packed.extend_from_slice(&(block.len() as u32).to_le_bytes());
        packed.extend_from_slice(&block);
    }
    with_length(packed, unpacked)
}

pub(super) fn gzip(unpacked: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(unpacked).expect("writing to memory");
    writer.finish().expect("writing to memory")
}

pub(super) fn xz(unpacked: &[u8]) -> Vec<u8> {
    let mut options = XzOptions::with_preset(1);
    options.prepend_pre_filter(FilterType::BcjX86, 0);
    let mut writer = XzWriter::new(Vec::new(), options).expect("valid options");
    writer.write_all(unpacked).expect("writing to memory");
    with_length(writer.finish().expect("writing to memory"), unpacked)
}

pub(super) fn lzma(unpacked: &[u8]) -> Vec<u8> {
    // Of unknown length, as the kernel's build makes it, from a pipe.
    let mut writer = LzmaWriter::new_use_header(Vec::new(), &LzmaOptions::with_preset(1), None)
        .expect("valid options");
    writer.write_all(unpacked).expect("writing to memory");
    with_length(writer.finish().expect("writing to memory"), unpacked)
}

pub(super) fn zstd(unpacked: &[u8]) -> Vec<u8> {
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    with_length(ruzstd::encoding::compress_to_vec(unpacked, level), unpacked)
}
