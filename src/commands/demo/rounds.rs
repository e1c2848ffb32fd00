//! The demo in rounds: kill, failover, protected again, kill.

use super::ledger::Ledger;
use super::report::{RecordVerdicts, Report, Verdicts};
use super::{DemoOptions, EXIT_LIMIT, SILENCE_LIMIT, disk_argument, show};
use crate::pair::{Look, PairConsole, SideProcess, Which};
use crate::progress;
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vmft_backup::status::{Role, SideStatus};
use vmft_guest_images::Workload;
use vmft_guest_images::disk::{DiskSize, check_disk, make_disk, read_disk_file};
use vmft_guest_images::workload::{RECORDS_FILE, count_records};

/// The guest, and the sides it goes through: one live, one that follows, one that waits.
struct Rounds {
    program: PathBuf,
    workplace: PathBuf,
    disk: PathBuf,
    console: PairConsole,
    ledger: Ledger,
    live: SideProcess,
    follower: SideProcess,
    waiting: SideProcess,
    /// The words for every side that say how they protect.
    protect: Vec<OsString>,
    started: u32,
    heard: Instant,
}

fn address(side: &mut SideProcess) -> Result<OsString> {
    let status = side.wait_status(EXIT_LIMIT, |status| status.listening.is_some())?;
    Ok(format!("tcp:{}", status.listening.expect("just seen")).into())
}

impl Rounds {
    fn set(disk: &Path, options: &DemoOptions) -> Result<Self> {
        make_disk(disk, DiskSize::DEMO, "vmft-demo")?;
        let program = std::env::current_exe().context("finding this program")?;
        let workplace = disk.parent().expect("a file in the workplace").to_owned();
        let workload = Workload::Demo { lines: options.lines(), pause_ms: options.pause };
        let memory = format!("size={}", options.memory.size);
        let words = ["--listen", "tcp:127.0.0.1:0", "--memory", &memory, "--cmdline"];
        let mut arguments: Vec<OsString> = words.map(Into::into).into();
        arguments.extend([workload.cmdline().into(), "--disk".into(), disk_argument(disk)]);
        let protect: Vec<OsString> = options.protect().collect();
        arguments.extend(protect.iter().cloned());
        let mut live = SideProcess::start(&program, Which::Primary, &workplace, &arguments)?;
        let mut console = PairConsole::default();
        console.attach(&mut live)?;
        let addresses = [address(&mut live)?];
        let mut follower = standby(&program, &workplace, disk, (1, &addresses), &protect)?;
        console.attach(&mut follower)?;
        live.wait_status(EXIT_LIMIT, |status| status.followers > 0)?;
        let addresses = [address(&mut live)?, address(&mut follower)?];
        let mut waiting = standby(&program, &workplace, disk, (2, &addresses), &protect)?;
        console.attach(&mut waiting)?;
        let (disk, ledger) = (disk.to_owned(), Ledger::default());
        let heard = Instant::now();
        Ok(Self {
            program,
            workplace,
            disk,
            console,
            ledger,
            live,
            follower,
            waiting,
            protect,
            started: 2,
            heard,
        })
    }

    /// One look at the console. False when every side is gone.
    fn look(&mut self) -> Result<bool> {
        match self.console.look(Duration::from_millis(50)) {
            Look::Bytes(bytes) => {
                self.heard = Instant::now();
                show(&bytes)?;
                self.ledger.read(&bytes);
            }
            Look::Nothing if self.heard.elapsed() > SILENCE_LIMIT => {
                bail!("the guest has been silent for {} s", SILENCE_LIMIT.as_secs())
            }
            Look::Nothing => {}
            Look::Closed => return Ok(false),
        }
        Ok(!self.ledger.is_done())
    }

    /// Reads on until the live side is followed. False if the guest ends first.
    fn wait_followed(&mut self) -> Result<bool> {
        loop {
            let status = self.live.status();
            if status.is_ok_and(|status| status.role == Role::Primary && status.followers > 0) {
                return Ok(true);
            }
            if !self.look()? {
                return Ok(false);
            }
        }
    }

    /// Kills the live side; the one that follows goes on, and the one that waits follows it. Only then
    /// does a new one wait: it might be faster.
    fn round(&mut self, number: u32) -> Result<bool> {
        self.live.kill()?;
        let killed = Instant::now();
        let process = self.live.pid();
        eprintln!("\r\nvmft: round {number}: live side (process {process}) killed with SIGKILL");
        std::mem::swap(&mut self.live, &mut self.follower);
        if !self.wait_followed()? {
            return Ok(false);
        }
        let time = killed.elapsed().as_secs_f64();
        eprintln!("\r\nvmft: round {number}: protected again after {time:.2} s");
        self.started += 1;
        let addresses = [address(&mut self.live)?, address(&mut self.waiting)?];
        let place = (self.started, &addresses[..]);
        let mut new = standby(&self.program, &self.workplace, &self.disk, place, &self.protect)?;
        self.console.attach(&mut new)?;
        self.follower = std::mem::replace(&mut self.waiting, new);
        Ok(true)
    }
}

fn standby(
    program: &Path,
    workplace: &Path,
    disk: &Path,
    (number, addresses): (u32, &[OsString]),
    protect: &[OsString],
) -> Result<SideProcess> {
    let mut arguments: Vec<OsString> = vec!["--join".into()];
    arguments.extend(addresses.iter().cloned());
    arguments.extend(["--listen".into(), "tcp:127.0.0.1:0".into(), "--disk".into()]);
    arguments.push(disk_argument(disk));
    arguments.extend(protect.iter().cloned());
    let name = (Which::Backup, &*format!("standby-{number}"));
    SideProcess::start_named(program, "standby", name, workplace, &arguments)
}

/// Plays so many rounds, spread over the guest's records.
pub(super) fn play(options: &DemoOptions, disk: &Path) -> Result<ExitCode> {
    let started = Instant::now();
    let mut rounds = Rounds::set(disk, options)?;
    let waiting = progress::spinner("booting the guest on both sides");
    let mut before = SideStatus::default();
    for round in 1..=options.rounds {
        let due = options.lines() * round / (options.rounds + 1);
        while rounds.ledger.synced() < due && rounds.look()? {
            if rounds.ledger.printed() > 0 {
                waiting.finish_and_clear();
            }
        }
        before = rounds.live.status().context("asking a side before its end")?;
        if rounds.ledger.is_done() || !rounds.round(round)? {
            bail!("the guest ended in round {round}; give it more --lines");
        }
    }
    let survivor = rounds.live.status().ok();
    while rounds.look()? {}
    let exit = rounds.live.wait_exit(EXIT_LIMIT)?;
    if !exit.success() {
        bail!("the last side ended with {exit}; it says:\n{}", rounds.live.messages());
    }
    // The rest of what it wrote, such as the line of the power-off.
    rounds.look()?;
    let records = RecordVerdicts {
        on_disk: count_records(&read_disk_file(disk, RECORDS_FILE)?)
            .context("the records on the disk")?,
        disk: check_disk(disk)?,
    };
    let verdicts = Verdicts {
        lines_wanted: options.lines(),
        records: Some(records),
        bytes_repeated_to_readers: rounds.console.merger().repeated(),
        bytes_missing: rounds.console.merger().missing(),
        client: None,
    };
    let failover = survivor.as_ref().and_then(|status| status.failover.as_ref());
    let first = failover.and_then(|failover| failover.first_output_ms);
    let first = first.map(|ms| Duration::from_secs_f64(ms / 1e3));
    let report = Report::new(&rounds.ledger, verdicts, &before, survivor, first, started.elapsed());
    report.print();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(if report.good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
