//! The CPU at a kernel's 64-bit entry.

use super::{GDT, PAGE_TABLES, STACK_TOP, ZERO_PAGE, write};
use vm_memory::GuestAddress;
use vmft_cpu::CpuState;
use vmft_cpu::memory::{GuestRam, PAGE_SIZE};
use vmft_cpu::state::{DescriptorTable, ModelSpecificRegisters, Segment, Segments};

/// Selector of the code segment: the protocol's `__BOOT_CS`.
const BOOT_CS: u16 = 0x10;
/// Selector of the data segment: the protocol's `__BOOT_DS`.
const BOOT_DS: u16 = 0x18;
/// Selector of a task state segment that is never used.
const BOOT_TR: u16 = 0x20;

/// Present, DPL 0, code, readable, accessed; long; 4 KiB granularity.
const CODE_ATTRIBUTES: u16 = 0xA9B;
/// Present, DPL 0, data, writable, accessed; big; 4 KiB granularity.
const DATA_ATTRIBUTES: u16 = 0xC93;
/// Present, busy 64-bit task state segment.
const TASK_ATTRIBUTES: u16 = 0x08B;

/// Gigabytes mapped onto themselves: all that 32-bit fields of the protocol can name.
const MAPPED_GIB: u64 = 4;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS, always set.
const RFLAGS_FIXED: u64 = 1 << 1;
/// The page attribute table after reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// DR6 after reset.
const DR6_RESET: u64 = 0xFFFF_0FF0;
/// DR7 after reset.
const DR7_RESET: u64 = 0x400;

const RSP: usize = 4;
const RSI: usize = 6;

/// Writes the descriptor table and the page tables, and returns a CPU about to execute the
/// instruction at `entry`: 64-bit mode, flat segments, interrupts off, RSI at the zero page.
pub(super) fn prepare(ram: &GuestRam, entry: u64) -> CpuState {
    let segments = segments();
    let table = descriptor_table(&segments);
    write(ram, GDT, &table);
    write(ram, PAGE_TABLES, &page_tables());
    let mut general = [0; 16];
    general[RSP] = STACK_TOP.0;
    general[RSI] = ZERO_PAGE.0;
    let mut debug = [0; 8];
    debug[6] = DR6_RESET;
    debug[7] = DR7_RESET;
    CpuState {
        general,
        rip: entry,
        rflags: RFLAGS_FIXED,
        segments,
        gdtr: DescriptorTable { base: GDT.0, limit: table_limit(&table) },
        cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG,
        cr3: PAGE_TABLES.0,
        cr4: CR4_PAE,
        debug,
        msrs: ModelSpecificRegisters {
            efer: EFER_LME | EFER_LMA,
            pat: PAT_RESET,
            ..ModelSpecificRegisters::default()
        },
        ..CpuState::default()
    }
}

fn segments() -> Segments {
    let flat = |selector, attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
    let data = flat(BOOT_DS, DATA_ATTRIBUTES);
    Segments {
        es: data,
        cs: flat(BOOT_CS, CODE_ATTRIBUTES),
        ss: data,
        ds: data,
        fs: data,
        gs: data,
        ldtr: Segment::default(),
        tr: Segment { selector: BOOT_TR, base: 0, limit: 0x67, attributes: TASK_ATTRIBUTES },
    }
}

/// Two empty descriptors, code, data, and the two halves of the task state segment.
fn descriptor_table(segments: &Segments) -> Vec<u8> {
    let entries =
        [0, 0, descriptor(&segments.cs), descriptor(&segments.ds), descriptor(&segments.tr), 0];
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

fn table_limit(table: &[u8]) -> u16 {
    u16::try_from(table.len() - 1).expect("six descriptors")
}

/// A descriptor in memory (AMD64 manual volume 2, "Legacy Segment Descriptors"). All bases
/// here are zero.
fn descriptor(segment: &Segment) -> u64 {
    let granular = segment.attributes & 0x800 != 0;
    let limit = u64::from(if granular { segment.limit >> 12 } else { segment.limit });
    let attributes = u64::from(segment.attributes);
    (limit & 0xFFFF)
        | (attributes & 0xFF) << 40
        | (limit >> 16 & 0xF) << 48
        | (attributes >> 8 & 0xF) << 52
}

/// One table each of levels 4 and 3, then one of level 2 for every gigabyte, of 2 MiB pages.
fn page_tables() -> Vec<u8> {
    let table = |index: u64| GuestAddress(PAGE_TABLES.0 + index * PAGE_SIZE);
    let mut entries = vec![0u64; 512 * 2];
    entries[0] = table(1).0 | PRESENT | WRITABLE;
    for gib in 0..MAPPED_GIB {
        entries[512 + gib as usize] = table(2 + gib).0 | PRESENT | WRITABLE;
    }
    entries.extend((0..MAPPED_GIB * 512).map(|page| page << 21 | PRESENT | WRITABLE | LARGE));
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}
