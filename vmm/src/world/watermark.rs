//! Up to which output everything is out.
//!
//! Outputs are let out in order, but console bytes are out only when their sink has written them,
//! while packets are out at once. The watermark is the last output before which nothing is pending.

use std::collections::VecDeque;
use std::fmt;
use std::sync::OnceLock;
use vmft_log::entry::OutputSequence;
use vmft_threads::{Mutex, MutexGuard};

type Report = Box<dyn Fn(OutputSequence) + Send + Sync>;

/// Console outputs that follow each other and are not yet written.
#[derive(Debug)]
struct Run {
    /// The output before the first of them.
    before: OutputSequence,
    last: OutputSequence,
}

#[derive(Debug, Default)]
struct State {
    /// Oldest first.
    pending: VecDeque<Run>,
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
        self.state.lock()
    }

    /// From now on `report` is told. Before, nothing is kept account of.
    pub(super) fn report_to(&self, report: Report) {
        assert!(self.report.set(report).is_ok(), "told once");
    }

    /// The outputs up to this one are let out, those after the last on which this was called;
    /// `is_console` if they are out only once they are written.
    pub(super) fn let_out(&self, output: OutputSequence, is_console: bool) {
        if self.report.get().is_none() {
            return;
        }
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.last, output);
        match state.pending.back_mut() {
            _ if !is_console => {}
            Some(run) if run.last == before => run.last = output,
            _ => state.pending.push_back(Run { before, last: output }),
        }
    }

    /// Console outputs up to `output` are written.
    pub(super) fn written(&self, output: OutputSequence) {
        let mut state = self.lock();
        while state.pending.front().is_some_and(|run| run.last <= output) {
            state.pending.pop_front();
        }
        if let Some(run) = state.pending.front_mut() {
            run.before = run.before.max(output);
        }
        drop(state);
        self.tell();
    }

    /// Tells whoever wants to know, if there is something new.
    pub(super) fn tell(&self) {
        let Some(report) = self.report.get() else { return };
        let mut state = self.lock();
        let out = match state.pending.front() {
            Some(run) => run.before,
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
        let report = move |output: OutputSequence| heard.lock().push(output.0);
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
        assert_eq!(*told.lock(), [1, 2]);
        watermark.written(output(3));
        watermark.written(output(5));
        watermark.tell();
        assert_eq!(*told.lock(), [1, 2, 4, 5]);
    }

    #[test]
    fn console_bytes_that_nobody_writes_take_no_memory_here_and_none_counts_as_out_before_it_is() {
        let told: Arc<Mutex<Vec<u64>>> = Arc::default();
        let heard = Arc::clone(&told);
        let watermark = Watermark::default();
        let report = move |output: OutputSequence| heard.lock().push(output.0);
        watermark.report_to(Box::new(report));
        watermark.let_out(OutputSequence(7), false);
        // Some are let out several at a time.
        for output in [8, 9, 20, 21] {
            watermark.let_out(OutputSequence(output), true);
        }
        assert_eq!(watermark.lock().pending.len(), 1);
        watermark.tell();
        watermark.written(OutputSequence(9));
        watermark.written(OutputSequence(20));
        watermark.written(OutputSequence(21));
        assert_eq!(*told.lock(), [7, 9, 20, 21]);
    }
}
