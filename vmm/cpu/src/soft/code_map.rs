//! Which bytes of memory hold decoded instructions, in granules of 64 bytes.

use crate::memory::{GuestRam, PAGE_SIZE, PageNumber};

/// Bytes a granule stands for: 64 granules make a page.
const GRANULE: u64 = PAGE_SIZE / 64;

/// One word a page, one bit a granule.
#[derive(Debug)]
pub(super) struct CodeMap {
    pages: Vec<u64>,
}

fn granules(offset: u64, len: u64) -> u64 {
    let first = offset / GRANULE;
    let last = (offset + len - 1) / GRANULE;
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

impl CodeMap {
    /// Nothing decoded in `ram`.
    pub(super) fn new(ram: &GuestRam) -> Self {
        let end = ram.ranges().last().map_or(0, |(start, len)| start.0 + len);
        let pages = usize::try_from(end / PAGE_SIZE).expect("guest memory fits the host");
        Self { pages: vec![0; pages] }
    }

    fn page(&self, page: PageNumber) -> u64 {
        usize::try_from(page.0).ok().and_then(|index| self.pages.get(index)).copied().unwrap_or(0)
    }

    /// True if the page holds decoded instructions.
    pub(super) fn has_code(&self, page: PageNumber) -> bool {
        self.page(page) != 0
    }

    /// True if bytes at `physical`, within one page, hold decoded instructions.
    pub(super) fn hits(&self, physical: u64, len: usize) -> bool {
        let word = self.page(PageNumber::containing(physical));
        word != 0 && len > 0 && word & granules(physical % PAGE_SIZE, len as u64) != 0
    }

    /// Records decoded bytes within one page; true if they are the page's first.
    pub(super) fn add(&mut self, physical: u64, len: u64) -> bool {
        let page = PageNumber::containing(physical);
        let Some(word) = usize::try_from(page.0).ok().and_then(|index| self.pages.get_mut(index))
        else {
            return false;
        };
        let first = *word == 0;
        if len > 0 {
            *word |= granules(physical % PAGE_SIZE, len);
        }
        first
    }

    /// Forgets the page.
    pub(super) fn remove(&mut self, page: PageNumber) {
        if let Some(word) = usize::try_from(page.0).ok().and_then(|i| self.pages.get_mut(i)) {
            *word = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MIN_MEMORY;

    #[test]
    fn a_write_hits_code_in_its_own_granule_only() {
        let mut map = CodeMap::new(&GuestRam::new(MIN_MEMORY).expect("allowed size"));
        assert!(map.add(0x5040, 10));
        assert!(!map.add(0x5fff, 1));
        assert!(map.hits(0x5047, 8) && map.hits(0x5038, 9) && map.hits(0x5ff8, 8));
        assert!(!map.hits(0x5038, 8) && !map.hits(0x5080, 8) && !map.hits(0x6000, 8));
        map.remove(PageNumber(5));
        assert!(!map.has_code(PageNumber(5)));
    }
}
