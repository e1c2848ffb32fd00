//! A backup that is far behind goes on from checkpoints in the log: what it need not replay is not missing.

use crate::kill::finish;
use crate::stage::{LIMIT, Pair, Setup, held_script, let_end};
use std::time::Duration;
use vmft::api_client;
use vmft::pair::Which;
use vmft_backup::fault::{Fault, FaultOrder};
use vmft_backup::status::{Role, SideStatus};

const RECORDS: u32 = 30;
/// How far behind the backup is made to be.
const BEHIND: Duration = Duration::from_secs(2);

/// A pair whose backup receives and acknowledges, but has not replayed anything for a while: what the guest puts
/// out meanwhile is out. Where the backup stands still.
fn fallen_behind(more: &[&'static str]) -> (Pair, u64) {
    let both = ["--max-lag", "60s"].iter().chain(more).copied().collect();
    let mut pair = Pair::start(&Setup { both, ..Setup::default() });
    pair.type_in(&held_script(RECORDS, 1_500));
    pair.read_text("vmft-line 000002");
    let held = hold(&pair, 600_000);
    let behind = |status: &SideStatus| {
        let channel = status.channel.as_ref().expect("it is followed");
        channel.execution_lag_ms > BEHIND.as_secs_f64() * 1e3
    };
    pair.primary.wait_status(LIMIT, behind).unwrap();
    // Outputs and records of the stretch that the backup has not replayed.
    pair.read_text("vmft-record 000006 synced");
    (pair, held)
}

fn hold(pair: &Pair, ms: u64) -> u64 {
    let order = FaultOrder { fault: Fault::HoldReplay { ms }, live: false };
    api_client::fault(&pair.backup.api(), order).unwrap().point.get()
}

/// Kills the primary and lets the guest end on the backup, which has skipped so many points of so many.
fn kill_and_finish(pair: &mut Pair, held: u64) -> (u64, u64) {
    let behind = pair.status(Which::Primary).point - held;
    pair.side(Which::Primary).kill().unwrap();
    let status = pair.wait_role(Which::Backup, Role::Alone);
    println!("{} of {behind} points skipped: {:?}", status.points_skipped, status.failover);
    let_end(pair, Which::Backup);
    finish(pair, Which::Backup, RECORDS);
    assert_eq!(pair.generation(), 2, "one failover; {}", pair.report());
    (status.points_skipped, behind)
}

#[test]
fn a_backup_far_behind_goes_live_from_a_checkpoint_with_nothing_lost_or_repeated() {
    let (mut pair, held) = fallen_behind(&["--bound-replay", "100ms"]);
    let (skipped, behind) = kill_and_finish(&mut pair, held);
    assert!(skipped > behind / 2, "{skipped} of {behind}; {}", pair.report());
}

#[test]
fn without_the_bound_everything_is_replayed() {
    let (mut pair, held) = fallen_behind(&[]);
    assert_eq!(kill_and_finish(&mut pair, held).0, 0);
}

#[test]
fn a_backup_that_may_go_on_catches_up_by_checkpoints_and_agrees_from_there() {
    let both = vec!["--max-lag", "60s", "--bound-replay", "100ms"];
    let mut pair = Pair::start(&Setup { both, ..Setup::default() });
    pair.type_in(&held_script(RECORDS, 1_500));
    for round in 1..=3 {
        pair.read_text(&format!("vmft-line {:06}", 2 * round));
        hold(&pair, 1_000);
        pair.backup.wait_status(LIMIT, |status| status.replay_skips >= round).unwrap();
        let agreed = pair.status(Which::Backup).digests_agreed;
        let goes_on = |status: &SideStatus| status.digests_agreed >= agreed + 2;
        pair.backup.wait_status(LIMIT, goes_on).unwrap();
    }
    let status = pair.status(Which::Backup);
    assert_eq!((status.divergence, status.divergences), (None, 0), "{}", pair.report());
    let point = status.point;
    kill_and_finish(&mut pair, point);
}
