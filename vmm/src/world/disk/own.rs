//! An image that is one side's own: its peers have copies, and each side writes its own.
//!
//! Whoever sends a copy to a backup reads the image while its guest writes to it. What was read may be older
//! than what the guest has written since; so a [`Tap`] notes the writes to what was read already, and they are
//! sent after it, in the order in which they were completed.

use super::fence::Permit;
use super::image::{HostCache, Image, Storage, WriteError};
use super::{DiskFile, DiskFileError, check_size};
use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// What both sides say of an image of which each has a copy, in place of what tells one file from another.
pub const OWN_COPY: &str = "a copy on each side";
/// Bytes of writes that a tap keeps. Beyond it the guest's writes wait until they are sent: it writes no
/// faster than that.
const TAPPED_BYTES: usize = 8 << 20;

/// How long a write waits for room. A backup to which so little is sent does not join.
const ROOM_PATIENCE: Duration = Duration::from_secs(5);

/// The guest has written more than was sent, for too long: what it wrote is not all noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest writes faster than its disk is sent")]
pub struct Overrun;

/// A write that was completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TappedWrite {
    /// Where, in bytes.
    pub offset: u64,
    /// What.
    pub data: Vec<u8>,
}

#[derive(Debug, Default)]
struct Noted {
    /// Up to here the image was read, or is being read.
    reached: u64,
    writes: VecDeque<TappedWrite>,
    bytes: usize,
    /// Nothing is noted any more.
    is_closed: bool,
    /// Something was not noted for want of room.
    is_overrun: bool,
}

#[derive(Debug)]
struct Note {
    /// How long a write waits for room.
    patience: Duration,
    noted: Mutex<Noted>,
    changed: Condvar,
}

impl Note {
    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock()
    }

    /// A write is completed, and nobody has been told of that yet. Waits while there is no room.
    fn written(&self, offset: u64, data: &[u8]) {
        let is_full = |noted: &mut Noted| !noted.is_closed && noted.bytes >= TAPPED_BYTES;
        let (mut noted, _) = self.changed.wait_timeout_while(self.lock(), self.patience, is_full);
        if is_full(&mut noted) {
            noted.is_overrun = true;
            noted.is_closed = true;
            self.changed.notify_all();
        }
        let known = noted.reached.saturating_sub(offset).min(data.len() as u64);
        // What lies behind is still to be read.
        if noted.is_closed || known == 0 {
            return;
        }
        let data = data[..usize::try_from(known).expect("part of a slice")].to_vec();
        noted.bytes += data.len();
        noted.writes.push_back(TappedWrite { offset, data });
    }

    fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }
}

/// The taps of one image.
#[derive(Debug, Default)]
struct Taps {
    notes: Mutex<Vec<Arc<Note>>>,
    count: AtomicUsize,
    /// Requests done on the image.
    requests: AtomicU64,
}

/// Notes the writes to what was read of an image, until it is dropped.
#[derive(Debug)]
pub struct Tap {
    note: Arc<Note>,
    taps: Arc<Taps>,
}

/// Closes a tap, from any thread.
#[derive(Debug, Clone)]
pub struct TapEnd(Arc<Note>);

impl TapEnd {
    /// From now on nothing is noted; what was noted stays.
    pub fn close(&self) {
        self.0.close();
    }
}

impl Tap {
    /// From now on writes below `offset` are noted. To be called before what lies below is read.
    pub fn reach(&self, offset: u64) {
        self.note.lock().reached = offset;
    }

    /// The next write that was noted.
    ///
    /// # Errors
    /// [`Overrun`]: some are missing.
    pub fn take(&self) -> Result<Option<TappedWrite>, Overrun> {
        let mut noted = self.note.lock();
        if noted.is_overrun {
            return Err(Overrun);
        }
        let Some(write) = noted.writes.pop_front() else { return Ok(None) };
        noted.bytes -= write.data.len();
        self.note.changed.notify_all();
        Ok(Some(write))
    }

    /// What closes it.
    pub fn ending(&self) -> TapEnd {
        TapEnd(Arc::clone(&self.note))
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.note.close();
        let mut notes = self.taps.notes.lock();
        notes.retain(|note| !Arc::ptr_eq(note, &self.note));
        self.taps.count.store(notes.len(), Ordering::Release);
    }
}

/// One side's copy of a disk.
#[derive(Debug, Clone)]
pub struct OwnCopy {
    path: PathBuf,
    image: Arc<Image>,
    size: u64,
    taps: Arc<Taps>,
}

impl OwnCopy {
    /// Opens the image at `path`, which nobody else may have. Where there is none, and `make` says how many
    /// bytes it is to have, one of zeroes is made: then the second value is true.
    ///
    /// # Errors
    /// See [`DiskFileError`].
    pub fn open(
        path: &Path,
        cache: HostCache,
        make: Option<u64>,
    ) -> Result<(Self, bool), DiskFileError> {
        let mut made = false;
        if let Some(size) = make {
            check_size(path, size)?;
            made = make_image(path, size)
                .map_err(|source| DiskFileError::Open { path: path.to_owned(), source })?;
        }
        let (image, size) = Image::open(path, false, cache)?;
        let taps = Arc::default();
        Ok((Self { path: path.to_owned(), image: Arc::new(image), size, taps }, made))
    }

    /// The disk on it.
    ///
    /// # Errors
    /// [`DiskFileError::InUse`] if anybody else has it, the other side of its pair among them.
    pub fn disk(&self) -> Result<DiskFile, DiskFileError> {
        let is_first = true;
        DiskFile::on(self.path.clone(), Arc::new(self.clone()), self.size, false, is_first)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `data` from `offset` on, apart from the guest's requests.
    ///
    /// # Errors
    /// The host's.
    pub fn get(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, data)
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    /// The host's.
    pub fn settle(&self) -> io::Result<()> {
        self.image.flush()
    }

    /// Writes all of `data` at `offset`, whoever is live: it is nobody else's.
    ///
    /// # Errors
    /// The host's.
    pub fn put(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.image.put(offset, data)
    }

    /// Zeroes `len` bytes from `offset` on, and gives their room back where the file system can do that.
    ///
    /// # Errors
    /// The host's.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let keep = false;
        self.image.zero(offset, len, keep)
    }

    /// The first place from `offset` on that may hold anything but zeroes; `None` if there is none.
    ///
    /// # Errors
    /// The host's.
    pub fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
        self.image.data_from(offset)
    }

    /// Begins to note what is written.
    pub fn tap(&self) -> Tap {
        self.tap_within(ROOM_PATIENCE)
    }

    fn tap_within(&self, patience: Duration) -> Tap {
        let (noted, changed) = Default::default();
        let note = Arc::new(Note { patience, noted, changed });
        let mut notes = self.taps.notes.lock();
        notes.push(Arc::clone(&note));
        self.taps.count.store(notes.len(), Ordering::Release);
        drop(notes);
        Tap { note, taps: Arc::clone(&self.taps) }
    }

    /// How many requests the guest has had done on it: what changes says that it is busy there.
    pub fn requests(&self) -> u64 {
        self.taps.requests.load(Ordering::Relaxed)
    }
}

/// Makes a sparse file, if there is none; says whether it did.
fn make_image(path: &Path, size: u64) -> io::Result<bool> {
    let made = match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => return Err(error),
    };
    let sized = made.set_len(size).and_then(|()| made.sync_all());
    // One of another size would be in the way of the next try.
    sized.inspect_err(|_| drop(std::fs::remove_file(path)))?;
    Ok(true)
}

impl Storage for OwnCopy {
    fn unit(&self) -> u64 {
        self.image.unit()
    }

    fn cache(&self) -> HostCache {
        self.image.cache()
    }

    fn identity(&self) -> Option<String> {
        Some(OWN_COPY.to_owned())
    }

    fn join(&self, first: bool) -> io::Result<bool> {
        self.image.join(first)
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.taps.requests.fetch_add(1, Ordering::Relaxed);
        self.image.read(offset, data)
    }

    fn write(&self, permit: Permit, offset: u64, data: &[u8]) -> Result<(), WriteError> {
        self.taps.requests.fetch_add(1, Ordering::Relaxed);
        self.image.write(permit, offset, data)?;
        if self.taps.count.load(Ordering::Acquire) > 0 {
            // The guest hears of it after that: what it knows to be done, a tap has.
            let notes = self.taps.notes.lock().clone();
            notes.iter().for_each(|note| note.written(offset, data));
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn repeats_flush(&self, error: &io::Error) -> bool {
        self.image.repeats_flush(error)
    }

    fn fences(&self) -> bool {
        // A later generation is on another side's copy, which no write from here reaches.
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(size: u64) -> (tempfile::TempDir, OwnCopy) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("copy.img");
        let (copy, made) = OwnCopy::open(&path, HostCache::WriteBack, Some(size)).expect("made");
        assert!(made);
        (directory, copy)
    }

    fn write(copy: &OwnCopy, offset: u64, byte: u8) {
        copy.write(Permit(None), offset, &[byte; 1024]).expect("written");
    }

    fn noted(tap: &Tap) -> Vec<(u64, usize, u8)> {
        std::iter::from_fn(|| tap.take().expect("there was room"))
            .map(|TappedWrite { offset, data }| (offset, data.len(), data[0]))
            .collect()
    }

    #[test]
    fn a_tap_has_what_was_written_below_what_was_read_and_nothing_else() {
        let (_directory, copy) = copy(1 << 20);
        let tap = copy.tap();
        write(&copy, 0, 1);
        assert_eq!(noted(&tap), [], "all of it is still to be read");
        tap.reach(4096);
        write(&copy, 0, 2);
        write(&copy, 4096 - 512, 3);
        write(&copy, 4096, 4);
        assert_eq!(noted(&tap), [(0, 1024, 2), (4096 - 512, 512, 3)]);
        write(&copy, 0, 5);
        tap.ending().close();
        write(&copy, 0, 6);
        assert_eq!(noted(&tap), [(0, 1024, 5)], "what was noted stays");
    }

    #[test]
    fn writes_wait_for_a_tap_without_room_and_go_on_without_one_that_is_gone() {
        let (_directory, copy) = copy(1 << 20);
        let tap = copy.tap();
        tap.reach(copy.size());
        let writes = TAPPED_BYTES / 1024;
        (0..writes).for_each(|_| write(&copy, 0, 1));
        let late = copy.clone();
        let writer = std::thread::spawn(move || write(&late, 2048, 2));
        assert!(tap.take().is_ok_and(|write| write.is_some()), "there is room for one");
        writer.join().expect("it was written");
        let late = copy.clone();
        let writer = std::thread::spawn(move || write(&late, 4096, 3));
        drop(tap);
        writer.join().expect("it was written");
        assert_eq!(copy.taps.count.load(Ordering::Acquire), 0);
    }

    #[test]
    fn a_tap_that_nobody_empties_stops_no_write_for_good_and_says_what_it_lacks() {
        let (_directory, copy) = copy(1 << 20);
        let tap = copy.tap_within(Duration::ZERO);
        tap.reach(copy.size());
        (0..TAPPED_BYTES / 1024).for_each(|_| write(&copy, 0, 1));
        write(&copy, 2048, 2);
        assert_eq!(tap.take(), Err(Overrun));
        write(&copy, 4096, 3);
        let mut there = [0; 1];
        copy.get(4096, &mut there).expect("read");
        assert_eq!(there, [3]);
    }

    #[test]
    fn a_copy_is_made_once_and_is_nobody_elses() {
        let (directory, copy) = copy(1 << 20);
        assert_eq!(copy.data_from(0).expect("read"), None);
        copy.put(65536, &[1; 512]).expect("written");
        assert!(copy.data_from(0).expect("read").is_some_and(|at| at <= 65536));
        let disk = copy.disk().expect("nobody has it");
        let path = directory.path().join("copy.img");
        let (again, made) = OwnCopy::open(&path, HostCache::WriteBack, Some(512)).expect("there");
        assert_eq!((again.size(), made), (1 << 20, false));
        assert!(matches!(again.disk(), Err(DiskFileError::InUse { .. })));
        drop((disk, copy));
        again.disk().expect("free again");
    }
}
