//! Pages copied out of a machine at rest.

use vm_memory::Bytes;
use vmft_cpu::memory::{self, GuestRam};
use vmft_log::checkpoint::{PAGE_BYTES, Page, PageNumber, PageSource};

/// Most pages that are copied in one rest: 128 MiB, which a host copies in some tens of
/// milliseconds. A guest that has written more is sent what it has written while it runs, until no
/// more than this is left.
pub(crate) const MOST_COPIED: usize = 32 << 10;

/// Pages as they were at one rest, read in the order they were copied. The room they take is kept for
/// the next copy: taking fresh memory from the host costs more than copying.
#[derive(Debug, Default)]
pub(crate) struct CopiedPages {
    numbers: Vec<PageNumber>,
    /// At least as many as there are numbers.
    pages: Vec<Page>,
    read: usize,
}

impl CopiedPages {
    /// Copies `numbers`, which are memory, in place of what was copied before. The machine rests.
    pub(crate) fn copy(&mut self, ram: &GuestRam, numbers: &[memory::PageNumber]) {
        self.read = 0;
        self.numbers.clear();
        self.numbers.extend(numbers.iter().map(|number| PageNumber(number.0)));
        if self.pages.len() < numbers.len() {
            self.pages.resize(numbers.len(), [0; PAGE_BYTES]);
        }
        for (number, page) in numbers.iter().zip(&mut self.pages) {
            ram.memory()
                .read_slice(page, number.address())
                .expect("the machine's pages are memory");
        }
    }

    /// How many were copied.
    pub(crate) const fn len(&self) -> usize {
        self.numbers.len()
    }
}

impl PageSource for CopiedPages {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        let number = *self.numbers.get(self.read)?;
        *page = self.pages[self.read];
        self.read += 1;
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_cpu::memory::{MIN_MEMORY, PAGE_SIZE};

    #[test]
    fn what_was_copied_is_read_as_it_was_and_a_second_copy_takes_its_place() {
        let ram = GuestRam::new(MIN_MEMORY).expect("an allowed size");
        let number = |page| memory::PageNumber(page);
        let write = |page: u64, byte: u8| {
            let address = vm_memory::GuestAddress(page * PAGE_SIZE);
            ram.memory().write_slice(&[byte; PAGE_BYTES], address).expect("in memory");
        };
        let read = |copied: &mut CopiedPages| {
            let mut page = [0; PAGE_BYTES];
            let mut seen = Vec::new();
            while let Some(number) = copied.next_page(&mut page) {
                assert!(page.iter().all(|byte| *byte == page[0]));
                seen.push((number.0, page[0]));
            }
            seen
        };
        let mut copied = CopiedPages::default();
        write(3, 1);
        write(9, 2);
        copied.copy(&ram, &[number(3), number(7), number(9)]);
        write(3, 5);
        write(7, 5);
        assert_eq!(read(&mut copied), [(3, 1), (7, 0), (9, 2)]);
        copied.copy(&ram, &[number(7)]);
        assert_eq!((copied.len(), read(&mut copied)), (1, vec![(7, 5)]));
    }
}
