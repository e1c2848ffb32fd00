//! The Debian packages that recipes, tests and experiments need installed on the host, and how
//! they get there. This list is the only one.

use crate::command::{self, command};
use crate::error::GuestError;
use crate::lock::lock_file;
use crate::progress::Progress;
use std::fs::File;
use std::path::Path;

/// A Debian package, known by a program that it installs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPackage {
    /// Name of the package.
    pub name: &'static str,
    /// A program of it, or another file by its absolute path. Where this is, from whatever source,
    /// the package is not missed.
    pub program: &'static str,
}

/// Makes, checks and reads ext4 disk images.
pub const E2FSPROGS: HostPackage = HostPackage { name: "e2fsprogs", program: "mke2fs" };

/// Emulates a PC whose CPU has SVM, for the stock KVM host in a box; seabios comes with it.
pub const QEMU: HostPackage =
    HostPackage { name: "qemu-system-x86", program: "qemu-system-x86_64" };

/// Measure a network.
pub const NETWORK_PACKAGES: &[HostPackage] = &[
    HostPackage { name: "iperf3", program: "iperf3" },
    HostPackage { name: "iproute2", program: "ip" },
    HostPackage { name: "iputils-ping", program: "ping" },
];

/// Every package that is needed everywhere; [`QEMU`] is installed where it is first used.
pub const HOST_PACKAGES: &[HostPackage] = &[E2FSPROGS];

/// Sees to it that the packages are there: installs what is missing if run as root.
///
/// # Errors
/// [`GuestError::NotInstalled`] with the command to run, if not root;
/// [`GuestError::Command`] if the package manager fails.
pub fn ensure_packages(
    packages: &[HostPackage],
    progress: &mut dyn Progress,
) -> Result<(), GuestError> {
    let missing = missing(packages);
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root() || command::find("apt-get").is_none() {
        return Err(GuestError::NotInstalled { packages: missing.join(" ") });
    }
    let manager = PackageManager::acquire(progress)?;
    // Whoever had it before may have installed them.
    let missing = self::missing(packages);
    if missing.is_empty() || manager.install(&missing, progress).is_ok() {
        return Ok(());
    }
    // The lists may be empty or older than the archive.
    manager.update_lists(progress)?;
    manager.install(&missing, progress)
}

fn missing(packages: &[HostPackage]) -> Vec<&'static str> {
    let missing = packages.iter().filter(|package| command::find(package.program).is_none());
    missing.map(|package| package.name).collect()
}

/// The right to change what is installed, which one process has at a time: of two that run apt at once,
/// the second fails. For root only.
#[derive(Debug)]
pub(crate) struct PackageManager {
    _lock: File,
}

impl PackageManager {
    /// Where root alone may write, on every Debian.
    const LOCK: &str = "/run/vmft-packages.lock";
    /// Others on the host use apt as well, and a fresh host by itself: that is waited for, in seconds.
    const PATIENCE: &str = "DPkg::Lock::Timeout=600";

    /// Waits for another process of ours that has it.
    ///
    /// # Errors
    /// [`GuestError::File`].
    pub(crate) fn acquire(progress: &mut dyn Progress) -> Result<Self, GuestError> {
        let waiting = "waiting for another process that installs packages";
        Ok(Self { _lock: lock_file(Path::new(Self::LOCK), waiting, progress)? })
    }

    fn install(&self, names: &[&str], progress: &mut dyn Progress) -> Result<(), GuestError> {
        progress.step(&format!("installing {}", names.join(" ")));
        let mut get = command("apt-get");
        get.env("DEBIAN_FRONTEND", "noninteractive");
        // What the host has stays: a package that would take another's place is its operator's to choose.
        get.args([
            "-o",
            Self::PATIENCE,
            "-q",
            "-y",
            "--no-remove",
            "--no-install-recommends",
            "install",
        ]);
        get.args(names);
        command::succeed(get)?;
        Ok(())
    }

    /// Renews the package lists.
    pub(crate) fn update_lists(&self, progress: &mut dyn Progress) -> Result<(), GuestError> {
        progress.step("updating the package lists");
        let mut get = command("apt-get");
        get.args(["-o", Self::PATIENCE, "-q", "update"]);
        command::succeed(get)?;
        Ok(())
    }
}

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::NoProgress;

    #[test]
    fn a_package_whose_program_is_there_is_not_installed() {
        let shell = HostPackage { name: "no-such-package", program: "sh" };
        ensure_packages(&[shell], &mut NoProgress).unwrap();
    }
}
