//! Disk images: opening, locking, and the threads that execute a disk's requests.
//!
//! The images are shared by the two sides. Which side may write is decided above, by the
//! generation; each write asks the [`Fence`] first. Who else has the image open is told by a
//! lock on it: sides of a pair hold it shared; a new machine takes it exclusively for a moment,
//! so that it never starts on a disk that another machine lives on.
//!
//! A pair's images are opened without the host's cache ([`HostCache::None`]): what a host that freezes has
//! not passed to the storage, it would pass on when it comes back, over what the survivor has written.

mod desk;
mod errors;
mod fence;
mod image;
mod job;
mod order;
mod own;
mod queue;
mod rewrite;
mod watch;

pub use desk::{DiskDesk, DiskNews, DiskPolicy, DiskTrouble, OnError};

pub use fence::{Fence, FenceError, NoFence, Permit};
pub use image::{HostCache, Image, Storage, WriteError, file_system};
pub use own::{OWN_COPY, Overrun, OwnCopy, Tap, TapEnd, TappedWrite};
pub(super) use queue::DiskQueue;
pub(super) use watch::Watch;

use super::Mailbox;
use errors::DiskErrors;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmft_boot_loader::Source;

/// Bytes in a sector, the unit of a disk's capacity.
pub const SECTOR_SIZE: u64 = 512;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskFileError {
    /// The image cannot be opened.
    #[error("opening disk {}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The image is no whole number of sectors, or empty.
    #[error("disk {} has {size} bytes, which is not a positive multiple of {SECTOR_SIZE}", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Its file system cannot leave the host's cache out.
    #[error(
        "disk {} is on {file_system}, which keeps everything in this host's cache (it knows no \
         O_DIRECT): a host that dies or freezes takes writes along that its guest believes in",
        path.display()
    )]
    Cached {
        /// The image.
        path: PathBuf,
        /// The file system's type.
        file_system: String,
    },
    /// Its end cannot be written without the host's cache.
    #[error(
        "disk {} has {size} bytes, and without the host's cache its storage is written in whole \
         units of {unit}",
        path.display()
    )]
    Unit {
        /// The image.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The storage's unit in bytes.
        unit: u64,
    },
    /// Another machine lives on it.
    #[error("disk {} is used by another machine; stop that one first, or use another image", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The host has no threads left.
    #[error("starting the thread of disk {}", path.display())]
    Thread {
        /// The image.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}

/// Makes sure that a guest can have a disk of so many bytes.
fn check_size(path: &Path, size: u64) -> Result<(), DiskFileError> {
    if size > 0 && size.is_multiple_of(SECTOR_SIZE) {
        return Ok(());
    }
    Err(DiskFileError::Size { path: path.to_owned(), size })
}

/// An open disk.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    size: u64,
    read_only: bool,
    policy: DiskPolicy,
}

impl DiskFile {
    /// Opens an image. A `new_machine` makes sure that nobody else uses it. A backup takes its
    /// share only with [`Self::share`], when it has joined: before, it must not keep its primary
    /// from starting.
    ///
    /// # Errors
    /// See [`DiskFileError`]. Nothing on the image changes.
    pub fn open(
        path: &Path,
        read_only: bool,
        cache: HostCache,
        new_machine: bool,
    ) -> Result<Self, DiskFileError> {
        let (image, size) = Image::open(path, read_only, cache)?;
        Self::on(path.to_owned(), Arc::new(image), size, read_only, new_machine)
    }

    /// A disk of `size` bytes on some `storage`, which people know as `name`.
    ///
    /// # Errors
    /// [`DiskFileError::InUse`] if a `new_machine` finds somebody else on it, [`DiskFileError::Size`],
    /// [`DiskFileError::Open`].
    pub fn on(
        name: PathBuf,
        storage: Arc<dyn Storage>,
        size: u64,
        read_only: bool,
        new_machine: bool,
    ) -> Result<Self, DiskFileError> {
        check_size(&name, size)?;
        let disk = Self { path: name, storage, size, read_only, policy: DiskPolicy::default() };
        if new_machine {
            disk.join(!read_only)?;
        }
        Ok(disk)
    }

    /// The same, which deals with storage that fails so.
    #[must_use]
    pub fn with_policy(self, policy: DiskPolicy) -> Self {
        Self { policy, ..self }
    }

    /// How it deals with storage that fails.
    pub fn policy(&self) -> DiskPolicy {
        self.policy
    }

    /// Shares the image with the rest of the pair: from now on no new machine starts on it.
    ///
    /// # Errors
    /// [`DiskFileError::InUse`] if a new machine is just taking it, [`DiskFileError::Open`].
    pub fn share(&self) -> Result<(), DiskFileError> {
        self.join(false)
    }

    fn join(&self, first: bool) -> Result<(), DiskFileError> {
        let path = || self.path.clone();
        let joined = self
            .storage
            .join(first)
            .map_err(|source| DiskFileError::Open { path: path(), source })?;
        if joined { Ok(()) } else { Err(DiskFileError::InUse { path: path() }) }
    }

    /// Capacity in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// True if the guest may not write to it.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Where it is, or what people know it as.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What tells it from a copy, if its storage says that.
    pub fn identity(&self) -> Option<String> {
        self.storage.identity()
    }

    /// Whether this host's cache has a part in it.
    pub fn cache(&self) -> HostCache {
        self.storage.cache()
    }

    /// What a boot loader reads of it, apart from the guest's requests.
    pub fn reader(&self) -> DiskReader {
        let name = self.path.clone();
        DiskReader { name, storage: Arc::clone(&self.storage), size: self.size }
    }

    /// Starts to execute this disk's requests, whose results are left in the mailbox. It ends when the
    /// returned queue is dropped.
    ///
    /// # Errors
    /// [`DiskFileError::Thread`].
    pub(super) fn start(
        &self,
        disk: u8,
        fence: Arc<dyn Fence>,
        mailbox: Arc<Mailbox>,
        desk: Arc<DiskDesk>,
    ) -> Result<DiskQueue, DiskFileError> {
        let storage = Arc::clone(&self.storage);
        let errors = DiskErrors::of(self.path.clone());
        DiskQueue::start(disk, storage, fence, mailbox, errors, self.policy, desk)
            .map_err(|source| DiskFileError::Thread { path: self.path.clone(), source })
    }
}

/// A disk that is only read, by whoever looks for what it boots.
#[derive(Debug, Clone)]
pub struct DiskReader {
    name: PathBuf,
    storage: Arc<dyn Storage>,
    size: u64,
}

impl DiskReader {
    /// What people know the disk as.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Reads the beginning of the disk, to see whether its storage can be reached. May block for as long as
    /// the storage does.
    ///
    /// # Errors
    /// The storage's.
    pub fn look(&self) -> io::Result<()> {
        let len = self.storage.unit().max(SECTOR_SIZE).min(self.size);
        let mut data = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.storage.read(0, &mut data)
    }
}

impl Source for DiskReader {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.storage.read(offset, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        file.as_file().set_len(size).expect("sparse file");
        file
    }

    #[test]
    fn a_disk_another_machine_lives_on_is_refused_and_a_pair_shares_it() {
        let image = image(1 << 20);
        let primary =
            DiskFile::open(image.path(), false, HostCache::WriteBack, true).expect("nobody has it");
        let backup = DiskFile::open(image.path(), false, HostCache::WriteBack, false)
            .expect("anyone may look");
        backup.share().expect("the pair shares it");
        let other = DiskFile::open(image.path(), false, HostCache::WriteBack, true);
        assert!(matches!(other, Err(DiskFileError::InUse { .. })));
        drop(primary);
        let other = DiskFile::open(image.path(), false, HostCache::WriteBack, true);
        assert!(matches!(other, Err(DiskFileError::InUse { .. })));
        drop(backup);
        DiskFile::open(image.path(), false, HostCache::WriteBack, true).expect("free again");
    }

    #[test]
    fn a_backup_that_waits_does_not_keep_its_primary_from_starting() {
        let image = image(1 << 20);
        let backup = DiskFile::open(image.path(), false, HostCache::WriteBack, false)
            .expect("anyone may look");
        let primary =
            DiskFile::open(image.path(), false, HostCache::WriteBack, true).expect("nobody has it");
        backup.share().expect("the pair shares it");
        drop(primary);
    }

    #[test]
    fn a_read_only_disk_may_be_shared_by_anyone() {
        let image = image(1 << 20);
        let first =
            DiskFile::open(image.path(), true, HostCache::WriteBack, true).expect("nobody has it");
        let second =
            DiskFile::open(image.path(), true, HostCache::WriteBack, true).expect("readers share");
        let writer = DiskFile::open(image.path(), false, HostCache::WriteBack, true);
        assert!(matches!(writer, Err(DiskFileError::InUse { .. })));
        drop((first, second));
    }

    #[test]
    fn a_broken_size_is_refused() {
        for size in [0, 511, 513] {
            let image = image(size);
            let error = DiskFile::open(image.path(), false, HostCache::WriteBack, true)
                .expect_err("not whole sectors");
            assert!(matches!(error, DiskFileError::Size { .. }), "{error}");
        }
    }

    #[test]
    fn a_file_system_that_keeps_everything_in_the_cache_is_refused_by_name() {
        // proc(5) knows no O_DIRECT, and this file takes no harm from being opened.
        let path = Path::new("/proc/self/comm");
        let refused = Image::open_direct(path, false).expect("it is there");
        assert!(refused.is_none());
        assert_eq!(image::file_system(path), "proc");
    }
}
