use super::*;
use std::io::Write;
use std::path::PathBuf;
use vmft_backup::arbiter::{Candidate, Verdict};
use vmft_backup::events::{Ending, Judge, JudgeInput, JudgeOrder, Peer, VERSION};
use vmft_backup::reign::{FollowEvent, FollowReign, SessionOver};
use vmft_backup::status::Role;
use vmft_log::entry::{EntrySequence, Generation, OutputSequence, StopReason};

/// 2026-11-30 00:00 UTC, in microseconds.
const DAY: u64 = 1_795_996_800_000_000;

/// Writes a side's records as they come.
pub(super) struct Writer {
    side: &'static str,
    role: Role,
    generation: u64,
    number: u64,
    pub(super) text: Vec<u8>,
}

impl Writer {
    fn new(side: &'static str) -> Self {
        Self { side, role: Role::Starting, generation: 0, number: 0, text: Vec::new() }
    }

    /// At so many milliseconds after the host was booted.
    fn add(&mut self, ms: u64, event: Event) {
        let record = Record {
            v: VERSION,
            number: self.number,
            wall_us: DAY + ms * 1000,
            boot_ns: ms * 1_000_000,
            side: self.side.into(),
            role: self.role,
            generation: self.generation,
            event,
        };
        self.number += 1;
        self.text.extend(record.to_line());
    }

    fn begin(&mut self, ms: u64, boot: &str) {
        self.number = 0;
        let (program, host, boot_id) = ("vmft".into(), "here".into(), boot.into());
        let event = Event::Begin { program, host, boot_id, pid: 7, id: "i".into() };
        self.add(ms, event);
    }

    fn role(&mut self, ms: u64, role: Role, generation: u64) {
        let from = std::mem::replace(&mut self.role, role);
        self.generation = generation;
        self.add(ms, Event::Role { from });
    }

    fn file(&self, directory: &Path) -> PathBuf {
        let path = directory.join(self.side);
        std::fs::File::create(&path).unwrap().write_all(&self.text).unwrap();
        path
    }
}

fn ms(ms: u64) -> MonotonicTime {
    MonotonicTime::from_ns(ms * 1_000_000)
}

/// A backup that takes over: last sign at 1000, suspicion 1016, asked 1017, won 1020, replayed 1025, live
/// 1030, first output 1100.
pub(super) fn takeover(boot: &str) -> Writer {
    let mut backup = Writer::new("backup");
    backup.begin(900, boot);
    backup.role(950, Role::Backup, 1);
    let judge = Judge::Follow { generation: Generation(1), several: false, standby: false };
    backup.add(951, Event::JudgeBegins { number: 1, judge });
    let mut reign = FollowReign::new(Generation(1), false, false);
    let why = "connection closed\u{1b}[2J <b> & \"c\"".into();
    let (last_sign, suspected) = (ms(1000), ms(1016));
    backup.add(1016, Event::PeerLost { peer: Peer::Primary, why, last_sign, suspected });
    let over = SessionOver::Lost("connection closed".into());
    let lost = FollowEvent::SessionOver { over, received: EntrySequence(3), heard: true };
    let mut hear = |backup: &mut Writer, at, event: FollowEvent| {
        let input = JudgeInput::Follow(event.clone());
        backup.add(at, Event::Heard { judge: 1, at: ms(at), input });
        reign.handle_event(ms(at), event);
        while let Some(action) = reign.poll_action() {
            backup.add(at, Event::Ordered { judge: 1, order: JudgeOrder::Follow(action) });
        }
    };
    hear(&mut backup, 1016, lost);
    backup.role(1016, Role::Deciding, 1);
    let generation = Generation(2);
    backup.add(1017, Event::ArbiterAsked { generation });
    backup.add(1020, Event::ArbiterAnswered { generation, verdict: Verdict::Won });
    hear(&mut backup, 1020, FollowEvent::Verdict(Verdict::Won));
    hear(&mut backup, 1025, FollowEvent::LogEnded);
    backup.add(1025, Event::ReplayDone { point: 77, marked: OutputSequence(9), not_out: 2 });
    backup.add(1030, Event::Live { point: 77, requests_again: 1 });
    backup.role(1030, Role::Alone, 2);
    backup.add(1100, Event::FirstOutput { output: OutputSequence(8) });
    backup.add(2000, Event::End { how: Ending::Stopped(StopReason::GuestPowerOff) });
    backup
}

pub(super) fn primary(boot: &str) -> Writer {
    let mut primary = Writer::new("primary");
    primary.begin(800, boot);
    primary.role(940, Role::Primary, 1);
    primary
}

#[test]
fn a_failover_is_told_with_what_each_part_took() {
    let directory = tempfile::tempdir().unwrap();
    let files = [primary("b").file(directory.path()), takeover("b").file(directory.path())];
    let lives = read_all(&files).unwrap();
    let story = Story::of(&lives);
    assert!(story.has_one_clock);
    let [failover] = &story.failovers[..] else { panic!("one failover: {story:?}") };
    assert!(failover.is_won());
    let parts: Vec<(&str, f64)> = failover
        .phases()
        .iter()
        .map(|(phase, begin, end)| (phase.name(), end.ms_since(*begin)))
        .collect();
    let wanted = [
        ("detection", 16.0),
        ("test-and-set", 4.0),
        ("replay", 5.0),
        ("go-live", 5.0),
        ("first output", 70.0),
    ];
    assert_eq!(parts, wanted);
    assert!(matches!(judge_again(&lives[1]), Judged::Agreed { inputs: 3, .. }));
    let text = text::write(&story, false).unwrap();
    for wanted in [
        "backup takes over from the primary in generation 2",
        "last sign at 2026-11-30 00:00:01.000 UTC",
        "replayed to point 77; 9 outputs, 2 let out again",
        "total           100.0 ms",
        "primary     starting -> primary, generation 1",
        "3 inputs",
        r"\u{1b}[2J",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
    }
    assert!(!text.contains("orders Follow"), "{text}");
    assert!(text::write(&story, true).unwrap().contains("judge 1 orders"));
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
}

#[test]
fn the_picture_has_every_part_and_is_well_formed() {
    let directory = tempfile::tempdir().unwrap();
    let files = [primary("b").file(directory.path()), takeover("b").file(directory.path())];
    let lives = read_all(&files).unwrap();
    let picture = svg::draw(&Story::of(&lives)).unwrap();
    for part in
        ["detection 16.0 ms", "test-and-set 4.0 ms", "first output 70.0 ms", "total 100.0 ms"]
    {
        assert!(picture.contains(part), "{part}: {picture}");
    }
    assert!(picture.contains("&lt;b&gt; &amp; &quot;c&quot;"), "{picture}");
    // Tags open and close in order.
    let mut open = Vec::new();
    for tag in picture.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').unwrap();
        assert!(!tag.contains(['<', '&']), "{tag}");
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name.to_owned())),
            None if tag.ends_with('/') => {}
            None => open.push(tag.split(' ').next().unwrap().to_owned()),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn a_side_that_loses_the_race_and_one_that_goes_on_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let mut live = primary("b");
    let backup = serde_json::from_str("3").unwrap();
    let peer = Peer::Backup(backup);
    let (last_sign, suspected) = (ms(1000), ms(1300));
    live.add(1300, Event::PeerLost { peer, why: "silence".into(), last_sign, suspected });
    let generation = Generation(2);
    live.add(1301, Event::ArbiterAsked { generation });
    live.add(1302, Event::ArbiterUnreachable { why: "away".into() });
    live.add(1401, Event::ArbiterAsked { generation });
    let winner = Candidate { id: "x".into(), host: "there".into(), pid: 4, role: "backup".into() };
    live.add(1402, Event::ArbiterAnswered { generation, verdict: Verdict::Lost { winner } });
    let lives = read_all(&[live.file(directory.path())]).unwrap();
    let story = Story::of(&lives);
    let [failover] = &story.failovers[..] else { panic!("{story:?}") };
    assert!(!failover.is_won());
    assert_eq!(failover.end().ms_since(failover.suspected), 102.0);
    let text = text::write(&story, false).unwrap();
    assert!(text.contains("primary loses backup 3, and another side goes on"), "{text}");
    assert!(text.contains("after 1 times without an answer"), "{text}");
}

#[test]
fn lives_of_two_hosts_are_put_together_by_their_wall_clocks_and_it_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let files = [primary("b").file(directory.path()), takeover("c").file(directory.path())];
    let lives = read_all(&files).unwrap();
    let story = Story::of(&lives);
    assert!(!story.has_one_clock);
    assert!(text::write(&story, false).unwrap().contains("wall clocks, which may differ"));
}

#[test]
fn a_file_has_several_lives_and_a_last_line_that_is_cut() {
    let directory = tempfile::tempdir().unwrap();
    let mut side = primary("b");
    side.begin(3000, "b");
    let path = side.file(directory.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend(b"{\"v\":1,\"num");
    std::fs::write(&path, bytes).unwrap();
    let lives = read(&path).unwrap();
    assert_eq!(lives.iter().map(|life| life.records.len()).collect::<Vec<_>>(), [2, 1]);
    assert!(!lives[0].is_cut && lives[1].is_cut);
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wrong");
    let error = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        read(&path).map(|lives| lives.len()).unwrap_err().to_string()
    };
    assert!(error(b"").contains("empty"));
    let mut good = primary("b").text;
    let lines = good.iter().filter(|byte| **byte == b'\n').count();
    good.extend(b"vmft: hello\n");
    let said = error(&good);
    assert!(said.contains(&format!("line {}: no record", lines + 1)), "{said}");
    assert!(error(b"{\"v\":2}\n").contains("line 1: a record of schema 2"));
    let long = [b"{\"v\":1,\"x\":\"".to_vec(), vec![b'a'; 3 << 20]].concat();
    assert!(error(&long).contains("line 1: a line of"));
    let missing = directory.path().join("missing");
    assert!(read(&missing).unwrap_err().to_string().contains("missing"));
}

#[test]
fn a_judge_that_is_recorded_to_have_ordered_something_else_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let text = String::from_utf8(takeover("b").text).unwrap();
    let path = directory.path().join("changed");
    std::fs::write(&path, text.replace(r#""ask":2"#, r#""ask":3"#)).unwrap();
    let lives = read(&path).unwrap();
    let Judged::Differ { line, .. } = judge_again(&lives[0]) else { panic!("it is seen") };
    let changed = text.lines().position(|line| line.contains(r#""ask":2"#)).unwrap() + 1;
    assert_eq!(line, changed);
    // A file whose beginning is gone tells the rest all the same.
    let rest: Vec<&str> = text.lines().skip(1).collect();
    std::fs::write(&path, rest.join("\n") + "\n").unwrap();
    assert_eq!(judge_again(&read(&path).unwrap()[0]), Judged::Incomplete);
}
