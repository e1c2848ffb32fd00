//! A running hash of all guest memory, kept page by page.
//!
//! Hardware reports written pages generously: KVM marks a page as dirty when it maps it writable,
//! also for a read, so two sides that wrote alike need not report alike. The sum depends on what
//! memory holds alone: a page reported without need is hashed again and changes nothing.

use std::collections::BTreeMap;
use vm_memory::Bytes;
use vmft_cpu::memory::{DEVICE_HOLE_END, GuestRam, MAX_MEMORY, PAGE_SIZE, PageNumber};
use vmft_log::entry::StateDigest;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Pages of one block of hashes: memory that was never written costs no hashes.
const BLOCK_PAGES: u64 = 512;
/// No page has this number or a greater one.
const MAX_PAGES: u64 = (DEVICE_HOLE_END + MAX_MEMORY) / PAGE_SIZE;

/// The hash of one page, which depends on its place too; 0 for a page of zeroes.
fn page_hash(ram: &GuestRam, page: PageNumber) -> u64 {
    let mut bytes = [0; PAGE_SIZE as usize];
    ram.memory().read_slice(&mut bytes, page.address()).expect("written pages are memory");
    if bytes.iter().all(|byte| *byte == 0) { 0 } else { xxh3_64_with_seed(&bytes, page.0) }
}

/// What a page's hash counts as in the second sum.
fn weight(page: PageNumber) -> u64 {
    page.0 + 1
}

/// The page in which two memories differ, if it is one alone; `None` if they differ in several, or not at
/// all. With one page, both sums differ by that page's hashes alone, the second by its weight times as
/// much, and the quotient names it.
pub fn differing_page(one: &StateDigest, other: &StateDigest) -> Option<PageNumber> {
    let (sum, places) =
        (one.memory.wrapping_sub(other.memory), one.places.wrapping_sub(other.places));
    if sum == 0 {
        return None;
    }
    // Modulo 2^64 only odd numbers divide: both are shifted by what is even of the first.
    let shift = sum.trailing_zeros();
    let quotient = (places >> shift).wrapping_mul(inverse(sum >> shift));
    let page = (quotient & (u64::MAX >> shift)).checked_sub(1).map(PageNumber)?;
    let is_it = page.0 < MAX_PAGES && sum.wrapping_mul(weight(page)) == places;
    is_it.then_some(page)
}

/// The inverse of an odd number modulo 2^64, by Newton's iteration: each step doubles the bits that are
/// right, of which the number itself has three.
fn inverse(odd: u64) -> u64 {
    (0..5)
        .fold(odd, |inverse, _| inverse.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(inverse))))
}

/// The hashes of all pages, and two sums of them modulo 2^64.
#[derive(Debug, Default)]
pub(super) struct MemorySum {
    /// Blocks of [`BLOCK_PAGES`] hashes.
    hashes: BTreeMap<u64, Box<[u64]>>,
    sum: u64,
    /// Each hash times its page's [`weight`].
    places: u64,
    /// Pages that are not zero.
    used: u32,
    /// Pages to be looked at, in address order, the last first.
    waiting: Vec<PageNumber>,
}

impl MemorySum {
    /// The sum of memory in which only `pages` are not zero.
    pub(super) fn of(ram: &GuestRam, pages: Vec<PageNumber>) -> Self {
        let mut sum = Self::default();
        sum.report(pages);
        sum.fold(ram, usize::MAX);
        sum
    }

    /// These pages may have changed.
    pub(super) fn report(&mut self, mut pages: Vec<PageNumber>) {
        pages.reverse();
        pages.append(&mut self.waiting);
        self.waiting = pages;
    }

    /// Looks at up to `most` of the pages that may have changed.
    pub(super) fn fold(&mut self, ram: &GuestRam, most: usize) {
        let from = self.waiting.len().saturating_sub(most);
        for page in self.waiting.drain(from..).rev() {
            let hash = page_hash(ram, page);
            let block = self.hashes.entry(page.0 / BLOCK_PAGES);
            let block = block.or_insert_with(|| vec![0; BLOCK_PAGES as usize].into());
            let slot = usize::try_from(page.0 % BLOCK_PAGES).expect("below the block's size");
            let before = std::mem::replace(&mut block[slot], hash);
            let change = hash.wrapping_sub(before);
            self.sum = self.sum.wrapping_add(change);
            self.places = self.places.wrapping_add(change.wrapping_mul(weight(page)));
            self.used = self.used + u32::from(hash != 0) - u32::from(before != 0);
        }
    }

    /// How many pages are not zero, as far as they have been looked at.
    pub(super) fn used(&self) -> u32 {
        self.used
    }

    /// The pages that are not zero, as far as they have been looked at, in address order.
    pub(super) fn used_pages(&self) -> Vec<PageNumber> {
        let blocks = self.hashes.iter().flat_map(|(block, hashes)| {
            let first = block * BLOCK_PAGES;
            (first..).zip(hashes.iter()).filter(|(_, hash)| **hash != 0)
        });
        blocks.map(|(page, _)| PageNumber(page)).collect()
    }

    /// How many pages are still to be looked at.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The hash of all memory, as far as it has been looked at.
    pub(super) fn sum(&self) -> u64 {
        self.sum
    }

    /// The same, with each page counted by its place.
    pub(super) fn places(&self) -> u64 {
        self.places
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;
    use vmft_cpu::memory::MIN_MEMORY;

    fn write(ram: &GuestRam, page: u64, value: u8) {
        ram.memory().write_obj(value, GuestAddress(page * PAGE_SIZE + 9)).expect("memory");
    }

    fn folded(sum: &mut MemorySum, ram: &GuestRam, pages: &[u64]) -> Vec<u64> {
        sum.report(pages.iter().copied().map(PageNumber).collect());
        sum.fold(ram, usize::MAX);
        let used: Vec<u64> = sum.used_pages().iter().map(|page| page.0).collect();
        assert_eq!(used.len(), sum.used() as usize);
        used
    }

    #[test]
    fn pages_reported_without_need_change_nothing() {
        let ram = GuestRam::new(MIN_MEMORY).expect("64 MiB is allowed");
        let (mut exact, mut generous) = (MemorySum::default(), MemorySum::default());
        write(&ram, 3, 1);
        write(&ram, 700, 2);
        assert_eq!(folded(&mut exact, &ram, &[3, 700]), [3, 700]);
        assert_eq!(folded(&mut generous, &ram, &[2, 3, 4, 700, 9000]), [3, 700]);
        assert_eq!(exact.sum(), generous.sum());
        write(&ram, 3, 0);
        assert_eq!(folded(&mut exact, &ram, &[3]), [700]);
        assert_eq!(folded(&mut generous, &ram, &[3, 700]), [700]);
        assert_eq!(exact.sum(), generous.sum());
        assert_eq!(exact.sum(), MemorySum::of(&ram, vec![PageNumber(700)]).sum());
    }

    #[test]
    fn every_byte_and_its_place_count() {
        let ram = GuestRam::new(MIN_MEMORY).expect("64 MiB is allowed");
        let mut sums = vec![MemorySum::of(&ram, Vec::new()).sum()];
        for (page, value) in [(5, 1), (5, 2), (6, 1)] {
            write(&ram, page, value);
            sums.push(MemorySum::of(&ram, vec![PageNumber(5), PageNumber(6)]).sum());
            write(&ram, page, 0);
        }
        sums.sort_unstable();
        sums.dedup();
        assert_eq!(sums.len(), 4);
    }

    /// A digest of the memory of which this is the sum.
    fn digest(sum: &MemorySum) -> StateDigest {
        let (memory, places, pages) = (sum.sum(), sum.places(), sum.used());
        StateDigest { registers: [0; 18], cpu: 0, devices: 0, memory, places, pages }
    }

    #[test]
    fn a_page_that_differs_alone_is_named_and_of_several_none_is() {
        let ram = GuestRam::new(MIN_MEMORY).expect("64 MiB is allowed");
        let mut sum = MemorySum::default();
        for page in 0..3_000 {
            write(&ram, page * 5, 1);
            sum.report(vec![PageNumber(page * 5)]);
        }
        sum.fold(&ram, usize::MAX);
        let before = digest(&sum);
        assert_eq!(differing_page(&before, &before), None);
        // Used pages and unused ones, the first and the last.
        for page in [0, 1, 5, 7_777, 12_345, MIN_MEMORY / PAGE_SIZE - 1] {
            for value in 2..40 {
                write(&ram, page, value);
                folded(&mut sum, &ram, &[page]);
                let now = digest(&sum);
                assert_eq!(differing_page(&before, &now), Some(PageNumber(page)));
                assert_eq!(differing_page(&now, &before), Some(PageNumber(page)));
            }
            write(&ram, 100, 9);
            folded(&mut sum, &ram, &[100]);
            assert_eq!(differing_page(&before, &digest(&sum)), None, "two pages, one is {page}");
            write(&ram, 100, 1);
            write(&ram, page, u8::from(page % 5 == 0 && page < 15_000));
            folded(&mut sum, &ram, &[page, 100]);
            assert_eq!(digest(&sum), before);
        }
    }

    #[test]
    fn memory_is_looked_at_in_portions() {
        let ram = GuestRam::new(MIN_MEMORY).expect("64 MiB is allowed");
        let pages: Vec<PageNumber> = (10..30).map(PageNumber).collect();
        for page in &pages {
            write(&ram, page.0, 7);
        }
        let mut sum = MemorySum::default();
        sum.report(pages.clone());
        sum.fold(&ram, 12);
        assert_eq!((sum.used(), sum.waiting()), (12, 8));
        write(&ram, 29, 8);
        sum.report(vec![PageNumber(29)]);
        sum.fold(&ram, usize::MAX);
        assert_eq!((sum.used(), sum.waiting()), (20, 0));
        assert_eq!(sum.sum(), MemorySum::of(&ram, pages).sum());
    }
}
