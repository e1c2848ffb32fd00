//! `vmft demo`: a guest survives the loss of its primary, before the user's eyes.

mod ledger;
mod network;
mod probe;
mod report;
mod rounds;
mod shell;
mod web;

use crate::commands;
use crate::dashboard::ListenOption;
use crate::engine_options::{EngineOptions, RunKind};
use crate::pair::{Look, PairConsole, SideProcess, Which, disk_argument};
use crate::private_network::{self, PrivateNetwork};
use crate::progress;
use crate::protection_options::ProtectOption;
use crate::remedy::Remedy;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use ledger::Ledger;
use network::Client;
use report::{RecordVerdicts, Report, Verdicts};
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vmft_backup::epoch::Protection;
use vmft_backup::status::{Role, SideStatus};
use vmft_guest_images::disk::{DiskSize, check_disk, make_disk, read_disk_file};
use vmft_guest_images::packages::{HOST_PACKAGES, ensure_packages};
use vmft_guest_images::workload::{RECORDS_FILE, count_records};
use vmft_guest_images::{Cache, Workload, default_guest, lockstep_guest};
use vmft_vmm::engine::EngineKind;

/// How long the guest may stay silent before the demo gives up: booting on a slow host included.
const SILENCE_LIMIT: Duration = Duration::from_secs(300);
/// How long a side may take to end after its guest.
const EXIT_LIMIT: Duration = Duration::from_secs(30);

/// Lines of a guest whose operator has named no number, and the most that may be named.
const LINES: u32 = 60;
const MOST_LINES: i64 = 100_000;

/// Where, in the cache, the last demo leaves what its sides tell of it.
const EXPLAINED: &str = "last-demo";

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DemoGuest {
    /// Numbered lines and records; the primary is killed in the middle, and everything counted.
    Records,
    /// An interactive shell; the kill is yours.
    Shell,
    /// Numbered lines of a guest of a few hundred bytes, without a disk: where no Linux runs.
    Probe,
}

/// Options of `vmft demo`.
#[derive(Debug, Args)]
pub struct DemoOptions {
    /// What the guest does
    #[arg(long, value_enum, default_value_t = DemoGuest::Records)]
    guest: DemoGuest,
    /// Numbered lines to print, and records to write: 60, or with --web as many as there may be
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=MOST_LINES))]
    lines: Option<u32>,
    /// Pause between two lines, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pause: u32,
    /// Kill the primary after this record, or the probe's line; default: in the middle
    #[arg(long, value_name = "N")]
    kill_after: Option<u32>,
    /// Give the guest a network, and let a client keep a TCP connection to it open across the kill;
    /// needs root
    #[arg(long, conflicts_with = "rounds")]
    net: bool,
    /// Kill so many times, one live side after the other: a standby takes each one's place
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "kill_after",
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// On a page, with three sides, and buttons for what may happen to them: kill, freeze, thaw, flip a
    /// bit, switch, pause. It prints the page's address, and lasts until Ctrl-C
    #[arg(long, value_name = "ADDRESS:PORT", num_args = 0..=1, require_equals = true,
          default_missing_value = "127.0.0.1:8080",
          conflicts_with_all = ["net", "rounds", "kill_after", "json"])]
    web: Option<ListenOption>,
    #[command(flatten)]
    engine: EngineOptions,
    /// How the guest is protected: the backup replays it, or is sent what has changed
    #[arg(long, value_name = "lockstep|checkpoint[,interval=25ms]", default_value = "lockstep")]
    protect: ProtectOption,
    /// Guest memory
    #[arg(long, value_name = "size=SIZE", default_value = "size=256M")]
    memory: crate::options::MemoryOption,
    /// Print the report as JSON as well
    #[arg(long)]
    json: bool,
    /// Keep the disk, the consoles and the messages of both sides in this new directory
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

impl DemoOptions {
    /// Numbered lines to print.
    fn lines(&self) -> u32 {
        self.lines.unwrap_or(if self.web.is_some() { MOST_LINES as u32 } else { LINES })
    }

    /// What the pair's machine is for.
    fn run_kind(&self) -> RunKind {
        self.protect.0.into()
    }

    /// The words for both sides that say how they protect.
    fn protect(&self) -> impl Iterator<Item = OsString> + use<> {
        self.protect.arguments().into_iter().map(OsString::from)
    }

    /// True if the guest's kernel must be the lockstep kernel.
    fn needs_lockstep_kernel(&self, engine: EngineKind) -> bool {
        self.protect.0 == Protection::Lockstep && engine.trusts_the_guest()
    }

    /// After which line or record to kill.
    fn kill_after(&self) -> Result<u32> {
        let kill_after = self.kill_after.unwrap_or(self.lines() / 2);
        if kill_after == 0 || kill_after > self.lines() {
            bail!("--kill-after {kill_after} is not between 1 and {} lines", self.lines());
        }
        Ok(kill_after)
    }
}

/// The place where a demo's files are.
enum Workplace {
    Temporary(tempfile::TempDir),
    Kept(PathBuf),
}

impl Workplace {
    fn new(keep: Option<&Path>) -> Result<Self> {
        match keep {
            None => Ok(Self::Temporary(tempfile::tempdir().context("making a directory")?)),
            Some(path) => {
                let made = DirBuilder::new().mode(0o700).create(path);
                made.with_context(|| format!("making {}", path.display()))?;
                Ok(Self::Kept(std::path::absolute(path)?))
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Temporary(directory) => directory.path(),
            Self::Kept(path) => path,
        }
    }
}

/// Draws what the event logs in `workplace` tell, leaves it with them in the directory `kept`, and
/// says where.
fn explain(workplace: &Path, kept: &Path) -> Result<()> {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(workplace)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    logs.retain(|path| path.extension().is_some_and(|end| end == "events"));
    logs.sort();
    if logs.is_empty() {
        return Ok(());
    }
    if kept != workplace {
        if kept.exists() {
            std::fs::remove_dir_all(kept)?;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(kept)?;
        for path in &mut logs {
            let copy = kept.join(path.file_name().expect("a file of a directory"));
            std::fs::copy(&path, &copy)?;
            *path = copy;
        }
    }
    let picture = kept.join("failover.svg");
    commands::explain::draw(&logs, &picture)?;
    let events = kept.join("*.events");
    eprintln!("vmft: drawn in {}; told by `vmft explain {}`", picture.display(), events.display());
    Ok(())
}

/// The pair and its console.
struct Stage {
    primary: SideProcess,
    backup: SideProcess,
    console: PairConsole,
    /// Talks to the guest, if it has a network.
    client: Option<Client>,
}

impl Stage {
    /// Starts both sides, `both` on the command lines of both, `primary` on that of one; in the
    /// network if there is one.
    fn set(
        workplace: &Path,
        both: &[OsString],
        primary: impl IntoIterator<Item = OsString>,
        network: Option<&PrivateNetwork>,
    ) -> Result<Self> {
        let net = |tap: &str| {
            let words = network.map(|_| ["--net".to_owned(), format!("tap={tap}")]);
            words.into_iter().flatten().map(OsString::from)
        };
        let start = |program: &Path, which, arguments: &[OsString]| {
            let start = || SideProcess::start(program, which, workplace, arguments);
            network.map_or_else(start, |network| network.within(start))
        };
        let program = std::env::current_exe().context("finding this program")?;
        let mut arguments: Vec<OsString> = vec!["--listen".into(), "tcp:127.0.0.1:0".into()];
        arguments.extend(both.iter().cloned().chain(primary).chain(net(network::TAPS[0])));
        let mut primary = start(&program, Which::Primary, &arguments)?;
        let status = primary.wait_status(EXIT_LIMIT, |status| status.listening.is_some())?;
        let address = status.listening.expect("just seen");
        let mut arguments: Vec<OsString> =
            vec!["--primary".into(), format!("tcp:{address}").into()];
        arguments.extend(both.iter().cloned().chain(net(network::TAPS[1])));
        let mut backup = start(&program, Which::Backup, &arguments)?;
        let mut console = PairConsole::default();
        console.attach(&mut primary)?;
        console.attach(&mut backup)?;
        let client = network.map(Client::start).transpose()?;
        Ok(Self { primary, backup, console, client })
    }

    /// Starts the default guest on a fresh disk.
    fn set_linux(disk: &Path, options: &DemoOptions, workload: Workload) -> Result<Self> {
        make_disk(disk, DiskSize::DEMO, "vmft-demo")?;
        let workplace = disk.parent().expect("a file in the workplace");
        let network = if options.net { make_network() } else { None };
        let mut cmdline = workload.cmdline();
        if network.is_some() {
            cmdline = format!("{cmdline} {}", private_network::cmdline());
        }
        let words = [
            "--memory".to_owned(),
            format!("size={}", options.memory.size),
            "--cmdline".to_owned(),
            cmdline,
        ];
        let engine = options.engine.wanted(options.run_kind())?.unwrap_or_default();
        let kernel = options.needs_lockstep_kernel(engine).then_some("--lockstep-kernel");
        let engine = kernel.into_iter().chain(options.engine.arguments()).map(OsString::from);
        let primary = words.into_iter().map(OsString::from).chain(engine);
        let disk = ["--disk".into(), disk_argument(disk)];
        let both: Vec<OsString> = disk.into_iter().chain(options.protect()).collect();
        Self::set(workplace, &both, primary, network.as_ref())
    }
}

/// The demo's network; if there can be none, says why.
fn make_network() -> Option<PrivateNetwork> {
    let made = PrivateNetwork::make(&network::TAPS);
    if let Err(error) = &made {
        eprintln!("vmft: {error:#}; the demo goes on without a network, which takes root to make");
    }
    made.ok()
}

/// What came of a guest whose primary was killed.
struct Played {
    stage: Stage,
    ledger: Ledger,
    /// The primary's status before its end.
    before: SideStatus,
    survivor: Option<SideStatus>,
    first_output: Option<Duration>,
}

/// Runs the demo.
pub fn demo(options: &DemoOptions) -> Result<ExitCode> {
    let engine = options.engine.wanted(options.run_kind())?.unwrap_or_default();
    if options.rounds > 1 && options.guest != DemoGuest::Records {
        bail!("--rounds is for the guest with records: leave --guest away");
    }
    if options.net && options.guest == DemoGuest::Probe {
        bail!("the probe guest has no network: leave --net or --guest probe away");
    }
    if options.guest != DemoGuest::Probe {
        let mut bar = progress::terminal();
        let cache = Cache::from_environment()?;
        if options.needs_lockstep_kernel(engine) {
            // Nobody waits minutes for a demo without having asked for it.
            lockstep_guest(&cache).remedy(|| "or show the probe guest, with --guest probe")?;
        } else {
            // Fetched here, with progress, so that the sides find it ready.
            default_guest(&cache, &mut bar)?;
        }
        ensure_packages(HOST_PACKAGES, &mut bar)?;
    }
    let workplace = Workplace::new(options.keep.as_deref())?;
    let disk = workplace.path().join("disk.img");
    let result = play(options, &workplace, &disk);
    let explained = match &workplace {
        Workplace::Kept(path) => {
            eprintln!("vmft: kept in {}", path.display());
            explain(path, path)
        }
        Workplace::Temporary(directory) => Cache::from_environment()
            .map_err(Into::into)
            .and_then(|cache| explain(directory.path(), &cache.directory().join(EXPLAINED))),
    };
    if let Err(error) = explained {
        eprintln!("vmft: what happened is not explained: {error:#}");
    }
    result
}

fn play(options: &DemoOptions, workplace: &Workplace, disk: &Path) -> Result<ExitCode> {
    if let Some(listen) = &options.web {
        return web::play(options, listen, workplace.path(), disk);
    }
    match options.guest {
        DemoGuest::Shell => {
            let stage = Stage::set_linux(disk, options, Workload::Shell)?;
            shell::play(stage, disk)
        }
        DemoGuest::Records if options.rounds > 1 => rounds::play(options, disk),
        DemoGuest::Records => records(options, disk),
        DemoGuest::Probe => probe::play(options, workplace.path()),
    }
}

fn records(options: &DemoOptions, disk: &Path) -> Result<ExitCode> {
    let kill_after = options.kill_after()?;
    let workload = Workload::Demo { lines: options.lines(), pause_ms: options.pause };
    let started = Instant::now();
    let stage = Stage::set_linux(disk, options, workload)?;
    let played = kill_in_the_middle(stage, |ledger| ledger.synced() >= kill_after, false)?;
    let file = read_disk_file(disk, RECORDS_FILE)?;
    let records = RecordVerdicts {
        on_disk: count_records(&file).context("the records on the disk")?,
        disk: check_disk(disk)?,
    };
    finish(options, played, Some(records), started.elapsed())
}

/// Plays the guest to its end, with a SIGKILL for the primary once `due`. A guest that is `held`
/// waits somewhere behind that until somebody types.
fn kill_in_the_middle(
    mut stage: Stage,
    due: impl Fn(&Ledger) -> bool,
    is_held: bool,
) -> Result<Played> {
    let mut ledger = Ledger::default();
    let mut kill: Option<(Instant, SideStatus)> = None;
    let mut first_output = None;
    let mut survivor = None;
    let waiting = progress::spinner("booting the guest on both sides");
    let mut silent_since = Instant::now();
    loop {
        match stage.console.look(Duration::from_millis(200)) {
            Look::Bytes(bytes) => {
                waiting.finish_and_clear();
                silent_since = Instant::now();
                show(&bytes)?;
                if let Some((killed_at, _)) = &kill
                    && stage.console.last_from() == Some(Which::Backup)
                {
                    first_output.get_or_insert_with(|| killed_at.elapsed());
                }
                ledger.read(&bytes);
            }
            Look::Nothing => {
                check_alive(&mut stage, kill.is_some())?;
                if silent_since.elapsed() > SILENCE_LIMIT {
                    bail!("the guest has been silent for {} s", SILENCE_LIMIT.as_secs());
                }
            }
            Look::Closed => break,
        }
        if kill.is_some() && survivor.is_none() {
            // Asked while it lives: it ends with its guest.
            let is_live =
                |status: &SideStatus| status.role == Role::Alone && status.failover.is_some();
            survivor = stage.backup.status().ok().filter(is_live);
            if survivor.is_some() && is_held {
                stage.console.type_in(b"\n");
            }
        }
        let connected = stage.client.as_ref().is_none_or(Client::is_connected);
        if kill.is_none() && connected && due(&ledger) {
            let status = stage.primary.status().context("asking the primary before its end")?;
            stage.primary.kill()?;
            if let Some(client) = &stage.client {
                client.primary_killed();
            }
            kill = Some((Instant::now(), status));
            eprintln!("\r\nvmft: primary (process {}) killed with SIGKILL", stage.primary.pid());
        }
    }
    waiting.finish_and_clear();
    let exit = stage.backup.wait_exit(EXIT_LIMIT)?;
    if !exit.success() {
        bail!("the backup ended with {exit}; it says:\n{}", stage.backup.messages());
    }
    let (_, before) = kill.context("the guest ended before the primary was killed")?;
    Ok(Played { stage, ledger, before, survivor, first_output })
}

/// Prints the report.
fn finish(
    options: &DemoOptions,
    played: Played,
    records: Option<RecordVerdicts>,
    elapsed: Duration,
) -> Result<ExitCode> {
    let Played { stage, ledger, before, survivor, first_output } = played;
    let verdicts = Verdicts {
        lines_wanted: options.lines(),
        records,
        bytes_repeated_to_readers: stage.console.merger().repeated(),
        bytes_missing: stage.console.merger().missing(),
        client: stage.client.as_ref().map(Client::report),
    };
    let report = Report::new(&ledger, verdicts, &before, survivor, first_output, elapsed);
    report.print();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(if report.good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check_alive(stage: &mut Stage, killed: bool) -> Result<()> {
    let Stage { primary, backup, .. } = stage;
    for (side, expected) in [(primary, !killed), (backup, true)] {
        if expected
            && let Some(exit) = side.try_exit()?
            && !exit.success()
        {
            bail!("a side ended with {exit}; it says:\n{}", side.messages());
        }
    }
    Ok(())
}

/// Shows console bytes as they are.
fn show(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()?;
    Ok(())
}
