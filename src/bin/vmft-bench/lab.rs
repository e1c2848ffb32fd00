//! Where guests are started, and how they are talked to.
//!
//! Guests start from one snapshot of the default guest at its shell's prompt, each with a copy of
//! the disk, so that a measurement need not wait for a boot. A measurement types a command between
//! two marker lines; host time is taken where the markers are read.

use crate::kvm::KvmLinux;
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmft::api_client;
use vmft::pair::{Lines, Look, PairConsole, SideProcess, Which, prefixed};
use vmft_backup::status::{Role, SideStatus};
use vmft_guest_images::disk::{DiskSize, make_disk};
use vmft_guest_images::workload::SHELL_PROMPT;

/// How long anything may take before the bench gives up; a loaded host included.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// How long one look at a console lasts before other things are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long to wait for an answer before a key is pressed again.
const KEY_PAUSE: Duration = Duration::from_millis(20);

/// Set when the user wants the bench to end.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What is defined in every guest's shell before the first measurement: `c` computes, `f` forks and
/// executes, `d` writes and syncs blocks of 4 KiB, each so many times; `p` prints lines for ever.
const DEFINITIONS: &[&str] = &[
    "c() { i=0 x=1; while [ $i -lt $1 ]; do i=$((i+1)); x=$(((x*31+i)%65521)); done; }",
    "f() { i=0; while [ $i -lt $1 ]; do i=$((i+1)); /bin/busybox true; done; }",
    "d() { i=0; : >/mnt/bench; while [ $i -lt $1 ]; do i=$((i+1)); \
     printf '%04095d\\n' $i >>/mnt/bench; sync /mnt/bench; done; }",
    "p() { i=0; while :; do i=$((i+1)); echo line $i; done; }",
];

/// How a first boot went.
#[derive(Debug, Clone, Copy)]
pub struct Boot {
    /// From the start of the process to the prompt.
    pub time: Duration,
    /// Instructions retired until then.
    pub instructions: u64,
    /// CPU time of the process until then.
    pub cpu: Duration,
}

/// The bench's place on this machine.
#[derive(Debug)]
pub struct Lab {
    directory: tempfile::TempDir,
    program: PathBuf,
    kvm_linux: Option<KvmLinux>,
    guests: u32,
    snapshot: Option<PathBuf>,
}

impl Lab {
    /// A fresh place for `program`'s guests.
    pub fn open(program: PathBuf, kvm_linux: Option<KvmLinux>) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("vmft-bench").tempdir()?;
        Ok(Self { directory, program, kvm_linux, guests: 0, snapshot: None })
    }

    /// The program under measurement.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The Linux that can be followed on `--engine kvm`.
    pub fn kvm_linux(&self) -> Result<&KvmLinux> {
        let why = "the lockstep kernel is not built (vmft guest --lockstep), and --kvm-guest names no other";
        self.kvm_linux.as_ref().context(why)
    }

    fn new_directory(&mut self) -> Result<PathBuf> {
        self.guests += 1;
        let path = self.directory.path().join(self.guests.to_string());
        std::fs::create_dir(&path)?;
        Ok(path)
    }

    /// Boots the default guest from nothing to its prompt, and keeps it as the snapshot.
    pub fn boot(&mut self) -> Result<Boot> {
        let directory = self.new_directory()?;
        let disk = directory.join("disk.img");
        make_disk(&disk, DiskSize::DEMO, "vmft-bench")?;
        let started = Instant::now();
        let arguments: [OsString; 2] = ["--disk".into(), prefixed("path=", &disk)];
        let mut guest = Guest::alone(&self.program, directory.clone(), &arguments)?;
        guest.wait_for(|text| text.contains(SHELL_PROMPT))?;
        let time = started.elapsed();
        let instructions = guest.live().status()?.point;
        let cpu = guest.live_cpu();
        for definition in DEFINITIONS {
            guest.command(definition)?;
        }
        guest.command("sync")?;
        let snapshot = directory.join("snapshot");
        api_client::snapshot(&guest.live().api(), &snapshot)?;
        // Killed before it writes again, so that the disk is as the snapshot knows it.
        drop(guest);
        self.snapshot = Some(snapshot);
        Ok(Boot { time, instructions, cpu })
    }

    /// The options that restore the snapshot, with its disk in `directory`.
    fn restored(&mut self, directory: &Path) -> Result<(OsString, Vec<OsString>)> {
        if self.snapshot.is_none() {
            self.boot()?;
        }
        let snapshot = self.snapshot.clone().expect("just made");
        let disk = directory.join("disk.img");
        let original = snapshot.with_file_name("disk.img");
        std::fs::copy(&original, &disk).context("copying the disk")?;
        let mut disk = prefixed("path=", &disk);
        // Whether anybody follows or not, so that only that differs.
        disk.push(",cache=none");
        let options = vec!["--restore".into(), snapshot.into(), "--disk".into(), disk.clone()];
        Ok((disk, options))
    }

    /// A guest from the snapshot, unprotected, that may not listen yet, and when its process was
    /// started.
    pub fn alone(&mut self) -> Result<(Guest, Instant)> {
        let directory = self.new_directory()?;
        let (_, options) = self.restored(&directory)?;
        let started = Instant::now();
        Ok((Guest::alone(&self.program, directory, &options)?, started))
    }

    /// A guest from the snapshot, protected.
    pub fn pair(&mut self) -> Result<Guest> {
        self.pair_with(&[])
    }

    /// The same, with `more` on both sides' command lines.
    pub fn pair_with(&mut self, more: &[&str]) -> Result<Guest> {
        let directory = self.new_directory()?;
        let (disk, mut options) = self.restored(&directory)?;
        let more = more.iter().map(OsString::from);
        options.extend(["--listen".into(), "tcp:127.0.0.1:0".into()]);
        options.extend(more.clone());
        let mut primary = SideProcess::start(&self.program, Which::Primary, &directory, &options)?;
        let status = primary.wait_status(PATIENCE, |status| status.listening.is_some())?;
        let address = status.listening.expect("just seen");
        let options = ["--primary".into(), format!("tcp:{address}").into(), "--disk".into(), disk];
        let options: Vec<OsString> = options.into_iter().chain(more).collect();
        let backup = SideProcess::start(&self.program, Which::Backup, &directory, &options)?;
        let mut guest = Guest::new(directory, primary, Some(backup))?;
        guest.sides[1].wait_status(PATIENCE, |status| status.role == Role::Backup)?;
        guest.command(":")?;
        Ok(guest)
    }
}

impl Lab {
    /// A guest from the snapshot, live and alone, that backups may join.
    pub fn relay(&mut self) -> Result<Relay> {
        let directory = self.new_directory()?;
        let (disk, mut options) = self.restored(&directory)?;
        options.extend(["--no-wait", "--listen", "tcp:127.0.0.1:0"].map(Into::into));
        let primary = SideProcess::start(&self.program, Which::Primary, &directory, &options)?;
        let mut guest = Guest::new(directory, primary, None)?;
        guest.wait_prompt_answers()?;
        Ok(Relay { guest, program: self.program.clone(), disk, others: Vec::new() })
    }

    /// How long it takes from the start of a process until the guest of the snapshot runs in it.
    pub fn restore_to_running(&mut self) -> Result<Duration> {
        let directory = self.new_directory()?;
        let (_, options) = self.restored(&directory)?;
        let started = Instant::now();
        let which = Which::Primary;
        let mut side = SideProcess::start_as(&self.program, "run", which, &directory, &options)?;
        side.wait_status(PATIENCE, |status| status.role == Role::Unprotected)?;
        let took = started.elapsed();
        drop(side);
        std::fs::remove_dir_all(&directory)?;
        Ok(took)
    }
}

/// A guest that goes from side to side.
#[derive(Debug)]
pub struct Relay {
    pub guest: Guest,
    program: PathBuf,
    disk: OsString,
    /// Sides 1 and on; a side that is gone leaves its place empty.
    others: Vec<Option<SideProcess>>,
}

impl Relay {
    fn side(&mut self, number: usize) -> Result<&mut SideProcess> {
        match number {
            0 => Ok(&mut self.guest.sides[0]),
            _ => self.others[number - 1].as_mut().context("a side that is there"),
        }
    }

    fn add(&mut self, subcommand: &str, mut options: Vec<OsString>) -> Result<usize> {
        let number = self.others.len() + 1;
        options.extend(["--disk".into(), self.disk.clone()]);
        options.extend(["--listen".into(), "tcp:127.0.0.1:0".into()]);
        let name = (Which::Backup, &*format!("side-{number}"));
        let directory = &self.guest.directory;
        let side = SideProcess::start_named(&self.program, subcommand, name, directory, &options)?;
        self.others.push(Some(side));
        Ok(number)
    }

    fn address(&mut self, number: usize) -> Result<OsString> {
        let status = self.wait(number, |status| status.listening.is_some())?;
        Ok(format!("tcp:{}", status.listening.expect("just seen")).into())
    }

    /// Starts a backup of side 0.
    pub fn add_backup(&mut self) -> Result<usize> {
        let address = self.address(0)?;
        self.add("backup", vec!["--primary".into(), address])
    }

    /// Starts a standby that joins whichever of `sides` is live.
    pub fn add_standby(&mut self, sides: &[usize]) -> Result<usize> {
        let mut options: Vec<OsString> = vec!["--join".into()];
        for side in sides {
            options.push(self.address(*side)?);
        }
        self.add("standby", options)
    }

    /// Waits until a side is as wanted.
    pub fn wait(
        &mut self,
        number: usize,
        wanted: impl Fn(&SideStatus) -> bool,
    ) -> Result<SideStatus> {
        self.side(number)?.wait_status(PATIENCE, wanted)
    }

    /// Waits until a side is live and followed.
    pub fn wait_followed(&mut self, number: usize) -> Result<SideStatus> {
        self.wait(number, |status| status.role == Role::Primary && status.followers > 0)
    }

    /// Has a backup leave.
    pub fn leave(&mut self, number: usize) -> Result<()> {
        let side = self.side(number)?;
        side.signal(Signal::SIGTERM)?;
        side.wait_exit(PATIENCE)?;
        Ok(())
    }

    /// Kills a side at once.
    pub fn kill(&mut self, number: usize) -> Result<()> {
        self.side(number)?.kill()
    }
}

/// A running guest. Its processes are killed and its files removed when it is dropped.
#[derive(Debug)]
pub struct Guest {
    sides: Vec<SideProcess>,
    console: PairConsole,
    lines: Lines,
    commands: u32,
    directory: PathBuf,
}

impl Guest {
    fn new(directory: PathBuf, first: SideProcess, backup: Option<SideProcess>) -> Result<Self> {
        let mut sides: Vec<_> = std::iter::once(first).chain(backup).collect();
        let mut console = PairConsole::default();
        for side in &mut sides {
            console.attach(side)?;
        }
        Ok(Self { sides, console, lines: Lines::default(), commands: 0, directory })
    }

    fn alone(program: &Path, directory: PathBuf, options: &[OsString]) -> Result<Self> {
        let side = SideProcess::start_as(program, "run", Which::Primary, &directory, options)?;
        Self::new(directory, side, None)
    }

    /// The side that runs the guest for real.
    pub fn live(&self) -> &SideProcess {
        &self.sides[0]
    }

    /// The side that follows, if there is one.
    pub fn backup(&self) -> Option<&SideProcess> {
        self.sides.get(1)
    }

    /// Where its files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What the live side says of itself.
    pub fn status(&self) -> Result<SideStatus> {
        self.live().status()
    }

    /// CPU time of the live side's process so far.
    pub fn live_cpu(&self) -> Duration {
        cpu_time(self.live().pid())
    }

    /// The largest memory of a side beyond its guest's, in MiB.
    pub fn overhead_mib(&self) -> Result<f64> {
        let mut largest = 0;
        for side in &self.sides {
            largest = largest.max(side.status()?.overhead_bytes.unwrap_or(0));
        }
        Ok(largest as f64 / f64::from(1 << 20))
    }

    /// Reads the console until the text since the last line's end is as wanted.
    fn wait_for(&mut self, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !wanted(&self.lines.partial()) {
            self.look(deadline)?;
        }
        Ok(())
    }

    /// One look at the console: the lines it completes.
    pub fn look(&mut self, deadline: Instant) -> Result<Vec<String>> {
        self.look_for(LOOK, deadline)
    }

    fn look_for(&mut self, limit: Duration, deadline: Instant) -> Result<Vec<String>> {
        if INTERRUPTED.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        let messages = || self.sides.iter().map(SideProcess::messages).collect::<String>();
        match self.console.look(limit) {
            Look::Bytes(bytes) => Ok(self.lines.add(&bytes)),
            Look::Nothing if Instant::now() < deadline => Ok(Vec::new()),
            Look::Nothing => {
                bail!("the guest does not get on; its sides say:\n{}", messages())
            }
            Look::Closed => bail!("the guest is gone; its sides say:\n{}", messages()),
        }
    }

    /// Types keys.
    pub fn type_in(&mut self, keys: &str) {
        self.console.type_in(keys.as_bytes());
    }

    /// Types newlines until a prompt answers: those that come before the side is live are lost.
    pub fn wait_prompt_answers(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        // The newline's echo ends the prompt that was there before.
        loop {
            self.type_in("\n");
            if !self.look_for(KEY_PAUSE, deadline)?.is_empty() {
                return self.wait_for(|text| text.contains(SHELL_PROMPT));
            }
        }
    }

    /// Has the shell run `text`, and returns the host time between the lines printed before and
    /// after it.
    pub fn command(&mut self, text: &str) -> Result<Duration> {
        self.command_watched(text, |_| Ok(()))
    }

    /// As [`Self::command`]; `watch` is called several times a second meanwhile.
    pub fn command_watched(
        &mut self,
        text: &str,
        watch: impl FnMut(&Self) -> Result<()>,
    ) -> Result<Duration> {
        self.start(text);
        self.wait_end(watch)
    }

    /// Has the shell run `text`, and does not wait; [`Self::wait_end`] does.
    pub fn start(&mut self, text: &str) {
        self.commands += 1;
        let number = self.commands;
        // Quoted, so that the echo of what is typed is no marker.
        self.type_in(&format!("echo b''egin{number}; {text}; echo e''nd{number}\n"));
    }

    /// Waits for the end of the command started last. How long it took is as exact as the looks
    /// at the console are frequent.
    pub fn wait_end(&mut self, mut watch: impl FnMut(&Self) -> Result<()>) -> Result<Duration> {
        let number = self.commands;
        let (begin, end) = (format!("begin{number}"), format!("end{number}"));
        let mut deadline = Instant::now() + PATIENCE;
        let mut begun = None;
        let mut watched = Instant::now();
        loop {
            let lines = self.look(deadline)?;
            let now = Instant::now();
            if lines.contains(&begin) {
                begun = Some(now);
                deadline = now + PATIENCE;
            }
            if lines.contains(&end) {
                let begun = begun.context("a command's end came before its beginning")?;
                return Ok(now - begun);
            }
            if begun.is_some() && watched.elapsed() >= LOOK {
                watch(self)?;
                watched = Instant::now();
            }
        }
    }

    /// Kills the live side at once, as a power failure would, and returns how long it takes until
    /// the backup's first new output is read.
    pub fn fail_over(&mut self) -> Result<Duration> {
        let killed = Instant::now();
        self.sides[0].signal(Signal::SIGKILL)?;
        let deadline = killed + PATIENCE;
        loop {
            self.look(deadline)?;
            if self.console.last_from() == Some(Which::Backup) {
                return Ok(killed.elapsed());
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.sides.clear();
        if !self.directory.join("snapshot").exists() {
            // What is left goes with the lab.
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

/// CPU time of a process, from proc(5)'s stat.
pub fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: u64 =
        after_name.split(' ').skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum();
    // User space sees 100 ticks a second on every Linux.
    Duration::from_millis(ticks * 10)
}
