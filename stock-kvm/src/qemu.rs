//! The box itself: a QEMU process, what comes out of it, and its end.
//!
//! Whatever happens to this program, QEMU does not outlive it (`setpriv --pdeathsig`), and whatever
//! happens in the box, this program ends: with the job's status, at the time limit, or when QEMU does.

use crate::channel::{AWAKE, Frame, GO};
use crate::contents::Contents;
use crate::job::{self, Job};
use crate::options::{Load, Options};
use crate::{BOX_FAILED, TIMED_OUT};
use anyhow::{Context, Result, bail};
use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};
use vmft_guest_images::packages::{E2FSPROGS, QEMU};
use vmft_guest_images::{Cache, Guest, Progress, ensure_packages, stock_kvm_host};

/// First process of the box.
const INIT: &[u8] = include_bytes!("../init");
/// This program, in the box.
const AGENT: &str = "/box/stock-kvm";
/// The command line of the box's kernel.
///
/// | parameter | reason |
/// |---|---|
/// | `console=ttyS0 quiet loglevel=4` | the console says what goes wrong |
/// | `panic=-1 reboot=t` | a panic ends QEMU at once; other ways to reset stop for minutes when a CPU hangs |
/// | `mitigations=off cryptomgr.notests` | an emulated CPU has nothing to gain from them, and pays |
/// | `nowatchdog rcupdate.rcu_cpu_stall_suppress=1` | on a loaded machine the box may stand still for seconds |
/// | `random.trust_cpu=on` | there is no other source of randomness, and nothing secret |
/// | `transparent_hugepage=never` | with huge pages in QEMU 7.2, guests triple-faulted, and the box's own kernel found its stack overwritten |
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t mitigations=off \
    cryptomgr.notests nowatchdog rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on \
    transparent_hugepage=never";
/// In lines of QEMU's about features of the CPU's model that it lacks, which is nobody's fault.
const EXPECTED: &str = "TCG doesn't support requested feature";
/// Exit status after a signal, as a shell has it for SIGINT.
const INTERRUPTED: u8 = 130;
/// How often the box is interrupted. More often costs: twenty times a second, a third of its speed.
const AWAKE_PERIOD: Duration = Duration::from_secs(1);
/// Most lines of the console that are shown when the box failed.
const CONSOLE_LINES: usize = 120;

/// Tells on standard error, one line a step.
struct Lines;

impl Progress for Lines {
    fn step(&mut self, what: &str) {
        eprintln!("stock-kvm: {what}");
    }

    fn note(&mut self, what: &str) {
        eprintln!("stock-kvm: {what}");
    }
}

/// What the main thread waits for.
enum Event {
    Frame(Frame),
    /// Nothing more comes from the box.
    Closed(io::Result<()>),
    Interrupted,
}

/// Fetches and builds what is needed, runs the box, and says how it ended.
pub fn run(options: &Options) -> Result<ExitCode> {
    let progress = &mut Lines;
    ensure_packages(&[QEMU, E2FSPROGS], progress)?;
    let cache = Cache::from_environment()?;
    let host = stock_kvm_host(&cache, progress)?;
    let mut load = options.load(&cache, progress)?;
    add_init(&mut load.contents, &load.job)?;
    let directory = tempfile::Builder::new().prefix("stock-kvm-").tempdir()?;
    let initramfs = directory.path().join("initramfs");
    write_initramfs(&initramfs, &host, &load, options)?;
    let machine = Machine { options, host: &host, directory: directory.path() };
    if options.shell {
        return machine.run_shell();
    }
    machine.run_job()
}

fn add_init(contents: &mut Contents, job: &Job) -> Result<()> {
    let this = env::current_exe().context("this program's file")?;
    contents.bring_as(&this, Path::new(AGENT))?;
    contents.text("/init", 0o755, INIT);
    contents.text(job::FILE, 0o644, &serde_json::to_vec(job)?);
    contents.directory(Path::new("/box/bin"));
    Ok(())
}

/// Two archives, one after the other: the host's own, and what was brought in.
fn write_initramfs(path: &Path, host: &Guest, load: &Load, options: &Options) -> Result<()> {
    // The archive itself lies in memory while it is unpacked, and a file system in memory may
    // have half of it.
    let mebibytes = load.contents.total() >> 20;
    if mebibytes > options.memory as usize / 3 {
        bail!(
            "{mebibytes} MiB of files in a box of {} MiB: give it three times as much with --memory",
            options.memory
        );
    }
    let mut bytes =
        fs::read(&host.initramfs).with_context(|| host.initramfs.display().to_string())?;
    bytes.extend_from_slice(&load.contents.archive()?);
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

struct Machine<'a> {
    options: &'a Options,
    host: &'a Guest,
    directory: &'a Path,
}

impl Machine<'_> {
    /// QEMU's command line but for the console and the channel.
    fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", QEMU.program]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,-monitor"]);
        command.args(["-smp", &self.options.cpus.to_string()]);
        command.args(["-m", &self.options.memory.to_string()]);
        command.arg("-kernel").arg(&self.host.kernel);
        command.arg("-initrd").arg(self.directory.join("initramfs"));
        command.args(["-append", CMDLINE]);
        command
    }

    fn run_shell(&self) -> Result<ExitCode> {
        let mut command = self.command();
        command.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
        let log = File::create(self.directory.join("qemu.log"))?;
        let status = command.stderr(log).status().context("starting QEMU")?;
        if !status.success() {
            self.show("qemu.log")?;
            return Ok(ExitCode::from(BOX_FAILED));
        }
        Ok(ExitCode::SUCCESS)
    }

    fn run_job(&self) -> Result<ExitCode> {
        let (events, inbox) = channel();
        let interrupted = events.clone();
        ctrlc::set_handler(move || drop(interrupted.send(Event::Interrupted)))?;
        let mut child = self.start(events)?;
        let end = self.follow(&inbox);
        // It has nothing left to say; an error only means that it has ended by itself.
        let _ended = child.kill();
        child.wait().context("waiting for QEMU")?;
        let end = end?;
        if let End::Failed(reason) = &end {
            eprintln!("stock-kvm: {reason}; the last of the box's console:");
            self.show("qemu.log")?;
            self.show("console.log")?;
        }
        Ok(end.status())
    }

    /// Starts QEMU, and a thread that turns what comes out of it into events.
    fn start(&self, events: Sender<Event>) -> Result<Child> {
        let (mut port, theirs) = UnixStream::pair().context("a channel into the box")?;
        // It waits in the socket until the box reads it.
        port.write_all(&[GO]).context("the channel into the box")?;
        let mut command = self.command();
        // What is open at QEMU's start under these numbers: the channel, and the console.
        command.args(["-chardev", "file,id=console,path=/dev/stdout,append=on"]);
        command.args(["-serial", "chardev:console"]);
        command.args(["-chardev", "socket,id=box,fd=0", "-device", "virtio-serial"]);
        command.args(["-device", "virtserialport,chardev=box,nr=1"]);
        command.stdin(OwnedFd::from(theirs));
        command.stderr(File::create(self.directory.join("qemu.log"))?);
        if self.options.verbose {
            command.stdout(io::stderr());
        } else {
            command.stdout(File::create(self.directory.join("console.log"))?);
        }
        let child = command.spawn().context("starting QEMU")?;
        // The command holds the other end of the channel: without it, the stream ends with QEMU.
        drop(command);
        let awake = port.try_clone().context("the channel into the box")?;
        thread::spawn(move || keep_awake(awake));
        thread::spawn(move || forward(port, &events));
        Ok(child)
    }

    /// Passes on what the job prints, to its end.
    fn follow(&self, inbox: &Receiver<Event>) -> Result<End> {
        let limit = self.options.time_limit().map(|limit| Instant::now() + limit);
        loop {
            let event = match limit {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(limit) => inbox.recv_timeout(limit.saturating_duration_since(Instant::now())),
            };
            match event {
                Ok(Event::Frame(Frame::Output(bytes))) => {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(&bytes).and_then(|()| stdout.flush())?;
                }
                Ok(Event::Frame(Frame::Errors(bytes))) => io::stderr().write_all(&bytes)?,
                Ok(Event::Frame(Frame::Ended(status))) => return Ok(End::Job(status)),
                Ok(Event::Interrupted) => return Ok(End::Interrupted),
                Ok(Event::Closed(reason)) => {
                    let what = "the box ended before the command did";
                    return Ok(End::Failed(match reason {
                        Ok(()) => what.to_owned(),
                        Err(error) => format!("{what} ({error})"),
                    }));
                }
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("stock-kvm: the time is up (--timeout {})", self.options.timeout);
                    return Ok(End::TimedOut);
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the thread that reads has ended"),
            }
        }
    }

    /// The last lines of a file of the box, on standard error.
    fn show(&self, name: &str) -> Result<()> {
        let Ok(bytes) = fs::read(self.directory.join(name)) else { return Ok(()) };
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().filter(|line| !line.contains(EXPECTED)).collect();
        for line in &lines[lines.len().saturating_sub(CONSOLE_LINES)..] {
            writeln!(io::stderr(), "  {}", line.trim_end())?;
        }
        Ok(())
    }
}

/// How a box ended.
enum End {
    Job(u8),
    TimedOut,
    Interrupted,
    Failed(String),
}

impl End {
    fn status(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Job(status) => *status,
            Self::TimedOut => TIMED_OUT,
            Self::Interrupted => INTERRUPTED,
            Self::Failed(_) => BOX_FAILED,
        })
    }
}

/// Interrupts the box now and then.
///
/// QEMU 7.2 may lose an interrupt: entering and leaving a nested guest clears one bit of `interrupt_request`
/// while another thread sets another. If that was the interrupt of the box's timer, which is set anew only when
/// it has been served, the box stands still, its CPU busy in the guest of its guest. The next interrupt,
/// whatever it is for, has all that wait delivered.
fn keep_awake(mut port: UnixStream) {
    while port.write_all(&[AWAKE]).is_ok() {
        thread::sleep(AWAKE_PERIOD);
    }
}

fn forward(mut port: UnixStream, events: &Sender<Event>) {
    loop {
        let event = match Frame::read(&mut port) {
            Ok(Some(frame)) => Event::Frame(frame),
            Ok(None) => Event::Closed(Ok(())),
            Err(error) => Event::Closed(Err(error)),
        };
        let last = matches!(event, Event::Closed(_));
        if events.send(event).is_err() || last {
            return;
        }
    }
}
