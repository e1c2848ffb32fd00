//! Guests that an operator has stand still.

use crate::kill::finish;
use crate::stage::{HELD_AT, LIMIT, Pair, Setup, held_script, let_end};
use vmft::api_client;
use vmft::pair::Which;
use vmft_backup::status::{Role, SideStatus};

const RECORDS: u32 = HELD_AT + 2;
const ROUNDS: u32 = 100;

fn paused(both: &[&'static str]) -> Pair {
    let mut pair = Pair::start(&Setup { both: both.to_vec(), ..Setup::default() });
    pair.type_in(&held_script(RECORDS, ROUNDS));
    pair.read_text("vmft-line 000002");
    let refused = api_client::pause(&pair.backup.api()).unwrap_err().to_string();
    assert!(refused.contains("does not run the guest"), "{refused}");
    let refused = api_client::resume(&pair.primary.api()).unwrap_err().to_string();
    assert!(refused.contains("nothing is to be resumed"), "{refused}");
    api_client::pause(&pair.primary.api()).unwrap();
    pair
}

fn stands_still_protected(both: &[&'static str]) {
    let mut pair = paused(both);
    let before = pair.status(Which::Primary);
    assert_eq!((before.role, before.is_paused), (Role::Primary, true), "{}", pair.report());
    assert!(before.guest_waits_for.is_some_and(|why| why.contains("an operator has paused it")));
    // What else is asked of the side is done with the guest where it is.
    let snapshot = pair.directory.path().join("snapshot");
    api_client::snapshot(&pair.primary.api(), &snapshot).unwrap();
    let after = pair.status(Which::Primary);
    assert_eq!((after.role, after.point), (Role::Primary, before.point), "{}", pair.report());
    api_client::resume(&pair.primary.api()).unwrap();
    assert!(!pair.status(Which::Primary).is_paused, "it is answered when it is so");
    let goes_on = |status: &SideStatus| !status.is_paused && status.guest_waits_for.is_none();
    pair.primary.wait_status(LIMIT, goes_on).unwrap();
    pair.type_in("\n");
    finish(&mut pair, Which::Primary, RECORDS);
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.generation(), 1, "{}", pair.report());
    let events = std::fs::read_to_string(pair.primary.events()).unwrap();
    for kind in ["guest-stopped", "guest-resumed"] {
        assert_eq!(events.matches(&format!("\"kind\":\"{kind}\"")).count(), 1, "{kind}: {events}");
    }
}

#[test]
fn a_guest_that_is_paused_stands_still_protected_and_goes_on_when_it_is_resumed() {
    stands_still_protected(&[]);
}

#[test]
fn so_does_one_that_is_protected_by_checkpoints() {
    stands_still_protected(&["--protect", "checkpoint"]);
}

#[test]
fn a_survivor_knows_of_no_pause() {
    let mut pair = paused(&[]);
    pair.primary.kill().unwrap();
    let_end(&mut pair, Which::Backup);
    finish(&mut pair, Which::Backup, RECORDS);
}

#[test]
fn a_paused_guest_can_be_handed_over() {
    let mut pair = paused(&[]);
    api_client::switch(&pair.primary.api()).unwrap();
    assert_eq!(pair.wait_exit(Which::Primary).code(), Some(1), "{}", pair.report());
    let_end(&mut pair, Which::Backup);
    finish(&mut pair, Which::Backup, RECORDS);
}

#[test]
fn a_paused_guest_is_stopped_by_its_operator() {
    let mut pair = paused(&[]);
    api_client::shutdown(&pair.primary.api()).unwrap();
    assert_eq!(pair.wait_exit(Which::Primary).code(), Some(0), "{}", pair.report());
    assert_eq!(pair.wait_exit(Which::Backup).code(), Some(0), "{}", pair.report());
}
