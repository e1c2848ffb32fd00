//! The output rule on the wire: nothing leaves before its acknowledgement.

use crate::capture::{Capture, Seen};
use crate::lab::{self, GUEST, MAC};
use crate::stage::{Pair, Setup};
use std::time::Duration;
use vmft::pair::Which;

/// How late the backup acknowledges.
const LATE: Duration = Duration::from_millis(150);

/// Packets among which the announcement must have been repeated: more than a guest can send meanwhile.
const ENOUGH: usize = 20_000;

/// The identifier and sequence of an ICMP echo message of this type.
fn echo_message(seen: &Seen, kind: u8) -> Option<[u8; 4]> {
    let frame = &seen.frame;
    let is_echo = frame.get(12..14) == Some(&[8, 0][..])
        && frame.get(23) == Some(&1)
        && frame.get(34) == Some(&kind);
    is_echo.then(|| frame[38..42].try_into().unwrap())
}

/// Pings the guest, and returns how long each answer took to come out of host `a`'s wire.
fn answered_after(pair: &Pair, count: u32) -> Vec<Duration> {
    let directory = pair.directory.path();
    let questions = Capture::start(&pair.lab, "c", directory);
    let answers = Capture::start(&pair.lab, "a", directory);
    let ping = ["-n", "-i", "0.3", "-w", "60", "-c", &count.to_string(), GUEST];
    let output = pair.client("ping").args(ping).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let (questions, answers) = (questions.stop(), answers.stop());
    let answered = |question: &Seen| {
        let name = echo_message(question, 8)?;
        let is_answer = |seen: &&Seen| seen.is_from_guest() && echo_message(seen, 0) == Some(name);
        answers.iter().find(is_answer).map(|answer| answer.at - question.at)
    };
    questions.iter().filter_map(answered).collect()
}

#[test]
fn no_packet_leaves_before_the_backup_has_acknowledged_it() {
    if lab::is_missing() {
        return;
    }
    let late = LATE.as_millis().to_string();
    let late: &'static str = late.leak();
    let setup = Setup { backup: vec!["--acknowledge-delay", late], ..Setup::default() };
    let mut pair = Pair::start(&setup);
    let protected = answered_after(&pair, 8);
    assert!(protected.len() >= 8, "{protected:?} {}", pair.report());
    assert!(protected.iter().all(|after| *after >= LATE), "{protected:?}");
    // The wire itself is not what is slow.
    pair.kill(Which::Backup);
    let alone = answered_after(&pair, 8);
    assert!(alone.iter().filter(|after| **after < LATE).count() >= 5, "{alone:?}");
}

#[test]
fn only_the_live_side_is_on_the_network_and_it_says_so_before_anything_else() {
    if lab::is_missing() {
        return;
    }
    let mut pair = Pair::start(&Setup::default());
    let capture = Capture::start(&pair.lab, "b", pair.directory.path());
    let echo = crate::echo::Echo::start(&pair.lab);
    echo.wait(50);
    assert!(!capture.seen().iter().any(Seen::is_from_guest), "the backup is on the network");
    pair.kill(Which::Primary);
    // The guest may answer any number of times before the announcement is due again.
    let announcements = || capture.seen().iter().filter(|seen| seen.is_rarp()).count();
    let enough = echo.answers() + 50;
    while echo.answers() < enough || announcements() < 2 {
        assert!(capture.seen().len() < ENOUGH, "it is repeated");
        echo.wait(10);
    }
    echo.finish();
    let ours: Vec<Seen> = capture.stop().into_iter().filter(Seen::is_from_guest).collect();
    assert!(ours[0].is_rarp(), "{:?}", ours[0]);
    let arp = |seen: &&Seen| seen.frame[12..14] == [8, 6] && seen.frame[28..32] == [10, 99, 0, 2];
    let first_other = ours
        .iter()
        .position(|seen| !matches!(seen.frame[12..14], [0x80, 0x35] | [8, 6] | [0x86, 0xDD]));
    let announced = ours.iter().position(|seen| arp(&seen)).expect("a gratuitous ARP");
    assert!(first_other.is_none_or(|other| announced < other));
    assert_eq!(ours[0].frame[..12], [[0xFF; 6], MAC].concat());
}
