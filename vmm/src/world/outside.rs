//! Where released outputs go: the disks' threads, the console and the network.

use super::console::ConsoleHub;
use super::disk::{DiskDesk, DiskQueue, DiskReader, Watch};
use super::net::NetPort;
use super::watermark::Watermark;
use super::{DiskFile, DiskFileError, Fence, Mailbox};
use crate::board::DiskOperation;
use crate::devices::virtio::block::completed::CompletedWrites;
use crate::outputs::{Assurance, Output, OutputKind, Outside};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;
use vmft_log::entry::{OutputSequence, RequestId};

/// The host's disks, console and network.
#[derive(Debug)]
pub struct HostOutside {
    disks: Vec<DiskQueue>,
    /// Finds requests of the disks that hang.
    _watch: Option<Watch>,
    readers: Vec<DiskReader>,
    /// Those that the guest may write to.
    writable: Vec<bool>,
    console: Arc<ConsoleHub>,
    network: Option<Arc<NetPort>>,
    watermark: Arc<Watermark>,
    /// A packet was let out since the watermark was told of.
    packets: AtomicBool,
}

/// Tells when disk requests are done, and durable.
#[derive(Debug)]
pub struct DisksDone {
    all_done: Receiver<()>,
    left: usize,
}

impl DisksDone {
    /// Waits for that, for at most `limit` a disk; says whether it is so.
    pub fn wait(&mut self, limit: Duration) -> bool {
        while self.left > 0 {
            match self.all_done.recv_timeout(limit) {
                Ok(()) => self.left -= 1,
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        true
    }

    /// Disks that are not done.
    pub fn left(&self) -> usize {
        self.left
    }
}

impl HostOutside {
    /// Starts the disks' threads.
    ///
    /// # Errors
    /// [`DiskFileError::Thread`].
    pub fn start(
        disks: &[DiskFile],
        console: Arc<ConsoleHub>,
        network: Option<Arc<NetPort>>,
        fence: &Arc<dyn Fence>,
        mailbox: &Arc<Mailbox>,
        desk: &Arc<DiskDesk>,
    ) -> Result<Self, DiskFileError> {
        let writable = disks.iter().map(|disk| !disk.read_only()).collect();
        let readers = disks.iter().map(DiskFile::reader).collect();
        let shortest = disks.iter().min_by_key(|disk| disk.policy().timeout);
        let watch = shortest.map(|disk| {
            let path = disk.path().to_owned();
            let timeout = disk.policy().timeout;
            Watch::begin(desk, timeout).map_err(|source| DiskFileError::Thread { path, source })
        });
        let _watch = watch.transpose()?;
        let start = |(index, disk): (u8, &DiskFile)| {
            disk.start(index, Arc::clone(fence), Arc::clone(mailbox), Arc::clone(desk))
        };
        let disks = (0u8..).zip(disks).map(start).collect::<Result<Vec<_>, _>>()?;
        desk.attend(&disks);
        let watermark = Arc::default();
        let packets = AtomicBool::new(false);
        Ok(Self { disks, _watch, readers, writable, console, network, watermark, packets })
    }

    /// This side is live: the console's input goes to `mailbox`, and `on_out` is told up to which
    /// output everything is out.
    pub fn go_live(
        &self,
        mailbox: Arc<Mailbox>,
        on_out: impl Fn(OutputSequence) + Send + Sync + 'static,
    ) {
        self.watermark.report_to(Box::new(on_out));
        let watermark = Arc::clone(&self.watermark);
        self.console.go_live(mailbox, Some(Arc::new(move |output| watermark.written(output))));
    }

    /// The console.
    pub fn console(&self) -> &Arc<ConsoleHub> {
        &self.console
    }

    /// The disks, for whoever looks for what they boot.
    pub(super) fn readers(&self) -> &[DiskReader] {
        &self.readers
    }

    /// Queues a disk request; its result comes through the mailbox.
    pub(super) fn start_disk(&self, disk: u8, request: RequestId, operation: DiskOperation) {
        let queue = self.disks.get(usize::from(disk)).expect("the board has these disks only");
        queue.request(request, operation);
    }

    /// Asks to be told when every disk request queued so far is done, and durable.
    pub fn drain(&self) -> DisksDone {
        let (done, all_done) = channel();
        for disk in &self.disks {
            disk.settle(done.clone());
        }
        DisksDone { all_done, left: self.disks.len() }
    }

    /// Makes the writes again that a predecessor has completed, of each disk, and has them flushed, before
    /// any request that comes later. They may have died with its host.
    pub fn rewrite(&self, completed: &[CompletedWrites]) {
        let disks = self.disks.iter().zip(&self.writable).zip(completed);
        for ((disk, _), completed) in disks.filter(|((_, writable), _)| **writable) {
            disk.rewrite(completed);
        }
    }

    /// Does an outstanding request again at a go-live; reads are no outputs, but are asked for
    /// anew just the same.
    pub fn reissue(&self, disk: u8, request: RequestId, operation: DiskOperation) {
        self.start_disk(disk, request, operation);
    }
}

impl Outside for HostOutside {
    fn let_out(&self, output: Output, assurance: Assurance) {
        let is_console = matches!(output.kind, OutputKind::Console { .. });
        self.watermark.let_out(output.sequence, is_console);
        match output.kind {
            OutputKind::Console { offset, bytes } => {
                self.console.write(output.sequence, offset, &bytes);
            }
            OutputKind::Packet(packet) => {
                if let Some(network) = &self.network {
                    network.send(packet, assurance);
                }
                self.packets.store(true, Ordering::Relaxed);
            }
            OutputKind::Disk { disk, request, operation } => {
                self.start_disk(disk, request, operation);
            }
        }
    }

    fn all_let_out(&self) {
        if self.packets.swap(false, Ordering::Relaxed) {
            self.watermark.tell();
        }
    }

    fn backlog(&self) -> usize {
        self.console.backlog()
    }

    fn not_out(&self) -> Vec<Output> {
        self.console.unwritten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_does_not_get_done_is_waited_for_no_longer_than_was_asked() {
        let (done, all_done) = channel();
        let stuck = done.clone();
        let mut disks = DisksDone { all_done, left: 2 };
        done.send(()).expect("somebody waits");
        assert!(!disks.wait(Duration::ZERO));
        assert_eq!(disks.left(), 1);
        stuck.send(()).expect("somebody waits");
        assert!(disks.wait(Duration::ZERO));
        // A disk whose thread is no more has nothing left to do.
        drop((done, stuck));
        disks.left = 1;
        assert!(disks.wait(Duration::ZERO));
    }
}
