//! `vmft status --watch`: real sides in a terminal.

use crate::stage::{LIMIT, TURN, program};
use crate::terminal::Terminal;
use crate::up::{Hosts, wait};
use nix::sys::signal::Signal;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::sync::PoisonError;
use vmft::watch::screen::Screen;
use vmft_backup::status::Role;

fn watch(sockets: &[&Path]) -> Vec<OsString> {
    let mut words: Vec<OsString> =
        ["status", "--watch", "--interval", "100ms"].map(Into::into).into();
    for socket in sockets {
        words.extend(["--api-socket".into(), (*socket).into()]);
    }
    words
}

#[test]
fn a_pair_is_seen_in_a_terminal_before_it_is_there_and_through_a_failover() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut hosts = Hosts::new();
    let sockets = ["a1.api", "b2.api"].map(|name| hosts.path().join(name));
    let mut terminal = Terminal::vmft(&watch(&[&sockets[0], &sockets[1]]), 90, 24);
    terminal.wait_shows(|shown| shown.matches("has not answered yet").count() == 2);

    let mut a = hosts.up("a");
    wait(&mut a, Role::Alone, 1);
    let mut b = hosts.up("b");
    wait(&mut b, Role::Backup, 1);
    terminal.wait_shows(|shown| {
        ["primary, generation 1", "protected by 1 backup", "backup, generation 1", " of 120 ms"]
            .iter()
            .all(|words| shown.contains(words))
    });

    a.kill().unwrap();
    wait(&mut b, Role::Alone, 2);
    terminal.wait_shows(|shown| {
        ["does not answer", "alone, generation 2", "UNPROTECTED"]
            .iter()
            .all(|words| shown.contains(words))
    });
    terminal.resize(40, 10);
    terminal.wait_shows(|shown| {
        let fits = shown.lines().all(|line| line.chars().count() <= 40);
        fits && shown.contains("a1.api") && shown.contains("b2.api") && shown.contains("q end")
    });
    terminal.type_in("?");
    terminal.wait_shows(|shown| shown.contains("these keys"));
    terminal.type_in("q");
    let end = terminal.wait_exit();
    assert_eq!(end.code(), Some(0), "{}", terminal.shown());
    terminal.assert_given_back();
    vmft::api_client::shutdown(&b.api()).unwrap();
    assert_eq!(b.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", b.messages());
}

#[test]
fn a_watch_that_is_ended_by_a_signal_or_by_ctrl_c_gives_the_terminal_back() {
    let socket = Path::new("nobody.api");
    for end in [None, Some(Signal::SIGTERM), Some(Signal::SIGINT), Some(Signal::SIGHUP)] {
        let mut terminal = Terminal::vmft(&watch(&[socket]), 80, 24);
        terminal.wait_shows(|shown| shown.contains("has not answered yet"));
        match end {
            None => terminal.type_in("\x03"),
            Some(signal) => terminal.signal(signal),
        }
        assert_eq!(terminal.wait_exit().code(), Some(0), "{}", terminal.shown());
        terminal.assert_given_back();
    }
}

/// Not a test: the program in the terminal of the next one.
#[test]
#[ignore = "it panics, which the next test looks at"]
fn a_program_that_panics_while_it_has_the_terminal() {
    let _screen = Screen::open().unwrap();
    panic!("what went wrong is to be read");
}

#[test]
fn a_panic_gives_the_terminal_back_before_it_is_told() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = "watching::a_program_that_panics_while_it_has_the_terminal";
    command.args(["--ignored", "--exact", "--nocapture", name]).env("RUST_BACKTRACE", "0");
    let mut terminal = Terminal::start(command, 80, 24);
    assert_eq!(terminal.wait_exit().code(), Some(101), "{}", terminal.shown());
    terminal.assert_given_back();
    assert!(terminal.shown().contains("what went wrong is to be read"), "{}", terminal.shown());
}

#[test]
fn a_watch_without_a_terminal_and_several_sides_without_a_watch_are_refused() {
    let ended = |words: &[&str]| {
        let output = Command::new(program()).arg("status").args(words).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = ended(&["--watch", "--api-socket", "a"]);
    assert!(code == Some(1) && said.contains("--json") && said.contains("--check"), "{said}");
    let (code, said) = ended(&["--api-socket", "a", "--api-socket", "b"]);
    assert!(code == Some(1) && said.contains("--watch"), "{said}");
    for words in [
        &["--watch", "--json", "--api-socket", "a"][..],
        &["--watch", "--check", "--api-socket", "a"],
        &["--interval", "1s", "--api-socket", "a"],
        &["--watch", "--interval", "10ms", "--api-socket", "a"],
        &["--watch"],
    ] {
        let (code, said) = ended(words);
        assert!(code == Some(2) && said.lines().count() == 1, "{words:?}: {said}");
    }
}
