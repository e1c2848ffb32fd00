//! Disk images: opening, locking, and a thread a disk that executes requests.
//!
//! The images are shared by the two sides. Which side may write is decided above, by the
//! generation; each write asks the [`Fence`] first. Who else has the image open is told by a
//! lock on it: sides of a pair hold it shared; a new machine takes it exclusively for a moment,
//! so that it never starts on a disk that another machine lives on.

use super::disk_errors::DiskErrors;
use super::{Mailbox, try_join_file};
use crate::board::DiskOperation;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use vmft_logging_channel::entry::{Arrival, RequestId};

/// Bytes in a sector, the unit of a disk's capacity.
pub const SECTOR_SIZE: u64 = 512;

/// virtio-blk status bytes.
const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;

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

/// An open disk image.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    file: Arc<File>,
    size: u64,
    read_only: bool,
}

impl DiskFile {
    /// Opens an image. A `new_machine` makes sure that nobody else uses it. A backup takes its
    /// share only with [`Self::share`], when it has joined: before, it must not keep its primary
    /// from starting.
    ///
    /// # Errors
    /// See [`DiskFileError`]. Nothing on the image changes.
    pub fn open(path: &Path, read_only: bool, new_machine: bool) -> Result<Self, DiskFileError> {
        let open_error = |source| DiskFileError::Open { path: path.to_owned(), source };
        let file =
            OpenOptions::new().read(true).write(!read_only).open(path).map_err(open_error)?;
        // A block device has no length but an end.
        let size = (&file).seek(SeekFrom::End(0)).map_err(open_error)?;
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(DiskFileError::Size { path: path.to_owned(), size });
        }
        let disk = Self { path: path.to_owned(), file: Arc::new(file), size, read_only };
        if new_machine {
            disk.join(!read_only)?;
        }
        Ok(disk)
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
        let joined = try_join_file(&self.file, first)
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

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Starts the thread that executes this disk's requests in order and leaves their results in
    /// the mailbox. It ends when the returned sender is dropped.
    ///
    /// # Errors
    /// [`DiskFileError::Thread`].
    pub(super) fn start(
        &self,
        disk: u8,
        fence: Arc<dyn Fence>,
        mailbox: Arc<Mailbox>,
    ) -> Result<Sender<DiskJob>, DiskFileError> {
        let (sender, receiver) = channel();
        let (file, errors) = (Arc::clone(&self.file), DiskErrors::of(self.path.clone()));
        let worker = Worker { disk, file, fence, mailbox, errors };
        std::thread::Builder::new()
            .name(format!("disk{disk}"))
            .spawn(move || worker.run(&receiver))
            .map_err(|source| DiskFileError::Thread { path: self.path.clone(), source })?;
        Ok(sender)
    }
}

/// This side's generation is over: it may not write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this side's generation is over")]
pub struct FenceError;

/// Asked before each write: is this side's generation still the last?
pub trait Fence: fmt::Debug + Send + Sync {
    /// # Errors
    /// [`FenceError`] if another side has won a later generation. The fence itself makes sure
    /// that this side halts.
    fn check(&self) -> Result<(), FenceError>;
}

/// The fence of a machine that is nobody's pair.
#[derive(Debug, Clone, Copy)]
pub struct NoFence;

impl Fence for NoFence {
    fn check(&self) -> Result<(), FenceError> {
        Ok(())
    }
}

/// What a disk's thread does, in order.
#[derive(Debug)]
pub(super) enum DiskJob {
    /// Executes a request.
    Request(RequestId, DiskOperation),
    /// Says that everything before it is done.
    Drain(Sender<()>),
}

/// What a request does, for messages, and where.
fn describe(operation: &DiskOperation) -> (&'static str, impl Fn() -> String + use<>) {
    let (what, len, offset) = match operation {
        DiskOperation::Read { offset, len } => ("reading", u64::from(*len), *offset),
        DiskOperation::Write { offset, data } => ("writing", data.len() as u64, *offset),
        DiskOperation::Flush => ("making durable", 0, 0),
    };
    let place = move || match len {
        0 => "what was written".to_owned(),
        _ => format!("{len} bytes at byte {offset}"),
    };
    (what, place)
}

#[derive(Debug)]
struct Worker {
    disk: u8,
    file: Arc<File>,
    fence: Arc<dyn Fence>,
    mailbox: Arc<Mailbox>,
    errors: DiskErrors,
}

impl Worker {
    fn run(&self, jobs: &Receiver<DiskJob>) {
        while let Ok(job) = jobs.recv() {
            let (request, operation) = match job {
                DiskJob::Request(request, operation) => (request, operation),
                DiskJob::Drain(done) => {
                    // Whoever asked may have gone; nothing is owed to it then.
                    let _ = done.send(());
                    continue;
                }
            };
            let writes = !matches!(operation, DiskOperation::Read { .. });
            if writes && self.fence.check().is_err() {
                // A request that is never answered: this side is halting.
                continue;
            }
            let (what, place) = describe(&operation);
            let (status, data) = match self.execute(operation) {
                Ok(data) => (STATUS_OK, data),
                Err(error) => {
                    self.errors.say(what, &place(), &error);
                    (STATUS_IO_ERROR, Vec::new())
                }
            };
            let disk = self.disk;
            self.mailbox.push(Arrival::DiskCompletion { disk, request, status, data });
        }
    }

    fn execute(&self, operation: DiskOperation) -> io::Result<Vec<u8>> {
        match operation {
            DiskOperation::Read { offset, len } => {
                let len = usize::try_from(len).map_err(io::Error::other)?;
                let mut data = vec![0; len];
                self.file.read_exact_at(&mut data, offset)?;
                Ok(data)
            }
            DiskOperation::Write { offset, data } => {
                self.file.write_all_at(&data, offset)?;
                Ok(Vec::new())
            }
            DiskOperation::Flush => {
                self.file.sync_data()?;
                Ok(Vec::new())
            }
        }
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
        let primary = DiskFile::open(image.path(), false, true).expect("nobody has it");
        let backup = DiskFile::open(image.path(), false, false).expect("anyone may look");
        backup.share().expect("the pair shares it");
        let other = DiskFile::open(image.path(), false, true);
        assert!(matches!(other, Err(DiskFileError::InUse { .. })));
        drop(primary);
        let other = DiskFile::open(image.path(), false, true);
        assert!(matches!(other, Err(DiskFileError::InUse { .. })));
        drop(backup);
        DiskFile::open(image.path(), false, true).expect("free again");
    }

    #[test]
    fn a_backup_that_waits_does_not_keep_its_primary_from_starting() {
        let image = image(1 << 20);
        let backup = DiskFile::open(image.path(), false, false).expect("anyone may look");
        let primary = DiskFile::open(image.path(), false, true).expect("nobody has it");
        backup.share().expect("the pair shares it");
        drop(primary);
    }

    #[test]
    fn a_read_only_disk_may_be_shared_by_anyone() {
        let image = image(1 << 20);
        let first = DiskFile::open(image.path(), true, true).expect("nobody has it");
        let second = DiskFile::open(image.path(), true, true).expect("readers share");
        let writer = DiskFile::open(image.path(), false, true);
        assert!(matches!(writer, Err(DiskFileError::InUse { .. })));
        drop((first, second));
    }

    #[test]
    fn a_broken_size_is_refused() {
        for size in [0, 511, 513] {
            let image = image(size);
            let error = DiskFile::open(image.path(), false, true).expect_err("not whole sectors");
            assert!(matches!(error, DiskFileError::Size { .. }), "{error}");
        }
    }
}
