//! Invariant 6: whoever stops on purpose, nobody takes over; and a new backup after a loss.

use crate::stage::{LIMIT, Pair, Setup, records_script, start_backup};
use nix::sys::signal::Signal;
use std::ffi::OsString;
use vmft::pair::Which;
use vmft_backup::status::Role;
use vmft_guest_images::disk::check_disk;

fn both_end_well_without_a_failover(pair: &mut Pair) {
    pair.read_to_end();
    for which in [Which::Primary, Which::Backup] {
        assert_eq!(pair.wait_exit(which).code(), Some(0), "{}", pair.report());
    }
    assert_eq!(pair.generation(), 1, "a stop is no failover; {}", pair.report());
    pair.check_console(Which::Primary);
}

#[test]
fn a_power_off_stops_both_sides() {
    let mut pair = Pair::start(&Setup::default());
    pair.type_in("poweroff\n");
    both_end_well_without_a_failover(&mut pair);
}

#[test]
fn a_power_off_by_sysrq_stops_both_sides() {
    let mut pair = Pair::start(&Setup::default());
    pair.type_in("echo o >/proc/sysrq-trigger\n");
    both_end_well_without_a_failover(&mut pair);
}

#[test]
fn an_interrupted_primary_stops_both_sides_in_the_middle_of_disk_writes() {
    for record in 1..=3 {
        let mut pair = Pair::start(&Setup::default());
        pair.type_in(&records_script(100));
        pair.read_text(&format!("vmft-line {record:06}"));
        pair.signal(Which::Primary, Signal::SIGINT);
        both_end_well_without_a_failover(&mut pair);
    }
}

#[test]
fn a_stop_by_the_api_stops_both_sides() {
    let mut pair = Pair::start(&Setup::default());
    pair.type_in("echo he''re\n");
    pair.read_text("here");
    vmft::api_client::shutdown(&pair.primary.api()).unwrap();
    both_end_well_without_a_failover(&mut pair);
}

#[test]
fn after_its_backup_has_left_a_primary_takes_the_next_one_and_may_die() {
    let records = 30;
    let mut pair = Pair::start(&Setup::default());
    pair.type_in(&records_script(records));
    pair.read_text("vmft-record 000002 synced");
    pair.signal(Which::Backup, Signal::SIGINT);
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
    let alone = pair.wait_role(Which::Primary, Role::Alone);
    assert_eq!(alone.generation, 2);

    let second = pair.directory.path().join("second");
    std::fs::create_dir(&second).unwrap();
    let address = alone.listening.unwrap();
    let listen: Vec<OsString> = vec!["--listen".into(), "tcp:127.0.0.1:0".into()];
    pair.backup = start_backup(&second, &address, &pair.disk, listen);
    pair.console.attach(&mut pair.backup).unwrap();
    pair.wait_role(Which::Backup, Role::Backup);
    let again = pair.primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    assert_eq!(again.generation, 2);
    let synced = pair.shown().synced.len();
    pair.read_text(&format!("vmft-record {:06} synced", synced + 2));
    pair.primary.kill().unwrap();
    pair.read_to_end();
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.generation(), 3, "{}", pair.report());
    assert_eq!(pair.console.merger().missing(), 0);
    let shown = pair.shown();
    let numbers: Vec<u32> = (1..=records).collect();
    assert_eq!((shown.lines, shown.synced, shown.done), (numbers.clone(), numbers, true));
    assert!(check_disk(&pair.disk).unwrap().clean);
}
