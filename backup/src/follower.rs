//! The outputs of a replaying side.

use std::sync::Arc;
use std::time::Duration;
use vmft_vmm::outputs::{KeptOutputs, Output, OutputGate, OutputKind};
use vmft_vmm::world::console::ConsoleHub;

/// Console bytes of a replay that wait to be shown.
const SHOWN_BYTES_LIMIT: usize = 1 << 20;
/// How long one wait for them takes.
const SHOWN_STEP: Duration = Duration::from_millis(20);

/// The gate of a replaying side: keeps outputs for a go-live, and lets the console remember or show
/// what the guest wrote.
#[derive(Debug)]
pub struct ReplayGate {
    kept: Arc<KeptOutputs>,
    console: Arc<ConsoleHub>,
    show: bool,
}

impl ReplayGate {
    /// For a backup: the console remembers, for readers that attach after a go-live.
    pub fn keeping(kept: Arc<KeptOutputs>, console: Arc<ConsoleHub>) -> Self {
        Self { kept, console, show: false }
    }

    /// For an offline replay: the console shows.
    pub fn showing(kept: Arc<KeptOutputs>, console: Arc<ConsoleHub>) -> Self {
        Self { kept, console, show: true }
    }
}

impl OutputGate for ReplayGate {
    fn emit(&self, output: Output) {
        match &output.kind {
            OutputKind::Console { offset, bytes } if self.show => {
                // A reader that is slow slows the replay, and one that is gone does not.
                while self.console.backlog() > SHOWN_BYTES_LIMIT {
                    self.console.drain(SHOWN_STEP);
                }
                self.console.write(output.sequence, *offset, bytes);
            }
            // Nobody will go live.
            _ if self.show => {}
            OutputKind::Console { offset, bytes } => {
                self.console.remember(*offset, bytes);
                self.kept.emit(output);
            }
            OutputKind::Packet(_) | OutputKind::Disk { .. } => self.kept.emit(output),
        }
    }
}
