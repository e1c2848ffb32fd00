//! A Debian server of the user's own: made by Debian's tools, on one ext4 file system, without a boot loader.
//!
//! Its root logs in on the console without a password, which nobody can do over the network;
//! addresses come by DHCP. An image is kept in the cache, and each one that is asked for is a copy
//! of it.

use crate::cache::Cache;
use crate::command::{self, command};
use crate::disk::DiskSize;
use crate::error::GuestError;
use crate::manifest::Sha256;
use crate::packages::{E2FSPROGS, HostPackage, ensure_packages, is_root};
use crate::progress::Progress;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Makes a Debian system in a directory.
const MMDEBSTRAP: HostPackage = HostPackage { name: "mmdebstrap", program: "mmdebstrap" };
/// What every image has: a kernel for virtual machines, an init, and a network.
const PACKAGES: [&str; 7] = [
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "systemd-sysv",
    "udev",
    "dbus",
    "iproute2",
    "e2fsprogs",
];
/// Changes with what an image is made of besides packages.
const RECIPE: u32 = 1;

/// A release of Debian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebianRelease {
    /// Debian 12.
    Bookworm,
    /// Debian 13.
    Trixie,
}

impl DebianRelease {
    const fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

/// A Debian server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebianServer {
    /// Its release.
    pub release: DebianRelease,
    /// Its disk's size.
    pub size: DiskSize,
    /// Packages besides those that it needs.
    pub packages: Vec<String>,
}

impl DebianServer {
    fn cache_name(&self) -> String {
        let Self { release, size, packages } = self;
        let mut packages = packages.clone();
        packages.sort();
        let what = format!("{RECIPE} {} {} {}", release.name(), size.bytes(), packages.join(" "));
        format!("debian-{}-{:.12}", release.name(), Sha256::of(what.as_bytes()).to_string())
    }

    /// Writes the image to `output`, where nothing may be; makes it first, if it is not in the cache.
    ///
    /// # Errors
    /// [`GuestError`]; nothing is left at `output` then.
    pub fn write(
        &self,
        cache: &Cache,
        output: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), GuestError> {
        if output.symlink_metadata().is_ok() {
            let exists = std::io::ErrorKind::AlreadyExists.into();
            return Err(GuestError::file("writing", output)(exists));
        }
        let image = self.image(cache, progress)?;
        progress.step(&format!("copying the image to {}", output.display()));
        let mut copy = command("cp");
        copy.args(["--sparse=always", "--no-clobber"]).arg(image).arg(output);
        command::succeed(copy)?;
        Ok(())
    }

    fn image(&self, cache: &Cache, progress: &mut dyn Progress) -> Result<PathBuf, GuestError> {
        let name = self.cache_name();
        let kept = cache.directory().join(&name).join("disk.img");
        if kept.exists() {
            return Ok(kept);
        }
        if !is_root() {
            return Err(GuestError::NeedsRoot { what: "making a Debian system" });
        }
        ensure_packages(&[MMDEBSTRAP, E2FSPROGS], progress)?;
        let place = cache.build_directory("build-debian", progress)?;
        if kept.exists() {
            return Ok(kept);
        }
        let root = place.path().join("root");
        let packages: Vec<&str> =
            PACKAGES.into_iter().chain(self.packages.iter().map(String::as_str)).collect();
        progress.step(&format!(
            "making Debian {} of {} packages and what they need; this takes a minute or more",
            self.release.name(),
            packages.len()
        ));
        let mut make = command("mmdebstrap");
        make.args(["--variant=minbase", "--mode=root", "--quiet"]);
        make.arg("--aptopt=Acquire::Languages \"none\"");
        make.arg(format!("--include={}", packages.join(",")));
        command::succeed({
            make.arg(self.release.name()).arg(&root);
            make
        })?;
        configure(&root)?;
        progress.step("making its disk");
        let finished = place.path().join("finished");
        fs::create_dir(&finished).map_err(GuestError::file("making", &finished))?;
        let image = finished.join("disk.img");
        let mut make = command("mke2fs");
        make.args(["-q", "-F", "-t", "ext4", "-L", "root", "-d"]).arg(&root).arg(&image);
        make.arg(format!("{}k", self.size.bytes() >> 10));
        command::succeed(make)?;
        cache.lock(progress)?.install(&finished, &name)?;
        Ok(kept)
    }
}

/// Files that no package brings: path, contents.
const FILES: [(&str, &str); 4] = [
    ("etc/hostname", "debian\n"),
    ("etc/fstab", "/dev/vda / ext4 errors=remount-ro 0 1\n"),
    ("etc/systemd/network/80-dhcp.network", "[Match]\nName=e*\n[Network]\nDHCP=yes\n"),
    (
        // Of keys that are in an image, every copy of it has the same.
        "etc/systemd/system/ssh-host-keys.service",
        "[Unit]\nConditionPathExists=/usr/bin/ssh-keygen\n\
         ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key\nBefore=ssh.service\n\
         [Service]\nType=oneshot\nExecStart=/usr/bin/ssh-keygen -A\n\
         [Install]\nWantedBy=multi-user.target\n",
    ),
];
/// Units that are started.
const UNITS: [(&str, &str); 2] = [
    ("systemd-networkd.service", "/lib/systemd/system/systemd-networkd.service"),
    ("ssh-host-keys.service", "/etc/systemd/system/ssh-host-keys.service"),
];

fn configure(root: &Path) -> Result<(), GuestError> {
    for (path, contents) in FILES {
        let path = root.join(path);
        let directory = path.parent().expect("within the root");
        fs::create_dir_all(directory).map_err(GuestError::file("making", directory))?;
        fs::write(&path, contents).map_err(GuestError::file("writing", &path))?;
    }
    let wants = root.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants).map_err(GuestError::file("making", &wants))?;
    for (name, target) in UNITS {
        let link = wants.join(name);
        if link.symlink_metadata().is_err() {
            std::os::unix::fs::symlink(target, &link)
                .map_err(GuestError::file("writing", &link))?;
        }
    }
    let ssh = root.join("etc/ssh");
    for entry in fs::read_dir(&ssh).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
            let path = entry.path();
            fs::remove_file(&path).map_err(GuestError::file("removing", &path))?;
        }
    }
    // Root's password is empty: PAM lets such a one in on a console alone.
    let shadow = root.join("etc/shadow");
    let text = fs::read_to_string(&shadow).map_err(GuestError::file("reading", &shadow))?;
    let open = |line: &str| match line.strip_prefix("root:").and_then(|it| it.split_once(':')) {
        Some((_, rest)) => format!("root::{rest}\n"),
        None => format!("{line}\n"),
    };
    let text: String = text.lines().map(open).collect();
    let mut file = fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(&shadow)
        .map_err(GuestError::file("writing", &shadow))?;
    file.write_all(text.as_bytes()).map_err(GuestError::file("writing", &shadow))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_is_kept_by_names_all_that_it_is_made_of() {
        let server = |release, packages: &[&str], size: u64| DebianServer {
            release,
            size: DiskSize::from_bytes(size).expect("a size"),
            packages: packages.iter().map(|name| (*name).to_owned()).collect(),
        };
        let first = server(DebianRelease::Bookworm, &["a", "b"], 2 << 30).cache_name();
        assert_eq!(first, server(DebianRelease::Bookworm, &["b", "a"], 2 << 30).cache_name());
        for other in [
            server(DebianRelease::Trixie, &["a", "b"], 2 << 30),
            server(DebianRelease::Bookworm, &["a"], 2 << 30),
            server(DebianRelease::Bookworm, &["a", "b"], 4 << 30),
        ] {
            assert_ne!(first, other.cache_name());
        }
    }

    #[test]
    fn a_root_is_set_up_so_that_its_owner_can_log_in_on_the_console() {
        let root = tempfile::tempdir().expect("temporary directory");
        let root = root.path();
        for directory in ["etc/ssh", "etc/systemd/system"] {
            fs::create_dir_all(root.join(directory)).expect("made");
        }
        fs::write(root.join("etc/shadow"), "root:*:1:0:::::\ndaemon:*:1:0:::::\n").expect("made");
        fs::write(root.join("etc/ssh/ssh_host_rsa_key"), "secret").expect("made");
        configure(root).expect("set up");
        let read = |path: &str| fs::read_to_string(root.join(path)).expect("there");
        assert_eq!(read("etc/shadow"), "root::1:0:::::\ndaemon:*:1:0:::::\n");
        assert!(read("etc/fstab").starts_with("/dev/vda / ext4"));
        assert!(!root.join("etc/ssh/ssh_host_rsa_key").exists());
        configure(root).expect("set up again");
    }
}
