//! The engines under test, and starting the program on them.

use std::ffi::OsStr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmft_guest_images::ProbeGuest;

/// One guest at a time: a side that waits for another test's guests may be taken for lost.
static TURN: Mutex<()> = Mutex::new(());

/// Waits until no other test's guest runs.
pub fn take_turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lines the probe prints.
pub const LINES: u32 = 24;

/// An engine as the command line names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Soft,
    KvmExit,
    KvmStep,
}

impl Engine {
    /// Its options.
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::Soft => &["--engine", "soft"],
            Self::KvmExit => &["--engine", "kvm", "--points", "exit"],
            Self::KvmStep => &["--engine", "kvm", "--points", "step"],
        }
    }

    /// True if the engine can be tested here. Where `/dev/kvm` is missing that is a failure, unless
    /// the run says that it has none.
    pub fn is_here(self) -> bool {
        self == Self::Soft || kvm_is_here()
    }
}

/// True if tests of KVM are to run; they fail by themselves where it does not open.
pub fn kvm_is_here() -> bool {
    if std::env::var_os("VMFT_NO_KVM").is_some_and(|value| value == "1") {
        eprintln!("not run: VMFT_NO_KVM=1 says that this host has no KVM");
        return false;
    }
    true
}

/// The probe guest: few enough rounds of computing for a CPU that interprets it slowly.
pub fn probe(lines: u32, rounds: u32) -> ProbeGuest {
    let number = |number| NonZeroU32::new(number).unwrap();
    ProbeGuest { lines: number(lines), ticks: 2, rounds: number(rounds), hold: [None; 2] }
}

/// The same, which waits after these lines until somebody types.
pub fn held_probe(lines: u32, rounds: u32, after: [u32; 2]) -> ProbeGuest {
    ProbeGuest { hold: after.map(NonZeroU32::new), ..probe(lines, rounds) }
}

/// Writes the probe guest's kernel.
pub fn write_probe(directory: &Path, guest: &ProbeGuest) -> PathBuf {
    let path = directory.join("probe.elf");
    std::fs::write(&path, guest.image()).unwrap();
    path
}

/// What the probe prints from its first line to its last.
pub fn expected(lines: u32) -> String {
    let lines: String = (1..=lines).map(|line| format!("vmft-line {line:06}\r\n")).collect();
    lines + "vmft-done\r\n"
}

/// Runs the program to its end.
pub fn vmft(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmft")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// What the program said on standard error.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs the program, which must succeed, and returns what it printed.
pub fn succeed(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
    let output = vmft(arguments);
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}
