//! The Debian packages that recipes, tests and experiments need installed on the host, and how
//! they get there. This list is the only one.

use crate::command::{self, command};
use crate::error::GuestError;
use crate::progress::Progress;

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
    let missing: Vec<&str> = packages
        .iter()
        .filter(|package| command::find(package.program).is_none())
        .map(|package| package.name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !is_root() || command::find("apt-get").is_none() {
        return Err(GuestError::NotInstalled { packages: names });
    }
    progress.step(&format!("installing {names}"));
    if install(&missing).is_ok() {
        return Ok(());
    }
    // The lists may be empty or older than the archive.
    update_lists(progress)?;
    progress.step(&format!("installing {names}"));
    install(&missing)
}

fn install(names: &[&str]) -> Result<(), GuestError> {
    let mut get = command("apt-get");
    get.env("DEBIAN_FRONTEND", "noninteractive");
    get.args(["-q", "-y", "--no-install-recommends", "install"]).args(names);
    command::succeed(get)?;
    Ok(())
}

/// Renews the package lists; only root may.
pub(crate) fn update_lists(progress: &mut dyn Progress) -> Result<(), GuestError> {
    progress.step("updating the package lists");
    let mut get = command("apt-get");
    get.args(["-q", "update"]);
    command::succeed(get)?;
    Ok(())
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
