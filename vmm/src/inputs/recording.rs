//! Inputs from the world, logged.

use super::live::{InputSource, Live};
use super::{Boundary, InputError, Inputs, Step, Wish};
use crate::outputs::HeldOutputs;
use std::sync::Arc;
use vmft_logging_channel::entry::{Entry, EntrySequence, OutputSequence, StateDigest, StopReason};
use vmft_logging_channel::point::ExecutionPoint;

/// Instructions between two digests: about a third of a second of computing.
pub const DIGEST_INTERVAL: u64 = 1 << 25;
/// The first unmarked output waits at most so many instructions for company, so that a line of
/// console bytes shares one mark. About 50 µs.
const MARK_WINDOW: u64 = 4_096;
/// A guest that goes idle so many instructions after the last entry says how far it came.
const PROGRESS_WINDOW: u64 = 1_000;

/// Where entries go: a log file, or the channel to a backup.
pub trait LogSink: std::fmt::Debug + Send {
    /// Appends an entry and returns its place. Waits while the log's buffer is full, which stops
    /// the guest: a backup must never be further behind than its buffer. `None` if nobody gets it:
    /// a channel whose peer is lost swallows entries, and its owner decides what happens then.
    ///
    /// # Errors
    /// The file's error.
    fn append(&mut self, entry: Entry) -> Result<Option<EntrySequence>, std::io::Error>;
    /// Sends what is buffered, at once.
    ///
    /// # Errors
    /// As [`Self::append`].
    fn flush(&mut self) -> Result<(), std::io::Error>;
    /// How long to hold the guest back before it runs on, so that its backup can keep up; called
    /// once a slice. A log that nobody follows never does.
    fn hold_back(&mut self) {}
    /// True once nobody reads the log any more and recording is over.
    fn is_closed(&self) -> bool {
        false
    }
}

/// Live inputs that are written to the log before they are applied.
#[derive(Debug)]
pub struct Recording<S, L> {
    live: Live<S>,
    log: L,
    gate: Arc<HeldOutputs>,
    /// Outputs up to here are marked in the log.
    marked: OutputSequence,
    /// When the first unmarked output must be marked.
    mark_by: Option<ExecutionPoint>,
    next_digest: ExecutionPoint,
    last_entry: ExecutionPoint,
}

impl<S: InputSource, L: LogSink> Recording<S, L> {
    /// Records from `point` on, where `outputs` outputs have been produced and marked.
    pub fn new(
        live: Live<S>,
        log: L,
        gate: Arc<HeldOutputs>,
        point: ExecutionPoint,
        outputs: OutputSequence,
    ) -> Self {
        Self {
            live,
            log,
            gate,
            marked: outputs,
            mark_by: None,
            next_digest: point.after(DIGEST_INTERVAL),
            last_entry: point,
        }
    }

    /// Gives the live inputs and the log back: recording is over.
    pub fn into_parts(self) -> (Live<S>, L) {
        (self.live, self.log)
    }

    /// The log.
    pub fn log(&mut self) -> &mut L {
        &mut self.log
    }

    /// The live inputs underneath.
    pub fn live(&mut self) -> &mut Live<S> {
        &mut self.live
    }

    fn append(&mut self, entry: Entry) -> Result<Option<EntrySequence>, InputError> {
        if let Some(point) = entry.point() {
            self.last_entry = point;
        }
        self.log.append(entry).map_err(InputError::Log)
    }

    /// The machine has stopped for good: logs its last outputs and the stop.
    ///
    /// # Errors
    /// The log's.
    pub fn stopped(
        &mut self,
        point: ExecutionPoint,
        outputs: OutputSequence,
        reason: StopReason,
    ) -> Result<(), InputError> {
        if self.log.is_closed() {
            return Ok(());
        }
        if outputs != self.marked {
            self.mark(point, outputs)?;
        }
        self.append(Entry::Stop { point, reason })?;
        self.log.flush().map_err(InputError::Log)
    }

    /// Marks the outputs produced so far: from here on they wait only for an acknowledgement.
    fn mark(&mut self, point: ExecutionPoint, output: OutputSequence) -> Result<(), InputError> {
        // A mark that nobody gets releases nothing: the outputs stay held until the owner of the log
        // has found out whether this side may go on.
        if let Some(entry) = self.append(Entry::OutputMark { point, output })? {
            self.gate.mark(entry, output);
        }
        self.marked = output;
        self.mark_by = None;
        self.log.flush().map_err(InputError::Log)
    }

    fn mark_if_due(&mut self, boundary: &Boundary) -> Result<(), InputError> {
        if boundary.outputs == self.marked {
            return Ok(());
        }
        let by = *self.mark_by.get_or_insert(boundary.point.after(MARK_WINDOW));
        if boundary.idle.is_some() || boundary.point >= by || self.gate.has_urgent() {
            self.mark(boundary.point, boundary.outputs)?;
        }
        Ok(())
    }
}

impl<S: InputSource, L: LogSink> Inputs for Recording<S, L> {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        if self.log.is_closed() {
            return self.live.next(boundary);
        }
        self.mark_if_due(boundary)?;
        if boundary.point >= self.next_digest {
            return Ok(Step::Digest);
        }
        if boundary.idle.is_some() && boundary.point.since(self.last_entry) >= PROGRESS_WINDOW {
            self.append(Entry::Progress { point: boundary.point })?;
            self.log.flush().map_err(InputError::Log)?;
        }
        let step = self.live.next(boundary)?;
        match &step {
            Step::RunTo(bound) => {
                self.log.hold_back();
                let bound = self.mark_by.map_or(*bound, |by| by.min(*bound));
                return Ok(Step::RunTo(bound.min(self.next_digest)));
            }
            Step::Deliver(arrival) => {
                let arrival = arrival.clone();
                self.append(Entry::Arrival { point: boundary.point, arrival })?;
            }
            Step::Digest | Step::Pause | Step::Stop(_) | Step::Halt | Step::LogEnded => {}
        }
        Ok(step)
    }

    fn wish(&mut self, wish: Wish) -> Result<(), InputError> {
        self.live.wish(wish)
    }

    fn digest(&mut self, point: ExecutionPoint, digest: StateDigest) -> Result<(), InputError> {
        self.next_digest = point.after(DIGEST_INTERVAL);
        self.append(Entry::Digest { point, digest })?;
        Ok(())
    }
}
