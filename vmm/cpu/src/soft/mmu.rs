//! Page walks: four levels, pages of 4 KiB, 2 MiB and 1 GiB (SDM volume 3, chapter 4.5).
//!
//! A walk reads the tables in memory every time; nothing but complete translations is cached.
//! Accessed and dirty bits are set when a translation succeeds, never when it faults. A table
//! that does not lie in memory reads as all ones, which no entry may be.

use super::cpu::{CR0_WP, CR4_PGE, CR4_SMEP, Cpu, EFER_NXE};
use super::event::{Event, Trap};
use super::exception::Exception;
use super::tlb::{GLOBAL, LARGE, Mapping, PAGE_MASK, WRITABLE};
use crate::cpu_model::PHYSICAL_BITS;
use crate::memory::PageNumber;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE_BIT: u64 = 1 << 7;
const GLOBAL_BIT: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// Address bits of an entry.
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & PAGE_MASK;
/// Address bits beyond the physical address space.
const BEYOND: u64 = ((1 << 52) - 1) & !((1 << PHYSICAL_BITS) - 1);

const ERROR_PRESENT: u16 = 1;
const ERROR_WRITE: u16 = 1 << 1;
const ERROR_USER: u16 = 1 << 2;
const ERROR_RESERVED: u16 = 1 << 3;
const ERROR_FETCH: u16 = 1 << 4;

/// What an access is going to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intent {
    /// A load.
    Read,
    /// A store, or a load that a store will follow.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// The tables passed on the way down, for setting their accessed bits.
#[derive(Debug, Clone, Copy, Default)]
struct Step {
    physical: u64,
    entry: u64,
}

#[derive(Debug)]
struct Path {
    steps: [Step; 4],
    len: usize,
    writable: bool,
    user: bool,
    no_execute: bool,
}

impl Cpu {
    /// Finds where `address` lies and sets accessed and dirty bits.
    pub(super) fn walk(
        &mut self,
        address: u64,
        intent: Intent,
        user: bool,
    ) -> Result<Mapping, Trap> {
        let mut path = Path {
            steps: [Step::default(); 4],
            len: 0,
            writable: true,
            user: true,
            no_execute: false,
        };
        let mut table = self.cr3 & ADDRESS;
        for level in (0..4u32).rev() {
            let shift = 12 + 9 * level;
            let physical = table + ((address >> shift) & 0x1FF) * 8;
            let entry = self.ram.read_entry(physical);
            if entry & PRESENT == 0 {
                return Err(self.page_fault(address, intent, user, 0));
            }
            let leaf = level == 0 || entry & PAGE_SIZE_BIT != 0;
            if entry & self.reserved_bits(level, leaf) != 0 {
                let error = ERROR_PRESENT | ERROR_RESERVED;
                return Err(self.page_fault(address, intent, user, error));
            }
            path.steps[path.len] = Step { physical, entry };
            path.len += 1;
            path.writable &= entry & WRITE != 0;
            path.user &= entry & USER != 0;
            path.no_execute |= entry & NO_EXECUTE != 0;
            if leaf {
                if !self.permits(&path, intent, user) {
                    return Err(self.page_fault(address, intent, user, ERROR_PRESENT));
                }
                return self.finish_walk(&path, address, shift, intent, user);
            }
            table = entry & ADDRESS;
        }
        unreachable!("level 0 is always a leaf")
    }

    fn reserved_bits(&self, level: u32, leaf: bool) -> u64 {
        let no_execute = if self.msrs.efer & EFER_NXE == 0 { NO_EXECUTE } else { 0 };
        let shape = match (level, leaf) {
            (3, true) => PAGE_SIZE_BIT,
            (2, true) => 0x3FFF_E000,
            (1, true) => 0x001F_E000,
            _ => 0,
        };
        BEYOND | no_execute | shape
    }

    fn permits(&self, path: &Path, intent: Intent, user: bool) -> bool {
        if user && !path.user {
            return false;
        }
        match intent {
            Intent::Read => true,
            Intent::Write => self.may_write(path, user),
            Intent::Fetch => {
                let smep = !user && path.user && self.cr4 & CR4_SMEP != 0;
                !path.no_execute && !smep
            }
        }
    }

    fn may_write(&self, path: &Path, user: bool) -> bool {
        path.writable || (!user && self.cr0 & CR0_WP == 0)
    }

    fn finish_walk(
        &mut self,
        path: &Path,
        address: u64,
        shift: u32,
        intent: Intent,
        user: bool,
    ) -> Result<Mapping, Trap> {
        let leaf = path.len - 1;
        let mut dirty = false;
        for (index, step) in path.steps[..path.len].iter().enumerate() {
            let mut wanted = step.entry | ACCESSED;
            if index == leaf && intent == Intent::Write {
                wanted |= DIRTY;
            }
            dirty = wanted & DIRTY != 0;
            if wanted != step.entry {
                self.update_entry(step.physical, wanted)?;
            }
        }
        let entry = path.steps[leaf].entry;
        let inside = (1u64 << shift) - 1;
        let frame = ((entry & ADDRESS & !inside) | (address & inside)) & PAGE_MASK;
        let mut flags = 0;
        if dirty && self.may_write(path, user) {
            flags |= WRITABLE;
        }
        if entry & GLOBAL_BIT != 0 && self.cr4 & CR4_PGE != 0 {
            flags |= GLOBAL;
        }
        if shift > 12 {
            flags |= LARGE;
        }
        Ok(Mapping { frame, flags })
    }

    /// Writes back a table entry with more bits set.
    fn update_entry(&mut self, physical: u64, entry: u64) -> Result<(), Trap> {
        let page = PageNumber::containing(physical);
        if self.code.hits(physical, 8) {
            if !self.restart.code_writes {
                self.event = Event::CodeWrite;
                return Err(Trap);
            }
            self.stale.push(page);
        }
        self.ram.guest().tracker().mark_page(page);
        self.ram.write(physical, &entry.to_le_bytes());
        Ok(())
    }

    #[cold]
    fn page_fault(&mut self, address: u64, intent: Intent, user: bool, reason: u16) -> Trap {
        let mut error = reason;
        if user {
            error |= ERROR_USER;
        }
        match intent {
            Intent::Read => {}
            Intent::Write => error |= ERROR_WRITE,
            Intent::Fetch => {
                let shown = self.msrs.efer & EFER_NXE != 0 || self.cr4 & CR4_SMEP != 0;
                error |= if shown { ERROR_FETCH } else { 0 };
            }
        }
        self.raise(Exception::PageFault { address, error })
    }
}
