//! Disks with a kernel on them.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use vmft_guest_images::{Cache, NoProgress, default_guest};

/// How long anything may take that must come, on a busy host.
pub const LIMIT: Duration = Duration::from_secs(240);
/// Guest memory that its kernel and initramfs fit into.
pub const MEMORY: &str = "size=128M";
/// Where the first partition begins, in bytes.
const FIRST: u64 = 1 << 20;

pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmft"))
}

/// Runs one of the tools that make disks.
fn tool(name: &str, arguments: &[&str], input: &str) {
    let mut command = Command::new(name);
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{command:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A directory with the files of a disk in it: kernel and initramfs in `boot`, and `files`.
fn root(place: &Path, files: &[(&str, &str)]) -> PathBuf {
    let root = place.join("root");
    std::fs::create_dir_all(root.join("boot/grub")).unwrap();
    let guest = default_guest(&Cache::from_environment().unwrap(), &mut NoProgress).unwrap();
    std::fs::copy(guest.kernel, root.join("boot/vmlinuz-1")).unwrap();
    std::fs::copy(guest.initramfs, root.join("boot/initrd.img-1")).unwrap();
    for (path, contents) in files {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, contents).unwrap();
    }
    root
}

/// GRUB's configuration with one entry for each of these command lines.
pub fn grub(command_lines: &[&str]) -> String {
    let entry = |(number, words): (usize, &&str)| {
        format!(
            "menuentry 'guest {number}' --class debian --id entry-{number} {{\n\tload_video\n\
             \tlinux\t/boot/vmlinuz-1 root=/dev/vda ro {words}\n\tinitrd\t/boot/initrd.img-1\n}}\n"
        )
    };
    let entries: String = command_lines.iter().enumerate().map(entry).collect();
    format!("set default=\"0\"\nset timeout=5\n{entries}")
}

/// A disk that is one ext4 file system, with GRUB's configuration in it.
pub fn grub_disk(place: &Path, command_lines: &[&str]) -> PathBuf {
    let root = root(place, &[("boot/grub/grub.cfg", &grub(command_lines))]);
    let disk = place.join("web.img");
    ext4(&root, &disk);
    disk
}

fn ext4(root: &Path, image: &Path) {
    tool("mke2fs", &["-q", "-F", "-t", "ext4", "-d", text(root), text(image), "96M"], "");
}

/// A disk with an EFI system partition, whose entries have these command lines, and a root without a kernel.
pub fn esp_disk(place: &Path, command_lines: &[&str]) -> PathBuf {
    let guest = default_guest(&Cache::from_environment().unwrap(), &mut NoProgress).unwrap();
    let esp = place.join("esp");
    File::create(&esp).unwrap().set_len(48 << 20).unwrap();
    tool("mkfs.vfat", &["-F", "32", "-s", "1", text(&esp)], "");
    tool("mmd", &["-i", text(&esp), "::loader", "::loader/entries", "::debian"], "");
    let copy = |from: &Path, to: &str| tool("mcopy", &["-i", text(&esp), text(from), to], "");
    copy(&guest.kernel, "::debian/linux");
    copy(&guest.initramfs, "::debian/initrd.img");
    for (number, words) in command_lines.iter().enumerate() {
        let entry = format!(
            "title guest {number}\nversion {}\nsort-key guest\nlinux /debian/linux\ninitrd /debian/initrd.img\n\
             options root=PARTLABEL=root {words}\n",
            9 - number
        );
        let file = place.join("entry");
        std::fs::write(&file, entry).unwrap();
        copy(&file, &format!("::loader/entries/guest-{number}.conf"));
    }
    let disk = place.join("esp.img");
    let mut file = File::create(&disk).unwrap();
    file.set_len(FIRST).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).unwrap();
    std::io::copy(&mut File::open(&esp).unwrap(), &mut file).unwrap();
    file.set_len(64 << 20).unwrap();
    let script = "label: gpt\nstart=2048, size=98304, type=U\nstart=100352, type=L, name=root\n";
    tool("sfdisk", &["--quiet", "--no-reread", "--wipe", "never", text(&disk)], script);
    disk
}
