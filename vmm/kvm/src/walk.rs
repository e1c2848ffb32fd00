//! Page walks that look and change nothing: where an instruction lies, and whether it would fault.

use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::cpu_model::PHYSICAL_BITS;
use vmft_cpu::memory::{GuestRam, PAGE_SIZE, PageNumber};

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !(PAGE_SIZE - 1);
const BEYOND: u64 = ((1 << 52) - 1) & !((1 << PHYSICAL_BITS) - 1);
/// Longest instruction in bytes.
const MAX_LENGTH: usize = 15;

/// The guest's linear addresses, seen through its page tables.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LinearView<'a> {
    pub(crate) ram: &'a GuestRam,
    pub(crate) cr3: u64,
}

/// Where a linear address leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) physical: u64,
    pub(crate) writable: bool,
    pub(crate) user: bool,
    pub(crate) executable: bool,
}

impl LinearView<'_> {
    /// Where `address` leads; `None` if nowhere.
    pub(crate) fn place(&self, address: u64) -> Option<Place> {
        if ((address << 16) as i64 >> 16) as u64 != address {
            return None;
        }
        let mut place = Place { physical: 0, writable: true, user: true, executable: true };
        let mut table = self.cr3 & ADDRESS;
        for level in (0..4u32).rev() {
            let shift = 12 + 9 * level;
            let slot = table + ((address >> shift) & 0x1FF) * 8;
            let entry: u64 = self.ram.memory().read_obj(GuestAddress(slot)).ok()?;
            if entry & PRESENT == 0 || entry & BEYOND != 0 {
                return None;
            }
            place.writable &= entry & WRITE != 0;
            place.user &= entry & USER != 0;
            place.executable &= entry & NO_EXECUTE == 0;
            if level == 0 || (level < 3 && entry & LARGE != 0) {
                let within = (1 << shift) - 1;
                place.physical = (entry & ADDRESS & !within) | (address & within);
                return Some(place);
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// True if the physical address is memory.
    pub(crate) fn is_memory(&self, physical: u64) -> bool {
        self.ram.has_page(PageNumber::containing(physical))
    }

    /// The bytes of the instruction at `address`, as far as they can be read.
    pub(crate) fn instruction_bytes(&self, address: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(MAX_LENGTH);
        for offset in 0..MAX_LENGTH as u64 {
            let Some(place) = self.place(address.wrapping_add(offset)) else { break };
            let byte = self.ram.memory().read_obj::<u8>(GuestAddress(place.physical));
            let Ok(byte) = byte else { break };
            bytes.push(byte);
        }
        bytes
    }

    /// The eight bytes at `address`.
    pub(crate) fn word(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        for (offset, byte) in (0..).zip(&mut bytes) {
            let place = self.place(address.wrapping_add(offset))?;
            *byte = self.ram.memory().read_obj(GuestAddress(place.physical)).ok()?;
        }
        Some(u64::from_le_bytes(bytes))
    }
}
