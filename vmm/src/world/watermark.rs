//! Up to which output everything is out.
//!
//! Outputs are let out in order, but console bytes are out only when their sink has written them,
//! while packets are out at once. The watermark is the last output before which nothing is pending.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock};
use vmft_logging_channel::entry::OutputSequence;

type Report = Box<dyn Fn(OutputSequence) + Send + Sync>;

#[derive(Debug, Default)]
struct State {
    /// Console outputs not yet written, oldest first.
    pending: VecDeque<OutputSequence>,
    /// The last output let out.
    last: OutputSequence,
    reported: OutputSequence,
}

/// What is out, and who is told.
#[derive(Default)]
pub(super) struct Watermark {
    state: Mutex<State>,
    report: OnceLock<Report>,
}

impl fmt::Debug for Watermark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watermark").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Watermark {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the watermark's lock panics")
    }

    /// From now on `report` is told. Before, nothing is kept account of.
    pub(super) fn report_to(&self, report: Report) {
        assert!(self.report.set(report).is_ok(), "told once");
    }

    /// An output is let out; `is_console` if it is out only once it is written.
    pub(super) fn let_out(&self, output: OutputSequence, is_console: bool) {
        if self.report.get().is_none() {
            return;
        }
        let mut state = self.lock();
        state.last = state.last.max(output);
        if is_console {
            state.pending.push_back(output);
        }
    }

    /// Console outputs up to `output` are written.
    pub(super) fn written(&self, output: OutputSequence) {
        let mut state = self.lock();
        while state.pending.front().is_some_and(|first| *first <= output) {
            state.pending.pop_front();
        }
        drop(state);
        self.tell();
    }

    /// Tells whoever wants to know, if there is something new.
    pub(super) fn tell(&self) {
        let Some(report) = self.report.get() else { return };
        let mut state = self.lock();
        let out = match state.pending.front() {
            Some(first) => OutputSequence(first.0 - 1),
            None => state.last,
        };
        if out <= state.reported {
            return;
        }
        state.reported = out;
        drop(state);
        report(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_packet_is_not_reported_out_before_the_console_bytes_ahead_of_it() {
        let told: Arc<Mutex<Vec<u64>>> = Arc::default();
        let heard = Arc::clone(&told);
        let watermark = Watermark::default();
        let report = move |output: OutputSequence| heard.lock().unwrap().push(output.0);
        watermark.report_to(Box::new(report));
        let output = OutputSequence;
        watermark.let_out(output(1), false);
        watermark.tell();
        watermark.let_out(output(2), false);
        watermark.let_out(output(3), true);
        watermark.let_out(output(4), false);
        watermark.tell();
        watermark.let_out(output(5), true);
        watermark.tell();
        assert_eq!(*told.lock().unwrap(), [1, 2]);
        watermark.written(output(3));
        watermark.written(output(5));
        watermark.tell();
        assert_eq!(*told.lock().unwrap(), [1, 2, 4, 5]);
    }
}
