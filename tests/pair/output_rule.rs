//! Invariant 2: nothing is seen before its mark is acknowledged.

use crate::stage::{LIMIT, Pair, Setup, contains};
use nix::sys::signal::Signal;
use std::time::Duration;
use vmft::pair::{Look, Which};
use vmft_backup::status::Role;

/// What the disk's image holds.
fn disk_bytes(pair: &Pair) -> Vec<u8> {
    std::fs::read(&pair.disk).unwrap()
}

#[test]
fn every_output_waits_for_an_acknowledgement_however_late() {
    outputs_wait_however_late(&[]);
}

/// With `more` on both sides' command lines.
pub fn outputs_wait_however_late(more: &[&'static str]) {
    let late = vec!["--acknowledge-delay", "300"];
    let mut pair = Pair::start(&Setup { both: more.into(), backup: late, ..Setup::default() });
    pair.type_in(
        "$bb mount -t ext4 /dev/vda $disk; echo kept >$disk/file; sync $disk; echo d''one\n",
    );
    pair.read_text("done");
    let status = pair.status(Which::Primary);
    assert!(status.outputs_marked > 3, "{status:?}");
    // Half of the marks and the longest; the shortest is no shorter than the delay, because an
    // acknowledgement is not sent earlier.
    assert!(status.output_delay_us >= 300_000.0, "{status:?}");
    assert!(status.output_delay_worst_us >= 300_000.0, "{status:?}");
    vmft::api_client::shutdown(&pair.primary.api()).unwrap();
    pair.read_to_end();
    assert!(pair.wait_exit(Which::Primary).success(), "{}", pair.report());
    assert!(pair.wait_exit(Which::Backup).success(), "{}", pair.report());
    pair.check_console(Which::Primary);
}

#[test]
fn nothing_is_seen_while_the_backup_is_stopped_and_everything_after() {
    nothing_is_seen_while_the_backup_is_stopped(&[]);
}

/// With `more` on both sides' command lines.
pub fn nothing_is_seen_while_the_backup_is_stopped(more: &[&'static str]) {
    let both = more.iter().copied().chain(["--suspect-after", "60000"]).collect();
    let mut pair = Pair::start(&Setup { both, ..Setup::default() });
    // The file is there, so that writing to it has to read nothing.
    pair.type_in("$bb mount -t ext4 /dev/vda $disk; : >$disk/file; sync $disk; echo mo''unted\n");
    pair.read_text("mounted");
    pair.read_text("vmft:/# ");
    pair.type_in("read -r go; echo se''en; echo kept >$disk/file; sync $disk; echo syn''ced\n");
    // The shell echoes the line to its end, over two lines of its terminal, and then waits.
    pair.read_until(|text| contains(text, "read -r go") && text.ends_with(b"d\r\n"));
    pair.primary
        .wait_status(LIMIT, |status| status.guest_idle && status.outputs_waiting == 0)
        .unwrap();
    // A backup knows its guest's time, too.
    pair.backup.wait_status(LIMIT, |status| status.guest_time_ms > 0).unwrap();
    let (shown, disk) = (pair.text.len(), disk_bytes(&pair));

    pair.signal(Which::Backup, Signal::SIGSTOP);
    pair.type_in("\n");
    // The guest answers, in one output or several, and gets as far as its first disk write: it waits for
    // that.
    pair.primary
        .wait_status(LIMIT, |status| status.guest_idle && status.outputs_waiting > 1)
        .unwrap();
    let waits = pair.status(Which::Primary);
    assert_eq!(waits.role, Role::Primary, "nobody is suspected yet");
    assert_eq!(pair.console.look(Duration::from_millis(200)), Look::Nothing);
    assert_eq!(pair.text.len(), shown);
    assert!(disk_bytes(&pair) == disk, "a disk write was let out");

    pair.signal(Which::Backup, Signal::SIGCONT);
    pair.read_text("synced");
    assert!(contains(&pair.text, "seen"));
    assert!(disk_bytes(&pair) != disk, "the write came late, but it came");
    pair.type_in("poweroff\n");
    pair.read_to_end();
    assert!(pair.wait_exit(Which::Primary).success(), "{}", pair.report());
    assert!(pair.wait_exit(Which::Backup).success(), "{}", pair.report());
    pair.check_console(Which::Primary);
}
