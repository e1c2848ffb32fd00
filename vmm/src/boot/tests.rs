//! Tests of loading, with made-up kernels. Real ones are for the whole machine's tests.

use super::synthetic::{
    DATA, DATA_MEMORY, Part, TEXT, bzimage, data, elf, gzip, lz4, lzma, parts, patched, text,
    vmlinux, xz, zstd,
};
use super::*;
use proptest::prelude::*;
use vmft_cpu::memory::{DEVICE_HOLE_END, MAX_MEMORY, MIN_MEMORY};

/// Packs a payload.
type Packer = fn(&[u8]) -> Vec<u8>;

fn compressions() -> [(Compression, Packer); 5] {
    [
        (Compression::Lz4, lz4),
        (Compression::Gzip, gzip),
        (Compression::Xz, xz),
        (Compression::Lzma, lzma),
        (Compression::Zstd, zstd),
    ]
}

fn ram(size: u64) -> GuestRam {
    GuestRam::new(size).expect("a legal size")
}

fn read(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.memory().read_slice(&mut bytes, GuestAddress(at)).expect("in memory");
    bytes
}

fn read_u64(ram: &GuestRam, at: u64) -> u64 {
    u64::from_le_bytes(read(ram, at, 8).try_into().expect("eight bytes"))
}

fn zero_page_u32(ram: &GuestRam, offset: u64) -> u32 {
    u32::from_le_bytes(read(ram, 0x7000 + offset, 4).try_into().expect("four bytes"))
}

/// The error of a load that must change nothing.
fn refused(size: u64, kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str) -> BootError {
    let ram = ram(size);
    let error = load(&ram, kernel, initramfs, cmdline).expect_err("to be refused");
    assert!(ram.tracker().take_written().is_empty(), "memory was changed before {error}");
    assert!(!error.to_string().contains('\n'), "{error}");
    error
}

fn refused_kernel(kernel: &[u8]) -> BootError {
    refused(MIN_MEMORY, kernel, None, "")
}

#[test]
fn every_compression_loads_the_same_kernel() {
    let plain = ram(MIN_MEMORY);
    let expected = load(&plain, &vmlinux(), None, "quiet").expect("a kernel");
    for (compression, pack) in compressions() {
        let ram = ram(MIN_MEMORY);
        let state = load(&ram, &bzimage(&pack(&vmlinux())), None, "quiet").expect("a kernel");
        assert_eq!(state, expected, "{compression}");
        assert!(read(&ram, TEXT, text().len()) == text(), "{compression}");
        assert!(read(&ram, DATA, data().len()) == data(), "{compression}");
        assert!(read(&ram, DATA + data().len() as u64, 4096) == [0; 4096], "{compression}");
    }
    let ram = ram(MIN_MEMORY);
    assert_eq!(load(&ram, &bzimage(&vmlinux()), None, "quiet"), Ok(expected), "not compressed");
}

#[test]
fn an_lz4_payload_of_several_blocks_is_joined() {
    let mut parts = parts();
    parts[1].contents = vec![7; 9 << 20];
    parts[1].memory = 9 << 20;
    let ram = ram(MIN_MEMORY);
    load(&ram, &bzimage(&lz4(&elf(&parts, TEXT))), None, "").expect("a kernel");
    assert!(read(&ram, DATA, 9 << 20).iter().all(|byte| *byte == 7));
}

#[test]
fn the_cpu_enters_64_bit_mode_with_flat_segments_and_interrupts_off() {
    let ram = ram(MIN_MEMORY);
    let state = load(&ram, &vmlinux(), None, "").expect("a kernel");
    assert_eq!(state.rip, TEXT);
    assert_eq!(state.general[6], 0x7000, "RSI holds the zero page's address");
    assert_eq!(state.cr0 & 0x8000_0001, 0x8000_0001, "paging and protection");
    assert_eq!(state.cr4 & 0x20, 0x20, "physical address extension");
    assert_eq!(state.msrs.efer & 0x500, 0x500, "long mode enabled and active");
    assert_eq!(state.rflags, 2);
    let segments = state.segments;
    assert_eq!((segments.cs.selector, segments.cs.attributes), (0x10, 0xA9B));
    for segment in [segments.ds, segments.es, segments.ss] {
        assert_eq!((segment.selector, segment.attributes), (0x18, 0xC93));
    }
    // The table in memory says the same as the hidden parts.
    assert_eq!(state.gdtr.limit, 6 * 8 - 1);
    assert_eq!(read_u64(&ram, state.gdtr.base + 0x10), 0x00AF_9B00_0000_FFFF);
    assert_eq!(read_u64(&ram, state.gdtr.base + 0x18), 0x00CF_9300_0000_FFFF);
    assert_eq!(read_u64(&ram, state.gdtr.base + 0x20), 0x0000_8B00_0000_0067);
}

#[test]
fn the_first_four_gigabytes_are_mapped_onto_themselves() {
    let ram = ram(MIN_MEMORY);
    let state = load(&ram, &vmlinux(), None, "").expect("a kernel");
    let entry = |table: u64, index: u64| {
        let entry = read_u64(&ram, (table & !0xFFF) + index * 8);
        assert_eq!(entry & 3, 3, "present and writable");
        entry
    };
    for address in [0, 0x7000, TEXT, 0x3FFF_FFFF, 0x4000_0000, 0xFFFF_FFFF_u64] {
        let directory = entry(entry(state.cr3, address >> 39), address >> 30);
        let page = entry(directory, address >> 21 & 0x1FF);
        assert_eq!(page & 0x80, 0x80, "a large page");
        assert_eq!(page & !0x1F_FFFF, address & !0x1F_FFFF);
    }
    const { assert!(PAGE_TABLES.0 + 6 * PAGE_SIZE <= COMMAND_LINE.0) };
}

#[test]
fn the_zero_page_tells_the_kernel_what_it_must_know() {
    let ram = ram(MIN_MEMORY);
    let initramfs = vec![0xAB; 10_000];
    load(&ram, &bzimage(&lz4(&vmlinux())), Some(&initramfs), "console=ttyS0").expect("a kernel");
    assert_eq!(read(&ram, 0x7000 + 0x202, 4), b"HdrS");
    assert_eq!(zero_page_u32(&ram, 0x230), 0x20_0000, "the kernel's own header is kept");
    assert_eq!(read(&ram, 0x7000 + 0x210, 1), [0xFF], "type_of_loader");
    let cmdline = u64::from(zero_page_u32(&ram, 0x228));
    assert_eq!(read(&ram, cmdline, 14), b"console=ttyS0\0");
    let at = u64::from(zero_page_u32(&ram, 0x218));
    assert_eq!(at, MIN_MEMORY - 3 * PAGE_SIZE, "as high as it can be, on a page");
    assert_eq!(zero_page_u32(&ram, 0x21C), 10_000);
    assert!(read(&ram, at, 10_000) == initramfs);
}

/// Start, end and type of the ranges in the zero page.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let count = u64::from(read(ram, 0x7000 + 0x1E8, 1)[0]);
    let entry = |index: u64| {
        let at = 0x7000 + 0x2D0 + index * 20;
        let start = read_u64(ram, at);
        (start, start + read_u64(ram, at + 8), zero_page_u32(ram, at + 16 - 0x7000))
    };
    (0..count).map(entry).collect()
}

#[test]
fn the_memory_map_leaves_out_what_is_no_memory() {
    let low = [(0, 0x9_FC00, 1), (0x9_FC00, 0x10_0000, 2)];
    let small = ram(MIN_MEMORY);
    load(&small, &vmlinux(), None, "").expect("a kernel");
    assert_eq!(memory_map(&small), [low[0], low[1], (0x10_0000, MIN_MEMORY, 1)]);
    let large = ram(MAX_MEMORY);
    load(&large, &vmlinux(), None, "").expect("a kernel");
    let end = DEVICE_HOLE_END + MAX_MEMORY - DEVICE_HOLE_START;
    let high = [(0x10_0000, DEVICE_HOLE_START, 1), (DEVICE_HOLE_END, end, 1)];
    assert_eq!(memory_map(&large), [low[0], low[1], high[0], high[1]]);
}

#[test]
fn a_plain_elf_kernel_gets_a_header_of_its_own() {
    let ram = ram(3 << 30);
    load(&ram, &vmlinux(), Some(b"initramfs"), "").expect("a kernel");
    assert_eq!(read(&ram, 0x7000 + 0x202, 4), b"HdrS");
    assert_eq!(read(&ram, 0x7000 + 0x1FE, 2), [0x55, 0xAA]);
    assert_eq!(read(&ram, 0x7000 + 0x211, 1), [1], "loaded high");
    assert_eq!(zero_page_u32(&ram, 0x218), 0x7FFF_F000, "below the limit of old, 2 GiB");
}

#[test]
fn an_initramfs_fits_to_the_byte_or_is_refused_with_both_numbers() {
    let floor = DATA + DATA_MEMORY;
    let room = usize::try_from(MIN_MEMORY - floor).expect("small");
    let fits = vec![1; room];
    load(&ram(MIN_MEMORY), &vmlinux(), Some(&fits), "").expect("it fits");
    let error = refused(MIN_MEMORY, &vmlinux(), Some(&vec![1; room + 1]), "");
    let expected = BootError::InitramfsTooLarge { len: room as u64 + 1, available: room as u64 };
    assert_eq!(error, expected);
    // The kernel's own limit counts too.
    let kernel = patched(bzimage(&lz4(&vmlinux())), 0x22C, &(floor as u32 + 4095).to_le_bytes());
    load(&ram(MIN_MEMORY), &kernel, Some(&[1; 4096]), "").expect("it fits");
    let error = refused(MIN_MEMORY, &kernel, Some(&[1; 4097]), "");
    assert_eq!(error, BootError::InitramfsTooLarge { len: 4097, available: 4096 });
}

#[test]
fn a_kernel_that_needs_more_memory_than_there_is_is_refused() {
    let mut large = parts();
    large[1].memory = MIN_MEMORY;
    let expected = BootError::KernelTooLarge { needed: 24 + 64, available: 64 };
    assert_eq!(refused_kernel(&elf(&large, TEXT)), expected);
    // So is a payload that would unpack to more than that, before it is unpacked.
    let mut payload = lz4(&vmlinux());
    let trailer = payload.len() - 4;
    payload[trailer..].copy_from_slice(&(65u32 << 20).to_le_bytes());
    let expected = BootError::KernelTooLarge { needed: 65, available: 64 };
    assert_eq!(refused_kernel(&bzimage(&payload)), expected);
}

#[test]
fn a_command_line_is_refused_only_beyond_the_kernels_limit() {
    let longest = "x".repeat(2047);
    load(&ram(MIN_MEMORY), &vmlinux(), None, &longest).expect("it fits");
    let error = refused(MIN_MEMORY, &vmlinux(), None, &(longest + "x"));
    assert_eq!(error, BootError::CommandLineTooLong { len: 2048, limit: 2047 });
    let kernel = patched(bzimage(&lz4(&vmlinux())), 0x238, &255u32.to_le_bytes());
    let error = refused(MIN_MEMORY, &kernel, None, &"x".repeat(256));
    assert_eq!(error, BootError::CommandLineTooLong { len: 256, limit: 255 });
    let error = refused(MIN_MEMORY, &vmlinux(), None, "a\0b");
    assert_eq!(error, BootError::CommandLineZero { offset: 1 });
}

#[test]
fn what_is_no_kernel_is_named() {
    let bz = bzimage(&lz4(&vmlinux()));
    let mut boot_sector = vec![1; 1024];
    boot_sector[510..512].copy_from_slice(&[0x55, 0xAA]);
    let mut file_system = vec![0; 2048];
    file_system[0x438..0x43A].copy_from_slice(&[0x53, 0xEF]);
    let interpreter =
        Part { kind: 3, address: TEXT, contents: b"/lib64/ld.so".to_vec(), memory: 12 };
    let cases: [(Vec<u8>, &str); 16] = [
        (Vec::new(), "an empty file"),
        (vec![0; 4096], "a file of zeros"),
        (b"070701000".to_vec(), "a cpio archive (an initramfs?)"),
        (gzip(b"initramfs"), "a gzip file (a compressed initramfs?)"),
        (b"!<arch>\ndebian-binary".to_vec(), "a Debian package or ar archive (unpack it first)"),
        (b"#!/bin/sh\n".to_vec(), "a script"),
        (b"console=ttyS0\n".to_vec(), "a text file"),
        (b"QFI\xFB\0\0\0\x03".to_vec(), "a qcow2 disk image"),
        (boot_sector, "a boot sector or disk image"),
        (file_system, "an ext4 file system (a disk image?)"),
        (vec![0xC3; 700], "unknown data"),
        (patched(bz.clone(), 0x206, &[0x0A, 0x02]), "a kernel older than 64-bit entry (Linux 3.8)"),
        (patched(bz, 0x236, &[0x7E]), "a 32-bit Linux kernel"),
        (patched(vmlinux(), 4, &[1]), "a 32-bit ELF file"),
        (patched(vmlinux(), 18, &[183]), "an ELF file for another CPU"),
        (elf(&[parts(), vec![interpreter]].concat(), TEXT), "an ordinary program"),
    ];
    for (file, looks_like) in cases {
        assert_eq!(refused_kernel(&file), BootError::NotAKernel { looks_like });
    }
}

#[test]
fn a_kernel_cut_anywhere_is_refused() {
    for (compression, pack) in compressions() {
        let kernel = bzimage(&pack(&vmlinux()));
        let end = 2 * 512 + 0x123 + pack(&vmlinux()).len();
        for len in [0x202, 0x206, 0x209, 0x24E, 0x260, 0x400, end / 2, end - 1] {
            let error = refused_kernel(&kernel[..len]);
            let named = matches!(
                error,
                BootError::Truncated { .. }
                    | BootError::NotAKernel { looks_like: "a boot sector or disk image" }
            );
            assert!(named, "{compression} cut at {len}: {error}");
        }
        let cut =
            BootError::Truncated { part: "the payload", needed: end as u64, len: end as u64 - 1 };
        assert_eq!(refused_kernel(&kernel[..end - 1]), cut);
    }
    let kernel = vmlinux();
    let error = refused_kernel(&kernel[..kernel.len() - 1]);
    let (needed, len) = (kernel.len() as u64, kernel.len() as u64 - 1);
    assert_eq!(error, BootError::Truncated { part: "a segment", needed, len });
}

#[test]
fn a_payload_cut_short_inside_its_container_is_damaged() {
    for (compression, pack) in compressions() {
        let mut payload = pack(&vmlinux());
        let trailer = payload.split_off(payload.len() - 4);
        payload.truncate(payload.len() * 2 / 3);
        payload.extend_from_slice(&trailer);
        let error = refused_kernel(&bzimage(&payload));
        assert!(
            matches!(&error, BootError::Damaged { compression: named, .. } if *named == compression),
            "{error}"
        );
    }
}

#[test]
fn a_changed_checksum_or_length_is_noticed() {
    // Both have four bytes of checksum right before the length.
    for pack in [gzip as Packer, zstd] {
        let mut payload = pack(&vmlinux());
        let at = payload.len() - 8;
        payload[at] ^= 1;
        let error = refused_kernel(&bzimage(&payload)).to_string();
        assert!(error.contains("checksum"), "{error}");
    }
    for (compression, pack) in compressions() {
        let mut payload = pack(&vmlinux());
        let at = payload.len() - 4;
        payload[at] ^= 1;
        let error = refused_kernel(&bzimage(&payload));
        assert!(matches!(error, BootError::Damaged { .. }), "{compression}: {error}");
    }
    // xz keeps its checksum inside; a changed literal of the data is found by it.
    let mut payload = xz(&vmlinux());
    let at = payload.len() / 3;
    payload[at] ^= 1;
    assert!(matches!(refused_kernel(&bzimage(&payload)), BootError::Damaged { .. }));
}

#[test]
fn a_compression_that_is_not_unpacked_is_named() {
    for (magic, compression) in [
        (b"BZh91AY".as_slice(), "bzip2"),
        (b"\x89LZO\0\x0D\x0A".as_slice(), "LZO"),
        (b"\xAA\xBB\xCC\xDD\xEE".as_slice(), "an unknown method"),
    ] {
        let error = refused_kernel(&bzimage(magic));
        assert_eq!(error, BootError::UnsupportedCompression { compression });
    }
}

#[test]
fn an_elf_image_that_makes_no_sense_is_refused() {
    let invalid = |file: Vec<u8>, words: &str| {
        let error = refused_kernel(&file);
        assert!(matches!(error, BootError::InvalidElf { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let changed = |change: fn(&mut Part)| {
        let mut parts = parts();
        change(&mut parts[1]);
        elf(&parts, TEXT)
    };
    invalid(elf(&parts(), TEXT - 1), "its entry 0xffffff is in none of its segments");
    invalid(elf(&[], TEXT), "its entry 0x1000000 is in none of its segments");
    invalid(changed(|part| part.address = 0x7000), "lies below 1 MiB");
    invalid(changed(|part| part.memory = 1), "more bytes in the file than in memory");
    invalid(changed(|part| part.address = u64::MAX - 5), "wraps around");
    invalid(bzimage(&lz4(b"not an ELF image")), "no ELF image");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        refused_kernel(&bytes);
    }

    #[test]
    fn random_bytes_behind_a_good_header_are_refused(
        bytes in proptest::collection::vec(any::<u8>(), 0..2048),
        magic in 0..6usize,
    ) {
        let magics: [&[u8]; 6] = [
            b"\x02\x21\x4C\x18", b"\x1F\x8B\x08", b"\xFD7zXZ\0", b"\x5D\0\0",
            b"\x28\xB5\x2F\xFD", b"\x7FELF\x02\x01\x01",
        ];
        refused_kernel(&bzimage(&[magics[magic], &bytes].concat()));
    }

    #[test]
    fn a_kernel_with_changed_bytes_is_loaded_or_refused_but_never_trusted(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        which in 0..6usize,
    ) {
        let mut kernel = match compressions().get(which) {
            Some((_, pack)) => bzimage(&pack(&vmlinux())),
            None => vmlinux(),
        };
        for (index, value) in changes {
            let at = index.index(kernel.len());
            kernel[at] = value;
        }
        let ram = ram(MIN_MEMORY);
        match load(&ram, &kernel, Some(b"initramfs"), "quiet") {
            Ok(state) => prop_assert!(state.rip >= HIGH_MEMORY_START && state.rip < MIN_MEMORY),
            Err(_) => prop_assert!(ram.tracker().take_written().is_empty()),
        }
    }
}
