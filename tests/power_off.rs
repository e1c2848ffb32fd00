//! The default guest switched off and started again, by each way that its kernel has: with ACPI, and without.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmft::pair::{Look, PairConsole, SideProcess, Which, prefixed};
use vmft_guest_images::disk::{DiskSize, check_disk, make_disk, read_disk_file};
use vmft_guest_images::workload::{SHELL_PROMPT, Workload};

/// How long anything may take that must come: booting on a busy host included.
const LIMIT: Duration = Duration::from_secs(240);
/// What the kernel says when it has come to the end of switching off, or of what it does in its place.
const POWER_DOWN: &str = "reboot: Power down";
const HALTED: &str = "reboot: System halted";
const RESTARTING: &str = "reboot: Restarting system";
/// What the guest reads the time from.
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// For a kernel that is not to look for the tables.
const WITHOUT_ACPI: &str = " acpi=off";

/// A guest in its shell, with a disk.
struct Guest {
    directory: TempDir,
    side: SideProcess,
    console: PairConsole,
    /// What the console has shown that no wait has passed yet.
    text: String,
}

impl Guest {
    /// Boots the guest, whose kernel gets these words more, to its prompt.
    fn boot(words: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk.img");
        make_disk(&disk, DiskSize::DEMO, "vmft-test").unwrap();
        let words = Workload::Shell.cmdline() + words;
        let arguments = ["--memory", "size=96M", "--cmdline", &words, "--disk"].map(Into::into);
        let mut arguments: Vec<OsString> = arguments.into();
        arguments.push(prefixed("path=", &disk));
        let program = Path::new(env!("CARGO_BIN_EXE_vmft"));
        let place = directory.path();
        let side = SideProcess::start_as(program, "run", Which::Primary, place, &arguments);
        let mut guest = Self {
            directory,
            side: side.unwrap(),
            console: PairConsole::default(),
            text: String::new(),
        };
        guest.console.attach(&mut guest.side).unwrap();
        guest.wait_for(SHELL_PROMPT);
        guest
    }

    fn type_in(&mut self, text: &str) {
        self.console.type_in(text.as_bytes());
    }

    /// Reads the console until it shows `wanted`, and returns what it has shown up to there.
    fn wait_for(&mut self, wanted: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.text.find(wanted) {
                return self.text.drain(..at + wanted.len()).collect();
            }
            match self.console.look(Duration::from_secs(1)) {
                Look::Bytes(bytes) => self.text += &String::from_utf8_lossy(&bytes),
                Look::Nothing => {}
                Look::Closed => panic!("{wanted:?} is not shown: {}", self.text),
            }
            assert!(Instant::now() < deadline, "{wanted:?} is not shown: {}", self.text);
        }
    }

    /// The guest shows `last` and is off: the program ends well.
    fn ends_after(mut self, last: &str) -> TempDir {
        self.wait_for(last);
        let exit = self.side.wait_exit(LIMIT).unwrap();
        assert!(exit.success(), "{exit}: {}", self.side.messages());
        self.directory
    }
}

#[test]
fn sysrq_o_switches_the_guest_off() {
    let mut guest = Guest::boot("");
    guest.type_in("echo o >/proc/sysrq-trigger\n");
    guest.ends_after(POWER_DOWN);
}

#[test]
fn sysrq_o_switches_a_guest_without_acpi_off() {
    let mut guest = Guest::boot(WITHOUT_ACPI);
    guest.type_in("echo o >/proc/sysrq-trigger\n");
    guest.ends_after(POWER_DOWN);
}

/// The guest writes to its disk, starts again, still has what it wrote, and is switched off.
fn starts_again_and_switches_off(words: &str, last: &str) {
    let mut guest = Guest::boot(words);
    guest.type_in("echo kept >$disk/file; reboot\n");
    let before = guest.wait_for(RESTARTING);
    assert!(!before.contains("vmft-fail"), "{before}");
    guest.wait_for(SHELL_PROMPT);
    // The kernel goes over to it about a second after it has begun.
    let wait = format!("until read -r c <{CLOCK}; [ $c = tsc ]; do read -r -t 0.1 -u 9 _; done");
    guest.type_in(&format!("{wait}; cat $disk/file {CLOCK}\n"));
    guest.wait_for("kept\r\ntsc\r\n");
    guest.type_in("poweroff\n");
    let directory = guest.ends_after(last);
    let disk = directory.path().join("disk.img");
    let check = check_disk(&disk).unwrap();
    assert!(check.clean, "{}", check.report);
    assert_eq!(read_disk_file(&disk, "/file").unwrap(), b"kept\n");
}

#[test]
fn reboot_starts_the_guest_again_and_poweroff_switches_it_off() {
    starts_again_and_switches_off("", POWER_DOWN);
}

#[test]
fn reboot_starts_a_guest_without_acpi_again_and_poweroff_switches_it_off() {
    starts_again_and_switches_off(WITHOUT_ACPI, HALTED);
}
