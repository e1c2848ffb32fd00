//! The default guest on `soft`, and on QEMU's TCG: the same kernel, initramfs and workload, by CPU
//! time of the whole process from its start to the guest's end.
//!
//! One round runs each once, ours and QEMU's without and with `-icount`, so that a busy host
//! slows all. A figure is QEMU's time in terms of ours.

use crate::figure::{Figure, Goal, median};
use crate::lab::{INTERRUPTED, PATIENCE, cpu_time};
use crate::measure::Effort;
use anyhow::{Context, Result, bail};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmft_guest_images::workload::{Bench, Workload};
use vmft_guest_images::{Cache, Guest, cmdline, default_guest};

/// The program that is compared with.
const PROGRAM: &str = "qemu-system-x86_64";
/// Guest memory, in MiB.
const MEMORY: u32 = 256;

/// The figures without and with `-icount` and their goals, and what the guest does: a boot alone, or a boot
/// and that.
const FIGURES: [([(&str, f64); 2], Workload); 3] = [
    ([("qemu-boot", 2.5), ("qemu-boot-icount", 5.0)], BOOT),
    ([("qemu-compute", 2.0), ("qemu-compute-icount", 3.0)], COMPUTE),
    ([("qemu-fork", 3.0), ("qemu-fork-icount", 3.5)], FORK),
];
const BOOT: Workload = Workload::Bench { bench: Bench::Compute, count: 1 };
const COMPUTE: Workload = Workload::Bench { bench: Bench::Compute, count: 40_000 };
const FORK: Workload = Workload::Bench { bench: Bench::Fork, count: 400 };

/// The names of the figures.
pub const NAMES: &[&str] = &[
    "qemu-boot",
    "qemu-boot-icount",
    "qemu-compute",
    "qemu-compute-icount",
    "qemu-fork",
    "qemu-fork-icount",
];

/// A guest that runs to its end, and the place of what it prints.
struct Run {
    child: Child,
    console: PathBuf,
}

impl Run {
    fn start(mut command: Command, console: PathBuf) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let messages = File::create(console.with_extension("messages"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(messages);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { child, console })
    }

    /// CPU time of the process, once the guest has done what it should and is off.
    fn finish(mut self, bench: Bench, count: u32) -> Result<Duration> {
        let deadline = Instant::now() + PATIENCE;
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        // The process is left to be waited for, so that its times can still be read.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        while waitid(Id::Pid(pid), flags)? == WaitStatus::StillAlive {
            if INTERRUPTED.load(Ordering::Relaxed) || Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!("the guest did not end; its console is {}", self.console.display());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let took = cpu_time(self.child.id());
        let status = self.child.wait()?;
        let console = std::fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        if !status.success() || !console.contains(&bench.end(count)) {
            let messages = std::fs::read_to_string(self.console.with_extension("messages"));
            bail!("the guest failed ({status}): {}{console}", messages.unwrap_or_default());
        }
        Ok(took)
    }
}

/// What is needed to start the guest anywhere.
struct Place<'a> {
    program: &'a Path,
    guest: Guest,
    directory: tempfile::TempDir,
}

impl Place<'_> {
    fn ours(&self, workload: Workload) -> Result<Run> {
        let console = self.directory.path().join("ours");
        let mut command = Command::new(self.program);
        command.args(["run", "--memory", &format!("size={MEMORY}M"), "--cmdline"]);
        command.arg(workload.cmdline());
        let mut serial = std::ffi::OsString::from("file=");
        serial.push(&console);
        command.arg("--serial").arg(serial);
        Run::start(command, console)
    }

    fn theirs(&self, words: &str, icount: bool) -> Result<Run> {
        let console = self.directory.path().join("theirs");
        let mut command = Command::new(PROGRAM);
        command.args(["-M", "pc", "-accel", "tcg,thread=single", "-cpu", "qemu64", "-smp", "1"]);
        command.args(["-m", &MEMORY.to_string(), "-nodefaults", "-display", "none", "-no-reboot"]);
        if icount {
            command.args(["-icount", "shift=0,sleep=off"]);
        }
        let mut serial = std::ffi::OsString::from("file:");
        serial.push(&console);
        command.arg("-serial").arg(serial).arg("-append").arg(words);
        command.arg("-kernel").arg(&self.guest.kernel).arg("-initrd").arg(&self.guest.initramfs);
        Run::start(command, console)
    }
}

/// Refuses where QEMU is not installed, with what to do.
fn check_installed() -> Result<()> {
    let found = Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        bail!(
            "there is no {PROGRAM} to compare with; install Debian's qemu-system-x86, or do \
             without --against"
        );
    }
    Ok(())
}

/// Measures the figures that are wanted.
pub fn figures(program: &Path, effort: &Effort, wanted: &[&str]) -> Result<Vec<Figure>> {
    check_installed()?;
    let guest = default_guest(&Cache::from_environment()?, &mut vmft::progress::terminal())?;
    let directory = tempfile::Builder::new().prefix("vmft-bench").tempdir()?;
    let place = Place { program, guest, directory };
    let mut figures = Vec::new();
    for (pair, workload) in FIGURES {
        let names = pair.map(|(name, _)| wanted.contains(&name));
        if names == [false, false] {
            continue;
        }
        let Workload::Bench { bench, count } = workload else {
            unreachable!("the guest ends by itself")
        };
        let words = cmdline::with_workload(workload);
        let mut ours = Vec::new();
        let mut theirs = [Vec::new(), Vec::new()];
        for _ in 0..effort.boots.max(effort.rounds / 2) {
            ours.push(place.ours(workload)?.finish(bench, count)?.as_secs_f64());
            for (icount, times) in [false, true].into_iter().zip(&mut theirs) {
                if names[usize::from(icount)] {
                    let run = place.theirs(&words, icount)?;
                    times.push(run.finish(bench, count)?.as_secs_f64());
                }
            }
        }
        for ((name, goal), times) in pair.into_iter().zip(theirs) {
            if times.is_empty() {
                continue;
            }
            let ratios = times.iter().zip(&ours).map(|(theirs, ours)| theirs / ours).collect();
            let note = format!("CPU time {:.2} s, QEMU's {:.2} s", median(&ours), median(&times));
            figures.push(Figure::new(name, "ratio", Goal::AtLeast(goal), ratios, note));
        }
    }
    Ok(figures)
}
