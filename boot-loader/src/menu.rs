//! The menu of a disk, and what an entry of it names.

use crate::reader::{Reader, Source};
use crate::volume::{FileSystem, Volume};
use crate::{BootDiskError, entries, grub, links, partitions};
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

/// Most bytes of a configuration file.
pub(crate) const MAX_TEXT: u64 = 1 << 20;
/// Most bytes of a kernel file: several times what distributions build.
const MAX_KERNEL: u64 = 256 << 20;
/// Most bytes of all initramfs files of an entry.
const MAX_INITRAMFS: u64 = 1 << 30;
/// Most initramfs files of an entry.
const MAX_FILES: usize = 16;

/// What an entry is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loader {
    /// systemd-boot's files, and others' of the same form.
    Entries,
    /// GRUB's configuration.
    Grub,
    /// No boot loader's: `/vmlinuz`.
    Links,
}

impl fmt::Display for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Entries => "boot loader entry",
            Self::Grub => "GRUB's entry",
            Self::Links => "without a boot loader, entry",
        })
    }
}

/// Where an entry's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    /// The volume that the entry was found on.
    pub(crate) volume: usize,
    /// The file system that it names.
    pub(crate) uuid: Option<String>,
}

/// One entry of a menu.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MenuEntry {
    /// What it is of.
    pub loader: Loader,
    /// Its number in the menu, from 0 on; in a menu under an entry, `1>0`.
    pub number: String,
    /// What else it is called.
    pub(crate) names: Vec<String>,
    /// What people read.
    pub title: String,
    /// The kernel's path, as the entry has it.
    pub kernel: String,
    /// Paths of what makes up the initramfs, in order.
    pub initramfs: Vec<String>,
    /// The command line.
    pub options: String,
    pub(crate) from: Named,
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OsFiles {
    /// The kernel file.
    pub kernel: Arc<[u8]>,
    /// The initramfs: all files of the entry, one after the other.
    pub initramfs: Option<Arc<[u8]>>,
    /// The entry's own command line.
    pub options: String,
}

/// The menu of a disk.
#[derive(Debug)]
pub struct Menu {
    reader: Rc<Reader>,
    volumes: Vec<Volume>,
    entries: Vec<MenuEntry>,
    default: usize,
}

impl Menu {
    /// Finds the menu of a disk, which its guest calls `name` (`vda`).
    ///
    /// # Errors
    /// [`BootDiskError`]; [`BootDiskError::Nothing`] for a disk that is not there to be booted.
    pub fn find(source: Rc<dyn Source>, name: &str) -> Result<Self, BootDiskError> {
        let reader = Reader::new(source);
        let table = partitions::read(&reader);
        reader.check()?;
        let mut volumes = Vec::new();
        for partition in table.partitions {
            let files = FileSystem::open(&partition.extent);
            reader.check()?;
            volumes.push(Volume { partition, files });
        }
        let found = menu_of(&volumes, name);
        reader.check()?;
        let (entries, default) = found?;
        if entries.is_empty() {
            let is_meant_to_boot = table.is_meant_to_boot;
            return Err(BootDiskError::Nothing { is_meant_to_boot, found: told(&volumes) });
        }
        Ok(Self { reader, volumes, entries, default })
    }

    /// All entries, in the menu's order.
    pub fn entries(&self) -> &[MenuEntry] {
        &self.entries
    }

    /// The entry that a boot loader boots by itself, or the one of that name, title or number.
    ///
    /// # Errors
    /// [`BootDiskError::NoSuchEntry`]
    pub fn entry(&self, wanted: Option<&str>) -> Result<&MenuEntry, BootDiskError> {
        let Some(wanted) = wanted else { return Ok(&self.entries[self.default]) };
        find(&self.entries, wanted).map(|at| &self.entries[at]).ok_or_else(|| {
            let told = |entry: &MenuEntry| format!("{} ({})", entry.number, entry.title);
            BootDiskError::NoSuchEntry {
                wanted: wanted.to_owned(),
                entries: self.entries.iter().map(told).collect(),
            }
        })
    }

    /// Reads the files of an entry.
    ///
    /// # Errors
    /// [`BootDiskError`]
    pub fn read(&self, entry: &MenuEntry) -> Result<OsFiles, BootDiskError> {
        let kernel = self.file(entry, &entry.kernel, "a kernel", MAX_KERNEL)?;
        let mut initramfs = Vec::new();
        for path in entry.initramfs.iter().take(MAX_FILES) {
            let limit = MAX_INITRAMFS - initramfs.len() as u64;
            let part = self.file(entry, path, "an initramfs", limit)?;
            // The kernel looks for the next archive at whole words.
            initramfs.resize(initramfs.len().next_multiple_of(4), 0);
            initramfs.extend(part);
        }
        Ok(OsFiles {
            kernel: kernel.into(),
            initramfs: (!initramfs.is_empty()).then(|| initramfs.into()),
            options: entry.options.clone(),
        })
    }

    /// A file from the file system that the entry names, or is on, or else from the one that has it.
    fn file(
        &self,
        entry: &MenuEntry,
        path: &str,
        what: &'static str,
        limit: u64,
    ) -> Result<Vec<u8>, BootDiskError> {
        // No file is longer than what it lies on, but for holes.
        let limit = limit.min(self.reader.size());
        let is_named = |index: usize| {
            let uuid = self.volumes[index].files.uuid();
            let named = entry.from.uuid.as_deref();
            named.is_some()
                && uuid.as_deref().zip(named).is_some_and(|(a, b)| a.eq_ignore_ascii_case(b))
        };
        let mut order: Vec<usize> = (0..self.volumes.len()).collect();
        order.sort_by_key(|index| (!is_named(*index), *index != entry.from.volume));
        for index in order {
            let read = self.volumes[index].files.read(path, what, limit);
            self.reader.check()?;
            if let Some(bytes) = read? {
                return Ok(bytes);
            }
        }
        let (entry, path) = (entry.title.clone(), path.to_owned());
        Err(BootDiskError::Missing { entry, path })
    }
}

/// The entry of that name, title or number.
pub(crate) fn find(entries: &[MenuEntry], wanted: &str) -> Option<usize> {
    let by_number = entries.iter().position(|entry| entry.number == wanted);
    let named = |entry: &MenuEntry| entry.names.iter().any(|name| name == wanted);
    by_number.or_else(|| entries.iter().position(named))
}

/// The entries of the first boot loader that is found, and which of them is the default.
fn menu_of(volumes: &[Volume], name: &str) -> Result<(Vec<MenuEntry>, usize), BootDiskError> {
    let none = BTreeMap::new();
    let all = || volumes.iter().enumerate();
    // systemd-boot is on the EFI system partition; elsewhere such files are read by GRUB, if it says so.
    for (index, Volume { files, .. }) in all() {
        if let FileSystem::Fat(_) = files {
            let entries = entries::entries(index, files, "", &none)?;
            if !entries.is_empty() {
                return Ok((entries, 0));
            }
        }
    }
    for (index, Volume { files, .. }) in all() {
        if let Some(menu) = grub::menu(index, files)? {
            return Ok(menu);
        }
    }
    for (index, Volume { files, .. }) in all() {
        let entries = entries::entries(index, files, "", &none)?;
        if !entries.is_empty() {
            return Ok((entries, 0));
        }
    }
    let linked = all().map(|(index, volume)| links::entries(index, volume, name));
    Ok((linked.into_iter().find(|entries| !entries.is_empty()).unwrap_or_default(), 0))
}

/// What is on the volumes, for people.
fn told(volumes: &[Volume]) -> Vec<String> {
    let tell = |Volume { partition, files }: &Volume| {
        let name = files.name()?;
        Some(match partition.number {
            Some(number) => format!("{name} on partition {number}"),
            None => name.to_owned(),
        })
    };
    volumes.iter().filter_map(tell).collect()
}
