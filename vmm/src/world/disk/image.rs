//! A disk image as storage: through the host's cache, or past it.
//!
//! Past the cache (`O_DIRECT`) the host passes each transfer to the storage as it is, and so asks for whole
//! units, at whole units, from memory that is aligned. Where a request is not, it goes through a buffer that
//! is; part of a unit is written by reading the unit first, which is safe because no other request on the same
//! unit is under way then ([`super::order`]).

use super::{DiskFileError, Permit, check_size};
use crate::world::try_join_file;
use std::cell::RefCell;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Whether a host may keep a disk's data in its cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostCache {
    /// Writes go to the storage before they are completed. What a pair needs.
    None,
    /// Writes are completed when they are in the host's page cache, which is lost with the host, and which
    /// a host that comes back after its guest has moved on still writes out.
    WriteBack,
}

impl fmt::Display for HostCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::WriteBack => "writeback",
        })
    }
}

/// Why a write was not done.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The storage knows of a later generation than the permit's.
    #[error("a later generation has been won")]
    Fenced,
    /// The storage's reason.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a disk's jobs are done with. Everything here may block.
pub trait Storage: fmt::Debug + Send + Sync {
    /// The unit, in bytes, of which a part cannot be written alone.
    fn unit(&self) -> u64;

    /// Whether this host's cache has a part in it.
    fn cache(&self) -> HostCache;

    /// What tells it from a copy, where the storage itself says that; the same whoever asks.
    fn identity(&self) -> Option<String>;

    /// Shares the storage with the rest of a pair for as long as this lives; the `first` makes sure
    /// that nobody else has it. False if somebody is in the way.
    ///
    /// # Errors
    /// The host's, or the storage's.
    fn join(&self, first: bool) -> io::Result<bool>;

    /// Fills `data` from `offset` on.
    ///
    /// # Errors
    /// The storage's.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// [`WriteError`]
    fn write(&self, permit: Permit, offset: u64, data: &[u8]) -> Result<(), WriteError>;

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// The storage's.
    fn flush(&self) -> io::Result<()>;

    /// True if another flush, after one that has failed for this reason, is about the same writes. A host
    /// takes pages of its cache for written when writing them has failed (fsync(2), NOTES): the next flush
    /// succeeds, and they are lost.
    fn repeats_flush(&self, _: &io::Error) -> bool;

    /// True if the storage itself refuses what is written in a generation that is over, however late that
    /// arrives.
    fn fences(&self) -> bool;
}

/// What the host asks of transfers past its cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses in memory.
    memory: usize,
    /// Of offsets and lengths.
    offset: u64,
}

/// Alignment of memory where the host does not say: a page satisfies every device.
const PAGE: usize = 4096;
/// Units tried where the host does not say.
const UNITS: [u64; 4] = [512, 4096, 16384, 65536];

/// Bytes of zeroes written at a time where the file system knows no better way.
const ZEROES_AT_ONCE: u64 = 1 << 20;

/// An open image in a file, or on a block device.
#[derive(Debug)]
pub struct Image {
    file: File,
    /// Past the cache.
    direct: Option<Alignment>,
}

impl Image {
    /// Opens an image whose size can be used, and says the size in bytes.
    ///
    /// # Errors
    /// See [`DiskFileError`]. Nothing on the image changes.
    pub fn open(
        path: &Path,
        read_only: bool,
        cache: HostCache,
    ) -> Result<(Self, u64), DiskFileError> {
        let open_error = |source| DiskFileError::Open { path: path.to_owned(), source };
        let direct = match cache {
            HostCache::None => Self::open_direct(path, read_only).map_err(open_error)?,
            HostCache::WriteBack => None,
        };
        let has_direct = direct.is_some();
        let image = match direct {
            Some(image) => image,
            None => Self::open_cached(path, read_only).map_err(open_error)?,
        };
        // A block device has no length but an end.
        let size = image.file().seek(SeekFrom::End(0)).map_err(open_error)?;
        check_size(path, size)?;
        // What is only read is lost with no host.
        if cache == HostCache::None && !has_direct && !read_only {
            let file_system = file_system(path);
            return Err(DiskFileError::Cached { path: path.to_owned(), file_system });
        }
        let unit = image.unit();
        if !size.is_multiple_of(unit) {
            return Err(DiskFileError::Unit { path: path.to_owned(), size, unit });
        }
        Ok((image, size))
    }

    /// Opens an image with the host's cache.
    fn open_cached(path: &Path, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        Ok(Self { file, direct: None })
    }

    /// Opens it without; `None` if its file system cannot do that.
    pub(super) fn open_direct(path: &Path, read_only: bool) -> io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).custom_flags(libc::O_DIRECT);
        let file = match options.open(path) {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(error) => return Err(error),
        };
        let direct = match told_alignment(&file) {
            Some(told) => told,
            None => probed_alignment(&file)?,
        };
        Ok(direct.map(|alignment| Self { file, direct: Some(alignment) }))
    }

    /// The file.
    fn file(&self) -> &File {
        &self.file
    }

    /// Writes all of `data` at `offset`, whoever it is for.
    ///
    /// # Errors
    /// The host's.
    pub fn put(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let Some(direct) = self.direct.filter(|direct| !direct.suits(offset, data)) else {
            return self.file.write_all_at(data, offset);
        };
        let (start, len) = direct.whole(offset, data.len());
        with_bounce(len, direct.memory, |units| {
            if len != data.len() {
                self.file.read_exact_at(units, start)?;
            }
            let skip = (offset - start) as usize;
            units[skip..skip + data.len()].copy_from_slice(data);
            self.file.write_all_at(units, start)
        })
    }

    /// The first place from `offset` on that is no hole; `None` if all is one. Where the file system does not
    /// say, everything is data (lseek(2), SEEK_DATA).
    ///
    /// # Errors
    /// The host's.
    pub fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        match nix::unistd::lseek(&self.file, offset, nix::unistd::Whence::SeekData) {
            Ok(at) => u64::try_from(at).map(Some).map_err(io::Error::other),
            Err(nix::errno::Errno::ENXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Zeroes `len` bytes from `offset` on; where `keep` is false, by giving their room back if the
    /// file system can do that.
    ///
    /// # Errors
    /// The host's.
    pub fn zero(&self, offset: u64, len: u64, keep: bool) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let how = if keep {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        } else {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        };
        let signed = |number: u64| i64::try_from(number).map_err(io::Error::other);
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, how, signed(offset)?, signed(len)?) {
            Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENODEV) => {}
            other => return Ok(other?),
        }
        let zeroes = vec![0; usize::try_from(len.min(ZEROES_AT_ONCE)).expect("small")];
        let mut done = 0;
        while done < len {
            let piece = usize::try_from((len - done).min(ZEROES_AT_ONCE)).expect("small");
            self.put(offset + done, &zeroes[..piece])?;
            done += piece as u64;
        }
        Ok(())
    }
}

impl Alignment {
    fn suits(self, offset: u64, data: &[u8]) -> bool {
        let lengths = offset | data.len() as u64;
        lengths.is_multiple_of(self.offset) && data.as_ptr().align_offset(self.memory) == 0
    }

    /// The whole units that hold `len` bytes from `offset` on: where they begin, and how long they are.
    fn whole(self, offset: u64, len: usize) -> (u64, usize) {
        let start = offset / self.offset * self.offset;
        let end = (offset + len as u64).div_ceil(self.offset) * self.offset;
        (start, usize::try_from(end - start).expect("requests are far below a gigabyte"))
    }
}

thread_local! {
    /// Kept from request to request: a fresh one would be paid for page by page.
    static BOUNCE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Lends `use_it` aligned memory, of whatever content.
fn with_bounce<T>(len: usize, align: usize, use_it: impl FnOnce(&mut [u8]) -> T) -> T {
    BOUNCE.with_borrow_mut(|buffer| {
        if buffer.len() < len + align {
            buffer.resize(len + align, 0);
        }
        let start = buffer.as_ptr().align_offset(align);
        use_it(&mut buffer[start..start + len])
    })
}

impl Storage for Image {
    fn unit(&self) -> u64 {
        self.direct.map_or(1, |direct| direct.offset)
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let Some(direct) = self.direct.filter(|direct| !direct.suits(offset, data)) else {
            return self.file.read_exact_at(data, offset);
        };
        let (start, len) = direct.whole(offset, data.len());
        with_bounce(len, direct.memory, |units| {
            self.file.read_exact_at(units, start)?;
            let skip = (offset - start) as usize;
            data.copy_from_slice(&units[skip..skip + data.len()]);
            Ok(())
        })
    }

    fn cache(&self) -> HostCache {
        if self.direct.is_some() { HostCache::None } else { HostCache::WriteBack }
    }

    fn identity(&self) -> Option<String> {
        None
    }

    fn join(&self, first: bool) -> io::Result<bool> {
        try_join_file(&self.file, first)
    }

    fn write(&self, _: Permit, offset: u64, data: &[u8]) -> Result<(), WriteError> {
        Ok(self.put(offset, data)?)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn repeats_flush(&self, _: &io::Error) -> bool {
        self.cache() == HostCache::None
    }

    fn fences(&self) -> bool {
        false
    }
}

/// What the host says of transfers past its cache: `None` if it says nothing, `Some(None)` if it cannot do
/// them (`statx(2)`, `STATX_DIOALIGN`, Linux 6.1).
fn told_alignment(file: &File) -> Option<Option<Alignment>> {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the file is open, the path is an empty C string, and `stat` is a structure to be filled.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    if result != 0 || stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    let memory =
        usize::try_from(stat.stx_dio_mem_align).ok().filter(|align| align.is_power_of_two());
    let offset = u64::from(stat.stx_dio_offset_align);
    Some(memory.filter(|_| offset > 0).map(|memory| Alignment { memory, offset }))
}

/// The smallest unit that can be read past the cache, by trying.
fn probed_alignment(file: &File) -> io::Result<Option<Alignment>> {
    for unit in UNITS {
        let len = usize::try_from(unit).expect("small");
        // Behind the first unit, so that the offset is tried as well; at the end nothing is read.
        match with_bounce(len, PAGE.max(len), |data| file.read_at(data, unit)) {
            Ok(_) => return Ok(Some(Alignment { memory: PAGE, offset: unit })),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// The type of the file system that a file is on, for people.
pub fn file_system(path: &Path) -> String {
    let name = || -> Option<String> {
        let path = path.canonicalize().ok()?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mount = |line: &str| {
            // proc_pid_mountinfo(5): the fifth field is the mount point; the type follows a hyphen.
            let (mount, rest) = line.split_once(" - ")?;
            let point = mount.split(' ').nth(4)?.to_owned();
            let kind = rest.split(' ').next()?.to_owned();
            path.starts_with(&point).then_some((point.len(), kind))
        };
        mounts.lines().filter_map(mount).max_by_key(|(len, _)| *len).map(|(_, kind)| kind)
    };
    name().unwrap_or_else(|| "a file system".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(direct: Option<Alignment>) -> Image {
        let file = tempfile::tempfile().expect("temporary file");
        file.write_all_at(&[0xEE; 32768], 0).expect("written");
        Image { file, direct }
    }

    /// As a device with sectors of 4096 bytes asks for; the file underneath takes anything.
    const LARGE: Alignment = Alignment { memory: PAGE, offset: 4096 };

    #[test]
    fn part_of_a_unit_leaves_the_rest_of_it_alone() {
        let image = image(Some(LARGE));
        for (offset, len) in [(512, 512), (4096, 4096), (8192 - 512, 1024), (16384, 8192 + 512)] {
            image.put(offset, &vec![0x11; len]).expect("written");
            let mut back = vec![0; len + 1024];
            image.read(offset - 512, &mut back).expect("read");
            let expected = [&[0xEE; 512][..], &vec![0x11; len], &[0xEE; 512]].concat();
            assert_eq!(back, expected, "{len} bytes at {offset}");
            image.put(offset, &vec![0xEE; len]).expect("written");
        }
    }

    #[test]
    fn only_whole_aligned_transfers_reach_a_file_past_the_cache() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("image");
        std::fs::write(&path, vec![0xEE; 1 << 20]).expect("written");
        let Some(image) = Image::open_direct(&path, false).expect("opened") else {
            // A file system without it is told by its name, which is another test's.
            return;
        };
        assert_eq!(image.cache(), HostCache::None);
        let data: Vec<u8> = (0..12_288u32).map(|number| number as u8).collect();
        for (skip, len) in [(0, 4096), (1, 512), (3, 8192), (8, 1024)] {
            let part = &data[skip..skip + len];
            image.put(4096 + 512, part).expect("whatever the buffer's address is");
            let mut back = vec![0; len + 1];
            image.read(4096 + 512, &mut back[1..]).expect("read");
            assert_eq!(&back[1..], part);
        }
        image.flush().expect("flushed");
    }

    #[test]
    fn a_file_system_has_a_name() {
        assert_eq!(file_system(Path::new("/proc/self/status")), "proc");
    }
}
