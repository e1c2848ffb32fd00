//! Disk images with an ext4 file system: made, checked and read without being mounted.

use crate::command::{self, CommandError, command};
use crate::manifest::Sha256;
use std::io;
use std::path::{Path, PathBuf};

/// Length of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskSize(u64);

/// Smallest image: below this the file system has no room for a journal.
pub const MIN_DISK_SIZE: u64 = 8 << 20;
/// Longest label ext4 has room for, in bytes.
pub const MAX_LABEL: usize = 16;

impl DiskSize {
    /// What the demo uses.
    pub const DEMO: Self = Self(64 << 20);

    /// So many bytes.
    ///
    /// # Errors
    /// [`DiskError::Size`] if that is less than [`MIN_DISK_SIZE`] or no multiple of 4096.
    pub fn from_bytes(bytes: u64) -> Result<Self, DiskError> {
        if bytes < MIN_DISK_SIZE || !bytes.is_multiple_of(4096) {
            return Err(DiskError::Size { bytes });
        }
        Ok(Self(bytes))
    }

    /// The length in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

/// Why a disk image could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The size cannot be had.
    #[error("a disk of {bytes} bytes: it must have at least 8 MiB and be a multiple of 4 KiB")]
    Size {
        /// Bytes asked for.
        bytes: u64,
    },
    /// The label does not fit.
    #[error("disk label {label:?} is longer than 16 bytes")]
    Label {
        /// What was asked for.
        label: String,
    },
    /// There is a file already. It is left alone.
    #[error("{} exists already", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A program is missing.
    #[error("there is no {program} here: install Debian's package e2fsprogs")]
    NoProgram {
        /// Which.
        program: &'static str,
    },
    /// The file system does not have the file asked for.
    #[error("{} has no file {file}: {reason}", path.display())]
    NoFile {
        /// The image.
        path: PathBuf,
        /// The file in it.
        file: String,
        /// What the program said.
        reason: String,
    },
    /// A program failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The image could not be written.
    #[error("making {}", path.display())]
    Write {
        /// The image.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// Makes a sparse image of `size` with an empty ext4 file system, which appears at `path`
/// complete or not at all. Equal size and label give equal bytes.
///
/// # Errors
/// [`DiskError`]; nothing is then left at `path` that was not there before.
pub fn make_disk(path: &Path, size: DiskSize, label: &str) -> Result<(), DiskError> {
    if label.len() > MAX_LABEL {
        return Err(DiskError::Label { label: label.to_owned() });
    }
    if path.exists() {
        return Err(DiskError::Exists { path: path.to_owned() });
    }
    let failed = |source| DiskError::Write { path: path.to_owned(), source };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
    file.as_file().set_len(size.bytes()).map_err(failed)?;
    let identity = identity(size, label);
    let mut make = program("mke2fs")?;
    // Owner and times would otherwise be those of the host.
    make.env("E2FSPROGS_FAKE_TIME", "1700000000");
    make.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", label, "-U", &identity]);
    // Everything is initialised now, so that no thread in the guest does it later.
    let options = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard";
    make.arg("-E").arg(format!("{options},hash_seed={identity}"));
    make.arg(file.path());
    command::succeed(make)?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            Err(DiskError::Exists { path: path.to_owned() })
        }
        Err(error) => Err(failed(error.error)),
    }
}

/// A UUID that follows from size and label.
fn identity(size: DiskSize, label: &str) -> String {
    let digits = Sha256::of(format!("{} {label}", size.bytes()).as_bytes()).to_string();
    // Version 8 (free-form) and variant 1 of RFC 9562.
    let part = |from: usize, to: usize| &digits[from..to];
    let (a, b, c, d, e) = (part(0, 8), part(8, 12), part(13, 16), part(17, 20), part(20, 32));
    format!("{a}-{b}-8{c}-8{d}-{e}")
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskCheck {
    /// True if nothing is wrong.
    pub clean: bool,
    /// What the checking program printed.
    pub report: String,
}

/// Checks the file system, changing nothing.
///
/// # Errors
/// [`DiskError`] if the check could not be made: no such file, no file system in it.
pub fn check_disk(path: &Path) -> Result<DiskCheck, DiskError> {
    let mut check = program("e2fsck")?;
    check.arg("-fn").arg(path);
    let outcome = command::run(check)?;
    // e2fsck(8): 0 no errors, 4 errors left uncorrected, 8 and more the check itself failed.
    let clean = match outcome.status.code() {
        Some(0) => true,
        Some(4) => false,
        _ => {
            return Err(DiskError::Command(CommandError::Failed {
                program: "e2fsck".to_owned(),
                status: outcome.status,
                message: command::complaint(&outcome),
            }));
        }
    };
    let report = String::from_utf8_lossy(&outcome.stdout).into_owned() + &outcome.stderr;
    Ok(DiskCheck { clean, report })
}

/// Reads `file`, an absolute path in the image's file system.
///
/// # Errors
/// [`DiskError::NoFile`] if it is not there; other [`DiskError`]s if it could not be looked for.
pub fn read_disk_file(path: &Path, file: &str) -> Result<Vec<u8>, DiskError> {
    let no_file =
        |reason: String| DiskError::NoFile { path: path.to_owned(), file: file.to_owned(), reason };
    if !file.starts_with('/') || file.contains(['"', '\n']) {
        return Err(no_file("it is not an absolute path without quotes".to_owned()));
    }
    let mut cat = program("debugfs")?;
    cat.arg("-R").arg(format!("cat \"{file}\"")).arg(path);
    let outcome = command::run(cat)?;
    // It ends with 0 whatever happens; beside its version line it only prints errors.
    let complaint = outcome.stderr.lines().find(|line| !line.starts_with("debugfs "));
    match complaint {
        Some(complaint) => Err(no_file(complaint.to_owned())),
        None => Ok(outcome.stdout),
    }
}

fn program(name: &'static str) -> Result<std::process::Command, DiskError> {
    match command::find(name) {
        Some(_) => Ok(command(name)),
        None => Err(DiskError::NoProgram { program: name }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packages::{E2FSPROGS, ensure_packages};
    use crate::progress::NoProgress;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    fn made(label: &str) -> (tempfile::TempDir, PathBuf) {
        ensure_packages(&[E2FSPROGS], &mut NoProgress).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        make_disk(&path, DiskSize::from_bytes(16 << 20).unwrap(), label).unwrap();
        (directory, path)
    }

    #[test]
    fn a_new_disk_is_sparse_clean_and_always_the_same() {
        let (_one, path) = made("demo");
        let (_two, again) = made("demo");
        let (_three, other) = made("other");
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), 16 << 20);
        assert!(metadata.blocks() * 512 < metadata.len() / 2, "{} blocks", metadata.blocks());
        let check = check_disk(&path).unwrap();
        assert!(check.clean, "{}", check.report);
        assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap(), "the bytes differ");
        assert!(fs::read(&path).unwrap() != fs::read(&other).unwrap(), "the label changes nothing");
    }

    #[test]
    fn an_existing_file_is_left_alone() {
        let (_directory, path) = made("demo");
        fs::write(&path, "precious").unwrap();
        let error = make_disk(&path, DiskSize::DEMO, "demo").unwrap_err();
        assert!(matches!(error, DiskError::Exists { .. }));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_file_is_read_out_of_the_image() {
        let (directory, path) = made("demo");
        let source = directory.path().join("source");
        fs::write(&source, b"one\ntwo\0three").unwrap();
        let mut write = program("debugfs").unwrap();
        write.arg("-w").arg("-R").arg(format!("write {} file", source.display())).arg(&path);
        command::succeed(write).unwrap();
        assert_eq!(read_disk_file(&path, "/file").unwrap(), b"one\ntwo\0three");
        let error = read_disk_file(&path, "/absent").unwrap_err();
        assert!(matches!(error, DiskError::NoFile { .. }), "{error}");
    }

    #[test]
    fn damage_is_reported_and_not_mended() {
        let (_directory, path) = made("demo");
        let mut bytes = fs::read(&path).unwrap();
        // The first group descriptor, in block 1, begins with the number of its block bitmap.
        let bitmap = u32::from_le_bytes(bytes[4096..4100].try_into().unwrap());
        bytes[bitmap as usize * 4096] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(!check_disk(&path).unwrap().clean);
        assert!(fs::read(&path).unwrap() == bytes, "the check changed the image");
    }

    #[test]
    fn what_is_no_file_system_cannot_be_checked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("zeros");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        assert!(matches!(check_disk(&path), Err(DiskError::Command(_))));
    }

    #[test]
    fn sizes_and_labels_that_do_not_fit_are_refused() {
        assert!(matches!(DiskSize::from_bytes(4096), Err(DiskError::Size { .. })));
        assert!(matches!(DiskSize::from_bytes(MIN_DISK_SIZE + 1), Err(DiskError::Size { .. })));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let error = make_disk(&path, DiskSize::DEMO, "seventeen letters").unwrap_err();
        assert!(matches!(error, DiskError::Label { .. }));
        assert!(!path.exists());
    }
}
