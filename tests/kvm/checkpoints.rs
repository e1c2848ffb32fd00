//! Checkpoints of a guest that computes: on `kvm` they are taken between two points.

use crate::engines::{
    Engine, expected, held_probe, kvm_is_here, probe, said, take_turn, vmft, write_probe,
};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmft::pair::{Look, PairConsole, SideProcess, Which, prefixed};
use vmft_backup::status::Role;

pub const LIMIT: Duration = Duration::from_secs(120);
/// Lines of these guests, after which they compute until somebody types, and rounds of computing
/// before each line.
const LINES: u32 = 6;
const HOLD: [u32; 2] = [2, 4];

fn rounds(engine: Engine) -> u32 {
    match engine {
        Engine::Soft => 2_000_000,
        // A CPU that interprets the probe takes a fifth of a second for so many.
        Engine::KvmExit | Engine::KvmStep => 30_000,
    }
}

fn guest(directory: &Path, engine: Engine) -> Vec<OsString> {
    let kernel = write_probe(directory, &held_probe(LINES, rounds(engine), HOLD));
    let mut words = vec!["--memory".into(), "size=64M".into(), "--kernel".into(), kernel.into()];
    words.extend(engine.options().iter().map(OsString::from));
    words
}

pub fn read_until(console: &mut PairConsole, text: &mut String, wanted: &str) {
    let deadline = Instant::now() + LIMIT;
    while !text.contains(wanted) {
        if let Look::Bytes(bytes) = console.look(Duration::from_secs(1)) {
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
        assert!(Instant::now() < deadline, "{wanted:?} is not printed: {text}");
    }
}

/// Starts a guest with `subcommand`, and returns it when it has printed two lines and computes.
pub fn start(
    directory: &Path,
    subcommand: &str,
    arguments: &[OsString],
) -> (SideProcess, PairConsole, String) {
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    let mut side =
        SideProcess::start_as(program, subcommand, Which::Primary, directory, arguments).unwrap();
    let mut console = PairConsole::default();
    console.attach(&mut side).unwrap();
    let mut text = String::new();
    read_until(&mut console, &mut text, "vmft-line 000002\r\n");
    (side, console, text)
}

/// A snapshot of the computing probe.
fn snapshot(directory: &Path, arguments: &[OsString]) -> PathBuf {
    let (mut side, _console, _) = start(directory, "run", arguments);
    let snapshot = directory.join("snapshot");
    vmft::api_client::snapshot(&side.api(), &snapshot).unwrap();
    side.kill().unwrap();
    snapshot
}

/// A snapshot of a guest that computes on `engine` goes on, `onto` another one.
fn restore_and_finish(engine: Engine, onto: Option<Engine>) {
    if !engine.is_here() || !onto.is_none_or(Engine::is_here) {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let snapshot = snapshot(directory.path(), &guest(directory.path(), engine));
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    let mut words: Vec<OsString> = vec!["--restore".into(), snapshot.into_os_string()];
    words.extend(onto.iter().flat_map(|engine| engine.options()).map(OsString::from));
    let mut side =
        SideProcess::start_as(program, "run", Which::Backup, directory.path(), &words).unwrap();
    let shown = expected(HOLD[0]).trim_end_matches("vmft-done\r\n").to_owned();
    let mut console = PairConsole::starting_at(shown.len() as u64);
    console.attach(&mut side).unwrap();
    let mut text = shown;
    // Before that, it takes no keys.
    side.wait_status(LIMIT, |status| status.role == Role::Unprotected).unwrap();
    console.type_in(b"\n");
    read_until(&mut console, &mut text, "vmft-line 000004\r\n");
    console.type_in(b"\n");
    assert!(side.wait_exit(LIMIT).unwrap().success(), "{}", side.messages());
    read_until(&mut console, &mut text, "vmft-done\r\n");
    assert_eq!(text, expected(LINES));
}

#[test]
fn a_snapshot_of_a_computing_guest_goes_on_from_its_state_on_soft() {
    restore_and_finish(Engine::Soft, None);
}

#[test]
fn a_snapshot_of_a_computing_guest_goes_on_from_its_state_at_exit_points() {
    restore_and_finish(Engine::KvmExit, None);
}

#[test]
fn a_snapshot_of_a_guest_on_kvm_goes_on_on_soft() {
    restore_and_finish(Engine::KvmExit, Some(Engine::Soft));
}

/// A backup joins a primary that computes, and takes over.
fn join_and_take_over(engine: Engine) {
    if !engine.is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let arbiter = ["--arbiter".into(), prefixed("dir=", &directory.join("arbiter"))];
    let mut arguments = guest(directory, engine);
    arguments.extend(["--no-wait".into(), "--listen".into(), "tcp:127.0.0.1:0".into()]);
    arguments.extend(arbiter.clone());
    let (mut primary, mut console, mut text) = start(directory, "primary", &arguments);
    let address = primary.status().unwrap().listening.unwrap();
    let arguments = ["--primary".into(), format!("tcp:{address}").into()];
    let arguments: Vec<OsString> = arguments.into_iter().chain(arbiter).collect();
    let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
    let mut backup = SideProcess::start(program, Which::Backup, directory, &arguments).unwrap();
    console.attach(&mut backup).unwrap();
    primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    console.type_in(b"\n");
    read_until(&mut console, &mut text, "vmft-line 000004\r\n");
    primary.kill().unwrap();
    backup.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    console.type_in(b"\n");
    read_until(&mut console, &mut text, "vmft-done\r\n");
    assert_eq!(text, expected(LINES), "{}", backup.messages());
    assert!(backup.wait_exit(LIMIT).unwrap().success(), "{}", backup.messages());
    assert!(!backup.messages().contains("divergence"), "{}", backup.messages());
    assert_eq!(console.merger().missing(), 0);
}

#[test]
fn a_backup_that_joins_a_computing_guest_takes_over_on_soft() {
    join_and_take_over(Engine::Soft);
}

#[test]
fn a_backup_that_joins_a_computing_guest_takes_over_at_exit_points() {
    join_and_take_over(Engine::KvmExit);
}

#[test]
fn a_free_running_machine_is_not_followed() {
    if !kvm_is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_probe(directory.path(), &probe(LINES, rounds(Engine::KvmExit)));
    let arguments = ["--engine", "kvm", "--memory", "size=64M", "--kernel"];
    let arguments: Vec<OsString> =
        arguments.iter().map(OsString::from).chain([kernel.into()]).collect();
    let snapshot = snapshot(directory.path(), &arguments);
    let log = directory.path().join("log");
    let words = ["record".into(), "--restore".into(), snapshot.into_os_string(), "--log".into()];
    let output = vmft(words.into_iter().chain([log.clone().into_os_string()]));
    assert!(!output.status.success() && !log.exists());
    let said = said(&output);
    assert!(said.contains("free-running") && said.contains("--engine soft"), "{said}");
}
