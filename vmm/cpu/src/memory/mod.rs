//! Guest memory, and the record of what was written to it.
//!
//! Every write goes through here or is announced here: device writes through `vm-memory`,
//! whose bitmap hook is [`WriteTracker`]; the engine's own writes through
//! [`WriteTracker::mark_page`]. The record serves several readers, each with a view of its own:
//! digests (which pages changed since the last one), checkpoints (which pages changed since a
//! round), and the engine's block cache (which decoded pages went stale).

mod clear;
mod tracker;

pub use tracker::{WriteTracker, WriteView};

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ptr::NonNull;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
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
    /// The file with its contents cannot be read.
    #[error("reading guest memory")]
    Load(#[source] io::Error),
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

/// The guest's memory: one range from 0, split by the device hole when it is larger than 3 GiB.
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    tracker: WriteTracker,
    size: u64,
}

impl GuestRam {
    /// Guest memory with the contents of `file`, which must be `size` bytes long. Holes stay zero
    /// and cost nothing; all else counts as written.
    ///
    /// # Errors
    /// As [`Self::new`], and [`MemoryError::Load`] if the file cannot be read to its end.
    pub fn load(size: u64, file: &mut File) -> Result<Self, MemoryError> {
        let ram = Self::new(size)?;
        let mut offset = 0;
        for (start, len) in ram.ranges() {
            ram.load_range(file, offset, start, len).map_err(MemoryError::Load)?;
            offset += len;
        }
        Ok(ram)
    }

    /// Reads what `file` has from `offset` on, up to `len` bytes, into the memory at `start`.
    fn load_range(
        &self,
        file: &mut File,
        offset: u64,
        start: GuestAddress,
        len: u64,
    ) -> io::Result<()> {
        let mut at = offset;
        while let Some((data, hole)) =
            next_extent(file, at)?.filter(|(data, _)| *data < offset + len)
        {
            let end = hole.min(offset + len);
            file.seek(SeekFrom::Start(data))?;
            let bytes = usize::try_from(end - data).map_err(io::Error::other)?;
            self.memory
                .read_exact_volatile_from(start.unchecked_add(data - offset), file, bytes)
                .map_err(io::Error::other)?;
            at = end;
        }
        Ok(())
    }

    /// Maps `size` bytes of zeroed guest memory.
    ///
    /// # Errors
    /// [`MemoryError::Size`] outside [`MIN_MEMORY`]..=[`MAX_MEMORY`] or for a broken page,
    /// [`MemoryError::Map`] if the host refuses.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) || !size.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Size { size });
        }
        let low = size.min(DEVICE_HOLE_START);
        let high = size - low;
        let end = if high > 0 { DEVICE_HOLE_END + high } else { low };
        let tracker = WriteTracker::new(end);
        let mut regions = Vec::new();
        for (start, len) in [(0, low), (DEVICE_HOLE_END, high)] {
            if len == 0 {
                continue;
            }
            let map_error = |source| MemoryError::Map { size: len, source };
            let bytes = usize::try_from(len).map_err(|_| MemoryError::Size { size })?;
            let region = MmapRegionBuilder::new_with_bitmap(bytes, tracker.at(start))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_ANONYMOUS)
                .build()
                .map_err(map_error)?;
            advise_huge_pages(&region);
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

/// Asks the host for huge pages: a guest that walks about its memory misses the host's TLB less
/// often. A host that has none goes on with small ones.
fn advise_huge_pages(region: &MmapRegion<WriteTracker>) {
    if let Some(start) = NonNull::new(region.as_ptr().cast()) {
        // SAFETY: the range is the region's own mapping; the advice changes neither contents nor
        // protection.
        let advised = unsafe { madvise(start, region.size(), MmapAdvise::MADV_HUGEPAGE) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no huge pages for guest memory");
        }
    }
}

/// The next stretch of `file` from `at` on that is no hole: where it begins and ends.
fn next_extent(file: &File, at: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).map_err(io::Error::other)?;
        match lseek(file, from, whence) {
            Ok(found) => u64::try_from(found).map(Some).map_err(io::Error::other),
            // Nothing but a hole up to the file's end.
            Err(Errno::ENXIO) => Ok(None),
            Err(error) => Err(io::Error::from(error)),
        }
    };
    let Some(data) = seek(at, Whence::SeekData)? else { return Ok(None) };
    Ok(seek(data, Whence::SeekHole)?.map(|hole| (data, hole)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn memory_is_loaded_around_the_holes_of_a_file_and_counts_as_written() {
        let mut file = tempfile::tempfile().expect("temporary file");
        file.set_len(MAX_MEMORY).expect("sparse");
        // One in the low range, one on its edge, one at the end of the high range.
        let places = [PAGE_SIZE * 7 + 3, DEVICE_HOLE_START - 2, MAX_MEMORY - 4];
        for at in places {
            file.write_all_at(&[1, 2, 3, 4], at).expect("written");
        }
        let ram = GuestRam::load(MAX_MEMORY, &mut file).expect("loaded");
        let read = |address| ram.memory().read_obj::<[u8; 2]>(GuestAddress(address));
        assert_eq!(read(PAGE_SIZE * 7 + 5).expect("memory"), [3, 4]);
        assert_eq!(read(DEVICE_HOLE_START - 2).expect("memory"), [1, 2]);
        assert_eq!(read(DEVICE_HOLE_END).expect("memory"), [3, 4]);
        let high_end = DEVICE_HOLE_END + MAX_MEMORY - DEVICE_HOLE_START;
        assert_eq!(read(high_end - 2).expect("memory"), [3, 4]);
        assert_eq!(read(PAGE_SIZE).expect("memory"), [0, 0]);
        let written = ram.tracker().take_written();
        for at in
            [PAGE_SIZE * 7, DEVICE_HOLE_START - PAGE_SIZE, DEVICE_HOLE_END, high_end - PAGE_SIZE]
        {
            assert!(written.contains(&PageNumber::containing(at)), "{at:#x}");
        }
        assert!(written.len() < 100, "holes cost nothing: {}", written.len());
    }

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
