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
        match &output.kind {
            OutputKind::Console { offset, bytes } if self.show => {
                self.console.write(output.sequence, *offset, bytes.clone());
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
