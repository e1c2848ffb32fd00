//! The connection is cut, or a side stalls, while both live: exactly one goes on.

use crate::stage::{LIMIT, Pair, Setup, contains};
use nix::sys::signal::Signal;
use std::path::PathBuf;
use std::time::Instant;
use vmft::pair::Which;
use vmft_backup::status::Role;

/// Prints lines that tell when they were printed, so that two sides that both run on would not
/// print the same; ends when a key is typed.
const TICKER: &str = "until read -r -t 0.01 -u 0 _; do read -r up _ </proc/uptime; \
                      echo tick $up; done; echo tick''ed; poweroff\n";

fn ticking(setup: &Setup) -> Pair {
    let mut pair = Pair::start(setup);
    pair.type_in(TICKER);
    pair.read_until(|text| ticks(text) > 5);
    pair
}

fn ticks(text: &[u8]) -> usize {
    text.windows(6).filter(|window| *window == b"\ntick ").count()
}

/// Waits until one side runs alone and the other has halted; returns the one that runs.
fn wait_winner(pair: &mut Pair) -> Which {
    let deadline = Instant::now() + LIMIT;
    loop {
        for which in [Which::Primary, Which::Backup] {
            if let Some(exit) = pair.side(which).try_exit().unwrap() {
                assert_eq!(exit.code(), Some(1), "{}", pair.report());
                return which.other();
            }
        }
        assert!(Instant::now() < deadline, "nobody halts; {}", pair.report());
        pair.read_now();
    }
}

/// The winner runs on to the guest's end; the loser has halted, has said why, and has shown
/// nothing that is not the winner's history.
fn check_winner(pair: &mut Pair, winner: Which) {
    let (generation, loser) = (pair.generation(), winner.other());
    assert_eq!(generation, 2, "{}", pair.report());
    let exit = pair.wait_exit(loser);
    assert_eq!(exit.code(), Some(1), "{}", pair.report());
    let why = format!("generation 2 was won by the {}", winner.name());
    assert!(pair.side(loser).messages().contains(&why), "{}", pair.report());
    // The loser may have read who won before the winner has.
    let status = pair.wait_role(winner, Role::Alone);
    assert_eq!(status.generation, 2, "{}", pair.report());
    let before = ticks(&pair.text);
    pair.read_until(|text| ticks(text) > before + 5);
    pair.type_in("\n");
    pair.read_text("ticked");
    pair.read_to_end();
    assert!(pair.wait_exit(winner).success(), "{}", pair.report());
    pair.check_console(winner);
}

#[test]
fn when_the_connection_is_cut_one_side_goes_on_and_the_other_says_who() {
    for round in 0..3 {
        let mut pair = ticking(&Setup { proxied: true, ..Setup::default() });
        pair.proxy.as_ref().unwrap().cut();
        let winner = wait_winner(&mut pair);
        println!("round {round}: the {} goes on", winner.name());
        check_winner(&mut pair, winner);
    }
}

#[test]
fn when_the_connection_falls_silent_one_side_goes_on_and_the_other_says_who() {
    let mut pair = ticking(&Setup { proxied: true, ..Setup::default() });
    pair.proxy.as_ref().unwrap().go_silent();
    let winner = wait_winner(&mut pair);
    check_winner(&mut pair, winner);
}

#[test]
fn a_stalled_primary_that_is_continued_shows_nothing_of_its_own_and_halts() {
    let mut pair = ticking(&Setup::default());
    pair.signal(Which::Primary, Signal::SIGSTOP);
    pair.wait_role(Which::Backup, Role::Alone);
    let before = ticks(&pair.text);
    pair.read_until(|text| ticks(text) > before + 5);
    // What was acknowledged before it was stopped may still come out, and is the survivor's history
    // as well. What its guest would print now has other times in it, which `check_winner` would see.
    pair.signal(Which::Primary, Signal::SIGCONT);
    check_winner(&mut pair, Which::Backup);
}

#[test]
fn a_stalled_backup_that_is_continued_halts_and_the_primary_goes_on() {
    let mut pair = ticking(&Setup::default());
    pair.signal(Which::Backup, Signal::SIGSTOP);
    pair.wait_role(Which::Primary, Role::Alone);
    pair.signal(Which::Backup, Signal::SIGCONT);
    check_winner(&mut pair, Which::Primary);
    assert_eq!(pair.witness(Which::Backup).end(), 0, "the backup has shown something");
}

/// The arbiter's directory, moved away.
struct Away {
    path: PathBuf,
    away: PathBuf,
}

impl Away {
    fn from(pair: &Pair) -> Self {
        let mut path = pair.disk.clone().into_os_string();
        path.push(".vmft");
        let path = PathBuf::from(path);
        let away = pair.directory.path().join("away");
        std::fs::rename(&path, &away).unwrap();
        Self { path, away }
    }

    fn back(self) {
        std::fs::rename(&self.away, &self.path).unwrap();
    }
}

/// Both sides ask an arbiter that does not answer; what the pair has shown does not grow while
/// the primary's guest runs on.
fn both_waiting() -> (Pair, Away) {
    let mut pair = ticking(&Setup { proxied: true, ..Setup::default() });
    let away = Away::from(&pair);
    pair.proxy.as_ref().unwrap().cut();
    pair.wait_role(Which::Primary, Role::Deciding);
    pair.wait_role(Which::Backup, Role::Deciding);
    pair.read_now();
    let shown = pair.console.merger().end();
    let held = pair.status(Which::Primary).outputs_waiting;
    let more = |status: &vmft_backup::status::SideStatus| status.outputs_waiting > held + 20;
    pair.primary.wait_status(LIMIT, more).unwrap();
    pair.read_now();
    let leaked = pair.console.merger().end() - shown;
    assert_eq!(leaked, 0, "bytes came without a decision; {}", pair.report());
    (pair, away)
}

#[test]
fn while_the_arbiter_is_away_both_wait_and_then_one_goes_on() {
    let (mut pair, away) = both_waiting();
    let directory = pair.directory.path().join("snapshot");
    let refusal = vmft::api_client::snapshot(&pair.backup.api(), &directory).unwrap_err();
    assert!(refusal.to_string().contains("about to take over"), "{refusal:#}");
    // The primary's guest runs; only what it says waits.
    vmft::api_client::snapshot(&pair.primary.api(), &directory).unwrap();
    away.back();
    let winner = wait_winner(&mut pair);
    check_winner(&mut pair, winner);
}

#[test]
fn a_backup_that_waits_for_the_arbiter_can_be_stopped() {
    let (mut pair, away) = both_waiting();
    pair.signal(Which::Backup, Signal::SIGINT);
    assert!(pair.wait_exit(Which::Backup).success(), "{}", pair.report());
    away.back();
    pair.wait_role(Which::Primary, Role::Alone);
    pair.type_in("\n");
    pair.read_to_end();
    assert!(contains(&pair.text, "ticked"));
    assert!(pair.wait_exit(Which::Primary).success(), "{}", pair.report());
    pair.check_console(Which::Primary);
}
