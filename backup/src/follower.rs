//! The outputs of a replaying side.

use crate::mirror::Feed;
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
    /// Of a side that has copies of disks.
    feed: Option<Arc<Feed>>,
}

impl ReplayGate {
    /// For a backup: the console remembers, for readers that attach after a go-live.
    pub fn keeping(kept: Arc<KeptOutputs>, console: Arc<ConsoleHub>) -> Self {
        Self { kept, console, show: false, feed: None }
    }

    /// The same, where a side's copies of disks are to hear what is asked of them.
    pub(crate) fn feeding(self, feed: Option<Arc<Feed>>) -> Self {
        Self { feed, ..self }
    }

    /// For an offline replay: the console shows.
    pub fn showing(kept: Arc<KeptOutputs>, console: Arc<ConsoleHub>) -> Self {
        Self { kept, console, show: true, feed: None }
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
            OutputKind::Disk { disk, request, operation } => {
                if let Some(feed) = &self.feed {
                    feed.asked(*disk, *request, operation);
                }
                self.kept.emit(output);
            }
            OutputKind::Packet(_) => self.kept.emit(output),
        }
    }
}
