//! Kill, failover, protected again, kill: for as long as one likes.

use crate::relay::{RECORDS_UNTIL_KEY, Relay};
use std::process::Command;
use std::time::Instant;
use vmft_backup::status::Role;

const ROUNDS: usize = 20;

#[test]
fn twenty_rounds_of_kill_failover_and_protecting_again_lose_nothing() {
    let mut relay = Relay::start(&[]);
    relay.type_in(RECORDS_UNTIL_KEY);
    relay.read_text("vmft-line 000001");
    // One follows, one waits for its turn.
    let mut live = 0;
    let mut follower = relay.add_standby(&[0]);
    relay.wait_followed(0, 1);
    let mut waiting = relay.add_standby(&[0, follower]);
    for round in 1..=ROUNDS {
        relay.read_records(1);
        let killed = Instant::now();
        relay.kill(live);
        // Nobody helps: the one that followed goes on, and the one that waited joins it.
        relay.wait(follower, |status| matches!(status.role, Role::Alone | Role::Primary));
        let status = relay.wait_followed(follower, 1);
        println!("round {round}: protected again after {:?}", killed.elapsed());
        assert_eq!(status.generation, round as u64 + 1, "{}", relay.report());
        relay.read_records(1);
        relay.check_so_far();
        (live, follower) = (follower, waiting);
        waiting = relay.add_standby(&[live, follower]);
    }
    relay.finish(live);
}

/// Long enough for a host that takes its time to protect the guest again.
#[test]
fn the_demo_in_rounds_kills_whoever_is_live_and_ends_with_everything_there() {
    let words = ["demo", "--rounds", "2", "--lines", "240"];
    let output = Command::new(env!("CARGO_BIN_EXE_vmft")).args(words).output().unwrap();
    let (shown, said) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{shown}");
    for round in 1..=2 {
        assert!(said.contains(&format!("round {round}: protected again")), "{said}");
    }
}
