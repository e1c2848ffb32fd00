//! Digests: what the two sides compare.

use super::Machine;
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::{GuestRam, PAGE_SIZE, PageNumber};
use vmft_log::entry::StateDigest;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The hash of a value's encoding.
pub(super) fn hash_of<T: Serialize>(value: &T) -> u64 {
    let bytes = postcard::to_stdvec(value).expect("plain state always encodes");
    xxh3_64(&bytes)
}

/// The hash of the pages' numbers and contents, in the order given.
pub(super) fn hash_pages(ram: &GuestRam, pages: &[PageNumber]) -> u64 {
    let mut hasher = Xxh3::new();
    let mut page_bytes = [0; PAGE_SIZE as usize];
    for page in pages {
        let GuestAddress(address) = page.address();
        hasher.update(&address.to_le_bytes());
        ram.memory().read_slice(&mut page_bytes, page.address()).expect("written pages are memory");
        hasher.update(&page_bytes);
    }
    hasher.digest()
}

impl Machine {
    /// Summarises the state here: registers, devices, memory. Starts the next window.
    pub fn digest(&mut self) -> StateDigest {
        let cpu = self.engine.save();
        self.fold_written();
        self.engine.renew_write_tracking();
        let mut registers = [0; 18];
        registers[..16].copy_from_slice(&cpu.general);
        registers[16] = cpu.rip;
        registers[17] = cpu.rflags;
        let devices = hash_of(&(self.board.save(), self.clock, self.outputs, self.console_offset));
        let (memory, pages) = (self.memory_sum.sum(), self.memory_sum.used());
        let places = self.memory_sum.places();
        StateDigest { registers, cpu: hash_of(&cpu), devices, memory, places, pages }
    }

    /// Brings the running hash of memory up to date.
    pub(super) fn fold_written(&mut self) {
        self.engine.collect_written();
        let ram = self.engine.ram();
        self.memory_sum.report(ram.tracker().take_written());
        self.memory_sum.fold(ram, usize::MAX);
    }

    /// Does a part of what the next [`Self::digest`] or [`Self::checkpoint`] would have to do: looks
    /// at up to `most` pages written since the last one. How many are left.
    pub fn prepare_digest(&mut self, most: usize) -> usize {
        if self.memory_sum.waiting() == 0 {
            self.engine.collect_written();
            self.memory_sum.report(self.engine.ram().tracker().take_written());
            self.engine.renew_write_tracking();
        }
        self.memory_sum.fold(self.engine.ram(), most);
        self.memory_sum.waiting()
    }

    /// The pages of memory that are not all zero, in address order; looks only at those written since
    /// it last had to look. Changes nothing that a guest or a backup can notice.
    pub fn used_pages(&mut self) -> Vec<PageNumber> {
        self.prepare_digest(usize::MAX);
        self.prepare_digest(usize::MAX);
        self.memory_sum.used_pages()
    }

    /// A hash of memory as [`Self::used_pages`] last found it.
    pub(crate) fn known_memory(&self) -> u64 {
        self.memory_sum.sum()
    }

    /// The hash of the whole state: every page that is not zero, and all registers and devices.
    /// Two machines with the same hash go on alike.
    pub fn full_digest(&mut self) -> u64 {
        let pages = self.nonzero_pages();
        hash_of(&(
            hash_pages(self.engine.ram(), &pages),
            self.engine.save_cpus(),
            self.engine.point(),
            self.board.save(),
            self.clock,
            self.outputs,
            self.console_offset,
        ))
    }
}
