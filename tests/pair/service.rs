//! Sides as services: what they tell a service manager, whose end of the socket a test has.

use crate::stage::{LIMIT, TURN, program};
use crate::up::{Hosts, wait};
use std::ffi::OsString;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::PoisonError;
use vmft::pair::{SideProcess, Which};
use vmft_backup::fault::{Fault, FaultOrder};
use vmft_backup::status::Role;

/// How long a held replay takes at most; it is let go before, when its primary is lost.
const HOLD_MS: u64 = 600_000;

/// The manager of one side.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    /// The words that have come and were not waited for yet, in order.
    heard: Vec<String>,
    /// The last that the side has said of itself.
    status: String,
}

impl Manager {
    fn new(directory: &Path, name: &str) -> Self {
        let path = directory.join(format!("{name}.notify"));
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self { socket, path, heard: Vec::new(), status: String::new() }
    }

    /// `vmft up` as this manager starts it, watched if signs are to come within so many microseconds.
    fn up(&self, hosts: &Hosts, side: &str, watchdog_us: Option<u64>) -> SideProcess {
        let variable = |name: &str, value: &OsString| {
            let mut word = OsString::from(name);
            word.push("=");
            word.push(value);
            word
        };
        let socket = variable("NOTIFY_SOCKET", &self.path.clone().into());
        let mut words: Vec<OsString> = Vec::new();
        words.extend(watchdog_us.map(|time| format!("WATCHDOG_USEC={time}").into()));
        words.extend([program().into(), "up".into(), hosts.file().into()]);
        words.extend(["--side", side, "--"].map(Into::into));
        let which = if side == "a" { Which::Primary } else { Which::Backup };
        let socket = socket.to_str().unwrap();
        let env = Path::new("/usr/bin/env");
        SideProcess::start_named(env, socket, (which, side), hosts.path(), &words).unwrap()
    }

    /// Waits until this word comes; returns the words before it, since the last that was waited for.
    fn wait_hears(&mut self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        loop {
            if let Some(place) = self.heard.iter().position(|word| wanted(word)) {
                let mut before: Vec<String> = self.heard.drain(..=place).collect();
                before.pop();
                return before;
            }
            if let Err(error) = self.hear() {
                panic!("{error}; it has heard {:?}", self.heard);
            }
        }
    }

    /// Takes the next words.
    fn hear(&mut self) -> std::io::Result<()> {
        let mut bytes = [0; 4096];
        let len = self.socket.recv(&mut bytes)?;
        let words = String::from_utf8(bytes[..len].to_vec()).unwrap();
        self.heard.extend(words.lines().map(str::to_owned));
        if let Some(status) = words.lines().rfind(|word| word.starts_with("STATUS=")) {
            self.status = status.to_owned();
        }
        Ok(())
    }

    /// Waits until this is what the side has said last of itself.
    fn wait_status(&mut self, wanted: impl Fn(&str) -> bool) {
        while !wanted(&self.status) {
            self.hear().unwrap();
        }
    }

    /// Takes all words that have come by now.
    fn take_now(&mut self) -> Vec<String> {
        self.socket.set_nonblocking(true).unwrap();
        while self.hear().is_ok() {}
        self.socket.set_nonblocking(false).unwrap();
        std::mem::take(&mut self.heard)
    }

    fn wait_hears_word(&mut self, wanted: &str) -> Vec<String> {
        self.wait_hears(|word| word == wanted)
    }
}

#[test]
fn a_service_is_ready_when_it_has_joined_and_tells_of_a_failover_and_of_its_end() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut hosts = Hosts::new();
    let mut manager_b = Manager::new(hosts.path(), "b");
    let mut b = manager_b.up(&hosts, "b", None);
    let before = manager_b.wait_hears(|word| word.contains("side a has 1 s to begin"));
    assert!(!before.iter().any(|word| word == "READY=1"), "{before:?}");
    // Nobody else has come, and so it begins; now it is what it should be.
    let before = manager_b.wait_hears_word("READY=1");
    assert!(before.iter().any(|word| word.starts_with("STATUS=alone, generation 1")), "{before:?}");

    let mut manager_a = Manager::new(hosts.path(), "a");
    let mut a = manager_a.up(&hosts, "a", None);
    let before = manager_a.wait_hears_word("READY=1");
    let last = before.last().unwrap();
    assert_eq!(last, "STATUS=backup, generation 1: protects its primary");
    manager_b.wait_hears_word("STATUS=primary, generation 1: protected by 1 backup");

    b.kill().unwrap();
    manager_a.wait_hears_word("STATUS=alone, generation 2: UNPROTECTED");
    // Under another manager's word, the same host again.
    let mut b = hosts.up("b");
    wait(&mut b, Role::Backup, 2);
    let before = manager_a.wait_hears_word("STATUS=primary, generation 2: protected by 1 backup");
    assert!(!before.iter().any(|word| word == "READY=1" || word == "STOPPING=1"), "{before:?}");

    vmft::api_client::shutdown(&a.api()).unwrap();
    manager_a.wait_hears_word("STOPPING=1");
    assert_eq!(a.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", a.messages());
    assert_eq!(b.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", b.messages());
}

/// Both sides are watched: one whose guest's thread hangs gives no sign of life, whatever its other threads do.
#[test]
fn a_side_whose_guests_thread_hangs_gives_no_sign_of_life_until_it_goes_on() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let hosts = Hosts::new();
    let mut managers = ["a", "b"].map(|side| Manager::new(hosts.path(), side));
    let often = Some(300_000);
    let mut a = managers[0].up(&hosts, "a", often);
    managers[0].wait_hears_word("READY=1");
    let mut b = managers[1].up(&hosts, "b", often);
    managers[1].wait_hears_word("READY=1");
    wait(&mut a, Role::Primary, 1);
    for manager in &mut managers {
        // More than one: the thread has come by in between.
        for _ in 0..3 {
            manager.wait_hears_word("WATCHDOG=1");
        }
    }
    let hold = FaultOrder { fault: Fault::HoldReplay { ms: HOLD_MS }, live: false };
    vmft::api_client::fault(&b.api(), hold).unwrap();
    for manager in &mut managers {
        manager.take_now();
    }
    managers[1].wait_status(|status| status.ends_with("; the thread of its guest hangs"));
    // Its primary is well, and gives one sign after the other.
    for _ in 0..5 {
        managers[0].wait_hears_word("WATCHDOG=1");
    }
    // One may have been for what the thread did before it hung.
    let words = managers[1].take_now();
    let signs = words.iter().filter(|word| *word == "WATCHDOG=1").count();
    assert!(signs <= 1, "{words:?}");
    // Once the primary is gone, the held thread is let go, and takes over.
    a.kill().unwrap();
    managers[1].wait_hears_word("STATUS=alone, generation 2: UNPROTECTED");
    for _ in 0..3 {
        managers[1].wait_hears_word("WATCHDOG=1");
    }
    vmft::api_client::shutdown(&b.api()).unwrap();
    managers[1].wait_hears_word("STOPPING=1");
    assert_eq!(b.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", b.messages());
}

#[test]
fn a_side_whose_manager_is_not_there_says_so_and_runs() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let hosts = Hosts::new();
    let manager = Manager::new(hosts.path(), "a");
    std::fs::remove_file(&manager.path).unwrap();
    let mut a = manager.up(&hosts, "a", None);
    wait(&mut a, Role::Alone, 1);
    a.wait_says(LIMIT, |said| said.contains("a.notify is told nothing: No such file")).unwrap();
    vmft::api_client::shutdown(&a.api()).unwrap();
    assert_eq!(a.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", a.messages());
}

/// Where systemd's own verifier is.
#[test]
fn the_template_unit_is_one_that_systemd_takes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let unit = std::fs::read_to_string(root.join("packaging/vmft@.service")).unwrap();
    let installed = "/usr/bin/vmft";
    assert!(unit.contains(&format!("ExecStart={installed} up ")), "{unit}");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmft@web.service");
    std::fs::write(&path, unit.replace(installed, program().to_str().unwrap())).unwrap();
    let output =
        match Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("not verified: this host has no systemd-analyze");
                return;
            }
            output => output.unwrap(),
        };
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.is_empty(), "{said}");
}
