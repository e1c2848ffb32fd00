//! Booting from a disk, as its own boot loader would: which disk, which entry, and when the default
//! guest comes in its place.
//!
//! | what is given | what boots |
//! |---|---|
//! | `--kernel`, `--lockstep-kernel`, `--boot kernel` | that kernel, or the default guest; disks are data |
//! | `--boot disk`, `--boot-entry` | the first disk that has something to boot |
//! | else | the first disk that has something to boot; without one, the default guest |
//!
//! A disk that is partitioned to be booted, and has nothing that can be, is an error: whoever gives
//! it does not want another guest.

use crate::disk_images::check_format;
use crate::options::{DiskOption, DiskPlace};
use anyhow::{Result, anyhow, bail};
use clap::{Args, ValueEnum};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use vmft_boot_loader::{BootDiskError, Menu, Source};
use vmft_vmm::machine::DiskBoot;
use vmft_vmm::world::{DiskBootError, DiskFile, FromDisk, boot_from_disks, guests_name};

/// From where a guest boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BootChoice {
    /// From the first disk that has a boot loader's entries, or /vmlinuz
    Disk,
    /// From --kernel, or the default guest: disks are data
    Kernel,
}

/// What of the disks boots.
#[derive(Debug, Clone, Default, Args)]
pub struct DiskBootOptions {
    /// From where the guest boots. Default: from the first disk that has something to boot, unless
    /// a kernel is given; else the default guest
    #[arg(
        long,
        value_enum,
        value_name = "FROM",
        conflicts_with = "restore",
        help_heading = "Machine"
    )]
    pub boot: Option<BootChoice>,
    /// The entry of the disk's boot menu, by number, name or title. Default: the one that the disk's boot
    /// loader would take
    #[arg(long, value_name = "NAME|NUMBER",
          conflicts_with_all = ["restore", "kernel", "lockstep_kernel"], help_heading = "Machine")]
    pub boot_entry: Option<String>,
}

/// What is known before the disks are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outlook {
    /// No disk boots.
    None,
    /// One does, or it is an error.
    Boots,
    /// A disk of a server has to be asked, which is done later.
    Open,
}

/// What to do about a disk that does not boot.
const REMEDY: &str =
    "--kernel FILE boots it with a kernel of yours, --boot kernel gives it to the default guest";

/// An image that nobody has opened yet.
#[derive(Debug)]
struct Image {
    file: File,
    size: u64,
}

impl Source for Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }
}

/// `None` for a disk that is there for data.
fn menu(source: Rc<dyn Source>, path: &Path, index: usize) -> Result<Option<Menu>> {
    match Menu::find(source, &guests_name(index)) {
        Ok(menu) => Ok(Some(menu)),
        Err(BootDiskError::Nothing { is_meant_to_boot: false, .. }) => Ok(None),
        Err(error) => Err(refused(path, error)),
    }
}

fn refused(path: &Path, error: BootDiskError) -> anyhow::Error {
    let remedy = match &error {
        BootDiskError::NoSuchEntry { .. } => "--boot-entry takes one of these",
        _ => REMEDY,
    };
    anyhow!("disk {}: {:#}; {remedy}", path.display(), anyhow::Error::from(error))
}

impl DiskBootOptions {
    /// True if a disk has to boot.
    fn must(&self) -> bool {
        self.boot == Some(BootChoice::Disk) || self.boot_entry.is_some()
    }

    /// Looks at the disks before they are opened for the guest, so that the default guest is not fetched for
    /// nothing.
    ///
    /// # Errors
    /// A disk is meant to be booted and cannot be.
    pub fn outlook(&self, disks: &[DiskOption]) -> Result<Outlook> {
        if self.boot == Some(BootChoice::Kernel) {
            if self.boot_entry.is_some() {
                bail!(
                    "--boot-entry is an entry of a disk's menu, and --boot kernel boots from none"
                );
            }
            return Ok(Outlook::None);
        }
        if self.must() && disks.is_empty() {
            bail!("to boot from a disk there has to be one; give it with --disk path=FILE");
        }
        if self.must() {
            return Ok(Outlook::Boots);
        }
        let mut outlook = Outlook::None;
        for (index, disk) in disks.iter().enumerate() {
            let DiskPlace::Image(path) = &disk.place else {
                outlook = Outlook::Open;
                continue;
            };
            check_format(path, disk.read_only, disk.is_raw)?;
            // What cannot be opened is left to whoever opens it for the guest.
            let is_file = path.metadata().is_ok_and(|data| !data.is_dir());
            let opened = is_file.then(|| File::open(path).ok()).flatten();
            let Some(mut file) = opened else { continue };
            let Ok(size) = file.seek(SeekFrom::End(0)) else { continue };
            if menu(Rc::new(Image { file, size }), path, index)?.is_some() {
                return Ok(Outlook::Boots);
            }
        }
        Ok(outlook)
    }

    /// Reads what the first disk boots that has something, with the board's words and the user's
    /// around its own; `None` if no disk has.
    ///
    /// # Errors
    /// One has to boot and none does, or the one that is to boot cannot.
    pub fn read(&self, disks: &[DiskFile], words: Option<&str>) -> Result<Option<FromDisk>> {
        let readers: Vec<_> = disks.iter().map(DiskFile::reader).collect();
        let after = words.unwrap_or_default().to_owned();
        let how = DiskBoot { entry: self.boot_entry.clone(), before: String::new(), after };
        let found = boot_from_disks(&readers, &how)
            .map_err(|DiskBootError { disk, source }| refused(&disk, source))?;
        if found.is_none() && self.must() {
            bail!(
                "no disk has something to boot: no boot loader's entries and no /vmlinuz; {REMEDY}"
            );
        }
        Ok(found)
    }
}
