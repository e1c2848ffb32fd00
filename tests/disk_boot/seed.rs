//! Disks made for cloud-init.

use crate::image::{LIMIT, MEMORY, grub_disk, program};
use crate::reboot::Shell;
use std::ffi::OsString;
use vmft::pair::{SideProcess, Which, disk_argument, prefixed};
use vmft_backup::status::Role;

#[test]
fn both_sides_have_the_same_seed_behind_their_disks_and_another_one_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    let disk = grub_disk(place, &["vmft.run=shell quiet"]);
    let seed = place.join("user-data");
    std::fs::write(&seed, "#cloud-config\nhostname: seeded\n").unwrap();
    let channel = place.join("channel");
    let both = |seed: &std::path::Path| {
        let disk = ["--disk".into(), disk_argument(&disk)];
        disk.into_iter().chain(["--seed".into(), seed.into()]).collect::<Vec<OsString>>()
    };
    let mut options = both(&seed);
    options.extend(["--no-wait", "--memory", MEMORY, "--listen"].map(OsString::from));
    options.push(prefixed("unix:", &channel));
    let mut primary = SideProcess::start(program(), Which::Primary, place, &options).unwrap();
    let mut shell = Shell::default();
    shell.console.attach(&mut primary).unwrap();
    shell.wait_for("vmft:/# ");
    shell.console.type_in(b"$bb grep -c 'CIDATA' /dev/vdb; $bb grep 'hostname: se' /dev/vdb\n");
    shell.wait_for("hostname: seeded\r\n");
    let other = place.join("other");
    std::fs::write(&other, "#cloud-config\nhostname: other\n").unwrap();
    let join = ["--primary".into(), prefixed("unix:", &channel)];
    let options: Vec<OsString> = both(&other).into_iter().chain(join.clone()).collect();
    let mut backup = SideProcess::start(program(), Which::Backup, place, &options).unwrap();
    assert_eq!(backup.wait_exit(LIMIT).unwrap().code(), Some(1));
    assert!(backup.messages().contains("seed"), "{}", backup.messages());
    let options: Vec<OsString> = both(&seed).into_iter().chain(join).collect();
    let _backup = SideProcess::start(program(), Which::Backup, place, &options).unwrap();
    primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
}
