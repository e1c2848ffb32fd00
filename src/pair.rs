//! A pair on this machine: two processes of this program on loopback, with a shared disk.
//!
//! The demo, the failover experiments and the tests all start pairs through here.

use crate::api_client;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use vmft_backup::status::SideStatus;
use vmft_guest_images::workload::DemoLine;
use vmft_vmm::world::console::{ConsoleClient, ConsoleEvent, Merger};
use vmft_vmm::world::{DiskFile, DiskFileError, HostCache};

/// How long a side may take to open its sockets, and between two looks.
const START_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(2);

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The side that was started as primary.
    Primary,
    /// The side that was started as backup.
    Backup,
}

impl Which {
    /// Its name, also its subcommand.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }

    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::Primary => Self::Backup,
            Self::Backup => Self::Primary,
        }
    }
}

/// One side's process. It is killed when dropped.
#[derive(Debug)]
pub struct SideProcess {
    which: Which,
    /// Names its files.
    name: String,
    child: Child,
    directory: PathBuf,
    exited: Option<ExitStatus>,
}

impl SideProcess {
    /// Starts `program` as a side, its sockets and messages in `directory`.
    pub fn start(
        program: &Path,
        which: Which,
        directory: &Path,
        arguments: &[OsString],
    ) -> Result<Self> {
        Self::start_as(program, which.name(), which, directory, arguments)
    }

    /// Starts `program` with another subcommand, such as `run`, in the place of a side.
    pub fn start_as(
        program: &Path,
        subcommand: &str,
        which: Which,
        directory: &Path,
        arguments: &[OsString],
    ) -> Result<Self> {
        Self::start_named(program, subcommand, (which, which.name()), directory, arguments)
    }

    /// As [`Self::start_as`], with a name of its own: of the many sides that take each other's places.
    pub fn start_named(
        program: &Path,
        subcommand: &str,
        (which, name): (Which, &str),
        directory: &Path,
        arguments: &[OsString],
    ) -> Result<Self> {
        let messages = File::create(directory.join(format!("{name}.log")))?;
        let mut command = Command::new(program);
        // What is behind `--` is for the sides that `vmft up` starts.
        let own = arguments.iter().position(|word| word == "--").unwrap_or(arguments.len());
        let (own, more) = arguments.split_at(own);
        command.arg(subcommand).args(own).arg("-v").args(more);
        if !arguments.iter().any(|argument| argument == "--event-log") {
            command.arg("--event-log").arg(directory.join(format!("{name}.events")));
        }
        let child = command
            .arg("--serial")
            .arg(prefixed("socket=", &directory.join(format!("{name}.console"))))
            .arg("--api-socket")
            .arg(directory.join(format!("{name}.api")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(messages)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let (name, directory) = (name.to_owned(), directory.to_owned());
        Ok(Self { which, name, child, directory, exited: None })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its console socket.
    pub fn console(&self) -> PathBuf {
        self.directory.join(format!("{}.console", self.name))
    }

    /// Its API socket.
    pub fn api(&self) -> PathBuf {
        self.directory.join(format!("{}.api", self.name))
    }

    /// Its event log.
    pub fn events(&self) -> PathBuf {
        self.directory.join(format!("{}.events", self.name))
    }

    /// What it has said so far.
    pub fn messages(&self) -> String {
        let path = self.directory.join(format!("{}.log", self.name));
        std::fs::read_to_string(path).unwrap_or_default()
    }

    /// What it says of itself.
    pub fn status(&self) -> Result<SideStatus> {
        api_client::status(&self.api())
    }

    /// Sends it a signal. After a SIGSTOP, which is in force when one thread has taken it and told the
    /// others, it stands still when this returns.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, signal).with_context(|| format!("{signal} to the {}", self.name))?;
        if signal == Signal::SIGSTOP {
            // Not its end, which others wait for.
            waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED).context("waiting for a side to stop")?;
        }
        Ok(())
    }

    /// Kills it at once, as a power failure would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("killing a side")?;
        self.exited = Some(self.child.wait()?);
        Ok(())
    }

    /// How it ended, if it has.
    pub fn try_exit(&mut self) -> Result<Option<ExitStatus>> {
        if self.exited.is_none() {
            self.exited = self.child.try_wait()?;
        }
        Ok(self.exited)
    }

    /// Waits until it has ended by itself.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_exit()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the {} has not ended; it says:\n{}", self.name, self.messages());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until what it has said is as wanted, and returns it. A side says things on a thread of its own:
    /// what it did can be seen before its words.
    pub fn wait_says(&mut self, limit: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            // Asked first, so that the words before its end are all there.
            let exit = self.try_exit()?;
            let said = self.messages();
            if wanted(&said) {
                return Ok(said);
            }
            if let Some(exit) = exit {
                bail!("the {} has ended ({exit}) and does not say it but:\n{said}", self.name);
            }
            if Instant::now() > deadline {
                bail!("the {} does not say it but:\n{said}", self.name);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until its status is as wanted.
    pub fn wait_status(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&SideStatus) -> bool,
    ) -> Result<SideStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(exit) = self.try_exit()? {
                bail!("the {} has ended ({exit}); it says:\n{}", self.name, self.messages());
            }
            if let Ok(status) = self.status()
                && wanted(&status)
            {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the {} does not get ready; it says:\n{}", self.name, self.messages());
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for SideProcess {
    fn drop(&mut self) {
        if self.exited.is_none() {
            // A side that has just ended by itself needs no killing.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The value of `--disk` for a pair on one host, whose processes die and never the host: where the image lies
/// on a file system that keeps everything in the host's cache, that will do.
pub fn disk_argument(disk: &Path) -> OsString {
    let mut argument = prefixed("path=", disk);
    let opened = DiskFile::open(disk, false, HostCache::None, false);
    if matches!(opened, Err(DiskFileError::Cached { .. } | DiskFileError::Unit { .. })) {
        argument.push(",cache=writeback");
    }
    argument
}

/// `key=` and a path, as one argument.
pub fn prefixed(prefix: &str, path: &Path) -> OsString {
    let mut argument = OsString::from(prefix);
    argument.push(path);
    argument
}

/// The console of a pair, each byte once.
#[derive(Debug)]
pub struct PairConsole {
    sender: Sender<(Which, ConsoleEvent)>,
    events: Receiver<(Which, ConsoleEvent)>,
    typists: Vec<ConsoleClient>,
    merger: Merger,
    open: usize,
    last_from: Option<Which>,
}

impl Default for PairConsole {
    fn default() -> Self {
        Self::starting_at(0)
    }
}

/// What a look at the console brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    /// New bytes.
    Bytes(Vec<u8>),
    /// Nothing for as long as was waited.
    Nothing,
    /// Every side is gone.
    Closed,
}

impl PairConsole {
    /// The console from `offset` on: of a guest that was restored after writing so many bytes.
    pub fn starting_at(offset: u64) -> Self {
        let (sender, events) = channel();
        let merger = Merger::new(offset);
        Self { sender, events, typists: Vec::new(), merger, open: 0, last_from: None }
    }

    /// Attaches to a side as soon as it listens.
    pub fn attach(&mut self, side: &mut SideProcess) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        let mut client = loop {
            match ConsoleClient::attach(&side.console(), self.merger.end()) {
                Ok(client) => break client,
                Err(error) => {
                    if side.try_exit()?.is_some() || Instant::now() > deadline {
                        let name = &side.name;
                        bail!("the {name} did not start ({error}); it says:\n{}", side.messages());
                    }
                    std::thread::sleep(POLL);
                }
            }
        };
        self.typists.push(client.try_clone()?);
        let (sender, which) = (self.sender.clone(), side.which);
        self.open += 1;
        let read = move || {
            loop {
                let event = client.next_event();
                let closed = event == ConsoleEvent::Closed;
                if sender.send((which, event)).is_err() || closed {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("pair-console".to_owned()).spawn(read)?;
        Ok(())
    }

    /// Waits for new bytes.
    pub fn look(&mut self, limit: Duration) -> Look {
        let deadline = Instant::now() + limit;
        while self.open > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok((which, ConsoleEvent::Record(record))) => {
                    let merged = self.merger.add(record);
                    if !merged.bytes.is_empty() {
                        self.last_from = Some(which);
                        return Look::Bytes(merged.bytes);
                    }
                }
                Ok((_, ConsoleEvent::Closed)) => self.open -= 1,
                Err(RecvTimeoutError::Timeout) => return Look::Nothing,
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Look::Closed
    }

    /// Types at the console; the side that is live takes it.
    pub fn type_in(&mut self, bytes: &[u8]) {
        for typist in &mut self.typists {
            // A side that is gone takes no keys; the other does.
            let _ = typist.type_in(bytes);
        }
    }

    /// Handles to type with from another thread.
    pub fn typists(&self) -> Result<Vec<ConsoleClient>> {
        self.typists.iter().map(|typist| Ok(typist.try_clone()?)).collect()
    }

    /// Which side the last bytes came from.
    pub fn last_from(&self) -> Option<Which> {
        self.last_from
    }

    /// Counts of what was merged.
    pub fn merger(&self) -> &Merger {
        &self.merger
    }
}

/// A pair's console with the demo's guest on it.
#[derive(Debug, Default)]
pub struct DemoConsole {
    /// The console.
    pub console: PairConsole,
    lines: Lines,
    /// The demo's lines, as they came.
    pub shown: Vec<DemoLine>,
}

impl DemoConsole {
    /// Reads until `wanted` is shown, or to the console's end, unless the console is silent for longer than
    /// `limit`: how long all of it takes is the host's affair.
    ///
    /// # Errors
    /// It was not shown, and nothing else in time; or the console closed before; with what was shown.
    pub fn read(&mut self, limit: Duration, wanted: Option<DemoLine>) -> Result<()> {
        let mut deadline = Instant::now() + limit;
        while wanted.as_ref().is_none_or(|wanted| !self.shown.contains(wanted)) {
            match self.console.look(Duration::from_secs(1)) {
                Look::Bytes(bytes) => {
                    deadline = Instant::now() + limit;
                    let lines = self.lines.add(&bytes);
                    self.shown.extend(lines.iter().filter_map(|line| DemoLine::parse(line)));
                }
                Look::Nothing => {}
                Look::Closed if wanted.is_none() => return Ok(()),
                Look::Closed => bail!("the console closed; it has shown {:?}", self.shown),
            }
            if Instant::now() > deadline {
                bail!("the console has shown {:?}, and not {wanted:?}", self.shown);
            }
        }
        Ok(())
    }
}

/// Splits console bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Adds bytes; returns the lines they complete, without their ends.
    pub fn add(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.partial).trim_end_matches('\r').to_owned();
                lines.push(line);
                self.partial.clear();
            } else {
                self.partial.push(byte);
            }
        }
        lines
    }

    /// The line that is not complete yet.
    pub fn partial(&self) -> String {
        String::from_utf8_lossy(&self.partial).into_owned()
    }
}
