//! `vmft up` and `vmft config`: a side of a pair that one file describes.
//!
//! `up` looks at the arbiter, starts the side that is wanted as a process of its own (`vmft primary` or
//! `vmft standby`, with the options of the file), and stays with it: a side that another one has taken the
//! place of follows that one, and one that waits where nobody is left begins the guest anew. It decides
//! nothing itself: who begins, and who goes on, is the arbiter's test-and-set, which the side asks.

use crate::arbiter_option::ArbiterPlace;
use crate::options::{DiskOption, DiskPlace};
use crate::pair_file::{self, PairFile};
use crate::pair_state::{PairState, last_reign, look};
use crate::process;
use crate::service;
use crate::terminal::say;
use anyhow::{Context, Result};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vmft_backup::mirror::standing::may_begin;
use vmft_backup::mirror::{self, MirrorError};
use vmft_backup::tell;

/// How often the side is looked at, and the arbiter while the side waits.
const STEP: Duration = Duration::from_millis(20);
const LOOK: Duration = Duration::from_secs(1);
/// A side that ends sooner so often in a row has something wrong with it, and is not started again.
const SHORT_LIFE: Duration = Duration::from_secs(10);
const MAX_SHORT_LIVES: u32 = 5;

/// Options of `vmft up`.
#[derive(Debug, Args)]
pub struct UpOptions {
    /// The pair's file, the same on each host
    #[arg(value_name = "FILE", default_value = "vmft.toml")]
    file: PathBuf,
    /// Which of its sides this is
    #[arg(long, value_name = "NAME")]
    side: String,
    /// Behind --: options of `vmft primary` and `vmft standby` that take the place of the file's
    #[arg(last = true, value_name = "OPTION")]
    more: Vec<String>,
}

/// Options of `vmft config`.
#[derive(Debug, Args)]
pub struct ConfigOptions {
    /// The pair's file
    #[arg(value_name = "FILE", default_value = "vmft.toml")]
    file: PathBuf,
    /// Which of its sides; all where none is named
    #[arg(long, value_name = "NAME")]
    side: Option<String>,
    /// Behind --: as for `vmft up`
    #[arg(last = true, value_name = "OPTION")]
    more: Vec<String>,
}

/// Prints what is in force for a side, and where each value comes from.
pub fn config(options: &ConfigOptions) -> Result<ExitCode> {
    let file = PairFile::read(&options.file)?;
    let sides: Vec<&str> = match &options.side {
        Some(side) => vec![side],
        None => file.sides().collect(),
    };
    for side in sides {
        let begins = pair_file::primary(&file, side, &options.more)?;
        let follows = pair_file::standby(&file, side, &options.more)?;
        let path = file.path().display();
        say(&format!("side {side} of {path}, where it begins (vmft primary):"))?;
        say(begins.in_force.to_string().trim_end())?;
        say(&format!("side {side} of {path}, where it follows (vmft standby):"))?;
        say(follows.in_force.to_string().trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What a side is started as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Begin,
    Follow,
}

/// The side's process, and whether an operator has asked for its end.
#[derive(Debug, Default)]
struct Running {
    child: Option<Child>,
    is_stopping: bool,
}

impl Running {
    /// Asks the side to stop, as an operator would.
    fn stop(&mut self) {
        if let Some(child) = &self.child {
            let pid = i32::try_from(child.id()).expect("a process id");
            // One that has just ended needs no telling; it is not reaped before it is taken from here.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
}

/// What `vmft up` works with.
struct Up {
    side: String,
    place: ArbiterPlace,
    is_first: bool,
    begin_after: Duration,
    /// This side's copies of disks.
    copies: Vec<DiskOption>,
    begin: Vec<String>,
    follow: Vec<String>,
    first: String,
    globals: Vec<OsString>,
    running: Arc<Mutex<Running>>,
}

/// Brings a side up, and stays with it. `globals`: options of every command that it is given, too.
pub fn up(options: &UpOptions, globals: Vec<OsString>) -> Result<ExitCode> {
    if let Some(why) = service::open() {
        tell!("{why}");
    }
    let file = PairFile::read(&options.file)?;
    let begins = pair_file::primary(&file, &options.side, &options.more)?;
    let follows = pair_file::standby(&file, &options.side, &options.more)?;
    let up = Up {
        side: options.side.clone(),
        place: begins.options.arbiter_place()?,
        is_first: file.first() == options.side,
        begin_after: file.begin_after()?,
        copies: begins.options.copies(),
        begin: begins.words,
        follow: follows.words,
        first: file.first().to_owned(),
        globals,
        running: Arc::default(),
    };
    let running = Arc::clone(&up.running);
    ctrlc::set_handler(move || {
        let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
        running.is_stopping = true;
        running.stop();
    })?;
    up.stay()
}

impl Up {
    fn is_stopping(&self) -> bool {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).is_stopping
    }

    /// Says what this side does.
    fn say(&self, what: &str) {
        tell!("side {}: {what}", self.side);
        service::tell_alone(what);
    }

    /// What the side is to be, by the arbiter's state. `None` if an operator stops it meanwhile.
    fn part(&self) -> Result<Option<Part>> {
        let started = Instant::now();
        let mut is_told = false;
        while !self.is_stopping() {
            let state = look(&self.place)?;
            if state.is_alive() {
                self.say("a side of the pair is alive; this one follows whichever is live");
                return Ok(Some(Part::Follow));
            }
            if let Some(why) = self.unfit()? {
                self.say(&format!("{why}; this one follows whichever side begins"));
                return Ok(Some(Part::Follow));
            }
            if self.is_first || started.elapsed() >= self.begin_after {
                self.say(&match state {
                    PairState::Over { generation, winner } => {
                        let whose =
                            winner.map_or_else(String::new, |winner| format!(", of {winner},"));
                        format!(
                            "generation {generation}{whose} is over, and no side is alive: the guest \
                             boots again here"
                        )
                    }
                    PairState::New | PairState::Alive => "the guest begins here".to_owned(),
                });
                return Ok(Some(Part::Begin));
            }
            if !std::mem::replace(&mut is_told, true) {
                self.say(&format!(
                    "no side of the pair is alive; side {} has {} s to begin",
                    self.first,
                    self.begin_after.as_secs()
                ));
            }
            service::tell_alive();
            std::thread::sleep(STEP * 10);
        }
        Ok(None)
    }

    /// Why no guest begins on this side's copies of disks, if none does. Only a look: the side that begins
    /// looks again.
    fn unfit(&self) -> Result<Option<MirrorError>> {
        let copies = self.copies.iter().filter_map(|disk| match &disk.place {
            DiskPlace::Image(path) if disk.mirror.is_some_and(|mirror| !mirror.is_forced) => {
                Some(path)
            }
            _ => None,
        });
        let copies: Vec<_> = copies.collect();
        if copies.is_empty() {
            return Ok(None);
        }
        let Some((name, latest, winner)) = last_reign(&self.place)? else { return Ok(None) };
        let why = copies.iter().find_map(|path| match mirror::look(path) {
            Ok(record) => may_begin(record.as_ref(), &name, latest, winner.as_ref())
                .err()
                .map(|why| MirrorError::Unfit { path: path.to_path_buf(), why }),
            Err(error) => Some(error.into()),
        });
        Ok(why)
    }

    fn start(&self, part: Part) -> Result<()> {
        let program = std::env::current_exe().context("finding this program")?;
        let (command, words) = match part {
            Part::Begin => ("primary", &self.begin),
            Part::Follow => ("standby", &self.follow),
        };
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // From here on the side speaks for itself.
        service::tell_alive();
        let child = Command::new(program)
            .arg(command)
            .args(words)
            .args(&self.globals)
            .arg(format!("--{}={}", process::END_WITH, std::process::id()))
            .spawn()
            .context("starting the side")?;
        running.child = Some(child);
        Ok(())
    }

    /// The side's end, if it has come.
    fn try_wait(&self) -> Result<Option<ExitStatus>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let child = running.child.as_mut().expect("it was started");
        let end = child.try_wait().context("waiting for the side")?;
        if end.is_some() {
            running.child = None;
        }
        Ok(end)
    }

    /// Waits for the side's end. A side that waits where nobody is alive any more is stopped: true then.
    fn wait(&self, part: Part) -> Result<(ExitStatus, bool)> {
        let (mut looked, mut alone) = (Instant::now(), None);
        let mut is_relieved = false;
        loop {
            if let Some(end) = self.try_wait()? {
                return Ok((end, is_relieved));
            }
            std::thread::sleep(STEP);
            if part == Part::Begin || is_relieved || looked.elapsed() < LOOK {
                continue;
            }
            looked = Instant::now();
            // A side that has joined is alive itself.
            match look(&self.place) {
                // A side whose copies are no good begins nothing.
                Ok(PairState::Over { .. }) if self.unfit()?.is_none() => {
                    let since: Instant = *alone.get_or_insert_with(Instant::now);
                    let patience = if self.is_first { Duration::ZERO } else { self.begin_after };
                    if since.elapsed() >= patience {
                        self.say("no side of the pair is alive any more");
                        is_relieved = true;
                        self.running.lock().unwrap_or_else(PoisonError::into_inner).stop();
                    }
                }
                // A storage that is away says nothing.
                _ => alone = None,
            }
        }
    }

    fn stay(&self) -> Result<ExitCode> {
        let mut short_lives = 0;
        loop {
            let Some(part) = self.part()? else { return Ok(ExitCode::SUCCESS) };
            let began = Instant::now();
            self.start(part)?;
            let (end, is_relieved) = self.wait(part)?;
            if self.is_stopping() || (end.success() && !is_relieved) {
                return Ok(code_of(end));
            }
            if is_relieved {
                continue;
            }
            // Another side goes on in its place, or has begun first; else something is wrong with it.
            short_lives = if began.elapsed() < SHORT_LIFE { short_lives + 1 } else { 0 };
            let is_replaced = end.code().is_some() && look(&self.place)?.is_alive();
            if !is_replaced || short_lives > MAX_SHORT_LIVES {
                return Ok(code_of(end));
            }
        }
    }
}

fn code_of(end: ExitStatus) -> ExitCode {
    match end.code() {
        Some(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        None => {
            tell!("the side has died: {end}");
            ExitCode::FAILURE
        }
    }
}
