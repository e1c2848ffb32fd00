//! Why a guest could not be had.

use crate::command::CommandError;
use crate::manifest::Sha256;
use std::io;
use std::path::{Path, PathBuf};

/// Why a guest could not be had.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// There is no Debian package manager on this host.
    #[error(
        "the default guest comes from Debian packages and there is no {program} here: \
         give a kernel and an initramfs of your own with --kernel and --initramfs"
    )]
    NoPackageManager {
        /// The program that was looked for.
        program: &'static str,
    },
    /// The package lists are empty or out of date, and only root may renew them.
    #[error(
        "the package lists have no {package} to download: run `sudo apt-get update`, then try again"
    )]
    ListsOutdated {
        /// The package that was looked for.
        package: String,
    },
    /// Debian's archive, as configured on this host, does not have the package.
    #[error(
        "the package sources of this host have no {package}: add Debian's archive to them, \
         or give a kernel and an initramfs with --kernel and --initramfs"
    )]
    UnknownPackage {
        /// The package that was looked for.
        package: String,
    },
    /// Programs are missing and only root may install their packages.
    #[error("missing programs: run `sudo apt-get install {packages}`, then try again")]
    NotInstalled {
        /// The packages, separated by spaces.
        packages: String,
    },
    /// A package could not be downloaded.
    #[error(
        "downloading {package} (if the archive no longer has this version: `sudo apt-get update`)"
    )]
    Download {
        /// The package.
        package: String,
        /// The reason.
        #[source]
        source: CommandError,
    },
    /// What was downloaded is not what the package lists promise.
    #[error("{package} has checksum {found} instead of {expected}")]
    Checksum {
        /// The package.
        package: String,
        /// What the lists say.
        expected: Sha256,
        /// What the file has.
        found: Sha256,
    },
    /// A package does not hold what it used to.
    #[error("package {package} has no {what}")]
    PackageContents {
        /// The package.
        package: String,
        /// What was expected in it.
        what: String,
    },
    /// A kernel module cannot be read.
    #[error("kernel module {name}: {reason}")]
    Module {
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The lockstep kernel was not built on this host, or for another version of the recipe.
    #[error(
        "the lockstep kernel is not in the cache: `vmft guest --lockstep` builds it, which takes \
         some minutes"
    )]
    NotBuilt,
    /// The kernel's configuration tool did not accept what the recipe asks for.
    #[error("the kernel's source does not take {line:?} of the configuration")]
    KernelConfiguration {
        /// The line.
        line: String,
    },
    /// The kernel that was built holds what it must not.
    #[error("the kernel that was built cannot be followed")]
    Gate(#[source] vmft_kernel_gate::GateError),
    /// Only root can do that.
    #[error("{what} needs root: its files belong to many users")]
    NeedsRoot {
        /// What.
        what: &'static str,
    },
    /// No place for the cache.
    #[error("no cache directory: set VMFT_CACHE, XDG_CACHE_HOME or HOME")]
    NoCacheDirectory,
    /// A program failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A file could not be read or written.
    #[error("{action} {}", path.display())]
    File {
        /// What was being done, `reading`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

impl GuestError {
    /// For `map_err` on a file operation.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}
