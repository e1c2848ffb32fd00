//! A seed for cloud-init: a small disk with what a guest is told at its first start (cloud-init's data source
//! NoCloud: a FAT volume labelled CIDATA). It is made of the files' contents alone, so both sides of a pair
//! that name the same files have the same disk.

use anyhow::{Context, Result, bail};
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use std::fmt::Write as _;
use std::io::{self, Cursor, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use vmft_guest_images::Sha256;
use vmft_vmm::world::{DiskFile, HostCache, Permit, Storage, WriteError};

use crate::options::{OptionError, Pairs};

/// The files that cloud-init looks for; the first is the one that matters.
const NAMES: [&str; 4] = ["user-data", "meta-data", "network-config", "vendor-data"];
/// Most bytes of all files: cloud-init's own limits are far below.
const MAX_FILES: u64 = 8 << 20;
/// Smallest disk.
const MIN_DISK: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// `--seed user-data[,meta-data=FILE][,network-config=FILE][,vendor-data=FILE]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedFiles {
    /// Name in the volume, and file.
    files: Vec<(&'static str, PathBuf)>,
}

impl FromStr for SeedFiles {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        // The first may be given by its path alone.
        let text = match text.split_once(',') {
            _ if text.starts_with("user-data=") => text.to_owned(),
            Some((first, rest)) if !first.contains('=') => format!("user-data={first},{rest}"),
            None if !text.contains('=') => format!("user-data={text}"),
            _ => text.to_owned(),
        };
        let pairs = Pairs::parse(&text, &NAMES)?;
        pairs.need(NAMES[0])?;
        let file = |name| pairs.get(name).map(|path| (name, PathBuf::from(path)));
        Ok(Self { files: NAMES.into_iter().filter_map(file).collect() })
    }
}

impl SeedFiles {
    /// The files that are read.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.iter().map(|(_, path)| path)
    }

    /// Reads the files and makes the disk.
    ///
    /// # Errors
    /// A file that cannot be read, or too large.
    pub fn open(&self) -> Result<DiskFile> {
        let mut contents = Vec::new();
        for (name, path) in &self.files {
            let bytes = std::fs::read(path)
                .with_context(|| format!("reading the seed's {name} {}", path.display()))?;
            contents.push((*name, bytes));
        }
        let total: usize = contents.iter().map(|(_, bytes)| bytes.len()).sum();
        if total as u64 > MAX_FILES {
            bail!("the seed's files have {total} bytes; at most {MAX_FILES} are taken");
        }
        let volume = volume(contents).context("making the seed's disk")?;
        let size = volume.len() as u64;
        let name = PathBuf::from(format!("seed of {}", self.files[0].1.display()));
        let identity = format!("seed {}", Sha256::of(&volume));
        let storage = Arc::new(SeedStorage { volume, identity });
        Ok(DiskFile::on(name, storage, size, true, false)?)
    }
}

/// The bytes of a volume with these files. The guest's identity follows from them, unless they say it.
fn volume(mut files: Vec<(&'static str, Vec<u8>)>) -> io::Result<Vec<u8>> {
    if !files.iter().any(|(name, _)| *name == "meta-data") {
        let mut all = Vec::new();
        files.iter().for_each(|(_, bytes)| all.extend_from_slice(bytes));
        let mut text = String::new();
        let digest = Sha256::of(&all).to_string();
        writeln!(text, "instance-id: vmft-{}", &digest[..16]).expect("to memory");
        files.push(("meta-data", text.into_bytes()));
    }
    let total: u64 = files.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    let size = (total * 2 + MIN_DISK).next_multiple_of(SECTOR);
    let mut disk = Cursor::new(vec![0; usize::try_from(size).expect("small")]);
    let options = FormatVolumeOptions::new()
        .fat_type(if size < 4 << 20 { FatType::Fat12 } else { FatType::Fat16 })
        .volume_id(0x5EED_0001)
        .volume_label(*b"CIDATA     ");
    fatfs::format_volume(&mut disk, options)?;
    {
        let volume = FileSystem::new(&mut disk, FsOptions::new())?;
        let root = volume.root_dir();
        for (name, bytes) in &files {
            root.create_file(name)?.write_all(bytes)?;
        }
    }
    Ok(disk.into_inner())
}

/// A disk in memory that nobody can write.
#[derive(Debug)]
struct SeedStorage {
    volume: Vec<u8>,
    identity: String,
}

impl Storage for SeedStorage {
    fn unit(&self) -> u64 {
        SECTOR
    }

    fn cache(&self) -> HostCache {
        HostCache::None
    }

    fn identity(&self) -> Option<String> {
        Some(self.identity.clone())
    }

    fn join(&self, _: bool) -> io::Result<bool> {
        Ok(true)
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let end = at.checked_add(data.len()).filter(|end| *end <= self.volume.len());
        let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        data.copy_from_slice(&self.volume[at..end]);
        Ok(())
    }

    fn write(&self, _: Permit, _: u64, _: &[u8]) -> Result<(), WriteError> {
        Err(WriteError::Io(io::ErrorKind::ReadOnlyFilesystem.into()))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn repeats_flush(&self, _: &io::Error) -> bool {
        self.cache() == HostCache::None
    }

    fn fences(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_seed_is_the_same_wherever_it_is_made_and_other_files_make_another() {
        let make = |text: &str| volume(vec![("user-data", text.as_bytes().to_vec())]).unwrap();
        let seed = make("#cloud-config\n");
        assert!(seed == make("#cloud-config\n"));
        assert!(seed != make("#cloud-config\nhostname: other\n"));
        let volume = FileSystem::new(Cursor::new(seed), FsOptions::new()).unwrap();
        let label = volume.read_volume_label_from_root_dir().unwrap();
        assert_eq!((volume.volume_label().as_str(), label.as_deref()), ("CIDATA", Some("CIDATA")));
        let read = |name: &str| {
            let mut text = String::new();
            volume.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!(read("user-data"), "#cloud-config\n");
        assert!(read("meta-data").starts_with("instance-id: vmft-"), "{}", read("meta-data"));
    }

    #[test]
    fn large_files_fit() {
        let bytes = vec![7; 5 << 20];
        let seed = volume(vec![("user-data", bytes.clone()), ("meta-data", vec![])]).unwrap();
        let volume = FileSystem::new(Cursor::new(seed), FsOptions::new()).unwrap();
        let mut read = Vec::new();
        volume.root_dir().open_file("user-data").unwrap().read_to_end(&mut read).unwrap();
        assert!(read == bytes);
    }

    #[test]
    fn files_are_given_by_name_and_the_first_by_its_path_alone() {
        let parse = |text: &str| text.parse::<SeedFiles>().map(|seed| seed.files);
        let user = ("user-data", PathBuf::from("a"));
        assert_eq!(parse("a"), Ok(vec![user.clone()]));
        let both = Ok(vec![user, ("meta-data", PathBuf::from("b"))]);
        assert_eq!(parse("a,meta-data=b"), both);
        assert_eq!(parse("meta-data=b,user-data=a"), both);
        assert!(parse("meta-data=b").is_err());
        assert!(parse("a,other=b").is_err());
    }
}
