//! Inputs from the world, logged.

use super::deltas;
use super::exits::ExitEncoder;
use super::live::{InputSource, Live};
use super::{Boundary, DeviceRequest, InputError, Inputs, PointStep, Step};
use crate::machine::Delta;
use crate::outputs::HeldOutputs;
use std::sync::Arc;
use std::time::Duration;
use vmft_cpu::ExitRecord;
use vmft_log::entry::{Entry, EntrySequence, OutputSequence, StateDigest, StopReason};
use vmft_log::point::{CodeAddress, ExecutionPoint};

/// Whether a mark waits for company in the log, for as long as the log makes its batches wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Haste {
    AtOnce,
    WithCompany,
}

/// Where entries go: a log file, or the channel to a backup.
pub trait LogSink: std::fmt::Debug + Send {
    /// Appends an entry and returns its place. Waits while the log's buffer is full, which stops
    /// the guest: a backup must never be further behind than its buffer. `None` if nobody gets it:
    /// a channel whose peer is lost swallows entries, and its owner decides what happens then.
    ///
    /// # Errors
    /// The file's error.
    fn append(&mut self, entry: &Entry) -> Result<Option<EntrySequence>, std::io::Error>;
    /// Sends what is buffered, at once.
    ///
    /// # Errors
    /// As [`Self::append`].
    fn flush(&mut self) -> Result<(), std::io::Error>;
    /// Holds the guest back before it runs on, so that its backup can keep up; called once a slice.
    /// False if it may not run on yet: then this is asked again, after what else there is to do. A log
    /// that nobody follows never holds anybody back.
    fn hold_back(&mut self) -> bool;
    /// True if the log wants a checkpoint here, for a reader that is far behind. Asked at every point.
    fn wants_checkpoint(&mut self) -> bool;
    /// True if whoever reads the log is too far behind to have come to what is appended now.
    fn is_far_behind(&self) -> bool;
    /// True once nobody reads the log any more and recording is over.
    fn is_closed(&self) -> bool;
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
    /// The point the guest is at, and the branch it lies behind, until the log has that.
    landing: Option<(ExecutionPoint, CodeAddress)>,
    /// Exits that are in no entry yet.
    exits: ExitEncoder,
    /// A place may be named by the machine's state.
    named_by_state: bool,
    /// The point of the last checkpoint in the log, or of the digest that the next begins from.
    base: ExecutionPoint,
    /// Checkpoints say what the guest has put out, so that a reader may go on from them.
    for_jumps: bool,
    /// The guest is being started with what its disks have, which nobody who reads the log knows.
    is_booting: bool,
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
        let next_digest = point.after(live.scale().digest_interval);
        Self {
            live,
            log,
            gate,
            marked: outputs,
            mark_by: None,
            next_digest,
            last_entry: point,
            landing: None,
            exits: ExitEncoder::default(),
            named_by_state: true,
            base: point,
            for_jumps: false,
            is_booting: false,
        }
    }

    /// Checkpoints are taken when the log wants them, for readers that are far behind. The machine must
    /// keep deltas.
    pub fn with_jumps(mut self) -> Self {
        self.gate.recent().begin();
        self.for_jumps = true;
        self
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

    fn append(&mut self, entry: &Entry) -> Result<Option<EntrySequence>, InputError> {
        if let Some(point) = entry.point() {
            // In front of the first entry at the point, or it comes too late.
            let landing = self.landing.take_if(|(landed, _)| *landed == point);
            if let (Some((point, branch)), true) = (landing, point > self.last_entry) {
                self.log.append(&Entry::Landing { point, branch }).map_err(InputError::Log)?;
            }
            self.last_entry = point;
        }
        self.log.append(entry).map_err(InputError::Log)
    }

    /// A checkpoint is taken at `point`, with the machine at rest: whoever follows already flushes as
    /// this machine does. False if nobody follows.
    ///
    /// # Errors
    /// The log's.
    pub fn flushed(&mut self, point: ExecutionPoint) -> Result<bool, InputError> {
        if self.log.is_closed() {
            return Ok(false);
        }
        self.log_exits(point)?;
        let entry = self.append(&Entry::Flush { point })?;
        self.log.flush().map_err(InputError::Log)?;
        Ok(entry.is_some())
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
            self.mark(point, outputs, Haste::AtOnce)?;
        }
        self.log_exits(point)?;
        self.append(&Entry::Stop { point, reason })?;
        self.log.flush().map_err(InputError::Log)
    }

    /// Logs the exits that are in no entry yet; the last of them led to `point`.
    fn log_exits(&mut self, point: ExecutionPoint) -> Result<(), InputError> {
        if self.exits.count() > 0 {
            let exits = self.exits.take();
            self.append(&Entry::Exits { point, exits })?;
        }
        Ok(())
    }

    /// Marks the outputs produced so far: from here on they wait only for an acknowledgement.
    fn mark(
        &mut self,
        point: ExecutionPoint,
        output: OutputSequence,
        haste: Haste,
    ) -> Result<(), InputError> {
        // A mark that nobody gets releases nothing: the outputs stay held until the owner of the log
        // has found out whether this side may go on.
        let begun = self.gate.begin_mark();
        if let Some(entry) = self.append(&Entry::OutputMark { point, output })? {
            self.gate.mark(begun, entry, output);
        }
        self.marked = output;
        self.mark_by = None;
        match haste {
            Haste::AtOnce => self.log.flush().map_err(InputError::Log),
            Haste::WithCompany => Ok(()),
        }
    }

    fn mark_if_due(&mut self, boundary: &Boundary) -> Result<(), InputError> {
        if boundary.outputs == self.marked {
            return Ok(());
        }
        let window = self.live.scale().mark_window;
        let by = *self.mark_by.get_or_insert(boundary.point.after(window));
        // A mark holds also where there is no point: outputs are made on the way to one.
        if boundary.is_idle() || boundary.point >= by || self.gate.has_urgent() {
            // Without a window every byte of a console has a mark, and the log makes the batches.
            let haste = match boundary.is_idle() || window > 0 || self.gate.has_urgent() {
                true => Haste::AtOnce,
                false => Haste::WithCompany,
            };
            self.mark(boundary.point, boundary.outputs, haste)?;
        }
        Ok(())
    }
}

impl<S: InputSource, L: LogSink> Inputs for Recording<S, L> {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        if self.log.is_closed() {
            return self.live.next(boundary);
        }
        let branch = boundary.here().and_then(|here| here.branch);
        self.landing = branch.map(|branch| (boundary.point, branch));
        if std::mem::take(&mut self.is_booting) {
            self.log_exits(boundary.point)?;
            self.append(&Entry::Progress { point: boundary.point })?;
            return Ok(Step::Whole);
        }
        self.mark_if_due(boundary)?;
        let here = boundary.here();
        if let Some(here) = here.filter(|_| boundary.point >= self.next_digest) {
            return Ok(Step::Here(here, PointStep::Digest));
        }
        // Two bases are never at one point, which names them.
        let wanted = self.for_jumps && here.is_some() && boundary.point > self.base;
        if wanted && self.log.wants_checkpoint()
            || self.named_by_state && self.live.is_overdue(boundary)
        {
            self.log_exits(boundary.point)?;
            self.append(&Entry::Progress { point: boundary.point })?;
            return Ok(Step::Checkpoint);
        }
        let window = self.live.scale().progress_window;
        if boundary.is_idle() && boundary.point.since(self.last_entry) >= window {
            self.log_exits(boundary.point)?;
            self.append(&Entry::Progress { point: boundary.point })?;
            self.log.flush().map_err(InputError::Log)?;
        }
        let step = loop {
            let step = self.live.next(boundary)?;
            if !matches!(step, Step::RunTo(_)) || self.log.hold_back() {
                break step;
            }
        };
        match step {
            Step::RunTo(bound) => {
                let bound = self.mark_by.map_or(bound, |by| by.min(bound));
                let bound = match self.live.scale().stops_anywhere {
                    true => bound.min(self.next_digest),
                    false => bound,
                };
                Ok(Step::RunTo(bound.max(boundary.point.after(1))))
            }
            Step::Here(here, PointStep::Deliver(arrival)) => {
                let entry = Entry::Arrival { point: boundary.point, arrival };
                self.append(&entry)?;
                let Entry::Arrival { arrival, .. } = entry else { unreachable!("made above") };
                Ok(Step::Here(here, PointStep::Deliver(arrival)))
            }
            // Whoever joins at a checkpoint taken here has none of these exits.
            Step::Pause => {
                self.log_exits(boundary.point)?;
                Ok(step)
            }
            Step::Boot(_) => {
                self.is_booting = true;
                Ok(step)
            }
            Step::Here(_, PointStep::Digest | PointStep::Flush)
            | Step::Checkpoint
            | Step::Whole
            | Step::Adopt(_)
            | Step::Stop(_)
            | Step::Halt
            | Step::LogEnded => Ok(step),
        }
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), InputError> {
        self.live.request(request)
    }

    fn digest(&mut self, point: ExecutionPoint, digest: StateDigest) -> Result<(), InputError> {
        self.next_digest = point.after(self.live.scale().digest_interval);
        self.log_exits(point)?;
        self.append(&Entry::Digest { point, digest })?;
        if self.is_base() {
            self.base = point;
            self.gate.recent().forget();
        }
        Ok(())
    }

    fn branch_before(&self, _: ExecutionPoint) -> Option<CodeAddress> {
        None
    }

    fn stood_still(&mut self, time: Duration) {
        self.live.stood_still(time);
    }

    fn is_base(&self) -> bool {
        // Else a reader would have to come this far by replaying before a checkpoint could help it.
        !(self.for_jumps && self.log.is_far_behind())
    }

    fn checkpoint(&mut self, delta: Option<Delta>) -> Result<(), InputError> {
        let Some(mut delta) = delta else {
            // Never agreed with anybody, so there is nothing to be short of.
            self.named_by_state = false;
            return Ok(());
        };
        self.base = delta.state.point();
        if self.for_jumps && delta.is_whole {
            // Whoever comes to it by replaying has these outputs.
            self.gate.recent().forget();
        } else if self.for_jumps {
            delta.outputs = Some(self.gate.recent().all());
            self.gate.recent().forget();
        }
        for entry in deltas::pack(delta) {
            self.append(&entry)?;
        }
        self.live.named_by_state();
        self.log.flush().map_err(InputError::Log)
    }

    fn watches_exits(&self) -> bool {
        !self.log.is_closed()
    }

    fn exits(&mut self, point: ExecutionPoint, exits: &[ExitRecord]) -> Result<(), InputError> {
        if self.log.is_closed() {
            return Ok(());
        }
        for exit in exits {
            if self.exits.is_full() {
                // Entries of one point, all of which the guest has passed.
                self.log_exits(point)?;
            }
            self.exits.push(exit);
        }
        if self.exits.is_full() {
            self.log_exits(point)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "recording_tests.rs"]
mod tests;
