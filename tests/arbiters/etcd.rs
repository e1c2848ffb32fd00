//! An etcd whose members die, stand still, and come back.

use crate::cluster::{Cluster, MEMBERS};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use vmft_backup::arbiter::{Arbiter, ArbiterError, Candidate, EtcdArbiter, EtcdPlace, Verdict};
use vmft_log::entry::Generation;
use vmft_logging_channel::transport::PeerAddress;

const LIMIT: Duration = Duration::from_secs(120);

fn candidate(id: &str) -> Candidate {
    Candidate { id: id.into(), host: "here".into(), pid: 1, role: "primary".into() }
}

/// A pair's arbiter, and that of its other side.
fn pair(cluster: &Cluster) -> (EtcdArbiter, EtcdArbiter) {
    let a = EtcdArbiter::create(&cluster.place("web")).unwrap();
    a.pair("pair").unwrap();
    a.share(&candidate("a")).unwrap();
    let b = EtcdArbiter::open(&cluster.place("web")).unwrap();
    b.pair_name().unwrap();
    b.share(&candidate("b")).unwrap();
    (a, b)
}

/// Asks until there is an answer, as a side does.
fn win(arbiter: &EtcdArbiter, generation: u64, id: &str) -> Verdict {
    let began = Instant::now();
    loop {
        match arbiter.try_win(Generation(generation), &candidate(id)) {
            Ok(verdict) => return verdict,
            Err(error) => assert!(began.elapsed() < LIMIT, "{error}"),
        }
    }
}

#[test]
fn a_majority_decides_and_less_than_that_decides_nothing() {
    let mut cluster = Cluster::start();
    let (a, b) = pair(&cluster);
    let lost = |id| Verdict::Lost { winner: candidate(id) };
    // Whichever member stands still, or is dead, the others decide.
    for member in 0..MEMBERS {
        let generation = 2 * member as u64 + 1;
        cluster.signal(member, Signal::SIGSTOP);
        assert_eq!(win(&a, generation, "a"), Verdict::Won);
        assert_eq!(win(&b, generation, "b"), lost("a"));
        cluster.signal(member, Signal::SIGCONT);
        cluster.kill(member);
        assert_eq!(win(&b, generation + 1, "b"), Verdict::Won);
        assert_eq!(win(&a, generation + 1, "a"), lost("b"));
        cluster.start_again([member]);
    }
    // Two are too many; when one of them is back, who asked first has it for good.
    cluster.kill(0);
    cluster.signal(1, Signal::SIGSTOP);
    let next = 2 * MEMBERS as u64 + 1;
    let away = a.try_win(Generation(next), &candidate("a"));
    assert!(matches!(away, Err(ArbiterError::Unreachable { .. })), "{away:?}");
    let away = b.winner(Generation(next - 1));
    assert!(matches!(away, Err(ArbiterError::Unreachable { .. })), "an old look: {away:?}");
    cluster.signal(1, Signal::SIGCONT);
    assert_eq!(win(&a, next, "a"), Verdict::Won);
    assert_eq!(win(&b, next, "b"), lost("a"));
    // The dead one learns what it has missed, and says it alone.
    cluster.start_again([0]);
    let mut alone = cluster.place("web");
    alone.members.truncate(1);
    let alone = EtcdArbiter::open(&alone).unwrap();
    assert_eq!(alone.winner(Generation(next)).unwrap(), Some(candidate("a")));
}

#[test]
fn an_etcd_with_tls_is_asked_by_those_who_have_a_certificate_of_its_authority() {
    let cluster = Cluster::start_with_tls();
    let (a, b) = pair(&cluster);
    assert_eq!(win(&a, 1, "a"), Verdict::Won);
    assert_eq!(win(&b, 1, "b"), Verdict::Lost { winner: candidate("a") });
    let refused = |members: Vec<PeerAddress>| {
        let opened = EtcdArbiter::open(&EtcdPlace { members, name: "web".to_owned() });
        assert!(matches!(opened, Err(ArbiterError::Unreachable { .. })), "{opened:?}");
    };
    let named = cluster.place("web").members;
    // The last member's certificate does not bear its address.
    refused(named[MEMBERS - 1..].to_vec());
    let other = Cluster::start_with_tls();
    for tls_dir in [None, Some(other.tls_dir())] {
        let with = |member| PeerAddress { tls_dir: tls_dir.clone(), ..member };
        refused(named.iter().cloned().map(with).collect());
    }
}

#[test]
fn a_lease_that_runs_out_takes_nothing_from_a_side_that_reigns() {
    let cluster = Cluster::start();
    let (a, b) = pair(&cluster);
    assert_eq!(win(&a, 1, "a"), Verdict::Won);
    drop(b);
    let is_in_use = || match EtcdArbiter::create(&cluster.place("web")) {
        Err(ArbiterError::InUse { .. }) => true,
        Ok(_) => false,
        Err(error) => panic!("{error}"),
    };
    assert!(is_in_use());
    // As after a freeze: all leases are gone.
    let leases = cluster.post(0, "/v3/lease/leases", "{}");
    let leases = leases.split(r#""ID":""#).skip(1).map(|rest| rest.split('"').next().unwrap());
    for lease in leases {
        cluster.post(0, "/v3/lease/revoke", &format!(r#"{{"ID":"{lease}"}}"#));
    }
    assert_eq!(win(&a, 1, "a"), Verdict::Won, "what is won is won");
    assert_eq!(a.winner(Generation(2)).unwrap(), None, "and nobody else has anything");
    // It notices by itself, and is there again.
    let began = Instant::now();
    while !is_in_use() {
        assert!(began.elapsed() < LIMIT);
    }
    // One that takes the place while nobody seems to be there goes on after the last generation: the one
    // that was there before finds that out.
    drop(a);
    let c = EtcdArbiter::create(&cluster.place("web")).unwrap();
    assert_eq!((c.pair("other").unwrap(), c.latest().unwrap()), ("pair".into(), Generation(1)));
}
