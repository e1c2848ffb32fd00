//! The machine's edge: whatever a guest makes go wrong inside stops the guest, not the process.
//!
//! Nothing that a guest does may panic in the engine, the board or a device. If something does all
//! the same, the panic is caught here, and the run ends with a [`FaultReport`]: where the guest was,
//! at which instruction, in which state. The machine is of no use afterwards, because it was left in
//! the middle of something; whoever runs it tells its peer and ends.
//!
//! Only the machine's own work is inside, and the reading of a guest's file systems
//! ([`contained`]): the inputs, the gate, and all else of other threads are the host's. What panics
//! there leaves locks and queues that nobody can rely upon, so the process aborts
//! ([`abort_on_panics`]), as a side that is lost: the other goes on.

use super::{Machine, MachineError};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use vmft_cpu::CpuState;
use vmft_cpu::soft::Miscompiled;
use vmft_log::point::ExecutionPoint;
use vmft_sandbox::outside_of_landlock;

/// A panic: what it said, and where in the source.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Panicked {
    message: String,
    location: String,
    miscompiled: Option<Box<Miscompiled>>,
}

impl Panicked {
    fn new(payload: &(dyn Any + Send), location: String) -> Self {
        let miscompiled = payload.downcast_ref::<Box<Miscompiled>>().cloned();
        let message = match &miscompiled {
            Some(miscompiled) => miscompiled.to_string(),
            None => message_of(payload),
        };
        Self { message, location, miscompiled }
    }
}

thread_local! {
    /// This thread is inside a machine.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// The panic that is on its way to the edge.
    static CAUGHT: RefCell<Option<Panicked>> = const { RefCell::new(None) };
}

fn message_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "without a message".to_owned())
}

/// From now on a panic ends the process at once, in whatever thread it is, unless it is inside a
/// machine: no thread is gone while the others go on as if nothing had happened. To be called once,
/// at the start of a program.
pub fn abort_on_panics() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // A second one on the way to the edge would not come there.
        let first = CAUGHT.with_borrow(Option::is_none);
        if INSIDE.get() && first {
            let location = panic.location().map(ToString::to_string).unwrap_or_default();
            CAUGHT.set(Some(Panicked::new(panic.payload(), location)));
            return;
        }
        tell(panic);
        std::process::abort();
    }));
}

/// Does what may panic. What it worked on is of no use after a panic.
fn catch<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    CAUGHT.set(None);
    let outside = INSIDE.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    INSIDE.set(outside);
    result.map_err(|payload| {
        let unknown = || Panicked::new(&*payload, "unknown place".to_owned());
        CAUGHT.take().unwrap_or_else(unknown)
    })
}

/// Does what reads bytes that a guest has written, on a thread of its own: a panic there, as from a
/// parser that is not ours, is an error with its place. What it worked on is of no use then.
pub(crate) fn contained<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch(work).map_err(|Panicked { message, location, .. }| {
        format!("a fault of vmft in reading it: {message} ({location})")
    })
}

/// What is known of a fault of this program that a guest has met.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the machine failed at point {point}, at the instruction at {rip:#x} (bytes {bytes:02x?}): \
     {message} ({location}); this is a fault of vmft, and stops the guest; {kept}; to reproduce it, \
     record the same guest with `vmft record --log FILE` and run `vmft replay FILE`"
)]
pub struct FaultReport {
    /// Where in the instruction stream: behind the last instruction known to have completed.
    pub point: ExecutionPoint,
    /// The instruction, or where the run of instructions begins in which it is.
    pub rip: u64,
    /// The code there, as far as it could be read.
    pub bytes: Vec<u8>,
    /// What the program says is wrong.
    pub message: String,
    /// Where in the program's source.
    pub location: String,
    /// The registers when it happened, perhaps in the middle of an instruction.
    pub state: Option<CpuState>,
    /// What a compiler that is checked did wrong, if that is the fault.
    pub miscompiled: Option<Box<Miscompiled>>,
    /// Where the report is.
    pub kept: Kept,
}

/// Where a report is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Kept {
    /// In a file of its own.
    #[error("all registers are in {}", .0.display())]
    File(PathBuf),
    /// In the program's own messages: no file could be written.
    #[error("all registers are in the messages above ({0})")]
    Messages(String),
}

/// How many reports of one process and one point there may be.
const MAX_NAMES: u32 = 16;

impl FaultReport {
    /// The report as a text: what the message says, and the registers.
    fn text(&self, version: &str) -> String {
        let Self { point, rip, bytes, message, location, state, miscompiled, .. } = self;
        let state = state
            .as_ref()
            .map_or_else(|| "could not be read".to_owned(), |state| format!("{state:#x?}"));
        format!(
            "vmft {version}: the machine failed\n\npoint: {point}\ninstruction: at {rip:#x}, bytes {bytes:02x?}\n\
             what: {message}\nwhere: {location}\n\nregisters: {state}\n{}",
            miscompiled.as_deref().map(both_states).unwrap_or_default()
        )
    }

    /// Writes the report to a new file in the first of the directories that takes one. It shows what
    /// the guest had in its registers: nobody else may read it.
    fn keep(&mut self, directories: &[PathBuf]) {
        let text = self.text(env!("CARGO_PKG_VERSION"));
        let mut why = "no directory".to_owned();
        for directory in directories {
            let (place, point, text) = (directory.clone(), self.point, text.clone());
            // No option names the place.
            match outside_of_landlock(move || write_new(&place, point, &text)) {
                Ok(path) => {
                    self.kept = Kept::File(path);
                    return;
                }
                Err(error) => why = format!("{}: {error}", directory.display()),
            }
        }
        tracing::error!("{text}");
        self.kept = Kept::Messages(why);
    }
}

/// What the interpreter and compiled code made of the registers above.
fn both_states(miscompiled: &Miscompiled) -> String {
    let Miscompiled { interpreted, compiled, .. } = miscompiled;
    format!("\nthe interpreter's: {interpreted:#x?}\n\ncompiled code's: {compiled:#x?}\n")
}

fn write_new(directory: &Path, point: ExecutionPoint, text: &str) -> io::Result<PathBuf> {
    let process = std::process::id();
    let mut result = Err(io::ErrorKind::AlreadyExists.into());
    for number in 0..MAX_NAMES {
        let path = directory.join(format!("vmft-fault-{process}-{}-{number}.txt", point.get()));
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(mut file) => return file.write_all(text.as_bytes()).map(|()| path),
            Err(error) => result = Err(error),
        }
    }
    result
}

/// How many bytes of code a report shows.
const CODE_BYTES: usize = 32;

impl Machine {
    /// Where reports of faults are written; else in the current directory, or where temporary files are.
    pub fn report_faults_in(&mut self, directory: PathBuf) {
        self.reports = vec![directory];
    }

    /// Plants a fault of this program, which the guest meets next: for people who study what a pair does
    /// about it.
    pub fn fail(&mut self) {
        self.fails = true;
    }

    /// Does what a guest may make panic.
    pub(super) fn guarded<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, MachineError>,
    ) -> Result<T, MachineError> {
        match catch(|| work(self)) {
            Ok(result) => result,
            Err(panicked) => Err(self.broken(panicked)),
        }
    }

    fn broken(&mut self, panicked: Panicked) -> MachineError {
        self.broken = true;
        // It was left in the middle of something, and may panic again.
        let point = catch(|| self.engine.point()).unwrap_or(ExecutionPoint::START);
        let state = catch(|| self.engine.save()).ok();
        let code = catch(|| self.engine.code_here(CODE_BYTES)).ok().flatten();
        let (rip, bytes) =
            code.unwrap_or_else(|| (state.as_ref().map_or(0, |state| state.rip), Vec::new()));
        let Panicked { message, location, miscompiled } = panicked;
        let kept = Kept::Messages(String::new());
        let mut report =
            FaultReport { point, rip, bytes, message, location, state, miscompiled, kept };
        report.keep(&self.reports);
        MachineError::Broken(Box::new(report))
    }
}

/// Where reports go unless somebody says otherwise.
pub(super) fn usual_directories() -> Vec<PathBuf> {
    std::env::current_dir().into_iter().chain([std::env::temp_dir()]).collect()
}
