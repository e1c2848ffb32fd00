//! A side is killed while real clients talk to real servers: every session goes on.

use crate::echo::Echo;
use crate::lab::{self, GUEST};
use crate::stage::{Pair, Setup, pattern, read_all};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use vmft::pair::Which;

/// Bytes downloaded in all, and before a side is killed.
const BODY: usize = 16_000_000;
const BEFORE: usize = 1 << 20;

/// A download by curl, some of it read.
struct Download {
    child: Child,
    output: ChildStdout,
    begun: Vec<u8>,
}

impl Download {
    fn start(pair: &Pair) -> Self {
        let mut command = pair.client("curl");
        command.args(["-sS", "--no-buffer"]).arg(format!("http://{GUEST}/body"));
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let mut begun = vec![0; BEFORE];
        output.read_exact(&mut begun).unwrap();
        Self { child, output, begun }
    }

    fn finish(self) {
        let Self { mut child, output, mut begun } = self;
        begun.extend(read_all(output));
        assert!(child.wait().unwrap().success());
        assert_eq!(begun.len(), BODY);
        assert!(begun.iter().copied().eq(pattern(BODY)), "other bytes than were sent");
    }
}

/// An interactive session of ssh with the guest's shell.
struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Shell {
    fn start(pair: &Pair) -> Self {
        let mut command = pair.client("ssh");
        command.args([
            "-tt",
            "-F",
            "none",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "LogLevel=ERROR",
        ]);
        command.args(["-o", "UserKnownHostsFile=/dev/null"]).arg(format!("root@{GUEST}"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }

    /// Types a line, and reads on to the line `wanted`.
    fn type_in(&mut self, line: &str, wanted: &str) {
        self.input.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut seen = Vec::new();
        loop {
            let mut line = Vec::new();
            assert_ne!(self.output.read_until(b'\n', &mut line).unwrap(), 0, "ssh ended: {seen:?}");
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if line.ends_with(wanted) {
                return;
            }
            seen.push(line);
        }
    }

    fn finish(mut self) {
        self.input.write_all(b"exit 0\n").unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

fn sessions_go_on(setup: &Setup, which: Which) {
    let mut pair = Pair::start(setup);
    let mut shell = Shell::start(&pair);
    shell.type_in("kept=$((6 * 7)); echo kept is $kept", "kept is 42");
    let mut ping = pair.client("ping");
    ping.args(["-n", "-i", "0.1", "-w", "20", "-c", "60", GUEST]);
    let ping = ping.stdout(Stdio::piped()).spawn().unwrap();
    let echo = Echo::start(&pair.lab);
    echo.wait(20);
    let download = Download::start(&pair);
    pair.kill(which);
    echo.wait(20);
    shell.type_in("echo still $((kept + 1))", "still 43");
    download.finish();
    shell.finish();
    let saw = echo.finish();
    let ping = ping.wait_with_output().unwrap();
    let ping = String::from_utf8_lossy(&ping.stdout).into_owned();
    println!("{} killed: {saw:?}\n{ping}", which.name());
    let received = ping.split(", ").find_map(|part| part.strip_suffix(" received")).unwrap();
    let received: u32 = received.parse().unwrap();
    assert!(received >= 30, "{ping}\n{}", pair.report());
}

#[test]
fn every_session_goes_on_when_the_primary_is_killed() {
    if lab::is_missing() {
        return;
    }
    sessions_go_on(&Setup::default(), Which::Primary);
}

#[test]
fn every_session_goes_on_when_the_backup_is_killed() {
    if lab::is_missing() {
        return;
    }
    sessions_go_on(&Setup::default(), Which::Backup);
}

#[test]
fn every_session_goes_on_when_the_primary_is_killed_in_checkpoint_mode() {
    if lab::is_missing() {
        return;
    }
    let both = vec!["--protect", "checkpoint,interval=20ms"];
    sessions_go_on(&Setup { both, ..Setup::default() }, Which::Primary);
}

/// Seconds of each measurement.
const SECONDS: u32 = 6;

/// The lines that say what was moved in a second, of which a busy host makes a little more or less.
fn intervals(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| line.contains(" sec "))
}

/// Runs iperf3 for [`SECONDS`] seconds, and kills a side after two.
fn iperf_goes_on(reverse: bool, which: Which) {
    let mut pair = Pair::start(&Setup::default());
    let mut command = pair.client("iperf3");
    command.args(["-c", GUEST, "--forceflush", "-i", "1", "-f", "k", "-t", &SECONDS.to_string()]);
    if reverse {
        command.arg("-R");
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while intervals(&text).count() < 2 {
        assert_ne!(output.read_line(&mut text).unwrap(), 0, "{text}");
    }
    pair.kill(which);
    text.push_str(&String::from_utf8_lossy(&read_all(output)));
    let errors = String::from_utf8_lossy(&read_all(child.stderr.take().unwrap())).into_owned();
    assert!(child.wait().unwrap().success(), "{text}{errors}{}", pair.report());
    println!("{text}");
    let moved = text.lines().rev().find(|line| line.ends_with("receiver")).unwrap();
    assert!(!moved.contains(" 0.00 Bytes"), "{text}");
    let (measured, _) = text.split_once("- - -").unwrap();
    let after = intervals(measured).skip(3);
    let moved = after.filter(|line| !line.contains(" 0.00 Bytes")).count();
    assert!(moved >= 2, "nothing moved in the end: {text}");
}

#[test]
fn a_transfer_to_the_guest_goes_on_when_the_primary_is_killed() {
    if lab::is_missing() {
        return;
    }
    iperf_goes_on(false, Which::Primary);
}

#[test]
fn a_transfer_from_the_guest_goes_on_when_the_primary_is_killed() {
    if lab::is_missing() {
        return;
    }
    iperf_goes_on(true, Which::Primary);
}

#[test]
fn a_transfer_to_the_guest_goes_on_when_the_backup_is_killed() {
    if lab::is_missing() {
        return;
    }
    iperf_goes_on(false, Which::Backup);
}

#[test]
fn a_transfer_from_the_guest_goes_on_when_the_backup_is_killed() {
    if lab::is_missing() {
        return;
    }
    iperf_goes_on(true, Which::Backup);
}
