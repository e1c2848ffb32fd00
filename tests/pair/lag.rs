//! A guest that outruns its backup: here the backup is stopped, so that it falls behind however slow its
//! primary is.

use crate::stage::{LIMIT, Pair, Setup};
use nix::sys::signal::Signal;
use std::time::Duration;
use vmft::pair::{Look, Which};
use vmft_backup::bounds::BoundChange;
use vmft_backup::lag::LagPolicy;
use vmft_backup::status::{Role, SideStatus};

/// Computes until a key is typed, and is seen to when it ends.
const COMPUTING: &str = "until read -r -t 0.001 -u 0 _; do c=0; while [ $c -lt 2000 ]; do c=$((c+1)); \
                         done; done; echo en''ded; poweroff\n";

fn is_behind(status: &SideStatus) -> bool {
    status.channel.as_ref().is_some_and(|channel| channel.execution_lag_ms > 400.0)
}

/// A pair whose guest computes and whose backup has been stopped for a while.
fn outrun(max_lag: &'static str) -> Pair {
    let both = vec!["--suspect-after", "60000", "--max-lag", max_lag];
    let mut pair = Pair::start(&Setup { both, ..Setup::default() });
    pair.type_in(COMPUTING);
    pair.read_text("poweroff\r\n");
    pair.signal(Which::Backup, Signal::SIGSTOP);
    pair.primary.wait_status(LIMIT, is_behind).unwrap();
    pair
}

/// Instructions in a while in which nothing is printed.
fn instructions(pair: &mut Pair) -> u64 {
    let before = pair.status(Which::Primary).point;
    assert_eq!(pair.console.look(Duration::from_millis(300)), Look::Nothing);
    pair.status(Which::Primary).point - before
}

fn end(pair: &mut Pair, survivors: &[Which]) {
    pair.type_in("\n");
    pair.read_text("ended");
    pair.read_to_end();
    for which in survivors {
        assert!(pair.wait_exit(*which).success(), "{}", pair.report());
    }
    pair.check_console(Which::Primary);
}

#[test]
fn a_guest_that_may_not_outrun_its_backup_waits_for_it_and_goes_on() {
    let mut pair = outrun("100ms,then=stop");
    assert_eq!(instructions(&mut pair), 0, "the guest ran on; {}", pair.report());
    assert_eq!(pair.generation(), 1);
    pair.signal(Which::Backup, Signal::SIGCONT);
    let stopped_at = pair.status(Which::Primary).point;
    pair.primary.wait_status(LIMIT, |status| status.point > stopped_at + 1_000_000).unwrap();
    end(&mut pair, &[Which::Primary, Which::Backup]);
}

#[test]
fn a_guest_that_waits_for_its_backup_goes_on_where_its_operator_lets_it_be_further_behind() {
    let mut pair = outrun("100ms,then=stop");
    assert_eq!(instructions(&mut pair), 0, "the guest ran on; {}", pair.report());
    let stopped_at = pair.status(Which::Primary).point;
    let further = BoundChange::MaxLag { ms: 60_000, then: LagPolicy::Stop };
    vmft::api_client::change_bound(&pair.primary.api(), further).unwrap();
    let goes_on = |status: &SideStatus| status.point > stopped_at + 1_000_000;
    let status = pair.primary.wait_status(LIMIT, goes_on).unwrap();
    assert_eq!(status.lag_bound_ms, Some(60_000), "{status:?}");
    let of_checkpoints = BoundChange::Interval { ms: 50 };
    let refused = vmft::api_client::change_bound(&pair.primary.api(), of_checkpoints);
    assert!(refused.unwrap_err().to_string().contains("--max-lag"));
    pair.signal(Which::Backup, Signal::SIGCONT);
    end(&mut pair, &[Which::Primary, Which::Backup]);
}

#[test]
fn an_operator_can_stop_a_guest_that_waits_for_its_backup() {
    let mut pair = outrun("100ms,then=stop");
    vmft::api_client::shutdown(&pair.primary.api()).unwrap();
    pair.signal(Which::Backup, Signal::SIGCONT);
    pair.read_to_end();
    for which in [Which::Primary, Which::Backup] {
        assert!(pair.wait_exit(which).success(), "{}", pair.report());
    }
    assert_eq!(pair.generation(), 1);
}

#[test]
fn a_guest_that_is_only_slowed_runs_on_slowly() {
    let mut pair = outrun("100ms,then=slow");
    assert!(instructions(&mut pair) > 0, "the guest was stopped; {}", pair.report());
    assert_eq!(pair.generation(), 1);
    let slowed = pair.primary.wait_status(LIMIT, |status| status.guest_slowed).unwrap();
    assert_eq!(slowed.lag_bound_ms, Some(100), "{slowed:?}");
    pair.signal(Which::Backup, Signal::SIGCONT);
    end(&mut pair, &[Which::Primary, Which::Backup]);
}

#[test]
fn a_primary_that_may_go_on_unprotected_does_and_says_so_and_the_backup_joins_again() {
    let mut pair = outrun("100ms,then=unprotect");
    let status = pair.wait_role(Which::Primary, Role::Alone);
    assert_eq!(status.generation, 2, "{}", pair.report());
    // It had been slowed for the sake of the one that it has given up.
    pair.primary.wait_status(LIMIT, |status| !status.guest_slowed).unwrap();
    let words = ["more than 100 ms behind", "running unprotected in generation 2"];
    pair.primary.wait_says(LIMIT, |said| words.iter().all(|word| said.contains(word))).unwrap();
    assert!(instructions(&mut pair) > 0, "the guest was stopped; {}", pair.report());
    pair.signal(Which::Backup, Signal::SIGCONT);
    pair.wait_role(Which::Primary, Role::Primary);
    assert_eq!(pair.generation(), 2, "{}", pair.report());
    end(&mut pair, &[Which::Primary, Which::Backup]);
}
