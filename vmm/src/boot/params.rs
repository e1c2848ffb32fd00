//! The zero page: `struct boot_params`, what a boot loader tells the kernel.
//!
//! Offsets are those of `Documentation/arch/x86/zero-page.rst`. Everything not named here is
//! zero, which means "not known" or "not there".

use super::image::{HEADER_START, SetupHeader};
use super::{COMMAND_LINE, HIGH_MEMORY_START, LOW_MEMORY_END};
use vm_memory::GuestAddress;
use vmft_cpu::memory::PAGE_SIZE;

/// `e820_entries`: how many.
const E820_ENTRIES: usize = 0x1E8;
/// `e820_table`: address, size and type, 20 bytes each.
const E820_TABLE: usize = 0x2D0;
/// Bytes of one entry of the table.
const E820_ENTRY: usize = 20;
/// Type of usable memory.
const E820_RAM: u32 = 1;
/// Type of memory the kernel must leave alone.
const E820_RESERVED: u32 = 2;

/// `type_of_loader`.
const TYPE_OF_LOADER: usize = 0x210;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
/// `ramdisk_image`: address of the initramfs.
const RAMDISK_IMAGE: usize = 0x218;
/// `ramdisk_size` in bytes.
const RAMDISK_SIZE: usize = 0x21C;
/// `cmd_line_ptr`: address of the command line.
const CMD_LINE_PTR: usize = 0x228;

/// The first page of the parameters, for a machine with memory at `ranges`.
pub(super) fn zero_page(
    header: &SetupHeader,
    ranges: &[(GuestAddress, u64)],
    initramfs: Option<(GuestAddress, u64)>,
) -> Vec<u8> {
    let mut page = vec![0; PAGE_SIZE as usize];
    page[HEADER_START..][..header.bytes().len()].copy_from_slice(header.bytes());
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED;
    put(&mut page, CMD_LINE_PTR, address(COMMAND_LINE.0));
    if let Some((at, len)) = initramfs {
        put(&mut page, RAMDISK_IMAGE, address(at.0));
        put(&mut page, RAMDISK_SIZE, address(len));
    }
    let map = memory_map(ranges);
    page[E820_ENTRIES] = u8::try_from(map.len()).expect("a handful of ranges");
    for (index, (start, size, kind)) in map.into_iter().enumerate() {
        let entry = &mut page[E820_TABLE + index * E820_ENTRY..][..E820_ENTRY];
        entry[..8].copy_from_slice(&start.to_le_bytes());
        entry[8..16].copy_from_slice(&size.to_le_bytes());
        entry[16..].copy_from_slice(&kind.to_le_bytes());
    }
    page
}

/// Start, size and type of every range: a PC's, with what lies between 640 KiB and 1 MiB
/// reserved. The device hole is simply not listed.
fn memory_map(ranges: &[(GuestAddress, u64)]) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_MEMORY_END, E820_RAM),
        (LOW_MEMORY_END, HIGH_MEMORY_START - LOW_MEMORY_END, E820_RESERVED),
    ];
    for (start, len) in ranges {
        let end = start.0 + len;
        let start = start.0.max(HIGH_MEMORY_START);
        map.push((start, end - start, E820_RAM));
    }
    map
}

fn put(page: &mut [u8], offset: usize, value: u32) {
    page[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// Addresses and lengths of what lies below the device hole fit the fields' 32 bits.
fn address(value: u64) -> u32 {
    u32::try_from(value).expect("below the device hole")
}
