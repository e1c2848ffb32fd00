//! Two backups of one primary.

use crate::proxy::Proxy;
use crate::relay::{RECORDS_UNTIL_KEY, Relay};
use vmft_backup::status::Role;

/// Side 0, followed by 1 and 2, which know of each other.
fn three() -> Relay {
    let mut relay = Relay::start(&["--backups", "2"]);
    relay.type_in(RECORDS_UNTIL_KEY);
    relay.read_text("vmft-line 000001");
    let address = relay.address(0);
    follow(&mut relay, &address);
    relay
}

fn follow(relay: &mut Relay, address: &str) {
    // Where the first of the two listens is known once it runs; the second is told, and the first
    // tries the second by way of the primary's address only. Both try the other after a failover.
    let first = relay.add_standby_at(&[address.to_owned()]);
    relay.wait_followed(0, 1);
    let second = relay.add_standby(&[0, first]);
    assert_eq!((first, second), (1, 2));
    relay.wait_followed(0, 2);
    relay.read_records(2);
}

#[test]
fn when_the_primary_of_two_is_killed_one_goes_on_and_the_other_follows_it() {
    let mut relay = three();
    relay.kill(0);
    let live = relay.wait_one_live(&[1, 2]);
    let other = 3 - live;
    println!("side {live} goes on");
    if live == 2 {
        // The first does not know where the second listens: a new side takes its place.
        relay.kill(other);
        relay.add_standby(&[live]);
    }
    relay.wait_followed(live, 1);
    relay.read_records(2);
    relay.check_so_far();
    relay.finish(live);
}

#[test]
fn when_one_backup_of_two_is_killed_the_primary_goes_on_with_the_other() {
    let mut relay = three();
    relay.kill(2);
    let status = relay.wait(0, |status| status.generation == 2 && status.role == Role::Primary);
    assert_eq!(status.followers, 1, "{}", relay.report());
    relay.read_records(2);
    relay.check_so_far();
    // The one that is left has been told of the generation, and takes the next.
    relay.kill(0);
    let status = relay.wait(1, |status| status.role == Role::Alone);
    assert_eq!(status.generation, 3, "{}", relay.report());
    relay.read_records(2);
    relay.finish(1);
}

#[test]
fn a_backup_of_two_that_is_cut_off_does_not_stop_the_others_and_joins_again() {
    let mut relay = Relay::start(&["--backups", "2"]);
    relay.type_in(RECORDS_UNTIL_KEY);
    relay.read_text("vmft-line 000001");
    let target = relay.address(0);
    let proxy = Proxy::to(target["tcp:".len()..].parse().unwrap());
    let first = relay.add_standby(&[0]);
    relay.wait_followed(0, 1);
    let second = relay.add_standby_at(&[format!("tcp:{}", proxy.address()), target]);
    relay.wait_followed(0, 2);
    relay.read_records(2);
    proxy.cut();
    // Whoever wins, exactly one is live, and in the end two follow it or one does and one is gone.
    let live = relay.wait_one_live(&[0, first, second]);
    println!("side {live} goes on");
    relay.read_records(3);
    relay.check_so_far();
    relay.finish(live);
}
