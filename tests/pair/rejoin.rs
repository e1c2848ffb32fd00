//! A backup joins a guest that is busy.

use crate::proxy::Proxy;
use crate::relay::{LOAD, RECORDS_UNTIL_KEY, Relay};
use vmft_backup::status::Role;

fn busy() -> Relay {
    let mut relay = Relay::start(&[]);
    relay.type_in(&format!("{LOAD}{RECORDS_UNTIL_KEY}"));
    relay.read_text("vmft-line 000003");
    relay
}

#[test]
fn a_backup_that_joins_a_busy_guest_agrees_with_it_and_takes_it_over() {
    let mut relay = busy();
    let standby = relay.add_standby(&[0]);
    let status = relay.wait_followed(0, 1);
    let join = status.join.expect("a backup has joined");
    println!("{join:?}");
    assert!(join.rounds >= 2, "the guest wrote while it was sent: {join:?}");
    relay.read_records(4);
    let point = relay.wait(0, |_| true).point;
    // Far enough for digests of memory the guest has written since.
    relay.wait(standby, |status| status.point > point + 60_000_000);
    relay.kill(0);
    let survivor = relay.wait(standby, |status| status.role == Role::Alone);
    assert!(survivor.digests_agreed > 0, "{survivor:?}");
    relay.read_records(3);
    relay.check_so_far();
    relay.finish(standby);
}

#[test]
fn a_join_cut_anywhere_costs_the_guest_nothing() {
    let mut relay = busy();
    let address = relay.address(0);
    let proxy = Proxy::to(address["tcp:".len()..].parse().unwrap());
    // In the handshake, in the kernel, in the first round, and far into the memory.
    let standby = relay.add_standby_at(&[format!("tcp:{}", proxy.address())]);
    for bytes in [600, 300_000, 14_000_000, 17_000_000] {
        proxy.cut_after(bytes);
        proxy.cut();
        relay.read_records(2);
        relay.check_so_far();
    }
    relay.wait_followed(0, 1);
    relay.read_records(2);
    relay.kill(0);
    relay.wait(standby, |status| status.role == Role::Alone);
    relay.read_records(2);
    relay.finish(standby);
}

#[test]
fn a_backup_killed_while_it_joins_costs_the_guest_nothing_and_the_next_one_joins() {
    let mut relay = busy();
    for _ in 0..3 {
        let standby = relay.add_standby(&[0]);
        relay.wait(standby, |status| status.role == Role::Joining);
        relay.kill(standby);
        relay.read_records(2);
        relay.check_so_far();
    }
    let standby = relay.add_standby(&[0]);
    relay.wait_followed(0, 1);
    relay.kill(0);
    relay.wait(standby, |status| status.role == Role::Alone);
    relay.read_records(2);
    relay.finish(standby);
}
