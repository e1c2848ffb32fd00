//! What the sides of a pair write of themselves, and what that explains.

use crate::kill::finish;
use crate::stage::{LIMIT, Pair, Setup, program, records_script};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use vmft::api_client;
use vmft::explain::{Judged, Life, Phase, Story, judge_again, read};
use vmft::pair::Which;
use vmft_backup::events::{Ending, Event, Peer};
use vmft_backup::status::Role;

const RECORDS: u32 = 4;

fn has(life: &Life, wanted: impl Fn(&Event) -> bool) -> bool {
    life.records.iter().any(|(_, record)| wanted(&record.event))
}

fn one_life(pair: &Pair, which: Which) -> Life {
    let path = if which == Which::Primary { pair.primary.events() } else { pair.backup.events() };
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "events tell of a host");
    let mut lives = read(&path).unwrap();
    assert_eq!(lives.len(), 1);
    let life = lives.remove(0);
    let agreed = matches!(judge_again(&life), Judged::Agreed { inputs: 1.., .. });
    assert!(agreed, "{:?}\n{}", judge_again(&life), pair.report());
    life
}

#[test]
fn both_sides_write_a_failover_and_the_survivors_log_explains_it_part_by_part() {
    let mut pair = Pair::start(&Setup::default());
    pair.type_in(&records_script(RECORDS));
    pair.read_text("vmft-line 000002");
    pair.primary.kill().unwrap();
    finish(&mut pair, Which::Backup, RECORDS);

    let primary = one_life(&pair, Which::Primary);
    assert!(has(&primary, |event| matches!(event, Event::JoinBegun { .. })));
    assert!(has(&primary, |event| matches!(event, Event::JoinComplete { backup: Some(_), .. })));
    assert!(!has(&primary, |event| matches!(event, Event::End { .. })), "it was killed");
    let backup = one_life(&pair, Which::Backup);
    let last = &backup.records.last().unwrap().1.event;
    assert!(matches!(last, Event::End { how: Ending::Stopped(_) }), "{last:?}");

    let lives = [primary, backup];
    let story = Story::of(&lives);
    assert!(story.has_one_clock);
    let [failover] = &story.failovers[..] else { panic!("one failover: {:?}", story.failovers) };
    assert!(failover.is_won() && failover.peer == Peer::Primary && failover.generation == Some(2));
    let phases: Vec<Phase> = failover.phases().iter().map(|(phase, _, _)| *phase).collect();
    // An output that was kept is let out before the guest runs.
    let all =
        [Phase::Detection, Phase::TestAndSet, Phase::Replay, Phase::GoLive, Phase::FirstOutput];
    assert!(phases.len() == all.len() && all.iter().all(|phase| phases.contains(phase)));
    assert_eq!(phases[..3], all[..3]);

    let svg = pair.directory.path().join("failover.svg");
    let told = Command::new(program())
        .arg("explain")
        .args([pair.primary.events(), pair.backup.events()])
        .arg("--svg")
        .arg(&svg)
        .output()
        .unwrap();
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(told.status.success(), "{text}");
    assert!(text.contains("backup takes over from the primary in generation 2"), "{text}");
    assert!(text.contains("first output") && text.contains("total"), "{text}");
    assert!(std::fs::read_to_string(svg).unwrap().ends_with("</svg>\n"));
}

#[test]
fn a_primary_that_goes_on_alone_writes_who_was_lost_and_what_was_decided() {
    let mut pair = Pair::start(&Setup::default());
    pair.type_in(&records_script(RECORDS));
    pair.read_text("vmft-line 000002");
    pair.backup.kill().unwrap();
    pair.primary.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    finish(&mut pair, Which::Primary, RECORDS);
    let lives = [one_life(&pair, Which::Primary)];
    let story = Story::of(&lives);
    let [failover] = &story.failovers[..] else { panic!("one failover: {:?}", story.failovers) };
    assert!(failover.is_won() && matches!(failover.peer, Peer::Backup(_)));
}

/// `/dev/full` takes nothing, as a full file system.
#[test]
fn an_event_log_that_takes_nothing_holds_no_side_up_and_what_is_lost_is_said() {
    let both = vec!["--event-log", "/dev/full"];
    let mut pair = Pair::start(&Setup { both, ..Setup::default() });
    pair.type_in(&records_script(RECORDS));
    pair.read_text("vmft-line 000002");
    pair.primary.kill().unwrap();
    finish(&mut pair, Which::Backup, RECORDS);
    let said = pair.backup.messages();
    assert!(said.contains("the event log /dev/full takes nothing: No space left"), "{said}");
    assert!(said.contains("events are not in the event log"), "{said}");
}

/// What the sides say of themselves, for machines.
#[test]
fn metrics_and_checks_say_of_each_side_what_its_status_says() {
    let primary = vec!["--metrics-listen", "127.0.0.1:0"];
    let mut pair = Pair::start(&Setup { primary, ..Setup::default() });
    let check = |pair: &Pair, which, more: &[&str]| {
        let api = if which == Which::Primary { pair.primary.api() } else { pair.backup.api() };
        let output = Command::new(program())
            .args(["status", "--check"])
            .args(more)
            .arg("--api-socket")
            .arg(api)
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let metrics = api_client::metrics(&pair.primary.api()).unwrap();
    assert!(metrics.contains("\nvmft_role{role=\"primary\"} 1\n"), "{metrics}");
    assert!(metrics.contains("\nvmft_generation 1\n"), "{metrics}");
    let said = pair.primary.wait_says(LIMIT, |said| said.contains("/metrics\n")).unwrap();
    let address = said.split("metrics at http://").nth(1).unwrap().split('/').next().unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\nvmft_role{role=\"primary\"} 1\n"), "{answer}");

    let (code, line) = check(&pair, Which::Primary, &[]);
    assert!(code == 0 && line.starts_with("VMFT OK - protected by 1"), "{code} {line}");
    let (code, line) = check(&pair, Which::Backup, &[]);
    assert!(code == 0 && line.starts_with("VMFT OK - follows"), "{code} {line}");
    pair.primary.kill().unwrap();
    pair.wait_role(Which::Backup, Role::Alone);
    let (code, line) = check(&pair, Which::Backup, &["--max-unprotected", "3600s"]);
    assert!(code == 1 && line.starts_with("VMFT WARNING - live without a backup"), "{line}");
    let (code, line) = check(&pair, Which::Backup, &["--max-unprotected", "0s"]);
    assert!(code == 2 && line.starts_with("VMFT CRITICAL"), "{code} {line}");
    let (code, line) = check(&pair, Which::Primary, &[]);
    assert!(code == 3 && line.starts_with("VMFT UNKNOWN"), "{code} {line}");
    assert_eq!(line.lines().count(), 1);
}
