//! The file systems of a disk. ext2, ext3, ext4 and FAT are read; others are known by name.

use crate::BootDiskError;
use crate::fat::Fat;
use crate::partitions::Partition;
use crate::reader::Extent;
use ext4_view::{Ext4, Ext4Error, Ext4Read};
use std::error::Error;
use std::fmt;

/// Most symbolic links on the way to a file: as many as Linux follows.
const MAX_LINKS: usize = 40;
/// Longest path, with what links make of it.
const MAX_PATH: usize = 4096;
/// Most entries of a directory that are looked at.
pub(crate) const MAX_ENTRIES: usize = 4096;
/// So much of a file is read at a time.
const PIECE: usize = 1 << 20;

/// A file system and where it is.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) partition: Partition,
    pub(crate) files: FileSystem,
}

/// A file system.
pub(crate) enum FileSystem {
    /// ext2, ext3 or ext4.
    Ext(Ext4),
    /// FAT12, FAT16 or FAT32.
    Fat(Fat),
    /// One that is not read here, or none.
    Other(Option<String>),
}

impl fmt::Debug for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext(_) => "ext",
            Self::Fat(_) => "FAT",
            Self::Other(None) => "none",
            Self::Other(Some(name)) => name,
        })
    }
}

/// What other file systems begin with: offset, bytes, name.
const OTHERS: &[(u64, &[u8], &str)] = &[
    (0, b"XFSB", "xfs"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
    (0, b"LUKS\xBA\xBE", "an encrypted volume (LUKS)"),
    (0x218, b"LVM2 001", "an LVM volume"),
    (0x1000, b"\xFC\x4E\x2B\xA9", "a RAID member"),
    (0x400, b"\x10\x20\xF5\xF2", "f2fs"),
    (0, b"hsqs", "squashfs"),
    (0x400, b"\xE2\xE1\xF5\xE0", "erofs"),
    (3, b"NTFS    ", "NTFS"),
    (3, b"EXFAT   ", "exFAT"),
    (0x8001, b"CD001", "ISO 9660"),
    (0x1018, b"bcachefs", "bcachefs"),
    (0xFF6, b"SWAPSPACE2", "swap space"),
];

/// The magic number of an ext file system, and where.
const EXT_MAGIC: (u64, [u8; 2]) = (0x438, [0x53, 0xEF]);
/// Largest block of an ext file system, as its superblock has it: 64 KiB.
const MAX_LOG_BLOCK: u32 = 6;
/// Fewest blocks in a group of an ext file system.
const MIN_GROUP: u32 = 256;

struct ExtentReader(Extent);

impl Ext4Read for ExtentReader {
    fn read(
        &mut self,
        start: u64,
        data: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        Ok(self.0.read(start, data)?)
    }
}

fn is_ext(extent: &Extent) -> bool {
    extent.bytes(EXT_MAGIC.0) == Some(EXT_MAGIC.1)
}

/// True if there is a file system at the very beginning: a disk that has one has no partitions.
pub(crate) fn has_file_system(extent: &Extent) -> bool {
    is_ext(extent) || Fat::is_one(extent)
}

/// Refuses a superblock by whose numbers more memory would be taken than the volume has room for tables.
fn check_ext(extent: &Extent) -> Result<(), String> {
    let Some(block) = extent.bytes::<1024>(1024) else { return Err("it is cut short".to_owned()) };
    let long = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().expect("four bytes"));
    let (log, group) = (long(0x18), long(0x20));
    if log > MAX_LOG_BLOCK {
        return Err(format!("a block size of 2^{} KiB", u64::from(log)));
    }
    // Read whether or not the file system says that it has so many.
    let blocks = u64::from(long(0x150)) << 32 | u64::from(long(0x04));
    if blocks.checked_mul(1024 << log).is_none_or(|bytes| bytes > extent.len) {
        return Err(format!("{blocks} blocks, which is more than the volume has"));
    }
    if group < MIN_GROUP {
        return Err(format!("groups of {group} blocks"));
    }
    Ok(())
}

impl FileSystem {
    /// What is on a volume.
    pub(crate) fn open(extent: &Extent) -> Self {
        if is_ext(extent) {
            let opened = check_ext(extent).and_then(|()| {
                let reader = Box::new(ExtentReader(extent.clone()));
                Ext4::load(reader).map_err(|error| error.to_string())
            });
            return match opened {
                Ok(files) => Self::Ext(files),
                Err(reason) => Self::Other(Some(format!("ext4 that cannot be read ({reason})"))),
            };
        }
        let found = OTHERS.iter().find(|(at, magic, _)| {
            let mut bytes = vec![0; magic.len()];
            extent.read(*at, &mut bytes).is_ok() && bytes == *magic
        });
        if let Some((_, _, name)) = found {
            return Self::Other(Some((*name).to_owned()));
        }
        if !Fat::is_one(extent) {
            return Self::Other(None);
        }
        match Fat::open(extent) {
            Ok(files) => Self::Fat(files),
            Err(reason) => Self::Other(Some(format!("FAT that cannot be read ({reason})"))),
        }
    }

    /// Its name, for people; `None` where there is none.
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Self::Ext(_) => Some("ext4"),
            Self::Fat(_) => Some("FAT"),
            Self::Other(name) => name.as_deref(),
        }
    }

    /// What user space knows it by (`UUID=`).
    pub(crate) fn uuid(&self) -> Option<String> {
        match self {
            Self::Ext(files) => Some(files.uuid().to_string()),
            Self::Fat(files) => Some(files.uuid()),
            Self::Other(_) => None,
        }
    }

    /// The names in a directory; none where there is no such directory.
    pub(crate) fn list(&self, directory: &str) -> Vec<String> {
        match self {
            Self::Ext(files) => list_ext(files, directory),
            Self::Fat(files) => files.list(directory),
            Self::Other(_) => Vec::new(),
        }
    }

    /// The contents of a file of at most `limit` bytes; `None` if there is none of that name.
    pub(crate) fn read(
        &self,
        path: &str,
        what: &'static str,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, BootDiskError> {
        match self {
            Self::Ext(files) => read_ext(files, path, what, limit),
            Self::Fat(files) => files.read(path, what, limit),
            Self::Other(_) => Ok(None),
        }
    }

    /// True if it has a file of that name.
    pub(crate) fn has(&self, path: &str) -> bool {
        match self {
            Self::Ext(files) => {
                let found = resolve(files, path).ok().flatten();
                found.is_some_and(|path| files.open(path.as_str()).is_ok())
            }
            Self::Fat(files) => files.has(path),
            Self::Other(_) => false,
        }
    }
}

fn damaged(path: &str) -> impl Fn(Ext4Error) -> BootDiskError + '_ {
    |error| BootDiskError::Damaged { path: path.to_owned(), reason: error.to_string() }
}

/// The path without links: each link is looked at before it is read, because its length is the guest's word.
/// `None` if there is no such file, or too many links on the way.
fn resolve(files: &Ext4, path: &str) -> Result<Option<String>, Ext4Error> {
    let mut todo: Vec<String> = components(path);
    let mut done: Vec<String> = Vec::new();
    let mut links = 0;
    while let Some(part) = todo.pop() {
        if part == ".." {
            done.pop();
            continue;
        }
        done.push(part);
        let here = format!("/{}", done.join("/"));
        if here.len() > MAX_PATH {
            return Ok(None);
        }
        let data = match files.symlink_metadata(here.as_str()) {
            Ok(data) => data,
            Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
            Err(error) => return Err(error),
        };
        if !data.is_symlink() {
            continue;
        }
        links += 1;
        if links > MAX_LINKS || data.len() >= MAX_PATH as u64 {
            return Ok(None);
        }
        let target = files.read_link(here.as_str())?;
        let Ok(target) = target.to_str() else { return Ok(None) };
        done.pop();
        if target.starts_with('/') {
            done.clear();
        }
        todo.extend(components(target));
        if todo.iter().map(String::len).sum::<usize>() > MAX_PATH {
            return Ok(None);
        }
    }
    Ok(Some(format!("/{}", done.join("/"))))
}

/// The parts of a path, the last first.
fn components(path: &str) -> Vec<String> {
    let parts = path.split('/').filter(|part| !part.is_empty() && *part != ".");
    parts.rev().map(str::to_owned).collect()
}

fn read_ext(
    files: &Ext4,
    path: &str,
    what: &'static str,
    limit: u64,
) -> Result<Option<Vec<u8>>, BootDiskError> {
    let damaged = damaged(path);
    let Some(place) = resolve(files, path).map_err(&damaged)? else { return Ok(None) };
    let mut file = match files.open(place.as_str()) {
        Ok(file) => file,
        Err(Ext4Error::IsADirectory | Ext4Error::IsASpecialFile) => return Ok(None),
        Err(error) => return Err(damaged(error)),
    };
    let size = file.metadata().len();
    if size > limit {
        return Err(BootDiskError::TooLarge { path: path.to_owned(), what, size, limit });
    }
    let mut bytes = Vec::new();
    loop {
        // No more memory than what has been read is worth, whatever the size promises.
        let len = bytes.len();
        let more = PIECE.min(usize::try_from(size).expect("below the limit") - len);
        bytes.resize(len + more, 0);
        let mut filled = len;
        while filled < bytes.len() {
            match file.read_bytes(&mut bytes[filled..]).map_err(&damaged)? {
                0 => break,
                read => filled += read,
            }
        }
        bytes.truncate(filled);
        if more == 0 || filled < len + more {
            return Ok(Some(bytes));
        }
    }
}

fn list_ext(files: &Ext4, directory: &str) -> Vec<String> {
    let place = resolve(files, directory).ok().flatten();
    let Some(entries) = place.and_then(|place| files.read_dir(place.as_str()).ok()) else {
        return Vec::new();
    };
    let name = |entry: Result<ext4_view::DirEntry, _>| {
        let entry = entry.ok()?;
        entry.file_name().as_str().ok().map(str::to_owned)
    };
    entries.take(MAX_ENTRIES).map_while(name).collect()
}
