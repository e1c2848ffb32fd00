//! A real guest, recorded by one process and replayed by others.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::process::{Command, Output};
use vmft_guest_images::disk::{DiskSize, make_disk};

fn vmft(arguments: &[&str], directory: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmft"));
    let output = command.args(arguments).current_dir(directory).output().unwrap();
    println!("vmft {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    output
}

/// Standard output of a program that must succeed.
fn good(arguments: &[&str], directory: &Path) -> String {
    let output = vmft(arguments, directory);
    assert!(output.status.success(), "{}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The line that begins with `word`.
fn line<'a>(text: &'a str, word: &str) -> &'a str {
    text.lines().find(|line| line.starts_with(word)).unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn a_recorded_boot_replays_in_other_processes_to_the_same_state() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    make_disk(&directory.join("disk.img"), DiskSize::DEMO, "vmft-test").unwrap();
    let record = "record --log boot.log --memory size=96M --disk path=disk.img --serial file=live";
    let mut record: Vec<&str> = record.split(' ').collect();
    record.extend(["--cmdline", "vmft.run=demo vmft.lines=3 vmft.pause_ms=1"]);
    good(&record, directory);
    let live = std::fs::read(directory.join("live")).unwrap();
    assert!(String::from_utf8_lossy(&live).contains("vmft-record 000003 synced"));

    // The disk as it was is not needed any more, nor any disk at all.
    std::fs::remove_file(directory.join("disk.img")).unwrap();
    let replays = ["first", "second"].map(|name| {
        let console = format!("file={name}");
        let text = good(&["replay", "boot.log", "--serial", &console], directory);
        assert!(text.contains("the guest stopped: GuestPowerOff"), "{text}");
        assert!(!text.contains(" 0 digests agree"), "{text}");
        assert!(std::fs::read(directory.join(name)).unwrap() == live, "another console");
        line(&text, "state ").to_owned()
    });
    assert_eq!(replays[0], replays[1]);

    // Cut in the middle: what is good is replayed, and the end is said to be no end.
    let log = std::fs::read(directory.join("boot.log")).unwrap();
    std::fs::write(directory.join("cut.log"), &log[..log.len() - 1000]).unwrap();
    let cut = vmft(&["replay", "cut.log"], directory);
    assert_eq!(cut.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&cut.stdout).contains("digests agree"));
    let message = String::from_utf8_lossy(&cut.stderr);
    assert!(message.contains("cut.log"), "{message}");
}

/// So many instructions are checked, unless `VMFT_CHECKED_POINTS` says how many; `all`: the whole
/// boot.
const CHECKED_POINTS: &str = "20000000";

#[test]
fn a_boot_whose_compiled_code_is_checked_comes_to_the_same_state() {
    let points = std::env::var("VMFT_CHECKED_POINTS");
    let points = points.unwrap_or_else(|_| CHECKED_POINTS.to_owned());
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let record = "record --log boot.log --memory size=96M --serial file=live --cmdline";
    let mut record: Vec<&str> = record.split(' ').collect();
    record.push("vmft.run=bench-fork vmft.count=3");
    good(&record, directory);
    let states = ["check", "off"].map(|mode| {
        let mut replay = vec!["replay", "boot.log", "--serial", "null", "--soft-compiler", mode];
        if points != "all" {
            replay.extend(["--to", &points]);
        }
        let text = good(&replay, directory);
        line(&text, "state ").to_owned()
    });
    assert_eq!(states[0], states[1]);
}
