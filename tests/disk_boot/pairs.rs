//! Pairs whose guest boots from the disk that they share.

use crate::image::{LIMIT, MEMORY, grub_disk, program};
use std::ffi::OsString;
use vmft::pair::{DemoConsole, SideProcess, Which, disk_argument, prefixed};
use vmft_backup::status::Role;
use vmft_guest_images::disk::{check_disk, read_disk_file};
use vmft_guest_images::workload::{DemoLine, RECORDS_FILE, Workload, count_records};

const RECORDS: u32 = 12;
/// Here the guest waits until somebody types.
const HOLD: u32 = 2;

#[test]
fn a_protected_guest_from_a_disk_survives_its_primary() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    let words = Workload::Demo { lines: RECORDS, pause_ms: 1 }.cmdline();
    let disk = grub_disk(place, &[&format!("{words} vmft.hold={HOLD} quiet")]);
    let channel = place.join("channel");
    let both = || ["--suspect-after".into(), "2000".into(), "--disk".into(), disk_argument(&disk)];
    let mut options: Vec<OsString> = both().into();
    options.extend(["--no-wait", "--memory", MEMORY, "--listen"].map(OsString::from));
    options.push(prefixed("unix:", &channel));
    let mut primary = SideProcess::start(program(), Which::Primary, place, &options).unwrap();
    let mut demo = DemoConsole::default();
    demo.console.attach(&mut primary).unwrap();
    let mut options: Vec<OsString> = both().into();
    options.extend(["--primary".into(), prefixed("unix:", &channel)]);
    let mut backup = SideProcess::start(program(), Which::Backup, place, &options).unwrap();
    demo.console.attach(&mut backup).unwrap();
    let said = |primary: &SideProcess, backup: &SideProcess| {
        format!("primary:\n{}backup:\n{}", primary.messages(), backup.messages())
    };
    demo.read(LIMIT, Some(DemoLine::Synced(HOLD))).unwrap();
    primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    demo.console.type_in(b"\n");
    demo.read(LIMIT, Some(DemoLine::Line(HOLD + 3))).unwrap();
    primary.kill().unwrap();
    let live = backup.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    assert_eq!(live.generation, 2);
    demo.read(LIMIT, None).unwrap_or_else(|error| panic!("{error}{}", said(&primary, &backup)));
    assert_eq!(demo.shown, DemoLine::all(RECORDS), "{}", said(&primary, &backup));
    assert!(backup.wait_exit(LIMIT).unwrap().success(), "{}", said(&primary, &backup));
    check_disk(&disk).unwrap();
    assert_eq!(count_records(&read_disk_file(&disk, RECORDS_FILE).unwrap()), Ok(RECORDS));
}
