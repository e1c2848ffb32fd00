//! What a guest boots from its disks: read at its start, and again whenever it is reset.

use super::disk::DiskReader;
use super::{HostOutside, error_text};
use crate::machine::{BootSource, DiskBoot, contained};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;
use vmft_boot_loader::{BootDiskError, Menu, cmdline};
use vmft_log::foreign::Printable;
use vmft_sandbox::Task;

/// What was read.
#[derive(Debug)]
pub struct FromDisk {
    /// The files, and the command line as a whole.
    pub source: BootSource,
    /// What it is, for people.
    pub told: String,
}

/// A disk that should boot and does not.
#[derive(Debug, thiserror::Error)]
#[error("disk {}", disk.display())]
pub struct DiskBootError {
    /// The disk.
    pub disk: PathBuf,
    /// Why.
    #[source]
    pub source: BootDiskError,
}

/// What a guest calls its disk of that number.
pub fn guests_name(index: usize) -> String {
    let letter = char::from(b'a' + u8::try_from(index.min(25)).expect("a letter"));
    format!("vd{letter}")
}

/// Reads what the first disk boots that has something to boot; `None` if they are all there for data.
///
/// # Errors
/// [`DiskBootError`]
pub fn boot_from_disks(
    disks: &[DiskReader],
    how: &DiskBoot,
) -> Result<Option<FromDisk>, DiskBootError> {
    for (index, disk) in disks.iter().enumerate() {
        let failed = |source| DiskBootError { disk: disk.name().to_owned(), source };
        let menu = match Menu::find(Rc::new(disk.clone()), &guests_name(index)) {
            Ok(menu) => menu,
            Err(BootDiskError::Nothing { is_meant_to_boot: false, .. }) => continue,
            Err(error) => return Err(failed(error)),
        };
        let entry = menu.entry(how.entry.as_deref()).map_err(failed)?;
        let files = menu.read(entry).map_err(failed)?;
        let own = cmdline::on_this_console(&files.options);
        let told = format!(
            "boots from disk {}: {} {} ({}), kernel {}, command line {}",
            disk.name().display(),
            entry.loader,
            entry.number,
            Printable(&entry.title),
            Printable(&entry.kernel),
            Printable(&own),
        );
        let words = cmdline::before(&own, &how.after);
        let source = BootSource {
            kernel: files.kernel,
            initramfs: files.initramfs,
            cmdline: cmdline::before(&how.before, &words),
            disk: Some(how.clone()),
        };
        return Ok(Some(FromDisk { source, told }));
    }
    Ok(None)
}

/// How long one wait for the disks takes.
const DISK_STEP: Duration = Duration::from_secs(1);

/// The disks of a live side, as far as its guest boots from them.
#[derive(Debug, Default)]
pub(super) struct Booting {
    under_way: Option<Receiver<Result<FromDisk, String>>>,
}

impl Booting {
    /// Starts to read, and takes what was read. What the guest has asked of its disks before comes first.
    pub(super) fn take(
        &mut self,
        outside: &HostOutside,
        how: &DiskBoot,
    ) -> Option<Result<BootSource, String>> {
        let under_way = match &self.under_way {
            Some(under_way) => under_way,
            None => match Self::begin(outside, how.clone()) {
                Ok(begun) => self.under_way.insert(begun),
                Err(error) => return Some(Err(error.to_string())),
            },
        };
        let read = match under_way.try_recv() {
            Ok(read) => read,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err("whoever read the disks is gone".to_owned()),
        };
        self.under_way = None;
        Some(read.map(|FromDisk { source, told }| {
            tracing::warn!("the guest {told}");
            source
        }))
    }

    fn begin(
        outside: &HostOutside,
        how: DiskBoot,
    ) -> io::Result<Receiver<Result<FromDisk, String>>> {
        let (give, take) = channel();
        let (mut before, readers) = (outside.drain(), outside.readers().to_vec());
        vmft_sandbox::spawn(Task::Disk, "boot", move || {
            while !before.wait(DISK_STEP) {}
            // The guest has written what is read here.
            let read = contained(|| boot_from_disks(&readers, &how));
            let read = read.and_then(|read| read.map_err(|error| error_text(&error)));
            let none = || "no disk has anything to boot any more".to_owned();
            // Whoever asked may have gone.
            let _ = give.send(read.and_then(|found| found.ok_or_else(none)));
        })?;
        Ok(take)
    }
}
