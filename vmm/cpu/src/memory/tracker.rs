//! The record of written pages, for several readers.
//!
//! ```text
//!  engine, devices ──mark──▶ recent ──whoever reads first──▶ undigested (digests)
//!                                                        └─▶ a view each (checkpoints)
//! ```
//! Writers set one bit, however many read. A reader first shares what is recent out among all, so
//! that none misses what another has taken. Whether the engine announces every later write again is
//! the engine's: see [`crate::Engine::renew_write_tracking`].

use super::{PAGE_SIZE, PageNumber};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vmft_threads::{Mutex, MutexGuard};

#[derive(Debug)]
struct PageBits(Box<[AtomicU64]>);

impl PageBits {
    fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, page: u64) -> Option<(&AtomicU64, u64)> {
        let index = usize::try_from(page / 64).ok()?;
        self.0.get(index).map(|word| (word, 1 << (page % 64)))
    }

    fn get(&self, page: u64) -> bool {
        self.word(page).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Sets the bit; true if it was clear.
    fn set(&self, page: u64) -> bool {
        self.word(page).is_some_and(|(word, bit)| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }

    fn clear(&self, page: u64) {
        if let Some((word, bit)) = self.word(page) {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// Takes the words that have bits, with their places.
    fn take_words(&self) -> impl Iterator<Item = (usize, u64)> {
        self.0.iter().enumerate().filter_map(|(index, word)| {
            let some = word.load(Ordering::Relaxed) != 0;
            some.then(|| (index, word.swap(0, Ordering::Relaxed)))
        })
    }

    fn add_word(&self, index: usize, bits: u64) {
        self.0[index].fetch_or(bits, Ordering::Relaxed);
    }

    fn drain(&self) -> Vec<PageNumber> {
        let mut pages = Vec::new();
        for (index, mut bits) in self.take_words() {
            while bits != 0 {
                pages.push(PageNumber(index as u64 * 64 + u64::from(bits.trailing_zeros())));
                bits &= bits - 1;
            }
        }
        pages
    }
}

#[derive(Debug)]
struct Tracked {
    /// Written since anyone last looked.
    recent: PageBits,
    /// Written since the last digest, without what is recent.
    undigested: PageBits,
    /// The same for each view that lives.
    views: Mutex<Vec<Weak<PageBits>>>,
    /// Holds decoded instructions.
    code: PageBits,
    /// Holds decoded instructions and was written by a device since the engine last looked.
    stale: PageBits,
    any_stale: AtomicBool,
    pages: u64,
}

impl Tracked {
    fn views(&self) -> MutexGuard<'_, Vec<Weak<PageBits>>> {
        self.views.lock()
    }

    /// Shares what is recent out among all readers.
    fn share_out(&self) {
        let mut views = self.views();
        views.retain(|view| view.strong_count() > 0);
        let readers: Vec<Arc<PageBits>> = views.iter().filter_map(Weak::upgrade).collect();
        for (index, bits) in self.recent.take_words() {
            self.undigested.add_word(index, bits);
            for reader in &readers {
                reader.add_word(index, bits);
            }
        }
    }
}

/// The record of written pages; a cheap handle, and `vm-memory`'s bitmap of one region.
#[derive(Debug, Clone)]
pub struct WriteTracker {
    tracked: Arc<Tracked>,
    /// Guest-physical address that offset 0 of this handle stands for.
    base: u64,
}

impl WriteTracker {
    pub(super) fn new(end_of_memory: u64) -> Self {
        let pages = end_of_memory / PAGE_SIZE;
        Self {
            tracked: Arc::new(Tracked {
                recent: PageBits::new(pages),
                undigested: PageBits::new(pages),
                views: Mutex::default(),
                code: PageBits::new(pages),
                stale: PageBits::new(pages),
                any_stale: AtomicBool::new(false),
                pages,
            }),
            base: 0,
        }
    }

    pub(super) fn at(&self, base: u64) -> Self {
        Self { tracked: Arc::clone(&self.tracked), base }
    }

    /// Records that the engine may write to `page` from now on.
    pub fn mark_page(&self, page: PageNumber) {
        self.tracked.recent.set(page.0);
    }

    /// Records that `page` holds decoded instructions.
    pub fn mark_code(&self, page: PageNumber) {
        self.tracked.code.set(page.0);
    }

    /// Forgets that `page` holds decoded instructions.
    pub fn clear_code(&self, page: PageNumber) {
        self.tracked.code.clear(page.0);
    }

    /// True if `page` holds decoded instructions.
    pub fn is_code(&self, page: PageNumber) -> bool {
        self.tracked.code.get(page.0)
    }

    /// Takes the pages written since the last call, in address order: the view of digests. The
    /// engine's write permissions must be dropped at the same point, or later writes go unseen.
    pub fn take_written(&self) -> Vec<PageNumber> {
        self.tracked.share_out();
        self.tracked.undigested.drain()
    }

    /// Another view, which begins here: pages written from the next renewal of the engine's write
    /// tracking on are in it, whoever else takes them.
    pub fn view(&self) -> WriteView {
        self.tracked.share_out();
        let bits = Arc::new(PageBits::new(self.tracked.pages));
        self.tracked.views().push(Arc::downgrade(&bits));
        WriteView { tracked: Arc::clone(&self.tracked), bits }
    }

    /// Takes the decoded pages that devices wrote since the last call, in address order.
    pub fn take_stale_code(&self) -> Vec<PageNumber> {
        if self.tracked.any_stale.swap(false, Ordering::Relaxed) {
            self.tracked.stale.drain()
        } else {
            Vec::new()
        }
    }
}

/// One reader's view of the pages written; it ends when this is dropped.
#[derive(Debug)]
pub struct WriteView {
    tracked: Arc<Tracked>,
    bits: Arc<PageBits>,
}

impl WriteView {
    /// Takes the pages written since the last call, in address order. As with
    /// [`WriteTracker::take_written`], the engine must record later writes anew: see
    /// [`crate::machine::Machine::take_written`], which does both.
    pub fn take(&self) -> Vec<PageNumber> {
        self.tracked.share_out();
        self.bits.drain()
    }

    /// Puts pages back that were taken and came to nothing.
    pub fn put_back(&self, pages: &[PageNumber]) {
        for page in pages {
            self.bits.set(page.0);
        }
    }
}

impl<'a> WithBitmapSlice<'a> for WriteTracker {
    type S = Self;
}

impl BitmapSlice for WriteTracker {}

impl Bitmap for WriteTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let start = self.base + offset as u64;
        for page in start / PAGE_SIZE..=(start + len as u64 - 1) / PAGE_SIZE {
            self.tracked.recent.set(page);
            if self.tracked.code.get(page) {
                self.tracked.stale.set(page);
                self.tracked.any_stale.store(true, Ordering::Relaxed);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = (self.base + offset as u64) / PAGE_SIZE;
        self.tracked.recent.get(page) || self.tracked.undigested.get(page)
    }

    fn slice_at(&self, offset: usize) -> Self {
        self.at(self.base + offset as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(pages: &[PageNumber]) -> Vec<u64> {
        pages.iter().map(|page| page.0).collect()
    }

    #[test]
    fn every_view_sees_every_page_written_since_it_last_looked() {
        let tracker = WriteTracker::new(1 << 30);
        tracker.mark_page(PageNumber(1));
        let (first, second) = (tracker.view(), tracker.view());
        tracker.mark_page(PageNumber(2));
        assert_eq!(numbers(&first.take()), [2], "page 1 was written before");
        tracker.mark_page(PageNumber(70));
        assert_eq!(numbers(&tracker.take_written()), [1, 2, 70]);
        assert_eq!(numbers(&second.take()), [2, 70], "whatever others have taken");
        assert_eq!(numbers(&first.take()), [70]);
        assert!(first.take().is_empty() && tracker.take_written().is_empty());
    }

    #[test]
    fn a_view_that_is_gone_costs_nothing_more() {
        let tracker = WriteTracker::new(1 << 30);
        drop(tracker.view());
        let view = tracker.view();
        tracker.mark_page(PageNumber(9));
        assert_eq!(numbers(&view.take()), [9]);
        assert_eq!(tracker.tracked.views().len(), 1);
    }
}
