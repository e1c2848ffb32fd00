//! The gate of a replaying side.

use super::{Output, OutputGate, OutputKind};
use std::collections::VecDeque;
use std::sync::Mutex;
use vmft_logging_channel::entry::OutputSequence;

/// Console outputs replayed but not known to be out. Disk requests need no keeping: the board
/// knows which are outstanding, and re-issues them at a go-live.
#[derive(Debug, Default)]
pub struct KeptOutputs {
    kept: Mutex<VecDeque<Output>>,
}

impl KeptOutputs {
    /// Every output up to `output` is out.
    pub fn released(&self, output: OutputSequence) {
        let mut kept = self.kept.lock().expect("no holder of this lock panics");
        while kept.front().is_some_and(|first| first.sequence <= output) {
            kept.pop_front();
        }
    }

    /// Takes what is left, in order, to be emitted at a go-live.
    pub fn take(&self) -> Vec<Output> {
        self.kept.lock().expect("no holder of this lock panics").drain(..).collect()
    }
}

impl OutputGate for KeptOutputs {
    fn emit(&self, output: Output) {
        if matches!(output.kind, OutputKind::Console { .. }) {
            self.kept.lock().expect("no holder of this lock panics").push_back(output);
        }
    }
}
