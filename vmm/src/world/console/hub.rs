//! What a console knows: the bytes, who may see them, and which outputs they belong to.

use super::{CHUNK, EarlyInput, Mailbox};
use crate::outputs::{Output, OutputKind};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use vmft_log::entry::OutputSequence;

/// Console bytes kept for readers that attach later.
const HISTORY: usize = 1 << 20;
/// What the end of a run takes of the host's memory, here and where it is known what is out.
const RUN_COST: usize = 64;
/// Outputs in a run: as long as a sink has not written all of it, none of it is out.
const RUN: u64 = 256;

/// Is told which outputs have been written.
pub type OnOut = Arc<dyn Fn(OutputSequence) + Send + Sync>;

/// Where input goes.
#[derive(Debug)]
pub(super) enum Input {
    /// Nowhere: another side runs the guest.
    Nowhere,
    /// It waits for this side to run the guest.
    Later,
    /// To the guest.
    Guest(Arc<Mailbox>),
}

/// Released outputs that follow each other and are not written yet.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Offsets of its first byte, and after its last.
    start: u64,
    end: u64,
    /// The last output in it.
    sequence: OutputSequence,
    outputs: u64,
}

pub(super) struct Hub {
    history: VecDeque<u8>,
    /// Offset of the first byte of `history`.
    start: u64,
    /// Everything before this offset may be seen.
    pub(super) visible: u64,
    /// The main sink has everything before this offset.
    pub(super) written: u64,
    unwritten: VecDeque<Run>,
    /// `on_out` is being told of what was written.
    pub(super) is_reporting: bool,
    has_sink: bool,
    /// From where on the main sink has taken nothing, and never will.
    gone_at: Option<u64>,
    /// Why the main sink does not take bytes.
    pub(super) trouble: Option<String>,
    /// Readers of the socket that are still being sent to.
    pub(super) readers: usize,
    /// Bytes sent to them.
    pub(super) sent: u64,
    pub(super) is_closed: bool,
    pub(super) input: Input,
    pub(super) on_out: Option<OnOut>,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("start", &self.start)
            .field("visible", &self.visible)
            .field("written", &self.written)
            .field("end", &self.end())
            .finish_non_exhaustive()
    }
}

impl Hub {
    pub(super) fn new(has_sink: bool, early: EarlyInput) -> Self {
        Self {
            history: VecDeque::new(),
            start: 0,
            visible: 0,
            written: 0,
            unwritten: VecDeque::new(),
            is_reporting: false,
            has_sink,
            gone_at: None,
            trouble: None,
            readers: 0,
            sent: 0,
            is_closed: false,
            input: match early {
                EarlyInput::Waits => Input::Later,
                EarlyInput::Dropped => Input::Nowhere,
            },
            on_out: None,
        }
    }

    fn end(&self) -> u64 {
        self.start + self.history.len() as u64
    }

    /// Adds the part of `bytes` that is new.
    fn append(&mut self, offset: u64, bytes: &[u8]) {
        if offset > self.end() {
            // The stream begins in the middle: this side joined a running guest.
            self.history.clear();
            self.start = offset;
        }
        let known = usize::try_from(self.end() - offset).unwrap_or(usize::MAX);
        if let Some(new) = bytes.get(known..) {
            self.history.extend(new);
        }
    }

    /// Forgets the oldest bytes that nobody needs.
    fn forget(&mut self, keep_from: u64) {
        let wanted = usize::try_from(self.end().saturating_sub(keep_from)).unwrap_or(usize::MAX);
        let excess = self.history.len().saturating_sub(wanted.max(HISTORY));
        self.history.drain(..excess);
        self.start += excess as u64;
    }

    /// Bytes nobody may see yet. What was replayed long ago is out already, for all this side knows, or
    /// is kept elsewhere; so it may be forgotten.
    pub(super) fn remember(&mut self, offset: u64, bytes: &[u8]) {
        self.append(offset, bytes);
        self.forget(self.end());
    }

    /// Bytes that may be seen; false if nobody writes them, so that they are out now.
    pub(super) fn write(&mut self, sequence: OutputSequence, offset: u64, bytes: &[u8]) -> bool {
        if self.unwritten.is_empty() {
            // The other side has written everything before.
            self.written = self.written.max(offset);
            if offset < self.start {
                // A side that goes live lets out what it kept, which goes further back than what it
                // remembers, and comes up to now.
                self.history.clear();
                self.start = offset;
            }
        }
        let end = offset + bytes.len() as u64;
        self.append(offset, bytes);
        self.visible = self.visible.max(end);
        let is_new = end > self.written;
        if self.has_sink && is_new {
            self.forget(self.written.min(self.visible));
            self.add_unwritten(sequence, offset, end);
        } else {
            self.written = self.written.max(end);
            self.forget(self.visible);
        }
        self.has_sink && is_new
    }

    fn add_unwritten(&mut self, sequence: OutputSequence, start: u64, end: u64) {
        if let Some(last) = self.unwritten.back_mut()
            && last.end == start
            && last.outputs < RUN
        {
            (last.end, last.sequence) = (end, sequence);
            last.outputs += 1;
        } else {
            self.unwritten.push_back(Run { start, end, sequence, outputs: 1 });
        }
    }

    pub(super) fn reveal(&mut self, offset: u64) {
        self.visible = self.visible.max(offset.min(self.end()));
    }

    /// Visible bytes from `from` on, at most [`CHUNK`], with the offset they really begin at.
    pub(super) fn chunk(&self, from: u64) -> (u64, Vec<u8>) {
        self.bytes(from, self.visible, CHUNK)
    }

    fn bytes(&self, from: u64, to: u64, limit: usize) -> (u64, Vec<u8>) {
        let from = from.max(self.start);
        let end = to.min(self.end());
        if from >= end {
            return (from, Vec::new());
        }
        let skip = usize::try_from(from - self.start).expect("within the history");
        let take = usize::try_from(end - from).expect("within the history").min(limit);
        (from, self.history.iter().skip(skip).take(take).copied().collect())
    }

    /// What the main sink must write next.
    pub(super) fn next_for_sink(&self) -> Option<(u64, Vec<u8>)> {
        let to = self.unwritten.back()?.end;
        let (offset, bytes) = self.bytes(self.written, to, CHUNK);
        assert!(offset == self.written && !bytes.is_empty(), "what is not written is remembered");
        Some((offset, bytes))
    }

    /// The main sink has everything before `end`; up to which output that is, if that is new.
    pub(super) fn sink_wrote(&mut self, end: u64) -> Option<OutputSequence> {
        self.written = self.written.max(end);
        let mut last = None;
        while self.unwritten.front().is_some_and(|run| run.end <= end) {
            last = self.unwritten.pop_front().map(|run| run.sequence);
        }
        last
    }

    /// The main sink is no more. Up to which output everything counts as out now.
    pub(super) fn sink_is_gone(&mut self) -> Option<OutputSequence> {
        self.gone_at = Some(self.written);
        self.has_sink = false;
        let last = self.unwritten.back().map(|run| run.sequence);
        self.unwritten.clear();
        self.written = self.written.max(self.visible);
        last
    }

    pub(super) fn is_drained(&self) -> bool {
        self.unwritten.is_empty() && !self.is_reporting
    }

    /// Bytes released and not written.
    pub(super) fn undelivered(&self) -> u64 {
        let to = match (self.gone_at, self.unwritten.back()) {
            (Some(gone), _) => return self.visible.saturating_sub(gone),
            (None, Some(run)) => run.end,
            (None, None) => return 0,
        };
        to.saturating_sub(self.written)
    }

    /// What released bytes that wait take of memory.
    pub(super) fn backlog(&self) -> usize {
        let bytes = self.unwritten.back().map_or(0, |run| run.end.saturating_sub(self.written));
        usize::try_from(bytes).unwrap_or(usize::MAX) + self.unwritten.len() * RUN_COST
    }

    pub(super) fn unwritten(&self) -> Vec<Output> {
        let output = |run: &Run| {
            let (offset, bytes) = self.bytes(run.start.max(self.written), run.end, usize::MAX);
            Output { sequence: run.sequence, kind: OutputKind::Console { offset, bytes } }
        };
        self.unwritten.iter().map(output).collect()
    }
}
