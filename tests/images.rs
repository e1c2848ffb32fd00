//! Images as they are shipped, made into raw disks.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};
use vmft_fuzzing::Random;

/// A disk with something in it, and holes.
fn disk() -> Vec<u8> {
    let mut random = Random::new(7);
    let mut disk = vec![0; 8 << 20];
    for at in [0, 3 << 20, (8 << 20) - 700] {
        disk[at..at + 600].copy_from_slice(&random.bytes(600));
    }
    disk
}

fn run(program: &str, arguments: &[&str], directory: &Path) -> Vec<u8> {
    let output = Command::new(program).args(arguments).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn import(directory: &Path, image: &str, disk: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmft"));
    command.args(["image", "import", image, disk]).current_dir(directory).output().unwrap()
}

/// What is said of an image that cannot be imported, of which nothing is left.
fn refused(directory: &Path, image: &str) -> String {
    let before = std::fs::read_dir(directory).unwrap().count();
    let output = import(directory, image, "refused.img");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(std::fs::read_dir(directory).unwrap().count(), before, "something is left");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn images_of_every_kind_become_the_disk_that_they_are_of() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    let disk = disk();
    let write = |name: &str, bytes: &[u8]| std::fs::write(place.join(name), bytes).unwrap();
    write("a.raw", &disk);
    write("a.gz", &run("gzip", &["-c", "a.raw"], place));
    write("a.xz", &run("xz", &["-c", "a.raw"], place));
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let half = disk.len() / 2;
    let frames = [&disk[..half], &disk[half..]];
    let frames = frames.map(|part| ruzstd::encoding::compress_to_vec(part, level));
    // Between two frames may be one that has nothing of the disk.
    write("a.zst", &[&frames[0][..], b"\x51\x2A\x4D\x18\x03\0\0\0abc", &frames[1]].concat());
    run("qemu-img", &["convert", "-O", "qcow2", "a.raw", "a.qcow2"], place);
    run("qemu-img", &["convert", "-O", "vmdk", "a.raw", "a.vmdk"], place);
    write("a.qcow2.xz", &run("xz", &["-c", "a.qcow2"], place));
    for image in ["a.raw", "a.gz", "a.xz", "a.zst", "a.qcow2", "a.vmdk", "a.qcow2.xz"] {
        let name = format!("{image}.img");
        let output = import(place, image, &name);
        assert!(output.status.success(), "{image}: {}", String::from_utf8_lossy(&output.stderr));
        let made = place.join(name);
        assert!(std::fs::read(&made).unwrap() == disk, "{image} has become something else");
        let blocks = made.metadata().unwrap().blocks();
        assert!(blocks * 512 < disk.len() as u64 / 4, "{image}: {blocks} blocks, no holes");
    }
}

#[test]
fn what_is_no_image_or_not_whole_is_refused_and_nothing_is_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    std::fs::write(place.join("a.raw"), disk()).unwrap();
    let packed = run("gzip", &["-c", "a.raw"], place);
    std::fs::write(place.join("cut.gz"), &packed[..packed.len() - 9]).unwrap();
    assert!(refused(place, "cut.gz").contains("unpacking cut.gz"), "it is not whole");
    std::fs::write(place.join("a.bz2"), b"BZh91AY&SY").unwrap();
    let said = refused(place, "a.bz2");
    assert!(said.contains("`bzip2 -dc < a.bz2 > FILE`"), "{said}");
    std::fs::write(place.join("none"), b"").unwrap();
    assert!(refused(place, "none").contains("has nothing in it"));
    assert!(refused(place, "missing").contains("opening missing"));
    run("tar", &["-cf", "a.tar", "a.raw"], place);
    let said = refused(place, "a.tar");
    assert!(said.contains("tar archive"), "{said}");
    let kept = std::fs::read(place.join("cut.gz")).unwrap();
    let output = import(place, "a.raw", "cut.gz");
    assert!(String::from_utf8_lossy(&output.stderr).contains("not overwritten"));
    assert!(std::fs::read(place.join("cut.gz")).unwrap() == kept);
    // A file whose last sector is not whole gets a whole one.
    std::fs::write(place.join("odd"), vec![1; 1000]).unwrap();
    assert!(import(place, "odd", "odd.img").status.success());
    assert_eq!(std::fs::metadata(place.join("odd.img")).unwrap().len(), 1024);
}
