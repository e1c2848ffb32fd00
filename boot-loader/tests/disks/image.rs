//! Disk images, put together by the tools that distributions use: mke2fs, mkfs.vfat with mtools, sfdisk.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use vmft_boot_loader::{BootDiskError, Menu, OsFiles, Source};

/// Bytes of every file system here.
pub const VOLUME: usize = 4 << 20;
/// Where the first partition begins, in sectors.
const FIRST: usize = 2048;
/// UUID of the ext file system with this number.
pub fn ext_uuid(number: u8) -> String {
    format!("{number:08x}-1111-4222-8333-444444444444")
}

/// Files of a file system: path and contents.
pub type Files<'a> = &'a [(&'a str, &'a str)];

fn run(command: &mut Command, input: &str) {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes the files under `root`. What begins with `->` is a link.
fn write(root: &Path, files: Files) -> PathBuf {
    for (path, contents) in files {
        let place = root.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        match contents.strip_prefix("->") {
            Some(target) => std::os::unix::fs::symlink(target, place).unwrap(),
            None => std::fs::write(place, contents).unwrap(),
        }
    }
    root.to_owned()
}

/// An ext4 file system of this number; `features` are mke2fs's.
pub fn ext(number: u8, features: &str, files: Files) -> Vec<u8> {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    std::fs::create_dir(&root).unwrap();
    write(&root, files);
    let image = place.path().join("image");
    let mut make = Command::new("mke2fs");
    make.env("E2FSPROGS_FAKE_TIME", "1700000000").env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    make.args(["-q", "-F", "-t", "ext4", "-b", "1024", "-O", features, "-U", &ext_uuid(number)]);
    make.arg("-E").arg(format!("hash_seed={}", ext_uuid(number))).arg("-d").arg(&root);
    run(make.arg(&image).arg(format!("{}k", VOLUME >> 10)), "");
    std::fs::read(image).unwrap()
}

/// A FAT file system.
pub fn fat(files: Files) -> Vec<u8> {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    std::fs::create_dir(&root).unwrap();
    write(&root, files);
    let image = place.path().join("image");
    std::fs::write(&image, vec![0; VOLUME]).unwrap();
    let mut make = Command::new("mkfs.vfat");
    make.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(["-i", "1234ABCD"]);
    run(make.arg(&image), "");
    for entry in std::fs::read_dir(&root).unwrap() {
        let mut copy = Command::new("mcopy");
        run(copy.args(["-s", "-i"]).arg(&image).arg(entry.unwrap().path()).arg("::"), "");
    }
    std::fs::read(image).unwrap()
}

/// A disk with a table of this kind (`gpt` or `dos`), and volumes of these types. A type may have more of
/// sfdisk's words behind it.
pub fn partitioned(label: &str, volumes: &[(&str, &[u8])]) -> Vec<u8> {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk");
    let sectors = VOLUME / 512;
    let mut disk = vec![0; (FIRST + 1) * 512];
    let mut script = format!("label: {label}\n");
    if label == "gpt" {
        script += "first-lba: 2048\n";
    }
    script += match label {
        "gpt" => "label-id: 11111111-2222-3333-4444-555555555555\n",
        _ => "label-id: 0x1234abcd\n",
    };
    for (index, (kind, volume)) in volumes.iter().enumerate() {
        let start = FIRST + index * (sectors + 2048);
        let uuid = match label {
            "gpt" => format!(", uuid=aaaaaaaa-bbbb-cccc-dddd-{:012x}", index + 1),
            _ => String::new(),
        };
        // The chain of logical partitions lies between them.
        if *kind == "E" {
            script += &format!("start={start}, type=5\n");
        } else {
            script += &format!("start={start}, size={sectors}, type={kind}{uuid}\n");
        }
        disk.resize(start * 512, 0);
        disk.extend(*volume);
    }
    disk.resize(disk.len() + (2 << 20), 0);
    std::fs::write(&path, disk).unwrap();
    let mut divide = Command::new("sfdisk");
    divide.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(["--quiet", "--no-reread"]);
    run(divide.args(["--wipe", "never", "--wipe-partitions", "never"]).arg(&path), &script);
    std::fs::read(path).unwrap()
}

/// A disk in memory.
#[derive(Debug)]
struct Memory(Vec<u8>);

impl Source for Memory {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.0[at..at + data.len()]);
        Ok(())
    }
}

/// The menu of a disk.
pub fn menu(disk: &[u8]) -> Result<Menu, BootDiskError> {
    Menu::find(Rc::new(Memory(disk.to_vec())), "vda")
}

/// What a disk boots, by itself or where this entry is wanted.
pub fn boots(disk: &[u8], wanted: Option<&str>) -> OsFiles {
    let menu = menu(disk).unwrap();
    let entry = menu.entry(wanted).unwrap();
    menu.read(entry).unwrap()
}

/// Kernel, initramfs and command line as texts.
pub fn texts(files: &OsFiles) -> (String, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let initramfs = files.initramfs.as_deref().unwrap_or_default();
    (text(&files.kernel), text(initramfs), files.options.clone())
}

/// The same, to be compared with.
pub fn expected(kernel: &str, initramfs: &str, options: &str) -> (String, String, String) {
    (kernel.to_owned(), initramfs.to_owned(), options.to_owned())
}
