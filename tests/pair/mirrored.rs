//! Disks that are not shared: each side of a pair has a copy of its own.

use crate::relay::{RECORDS_UNTIL_KEY, Relay};
use crate::stage::{LIMIT, TURN, booted, program};
use crate::up::{Hosts, wait};
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::sync::PoisonError;
use vmft::pair::disk_argument;
use vmft_backup::mirror::record::{CopyState, Record};
use vmft_backup::mirror::report::CopyRole;
use vmft_backup::status::Role;

/// So many records fill a block of the guest's file system. What was flushed while somebody followed, and is not
/// written again, is on the survivor's copy only if the replay has put it there.
const BLOCK_OF_RECORDS: usize = 40;

/// A guest that writes and syncs until a key is typed, on side 0's copy.
fn writing(more: &[&str]) -> Relay {
    let mut relay = Relay::start_mirrored(more);
    relay.type_in(RECORDS_UNTIL_KEY);
    relay.read_text("vmft-line 000003");
    relay
}

/// What the record of a side's copy says.
fn record(relay: &Relay, side: usize) -> Record {
    vmft_backup::mirror::look(&relay.copy(side)).unwrap().expect("it says something")
}

/// Runs the program to its end, which is a failure; what it says.
fn refusal(arguments: &[OsString]) -> String {
    let output = Command::new(program()).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    said
}

fn words(text: &[&str]) -> Vec<OsString> {
    text.iter().map(Into::into).collect()
}

/// What a primary on a side's copy says that does not begin.
fn refused_primary(relay: &Relay, side: usize) -> String {
    let mut all = words(&["primary", "--no-wait", "--listen", "tcp:127.0.0.1:0", "--restore"]);
    all.push(booted().snapshot.clone().into());
    all.push("--disk".into());
    all.extend(relay.disk_words(side));
    refusal(&all)
}

fn survives(more: &[&str]) {
    let mut relay = writing(more);
    // A copy is made, and filled while the guest writes.
    let one = relay.add_standby(&[0]);
    let status = relay.wait_followed(0, 1);
    let join = status.join.expect("a backup has joined");
    assert!(join.disk_bytes > 0, "{join:?}");
    let copies = relay.wait(one, |status| status.role == Role::Backup).disk_copies;
    assert_eq!(copies.iter().map(|copy| copy.role).collect::<Vec<_>>(), [CopyRole::Following]);
    assert_eq!(record(&relay, 0).state, CopyState::Live);
    relay.read_records(BLOCK_OF_RECORDS);
    relay.kill(0);
    relay.wait(one, |status| status.role == Role::Alone);
    assert_eq!(record(&relay, one).state, CopyState::Live);
    relay.read_records(2);
    relay.check_so_far();

    // The host that comes back has an old copy: what differs is sent.
    relay.next_has_copy_of(0);
    let two = relay.add_standby(&[one]);
    let again = relay.wait_followed(one, 1).join.expect("a backup has joined");
    assert!(again.disk_bytes < join.disk_bytes, "{again:?} after {join:?}");
    relay.read_records(BLOCK_OF_RECORDS);
    relay.kill(one);
    relay.wait(two, |status| status.role == Role::Alone);
    relay.read_records(2);
    relay.finish(two);
}

#[test]
fn a_survivors_own_copy_has_every_write_and_an_old_copy_is_filled_up() {
    survives(&[]);
}

#[test]
fn so_it_is_in_checkpoint_mode() {
    survives(&["--protect", "checkpoint"]);
}

#[test]
fn after_the_guests_end_both_copies_are_the_same_and_either_may_begin_the_next() {
    let mut relay = writing(&[]);
    let one = relay.add_standby(&[0]);
    relay.wait_followed(0, 1);
    relay.read_records(2);
    relay.finish(0);
    relay.wait_end(one);
    let copies = [0, one].map(|side| std::fs::read(relay.copy(side)).unwrap());
    assert!(copies[0] == copies[1], "the copies differ");
    for side in [0, one] {
        assert_eq!(record(&relay, side).state, CopyState::Stopped);
    }
    let next = relay.begin_on_copy_of(one);
    let said = refused_primary(&relay, 0);
    assert!(said.contains("is used by another pair"), "{said}");
    relay.kill(next);
    let said = refused_primary(&relay, 0);
    assert!(said.contains("left behind in generation 1; generation 2 (the primary on"), "{said}");
    assert!(said.contains("force=on"), "{said}");
}

#[test]
fn after_both_hosts_were_lost_the_primarys_copy_begins_and_the_other_is_refused() {
    let mut relay = writing(&[]);
    let one = relay.add_standby(&[0]);
    relay.wait_followed(0, 1);
    relay.read_records(2);
    // Stopped first, so that it does not see its primary die.
    relay.sides.get_mut(&one).unwrap().signal(nix::sys::signal::Signal::SIGSTOP).unwrap();
    relay.kill(0);
    relay.kill(one);
    let said = refused_primary(&relay, one);
    assert!(said.contains("flushed writes of its last moments would be lost"), "{said}");
    let synced = relay.shown().synced.len();
    let two = relay.begin_on_copy_of(0);
    relay.type_in(
        "$bb mount -t ext4 /dev/vda $disk; echo has $($bb wc -l <$disk/records) records\n",
    );
    relay.read_text(" records\r\n");
    let text = String::from_utf8_lossy(&relay.text).into_owned();
    let count = text.rsplit("has ").find_map(|part| part.split(' ').next()?.parse::<usize>().ok());
    assert!(count.is_some_and(|count| count >= synced), "{synced} synced: {text}");
    // The other copy follows again.
    relay.next_has_copy_of(one);
    let three = relay.add_standby(&[two]);
    relay.wait_followed(two, 1);
    assert_eq!(record(&relay, three).generation.0, 2);
}

#[test]
fn what_is_no_copy_of_this_pair_is_left_alone() {
    let mut relay = writing(&[]);
    let primary = relay.address(0);
    let standby = |disk: &[OsString]| {
        let mut all = words(&["standby", "--listen", "tcp:127.0.0.1:0", "--join"]);
        all.push((&primary).into());
        all.push("--disk".into());
        all.extend(disk.iter().cloned());
        refusal(&all)
    };
    // A disk with something in it.
    let foreign = relay.copy(7);
    std::fs::copy(&booted().disk, &foreign).unwrap();
    let before = std::fs::read(&foreign).unwrap();
    let said = standby(&relay.disk_words(7));
    assert!(said.contains("something is in it, which would be overwritten"), "{said}");
    assert!(std::fs::read(&foreign).unwrap() == before, "it was changed");
    // The primary's own file.
    let said = standby(&relay.disk_words(0));
    assert!(said.contains("each side of a pair with mirror=on has a file of its own"), "{said}");
    // A copy of it with its record.
    let twin = relay.copy(8);
    std::fs::copy(relay.copy(0), &twin).unwrap();
    let record_of = |image: &Path| vmft_backup::mirror::record::path_of(image);
    std::fs::copy(record_of(&relay.copy(0)), record_of(&twin)).unwrap();
    let said = standby(&relay.disk_words(8));
    assert!(said.contains("or was copied with its record"), "{said}");
    // mirror=on is said on one side alone.
    let mut shared = relay.disk_words(9);
    shared[0] = disk_argument(&booted().disk);
    let said = standby(&shared);
    assert!(said.contains("disks and arbiter here") || said.contains("mirror=on"), "{said}");
    // The guest has noticed nothing.
    relay.read_records(2);
    relay.check_so_far();
}

#[test]
fn a_pair_with_copies_says_who_decides_and_replays_everything() {
    let directory = tempfile::tempdir().unwrap();
    let disk = format!("path={},mirror=on,size=1M", directory.path().join("a.img").display());
    let mut all = words(&["primary", "--no-wait", "--listen", "tcp:127.0.0.1:0", "--restore"]);
    all.push(booted().snapshot.clone().into());
    all.extend(words(&["--disk", &disk]));
    let said = refusal(&all);
    assert!(said.contains("--arbiter dir=PATH"), "{said}");
    let arbiter = format!("dir={}", directory.path().join("arbiter").display());
    all.extend(words(&["--arbiter", &arbiter, "--bound-replay", "100ms"]));
    let said = refusal(&all);
    assert!(said.contains("does not go with a disk's mirror=on"), "{said}");
    assert!(!directory.path().join("a.img").exists(), "nothing was made");
}

#[test]
fn of_two_hosts_that_come_up_again_the_one_begins_whose_copy_has_everything() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut hosts = Hosts::new();
    let probe = hosts.path().join("probe.img");
    std::fs::write(&probe, vec![0; 1 << 20]).unwrap();
    let there = disk_argument(&probe).into_string().unwrap();
    let cache = if there.ends_with("cache=writeback") { ",cache=writeback" } else { "" };
    let mut text = std::fs::read_to_string(hosts.file()).unwrap();
    for side in ["a", "b"] {
        let at = hosts.path().join(format!("{side}.img"));
        let disk = format!("disk = \"path={},mirror=on,size=1M{cache}\"", at.display());
        text = text.replace(&format!("[sides.{side}]"), &format!("[sides.{side}]\n{disk}"));
    }
    std::fs::write(hosts.file(), text).unwrap();

    let mut a = hosts.up("a");
    wait(&mut a, Role::Alone, 1);
    let mut b = hosts.up("b");
    wait(&mut b, Role::Backup, 1);
    wait(&mut a, Role::Primary, 1);
    // One host is lost, then the other; the first one comes up first.
    b.kill().unwrap();
    wait(&mut a, Role::Alone, 2);
    a.kill().unwrap();
    let mut b = hosts.up("b");
    b.wait_says(LIMIT, |said| {
        said.contains("it was left behind in generation 1; generation 2 (the primary on")
            && said.contains("follows whichever side begins")
    })
    .unwrap();
    let mut a = hosts.up("a");
    wait(&mut b, Role::Backup, 3);
    wait(&mut a, Role::Primary, 3);
}
