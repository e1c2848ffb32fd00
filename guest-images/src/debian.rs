//! Debian's package manager: resolving, downloading and unpacking packages without installing.
//!
//! Package files are kept in the cache, in `packages`, since one kernel package serves several
//! recipes. Anything in there may be deleted at any time.

use crate::cache::Cache;
use crate::command::{self, command};
use crate::error::GuestError;
use crate::guest::{PackageSource, Unpacked};
use crate::manifest::{PackageRecord, Sha256};
use crate::packages::{PackageManager, is_root};
use crate::progress::Progress;
use std::fs;
use std::path::{Path, PathBuf};

/// What the package lists say of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    record: PackageRecord,
    /// Length of the package file in bytes.
    size: u64,
    /// Names in `Depends:`, the first of alternatives each.
    depends: Vec<String>,
}

/// The package manager of this host. Used by whoever has the cache's lock.
#[derive(Debug)]
pub(crate) struct Debian {
    /// Where package files are kept.
    store: PathBuf,
    lists_updated: bool,
}

impl PackageSource for Debian {
    fn check(&self) -> Result<(), GuestError> {
        match ["apt-get", "apt-cache", "dpkg-deb"]
            .into_iter()
            .find(|name| command::find(name).is_none())
        {
            Some(program) => Err(GuestError::NoPackageManager { program }),
            None => Ok(()),
        }
    }

    fn dependency(
        &mut self,
        name: &str,
        prefix: &str,
        progress: &mut dyn Progress,
    ) -> Result<String, GuestError> {
        let candidate = self.candidate(name, progress)?;
        let found = candidate.depends.into_iter().find(|depends| depends.starts_with(prefix));
        found.ok_or_else(|| GuestError::PackageContents {
            package: name.to_owned(),
            what: format!("dependency on {prefix}…"),
        })
    }

    fn fetch(
        &mut self,
        name: &str,
        directory: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Unpacked, GuestError> {
        let mut candidate = self.candidate(name, progress)?;
        let downloads = directory.join(format!("{name}.download"));
        let package = match self.package(&candidate, &downloads, progress) {
            // Lists older than the archive name files that are no longer there.
            Err(GuestError::Download { .. }) if is_root() && !self.lists_updated => {
                self.update(name, progress)?;
                candidate = self.candidate(name, progress)?;
                self.package(&candidate, &downloads, progress)?
            }
            other => other?,
        };
        progress.step(&format!("unpacking {name}"));
        let root = directory.join(format!("{name}.unpacked"));
        let mut unpack = command("dpkg-deb");
        unpack.arg("--extract").arg(&package).arg(&root);
        command::succeed(unpack)?;
        Ok(Unpacked { record: candidate.record, root })
    }
}

impl Debian {
    /// Keeps package files in `cache`.
    pub(crate) fn new(cache: &Cache) -> Self {
        Self { store: cache.directory().join("packages"), lists_updated: false }
    }

    /// The package's file, from the store or else downloaded into it.
    fn package(
        &self,
        candidate: &Candidate,
        downloads: &Path,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, GuestError> {
        let PackageRecord { name, sha256: expected, .. } = &candidate.record;
        let kept = self.store.join(format!("{name}-{:.12}.deb", expected.to_string()));
        if Sha256::of_file(&kept).is_ok_and(|found| found == *expected) {
            return Ok(kept);
        }
        let package = download(candidate, downloads, progress)?;
        let found = Sha256::of_file(&package).map_err(GuestError::file("reading", &package))?;
        if found != *expected {
            let (package, expected) = (name.clone(), *expected);
            return Err(GuestError::Checksum { package, expected, found });
        }
        fs::create_dir_all(&self.store).map_err(GuestError::file("making", &self.store))?;
        fs::rename(&package, &kept).map_err(GuestError::file("writing", &kept))?;
        Ok(kept)
    }

    /// What the lists say of `name`, renewed if they do not know it.
    fn candidate(
        &mut self,
        name: &str,
        progress: &mut dyn Progress,
    ) -> Result<Candidate, GuestError> {
        if let Some(candidate) = look_up(name)? {
            return Ok(candidate);
        }
        if !self.lists_updated {
            self.update(name, progress)?;
            if let Some(candidate) = look_up(name)? {
                return Ok(candidate);
            }
        }
        Err(GuestError::UnknownPackage { package: name.to_owned() })
    }

    fn update(&mut self, wanted: &str, progress: &mut dyn Progress) -> Result<(), GuestError> {
        if !is_root() {
            return Err(GuestError::ListsOutdated { package: wanted.to_owned() });
        }
        PackageManager::acquire(progress)?.update_lists(progress)?;
        self.lists_updated = true;
        Ok(())
    }
}

/// The version that would be installed, if it can be downloaded.
fn look_up(name: &str) -> Result<Option<Candidate>, GuestError> {
    let mut show = command("apt-cache");
    show.args(["show", "--no-all-versions", &format!("{name}:amd64")]);
    let outcome = command::run(show)?;
    if !outcome.status.success() {
        return Ok(None);
    }
    Ok(parse_candidate(&String::from_utf8_lossy(&outcome.stdout)))
}

/// Reads the first paragraph of `apt-cache show`. A package known only because it is installed
/// has no checksum, and is no candidate.
fn parse_candidate(text: &str) -> Option<Candidate> {
    let field = |name: &str| {
        text.lines()
            .take_while(|line| !line.is_empty())
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    };
    let depends = field("Depends").unwrap_or_default();
    Some(Candidate {
        record: PackageRecord {
            name: field("Package")?.to_owned(),
            version: field("Version")?.to_owned(),
            sha256: field("SHA256")?.parse().ok()?,
        },
        size: field("Size")?.parse().ok()?,
        depends: depends
            .split(',')
            .filter_map(|dependency| {
                dependency.split([' ', '|', '(', ':']).find(|word| !word.is_empty())
            })
            .map(str::to_owned)
            .collect(),
    })
}

/// Downloads into a directory of its own, which it empties first.
fn download(
    candidate: &Candidate,
    directory: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, GuestError> {
    let PackageRecord { name, version, .. } = &candidate.record;
    let megabytes = candidate.size.div_ceil(1 << 20);
    progress.step(&format!("downloading {name} {version} ({megabytes} MiB)"));
    if directory.exists() {
        fs::remove_dir_all(directory).map_err(GuestError::file("removing", directory))?;
    }
    fs::create_dir_all(directory).map_err(GuestError::file("making", directory))?;
    let mut get = command("apt-get");
    get.current_dir(directory);
    if is_root() {
        // The unprivileged user apt would otherwise use cannot write here, and apt would warn.
        get.args(["-o", "APT::Sandbox::User=root"]);
    }
    get.args(["-q", "download", &format!("{name}:amd64={version}")]);
    command::succeed(get)
        .map_err(|source| GuestError::Download { package: name.clone(), source })?;
    let unreadable = || GuestError::file("reading", directory);
    let entry = fs::read_dir(directory).map_err(unreadable())?.next();
    match entry.transpose().map_err(unreadable())? {
        Some(entry) => Ok(entry.path()),
        None => Err(GuestError::PackageContents { package: name.clone(), what: "file".to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::NoProgress;

    const SHOWN: &str = "\
Package: linux-image-cloud-amd64
Version: 6.1.99-1
Depends: linux-base (>= 4), linux-image-6.1.0-99-cloud-amd64 (= 6.1.99-1) | other, python3:any
Size: 1504
SHA256: ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad

Package: linux-image-cloud-amd64
Version: 5.0
";

    #[test]
    fn a_candidate_is_read_from_what_the_lists_say() {
        let candidate = parse_candidate(SHOWN).unwrap();
        assert_eq!(candidate.record.name, "linux-image-cloud-amd64");
        assert_eq!(candidate.record.version, "6.1.99-1");
        assert_eq!(candidate.record.sha256, Sha256::of(b"abc"));
        assert_eq!(candidate.size, 1504);
        assert_eq!(
            candidate.depends,
            ["linux-base", "linux-image-6.1.0-99-cloud-amd64", "python3"]
        );
    }

    #[test]
    fn a_package_in_the_store_is_not_downloaded() {
        let directory = tempfile::tempdir().unwrap();
        let debian = Debian::new(&Cache::new(directory.path()));
        // No archive has it: whoever tries to download it fails.
        let mut candidate = parse_candidate(SHOWN).unwrap();
        candidate.record.name = "no-such-package".to_owned();
        let kept = directory.path().join("packages/no-such-package-ba7816bf8f01.deb");
        let downloads = directory.path().join("downloads");
        let package = || debian.package(&candidate, &downloads, &mut NoProgress);
        fs::create_dir(directory.path().join("packages")).unwrap();
        fs::write(&kept, "abc").unwrap();
        assert_eq!(package().unwrap(), kept);
        fs::write(&kept, "abd").unwrap();
        assert!(package().is_err(), "a damaged file is not used");
    }

    #[test]
    fn a_package_that_is_only_installed_is_no_candidate() {
        let installed: String = SHOWN
            .lines()
            .filter(|line| !line.starts_with("SHA256"))
            .fold(String::new(), |text, line| text + line + "\n");
        assert_eq!(parse_candidate(&installed), None);
        assert_eq!(parse_candidate(""), None);
    }
}
