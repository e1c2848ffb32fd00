//! Guest memory, and the record of what was written to it.
//!
//! Every write goes through here or is announced here: device writes through `vm-memory`,
//! whose bitmap hook is [`WriteTracker`]; the engine's own writes through
//! [`WriteTracker::mark_page`]. The record serves two readers: digests (which pages changed
//! since the last one) and the engine's block cache (which decoded pages went stale).

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};

/// Size of a guest page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Where the hole for devices begins: 3 GiB, as on a PC.
pub const DEVICE_HOLE_START: u64 = 0xC000_0000;
/// Where memory beyond the hole goes on: 4 GiB.
pub const DEVICE_HOLE_END: u64 = 0x1_0000_0000;

/// Smallest memory a machine may have.
pub const MIN_MEMORY: u64 = 64 << 20;
/// Largest memory a machine may have.
pub const MAX_MEMORY: u64 = 4 << 30;

/// The `vm-memory` type of guest memory.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<WriteTracker>;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is out of bounds or not a whole number of pages.
    #[error("memory size {size} is not a multiple of 4 KiB between 64 MiB and 4 GiB")]
    Size {
        /// Bytes asked for.
        size: u64,
    },
    /// The host would not give the memory.
    #[error("mapping {size} bytes of guest memory")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// The host's reason.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The pieces do not make an address space.
    #[error("laying out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// A guest page number: physical address divided by [`PAGE_SIZE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNumber(pub u64);

impl PageNumber {
    /// The page that holds `address`.
    pub const fn containing(address: u64) -> Self {
        Self(address / PAGE_SIZE)
    }

    /// The page's first address.
    pub const fn address(self) -> GuestAddress {
        GuestAddress(self.0 * PAGE_SIZE)
    }
}

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

    fn drain(&self) -> Vec<PageNumber> {
        let mut pages = Vec::new();
        for (index, word) in (0u64..).zip(self.0.iter()) {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::Relaxed);
            while bits != 0 {
                pages.push(PageNumber(index * 64 + u64::from(bits.trailing_zeros())));
                bits &= bits - 1;
            }
        }
        pages
    }
}

#[derive(Debug)]
struct Tracked {
    /// Written since the last digest.
    written: PageBits,
    /// Holds decoded instructions.
    code: PageBits,
    /// Holds decoded instructions and was written by a device since the engine last looked.
    stale: PageBits,
    any_stale: AtomicBool,
}

/// The record of written pages; a cheap handle, and `vm-memory`'s bitmap of one region.
#[derive(Debug, Clone)]
pub struct WriteTracker {
    tracked: Arc<Tracked>,
    /// Guest-physical address that offset 0 of this handle stands for.
    base: u64,
}

impl WriteTracker {
    fn new(end_of_memory: u64) -> Self {
        let pages = end_of_memory / PAGE_SIZE;
        Self {
            tracked: Arc::new(Tracked {
                written: PageBits::new(pages),
                code: PageBits::new(pages),
                stale: PageBits::new(pages),
                any_stale: AtomicBool::new(false),
            }),
            base: 0,
        }
    }

    fn at(&self, base: u64) -> Self {
        Self { tracked: Arc::clone(&self.tracked), base }
    }

    /// Records that the engine may write to `page` from now on.
    pub fn mark_page(&self, page: PageNumber) {
        self.tracked.written.set(page.0);
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

    /// Takes the pages written since the last call, in address order. The engine's write
    /// permissions must be dropped at the same point, or later writes go unseen.
    pub fn take_written(&self) -> Vec<PageNumber> {
        self.tracked.written.drain()
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
            self.tracked.written.set(page);
            if self.tracked.code.get(page) {
                self.tracked.stale.set(page);
                self.tracked.any_stale.store(true, Ordering::Relaxed);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.tracked.written.get((self.base + offset as u64) / PAGE_SIZE)
    }

    fn slice_at(&self, offset: usize) -> Self {
        self.at(self.base + offset as u64)
    }
}

/// The guest's memory: one range from 0, split by the device hole when it is larger than 3 GiB.
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    tracker: WriteTracker,
    size: u64,
}

impl GuestRam {
    /// Maps `size` bytes of zeroed guest memory.
    ///
    /// # Errors
    /// [`MemoryError::Size`] outside [`MIN_MEMORY`]..=[`MAX_MEMORY`] or for a broken page,
    /// [`MemoryError::Map`] if the host refuses.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        Self::map(size, None)
    }

    /// Guest memory whose first contents are those of `file`, which must be `size` bytes long and
    /// stay as it is. Pages are copied when the guest writes to them; the file does not change.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn map_private(size: u64, file: File) -> Result<Self, MemoryError> {
        Self::map(size, Some(Arc::new(file)))
    }

    fn map(size: u64, file: Option<Arc<File>>) -> Result<Self, MemoryError> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) || !size.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Size { size });
        }
        let low = size.min(DEVICE_HOLE_START);
        let high = size - low;
        let end = if high > 0 { DEVICE_HOLE_END + high } else { low };
        let tracker = WriteTracker::new(end);
        let mut regions = Vec::new();
        let mut offset = 0;
        for (start, len) in [(0, low), (DEVICE_HOLE_END, high)] {
            if len == 0 {
                continue;
            }
            let map_error = |source| MemoryError::Map { size: len, source };
            let bytes = usize::try_from(len).map_err(|_| MemoryError::Size { size })?;
            let builder = MmapRegionBuilder::new_with_bitmap(bytes, tracker.at(start))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
            let private = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            let builder = match &file {
                None => builder.with_mmap_flags(private | libc::MAP_ANONYMOUS),
                Some(file) => builder
                    .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
                    .with_mmap_flags(private),
            };
            offset += len;
            let region = builder.build().map_err(map_error)?;
            let region = GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or(MemoryError::Size { size })?;
            regions.push(region);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)?;
        Ok(Self { memory, tracker, size })
    }

    /// Bytes of memory the guest has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The `vm-memory` view, for devices and loaders. Writes through it are tracked.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The record of what was written.
    pub fn tracker(&self) -> &WriteTracker {
        &self.tracker
    }

    /// The ranges of guest-physical addresses that are memory: start and length in bytes,
    /// in address order.
    pub fn ranges(&self) -> Vec<(GuestAddress, u64)> {
        self.memory.iter().map(|region| (region.start_addr(), region.len())).collect()
    }

    /// Where the memory is in this process: host address ranges, for whoever measures what a
    /// process costs beyond its guest.
    pub fn host_ranges(&self) -> Vec<std::ops::Range<usize>> {
        let range = |region: &GuestRegionMmap<WriteTracker>| {
            let start = region.as_ptr().addr();
            start..start + region.size()
        };
        self.memory.iter().map(range).collect()
    }

    /// Where `address` lies when the ranges are written one after the other; `None` if it is not
    /// memory.
    pub fn file_offset(&self, address: u64) -> Option<u64> {
        let mut offset = 0;
        for (GuestAddress(start), len) in self.ranges() {
            if (start..start + len).contains(&address) {
                return Some(offset + address - start);
            }
            offset += len;
        }
        None
    }

    /// True if the whole page is memory.
    pub fn has_page(&self, page: PageNumber) -> bool {
        self.file_offset(page.address().raw_value()).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn a_device_write_is_recorded_and_makes_decoded_pages_stale() {
        let ram = GuestRam::new(MIN_MEMORY).expect("64 MiB is allowed");
        ram.tracker().mark_code(PageNumber(3));
        ram.memory().write_slice(&[1; 8192], GuestAddress(0x2800)).expect("in range");
        let written: Vec<u64> = ram.tracker().take_written().iter().map(|page| page.0).collect();
        assert_eq!(written, [2, 3, 4]);
        assert_eq!(ram.tracker().take_stale_code(), [PageNumber(3)]);
        assert!(ram.tracker().take_stale_code().is_empty());
    }

    #[test]
    fn memory_beyond_three_gigabytes_goes_on_above_the_hole() {
        let ram = GuestRam::new(MAX_MEMORY).expect("4 GiB is allowed");
        assert_eq!(
            ram.ranges(),
            [
                (GuestAddress(0), DEVICE_HOLE_START),
                (GuestAddress(DEVICE_HOLE_END), MAX_MEMORY - DEVICE_HOLE_START)
            ]
        );
        ram.memory().write_obj(7u8, GuestAddress(DEVICE_HOLE_END + 5)).expect("in range");
        assert_eq!(ram.tracker().take_written(), [PageNumber(DEVICE_HOLE_END / PAGE_SIZE)]);
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for size in [0, MIN_MEMORY - PAGE_SIZE, MIN_MEMORY + 1, MAX_MEMORY + PAGE_SIZE] {
            assert!(matches!(GuestRam::new(size), Err(MemoryError::Size { .. })));
        }
    }
}
