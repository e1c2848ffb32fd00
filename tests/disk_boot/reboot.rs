//! Guests that start again with what they have put on their disks.

use crate::image::{LIMIT, MEMORY, grub_disk, program};
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use vmft::pair::{Look, PairConsole, SideProcess, Which, disk_argument, prefixed};
use vmft_backup::status::Role;
use vmft_guest_images::disk::check_disk;
use vmft_guest_images::workload::SHELL_PROMPT;

/// What the guest is started with, and tells by that how often it was.
const FIRST: &str = "vmft.run=shell quiet vmft.boot=1";
/// The ways that a kernel has to start again: by the keyboard controller, and by a triple fault, behind which
/// there is no place with a name.
const WAYS: [&str; 2] = ["reboot=k", "reboot=t"];

/// A console, read and typed at.
#[derive(Default)]
pub struct Shell {
    pub console: PairConsole,
    text: String,
}

impl Shell {
    pub fn wait_for(&mut self, wanted: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.text.find(wanted) {
                self.text.drain(..at + wanted.len());
                return;
            }
            match self.console.look(Duration::from_secs(1)) {
                Look::Bytes(bytes) => self.text += &String::from_utf8_lossy(&bytes),
                Look::Nothing => {}
                Look::Closed => panic!("{wanted:?} is not shown: {}", self.text),
            }
            assert!(Instant::now() < deadline, "{wanted:?} is not shown: {}", self.text);
        }
    }

    /// The guest is in its shell, and was started for the time with this number.
    fn is_up(&mut self, boot: u32) {
        self.wait_for(SHELL_PROMPT);
        self.console.type_in(b"for w in $(cat /proc/cmdline); do echo =$w=; done\n");
        self.wait_for(&format!("=vmft.boot={boot}=\r\n"));
        self.wait_for(SHELL_PROMPT);
    }

    /// Another command line is put on the disk, as an update of the kernel would, and the guest starts again.
    fn starts_again(&mut self, from: u32) {
        let to = from + 1;
        let edit = format!("sed -i s/boot={from}/boot={to}/ $disk/boot/grub/grub.cfg");
        self.console.type_in(format!("$bb {edit} && reboot\n").as_bytes());
    }
}

/// Starts a machine with this subcommand, whose guest starts again twice and switches itself off.
fn twice(place: &Path, subcommand: &str, way: &str, more: &[OsString]) {
    let disk = grub_disk(place, &[&format!("{FIRST} {way}")]);
    let mut options: Vec<OsString> = ["--memory", MEMORY, "--disk"].map(OsString::from).into();
    options.push(disk_argument(&disk));
    options.extend_from_slice(more);
    let started = SideProcess::start_as(program(), subcommand, Which::Primary, place, &options);
    let mut side = started.unwrap();
    let mut shell = Shell::default();
    shell.console.attach(&mut side).unwrap();
    shell.is_up(1);
    for boot in [1, 2] {
        shell.starts_again(boot);
        shell.is_up(boot + 1);
    }
    shell.console.type_in(b"poweroff\n");
    assert!(side.wait_exit(LIMIT).unwrap().success(), "{}", side.messages());
    let said = side.messages();
    assert_eq!(said.matches("GRUB's entry 0 (guest 0)").count(), 3, "{said}");
    assert!(check_disk(&disk).unwrap().clean);
}

#[test]
fn a_guest_boots_what_it_has_put_on_its_disk() {
    for way in WAYS {
        let directory = tempfile::tempdir().unwrap();
        twice(directory.path(), "run", way, &[]);
    }
}

#[test]
fn a_recorded_guest_that_starts_again_is_replayed_without_its_disk() {
    for way in WAYS {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path();
        let log = place.join("boots.log");
        twice(place, "record", way, &["--log".into(), log.clone().into()]);
        std::fs::remove_file(place.join("web.img")).unwrap();
        let mut replay = Command::new(program());
        let output = replay.arg("replay").arg(log).args(["--serial", "file=replayed"]);
        let output = output.current_dir(place).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let failed = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}{failed}");
        assert!(said.contains("the guest stopped: GuestPowerOff"), "{said}");
        let replayed = std::fs::read(place.join("replayed")).unwrap();
        let replayed = String::from_utf8_lossy(&replayed);
        assert!(replayed.contains("=vmft.boot=3=\r\n"), "{replayed}");
    }
}

#[test]
fn a_backup_follows_a_guest_that_starts_again_and_starts_it_again_itself() {
    for way in WAYS {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path();
        let disk = grub_disk(place, &[&format!("{FIRST} {way}")]);
        let channel = place.join("channel");
        let both =
            || ["--suspect-after".into(), "2000".into(), "--disk".into(), disk_argument(&disk)];
        let mut options: Vec<OsString> = both().into();
        options.extend(["--no-wait", "--memory", MEMORY, "--listen"].map(OsString::from));
        options.push(prefixed("unix:", &channel));
        let mut primary = SideProcess::start(program(), Which::Primary, place, &options).unwrap();
        let mut shell = Shell::default();
        shell.console.attach(&mut primary).unwrap();
        shell.is_up(1);
        let mut options: Vec<OsString> = both().into();
        options.extend(["--primary".into(), prefixed("unix:", &channel)]);
        let mut backup = SideProcess::start(program(), Which::Backup, place, &options).unwrap();
        shell.console.attach(&mut backup).unwrap();
        primary.wait_status(LIMIT, |status| status.role == Role::Primary).unwrap();
        shell.starts_again(1);
        shell.is_up(2);
        let said = format!("{}{}", primary.messages(), backup.messages());
        let status = primary.status().unwrap();
        assert_eq!((status.role, status.divergences_mended), (Role::Primary, 0), "{said}");
        assert!(!said.contains("diverge"), "{said}");
        primary.kill().unwrap();
        backup.wait_status(LIMIT, |status| status.role == Role::Alone).unwrap();
        shell.starts_again(2);
        shell.is_up(3);
        shell.console.type_in(b"poweroff\n");
        assert!(backup.wait_exit(LIMIT).unwrap().success(), "{}", backup.messages());
        assert!(check_disk(&disk).unwrap().clean);
    }
}
