//! The outputs of a replaying side.

use std::sync::Arc;
use vmft_vmm::outputs::{KeptOutputs, Output, OutputGate, OutputKind};
use vmft_vmm::world::console::ConsoleHub;

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
        let OutputKind::Console { offset, bytes } = &output.kind else {
            return;
        };
        if self.show {
            self.console.write(output.sequence, *offset, bytes.clone());
        } else {
            self.console.remember(*offset, bytes);
            self.kept.emit(output);
        }
    }
}
