//! A pair from one file: sides that are brought up, killed, and brought up again.

use crate::stage::{LIMIT, TURN, program};
use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::PoisonError;
use vmft::pair::{SideProcess, Which};
use vmft_backup::status::{Role, SideStatus};
use vmft_guest_images::ProbeGuest;

/// The hosts of a pair: directories with sockets.
pub struct Hosts {
    directory: tempfile::TempDir,
    started: u32,
}

impl Hosts {
    /// With a guest that does not end before somebody types, which nobody does.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let hold = [NonZeroU32::new(2), None];
        let guest =
            ProbeGuest { lines: NonZeroU32::new(4).unwrap(), hold, ..ProbeGuest::default() };
        std::fs::write(directory.path().join("probe.elf"), guest.image()).unwrap();
        let at = directory.path().display();
        let text = format!(
            "[guest]\nkernel = \"{at}/probe.elf\"\nmemory = \"64M\"\n\
             [pair]\narbiter = \"dir={at}/arbiter\"\nbegin-after = \"1s\"\n\
             [sides.a]\naddress = \"unix:{at}/a.sock\"\n[sides.b]\naddress = \"unix:{at}/b.sock\"\n\
             [sides.c]\naddress = \"unix:{at}/c.sock\"\n"
        );
        std::fs::write(directory.path().join("vmft.toml"), text).unwrap();
        Self { directory, started: 0 }
    }

    /// Where everything of theirs is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The pair's file.
    pub fn file(&self) -> PathBuf {
        self.directory.path().join("vmft.toml")
    }

    /// `vmft up` on the host of a side.
    pub fn up(&mut self, side: &str) -> SideProcess {
        self.started += 1;
        let name = format!("{side}{}", self.started);
        let arguments: Vec<OsString> =
            vec![self.file().into(), "--side".into(), side.into(), "--".into()];
        let which = if side == "a" { Which::Primary } else { Which::Backup };
        let directory = self.directory.path();
        SideProcess::start_named(program(), "up", (which, &name), directory, &arguments).unwrap()
    }
}

/// Waits until a side has a role in a generation.
pub fn wait(side: &mut SideProcess, role: Role, generation: u64) -> SideStatus {
    let wanted = |status: &SideStatus| status.role == role && status.generation == generation;
    side.wait_status(LIMIT, wanted).unwrap()
}

fn wait_says(side: &mut SideProcess, wanted: &str) {
    side.wait_says(LIMIT, |said| said.contains(wanted)).unwrap();
}

#[test]
fn sides_of_one_file_become_what_the_arbiters_state_says_after_every_crash() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut hosts = Hosts::new();
    // The first one begins, whoever is there.
    let mut a = hosts.up("a");
    wait_says(&mut a, "side a: the guest begins here");
    wait(&mut a, Role::Alone, 1);
    let mut b = hosts.up("b");
    wait_says(&mut b, "side b: a side of the pair is alive; this one follows");
    wait(&mut b, Role::Backup, 1);
    wait(&mut a, Role::Primary, 1);

    // One host crashes: the other goes on, and is followed by the one that comes back.
    a.kill().unwrap();
    wait(&mut b, Role::Alone, 2);
    let mut a = hosts.up("a");
    wait_says(&mut a, "this one follows whichever is live");
    wait(&mut a, Role::Backup, 2);
    wait(&mut b, Role::Primary, 2);

    // Both crash, and the one that is not to begin first comes back alone: it waits, and begins.
    a.kill().unwrap();
    b.kill().unwrap();
    let mut b = hosts.up("b");
    wait_says(&mut b, "side b: no side of the pair is alive; side a has 1 s to begin");
    wait_says(&mut b, "is over, and no side is alive: the guest boots again here");
    let begun = b.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    assert!(begun.generation > 2, "{begun:?}");
    let mut a = hosts.up("a");
    wait(&mut a, Role::Backup, begun.generation);

    // The operator stops the guest: both end, in order.
    b.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
    vmft::api_client::shutdown(&b.api()).unwrap();
    assert_eq!(b.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", b.messages());
    assert_eq!(a.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", a.messages());
}

#[test]
fn a_guest_moves_to_and_fro_and_the_side_that_it_leaves_follows_it() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut hosts = Hosts::new();
    let mut a = hosts.up("a");
    wait(&mut a, Role::Alone, 1);
    let mut b = hosts.up("b");
    wait(&mut b, Role::Backup, 1);
    for generation in [1, 3] {
        wait(&mut a, Role::Primary, generation);
        vmft::api_client::switch(&a.api()).unwrap();
        wait(&mut a, Role::Backup, generation + 1);
        wait(&mut b, Role::Primary, generation + 1);
        vmft::api_client::switch(&b.api()).unwrap();
        wait(&mut b, Role::Backup, generation + 2);
    }
    wait(&mut a, Role::Primary, 5);
}

#[test]
fn a_side_that_waits_begins_when_nobody_is_left() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut hosts = Hosts::new();
    let mut a = hosts.up("a");
    wait(&mut a, Role::Alone, 1);
    let mut b = hosts.up("b");
    wait(&mut b, Role::Backup, 1);
    // A third one finds the place of a backup taken, and waits.
    let mut waiting = hosts.up("c");
    wait_says(&mut waiting, "this one follows");
    wait(&mut waiting, Role::Joining, 1);
    a.kill().unwrap();
    b.kill().unwrap();
    wait_says(&mut waiting, "no side of the pair is alive any more");
    wait_says(&mut waiting, "the guest boots again here");
    waiting.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
    vmft::api_client::shutdown(&waiting.api()).unwrap();
    assert_eq!(waiting.wait_exit(LIMIT).unwrap().code(), Some(0), "{}", waiting.messages());
}

#[test]
fn what_a_file_means_is_told_without_starting_anything() {
    let hosts = Hosts::new();
    let told = |arguments: &[&str]| {
        let output = Command::new(program())
            .arg("config")
            .arg(hosts.file())
            .args(arguments)
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, text, _) = told(&["--side", "b", "--", "--serial", "null"]);
    assert_eq!(code, Some(0));
    let line = |flag: &str| text.lines().find(|line| line.contains(flag)).unwrap();
    assert!(
        line("--memory").contains("size=64M") && line("--memory").ends_with("line 3"),
        "{text}"
    );
    assert!(line("--serial").ends_with("command line"), "{text}");
    assert!(line("--suspect-after").ends_with("default"), "{text}");
    assert!(!hosts.directory.path().join("arbiter").exists());
    let (code, _, said) = told(&["--side", "x"]);
    assert!(code == Some(1) && said.contains("its sides are a, b, c"), "{said}");
    let text = std::fs::read_to_string(hosts.file()).unwrap();
    std::fs::write(hosts.file(), text.replace("memory", "memroy")).unwrap();
    let (code, _, said) = told(&[]);
    assert!(code == Some(1) && said.contains("line 3: unknown field `memroy`"), "{said}");
}

#[test]
fn every_command_has_a_manual_page_and_is_completed() {
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("man1");
    assert!(Command::new(program()).arg("man").arg(&pages).status().unwrap().success());
    for name in ["vmft", "vmft-up", "vmft-primary", "vmft-disk-serve"] {
        let page = std::fs::read_to_string(pages.join(format!("{name}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{name}");
        assert!(!page.contains("end\\-with"), "{name} has a hidden option");
    }
    let output = Command::new(program()).args(["completions", "bash"]).output().unwrap();
    let script = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && script.contains("--event-log"), "{script}");
}
