//! What the threads of a side may ask of their host: a guest, a peer or a stored file that finds a fault in
//! this program gets what that thread may do, and no more.
//!
//! Three walls, none of which needs root. Every thread has a list of system calls for its [`Task`]
//! (seccomp(2)); the process ends at any other. The process reaches the files of its command line and no
//! others (landlock(7)). And its user's privileges are given up, but for a few.
//!
//! And a socket by which a side is asked or watched is its owner's alone ([`bind_private_socket`]).
//!
//! [`Sandbox::enter`] puts them up, before a side has another thread; [`spawn`] starts threads inside them.
//! All threads are one process and share its memory: who can run code of his own in one of them has what all
//! of them together may do.

mod files;
mod private_socket;
mod privileges;
mod syscalls;

pub use files::{Files, Use};
pub use private_socket::bind_private_socket;
pub use privileges::PrivilegeError;

use seccompiler::BpfProgram;
use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{Builder, JoinHandle};

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Runs the guest and all that waits for it: the main thread of a side.
    Guest,
    /// Runs one of several CPUs of a guest.
    Cpu,
    /// Reads and writes a disk.
    Disk,
    /// Receives and sends packets.
    Network,
    /// Opens the link to the network: at a go-live, long after the start.
    Link,
    /// Reads and writes the console.
    Console,
    /// Speaks with the other sides.
    Channel,
    /// Asks the arbiter.
    Arbiter,
    /// Answers `vmft status` and the like.
    Api,
    /// Says what the operator is to hear.
    Messages,
    /// Works in memory: kicks, packs, waits.
    Worker,
    /// Opens files that the operator names, and that Landlock has no rule for: they are not there yet.
    Outside,
}

impl Task {
    /// All tasks, in order.
    pub const ALL: [Self; 12] = [
        Self::Guest,
        Self::Cpu,
        Self::Disk,
        Self::Network,
        Self::Link,
        Self::Console,
        Self::Channel,
        Self::Arbiter,
        Self::Api,
        Self::Messages,
        Self::Worker,
        Self::Outside,
    ];
}

/// A wall that cannot be put up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A privilege stays.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// The kernel does not take a rule about files.
    #[error("confining the files: {0}")]
    Files(#[from] landlock::RulesetError),
    /// The kernel does not take a filter of system calls.
    #[error("confining the system calls: {0}")]
    Calls(#[from] seccompiler::Error),
    /// The host starts no thread.
    #[error("starting a thread: {0}")]
    Thread(#[from] io::Error),
}

/// What is to be done by another thread.
type Job = Box<dyn FnOnce() + Send>;

/// The sandbox of this process, once it is entered.
#[derive(Debug)]
struct Active {
    filters: Vec<BpfProgram>,
    /// A thread without a task's limits: what it starts has the limits of its own task only.
    starter: Sender<Job>,
    outside: Sender<Job>,
}

static ACTIVE: OnceLock<Active> = OnceLock::new();

/// What a side is to be confined to.
#[derive(Debug, Clone, Default)]
pub struct Sandbox {
    /// The files of its command line.
    pub files: Files,
    /// The user that it becomes; its own where none is named.
    pub user: Option<String>,
}

/// What the kernel of this host does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entered {
    /// False where the kernel has no Landlock: then all files of the user can be reached.
    pub files_confined: bool,
}

impl Sandbox {
    /// Confines this process, for good. The caller is its only thread, and goes on as a side that starts;
    /// [`confine`] ends the start.
    ///
    /// # Errors
    /// [`SandboxError`]
    ///
    /// # Panics
    /// If this process is in a sandbox already.
    pub fn enter(&self) -> Result<Entered, SandboxError> {
        let compile = |task| syscalls::of_task(task).map_err(seccompiler::Error::from);
        let filters = Task::ALL.into_iter().map(compile).collect::<Result<Vec<_>, _>>()?;
        let process = syscalls::of_process().map_err(seccompiler::Error::from)?;
        let clone3 = syscalls::without_clone3().map_err(seccompiler::Error::from)?;
        privileges::reduce(self.user.as_deref())?;
        seccompiler::apply_filter(&process)?;
        seccompiler::apply_filter(&clone3)?;
        let (outside, outside_jobs) = mpsc::channel();
        serve("outside", outside_jobs)?;
        let files_confined = self.files.restrict()?;
        let (starter, starter_jobs) = mpsc::channel();
        serve("starter", starter_jobs)?;
        let active = Active { filters, starter, outside };
        ACTIVE.set(active).expect("a process enters one sandbox");
        outside_of_landlock(|| confine(Task::Outside))?;
        Ok(Entered { files_confined })
    }
}

/// A thread that does jobs for ever.
fn serve(name: &str, jobs: Receiver<Job>) -> io::Result<()> {
    let run = move || jobs.into_iter().for_each(|job| job());
    Builder::new().name(name.to_owned()).spawn(run).map(drop)
}

/// Limits this thread to a task, for good. Does nothing outside a sandbox.
///
/// # Errors
/// The kernel refuses it, which it has not done when the sandbox was entered.
pub fn confine(task: Task) -> Result<(), SandboxError> {
    if let Some(active) = ACTIVE.get() {
        if task != Task::Link {
            privileges::end_start()?;
        }
        seccompiler::apply_filter(&active.filters[task as usize])?;
    }
    Ok(())
}

/// Starts a thread that is limited to `task`.
///
/// # Errors
/// The host's, where it starts no thread.
pub fn spawn<T: Send + 'static>(
    task: Task,
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = Builder::new().name(name.into());
    let Some(active) = ACTIVE.get() else { return builder.spawn(body) };
    let (give, take) = mpsc::channel();
    let body = move || {
        confine(task).expect("the kernel took filters before");
        body()
    };
    let start = move || {
        // Whoever asked waits for the answer.
        let _ = give.send(builder.spawn(body));
    };
    let gone = || io::Error::other("the thread that starts threads is gone");
    active.starter.send(Box::new(start)).map_err(|_| gone())?;
    take.recv().map_err(|_| gone())?
}

/// Does something that this thread may not, on a thread of that task, and waits for it. Outside a sandbox:
/// here.
///
/// # Errors
/// The host's, where it starts no thread.
///
/// # Panics
/// If `body` panics.
pub fn run<T: Send + 'static>(
    task: Task,
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    if ACTIVE.get().is_none() {
        return Ok(body());
    }
    Ok(spawn(task, name, body)?.join().expect("a panic has been reported where it was"))
}

/// Does something with files that the operator names, and that Landlock has no rule for, because they are
/// not there when the sandbox is entered.
/// Outside a sandbox: here.
///
/// # Panics
/// If `body` panics.
pub fn outside_of_landlock<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    let Some(active) = ACTIVE.get() else { return body() };
    let (give, take) = mpsc::channel();
    let job = move || {
        // Whoever asked waits for the answer.
        let _ = give.send(body());
    };
    active.outside.send(Box::new(job)).expect("that thread lives as long as the process");
    take.recv().expect("it does what it is given")
}
