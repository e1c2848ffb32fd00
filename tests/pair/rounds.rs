//! Kill, failover, protected again, kill: for as long as one likes.

use crate::relay::{RECORDS_UNTIL_KEY, Relay};
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
