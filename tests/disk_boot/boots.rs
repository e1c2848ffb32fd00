//! One machine.

use crate::image::{MEMORY, esp_disk, grub_disk, program};
use std::path::Path;
use std::process::{Command, Output};
use vmft_guest_images::disk::{DiskSize, make_disk, read_disk_file};
use vmft_guest_images::workload::{RECORDS_FILE, Workload, count_records};

const DEMO: Workload = Workload::Demo { lines: 3, pause_ms: 1 };

fn vmft(directory: &Path, arguments: &str) -> Output {
    let mut command = Command::new(program());
    let output = command.args(arguments.split(' ')).current_dir(directory).output().unwrap();
    println!("vmft {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// What a program says that must succeed, and the guest's console.
fn run(directory: &Path, arguments: &str) -> (String, String) {
    let arguments = format!("{arguments} --memory {MEMORY} --serial file=console");
    let output = vmft(directory, &arguments);
    assert!(output.status.success(), "{}", output.status);
    let console = std::fs::read(directory.join("console")).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (said, String::from_utf8_lossy(&console).into_owned())
}

/// What a program says that must refuse.
fn refused(directory: &Path, arguments: &str) -> String {
    let output = vmft(directory, arguments);
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn bench(count: u32) -> String {
    format!("vmft.run=bench-compute vmft.count={count} loglevel=7")
}

#[test]
fn a_disk_with_grub_boots_by_itself_and_behind_the_boards_words_come_its_own_and_the_users() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    let disk = grub_disk(place, &["vmft.run=demo", "vmft.run=idle"]);
    let (said, console) = run(place, "run --disk path=web.img --cmdline vmft.lines=2");
    assert!(
        said.contains("boots from disk web.img: GRUB's entry 0 (guest 0), kernel /boot/vmlinuz-1"),
        "{said}"
    );
    let words =
        " rcupdate.rcu_cpu_stall_suppress=1 root=/dev/vda ro vmft.run=demo vmft.lines=2\r\n";
    let line = console.lines().find(|line| line.contains("Command line: ")).unwrap();
    assert!(line.contains("console=ttyS0 noapic pci=conf1"), "{line}");
    assert!(
        format!("{line}\n").replace("\r\n", "\n").contains(&words.replace("\r\n", "\n")),
        "{line}"
    );
    assert!(console.contains("vmft-record 000002 synced"), "{console}");
    assert_eq!(count_records(&read_disk_file(&disk, RECORDS_FILE).unwrap()), Ok(2));
}

#[test]
fn entries_of_an_efi_system_partition_boot_and_can_be_chosen() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    esp_disk(place, &[&bench(1), &bench(2)]);
    for (option, count) in [("", 1), (" --boot-entry guest-1", 2), (" --boot-entry 1", 2)] {
        let (said, console) = run(place, &format!("run --disk path=esp.img{option}"));
        assert!(said.contains("boot loader entry "), "{said}");
        assert!(console.contains(&format!("vmft-bench compute end {count}")), "{console}");
        std::fs::remove_file(place.join("console")).unwrap();
    }
    let said = refused(place, "run --disk path=esp.img --boot-entry guest-7");
    assert!(said.contains("no boot entry is called guest-7"), "{said}");
    assert!(said.contains("1 (guest 1 (8))") && said.contains("--boot-entry takes"), "{said}");
}

#[test]
fn a_disk_for_data_is_the_default_guests_and_a_bootable_one_if_it_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    make_disk(&place.join("data.img"), DiskSize::DEMO, "vmft-test").unwrap();
    let words = DEMO.cmdline();
    // The first that has something to boot, wherever it is.
    grub_disk(place, &[&bench(1)]);
    let (said, console) = run(place, "run --disk path=data.img --disk path=web.img");
    assert!(said.contains("boots from disk web.img"), "{said}");
    assert!(console.contains("vmft-bench compute end 1"), "{console}");
    std::fs::remove_file(place.join("console")).unwrap();
    let mut command = Command::new(program());
    command.args(["run", "--disk", "path=web.img", "--boot", "kernel", "--serial", "file=console"]);
    let output = command.args(["--cmdline", &words]).current_dir(place).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let records = read_disk_file(&place.join("web.img"), RECORDS_FILE).unwrap();
    assert_eq!(count_records(&records), Ok(3));
    let said = refused(place, "run --disk path=data.img --boot disk");
    assert!(said.contains("no disk has something to boot"), "{said}");
}

#[test]
fn a_run_recorded_from_a_disk_replays_without_it() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    let disk = grub_disk(place, &[&format!("{} quiet", DEMO.cmdline())]);
    let (said, live) = run(place, "record --log boot.log --disk path=web.img");
    assert!(said.contains("boots from disk web.img"), "{said}");
    std::fs::remove_file(disk).unwrap();
    let output = vmft(place, "replay boot.log --serial file=replayed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let replayed = std::fs::read(place.join("replayed")).unwrap();
    assert!(String::from_utf8_lossy(&replayed) == live, "another console");
    assert!(live.contains("vmft-record 000003 synced"), "{live}");
}

#[test]
fn a_disk_that_is_meant_to_boot_and_cannot_is_refused_by_what_is_on_it() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    let disk = esp_disk(place, &[]);
    let file = std::fs::OpenOptions::new().write(true).open(disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"XFSB", 100_352 * 512).unwrap();
    let said = refused(place, "run --disk path=esp.img");
    for part in ["FAT on partition 1, xfs on partition 2", "--kernel FILE", "--boot kernel"] {
        assert!(said.contains(part), "{said}");
    }
}
