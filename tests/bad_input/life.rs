//! The whole life of a side under Ctrl-C and SIGTERM.

use crate::harness::{Place, Running, strings, wait_for};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::TcpListener;

/// Silence of a busy host is no loss here.
const PATIENT: [&str; 2] = ["--suspect-after", "60000"];

fn backup(place: &Place, primary: &str, more: &[&str]) -> Running {
    let words = strings(&["backup", "--primary", &format!("tcp:{primary}")]);
    let console = place.file("--serial", "file=", "backup.console");
    place.start("backup", &[words, strings(&PATIENT), place.disk(), console, strings(more)])
}

#[test]
fn a_running_machine_stops_on_either_signal_and_its_sockets_can_be_used_again() {
    let place = Place::new();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGINT] {
        let console = place.file("--serial", "socket=", "console");
        let api = place.file("--api-socket", "", "api");
        let mut running =
            place.start("run", &[strings(&["run", "-v"]), place.machine(), console, api]);
        running.wait_says("role");
        running.assert_stops_cleanly(signal);
    }
    place.assert_disk_unchanged();
}

#[test]
fn a_primary_that_waits_for_its_backup_stops_and_can_be_started_again() {
    let place = Place::new();
    for _ in 0..2 {
        let mut primary = place.primary(&[]);
        primary.address();
        primary.assert_stops_cleanly(Signal::SIGINT);
    }
}

#[test]
fn a_backup_stops_while_it_waits_for_a_pair_and_leaves_nothing() {
    let place = Place::new();
    let mut waiting = backup(&place, "127.0.0.1:1", &[]);
    waiting.wait_says("start the primary first");
    waiting.assert_stops_cleanly(Signal::SIGINT);
    assert!(!place.path("disk.vmft").exists());
    place.assert_disk_unchanged();
}

#[test]
fn a_backup_stops_while_the_primary_stalls_its_attempt_to_join() {
    let place = Place::new();
    let mut primary = place.primary(&[]);
    primary.address();
    // It accepts, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let trying = backup(&place, &address, &[]);
    let _connection = silent.accept().unwrap();
    trying.assert_stops_cleanly(Signal::SIGTERM);
    primary.assert_stops_cleanly(Signal::SIGTERM);
}

#[test]
fn a_backup_started_before_its_primary_waits_for_it_and_follows() {
    let place = Place::new();
    // A port that is free for the primary in a moment.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut early = backup(&place, &port.to_string(), &[]);
    early.wait_says("start the primary first");
    let words = strings(&["primary", "--listen", &format!("tcp:{port}")]);
    let console = place.file("--serial", "file=", "primary.console");
    let mut primary = place.start("primary", &[words, place.machine(), console]);
    primary.wait_says("protected: a backup follows");
    early.wait_says("following the primary");
    place.wait_console_grows("primary.console");
    drop(primary);
    early.wait_says("the primary is lost");
    place.wait_console_grows("backup.console");
}

#[test]
fn a_backup_that_follows_leaves_and_the_primary_goes_on_alone() {
    let place = Place::new();
    let mut primary = place.primary(&[]);
    let address = primary.address();
    let mut following = backup(&place, &address, &[]);
    following.wait_says("following the primary");
    place.wait_console_grows("primary.console");
    following.assert_stops_cleanly(Signal::SIGINT);
    primary.wait_says("running unprotected in generation 2");
    place.wait_console_grows("primary.console");

    let mut next = backup(&place, &address, &[]);
    next.wait_says("following the primary");
    primary.assert_runs();
    place.wait_console_grows("primary.console");
}

#[test]
fn a_protected_primary_stops_and_its_backup_with_it() {
    let place = Place::new();
    let mut primary = place.primary(&[]);
    let address = primary.address();
    let mut following = backup(&place, &address, &[]);
    following.wait_says("following the primary");
    place.wait_console_grows("primary.console");
    primary.assert_stops_cleanly(Signal::SIGINT);
    let status = following.wait();
    let messages = following.messages();
    assert!(status.success(), "{messages}");
    assert!(!messages.contains("lost"), "{messages}");
}

#[test]
fn a_primary_stopped_while_the_arbiter_is_away_says_that_outputs_are_lost() {
    let place = Place::new();
    let mut primary = place.primary(&[]);
    let address = primary.address();
    let mut following = backup(&place, &address, &[]);
    following.wait_says("following the primary");
    place.wait_console_grows("primary.console");
    std::fs::rename(place.path("disk.vmft"), place.path("away")).unwrap();
    drop(following);
    primary.wait_says("no output leaves until it answers");
    primary.signal(Signal::SIGINT);
    let status = primary.wait();
    assert_eq!(status.code(), Some(1));
    let messages = primary.messages();
    assert!(messages.contains("its last outputs were not let out"), "{messages}");
}

/// The threads of a process that are not confined, with what the kernel says of them (proc_pid_status(5)).
fn unconfined(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status"));
    // One that ends meanwhile is not asked.
    let statuses: Vec<String> = tasks.filter_map(|task| status(task.unwrap()).ok()).collect();
    assert!(statuses.len() > 4, "{statuses:?}");
    let is_confined = |status: &String| {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {status}")).trim()
        };
        // The process has two filters. Two threads have tasks that are none of a side's.
        let of_task = u32::from(!["starter", "ctrl-c"].contains(&field("Name:")));
        let filters: u32 = field("Seccomp_filters:").parse().unwrap();
        (field("NoNewPrivs:"), field("Seccomp:")) == ("1", "2") && filters >= 2 + of_task
    };
    statuses.into_iter().filter(|status| !is_confined(status)).collect()
}

#[test]
fn every_thread_of_a_pair_that_runs_is_confined() {
    let place = Place::new();
    let mut primary = place.primary(&[]);
    let address = primary.address();
    let mut following = backup(&place, &address, &[]);
    following.wait_says("following the primary");
    primary.wait_says("protected: a backup follows");
    place.wait_console_grows("primary.console");
    for side in [&primary, &following] {
        // A thread begins a moment before it is confined.
        wait_for("confinement", || unconfined(side.pid()).is_empty().then_some(()));
    }
    primary.assert_stops_cleanly(Signal::SIGINT);
    assert!(following.wait().success());
}

/// A named pipe that is full, and that nobody reads.
fn stuck_pipe(place: &Place, name: &str) -> File {
    let path = place.path(name);
    nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
    // Both ends: opening it waits for nobody.
    let mut pipe = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let size = fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    pipe.write_all(&vec![0; usize::try_from(size).unwrap()]).unwrap();
    pipe
}

fn primary_with_stuck_console(place: &Place) -> Running {
    let words = strings(&["primary", "--no-wait", "--listen", "tcp:127.0.0.1:0"]);
    let console = place.file("--serial", "file=", "pipe");
    place.start("primary", &[words, strings(&PATIENT), place.machine(), console])
}

#[test]
fn what_a_stuck_console_did_not_take_its_backup_has_from_the_first_byte_on() {
    let place = Place::new();
    let _pipe = stuck_pipe(&place, "pipe");
    let mut primary = primary_with_stuck_console(&place);
    let address = primary.address();
    let mut following = backup(&place, &address, &[]);
    following.wait_says("following the primary");
    primary.wait_says("protected: a backup follows");
    drop(primary);
    following.wait_says("the primary is lost");
    place.wait_console_grows("backup.console");
    let shown = std::fs::read(place.path("backup.console")).unwrap();
    assert!(!shown.contains(&0), "bytes from before the join are missing");
}

#[test]
fn a_side_whose_console_nobody_reads_stops_and_says_what_was_not_delivered() {
    let place = Place::new();
    let _pipe = stuck_pipe(&place, "pipe");
    let mut primary = primary_with_stuck_console(&place);
    let address = primary.address();
    let mut following = backup(&place, &address, &[]);
    following.wait_says("following the primary");
    primary.wait_says("protected: a backup follows");
    primary.signal(Signal::SIGTERM);
    assert!(primary.wait().success(), "{}", primary.messages());
    assert!(following.wait().success(), "{}", following.messages());
    let said = primary.messages();
    assert!(said.contains("bytes of the guest's console are not delivered"), "{said}");
    assert!(!following.messages().contains("lost"), "{}", following.messages());
}
