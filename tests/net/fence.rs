//! A primary that was only stopped, and is continued after its backup went live, sends nothing more.

use crate::capture::{Capture, Seen};
use crate::echo::Echo;
use crate::lab::{self, GUEST};
use crate::stage::{LIMIT, Pair, Setup};
use nix::sys::signal::Signal;
use std::process::Stdio;
use vmft::pair::Which;
use vmft_backup::status::Role;

#[test]
fn after_a_go_live_no_packet_of_the_old_primary_appears() {
    if lab::is_missing() {
        return;
    }
    // Late acknowledgements wait in the socket of a stopped primary in great number.
    for backup in [vec![], vec!["--acknowledge-delay", "30"]] {
        let mut pair = Pair::start(&Setup { backup: backup.clone(), ..Setup::default() });
        let captures =
            ["a", "b"].map(|port| Capture::start(&pair.lab, port, pair.directory.path()));
        let echo = Echo::start(&pair.lab);
        // Something leaves all the time.
        let mut flood = pair.client("ping");
        flood.args(["-n", "-q", "-i", "0.002", "-w", "60", GUEST]).stdout(Stdio::null());
        let mut flood = flood.spawn().unwrap();
        echo.wait(20);
        pair.signal(Which::Primary, Signal::SIGSTOP);
        pair.wait_role(Which::Backup, Role::Alone);
        echo.wait(10);
        pair.signal(Which::Primary, Signal::SIGCONT);
        let exit = pair.primary.wait_exit(LIMIT).unwrap();
        assert_eq!(exit.code(), Some(1), "{}", pair.report());
        echo.wait(10);
        echo.finish();
        flood.kill().unwrap();
        flood.wait().unwrap();
        let [a, b] = captures.map(Capture::stop);
        let live_at = b.iter().find(|seen| seen.is_rarp()).expect("it is announced").at;
        let before = a.iter().filter(|seen| seen.is_from_guest() && seen.at < live_at).count();
        let late: Vec<&Seen> =
            a.iter().filter(|seen| seen.is_from_guest() && seen.at >= live_at).collect();
        assert!(before > 20, "the primary had something to send");
        assert!(late.is_empty(), "{backup:?}: {} packets after the go-live: {late:?}", late.len());
    }
}
