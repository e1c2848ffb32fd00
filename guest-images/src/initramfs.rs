//! What the initramfs is made of: busybox, the modules, and for the default guest our init.
//!
//! The host in a box gets its init, and what it is to run, in an archive of their own (the kernel
//! unpacks several, one after the other). It is not compressed: the host reads it faster than a guest could unpack it.

use crate::cpio::Archive;
use crate::modules::Module;
use crate::programs::Files;

/// First process of the guest.
pub(crate) const INIT: &str = include_str!("../init/init");
/// What every shell of the guest reads.
pub(crate) const PROFILE: &str = include_str!("../init/profile");

/// What the guest's DHCP client calls.
pub(crate) const DHCP: &str = include_str!("../init/dhcp.script");
/// What the guest's HTTP server runs for a body of any length.
pub(crate) const PATTERN: &str = include_str!("../init/pattern");
/// What starts the servers of the guest that has some.
pub(crate) const SERVERS: &str = include_str!("../init/servers");
/// What the guest's HTTP server shows.
pub(crate) const INDEX: &str = "vmft\n";

/// The default guest's archive.
pub(crate) fn build(busybox: &[u8], modules: &[Module], _: &Files) -> Vec<u8> {
    default(busybox, modules).finish()
}

/// The default guest's archive with programs of other packages, which are servers.
pub(crate) fn build_with_servers(busybox: &[u8], modules: &[Module], programs: &Files) -> Vec<u8> {
    let mut archive = default(busybox, modules);
    for directory in [
        "etc/dropbear",
        "lib/x86_64-linux-gnu",
        "lib64",
        "usr",
        "usr/bin",
        "usr/sbin",
        "var",
        "var/run",
    ] {
        archive.directory(directory);
    }
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file("etc/shells", 0o644, b"/bin/sh\n");
    archive.file("etc/rc.local", 0o644, SERVERS.as_bytes());
    for (path, contents) in programs {
        archive.file(path, 0o755, contents);
    }
    archive.finish()
}

fn default(busybox: &[u8], modules: &[Module]) -> Archive {
    let mut archive = base(busybox, modules);
    archive.file("etc/profile", 0o644, PROFILE.as_bytes());
    archive.file("etc/dhcp.script", 0o755, DHCP.as_bytes());
    archive.directory("srv");
    archive.directory("srv/cgi-bin");
    archive.file("srv/index.html", 0o644, INDEX.as_bytes());
    archive.file("srv/cgi-bin/pattern", 0o755, PATTERN.as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    archive
}

/// The same without anything of ours: a shell, and modules.
pub(crate) fn build_base(busybox: &[u8], modules: &[Module], _: &Files) -> Vec<u8> {
    base(busybox, modules).finish()
}

fn base(busybox: &[u8], modules: &[Module]) -> Archive {
    let mut archive = Archive::default();
    for directory in
        ["bin", "dev", "etc", "lib", "lib/modules", "mnt", "proc", "root", "run", "sys", "tmp"]
    {
        archive.directory(directory);
    }
    // The kernel opens it for init before anything can be mounted on /dev.
    archive.character_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, busybox);
    archive.symlink("bin/sh", "busybox");
    let mut order = String::new();
    for module in modules {
        let file = format!("{}.ko", module.name);
        archive.file(&format!("lib/modules/{file}"), 0o644, &module.contents);
        order.push_str(&file);
        order.push('\n');
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    archive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_parts_give_equal_bytes() {
        let modules = [
            Module { name: "b".to_owned(), contents: vec![1; 5] },
            Module { name: "a".to_owned(), contents: vec![2; 7] },
        ];
        let archive = build(b"busybox", &modules, &Files::new());
        assert_eq!(archive, build(b"busybox", &modules, &Files::new()));
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("b.ko\na.ko\n"), "the load order is kept");
    }

    #[test]
    fn the_scripts_are_good_shell() {
        for script in [INIT, PROFILE, DHCP, PATTERN, SERVERS] {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), script).unwrap();
            let checked = std::process::Command::new("sh").arg("-n").arg(file.path()).status();
            assert!(checked.unwrap().success());
        }
    }
}
