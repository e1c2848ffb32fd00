//! Making all of guest memory zero, as a reset does.
//!
//! The host is given it back, so that it costs neither time nor memory to have it zero. Only pages that were not zero
//! before count as written. Which may be, the host's page tables say: what has never been touched is not touched here.

use super::{GuestMemoryMmap, GuestRam, PAGE_SIZE, PageNumber};
use nix::sys::mman::{MmapAdvise, madvise};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use vm_memory::{Bytes, GuestAddress};

/// Bits of an entry of `/proc/self/pagemap`: the page is in memory, or was swapped out.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Entries read at a time.
const ENTRIES: usize = 8192;
/// The host's pages are as large as the guest's on x86-64.
const ENTRY_BYTES: usize = size_of::<u64>();

/// What may be in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    /// Nothing: it was never touched.
    Untouched,
    /// Anything.
    InMemory,
    /// Anything, and looking would bring it back.
    Swapped,
}

impl GuestRam {
    /// Zeroes all of it. Pages that were not zero count as written.
    pub fn clear(&self) {
        for ((GuestAddress(start), _), host) in self.ranges().into_iter().zip(self.host_ranges()) {
            let first = PageNumber::containing(start).0;
            for (number, page) in (first..).map(PageNumber).zip(pages_of(&host)) {
                let counts = match page {
                    Page::Untouched => false,
                    Page::InMemory => !is_zero(&self.memory, number),
                    Page::Swapped => true,
                };
                if counts {
                    self.tracker.mark_page(number);
                }
            }
            if let Err(error) = give_back(&host) {
                tracing::debug!(%error, "memory is not taken back, and written with zeroes");
                self.write_zeroes(&host, start);
            }
        }
    }

    fn write_zeroes(&self, host: &Range<usize>, start: u64) {
        let zeroes = [0; PAGE_SIZE as usize];
        for offset in (0..host.len() as u64).step_by(zeroes.len()) {
            let address = GuestAddress(start + offset);
            self.memory.write_slice(&zeroes, address).expect("within a range of memory");
        }
    }
}

fn is_zero(memory: &GuestMemoryMmap, page: PageNumber) -> bool {
    const LINE: usize = 64;
    let mut bytes = [0; PAGE_SIZE as usize];
    let (first, rest) = bytes.split_at_mut(LINE);
    let is_zero_from = |address: GuestAddress, bytes: &mut [u8]| {
        memory.read_slice(bytes, address).expect("within a range of memory");
        bytes.iter().all(|byte| *byte == 0)
    };
    // Most pages show at once that they are not.
    let address = page.address();
    is_zero_from(address, first) && is_zero_from(GuestAddress(address.0 + LINE as u64), rest)
}

/// Makes the memory at these addresses, whole pages, what it was when it was mapped: zero, and nowhere.
fn give_back(host: &Range<usize>) -> nix::Result<()> {
    let start = std::ptr::with_exposed_provenance_mut(host.start);
    let start = NonNull::new(start).expect("a mapping is not at address 0");
    // SAFETY: the range is a private anonymous mapping of guest memory, of which nobody holds references: it is read and
    // written by volatile accesses alone. It reads as zero afterwards, which is what the caller wants.
    unsafe { madvise(start, host.len(), MmapAdvise::MADV_DONTNEED) }
}

/// What the host has of the pages at these addresses; of all of them anything, if it does not say.
fn pages_of(host: &Range<usize>) -> impl Iterator<Item = Page> {
    let count = host.len() / PAGE_SIZE as usize;
    let entries = read_pagemap(host.start / PAGE_SIZE as usize, count).unwrap_or_else(|error| {
        tracing::debug!(%error, "the host does not say which pages it has");
        vec![PRESENT; count]
    });
    entries.into_iter().map(|entry| match entry {
        entry if entry & SWAPPED != 0 => Page::Swapped,
        entry if entry & PRESENT != 0 => Page::InMemory,
        _ => Page::Untouched,
    })
}

fn read_pagemap(first: usize, count: usize) -> io::Result<Vec<u64>> {
    let file = File::open("/proc/self/pagemap")?;
    let mut entries = Vec::with_capacity(count);
    let mut bytes = vec![0; ENTRIES.min(count) * ENTRY_BYTES];
    while entries.len() < count {
        let next = (count - entries.len()).min(ENTRIES);
        let bytes = &mut bytes[..next * ENTRY_BYTES];
        file.read_exact_at(bytes, ((first + entries.len()) * ENTRY_BYTES) as u64)?;
        let words = bytes.chunks_exact(ENTRY_BYTES);
        entries.extend(words.map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes"))));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{DEVICE_HOLE_END, MAX_MEMORY, MIN_MEMORY};

    fn in_memory(ram: &GuestRam) -> usize {
        let ranges = ram.host_ranges();
        ranges.iter().flat_map(pages_of).filter(|page| *page == Page::InMemory).count()
    }

    #[test]
    fn cleared_memory_is_zero_costs_nothing_and_only_what_was_not_zero_counts_as_written() {
        let ram = GuestRam::new(MAX_MEMORY).expect("4 GiB is allowed");
        let first = [3, 700, DEVICE_HOLE_END / PAGE_SIZE + 9].map(PageNumber);
        for page in first {
            ram.memory().write_slice(&[7; 9], page.address()).expect("memory");
            // In the same large page of the host, and zero.
            let zero = GuestAddress(page.address().0 + PAGE_SIZE);
            ram.memory().write_slice(&[0; 9], zero).expect("memory");
        }
        ram.tracker().take_written();
        ram.clear();
        assert_eq!(ram.tracker().take_written(), first);
        assert_eq!(in_memory(&ram), 0, "the host has it back");
        for page in first {
            assert_eq!(ram.memory().read_obj::<u64>(page.address()).expect("memory"), 0);
        }
        ram.clear();
        assert!(ram.tracker().take_written().is_empty(), "it was zero");
    }

    #[test]
    fn memory_that_the_host_does_not_take_back_is_zeroed_all_the_same() {
        let ram = GuestRam::new(MIN_MEMORY).expect("64 MiB is allowed");
        ram.memory().write_slice(&[1; 5], GuestAddress(0x5FFE)).expect("memory");
        ram.write_zeroes(&ram.host_ranges()[0], 0);
        assert_eq!(ram.memory().read_obj::<[u8; 5]>(GuestAddress(0x5FFE)).expect("memory"), [0; 5]);
    }
}
