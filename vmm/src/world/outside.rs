//! Where released outputs go: the disks' threads and the console.

use super::console::ConsoleHub;
use super::disk::DiskJob;
use super::{DiskFile, DiskFileError, Fence, Mailbox};
use crate::board::DiskOperation;
use crate::outputs::{Output, OutputKind, Outside};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use vmft_logging_channel::entry::RequestId;

/// The host's disks and console.
#[derive(Debug)]
pub struct HostOutside {
    disks: Vec<Mutex<Sender<DiskJob>>>,
    console: Arc<ConsoleHub>,
}

impl HostOutside {
    /// Starts the disks' threads.
    ///
    /// # Errors
    /// [`DiskFileError::Thread`].
    pub fn start(
        disks: &[DiskFile],
        console: Arc<ConsoleHub>,
        fence: &Arc<dyn Fence>,
        mailbox: &Arc<Mailbox>,
    ) -> Result<Self, DiskFileError> {
        let disks = (0u8..)
            .zip(disks)
            .map(|(index, disk)| {
                disk.start(index, Arc::clone(fence), Arc::clone(mailbox)).map(Mutex::new)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { disks, console })
    }

    /// The console.
    pub fn console(&self) -> &Arc<ConsoleHub> {
        &self.console
    }

    /// Queues a disk request; its result comes through the mailbox.
    pub(super) fn start_disk(&self, disk: u8, request: RequestId, operation: DiskOperation) {
        let sender = self.disks.get(usize::from(disk)).expect("the board has these disks only");
        let sender = sender.lock().expect("no holder of this lock panics");
        let job = DiskJob::Request(request, operation);
        sender.send(job).expect("a disk's thread ends after its sender");
    }

    /// Waits until every disk request queued so far is done.
    pub fn drain(&self) {
        let (done, all_done) = channel();
        for disk in &self.disks {
            let sender = disk.lock().expect("no holder of this lock panics");
            let job = DiskJob::Drain(done.clone());
            sender.send(job).expect("a disk's thread ends after its sender");
        }
        drop(done);
        while all_done.recv().is_ok() {}
    }

    /// Does an outstanding request again at a go-live; reads are no outputs, but are asked for
    /// anew just the same.
    pub fn reissue(&self, disk: u8, request: RequestId, operation: DiskOperation) {
        self.start_disk(disk, request, operation);
    }
}

impl Outside for HostOutside {
    fn let_out(&self, output: Output) {
        match output.kind {
            OutputKind::Console { offset, bytes } => {
                self.console.write(output.sequence, offset, bytes);
            }
            OutputKind::Disk { disk, request, operation } => {
                self.start_disk(disk, request, operation);
            }
        }
    }
}
