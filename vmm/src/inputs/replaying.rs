//! Inputs from the log.

use super::deltas::{Assembly, base_of};
use super::exits::{self, ExitDifference};
use super::{AtPoint, Boundary, DeviceRequest, Gauges, InputError, Inputs, PointStep, Step};
use crate::machine::{Delta, differing_page};
use crate::outputs::KeptOutputs;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use vmft_cpu::ExitRecord;
use vmft_cpu::memory::PageNumber;
use vmft_log::checkpoint::PieceKind;
use vmft_log::entry::{Entry, OutputSequence, StateDigest, StopReason};
use vmft_log::point::{CodeAddress, ExecutionPoint};

/// Most exits that wait for the log's. A primary logs them by a few dozen, so only a log that is not this
/// machine's makes so many wait.
const MAX_UNCOMPARED: usize = 1 << 16;

/// Why there are no more entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogEnd {
    /// The end of a file, or the peer is lost: everything received has been handed out.
    Ended,
}

/// Where entries come from: a log file, or the channel from the primary.
pub trait LogSource: std::fmt::Debug + Send {
    /// The next entry; waits for it. `at` is where this side is, for the lag the primary sees.
    ///
    /// # Errors
    /// [`LogEnd`] once there will be no more.
    fn next(&mut self, at: ExecutionPoint) -> Result<Entry, LogEnd>;

    /// Goes on with the first whole checkpoint that has come, if `may` says so of its fixed part: the next
    /// entry is its first piece. What was passed over comes back. A log that is there for its own sake,
    /// such as a file, has nothing to pass over.
    fn skip_to_checkpoint(&mut self, may: &dyn Fn(&[u8]) -> bool) -> Option<Vec<Entry>>;
}

/// The replaying side is in a state the log contradicts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Divergence {
    /// The last point at which the two agreed.
    pub agreed: ExecutionPoint,
    /// The first point at which they were seen to differ.
    pub point: ExecutionPoint,
    /// What differs.
    pub what: Difference,
}

/// What differs between the log and the replaying side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// The digests.
    Digest {
        /// What the log says.
        logged: Box<StateDigest>,
        /// What this side has.
        replayed: Box<StateDigest>,
    },
    /// What the guest exited for.
    Exits(Box<ExitDifference>),
    /// The log's exits are no exits.
    MalformedExits,
    /// The log has no exits to compare this side's with.
    UncomparedExits,
    /// How many outputs the guest has produced.
    Outputs {
        /// What the log says.
        logged: OutputSequence,
        /// What this side has.
        replayed: OutputSequence,
    },
    /// The guest waits for an interrupt, but the log goes on without one.
    Idle {
        /// The point of the next entry.
        next: ExecutionPoint,
    },
    /// The guest is already past the point of the next entry.
    Past {
        /// The point of the next entry.
        next: ExecutionPoint,
    },
    /// The guest stopped where the log goes on otherwise.
    Stopped(String),
    /// An input fits no request of this side's devices.
    Arrival(String),
    /// A checkpoint in the log is none.
    Checkpoint(String),
}

impl Difference {
    /// The page of memory that differs, where it is known to be one alone.
    pub fn page(&self) -> Option<PageNumber> {
        match self {
            Self::Digest { logged, replayed } => differing_page(logged, replayed),
            _ => None,
        }
    }
}

pub(super) const REGISTER_NAMES: [&str; 18] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "rip", "rflags",
];

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest { logged, replayed } => {
                let mut separator = "";
                for (index, name) in REGISTER_NAMES.iter().enumerate() {
                    let (log, here) = (logged.registers[index], replayed.registers[index]);
                    if log != here {
                        write!(f, "{separator}{name} is {here:#x}, logged {log:#x}")?;
                        separator = "; ";
                    }
                }
                let hashes = [
                    ("cpu state", logged.cpu, replayed.cpu),
                    ("device state", logged.devices, replayed.devices),
                    ("memory", logged.memory, replayed.memory),
                    ("pages in use", logged.pages.into(), replayed.pages.into()),
                ];
                let page = differing_page(logged, replayed);
                for (name, log, here) in hashes {
                    if log != here {
                        write!(f, "{separator}{name} is {here:#x}, logged {log:#x}")?;
                        separator = "; ";
                    }
                }
                match page {
                    Some(page) => write!(f, "; of memory, the page at {:#x}", page.address().0),
                    None if logged.memory != replayed.memory => {
                        f.write_str("; of memory, several pages")
                    }
                    None => Ok(()),
                }
            }
            Self::Exits(difference) => difference.fmt(f),
            Self::MalformedExits => f.write_str("the log's exits are no exits"),
            Self::UncomparedExits => {
                write!(f, "the log says nothing of {MAX_UNCOMPARED} exits of the guest")
            }
            Self::Outputs { logged, replayed } => {
                write!(f, "{} outputs produced, logged {}", replayed.0, logged.0)
            }
            Self::Idle { next } => {
                write!(f, "the guest waits for an interrupt, the log goes on at {next}")
            }
            Self::Past { next } => write!(f, "the guest is already past the next entry at {next}"),
            Self::Stopped(why) => write!(f, "the guest stopped ({why}), the log goes on"),
            Self::Arrival(why) => write!(f, "a logged input fits nothing here: {why}"),
            Self::Checkpoint(why) => {
                write!(f, "a checkpoint in the log cannot be taken over: {why}")
            }
        }
    }
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "divergence between points {} and {}: {}", self.agreed, self.point, self.what)
    }
}

impl std::error::Error for Divergence {}

/// Inputs taken from a log.
#[derive(Debug)]
pub struct Replaying<L> {
    log: L,
    kept: Arc<KeptOutputs>,
    /// The next entry, taken but not applied.
    next: Option<Entry>,
    expected: Option<StateDigest>,
    /// The last point at which a digest agreed.
    agreed: ExecutionPoint,
    digests: u64,
    log_stopped: Option<StopReason>,
    /// Exits of the guest that the log's have not been compared with yet.
    exits: Vec<ExitRecord>,
    exits_agreed: u64,
    /// A checkpoint on its way in.
    assembly: Assembly,
    /// The point of the last one.
    last_checkpoint: Option<ExecutionPoint>,
    gauges: Arc<Gauges>,
}

impl<L: LogSource> Replaying<L> {
    /// Replays `log` to a machine that is at `start` and has `memory` bytes of memory; released outputs are
    /// dropped from `kept`.
    pub fn new(log: L, kept: Arc<KeptOutputs>, start: ExecutionPoint, memory: u64) -> Self {
        Self {
            log,
            kept,
            next: None,
            expected: None,
            agreed: start,
            digests: 0,
            log_stopped: None,
            exits: Vec::new(),
            exits_agreed: 0,
            assembly: Assembly::new(memory),
            last_checkpoint: None,
            gauges: Arc::default(),
        }
    }

    /// The same, with gauges that others see.
    #[must_use]
    pub fn watched(self, gauges: Arc<Gauges>) -> Self {
        Self { gauges, ..self }
    }

    /// How many digests agreed.
    pub fn digests(&self) -> u64 {
        self.digests
    }

    /// How many exits agreed.
    pub fn exits_agreed(&self) -> u64 {
        self.exits_agreed
    }

    /// Compares the exits since the last comparison with the log's. With several entries at one
    /// point, the first has the first exits.
    fn compare_exits(&mut self, point: ExecutionPoint, logged: &[u8]) -> Result<(), InputError> {
        let Ok(logged) = exits::decode(logged) else {
            return Err(self.diverged(point, Difference::MalformedExits).into());
        };
        let here = self.exits.len().min(logged.len());
        if let Some(difference) = exits::first_difference(&logged, &self.exits[..here]) {
            return Err(self.diverged(point, Difference::Exits(difference)).into());
        }
        self.exits.drain(..here);
        self.exits_agreed += here as u64;
        self.gauges.add_agreed(0, here as u64);
        Ok(())
    }

    /// Where the log comes from.
    pub fn log(&mut self) -> &mut L {
        &mut self.log
    }

    /// The divergence report for something seen at `point`.
    pub fn diverged(&self, point: ExecutionPoint, what: Difference) -> Box<Divergence> {
        Box::new(Divergence { agreed: self.agreed, point, what })
    }

    /// The machine has stopped at `point`: reads the log to its stop, which must say the same.
    ///
    /// # Errors
    /// [`InputError::Divergence`] if the log goes on otherwise. [`LogEnd`] inside `Ok` if the log
    /// ends before it says so.
    pub fn stopped(
        &mut self,
        point: ExecutionPoint,
        outputs: OutputSequence,
        reason: StopReason,
    ) -> Result<Result<(), LogEnd>, InputError> {
        if self.log_stopped == Some(reason) {
            return Ok(Ok(()));
        }
        loop {
            let entry = match self.next.take() {
                Some(entry) => entry,
                None => match self.log.next(point) {
                    Ok(entry) => entry,
                    Err(end) => return Ok(Err(end)),
                },
            };
            match entry {
                Entry::Stop { point: logged, reason: why } if logged == point && why == reason => {
                    return Ok(Ok(()));
                }
                Entry::Released { output } => self.kept.released(output),
                Entry::Exits { point: logged, exits } if logged == point => {
                    self.compare_exits(point, &exits)?;
                }
                Entry::Progress { point: logged } | Entry::Landing { point: logged, .. }
                    if logged == point => {}
                Entry::OutputMark { point: logged, output }
                    if logged == point && output == outputs => {}
                other => {
                    let what = Difference::Stopped(format!("{reason:?}; logged {other:?}"));
                    return Err(self.diverged(point, what).into());
                }
            }
        }
    }

    /// Passes over what is to be replayed, as far as a checkpoint that has come stands for it. What this
    /// side has written since the checkpoint's base is part of what the primary had, so it is covered.
    fn skip(&mut self, boundary: &Boundary) {
        let (point, last) = (boundary.point, self.last_checkpoint);
        let may = |fixed: &[u8]| base_of(fixed).is_some_and(|base| base.is_passed(point, last));
        let Some(skipped) = self.log.skip_to_checkpoint(&may) else { return };
        self.next = None;
        for entry in skipped {
            if let Entry::Released { output } = entry {
                self.kept.released(output);
            }
        }
    }

    /// A piece of a checkpoint; the step that takes it over, if it is the last.
    fn add_piece(
        &mut self,
        piece: PieceKind,
        bytes: &[u8],
        boundary: &Boundary,
    ) -> Result<Option<Step>, InputError> {
        match self.assembly.add(piece, bytes) {
            Ok(None) => Ok(None),
            Ok(Some(delta)) => {
                // Those behind the last point are no exits of this side's.
                self.exits.clear();
                let point = delta.state.point();
                self.last_checkpoint = Some(point);
                if point > boundary.point {
                    self.gauges.add_skipped(point.since(boundary.point));
                }
                Ok(Some(Step::Adopt(Box::new(delta))))
            }
            Err(why) => {
                let what = Difference::Checkpoint(why);
                Err(self.diverged(boundary.point, what).into())
            }
        }
    }

    /// The step for an entry at the boundary itself; `None` if it asks nothing of the machine.
    fn apply(
        &mut self,
        entry: Entry,
        here: AtPoint,
        boundary: &Boundary,
    ) -> Result<Option<Step>, InputError> {
        let at_point = |step| Ok(Some(Step::Here(here, step)));
        match entry {
            Entry::Arrival { arrival, .. } => at_point(PointStep::Deliver(arrival)),
            Entry::OutputMark { output, .. } => {
                if output == boundary.outputs {
                    return Ok(None);
                }
                let what = Difference::Outputs { logged: output, replayed: boundary.outputs };
                Err(self.diverged(boundary.point, what).into())
            }
            Entry::Digest { digest, .. } => {
                self.expected = Some(digest);
                at_point(PointStep::Digest)
            }
            Entry::Exits { point, exits } => {
                self.compare_exits(point, &exits)?;
                Ok(None)
            }
            Entry::Stop { reason, .. } => {
                self.log_stopped = Some(reason);
                Ok(Some(Step::Stop(reason)))
            }
            Entry::Flush { .. } => at_point(PointStep::Flush),
            // The hint is of no use any more: this is the place.
            Entry::Landing { .. }
            | Entry::Progress { .. }
            | Entry::Released { .. }
            | Entry::CheckpointPart { .. } => Ok(None),
        }
    }
}

impl<L: LogSource> Inputs for Replaying<L> {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        self.gauges.set_to(boundary);
        self.skip(boundary);
        loop {
            let entry = match self.next.take() {
                Some(entry) => entry,
                None => match self.log.next(boundary.point) {
                    Ok(entry) => entry,
                    Err(LogEnd::Ended) => return Ok(Step::LogEnded),
                },
            };
            let Some(point) = entry.point() else {
                match entry {
                    Entry::CheckpointPart { piece, bytes } => {
                        if let Some(step) = self.add_piece(piece, &bytes, boundary)? {
                            return Ok(step);
                        }
                    }
                    Entry::Released { output } => self.kept.released(output),
                    _ => {}
                }
                continue;
            };
            if point > boundary.point {
                if boundary.is_idle() {
                    let what = Difference::Idle { next: point };
                    return Err(self.diverged(boundary.point, what).into());
                }
                self.next = Some(entry);
                return Ok(Step::RunTo(point));
            }
            // Where there is no point, one that lies ahead is awaited: that of the last point is past.
            let here = boundary.here().filter(|_| point == boundary.point);
            let Some(here) = here else {
                let what = Difference::Past { next: point };
                return Err(self.diverged(boundary.point, what).into());
            };
            if let Some(step) = self.apply(entry, here, boundary)? {
                return Ok(step);
            }
        }
    }

    fn branch_before(&self, point: ExecutionPoint) -> Option<CodeAddress> {
        match &self.next {
            Some(Entry::Landing { point: logged, branch }) if *logged == point => Some(*branch),
            _ => None,
        }
    }

    fn request(&mut self, _: DeviceRequest) -> Result<(), InputError> {
        // The primary does it; its result is in the log.
        Ok(())
    }

    fn stood_still(&mut self, _: Duration) {
        // The primary's time is in the log.
    }

    fn digest(&mut self, point: ExecutionPoint, replayed: StateDigest) -> Result<(), InputError> {
        let logged = self.expected.take().expect("a digest is asked for only by a digest entry");
        // The exits before a digest are in the log before it.
        if let Some(exit) = self.exits.first().copied() {
            let difference = exits::first_difference(&[], &[exit]).expect("one side has it");
            return Err(self.diverged(point, Difference::Exits(difference)).into());
        }
        if logged == replayed {
            self.agreed = point;
            self.digests += 1;
            self.gauges.add_agreed(1, 0);
            return Ok(());
        }
        let what = Difference::Digest { logged: Box::new(logged), replayed: Box::new(replayed) };
        Err(self.diverged(point, what).into())
    }

    fn is_base(&self) -> bool {
        true
    }

    fn checkpoint(&mut self, _: Option<Delta>) -> Result<(), InputError> {
        Ok(())
    }

    fn watches_exits(&self) -> bool {
        true
    }

    fn exits(&mut self, point: ExecutionPoint, exits: &[ExitRecord]) -> Result<(), InputError> {
        if self.exits.len() + exits.len() > MAX_UNCOMPARED {
            return Err(self.diverged(point, Difference::UncomparedExits).into());
        }
        self.exits.extend_from_slice(exits);
        Ok(())
    }
}

#[cfg(test)]
#[path = "replaying_tests.rs"]
mod tests;
