//! FAT: the EFI system partition.
//!
//! The crate that reads it computes with the numbers of the volume as they are. So they are looked at first,
//! as far as that can be done in the boot sector; a chain of clusters that leads out of the volume ends in an
//! error of reading, and one that goes in circles at the bound of [`crate::reader::Reader`].

use crate::BootDiskError;
use crate::reader::Extent;
use crate::volume::MAX_ENTRIES;
use fatfs::{FileSystem, FsOptions};
use std::fmt;
use std::io::{self, Read, Seek, SeekFrom, Write};

/// So much of a file is read at a time.
const PIECE: u64 = 1 << 20;

/// A volume as a stream that cannot be written.
pub(crate) struct Stream {
    extent: Extent,
    at: u64,
}

impl Read for Stream {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let left = self.extent.len.saturating_sub(self.at);
        let len = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.extent.read(self.at, &mut data[..len])?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Stream {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.extent.len.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

impl Write for Stream {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A FAT file system.
pub(crate) struct Fat(FileSystem<Stream>);

impl fmt::Debug for Fat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fat")
    }
}

/// The numbers of a boot sector that everything else is computed from.
struct Parameters {
    sector: u32,
    cluster: u32,
    reserved: u32,
    tables: u32,
    root_entries: u32,
    total: u64,
    per_table: u64,
    is_fat32: bool,
    root_cluster: u32,
}

impl Parameters {
    fn of(boot: &[u8; 512]) -> Self {
        let word = |at: usize| u32::from(u16::from_le_bytes([boot[at], boot[at + 1]]));
        let long = |at: usize| word(at) | word(at + 2) << 16;
        let small = |short: u32, wide: u32| u64::from(if short == 0 { wide } else { short });
        Self {
            sector: word(11),
            cluster: boot[13].into(),
            reserved: word(14),
            tables: boot[16].into(),
            root_entries: word(17),
            total: small(word(19), long(32)),
            per_table: small(word(22), long(36)),
            is_fat32: word(22) == 0,
            root_cluster: long(44),
        }
    }

    /// Whether they are those of a volume of `len` bytes.
    fn are_possible(&self, len: u64) -> bool {
        let Self { sector, cluster, reserved, tables, root_entries, total, per_table, .. } = *self;
        if !sector.is_power_of_two() || !(512..=4096).contains(&sector) {
            return false;
        }
        if !cluster.is_power_of_two() || reserved == 0 || !(1..=2).contains(&tables) {
            return false;
        }
        let sector = u64::from(sector);
        let root = (u64::from(root_entries) * 32).div_ceil(sector);
        let first_data = u64::from(reserved) + u64::from(tables) * per_table + root;
        if per_table == 0 || total > u64::from(u32::MAX) || total * sector > len {
            return false;
        }
        let Some(data) = total.checked_sub(first_data).filter(|data| *data > 0) else {
            return false;
        };
        let clusters = data / u64::from(cluster);
        let bits = match clusters {
            _ if self.is_fat32 => 32,
            0..4085 => 12,
            _ => 16,
        };
        let entries = per_table * sector * 8 / bits;
        let root_is_one = self.root_cluster >= 2 && u64::from(self.root_cluster) < clusters + 2;
        entries >= clusters + 2
            && per_table * sector * 8 <= u64::from(u32::MAX)
            && self.is_fat32 != (root_entries != 0)
            && (!self.is_fat32 || root_is_one)
    }
}

impl Fat {
    /// True if a volume begins as one.
    pub(crate) fn is_one(extent: &Extent) -> bool {
        let boot = extent.bytes::<512>(0);
        boot.is_some_and(|boot| {
            let jumps = matches!(boot[0], 0xEB | 0xE9);
            let signed = boot[510..] == [0x55, 0xAA];
            jumps && signed && Parameters::of(&boot).are_possible(extent.len)
        })
    }

    pub(crate) fn open(extent: &Extent) -> Result<Self, String> {
        let stream = Stream { extent: extent.clone(), at: 0 };
        let options = FsOptions::new().update_accessed_date(false);
        FileSystem::new(stream, options).map(Self).map_err(|error| error.to_string())
    }

    /// Its serial number, as user space writes it.
    pub(crate) fn uuid(&self) -> String {
        let id = self.0.volume_id();
        format!("{:04X}-{:04X}", id >> 16, id & 0xFFFF)
    }

    pub(crate) fn list(&self, directory: &str) -> Vec<String> {
        let root = self.0.root_dir();
        let directory = match directory.trim_matches('/') {
            "" => Ok(root),
            path => root.open_dir(path),
        };
        let Ok(directory) = directory else { return Vec::new() };
        let entries = directory.iter().take(MAX_ENTRIES).map_while(Result::ok);
        entries.filter(|entry| entry.is_file()).map(|entry| entry.file_name()).collect()
    }

    pub(crate) fn has(&self, path: &str) -> bool {
        self.0.root_dir().open_file(path.trim_matches('/')).is_ok()
    }

    pub(crate) fn read(
        &self,
        path: &str,
        what: &'static str,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, BootDiskError> {
        let failed = |error: io::Error| BootDiskError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let mut file = match self.0.root_dir().open_file(path.trim_matches('/')) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // What is a directory, or named like nothing on such a volume.
            Err(error) if error.raw_os_error().is_none() => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        if size > limit {
            return Err(BootDiskError::TooLarge { path: path.to_owned(), what, size, limit });
        }
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < size {
            let more = PIECE.min(size - bytes.len() as u64);
            let read = (&mut file).take(more).read_to_end(&mut bytes).map_err(failed)?;
            if read == 0 {
                break;
            }
        }
        Ok(Some(bytes))
    }
}
