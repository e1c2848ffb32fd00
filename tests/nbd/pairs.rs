//! Pairs whose disk and arbiter are on a server.

use crate::server::{LIMIT, Server, program};
use nix::sys::signal::Signal;
use std::ffi::OsString;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmft::pair::{DemoConsole, SideProcess, Which, prefixed};
use vmft_backup::status::Role;
use vmft_guest_images::disk::{DiskSize, check_disk, make_disk, read_disk_file};
use vmft_guest_images::workload::{DemoLine, RECORDS_FILE, Workload, count_records};

const RECORDS: u32 = 30;
/// Here the guest waits until somebody types.
const HOLD: [u32; 2] = [1, 20];

/// One pair at a time.
static TURN: Mutex<()> = Mutex::new(());

struct Pair {
    server: Server,
    primary: SideProcess,
    backup: SideProcess,
    demo: DemoConsole,
    _turn: MutexGuard<'static, ()>,
}

impl Pair {
    /// A protected pair whose guest waits after its first record.
    fn start() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir().unwrap();
        make_disk(&directory.path().join("web.img"), DiskSize::DEMO, "vmft-test").unwrap();
        let server = Server::start(directory, ",cache=writeback");
        let place = server.directory.path();
        let words = Workload::Demo { lines: RECORDS, pause_ms: 1 }.cmdline();
        let words = format!("{words} vmft.hold={},{} quiet", HOLD[0], HOLD[1]);
        let both = || -> Vec<OsString> {
            let words = ["--suspect-after", "2000", "--disk"].map(OsString::from);
            words.into_iter().chain([server.place("web")]).collect()
        };
        let channel = place.join("channel");
        let mut options = both();
        options.extend(["--no-wait", "--memory", "size=96M", "--cmdline"].map(OsString::from));
        options.extend([words.into(), "--listen".into(), prefixed("unix:", &channel)]);
        let mut primary = SideProcess::start(program(), Which::Primary, place, &options).unwrap();
        let mut demo = DemoConsole::default();
        demo.console.attach(&mut primary).unwrap();
        let mut options = both();
        options.extend(["--primary".into(), prefixed("unix:", &channel)]);
        let mut backup = SideProcess::start(program(), Which::Backup, place, &options).unwrap();
        demo.console.attach(&mut backup).unwrap();
        let mut pair = Self { server, primary, backup, demo, _turn: turn };
        pair.read(Some(DemoLine::Synced(HOLD[0])));
        pair.primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
        pair
    }

    fn go_on(&mut self) {
        self.demo.console.type_in(b"\n");
    }

    /// Reads the console until it shows `wanted`, or to its end.
    fn read(&mut self, wanted: Option<DemoLine>) {
        let read = self.demo.read(LIMIT, wanted);
        read.unwrap_or_else(|error| panic!("{error}\n{}", self.said()));
    }

    fn said(&self) -> String {
        let (primary, backup) = (self.primary.messages(), self.backup.messages());
        format!("primary:\n{primary}backup:\n{backup}server:\n{}", self.server.messages())
    }

    /// The guest has ended; everything it did is there, once.
    fn check(&mut self) {
        self.read(None);
        assert_eq!(self.demo.shown, DemoLine::all(RECORDS), "{}", self.said());
        assert!(self.server.stop().success(), "{}", self.said());
        let image = self.server.image();
        check_disk(&image).unwrap();
        assert_eq!(count_records(&read_disk_file(&image, RECORDS_FILE).unwrap()), Ok(RECORDS));
    }
}

#[test]
fn a_pair_on_a_served_disk_survives_its_primary() {
    let mut pair = Pair::start();
    pair.go_on();
    pair.read(Some(DemoLine::Synced(HOLD[0] + 5)));
    pair.primary.kill().unwrap();
    let live = pair.backup.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    assert_eq!(live.generation, 2);
    pair.go_on();
    pair.check();
    assert!(pair.backup.wait_exit(LIMIT).unwrap().success(), "{}", pair.said());
}

#[test]
fn a_primary_that_stood_still_comes_back_to_a_disk_that_takes_nothing_from_it() {
    let mut pair = Pair::start();
    pair.go_on();
    pair.read(Some(DemoLine::Line(HOLD[0] + 5)));
    pair.primary.signal(Signal::SIGSTOP).unwrap();
    pair.backup.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    pair.go_on();
    pair.read(Some(DemoLine::Synced(RECORDS)));
    pair.primary.signal(Signal::SIGCONT).unwrap();
    assert_eq!(pair.primary.wait_exit(LIMIT).unwrap().code(), Some(1), "{}", pair.said());
    assert!(pair.primary.messages().contains("generation 2 was won by"), "{}", pair.said());
    pair.check();
}

#[test]
fn a_server_that_dies_and_comes_back_is_waited_for() {
    let mut pair = Pair::start();
    pair.server.kill();
    pair.go_on();
    let is_away = |said: &str| said.contains("the server is away");
    pair.primary.wait_says(LIMIT, is_away).unwrap();
    pair.server.start_again();
    pair.read(Some(DemoLine::Synced(HOLD[1])));
    let status = pair.primary.status().unwrap();
    assert_eq!(status.generation, 1, "{}", pair.said());
    pair.go_on();
    pair.check();
}
