//! The demo on a page: three sides, a guest that goes on and on, and buttons for what may happen to them.

use super::ledger::Ledger;
use super::{DemoGuest, DemoOptions, EXIT_LIMIT, disk_argument};
use crate::api_client;
use crate::dashboard::acts::{Act, ByApi, Hands, Power, ProcessState, flip_bit, has_guest};
use crate::dashboard::{Dashboard, ListenOption, Shown};
use crate::pair::{Lines, Look, PairConsole, SideProcess, Which, prefixed};
use crate::terminal::say;
use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmft_guest_images::disk::{DiskSize, make_disk};
use vmft_guest_images::{ProbeGuest, Workload};

/// The sides.
const NAMES: [&str; 3] = ["a", "b", "c"];
/// Between two looks at the console, the sides and the buttons.
const LOOK: Duration = Duration::from_millis(50);
/// How often the sides are asked.
const INTERVAL: Duration = Duration::from_millis(250);
/// Console lines that wait to be shown.
const LINES: usize = 256;

/// A button that is for whoever has started the processes.
#[derive(Debug)]
struct Order {
    side: usize,
    act: Act,
    done: Sender<Result<()>>,
}

/// The states of the processes, as they were seen last.
#[derive(Debug, Clone)]
struct States(Arc<Mutex<[ProcessState; NAMES.len()]>>);

impl States {
    fn lock(&self) -> MutexGuard<'_, [ProcessState; NAMES.len()]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what the buttons ask for: by the sides' sockets, or on the thread that has the processes.
#[derive(Debug)]
struct OfDemo {
    api: ByApi,
    states: States,
    orders: Sender<Order>,
}

impl Hands for OfDemo {
    fn power(&self, side: usize) -> Power {
        Power::Owns(self.states.lock()[side])
    }

    fn act(&self, side: usize, act: Act) -> Result<()> {
        if act == Act::FlipBit {
            let socket = self.api.0.get(side).context("there is no such side")?;
            return flip_bit(socket);
        }
        if !act.is_of_processes() {
            return self.api.act(side, act);
        }
        let (done, answer) = mpsc::channel();
        let over = || anyhow!("the demo is over");
        self.orders.send(Order { side, act, done }).map_err(|_| over())?;
        answer.recv().map_err(|_| over())?
    }
}

/// The sides, and what they are started with.
struct Cast {
    program: PathBuf,
    workplace: PathBuf,
    /// The words for every side.
    every: Vec<OsString>,
    sides: Vec<SideProcess>,
    console: PairConsole,
    states: States,
}

impl Cast {
    /// Starts all three: the first begins with the guest once the second follows, the third waits.
    fn start(workplace: &Path, every: Vec<OsString>, first: Vec<OsString>) -> Result<Self> {
        let mut cast = Self {
            program: std::env::current_exe().context("finding this program")?,
            workplace: workplace.to_owned(),
            every,
            sides: Vec::new(),
            console: PairConsole::default(),
            states: States(Arc::new(Mutex::new([ProcessState::Runs; NAMES.len()]))),
        };
        let mut words = vec!["--listen".into(), cast.address(0)];
        words.extend(cast.every.iter().cloned().chain(first));
        let name = (Which::Primary, NAMES[0]);
        let primary = SideProcess::start_named(&cast.program, "primary", name, workplace, &words)?;
        cast.sides.push(primary);
        cast.sides[0].wait_status(EXIT_LIMIT, |status| status.listening.is_some())?;
        for side in 1..NAMES.len() {
            let standby = cast.standby(side)?;
            cast.sides.push(standby);
            cast.sides[0].wait_status(EXIT_LIMIT, |status| status.followers > 0)?;
        }
        for side in &mut cast.sides {
            cast.console.attach(side)?;
        }
        Ok(cast)
    }

    fn address(&self, side: usize) -> OsString {
        prefixed("unix:", &self.workplace.join(format!("{}.peer", NAMES[side])))
    }

    /// A side that follows whichever of the others is live.
    fn standby(&self, side: usize) -> Result<SideProcess> {
        let mut words: Vec<OsString> = vec!["--join".into()];
        words.extend((0..NAMES.len()).filter(|other| *other != side).map(|at| self.address(at)));
        words.extend(["--listen".into(), self.address(side)]);
        words.extend(self.every.iter().cloned());
        let name = (Which::Backup, NAMES[side]);
        SideProcess::start_named(&self.program, "standby", name, &self.workplace, &words)
    }

    fn do_order(&mut self, side: usize, act: Act) -> Result<()> {
        let state = *self.states.lock().get(side).context("there is no such side")?;
        let now = match (act, state) {
            (Act::Kill, ProcessState::Runs | ProcessState::Frozen) => {
                self.sides[side].kill()?;
                ProcessState::Gone
            }
            (Act::Freeze, ProcessState::Runs) => {
                self.sides[side].signal(Signal::SIGSTOP)?;
                ProcessState::Frozen
            }
            (Act::Thaw, ProcessState::Frozen) => {
                self.sides[side].signal(Signal::SIGCONT)?;
                ProcessState::Runs
            }
            (Act::Start, ProcessState::Gone) => {
                self.sides[side] = self.standby(side)?;
                self.console.attach(&mut self.sides[side])?;
                ProcessState::Runs
            }
            (Act::Kill | Act::Thaw, _) => bail!("its process does not stand still, or is gone"),
            (Act::Start, _) => bail!("its process is there already"),
            _ => bail!("its process does not run"),
        };
        self.states.lock()[side] = now;
        Ok(())
    }

    /// Looks which processes are there. False if none is.
    fn look_at_processes(&mut self) -> Result<bool> {
        let mut states = self.states.lock();
        for (side, state) in self.sides.iter_mut().zip(states.iter_mut()) {
            if side.try_exit()?.is_some() {
                *state = ProcessState::Gone;
            }
        }
        Ok(states.iter().any(|state| *state != ProcessState::Gone))
    }

    /// Ends the guest, and then whatever is left; what stands still is killed.
    fn finish(&mut self) {
        let is_live = |side: &SideProcess| side.status().is_ok_and(|status| has_guest(status.role));
        let states = *self.states.lock();
        let runs: Vec<usize> =
            (0..self.sides.len()).filter(|at| states[*at] == ProcessState::Runs).collect();
        let (first, rest): (Vec<usize>, Vec<usize>) =
            runs.iter().partition(|at| is_live(&self.sides[**at]));
        for at in first.into_iter().chain(rest) {
            // One that ends with its guest does not answer any more.
            let _ = api_client::shutdown(&self.sides[at].api());
        }
        for at in runs {
            let _ = self.sides[at].wait_exit(EXIT_LIMIT);
        }
    }
}

/// The guest's words for all sides, and those for the one that begins.
fn words(
    options: &DemoOptions,
    workplace: &Path,
    disk: &Path,
) -> Result<(Vec<OsString>, Vec<OsString>)> {
    let (lines, pause_ms) = (options.lines(), options.pause);
    let mut every: Vec<OsString> = options.protect().collect();
    let engine = options.engine.arguments().into_iter().map(OsString::from);
    let first: Vec<OsString> = match options.guest {
        DemoGuest::Shell => bail!("the shell has no page: leave --web or --guest shell away"),
        DemoGuest::Records => {
            make_disk(disk, DiskSize::DEMO, "vmft-demo")?;
            every.extend(["--disk".into(), disk_argument(disk)]);
            let kind = options.engine.wanted(options.run_kind())?.unwrap_or_default();
            let kernel = options.needs_lockstep_kernel(kind).then_some("--lockstep-kernel");
            let memory = format!("size={}", options.memory.size);
            let cmdline = Workload::Demo { lines, pause_ms }.cmdline();
            let words = ["--memory", &memory, "--cmdline", &cmdline];
            words.into_iter().chain(kernel).map(OsString::from).chain(engine).collect()
        }
        DemoGuest::Probe => {
            let lines = NonZeroU32::new(lines).context("a guest without lines")?;
            let guest = ProbeGuest { lines, ..ProbeGuest::default() }.with_pause(pause_ms);
            let kernel = workplace.join("probe.elf");
            std::fs::write(&kernel, guest.image())
                .with_context(|| format!("writing {}", kernel.display()))?;
            every.extend(["--arbiter".into(), prefixed("dir=", &workplace.join("arbiter"))]);
            let words = ["--kernel".into(), kernel.into(), "--memory".into(), "size=64M".into()];
            words.into_iter().chain(engine).collect()
        }
    };
    Ok((every, first))
}

/// Plays until Ctrl-C, or until no side is left.
pub(super) fn play(
    options: &DemoOptions,
    listen: &ListenOption,
    workplace: &Path,
    disk: &Path,
) -> Result<ExitCode> {
    let (every, first) = words(options, workplace, disk)?;
    let mut cast = Cast::start(workplace, every, first)?;
    let left = Arc::new(AtomicBool::new(false));
    let leave = Arc::clone(&left);
    ctrlc::set_handler(move || leave.store(true, Ordering::Relaxed))?;
    let (orders, ordered) = mpsc::channel();
    let (lines, console) = tokio::sync::mpsc::channel(LINES);
    let api: Vec<PathBuf> = cast.sides.iter().map(SideProcess::api).collect();
    let hands = OfDemo { api: ByApi(api.clone()), states: cast.states.clone(), orders };
    let shown = Shown {
        sides: api,
        names: NAMES.map(str::to_owned).into(),
        event_logs: cast.sides.iter().map(SideProcess::events).collect(),
        interval: INTERVAL,
        hands: Some(Arc::new(hands)),
        console: Some(console),
    };
    let dashboard = Dashboard::listen(listen, shown)?;
    say(dashboard.url())?;
    eprintln!("vmft: the demo is at that address; Ctrl-C here ends it.");
    std::thread::Builder::new().name("page".to_owned()).spawn(move || {
        if let Err(error) = dashboard.serve() {
            eprintln!("vmft: the page is gone: {error:#}");
        }
    })?;
    let mut ledger = Ledger::default();
    let is_left = watch(&mut cast, &mut ledger, &ordered, &lines, &left)?;
    if is_left {
        cast.finish();
    } else {
        eprintln!("vmft: no side is left, and so the guest is over");
    }
    Ok(report(&cast, &ledger))
}

/// Reads the console, and does what is ordered. True if somebody has left, and sides are there still.
fn watch(
    cast: &mut Cast,
    ledger: &mut Ledger,
    ordered: &Receiver<Order>,
    lines: &tokio::sync::mpsc::Sender<String>,
    left: &AtomicBool,
) -> Result<bool> {
    let mut split = Lines::default();
    while cast.look_at_processes()? {
        match cast.console.look(LOOK) {
            Look::Bytes(bytes) => {
                ledger.read(&bytes);
                for line in split.add(&bytes) {
                    // A page that is late shows fewer of them.
                    let _ = lines.try_send(line);
                }
            }
            Look::Nothing => {}
            // Those that are there have not been attached to yet.
            Look::Closed => std::thread::sleep(LOOK),
        }
        for Order { side, act, done } in ordered.try_iter() {
            // Whoever has asked may be gone.
            let _ = done.send(cast.do_order(side, act));
        }
        if left.load(Ordering::Relaxed) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Says what came of the guest's lines.
fn report(cast: &Cast, ledger: &Ledger) -> ExitCode {
    let gaps = ledger.line_gaps(ledger.printed());
    let lost = cast.console.merger().missing();
    println!(
        "{} lines of the guest: {} missing, {} repeated; {lost} bytes of its console missing",
        ledger.printed_count(),
        gaps.missing,
        gaps.repeated
    );
    let is_good = gaps == Default::default() && lost == 0;
    if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
