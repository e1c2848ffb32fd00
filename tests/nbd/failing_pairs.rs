//! Pairs of which one side's way to the storage fails, or both.

use crate::bad_way::{BadWay, Mood};
use crate::server::{LIMIT, Server, program};
use std::ffi::OsString;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmft::api_client;
use vmft::pair::{DemoConsole, SideProcess, Which, prefixed};
use vmft_backup::status::{DiskState, Role, SideStatus};
use vmft_guest_images::disk::{DiskSize, check_disk, make_disk, read_disk_file};
use vmft_guest_images::workload::{DemoLine, RECORDS_FILE, Workload, count_records};
use vmft_nbd::wire::{EIO, ENOSPC};

const RECORDS: u32 = 12;
/// Here the guest waits until somebody types.
const HOLD: u32 = 2;

/// After so much silence a side is taken to have failed.
const SUSPECT_MS: u64 = 2000;

/// One pair at a time.
static TURN: Mutex<()> = Mutex::new(());

struct Pair {
    server: Server,
    primary: SideProcess,
    backup: SideProcess,
    /// Of the primary, and of the backup.
    ways: [BadWay; 2],
    demo: DemoConsole,
    _turn: MutexGuard<'static, ()>,
}

impl Pair {
    /// A protected pair whose guest waits after a few records.
    fn start(more: &[&str]) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir().unwrap();
        make_disk(&directory.path().join("web.img"), DiskSize::DEMO, "vmft-test").unwrap();
        let server = Server::start(directory, ",cache=writeback");
        let place = server.directory.path();
        let ways = ["primary", "backup"]
            .map(|side| BadWay::to(&server.address, place.join(format!("{side}.way"))));
        let words = Workload::Demo { lines: RECORDS, pause_ms: 1 }.cmdline();
        let words = format!("{words} vmft.hold={HOLD} quiet");
        let both = |way: &BadWay| -> Vec<OsString> {
            let suspect = ["--suspect-after".into(), SUSPECT_MS.to_string().into()];
            let more = more.iter().map(OsString::from);
            more.chain(suspect).chain(["--disk".into(), way.place("web")]).collect()
        };
        let channel = place.join("channel");
        let mut options = both(&ways[0]);
        options.extend(["--no-wait", "--memory", "size=96M", "--cmdline"].map(OsString::from));
        options.extend([words.into(), "--listen".into(), prefixed("unix:", &channel)]);
        let mut primary = SideProcess::start(program(), Which::Primary, place, &options).unwrap();
        let mut demo = DemoConsole::default();
        demo.console.attach(&mut primary).unwrap();
        let mut options = both(&ways[1]);
        options.extend(["--primary".into(), prefixed("unix:", &channel)]);
        let mut backup = SideProcess::start(program(), Which::Backup, place, &options).unwrap();
        demo.console.attach(&mut backup).unwrap();
        let mut pair = Self { server, primary, backup, ways, demo, _turn: turn };
        pair.read(Some(DemoLine::Synced(HOLD)));
        pair.primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
        pair
    }

    fn set(&self, which: Which, mood: Mood) {
        self.ways[usize::from(which == Which::Backup)].set(mood);
    }

    fn go_on(&mut self) {
        self.demo.console.type_in(b"\n");
    }

    fn read(&mut self, wanted: Option<DemoLine>) {
        let read = self.demo.read(LIMIT, wanted);
        read.unwrap_or_else(|error| panic!("{error}\n{}", self.said()));
    }

    fn said(&self) -> String {
        let (primary, backup) = (self.primary.messages(), self.backup.messages());
        format!("primary:\n{primary}backup:\n{backup}server:\n{}", self.server.messages())
    }

    /// The primary halts, because the backup has the guest.
    fn is_relieved(&mut self) {
        assert_eq!(self.primary.wait_exit(LIMIT).unwrap().code(), Some(1), "{}", self.said());
        let said = self.primary.messages();
        assert!(said.contains("a backup is to go on"), "{}", self.said());
        assert!(said.contains("halted: generation 2 was won by the backup"), "{}", self.said());
        let said = self.backup.messages();
        assert!(said.contains("the peer's storage fails"), "{}", self.said());
    }

    /// The guest has ended; everything it did is there, once, and it heard of no error.
    fn check(&mut self) {
        self.read(None);
        assert_eq!(self.demo.shown, DemoLine::all(RECORDS), "{}", self.said());
        assert!(self.server.stop().success(), "{}", self.said());
        let image = self.server.image();
        check_disk(&image).unwrap();
        assert_eq!(count_records(&read_disk_file(&image, RECORDS_FILE).unwrap()), Ok(RECORDS));
    }
}

fn has(state: DiskState) -> impl Fn(&SideStatus) -> bool {
    move |status| status.disk_troubles.first().is_some_and(|disk| disk.state == state)
}

fn a_backup_goes_on(more: &[&str], mood: Mood) {
    let mut pair = Pair::start(more);
    pair.set(Which::Primary, mood);
    pair.go_on();
    pair.is_relieved();
    pair.check();
    assert_eq!(pair.backup.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", pair.said());
}

#[test]
fn a_backup_goes_on_where_its_primarys_way_to_the_storage_fails() {
    a_backup_goes_on(&[], Mood::WritesFail(EIO));
}

#[test]
fn a_backup_that_is_kept_by_checkpoints_goes_on_there_as_well() {
    a_backup_goes_on(&["--protect", "checkpoint"], Mood::WritesFail(EIO));
}

#[test]
fn a_backup_makes_good_what_its_primary_could_not_make_durable() {
    a_backup_goes_on(&[], Mood::FlushesFail(EIO));
}

#[test]
fn a_survivor_whose_storage_fails_at_the_same_stands_still() {
    let mut pair = Pair::start(&[]);
    pair.set(Which::Primary, Mood::WritesFail(ENOSPC));
    pair.set(Which::Backup, Mood::WritesFail(ENOSPC));
    pair.go_on();
    pair.is_relieved();
    let status = pair.backup.wait_status(LIMIT, has(DiskState::Stopped)).unwrap();
    assert_eq!((status.role, status.generation), (Role::Alone, 2), "{}", pair.said());
    assert!(status.disk_troubles[0].is_full, "{status:?}");
    pair.set(Which::Backup, Mood::Well);
    api_client::resume(&pair.backup.api()).unwrap();
    pair.check();
}

#[test]
fn a_backup_that_does_not_reach_its_storage_leaves_the_guest_where_it_is() {
    let mut pair = Pair::start(&[]);
    pair.set(Which::Backup, Mood::AllFails(EIO));
    pair.backup.wait_status(LIMIT, has(DiskState::Unreachable)).unwrap();
    pair.set(Which::Primary, Mood::WritesFail(EIO));
    pair.go_on();
    let stands_still =
        |said: &str| said.contains("the guest stands still (the backup has not taken it)");
    pair.primary.wait_says(LIMIT, stands_still).unwrap_or_else(|_| panic!("{}", pair.said()));
    // The backup joins again meanwhile, and hears from its primary, which stands still.
    pair.primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    let refused = api_client::resume(&pair.backup.api()).unwrap_err().to_string();
    assert!(refused.contains("does not run the guest"), "{refused}");
    pair.set(Which::Backup, Mood::Well);
    pair.set(Which::Primary, Mood::Well);
    api_client::resume(&pair.primary.api()).unwrap();
    pair.check();
}

#[test]
fn a_pair_that_is_to_stop_stands_still_with_its_backup_and_goes_on_protected() {
    let mut pair = Pair::start(&["--on-error", "stop"]);
    pair.set(Which::Primary, Mood::WritesFail(EIO));
    pair.go_on();
    let stopped = pair.primary.wait_status(LIMIT, has(DiskState::Stopped)).unwrap();
    assert_eq!((stopped.role, stopped.generation), (Role::Primary, 1), "{}", pair.said());
    // Signs of life go on, for longer than the backup would wait in silence.
    let stood = |status: &SideStatus| {
        status.disk_troubles.first().is_some_and(|disk| disk.for_ms > 2 * SUSPECT_MS)
    };
    let status = pair.primary.wait_status(LIMIT, stood).unwrap();
    assert_eq!((status.role, status.point), (Role::Primary, stopped.point), "{}", pair.said());
    pair.set(Which::Primary, Mood::Well);
    api_client::resume(&pair.primary.api()).unwrap();
    pair.check();
    assert!(!pair.said().contains("is lost"), "{}", pair.said());
}

#[test]
fn a_disk_that_hangs_is_told_and_its_guest_goes_on_at_a_backup_since_its_server_fences() {
    let mut pair = Pair::start(&["--disk-timeout", "500ms"]);
    pair.set(Which::Primary, Mood::Silent);
    pair.go_on();
    pair.is_relieved();
    let events = std::fs::read_to_string(pair.primary.events()).unwrap();
    assert!(events.contains("\"kind\":\"disk-hangs\""), "{events}");
    pair.check();
}

#[test]
fn a_disk_that_hangs_where_the_guest_is_to_stop_is_told_and_waited_for() {
    is_waited_for(&[]);
}

#[test]
fn so_it_is_by_a_guest_that_is_protected_by_checkpoints() {
    is_waited_for(&["--protect", "checkpoint"]);
}

fn is_waited_for(more: &[&str]) {
    let stop = ["--disk-timeout", "500ms", "--on-error", "stop"];
    let mut pair = Pair::start(&[&stop, more].concat());
    pair.server.kill();
    pair.go_on();
    pair.primary.wait_status(LIMIT, has(DiskState::Hangs)).unwrap();
    // A write that is under way could land after those of whoever takes the guest.
    let refused = api_client::switch(&pair.primary.api()).unwrap_err().to_string();
    assert!(refused.contains("a disk has not done everything"), "{refused}");
    pair.primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    pair.server.start_again();
    pair.primary.wait_says(LIMIT, |said| said.contains(" has ended, after ")).unwrap();
    pair.check();
}
