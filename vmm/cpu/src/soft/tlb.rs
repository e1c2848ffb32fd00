//! The software TLB.
//!
//! Entries are filled by page walks and dropped by the guest's own flushes, so that what the
//! TLB holds is a function of the instruction history alone. Beside the architectural
//! translation an entry has *fast tags*: an access whose page equals the tag may go straight to
//! host memory. Fast tags come and go (pages with decoded code, renewed write tracking) without
//! the translation being forgotten, so they are not visible to the guest.
//!
//! Data entries exist once for supervisor and once for user accesses; fetches have their own.

use crate::memory::PAGE_SIZE;

/// The bits of an address above the page offset.
pub(super) const PAGE_MASK: u64 = !(PAGE_SIZE - 1);

/// Data entries of a view.
pub(super) const SLOTS: usize = 1024;
const FETCH_SLOTS: usize = 512;
/// A tag no page has: its low bits are set.
const INVALID: u64 = u64::MAX;

/// Writes are allowed, and the dirty bit is set.
pub(super) const WRITABLE: u64 = 1;
/// Survives a load of CR3.
pub(super) const GLOBAL: u64 = 2;
/// Part of a 2 MiB or 1 GiB page.
pub(super) const LARGE: u64 = 4;

/// Which part of the data entries the fast path looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum View {
    /// Accesses with supervisor rights.
    Supervisor = 0,
    /// Accesses with user rights.
    User = SLOTS,
    /// Nothing is ever there: every access takes the slow path.
    None = 2 * SLOTS,
}

impl View {
    /// The view of the privilege level.
    pub(super) const fn of(user: bool) -> Self {
        if user { Self::User } else { Self::Supervisor }
    }
}

/// One translation of a data page. Compiled code looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(32))]
pub(super) struct Entry {
    /// Linear page that may be read through `addend`; also the tag of the translation.
    pub(super) read: u64,
    /// Linear page that may be written through `addend`.
    pub(super) write: u64,
    /// Host address minus linear address.
    pub(super) addend: u64,
    /// Physical page, with [`WRITABLE`], [`GLOBAL`], [`LARGE`].
    frame: u64,
}

/// What no access finds.
pub(super) const NO_ENTRY: Entry = Entry { read: INVALID, write: INVALID, addend: 0, frame: 0 };

impl Entry {
    /// One for tags alone: what lies at `page` is `addend` away, and may be written as well.
    pub(super) fn beside(page: u64, addend: u64, write: bool) -> Self {
        Self { read: page, write: if write { page } else { INVALID }, addend, frame: 0 }
    }

    /// Physical page.
    pub(super) fn frame(&self) -> u64 {
        self.frame & PAGE_MASK
    }
}

/// One translation of a page of code. Compiled code looks at it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct FetchEntry {
    /// Linear page.
    pub(super) page: u64,
    /// Physical page, with [`GLOBAL`], [`LARGE`].
    pub(super) frame: u64,
}

/// An address shifted right by this, with these bits, is the offset of its entry in its view.
pub(super) const TAG_SHIFT: u8 = 7;
pub(super) const TAG_SLOTS: i32 = 0x7FE0;
/// The same for fetch entries.
pub(super) const FETCH_SHIFT: u8 = 8;
pub(super) const FETCH_SLOTS_MASK: i32 = 0x1FF0;

const _: () = {
    assert!(size_of::<Entry>() == (PAGE_SIZE as usize) >> TAG_SHIFT);
    assert!(TAG_SLOTS as usize == (SLOTS - 1) * size_of::<Entry>());
    assert!(size_of::<FetchEntry>() == (PAGE_SIZE as usize) >> FETCH_SHIFT);
    assert!(FETCH_SLOTS_MASK as usize == (FETCH_SLOTS - 1) * size_of::<FetchEntry>());
};

const NO_FETCH: FetchEntry = FetchEntry { page: INVALID, frame: 0 };

/// What a page walk found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mapping {
    /// Physical page.
    pub(super) frame: u64,
    /// [`WRITABLE`], [`GLOBAL`], [`LARGE`].
    pub(super) flags: u64,
}

/// The linear addresses that large pages were used in, as one range.
#[derive(Debug, Clone, Copy)]
struct LargeRange {
    first: u64,
    last: u64,
}

const NO_RANGE: LargeRange = LargeRange { first: u64::MAX, last: 0 };
/// `INVLPG` drops every piece of a large page in the same gigabyte.
const LARGE_REACH: u64 = !((1 << 30) - 1);

/// The translations the CPU remembers.
#[derive(Debug)]
pub(super) struct Tlb {
    data: Box<[Entry; 4 * SLOTS]>,
    fetch: Box<[FetchEntry; 2 * FETCH_SLOTS]>,
    /// Lower and upper half of the address space.
    large: [LargeRange; 2],
    /// The data slots filled with translations that are not global, since these were last
    /// flushed; incomplete once it is full.
    filled: Vec<u16>,
    /// Flushing more slots than this by name would take longer than flushing all.
    max_filled: usize,
}

fn boxed<T: Copy + std::fmt::Debug, const N: usize>(value: T) -> Box<[T; N]> {
    vec![value; N].into_boxed_slice().try_into().expect("the vector has N elements")
}

fn half(address: u64) -> usize {
    (address >> 63) as usize
}

#[inline(always)]
fn slot_of(view: View, address: u64) -> usize {
    (view as usize + slot_in_view(address)) % (4 * SLOTS)
}

/// The slot of linear page `page` in its view.
#[inline(always)]
pub(super) fn slot_in_view(page: u64) -> usize {
    (page / PAGE_SIZE) as usize % SLOTS
}

fn fetch_slot(user: bool, page: u64) -> usize {
    ((page / PAGE_SIZE) as usize % FETCH_SLOTS) + if user { FETCH_SLOTS } else { 0 }
}

impl Tlb {
    /// An empty TLB, which flushes up to `max_filled` slots by name.
    pub(super) fn new(max_filled: usize) -> Self {
        Self {
            data: boxed(NO_ENTRY),
            fetch: boxed(NO_FETCH),
            large: [NO_RANGE; 2],
            filled: Vec::new(),
            max_filled,
        }
    }

    /// The entry an access to `address` in `view` may use, if its tags say so.
    #[inline(always)]
    pub(super) fn entry(&self, view: View, address: u64) -> &Entry {
        &self.data[slot_of(view, address)]
    }

    /// Where the entries of a view begin that has any.
    pub(super) fn data_of(&self, view: View) -> *const u8 {
        self.data[view as usize..][..SLOTS].as_ptr().cast()
    }

    /// Where the fetch entries of a privilege level begin.
    pub(super) fn fetches_of(&self, user: bool) -> *const u8 {
        self.fetch[if user { FETCH_SLOTS } else { 0 }..][..FETCH_SLOTS].as_ptr().cast()
    }

    fn entry_mut(&mut self, view: View, page: u64) -> &mut Entry {
        &mut self.data[slot_of(view, page)]
    }

    /// The physical page of linear page `page`, if remembered with sufficient rights.
    pub(super) fn lookup(&self, view: View, page: u64, write: bool) -> Option<u64> {
        let entry = self.entry(view, page);
        let sufficient = !write || entry.frame & WRITABLE != 0;
        (entry.read == page && sufficient).then_some(entry.frame & PAGE_MASK)
    }

    /// Remembers a translation to memory at `host`. It can be read from now on; writes need
    /// [`Self::allow_fast_writes`].
    pub(super) fn insert(&mut self, view: View, page: u64, mapping: Mapping, host: u64) {
        *self.entry_mut(view, page) = Entry {
            read: page,
            write: INVALID,
            addend: host.wrapping_sub(page),
            frame: mapping.frame | mapping.flags,
        };
        if mapping.flags & GLOBAL == 0 && self.filled.len() < self.max_filled {
            self.filled.push(slot_of(view, page) as u16);
        }
        self.note_large(page, mapping);
    }

    /// Lets writes to the remembered `page` go straight to memory.
    pub(super) fn allow_fast_writes(&mut self, view: View, page: u64) {
        let entry = self.entry_mut(view, page);
        debug_assert!(entry.read == page && entry.frame & WRITABLE != 0);
        entry.write = page;
    }

    /// Makes every write to physical page `frame` take the slow path.
    pub(super) fn forbid_fast_writes(&mut self, frame: u64) {
        for entry in self.data.iter_mut() {
            if entry.write != INVALID && entry.frame & PAGE_MASK == frame {
                entry.write = INVALID;
            }
        }
    }

    /// Makes every write take the slow path once.
    pub(super) fn forbid_all_fast_writes(&mut self) {
        for entry in self.data.iter_mut() {
            entry.write = INVALID;
        }
    }

    /// The physical page that instructions in linear page `page` come from, if remembered.
    #[inline(always)]
    pub(super) fn fetch(&self, user: bool, page: u64) -> Option<u64> {
        let entry = &self.fetch[fetch_slot(user, page) % (2 * FETCH_SLOTS)];
        (entry.page == page).then_some(entry.frame & PAGE_MASK)
    }

    /// Remembers where instructions come from.
    pub(super) fn insert_fetch(&mut self, user: bool, page: u64, mapping: Mapping) {
        self.fetch[fetch_slot(user, page)] =
            FetchEntry { page, frame: mapping.frame | mapping.flags };
        self.note_large(page, mapping);
    }

    fn note_large(&mut self, page: u64, mapping: Mapping) {
        if mapping.flags & LARGE != 0 {
            let range = &mut self.large[half(page)];
            range.first = range.first.min(page & LARGE_REACH);
            range.last = range.last.max(page | !LARGE_REACH);
        }
    }

    /// Forgets everything.
    pub(super) fn flush(&mut self) {
        self.data.fill(NO_ENTRY);
        self.fetch.fill(NO_FETCH);
        self.large = [NO_RANGE; 2];
        self.filled.clear();
    }

    /// Forgets everything that is not global.
    pub(super) fn flush_non_global(&mut self) {
        if self.filled.len() < self.max_filled {
            for slot in self.filled.drain(..) {
                let entry = &mut self.data[usize::from(slot) % (4 * SLOTS)];
                if entry.frame & GLOBAL == 0 {
                    *entry = NO_ENTRY;
                }
            }
        } else {
            self.filled.clear();
            for entry in self.data.iter_mut().filter(|entry| entry.frame & GLOBAL == 0) {
                *entry = NO_ENTRY;
            }
        }
        for entry in self.fetch.iter_mut() {
            if entry.frame & GLOBAL == 0 {
                *entry = NO_FETCH;
            }
        }
    }

    /// Forgets the page that holds `address`, whatever its size.
    pub(super) fn flush_page(&mut self, address: u64) {
        let page = address & PAGE_MASK;
        for user in [false, true] {
            let entry = self.entry_mut(View::of(user), page);
            if entry.read == page {
                *entry = NO_ENTRY;
            }
            let fetch = &mut self.fetch[fetch_slot(user, page)];
            if fetch.page == page {
                *fetch = NO_FETCH;
            }
        }
        let range = self.large[half(page)];
        if (range.first..=range.last).contains(&page) {
            self.flush_large_pieces(page & LARGE_REACH);
        }
    }

    /// What the guest can notice of what is remembered: pages, with what they lead to.
    #[cfg(test)]
    pub(super) fn contents(&self) -> Vec<(u64, u64)> {
        let data = self.data.iter().map(|entry| (entry.read, entry.frame));
        data.chain(self.fetch.iter().map(|entry| (entry.page, entry.frame))).collect()
    }

    fn flush_large_pieces(&mut self, gigabyte: u64) {
        for entry in self.data.iter_mut() {
            if entry.frame & LARGE != 0 && entry.read & LARGE_REACH == gigabyte {
                *entry = NO_ENTRY;
            }
        }
        for entry in self.fetch.iter_mut() {
            if entry.frame & LARGE != 0 && entry.page & LARGE_REACH == gigabyte {
                *entry = NO_FETCH;
            }
        }
    }
}
