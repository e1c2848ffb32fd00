//! Where the volumes of a disk are: GPT (UEFI specification 2.10, §5.3), MBR with its chain of logical
//! partitions, or no table at all.
//!
//! Checksums of a GPT are not looked at: a table that a firmware would mend is as good here.

use crate::reader::{Extent, Reader};
use std::rc::Rc;

/// Most entries that a GPT may have here; 128 is usual.
const MAX_ENTRIES: u32 = 1024;
/// Most logical partitions.
const MAX_LOGICAL: usize = 64;
const MBR_SIGNATURE: [u8; 2] = [0x55, 0xAA];
const MBR_TABLE: usize = 0x1BE;
/// An MBR that only says that there is a GPT.
const TYPE_PROTECTIVE: u8 = 0xEE;
const TYPES_EXTENDED: [u8; 3] = [0x05, 0x0F, 0x85];
/// The EFI system partition, as its GUID is on disk.
const ESP: [u8; 16] = guid(0xC12A_7328, 0xF81F, 0x11D2, 0xBA4B_00A0_C93E_C93B);
/// Where GRUB lies on a disk for a BIOS.
const BIOS_BOOT: [u8; 16] = guid(0x2168_6148, 0x6449, 0x6E6F, 0x744E_6565_6445_4649);

/// The mixed-endian form of a GUID.
const fn guid(a: u32, b: u16, c: u16, rest: u64) -> [u8; 16] {
    let (a, b, c, rest) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), rest.to_be_bytes());
    [
        a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], rest[0], rest[1], rest[2], rest[3],
        rest[4], rest[5], rest[6], rest[7],
    ]
}

/// One partition, or the disk as a whole.
#[derive(Debug, Clone)]
pub(crate) struct Partition {
    pub(crate) extent: Extent,
    /// Its number in the table; `None` for the whole disk.
    pub(crate) number: Option<u32>,
    /// What the kernel knows it by (`PARTUUID=`).
    pub(crate) uuid: Option<String>,
}

/// What a disk is divided into.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) partitions: Vec<Partition>,
    /// It has a place for a boot loader, or a partition that is marked to be booted.
    pub(crate) is_meant_to_boot: bool,
}

/// Reads the table of a disk; without one, the disk is its only volume.
pub(crate) fn read(reader: &Rc<Reader>) -> Table {
    let size = reader.size();
    let whole = Extent { reader: Rc::clone(reader), start: 0, len: size };
    let unpartitioned = || Table {
        partitions: vec![Partition { extent: whole.clone(), number: None, uuid: None }],
        is_meant_to_boot: false,
    };
    let Some(mbr) = whole.bytes::<512>(0) else { return unpartitioned() };
    if mbr[510..] != MBR_SIGNATURE || crate::volume::has_file_system(&whole) {
        return unpartitioned();
    }
    let is_protective = (0..4).any(|index| mbr[MBR_TABLE + index * 16 + 4] == TYPE_PROTECTIVE);
    let gpt = || [512, 4096].into_iter().find_map(|sector| gpt(&whole, sector));
    if let Some(table) = is_protective.then(gpt).flatten() {
        return table;
    }
    mbr_table(&whole, &mbr)
}

fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// A part of the disk in sectors, if that is one.
fn part(whole: &Extent, sector: u64, first: u64, count: u64) -> Option<Extent> {
    let (start, len) = (first.checked_mul(sector)?, count.checked_mul(sector)?);
    let end = start.checked_add(len)?;
    let is_one = start > 0 && len > 0 && end <= whole.len;
    is_one.then(|| Extent { reader: Rc::clone(&whole.reader), start, len })
}

fn gpt(whole: &Extent, sector: u64) -> Option<Table> {
    let header = whole.bytes::<92>(sector)?;
    if &header[..8] != b"EFI PART" {
        return None;
    }
    let (entries, count, size) = (quad(&header, 72), long(&header, 80), long(&header, 84));
    if !(128..=4096).contains(&size) {
        return None;
    }
    let mut table = Table { partitions: Vec::new(), is_meant_to_boot: false };
    for index in 0..count.min(MAX_ENTRIES) {
        let at = entries.checked_mul(sector)?.checked_add(u64::from(index) * u64::from(size))?;
        let Some(entry) = whole.bytes::<128>(at) else { break };
        let kind: [u8; 16] = entry[..16].try_into().expect("sixteen bytes");
        if kind == [0; 16] {
            continue;
        }
        table.is_meant_to_boot |= kind == ESP || kind == BIOS_BOOT;
        let (first, last) = (quad(&entry, 32), quad(&entry, 40));
        let count = last.checked_sub(first).and_then(|count| count.checked_add(1));
        let Some(extent) = count.and_then(|count| part(whole, sector, first, count)) else {
            continue;
        };
        let id: [u8; 16] = entry[16..32].try_into().expect("sixteen bytes");
        let number = Some(index + 1);
        table.partitions.push(Partition { extent, number, uuid: Some(guid_text(&id)) });
    }
    Some(table)
}

/// A GUID as the kernel writes it.
fn guid_text(id: &[u8; 16]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::new();
    for (index, byte) in order.into_iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        text.push_str(&format!("{:02x}", id[byte]));
    }
    text
}

/// Type, first sector and count of an entry of an MBR.
fn mbr_entry(sector: &[u8; 512], index: usize) -> (u8, u64, u64) {
    let entry = &sector[MBR_TABLE + index * 16..][..16];
    (entry[4], u64::from(long(entry, 8)), u64::from(long(entry, 12)))
}

fn mbr_table(whole: &Extent, mbr: &[u8; 512]) -> Table {
    let signature = long(mbr, 0x1B8);
    let mut table = Table { partitions: Vec::new(), is_meant_to_boot: false };
    let mut add = |extent: Option<Extent>, number: u32| {
        if let Some(extent) = extent {
            // The kernel's form; with a signature of zero it makes none.
            let uuid = (signature != 0).then(|| format!("{signature:08x}-{number:02x}"));
            table.partitions.push(Partition { extent, number: Some(number), uuid });
        }
    };
    for index in 0..4 {
        let (kind, first, count) = mbr_entry(mbr, index);
        table.is_meant_to_boot |= kind != 0 && mbr[MBR_TABLE + index * 16] == 0x80;
        match kind {
            0 | TYPE_PROTECTIVE => {}
            kind if TYPES_EXTENDED.contains(&kind) => {
                logical(whole, first, &mut add);
            }
            _ => add(part(whole, 512, first, count), index as u32 + 1),
        }
    }
    table
}

/// The chain of logical partitions that begins at sector `extended`. Each link names the next from there.
fn logical(whole: &Extent, extended: u64, add: &mut impl FnMut(Option<Extent>, u32)) {
    let mut at = extended;
    for number in (5..).take(MAX_LOGICAL) {
        let Some(link) = at.checked_mul(512).and_then(|at| whole.bytes::<512>(at)) else { return };
        if link[510..] != MBR_SIGNATURE {
            return;
        }
        let (_, first, count) = mbr_entry(&link, 0);
        add(part(whole, 512, at.saturating_add(first), count), number);
        let (_, next, _) = mbr_entry(&link, 1);
        if next == 0 {
            return;
        }
        at = extended.saturating_add(next);
    }
}
