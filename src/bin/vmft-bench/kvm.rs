//! Guests on `--engine kvm`, alone and as a pair at exit points, in turn: the probe, and a Linux whose
//! kernel can be followed there, if the user has one.

use crate::figure::{Figure, Goal, median};
use crate::lab::{INTERRUPTED, PATIENCE, cpu_time};
use crate::measure::Effort;
use anyhow::{Result, bail};
use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vmft::pair::{Lines, Look, PairConsole, SideProcess, Which, prefixed};
use vmft_backup::status::Role;
use vmft_guest_images::disk::{DiskSize, make_disk};
use vmft_guest_images::workload::{Bench, DEMO_DONE, DemoLine, Workload};
use vmft_guest_images::{Cache, Guest, ProbeGuest, cmdline, lockstep_guest};

/// How long one look at a console lasts.
const LOOK: Duration = Duration::from_millis(100);

/// A Linux that can be followed on `--engine kvm`.
#[derive(Debug, Clone)]
pub struct KvmLinux {
    kernel: PathBuf,
    initramfs: PathBuf,
    cmdline: String,
}

impl KvmLinux {
    /// The user's: `vmlinuz` and `initramfs.cpio` in a directory, and what its kernel needs to be told in
    /// `cmdline`.
    pub fn of(directory: &Path) -> Self {
        let cmdline = std::fs::read_to_string(directory.join("cmdline"));
        Self {
            kernel: directory.join("vmlinuz"),
            initramfs: directory.join("initramfs.cpio"),
            cmdline: cmdline
                .map_or_else(|_| cmdline::DEFAULT.to_owned(), |own| own.trim().to_owned()),
        }
    }

    /// The lockstep kernel, if it was built.
    pub fn lockstep(cache: &Cache) -> Option<Self> {
        let Guest { kernel, initramfs, .. } = lockstep_guest(cache).ok()?;
        Some(Self { kernel, initramfs, cmdline: cmdline::LOCKSTEP.to_owned() })
    }
}

/// How long a guest took, and how much CPU time the live side's process.
#[derive(Debug, Clone, Copy)]
struct Took {
    time: Duration,
    cpu: Duration,
}

/// A guest that prints one line when it begins what is measured, and one when it has done it.
struct Load {
    /// The machine's options.
    machine: Vec<OsString>,
    /// Whether it has a disk of its own.
    disk: bool,
    begins: String,
    ends: String,
}

impl Load {
    /// The probe: it prints `lines` lines and computes `rounds` rounds before each.
    fn probe(directory: &Path, lines: u32, rounds: u32) -> Result<Self> {
        let number = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
        let guest =
            ProbeGuest { lines: number(lines), ticks: 0, rounds: number(rounds), hold: [None; 2] };
        let kernel = directory.join("probe.elf");
        std::fs::write(&kernel, guest.image())?;
        let machine = ["--memory".into(), "size=64M".into(), "--kernel".into(), kernel.into()];
        let begins = "vmft-line 000001".to_owned();
        debug_assert_eq!(DemoLine::parse(&begins), Some(DemoLine::Line(1)));
        Ok(Self { machine: machine.into(), disk: false, begins, ends: DEMO_DONE.to_owned() })
    }

    /// A Linux that does `count` of `bench`.
    fn linux(guest: &KvmLinux, bench: Bench, count: u32) -> Self {
        let words = format!("{} {}", guest.cmdline, Workload::Bench { bench, count }.cmdline());
        let machine = [
            "--kernel".into(),
            guest.kernel.clone().into(),
            "--initramfs".into(),
            guest.initramfs.clone().into(),
            "--cmdline".into(),
            words.into(),
        ];
        let (begins, ends) = (bench.begin(count), bench.end(count));
        Self { machine: machine.into(), disk: true, begins, ends }
    }

    /// Options of one side in `directory`.
    fn options(&self, directory: &Path) -> Result<(Vec<OsString>, Vec<OsString>)> {
        let mut options = self.machine.clone();
        options.extend(["--engine".into(), "kvm".into()]);
        let arbiter = prefixed("dir=", &directory.join("arbiter"));
        let mut both: Vec<OsString> = vec!["--arbiter".into(), arbiter];
        if self.disk {
            let disk = directory.join("disk.img");
            make_disk(&disk, DiskSize::DEMO, "vmft-bench")?;
            // Whether anybody follows or not, so that only that differs.
            let mut disk = prefixed("path=", &disk);
            disk.push(",cache=none");
            both.extend(["--disk".into(), disk]);
        }
        Ok((options, both))
    }

    /// Time between the two lines, of a guest that nobody follows.
    fn alone(&self, program: &Path) -> Result<Took> {
        let directory = tempfile::Builder::new().prefix("vmft-bench").tempdir()?;
        let directory = directory.path();
        let (mut options, both) = self.options(directory)?;
        // Without the arbiter, of which a machine alone knows nothing.
        options.extend(both.into_iter().skip(2));
        let side = SideProcess::start_as(program, "run", Which::Primary, directory, &options)?;
        self.watch(vec![side])
    }

    /// Time between the two lines, of a pair.
    fn pair(&self, program: &Path) -> Result<Took> {
        let directory = tempfile::Builder::new().prefix("vmft-bench").tempdir()?;
        let directory = directory.path();
        let (mut options, both) = self.options(directory)?;
        options.extend(both.iter().cloned());
        options.extend(["--points", "exit", "--listen", "tcp:127.0.0.1:0"].map(OsString::from));
        let mut primary = SideProcess::start(program, Which::Primary, directory, &options)?;
        let status = primary.wait_status(PATIENCE, |status| status.listening.is_some())?;
        let address = status.listening.unwrap_or_default();
        let mut options: Vec<OsString> = vec!["--primary".into(), format!("tcp:{address}").into()];
        options.extend(both);
        let mut backup = SideProcess::start(program, Which::Backup, directory, &options)?;
        backup.wait_status(PATIENCE, |status| status.role == Role::Backup)?;
        self.watch(vec![primary, backup])
    }

    fn watch(&self, mut sides: Vec<SideProcess>) -> Result<Took> {
        let live = sides[0].pid();
        let mut console = PairConsole::default();
        for side in &mut sides {
            console.attach(side)?;
        }
        let (mut lines, mut begun) = (Lines::default(), None);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let bytes = match console.look(LOOK) {
                Look::Bytes(bytes) => bytes,
                Look::Nothing if Instant::now() < deadline => Vec::new(),
                Look::Nothing | Look::Closed => {
                    let said: String = sides.iter().map(SideProcess::messages).collect();
                    bail!("the guest does not get on; its sides say:\n{said}");
                }
            };
            if INTERRUPTED.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            let now = (Instant::now(), cpu_time(live));
            for line in lines.add(&bytes) {
                let line = line.trim_end();
                if line == self.begins {
                    begun = Some(now);
                } else if line == self.ends {
                    let begun = begun.unwrap_or(now);
                    return Ok(Took { time: now.0 - begun.0, cpu: now.1.saturating_sub(begun.1) });
                }
            }
        }
    }
}

/// Compares in turn; `load` makes a guest that does its work so many times.
fn compare(
    (name, goal): (&'static str, f64),
    program: &Path,
    effort: &Effort,
    load: impl Fn(u32) -> Result<Load>,
) -> Result<Figure> {
    let mut count = 16;
    let count = loop {
        let took = load(count)?.alone(program)?.time;
        if took >= effort.round / 8 {
            let exact = f64::from(count) * effort.round.as_secs_f64() / took.as_secs_f64();
            break exact.clamp(1.0, 900_000.0) as u32;
        }
        count *= 4;
    };
    let load = load(count)?;
    let (mut ratios, mut by_cpu, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        let (alone, pair) = (load.alone(program)?, load.pair(program)?);
        ratios.push(alone.time.div_duration_f64(pair.time));
        by_cpu.push(alone.cpu.div_duration_f64(pair.cpu));
        rates.push(f64::from(count) / alone.time.as_secs_f64());
    }
    let (rate, by_cpu) = (median(&rates), median(&by_cpu));
    let note = format!("unprotected {rate:.1} a second; {by_cpu:.2} by CPU time");
    Ok(Figure::new(name, "ratio", Goal::AtLeast(goal), ratios, note))
}

/// The probe, protected ÷ unprotected.
pub fn probe(program: &Path, effort: &Effort) -> Result<Vec<Figure>> {
    let directory = tempfile::Builder::new().prefix("vmft-bench").tempdir()?;
    let directory = directory.path();
    let compute = compare(("kvm-protected-compute", 0.95), program, effort, |count| {
        Load::probe(directory, 8, count.saturating_mul(16))
    })?;
    let exits = compare(("kvm-protected-exits", 0.90), program, effort, |count| {
        Load::probe(directory, count, 1)
    })?;
    Ok(vec![compute, exits])
}

/// A Linux, protected ÷ unprotected.
pub fn linux(guest: &KvmLinux, program: &Path, effort: &Effort) -> Result<Vec<Figure>> {
    let loads = [
        ("kvm-linux-compute", 0.95, Bench::Compute),
        ("kvm-linux-fork", 0.90, Bench::Fork),
        ("kvm-linux-disk", 0.90, Bench::Disk),
    ];
    let measure = |(name, goal, bench)| {
        compare((name, goal), program, effort, |count| Ok(Load::linux(guest, bench, count)))
    };
    loads.into_iter().map(measure).collect()
}
