//! Planned switches: the guest changes its host on purpose.

use crate::kill::finish;
use crate::stage::{HELD_AT, LIMIT, Pair, Setup, held_script, let_end, records_script};
use vmft::api_client;
use vmft::explain::{Story, read};
use vmft::pair::Which;
use vmft_backup::status::Role;

const RECORDS: u32 = 6;
const HELD_RECORDS: u32 = HELD_AT + 2;

#[test]
fn a_guest_that_is_handed_over_goes_on_at_its_backup_and_nothing_is_lost_or_repeated() {
    is_handed_over(&[]);
}

#[test]
fn so_does_one_that_is_protected_by_checkpoints_from_where_it_rests() {
    // No epoch is due where it is handed over: one is made to end there.
    is_handed_over(&["--protect", "checkpoint,interval=1s"]);
}

fn is_handed_over(both: &[&'static str]) {
    let mut pair = Pair::start(&Setup { both: both.to_vec(), ..Setup::default() });
    pair.type_in(&held_script(HELD_RECORDS, 100));
    pair.read_text("vmft-line 000002");
    let error = api_client::switch(&pair.backup.api()).unwrap_err().to_string();
    assert!(error.contains("does not run the guest"), "{error}");
    api_client::switch(&pair.primary.api()).unwrap();
    assert_eq!(pair.wait_exit(Which::Primary).code(), Some(1), "{}", pair.report());
    let said = pair.primary.messages();
    assert!(said.contains("halted: generation 2 was won by the backup"), "{said}");
    let_end(&mut pair, Which::Backup);
    finish(&mut pair, Which::Backup, HELD_RECORDS);
    assert_eq!(pair.generation(), 2, "{}", pair.report());
    let lives = read(&pair.backup.events()).unwrap();
    let story = Story::of(&lives);
    let [switch] = &story.failovers[..] else { panic!("one switch: {:?}", story.failovers) };
    assert!(switch.is_won() && switch.why.to_string().contains("hands the guest over"));
    // Everything was out: the first output of the new side is a new one.
    assert_eq!(switch.outputs.map(|(_, not_out)| not_out), Some(0), "{}", pair.report());
}

#[test]
fn a_side_that_nobody_follows_keeps_its_guest() {
    let mut pair = Pair::start(&Setup::default());
    pair.type_in(&records_script(RECORDS));
    pair.backup.kill().unwrap();
    pair.primary.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    let error = api_client::switch(&pair.primary.api()).unwrap_err().to_string();
    assert!(error.contains("no backup protects this side"), "{error}");
    finish(&mut pair, Which::Primary, RECORDS);
}
