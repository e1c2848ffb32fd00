//! What a copy of a disk is worth, in a small file beside it (`IMAGE.mirror`).
//!
//! The file has two places of 4096 bytes, each with a number and a checksum; the valid one with the higher
//! number counts. A new record goes into the other place, and is durable before anything happens that it
//! speaks of; so there always is a whole one, whatever dies in between, and a side needs no more than the
//! open file to write it.

use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use vmft_log::disk_copy::CopyId;
use vmft_log::entry::Generation;
use vmft_log::wire::MAX_COUNT;
use vmft_threads::Mutex;

/// Bytes of one place: a unit of any disk.
const PLACE: usize = 4096;

/// Whose a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyState {
    /// A live side's: it has everything.
    Live,
    /// Nobody's yet: a primary's disk is being copied over it.
    Filling,
    /// A backup's: it has what that has replayed, which may be a moment behind its primary.
    Following,
    /// Of a pair whose guest has ended: every copy that says so has everything.
    Stopped,
}

impl fmt::Display for CopyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "live",
            Self::Filling => "filling",
            Self::Following => "following",
            Self::Stopped => "stopped",
        })
    }
}

/// What is known of a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Record {
    /// Whose it is.
    pub state: CopyState,
    /// In which generation. A live side may have won later ones since.
    pub generation: Generation,
    /// The pair.
    pub pair: String,
    /// The life of the process that wrote this, as arbiters know it.
    pub side: String,
    /// Which copy it is.
    pub copy: CopyId,
}

/// What is wrong with a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The host's reason.
    #[error("the record {} of a disk's copy", path.display())]
    Io {
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error(
        "{} is no record of a disk's copy, or damaged; remove it, and the image, if this copy is not needed",
        path.display()
    )]
    Damaged {
        /// The record.
        path: PathBuf,
    },
}

/// A record as it lies in a place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Numbered {
    number: u64,
    record: Record,
}

/// The record of the image at that path.
pub fn path_of(image: &Path) -> PathBuf {
    let mut name = OsString::from(image);
    name.push(".mirror");
    name.into()
}

fn encode(numbered: &Numbered) -> Vec<u8> {
    let text = serde_json::to_string(numbered).expect("plain values");
    let mut place = format!("{:08x} {text}\n", crc32c::crc32c(text.as_bytes())).into_bytes();
    assert!(place.len() <= PLACE, "names of pairs and sides are short");
    // It ends with the end of a line, for people who look.
    place.resize(PLACE - 1, b' ');
    place.push(b'\n');
    place
}

fn decode(place: &[u8]) -> Option<Numbered> {
    let line = std::str::from_utf8(place).ok()?.lines().next()?;
    let (check, text) = line.split_once(' ')?;
    let is_whole = u32::from_str_radix(check, 16).ok()? == crc32c::crc32c(text.as_bytes());
    let numbered: Numbered = serde_json::from_str(text).ok().filter(|_| is_whole)?;
    let is_sound = numbered.number < MAX_COUNT && numbered.record.generation.0 <= MAX_COUNT;
    is_sound.then_some(numbered)
}

/// An open record.
#[derive(Debug)]
pub struct RecordFile {
    path: PathBuf,
    file: File,
    last: Mutex<Option<Numbered>>,
}

impl RecordFile {
    /// Opens the record of an image, or makes one that says nothing.
    ///
    /// # Errors
    /// [`RecordError`]
    pub fn open(image: &Path) -> Result<Self, RecordError> {
        let path = path_of(image);
        let io = |source| RecordError::Io { path: path.clone(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = match options.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let made = options.create(true).open(&path).map_err(io)?;
                sync_directory(&path).map_err(io)?;
                made
            }
            other => other.map_err(io)?,
        };
        let last = read(&file, &path)?;
        Ok(Self { path, file, last: Mutex::new(last) })
    }

    /// What it says; `None` if nothing.
    pub fn get(&self) -> Option<Record> {
        self.last.lock().as_ref().map(|last| last.record.clone())
    }

    /// What the record beside `image` says, if there is one. Changes nothing.
    ///
    /// # Errors
    /// [`RecordError`]
    pub fn look(image: &Path) -> Result<Option<Record>, RecordError> {
        let path = path_of(image);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|source| RecordError::Io { path: path.clone(), source })?,
        };
        Ok(read(&file, &path)?.map(|numbered| numbered.record))
    }

    /// Says something else from now on, and whatever happens.
    ///
    /// # Errors
    /// [`RecordError::Io`]: what it says is not known, but is what it said before or this.
    pub fn put(&self, record: Record) -> Result<(), RecordError> {
        let mut last = self.last.lock();
        let number = last.as_ref().map_or(0, |last| last.number) + 1;
        let numbered = Numbered { number, record };
        let place = (number % 2) * PLACE as u64;
        let written = self.file.write_all_at(&encode(&numbered), place);
        let durable = written.and_then(|()| self.file.sync_data());
        durable.map_err(|source| RecordError::Io { path: self.path.clone(), source })?;
        *last = Some(numbered);
        Ok(())
    }
}

/// A file that was made stays.
fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

fn read(file: &File, path: &Path) -> Result<Option<Numbered>, RecordError> {
    let io = |source| RecordError::Io { path: path.to_owned(), source };
    let mut bytes = vec![0; 2 * PLACE];
    let mut len = 0;
    while len < bytes.len() {
        match file.read_at(&mut bytes[len..], len as u64).map_err(io)? {
            0 => break,
            more => len += more,
        }
    }
    let found = bytes[..len].chunks(PLACE).filter_map(decode).max_by_key(|found| found.number);
    // Nothing is what was made and never written. The second place is the first to be written.
    let says_nothing = bytes[..len].iter().all(|byte| *byte == 0);
    match found {
        None if !says_nothing => Err(RecordError::Damaged { path: path.to_owned() }),
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(generation: u64) -> Record {
        Record {
            state: CopyState::Live,
            generation: Generation(generation),
            pair: "pair".into(),
            side: "side".into(),
            copy: CopyId([3; 16]),
        }
    }

    #[test]
    fn a_record_says_what_was_put_last_and_a_torn_one_what_was_before() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let image = directory.path().join("disk.img");
        assert_eq!(RecordFile::look(&image).expect("none"), None);
        let file = RecordFile::open(&image).expect("made");
        assert_eq!(file.get(), None);
        for generation in 1..=5 {
            file.put(record(generation)).expect("written");
            assert_eq!(RecordFile::look(&image).expect("there"), Some(record(generation)));
        }
        // The last one is damaged anywhere: the one before it counts.
        let path = path_of(&image);
        let whole = std::fs::read(&path).expect("there");
        assert_eq!(whole.len(), 2 * PLACE);
        for at in [PLACE, PLACE + 3, PLACE + 30, PLACE + 120] {
            let mut torn = whole.clone();
            torn[at] ^= 0x15;
            std::fs::write(&path, &torn).expect("written");
            let file = RecordFile::open(&image).expect("one is whole");
            assert_eq!(file.get(), Some(record(4)), "damaged at {at}");
            file.put(record(6)).expect("written");
            assert_eq!(RecordFile::look(&image).expect("there"), Some(record(6)));
        }
    }

    #[test]
    fn what_is_no_record_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let image = directory.path().join("disk.img");
        let path = path_of(&image);
        for bytes in [&b"somebody's notes\n"[..], &[7; 3 * PLACE], b"00000000 {}\n"] {
            std::fs::write(&path, bytes).expect("written");
            assert!(matches!(RecordFile::open(&image), Err(RecordError::Damaged { .. })));
            assert!(matches!(RecordFile::look(&image), Err(RecordError::Damaged { .. })));
            assert_eq!(std::fs::read(&path).expect("there"), bytes);
        }
        std::fs::write(&path, b"").expect("written");
        assert_eq!(RecordFile::open(&image).expect("says nothing").get(), None);
    }

    #[test]
    fn foreign_bytes_in_a_place_are_refused_or_a_record() {
        let good = encode(&Numbered { number: 9, record: record(4) });
        vmft_fuzzing::cases(2_000, |mut random| {
            let mut bytes = good.clone();
            vmft_fuzzing::damage(&mut random, &mut bytes, &[]);
            if let Some(found) = decode(&bytes) {
                assert!(found.number < MAX_COUNT);
            }
        });
    }
}
