//! Storage that fails under a guest that nobody follows: real servers and file systems, told to.

use crate::server::{LIMIT, program};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use vmft::api_client;
use vmft::pair::{DemoConsole, SideProcess, Which, prefixed};
use vmft_backup::status::{DiskState, SideStatus};
use vmft_guest_images::disk::{DiskSize, check_disk, make_disk, read_disk_file};
use vmft_guest_images::workload::{DemoLine, RECORDS_FILE, Workload, count_records};
use vmft_log::entry::StopReason;

const RECORDS: u32 = 12;
/// Here the guest waits until somebody types.
const HOLD: u32 = 2;

/// What a guest is told that writes records, and begins them when it is let.
fn guest() -> Vec<OsString> {
    let words = Workload::Demo { lines: RECORDS, pause_ms: 1 }.cmdline();
    let words = format!("{words} vmft.hold={HOLD} quiet");
    let mut guest: Vec<OsString> = ["--memory", "size=96M", "--cmdline"].map(Into::into).into();
    guest.push(words.into());
    guest
}

/// nbdkit, whose requests fail for as long as a file is there.
struct Kit {
    child: Child,
    directory: TempDir,
}

impl Kit {
    /// Serves a new disk, on which writes fail with `error`.
    fn start(error: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        make_disk(&directory.path().join("web.img"), DiskSize::DEMO, "vmft-test").unwrap();
        let mut kit = Command::new("nbdkit");
        kit.args(["--foreground", "--unix"]).arg(directory.path().join("kit"));
        // Its own process tells when it listens, by this file.
        kit.arg("--pidfile").arg(directory.path().join("pid"));
        kit.args(["--filter=error", "file"]).arg(directory.path().join("web.img"));
        kit.args([format!("error-pwrite={error}"), "error-pwrite-rate=100%".to_owned()]);
        kit.arg(prefixed("error-pwrite-file=", &directory.path().join("fail")));
        let child = kit.stdin(Stdio::null()).spawn().unwrap();
        Self { child, directory }
    }

    fn disk(&self) -> OsString {
        let socket = self.directory.path().join("kit");
        format!("nbd=unix:{}/web", socket.display()).into()
    }

    fn set(&self, fails: bool) {
        let file = self.directory.path().join("fail");
        if fails { drop(File::create(file).unwrap()) } else { std::fs::remove_file(file).unwrap() }
    }

    fn wait_serves(&self) {
        let deadline = std::time::Instant::now() + LIMIT;
        while !self.directory.path().join("pid").exists() {
            assert!(std::time::Instant::now() < deadline, "nbdkit does not listen");
            std::thread::yield_now();
        }
    }
}

impl Drop for Kit {
    fn drop(&mut self) {
        // One that has ended needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that runs on its own.
struct Alone {
    side: SideProcess,
    demo: DemoConsole,
}

impl Alone {
    /// It waits for its first record behind the hold.
    fn start(directory: &Path, disk: OsString, more: &[&str]) -> Self {
        let mut options = guest();
        options.extend(["--disk".into(), disk]);
        options.extend(more.iter().map(Into::into));
        let side = SideProcess::start_as(program(), "run", Which::Primary, directory, &options);
        Self::held(side.unwrap())
    }

    fn held(mut side: SideProcess) -> Self {
        let mut demo = DemoConsole::default();
        demo.console.attach(&mut side).unwrap();
        let mut alone = Self { side, demo };
        alone.read(Some(DemoLine::Synced(HOLD)));
        alone
    }

    fn read(&mut self, wanted: Option<DemoLine>) {
        let read = self.demo.read(LIMIT, wanted);
        read.unwrap_or_else(|error| panic!("{error}\n{}", self.side.messages()));
    }

    fn go_on(&mut self) {
        self.demo.console.type_in(b"\n");
    }

    fn wait_stopped(&mut self) -> SideStatus {
        let is_stopped = |status: &SideStatus| {
            status.disk_troubles.first().is_some_and(|disk| disk.state == DiskState::Stopped)
        };
        self.side.wait_status(LIMIT, is_stopped).unwrap()
    }

    fn resume(&self) {
        api_client::resume(&self.side.api()).unwrap();
    }

    /// The guest has ended; everything it did is there, and it heard of no error.
    fn check(mut self, image: &Path) {
        self.read(None);
        let said = self.side.messages();
        assert_eq!(self.demo.shown, DemoLine::all(RECORDS), "{said}");
        assert!(self.side.wait_exit(LIMIT).unwrap().success(), "{said}");
        check_disk(image).unwrap();
        assert_eq!(count_records(&read_disk_file(image, RECORDS_FILE).unwrap()), Ok(RECORDS));
    }
}

fn vmft(words: &[&str], api: &Path) -> (Option<i32>, String) {
    let output = Command::new(program()).args(words).arg("--api-socket").arg(api).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn a_disk_has_a_word_of_its_own_for_storage_that_fails() {
    let kit = Kit::start("EIO");
    kit.wait_serves();
    let mut disk = kit.disk();
    disk.push(",on-error=stop");
    let mut alone = Alone::start(kit.directory.path(), disk, &["--on-error", "report"]);
    kit.set(true);
    alone.go_on();
    alone.wait_stopped();
    kit.set(false);
    alone.resume();
    alone.check(&kit.directory.path().join("web.img"));
}

#[test]
fn a_guest_whose_server_has_no_room_stands_still_until_it_is_resumed_and_hears_of_nothing() {
    let kit = Kit::start("ENOSPC");
    kit.wait_serves();
    let mut alone = Alone::start(kit.directory.path(), kit.disk(), &[]);
    let refused = api_client::resume(&alone.side.api()).unwrap_err().to_string();
    assert!(refused.contains("nothing is to be resumed"), "{refused}");
    kit.set(true);
    alone.go_on();
    let status = alone.wait_stopped();
    let disk = &status.disk_troubles[0];
    assert!(disk.is_full && disk.path.to_string().contains("kit/web"), "{disk:?}");
    assert!(disk.what.starts_with("writing "), "{disk:?}");
    // It says so everywhere, and what to do.
    let (code, said) = vmft(&["status"], &alone.side.api());
    assert_eq!(code, Some(0));
    assert!(said.contains("make room on its storage, then `vmft resume`"), "{said}");
    let (code, said) = vmft(&["status", "--check"], &alone.side.api());
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("the storage is full"), "{said}");
    let metrics = api_client::metrics(&alone.side.api()).unwrap();
    assert!(metrics.contains("vmft_disk_troubles{state=\"stopped\"} 1"), "{metrics}");
    alone.side.wait_says(LIMIT, |said| said.contains("the guest stands still")).unwrap();
    // The same again while there is no room, and on once there is.
    alone.resume();
    let stands_twice = |said: &str| said.matches("the guest stands still").count() == 2;
    alone.side.wait_says(LIMIT, stands_twice).unwrap();
    kit.set(false);
    let (code, said) = vmft(&["resume"], &alone.side.api());
    assert_eq!(code, Some(0), "{said}");
    let events = alone.side.events();
    alone.check(&kit.directory.path().join("web.img"));
    let events = std::fs::read_to_string(events).unwrap();
    for kind in ["disk-failed", "guest-stopped", "guest-resumed"] {
        assert!(events.contains(&format!("\"kind\":\"{kind}\"")), "{kind}: {events}");
    }
}

#[test]
fn a_guest_that_is_to_be_told_of_errors_is_told_and_runs_on() {
    let kit = Kit::start("EIO");
    kit.wait_serves();
    let mut alone = Alone::start(kit.directory.path(), kit.disk(), &["--on-error", "report"]);
    kit.set(true);
    alone.go_on();
    alone.side.wait_says(LIMIT, |said| said.contains("the guest is told")).unwrap();
    // It gives up by itself.
    alone.read(None);
    assert!(!alone.demo.shown.contains(&DemoLine::Synced(RECORDS)));
    assert!(!alone.side.messages().contains("stands still"), "{}", alone.side.messages());
}

#[test]
fn a_guest_that_stands_still_is_stopped_like_any_other() {
    let kit = Kit::start("EIO");
    kit.wait_serves();
    let mut alone = Alone::start(kit.directory.path(), kit.disk(), &[]);
    kit.set(true);
    alone.go_on();
    alone.wait_stopped();
    api_client::shutdown(&alone.side.api()).unwrap();
    assert!(alone.side.wait_exit(LIMIT).unwrap().success(), "{}", alone.side.messages());
    let said = alone.side.messages();
    assert!(said.contains("stopped before 1 of the disks had done all requests"), "{said}");
    let events = std::fs::read_to_string(alone.side.events()).unwrap();
    assert!(events.contains(&format!("{:?}", StopReason::Operator)), "{events}");
}

/// Runs what follows in a mount namespace of its own, with a small file system at `$1` on which a sparse copy
/// of the image `$2` lies.
const ON_A_SMALL_FILE_SYSTEM: &str = "\
place=$1 image=$2 program=$3; shift 3; \
exec unshare --mount --map-root-user sh -ec '\
place=$0 image=$1 program=$2; shift 2; \
mount -t tmpfs -o size=40M none \"$place\"; \
cp --sparse=always \"$image\" \"$place/disk.img\"; \
shift; exec \"$program\" run \"$@\"' \"$place\" \"$image\" \"$program\" - \"$@\"";

#[test]
fn a_guest_on_a_full_file_system_goes_on_when_something_else_is_taken_away() {
    let directory = tempfile::tempdir().unwrap();
    let (place, image) = (directory.path().join("small"), directory.path().join("web.img"));
    std::fs::create_dir(&place).unwrap();
    make_disk(&image, DiskSize::DEMO, "vmft-test").unwrap();
    let mut words: Vec<OsString> = vec![ON_A_SMALL_FILE_SYSTEM.into(), "sh".into()];
    words.extend([place.clone().into(), image.clone().into(), program().into()]);
    words.extend(guest());
    words.extend(["--disk".into(), prefixed("path=", &place.join("disk.img"))]);
    let side =
        SideProcess::start_as(Path::new("sh"), "-c", Which::Primary, directory.path(), &words);
    let mut alone = Alone::held(side.unwrap());
    // Seen from there, as the process sees it.
    let pid = alone.side.pid();
    let place = PathBuf::from(format!("/proc/{pid}/root{}", place.display()));
    let filler = place.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    alone.go_on();
    let status = alone.wait_stopped();
    assert!(status.disk_troubles[0].is_full, "{status:?}");
    drop(file);
    std::fs::remove_file(filler).unwrap();
    alone.resume();
    alone.read(Some(DemoLine::Synced(RECORDS)));
    alone.read(None);
    assert_eq!(alone.demo.shown, DemoLine::all(RECORDS), "{}", alone.side.messages());
    assert!(alone.side.wait_exit(Duration::from_secs(240)).unwrap().success());
}
