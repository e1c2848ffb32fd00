//! What a guest shows is the same whoever runs it, and whoever dies.

use crate::engines::{
    Engine, LINES, expected, kvm_is_here, probe, said, succeed, take_turn, vmft, write_probe,
};
use std::ffi::OsString;
use std::path::Path;
use vmft::pair::prefixed;

fn arguments(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// The guest's own options: its kernel, and where its console goes.
fn guest(kernel: &Path, console: &Path) -> Vec<OsString> {
    let mut words = arguments(&["--memory", "size=64M", "--kernel"]);
    words.extend([kernel.into(), "--serial".into(), prefixed("file=", console)]);
    words
}

fn run_live(options: &[&str]) {
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_probe(directory.path(), &probe(LINES, 1_000));
    let console = directory.path().join("console");
    let mut words = arguments(&["run"]);
    words.extend(guest(&kernel, &console));
    words.extend(arguments(options));
    succeed(words);
    assert_eq!(std::fs::read_to_string(console).unwrap(), expected(LINES));
}

#[test]
fn the_probe_runs_live_on_soft() {
    run_live(&[]);
}

#[test]
fn the_probe_runs_live_and_free_on_kvm() {
    if kvm_is_here() {
        run_live(&["--engine", "kvm"]);
    }
}

/// Records the probe, replays the log twice, and compares what it printed and what it came to.
fn record_and_replay(engine: Engine, lines: u32, rounds: u32) {
    if !engine.is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_probe(directory.path(), &probe(lines, rounds));
    let place = |name| directory.path().join(name);
    let mut words = arguments(&["record", "--log"]);
    words.push(place("log").into());
    words.extend(guest(&kernel, &place("recorded")));
    words.extend(arguments(engine.options()));
    let recorded = said(&vmft(words));
    assert_eq!(std::fs::read_to_string(place("recorded")).unwrap(), expected(lines), "{recorded}");

    let mut states = Vec::new();
    for console in ["first", "second"] {
        let replayed = succeed([
            "replay".into(),
            place("log").into_os_string(),
            "--serial".into(),
            prefixed("file=", &place(console)),
        ]);
        assert_eq!(std::fs::read_to_string(place(console)).unwrap(), expected(lines), "{replayed}");
        assert!(replayed.contains("the guest stopped: GuestPowerOff"), "{replayed}");
        assert!(!replayed.contains(" 0 digests agree"), "nothing was compared: {replayed}");
        states.push(replayed.lines().find(|line| line.starts_with("state ")).map(str::to_owned));
    }
    let state = states[0].clone().unwrap();
    assert!(states[0] == states[1] && recorded.contains(&state), "{states:?}: {recorded}");
}

#[test]
fn the_probe_recorded_on_soft_replays_to_its_end() {
    // Long enough for digests, which come every 33 million instructions.
    record_and_replay(Engine::Soft, LINES, 400_000);
}

#[test]
fn the_probe_recorded_at_exit_points_replays_to_its_end() {
    // A line makes some sixty exits, and there is a digest every four thousand.
    record_and_replay(Engine::KvmExit, 160, 100);
}

#[test]
fn the_probe_recorded_at_single_steps_replays_to_its_end() {
    record_and_replay(Engine::KvmStep, 40, 100);
}

/// The demo with the probe guest: its exit code says whether anything is missing or repeated.
fn survive(engine: Engine, kill_after: u32) {
    if !engine.is_here() {
        return;
    }
    let _turn = take_turn();
    let lines = LINES.to_string();
    let mut words = arguments(&["demo", "--guest", "probe", "--lines", &lines, "--pause", "20"]);
    words.extend(arguments(&["--json", "--kill-after", &kill_after.to_string()]));
    words.extend(arguments(engine.options()));
    let shown = succeed(words);
    let json = &shown[shown.find("{\n").unwrap()..];
    let report: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!(report["good"], true, "{shown}");
    assert_eq!(report["lines_seen"], LINES, "{shown}");
    assert_eq!(report["failover"]["generation"], 2, "{shown}");
    assert!(shown.contains("vmft-done"), "{shown}");
}

#[test]
fn the_probe_on_soft_survives_its_primary() {
    survive(Engine::Soft, LINES / 2);
}

#[test]
fn the_probe_at_exit_points_survives_its_primary() {
    for kill_after in [1, LINES / 2, LINES - 6] {
        survive(Engine::KvmExit, kill_after);
    }
}
