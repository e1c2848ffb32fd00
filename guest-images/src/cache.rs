//! The directory in which fetched and built guests are kept.
//!
//! Any number of processes may use it at once: whoever changes it holds the lock, and every
//! result appears in its place by one rename, complete.

use crate::error::GuestError;
use crate::lock::lock_file;
use crate::progress::Progress;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// A directory for fetched and built guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// Keeps everything below `directory`, which is made when it is needed.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// The user's cache: `$VMFT_CACHE`, else `$XDG_CACHE_HOME/vmft`, else `~/.cache/vmft`.
    ///
    /// # Errors
    /// [`GuestError::NoCacheDirectory`] if none of the variables is set.
    pub fn from_environment() -> Result<Self, GuestError> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, GuestError> {
        let directory = |name: &str| variable(name).filter(|value| !value.is_empty());
        if let Some(path) = directory("VMFT_CACHE") {
            return Ok(Self::new(path));
        }
        // The XDG specification: a relative path is to be ignored.
        let base = directory("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| directory("HOME").map(|home| Path::new(&home).join(".cache")));
        base.map(|base| Self::new(base.join("vmft"))).ok_or(GuestError::NoCacheDirectory)
    }

    /// The directory itself.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Takes the lock, waiting for another process that has it.
    pub(crate) fn lock(&self, progress: &mut dyn Progress) -> Result<CacheLock<'_>, GuestError> {
        Ok(CacheLock { cache: self, _file: self.lock_file("lock", progress)? })
    }

    /// An empty directory named `name`, on the same file system as the entries, for whoever comes
    /// first; others wait. Whoever has it may hold the cache's lock as well, for short.
    pub(crate) fn build_directory(
        &self,
        name: &str,
        progress: &mut dyn Progress,
    ) -> Result<BuildDirectory, GuestError> {
        let lock = self.lock_file(&format!("{name}.lock"), progress)?;
        let path = self.directory.join(name);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(GuestError::file("removing", &path))?;
        }
        fs::create_dir(&path).map_err(GuestError::file("making", &path))?;
        Ok(BuildDirectory { path, _lock: lock })
    }

    fn lock_file(&self, name: &str, progress: &mut dyn Progress) -> Result<File, GuestError> {
        fs::create_dir_all(&self.directory)
            .map_err(GuestError::file("making the cache directory", &self.directory))?;
        let path = self.directory.join(name);
        lock_file(&path, "waiting for another process that prepares the guest", progress)
    }
}

/// A directory for a build that takes long, with a lock of its own; emptied and let go when dropped,
/// and emptied by the next where a crash has left it.
#[derive(Debug)]
pub(crate) struct BuildDirectory {
    path: PathBuf,
    _lock: File,
}

impl BuildDirectory {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BuildDirectory {
    fn drop(&mut self) {
        // What is left is removed by the next build.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The right to change the cache; let go when dropped, also by a crash.
#[derive(Debug)]
pub(crate) struct CacheLock<'a> {
    cache: &'a Cache,
    _file: File,
}

/// Prefix of directories under construction. What a crash leaves of them is cleared by the next.
const UNFINISHED: &str = ".unfinished-";

impl CacheLock<'_> {
    /// Where a finished entry of this name lies, or would lie.
    pub(crate) fn entry(&self, name: &str) -> PathBuf {
        self.cache.directory.join(name)
    }

    /// An empty directory on the same file system, to build an entry in.
    pub(crate) fn workspace(&self) -> Result<tempfile::TempDir, GuestError> {
        let directory = &self.cache.directory;
        for entry in fs::read_dir(directory).map_err(GuestError::file("reading", directory))? {
            let entry = entry.map_err(GuestError::file("reading", directory))?;
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(GuestError::file("removing", &path))?;
            }
        }
        tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(directory)
            .map_err(GuestError::file("making a directory in", directory))
    }

    /// Puts a finished directory in its place, instead of what was there. Whoever has files of
    /// the old one open keeps them.
    pub(crate) fn install(&self, finished: &Path, name: &str) -> Result<PathBuf, GuestError> {
        let target = self.entry(name);
        if target.exists() {
            let old = self.cache.directory.join(format!("{UNFINISHED}old-{name}"));
            fs::rename(&target, &old).map_err(GuestError::file("replacing", &target))?;
            fs::rename(finished, &target).map_err(GuestError::file("replacing", &target))?;
            fs::remove_dir_all(&old).map_err(GuestError::file("removing", &old))?;
        } else {
            fs::rename(finished, &target).map_err(GuestError::file("making", &target))?;
        }
        Ok(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::NoProgress;
    use std::fs::TryLockError;

    fn chosen(variables: &[(&str, &str)]) -> Result<PathBuf, GuestError> {
        let find = |name: &str| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        };
        Cache::from_variables(find).map(|cache| cache.directory)
    }

    #[test]
    fn the_directory_follows_the_variables_in_order() {
        let all = [("VMFT_CACHE", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")];
        assert_eq!(chosen(&all).unwrap(), Path::new("/a"));
        assert_eq!(chosen(&all[1..]).unwrap(), Path::new("/b/vmft"));
        assert_eq!(chosen(&all[2..]).unwrap(), Path::new("/c/.cache/vmft"));
        assert!(matches!(chosen(&[]), Err(GuestError::NoCacheDirectory)));
        assert_eq!(
            chosen(&[("VMFT_CACHE", ""), ("XDG_CACHE_HOME", "relative"), ("HOME", "/c")]).unwrap(),
            Path::new("/c/.cache/vmft")
        );
    }

    #[test]
    fn an_entry_replaces_the_one_before_it_whole() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().join("cache"));
        let lock = cache.lock(&mut NoProgress).unwrap();
        for (file, absent) in [("first", "second"), ("second", "first")] {
            let workspace = lock.workspace().unwrap();
            let finished = workspace.path().join("entry");
            fs::create_dir(&finished).unwrap();
            fs::write(finished.join(file), file).unwrap();
            let installed = lock.install(&finished, "entry").unwrap();
            assert!(installed.join(file).is_file());
            assert!(!installed.join(absent).exists());
        }
    }

    #[test]
    fn what_a_crash_left_unfinished_is_cleared() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path());
        let lock = cache.lock(&mut NoProgress).unwrap();
        let left = lock.workspace().unwrap().keep();
        let workspace = lock.workspace().unwrap();
        assert!(!left.exists());
        assert!(workspace.path().exists());
    }

    #[test]
    fn a_build_begins_in_an_empty_directory_and_leaves_none() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path());
        let left = directory.path().join("build");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("half"), "").unwrap();
        let build = cache.build_directory("build", &mut NoProgress).unwrap();
        assert!(build.path().is_dir() && !build.path().join("half").exists());
        let lock = cache.lock(&mut NoProgress).unwrap();
        drop(lock.workspace().unwrap());
        assert!(build.path().is_dir(), "others leave it alone");
        drop(build);
        assert!(!left.exists());
    }

    #[test]
    fn a_second_process_waits_for_the_lock() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path());
        let lock = cache.lock(&mut NoProgress).unwrap();
        let other = File::options().write(true).open(directory.path().join("lock")).unwrap();
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(lock);
        assert!(other.try_lock().is_ok());
    }
}
