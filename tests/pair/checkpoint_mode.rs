//! Pairs kept by their state: what holds for lockstep holds for them, wherever an epoch is cut.

use crate::kill::finish;
use crate::output_rule;
use crate::random::Random;
use crate::relay::{LOAD, RECORDS_UNTIL_KEY, Relay};
use crate::stage::{LIMIT, Pair, Setup, records_script, start_backup};
use nix::sys::signal::Signal;
use std::ffi::OsString;
use vmft::pair::Which;
use vmft_backup::status::Role;

/// The option, for both sides.
const PROTECT: [&str; 2] = ["--protect", "checkpoint,interval=20ms"];
const RECORDS: u32 = 8;
const DEFAULT_SEED: u64 = 20_081_016;

fn setup(more: &[&'static str]) -> Setup {
    let both = PROTECT.iter().chain(more).copied().collect();
    Setup { both, ..Setup::default() }
}

fn writing(setup: &Setup) -> Pair {
    let mut pair = Pair::start(setup);
    pair.type_in(&records_script(RECORDS));
    // Keys that came after the last whole epoch are lost with their host. Once the first line is out,
    // all have been given.
    pair.read_text("vmft-line 000001");
    pair
}

fn epochs(pair: &mut Pair, which: Which) -> u64 {
    pair.status(which).epochs.map_or(0, |report| report.epochs)
}

/// The guest ends on the side that is left, with nothing lost, and only one failover was needed.
fn check_survivor(pair: &mut Pair, survivor: Which) {
    finish(pair, survivor, RECORDS);
    assert_eq!(pair.generation(), 2, "one failover; {}", pair.report());
}

#[test]
fn an_undisturbed_guest_ends_on_both_sides_without_a_failover() {
    let mut pair = writing(&setup(&[]));
    finish(&mut pair, Which::Primary, RECORDS);
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.generation(), 1, "a power-off is no failover; {}", pair.report());
}

#[test]
fn a_primary_killed_between_and_inside_epochs_loses_and_repeats_nothing() {
    let mut random = Random::seeded("kills of the primary by epochs", DEFAULT_SEED);
    for _ in 0..6 {
        let (record, more) = (random.within(1..7), random.within(0..12));
        println!("killing the primary {more} epochs after line {record}");
        let mut pair = writing(&setup(&[]));
        pair.read_text(&format!("vmft-line {record:06}"));
        let wanted = epochs(&mut pair, Which::Primary) + more;
        let enough = |status: &vmft_backup::status::SideStatus| {
            status.epochs.as_ref().is_some_and(|report| report.epochs >= wanted)
        };
        pair.primary.wait_status(LIMIT, enough).unwrap();
        pair.side(Which::Primary).kill().unwrap();
        check_survivor(&mut pair, Which::Backup);
    }
}

#[test]
fn an_epoch_cut_anywhere_on_its_way_leaves_the_one_before() {
    let mut random = Random::seeded("epochs cut on their way", DEFAULT_SEED);
    for _ in 0..6 {
        // An epoch of this guest comes to some ten or hundred kilobytes.
        let (record, bytes) = (random.within(1..7), random.within(1..200_000));
        println!("stopping the channel {bytes} bytes after line {record}");
        let patient = setup(&["--suspect-after", "60000"]);
        let mut pair = writing(&Setup { proxied: true, ..patient });
        pair.read_text(&format!("vmft-line {record:06}"));
        let usize_bytes = usize::try_from(bytes).unwrap();
        pair.proxy.as_ref().unwrap().go_silent_after(usize_bytes);
        while !pair.proxy.as_ref().unwrap().is_silent() {
            pair.read_now();
        }
        pair.side(Which::Primary).kill().unwrap();
        pair.proxy.as_ref().unwrap().cut();
        check_survivor(&mut pair, Which::Backup);
    }
}

#[test]
fn epochs_that_arrived_before_the_primary_died_are_applied_after_it() {
    let mut random = Random::seeded("epochs applied after a death", DEFAULT_SEED);
    for _ in 0..3 {
        let record = random.within(1..7);
        println!("the backup sleeps from line {record} until the primary is dead");
        let mut pair = writing(&setup(&["--suspect-after", "60000"]));
        pair.read_text(&format!("vmft-line {record:06}"));
        pair.signal(Which::Backup, Signal::SIGSTOP);
        // Whole epochs pile up in the hosts' buffers, for nobody acknowledges them.
        pair.primary.wait_status(LIMIT, |status| status.outputs_waiting > 0).unwrap();
        let wanted = epochs(&mut pair, Which::Primary) + 3;
        let enough = |status: &vmft_backup::status::SideStatus| {
            status.epochs.as_ref().is_some_and(|report| report.epochs >= wanted)
        };
        pair.primary.wait_status(LIMIT, enough).unwrap();
        pair.side(Which::Primary).kill().unwrap();
        pair.signal(Which::Backup, Signal::SIGCONT);
        check_survivor(&mut pair, Which::Backup);
    }
}

#[test]
fn a_backup_that_is_killed_costs_the_guest_nothing() {
    let mut pair = writing(&setup(&[]));
    pair.read_text("vmft-line 000003");
    pair.side(Which::Backup).kill().unwrap();
    check_survivor(&mut pair, Which::Primary);
}

#[test]
fn every_output_waits_for_its_epoch_however_late_that_is_acknowledged() {
    output_rule::outputs_wait_however_late(&PROTECT);
}

#[test]
fn nothing_is_seen_while_the_backup_of_epochs_is_stopped_and_everything_after() {
    output_rule::nothing_is_seen_while_the_backup_is_stopped(&PROTECT);
}

#[test]
fn a_busy_guest_is_handed_on_from_side_to_side() {
    let mut relay = Relay::start(&PROTECT);
    relay.type_in(&format!("{LOAD}{RECORDS_UNTIL_KEY}"));
    relay.read_text("vmft-line 000003");
    let mut live = 0;
    let mut follower = relay.add_standby(&[0]);
    relay.wait_followed(0, 1);
    for round in 1..=4 {
        let waiting = relay.add_standby(&[live, follower]);
        relay.read_records(2);
        relay.kill(live);
        relay.wait(follower, |status| matches!(status.role, Role::Alone | Role::Primary));
        let status = relay.wait_followed(follower, 1);
        assert_eq!(status.generation, round + 1, "{}", relay.report());
        relay.read_records(1);
        relay.check_so_far();
        (live, follower) = (follower, waiting);
    }
    relay.finish(live);
}

#[test]
fn a_second_backup_joins_between_two_epochs_and_takes_over_as_well_as_the_first() {
    let more: Vec<&str> = PROTECT.into_iter().chain(["--backups", "2"]).collect();
    let mut relay = Relay::start(&more);
    relay.type_in(RECORDS_UNTIL_KEY);
    relay.read_text("vmft-line 000001");
    let first = relay.add_standby(&[0]);
    relay.wait_followed(0, 1);
    relay.read_records(2);
    let second = relay.add_standby(&[0]);
    relay.wait_followed(0, 2);
    relay.read_records(2);
    // The one that has been there from the beginning goes, so the other must have everything.
    relay.kill(first);
    relay.wait(0, |status| status.generation == 2 && status.role == Role::Primary);
    relay.read_records(2);
    relay.kill(0);
    relay.wait(second, |status| status.role == Role::Alone);
    relay.read_records(2);
    relay.finish(second);
}

#[test]
fn sides_that_protect_differently_refuse_each_other_and_say_how() {
    let mut relay = Relay::start(&PROTECT);
    let address = relay.address(0);
    let directory = tempfile::tempdir().unwrap();
    let nothing: Vec<OsString> = Vec::new();
    let mut other = start_backup(directory.path(), &address["tcp:".len()..], relay.disk(), nothing);
    assert!(!other.wait_exit(LIMIT).unwrap().success());
    let said = other.messages();
    assert!(said.contains("its log says why") && said.contains("--protect"), "{said}");
    let wanted = "protection is \"checkpoint\" on the primary and \"lockstep\" on the backup";
    relay.wait_says(0, wanted);
    relay.type_in("poweroff\n");
    relay.wait_end(0);
}
