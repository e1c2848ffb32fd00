//! `vmft doctor --disk`: what a disk can do for a machine or a pair, and what follows. Nothing on it
//! is changed.

use crate::disk_images::{DisksOf, check_format, disk_remedy};
use crate::image_import::directory_of;
use crate::nbd_disk;
use crate::options::{DiskOption, DiskPlace, NbdExport};
use serde::Serialize;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use vmft_backup::arbiter::DirectoryArbiter;
use vmft_backup::mirror;
use vmft_backup::mirror::record::CopyState;
use vmft_vmm::doctor::findings::{Finding, Grade};
use vmft_vmm::world::{DiskFile, DiskFileError, HostCache, file_system};

/// File systems that several hosts mount at a time. Others are one host's, unless something below them is
/// shared.
const SHARED: [&str; 12] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "gfs2",
    "ocfs2",
    "lustre",
    "gpfs",
    "glusterfs",
    "fuse.glusterfs",
    "fuse.ceph",
];
/// Those that take `O_DIRECT` and cache all the same, as far as is known.
const CACHE_ALL_THE_SAME: [&str; 3] = ["zfs", "tmpfs", "btrfs"];

/// What matters of storage that is shared.
const SEEN: &str = "seen by other hosts";
const LATE: &str = "late writes are refused";
const BESIDE: &str = "arbiter beside it";

/// What there is to say of one disk.
#[derive(Debug, Serialize)]
pub struct DiskReport {
    /// As its operator named it.
    pub disk: String,
    /// What was found.
    pub findings: Vec<Finding>,
}

/// What was found out about an image in a file, or on a block device.
#[derive(Debug, PartialEq, Eq)]
struct ImageFacts {
    is_device: bool,
    file_system: String,
    /// Why it is no raw disk.
    other_format: Option<String>,
    /// Its size in bytes; or why it cannot be used at all.
    size: Result<u64, String>,
    /// It can be used past the host's cache; else why not.
    direct: Result<(), String>,
    in_use: bool,
    arbiter: PathBuf,
    has_arbiter: bool,
    arbiter_can_be_made: bool,
}

/// Looks at a disk.
pub fn examine(option: &DiskOption) -> DiskReport {
    let (disk, findings) = match &option.place {
        DiskPlace::Image(path) if option.mirror.is_some() => {
            (path.display().to_string(), copy_findings(path, option))
        }
        DiskPlace::Image(path) => {
            let facts = look_at_image(path, option);
            (path.display().to_string(), image_findings(&facts))
        }
        DiskPlace::Export(export) => (export.to_string(), export_findings(export)),
        DiskPlace::Seed(_) => ("the seed".to_owned(), Vec::new()),
    };
    DiskReport { disk, findings }
}

fn look_at_image(path: &Path, option: &DiskOption) -> ImageFacts {
    let read_only = option.read_only;
    let arbiter = DirectoryArbiter::beside(path);
    let above = directory_of(path);
    let open = |cache, alone| DiskFile::open(path, read_only, cache, alone);
    let why = |error: &DiskFileError| format!("{error}{}", disk_remedy(error, true));
    let kind = path.metadata().map(|data| data.file_type());
    ImageFacts {
        is_device: kind.is_ok_and(|kind| kind.is_block_device()),
        file_system: file_system(path),
        other_format: check_format(path, read_only, option.is_raw).err().map(|e| format!("{e:#}")),
        size: open(HostCache::WriteBack, false).map(|disk| disk.size()).map_err(|e| why(&e)),
        direct: match open(HostCache::None, false) {
            Ok(disk) if disk.cache() == HostCache::None => Ok(()),
            // One that is only read is opened all the same.
            Ok(_) => Err("its file system cannot".to_owned()),
            Err(error) => Err(why(&error)),
        },
        in_use: matches!(open(HostCache::WriteBack, true), Err(DiskFileError::InUse { .. })),
        has_arbiter: DirectoryArbiter::open(&arbiter).is_ok(),
        arbiter_can_be_made: nix::unistd::access(above, nix::unistd::AccessFlags::W_OK).is_ok(),
        arbiter,
    }
}

/// What follows from the facts.
fn image_findings(facts: &ImageFacts) -> Vec<Finding> {
    use Grade::{Bad, Good, Note};
    let mut all = Vec::new();
    if let Some(format) = &facts.other_format {
        all.push(Finding::new("format", Bad, "not raw", "raw", format));
    }
    let size = match &facts.size {
        Ok(size) => Finding::new("size", Good, &format!("{size} bytes"), "whole sectors", ""),
        Err(why) => Finding::new("size", Bad, "cannot be used", "whole sectors", why),
    };
    let is_usable = facts.size.is_ok();
    all.push(size);
    if !is_usable {
        return all;
    }
    let name = if facts.is_device { "a block device" } else { &facts.file_system };
    let (fact, expected) = ("past the host's cache", "yes, for a pair");
    all.push(match &facts.direct {
        Ok(()) if CACHE_ALL_THE_SAME.contains(&facts.file_system.as_str()) && !facts.is_device => {
            let follows = format!(
                "{name} takes O_DIRECT and may cache all the same: what a host had not written is lost \
                 with it, and a frozen host may write it later"
            );
            Finding::new(fact, Note, "perhaps", expected, &follows)
        }
        Ok(()) => Finding::new(fact, Good, "yes", expected, ""),
        Err(why) => Finding::new(fact, Bad, "no", expected, why),
    });
    let shared = SHARED.contains(&facts.file_system.as_str());
    let fact = SEEN;
    all.push(if facts.is_device {
        let follows = "a pair on two hosts needs the same device on both: SAN, iSCSI, DRBD, …";
        Finding::new(fact, Note, "a block device", "", follows)
    } else if shared {
        Finding::new(fact, Good, name, "shared storage", "")
    } else {
        let follows = "a pair on this host can use it; one on two hosts needs NFS, a disk of `vmft disk \
                       serve`, or another storage that both see";
        Finding::new(fact, Note, name, "shared storage", follows)
    });
    let follows = "a write that a frozen host had sent can land after a failover: each side looks at the \
                   arbiter before it sends one, and `vmft disk serve` refuses it";
    all.push(Finding::new(LATE, Note, "no", "", follows));
    let arbiter = facts.arbiter.display().to_string();
    let fact = BESIDE;
    all.push(if facts.has_arbiter {
        Finding::new(fact, Good, "there", "", &arbiter)
    } else if facts.arbiter_can_be_made {
        let follows = format!("`vmft primary` makes {arbiter}");
        Finding::new(fact, Good, "can be made", "", &follows)
    } else {
        let follows = "say --arbiter dir=PATH on storage that both sides share and may write to";
        Finding::new(fact, Bad, "cannot be made", "", follows)
    });
    if facts.in_use {
        let follows = "a new machine is refused; a backup joins the one there is";
        all.push(Finding::new("in use", Note, "yes", "", follows));
    }
    all
}

/// What follows of a file that is one side's own copy of a disk.
fn copy_findings(path: &Path, option: &DiskOption) -> Vec<Finding> {
    use Grade::{Bad, Good, Note};
    let size = option.mirror.and_then(|mirror| mirror.size);
    if let (false, Some(size)) = (path.exists(), size) {
        let follows = format!("`vmft primary` and `vmft standby` make one of {size} zero bytes");
        return vec![Finding::new("copy", Good, "is not there yet", "", &follows)];
    }
    let facts = look_at_image(path, option);
    let mut all = image_findings(&facts);
    // Nobody else needs to see it.
    let of_shared = [SEEN, LATE, BESIDE];
    all.retain(|finding| !of_shared.contains(&finding.fact.as_str()));
    if facts.is_device {
        let follows = "there is no room for a record beside it: mirror=on takes a file";
        all.push(Finding::new("copy", Bad, "a block device", "a file", follows));
        return all;
    }
    all.push(match mirror::look(path) {
        Ok(Some(record)) => {
            let measured = format!("{}, generation {}", record.state, record.generation.0);
            let follows = match record.state {
                CopyState::Live | CopyState::Stopped => {
                    "a guest begins on it unless another side has won a later generation"
                }
                CopyState::Following | CopyState::Filling => {
                    "a backup's: no guest begins on it without force=on"
                }
            };
            Finding::new("copy", Note, &measured, "", follows)
        }
        Ok(None) => {
            let follows =
                "a new pair begins on it; a backup copies over it only if it is all zeroes";
            Finding::new("copy", Note, "of no pair yet", "", follows)
        }
        Err(error) => Finding::new("copy", Bad, "no record can be read", "", &error.to_string()),
    });
    all
}

fn export_findings(export: &NbdExport) -> Vec<Finding> {
    use Grade::{Bad, Good, Note};
    let disk = match nbd_disk::open(export, true, DisksOf::Alone) {
        Ok(disk) => disk,
        Err(error) => {
            return vec![Finding::new("server", Bad, "cannot be used", "", &format!("{error:#}"))];
        }
    };
    let size = format!("{} bytes", disk.size());
    let mut all = vec![
        Finding::new("server", Good, "answers", "", ""),
        Finding::new("size", Good, &size, "whole sectors", ""),
        Finding::new("past the host's cache", Good, "yes", "yes, for a pair", ""),
        Finding::new(SEEN, Good, "a server", "shared storage", ""),
    ];
    let (late, arbiter) = (LATE, "arbiter of its own");
    if disk.identity().is_some() {
        all.push(Finding::new(late, Good, "yes", "yes, for a pair", ""));
        all.push(Finding::new(arbiter, Good, "yes", "", ""));
    } else {
        let follows = "a pair is refused: serve it with `vmft disk serve`; `vmft run` can use it";
        all.push(Finding::new(late, Bad, "no", "yes, for a pair", follows));
        all.push(Finding::new(arbiter, Note, "no", "", ""));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::MirrorOption;

    fn facts() -> ImageFacts {
        ImageFacts {
            is_device: false,
            file_system: "nfs4".to_owned(),
            other_format: None,
            size: Ok(1 << 20),
            direct: Ok(()),
            in_use: false,
            arbiter: "a.img.vmft".into(),
            has_arbiter: false,
            arbiter_can_be_made: true,
        }
    }

    /// The facts that are bad.
    fn bad(facts: &ImageFacts) -> Vec<String> {
        let findings = image_findings(facts).into_iter();
        findings.filter(|one| one.grade == Grade::Bad).map(|one| one.fact).collect()
    }

    fn follows(facts: &ImageFacts, fact: &str) -> (Grade, String) {
        let findings = image_findings(facts);
        let found = findings.into_iter().find(|one| one.fact == fact).expect("it is told");
        (found.grade, found.follows)
    }

    #[test]
    fn a_good_image_has_nothing_bad_and_each_lack_is_named_with_what_follows() {
        assert_eq!(bad(&facts()), Vec::<String>::new());
        assert_eq!(follows(&facts(), "seen by other hosts").0, Grade::Good);
        let local = ImageFacts { file_system: "ext4".to_owned(), ..facts() };
        let (grade, text) = follows(&local, "seen by other hosts");
        assert!(grade == Grade::Note && text.contains("vmft disk serve"), "{text}");
        let zfs = ImageFacts { file_system: "zfs".to_owned(), ..facts() };
        let (grade, text) = follows(&zfs, "past the host's cache");
        assert!(grade == Grade::Note && text.contains("cache all the same"), "{text}");
        let cached = ImageFacts { direct: Err("it cannot".to_owned()), ..facts() };
        assert_eq!(bad(&cached), ["past the host's cache"]);
        let foreign = ImageFacts { other_format: Some("qcow2".to_owned()), ..facts() };
        assert_eq!(bad(&foreign), ["format"]);
        let locked = ImageFacts { arbiter_can_be_made: false, ..facts() };
        assert_eq!(bad(&locked), ["arbiter beside it"]);
        let joined = ImageFacts { has_arbiter: true, ..locked };
        assert_eq!(bad(&joined), Vec::<String>::new());
        let odd = ImageFacts { size: Err("17 bytes".to_owned()), ..facts() };
        assert_eq!(bad(&odd), ["size"]);
        assert_eq!(follows(&ImageFacts { in_use: true, ..facts() }, "in use").0, Grade::Note);
    }

    #[test]
    fn looking_changes_nothing() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("a.img");
        std::fs::write(&path, vec![7; 4096]).expect("written");
        let option = DiskOption::at(DiskPlace::Image(path.clone()));
        let report = examine(&option);
        assert!(report.findings.iter().any(|one| one.fact == "size" && one.grade == Grade::Good));
        assert_eq!(std::fs::read(&path).expect("there"), vec![7; 4096]);
        assert_eq!(std::fs::read_dir(directory.path()).expect("there").count(), 1);
        let mirror = Some(MirrorOption { size: Some(4096), is_forced: false });
        let copy = examine(&DiskOption { mirror, ..option });
        let told = copy.findings.iter().find(|one| one.fact == "copy").expect("it is told");
        assert!(told.follows.contains("a new pair begins on it"), "{told:?}");
        assert!(!copy.findings.iter().any(|one| one.fact == SEEN), "nobody else needs to see it");
        let none = DiskPlace::Image(directory.path().join("none.img"));
        let to_be = examine(&DiskOption { mirror, ..DiskOption::at(none) });
        assert!(to_be.findings[0].grade == Grade::Good, "{:?}", to_be.findings);
        assert_eq!(std::fs::read_dir(directory.path()).expect("there").count(), 1);
        let missing = DiskOption::at(DiskPlace::Image(directory.path().join("none.img")));
        let report = examine(&missing);
        let first = &report.findings[0];
        assert!(first.grade == Grade::Bad && first.follows.contains("truncate"), "{first:?}");
    }
}
