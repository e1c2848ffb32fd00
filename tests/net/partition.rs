//! Links are cut while both sides live: exactly one speaks, or none while none can reach the arbiter.

use crate::capture::{Capture, Seen};
use crate::echo::Echo;
use crate::lab;
use crate::stage::{LIMIT, Pair, Setup};
use std::time::{Duration, Instant};
use vmft::pair::Which;
use vmft_backup::status::Role;

/// How long silence is watched for. Longer than a side needs to suspect, decide and speak.
const SILENCE: Duration = Duration::from_secs(2);

/// A pair with a session, and captures of both hosts' wires.
struct Watched {
    pair: Pair,
    echo: Echo,
    captures: [Capture; 2],
}

impl Watched {
    fn start() -> Self {
        let pair = Pair::start(&Setup::default());
        let captures =
            ["a", "b"].map(|port| Capture::start(&pair.lab, port, pair.directory.path()));
        let echo = Echo::start(&pair.lab);
        echo.wait(20);
        Self { pair, echo, captures }
    }

    /// Waits until one side runs alone and the other has halted; returns the one that runs.
    fn wait_winner(&mut self) -> Which {
        let deadline = Instant::now() + LIMIT;
        loop {
            for which in [Which::Primary, Which::Backup] {
                if let Some(exit) = self.pair.side(which).try_exit().unwrap() {
                    assert_eq!(exit.code(), Some(1), "{}", self.pair.report());
                    self.pair.wait_role(which.other(), Role::Alone);
                    return which.other();
                }
            }
            assert!(Instant::now() < deadline, "nobody halts; {}", self.pair.report());
        }
    }

    /// The session goes on with the winner, and on the wires only one side ever spoke at a time.
    fn finish(self, winner: Which) {
        self.echo.wait(20);
        self.echo.finish();
        let [a, b] = self.captures.map(Capture::stop);
        let times = |seen: &[Seen]| -> Vec<Duration> {
            seen.iter().filter(|seen| seen.is_from_guest()).map(|seen| seen.at).collect()
        };
        let (a, b) = (times(&a), times(&b));
        match winner {
            Which::Primary => assert!(b.is_empty(), "the loser has spoken {} times", b.len()),
            Which::Backup => assert!(a.last() < b.first(), "both have spoken"),
        }
    }
}

#[test]
fn when_the_log_link_is_cut_exactly_one_side_speaks() {
    if lab::is_missing() {
        return;
    }
    let mut watched = Watched::start();
    watched.pair.lab.set_log_link(false);
    let winner = watched.wait_winner();
    println!("the {} goes on", winner.name());
    watched.finish(winner);
}

#[test]
fn when_the_log_link_is_cut_the_side_that_reaches_the_storage_speaks() {
    if lab::is_missing() {
        return;
    }
    for winner in [Which::Primary, Which::Backup] {
        let mut watched = Watched::start();
        watched.pair.set_storage(winner.other(), false);
        watched.pair.lab.set_log_link(false);
        watched.pair.wait_role(winner, Role::Alone);
        watched.echo.wait(20);
        // The loser finds out when it reaches the storage again.
        watched.pair.wait_role(winner.other(), Role::Deciding);
        watched.pair.set_storage(winner.other(), true);
        assert_eq!(watched.wait_winner(), winner);
        watched.finish(winner);
    }
}

#[test]
fn while_neither_side_reaches_the_storage_none_speaks_and_then_one_does() {
    if lab::is_missing() {
        return;
    }
    let mut watched = Watched::start();
    for which in [Which::Primary, Which::Backup] {
        watched.pair.set_storage(which, false);
    }
    watched.pair.lab.set_log_link(false);
    for which in [Which::Primary, Which::Backup] {
        watched.pair.wait_role(which, Role::Deciding);
    }
    let spoken = |watched: &Watched| -> usize {
        let from_guest =
            |capture: &Capture| capture.seen().into_iter().filter(Seen::is_from_guest).count();
        watched.captures.iter().map(from_guest).sum()
    };
    let before = spoken(&watched);
    let answers = watched.echo.answers();
    assert!(!watched.echo.wait_until(answers + 1, SILENCE), "the guest is heard");
    assert_eq!(spoken(&watched), before, "somebody speaks");
    for which in [Which::Primary, Which::Backup] {
        watched.pair.set_storage(which, true);
    }
    let winner = watched.wait_winner();
    println!("the {} goes on", winner.name());
    watched.finish(winner);
}

#[test]
fn when_only_the_storage_link_is_cut_the_pair_goes_on() {
    if lab::is_missing() {
        return;
    }
    for cut in [vec![Which::Primary], vec![Which::Backup], vec![Which::Primary, Which::Backup]] {
        let mut watched = Watched::start();
        for which in &cut {
            watched.pair.set_storage(*which, false);
        }
        watched.echo.wait(200);
        watched.pair.wait_role(Which::Primary, Role::Primary);
        watched.pair.wait_role(Which::Backup, Role::Backup);
        let primary = Which::Primary;
        watched.finish(primary);
    }
}
