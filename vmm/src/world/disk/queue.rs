//! The threads that do a disk's jobs, several at a time.

use super::errors::{DiskError, DiskErrors};
use super::fence::Fence;
use super::image::{Storage, WriteError};
use super::order::{Extent, Order};
use super::rewrite::newest;
use crate::board::DiskOperation;
use crate::devices::virtio::block::completed::CompletedWrites;
use crate::world::Mailbox;
use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use vmft_log::entry::{Arrival, RequestId};
use vmft_sandbox::Task;

/// Most threads of one disk: so many requests are under way at the storage. They are started as they are
/// needed, and a guest that asks for one thing after the other has one.
const MAX_THREADS: usize = 8;

/// virtio-blk status bytes.
const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;

/// Why something was not written.
#[derive(Debug)]
enum Unwritten {
    /// This side's generation is over.
    Halting,
    /// The storage failed.
    Failed(io::Error),
}

/// What is to be done.
#[derive(Debug)]
enum Job {
    /// A request; its result goes into the mailbox.
    Request(RequestId, DiskOperation),
    /// What another side has completed is written again.
    Rewrite { offset: u64, data: Vec<u8> },
    /// Everything before is done, and made durable; whoever waits for that is told.
    Settle(Option<Sender<()>>),
}

impl Job {
    fn extent(&self) -> Extent {
        let write = |offset: u64, data: &[u8]| Extent::Write {
            start: offset,
            end: offset + data.len() as u64,
        };
        match self {
            Self::Request(_, DiskOperation::Read { offset, len }) => {
                Extent::Read { start: *offset, end: offset + u64::from(*len) }
            }
            Self::Request(_, DiskOperation::Write { offset, data })
            | Self::Rewrite { offset, data } => write(*offset, data),
            Self::Request(_, DiskOperation::Flush) => Extent::Flush,
            Self::Settle(_) => Extent::Everything,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    order: Order<Job>,
    threads: usize,
    idle: usize,
    /// No more jobs come.
    closed: bool,
    /// Something was written since the last flush.
    unflushed: bool,
    /// What another side has completed could not be written again, and the guest has not been told.
    lost: bool,
}

#[derive(Debug)]
struct Shared {
    disk: u8,
    storage: Arc<dyn Storage>,
    fence: Arc<dyn Fence>,
    mailbox: Arc<Mailbox>,
    errors: DiskErrors,
    state: Mutex<State>,
    work: Condvar,
}

/// The jobs of one disk, done by threads that end when this is dropped and nothing is left.
#[derive(Debug)]
pub(in crate::world) struct DiskQueue {
    shared: Arc<Shared>,
}

impl DiskQueue {
    /// Starts the first thread.
    pub(super) fn start(
        disk: u8,
        storage: Arc<dyn Storage>,
        fence: Arc<dyn Fence>,
        mailbox: Arc<Mailbox>,
        errors: DiskErrors,
    ) -> io::Result<Self> {
        let (state, work) = Default::default();
        let shared = Arc::new(Shared { disk, storage, fence, mailbox, errors, state, work });
        shared.start_thread(&mut shared.lock())?;
        Ok(Self { shared })
    }

    /// A request; its result comes through the mailbox.
    pub(in crate::world) fn request(&self, request: RequestId, operation: DiskOperation) {
        self.push([Job::Request(request, operation)]);
    }

    /// Writes again what another side has completed, and flushes, before anything that is asked for later.
    pub(in crate::world) fn rewrite(&self, completed: &CompletedWrites) {
        let writes = newest(&completed.writes).into_iter();
        let writes = writes.map(|(offset, data)| Job::Rewrite { offset, data });
        self.push(writes.chain([Job::Settle(None)]));
    }

    /// Tells `done` when everything before is done and durable.
    pub(in crate::world) fn settle(&self, done: Sender<()>) {
        self.push([Job::Settle(Some(done))]);
    }

    fn push(&self, jobs: impl IntoIterator<Item = Job>) {
        let Shared { storage, .. } = &*self.shared;
        let mut state = self.shared.lock();
        for job in jobs {
            state.order.push(job.extent().in_units_of(storage.unit()), job);
        }
        self.shared.rouse(&mut state);
    }
}

impl Drop for DiskQueue {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of a disk's lock panics")
    }

    fn start_thread(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let shared = Arc::clone(self);
        let name = format!("disk{}", self.disk);
        vmft_sandbox::spawn(Task::Disk, name, move || shared.run())?;
        state.threads += 1;
        Ok(())
    }

    /// Sees to it that somebody takes the next job, if there is one to take.
    fn rouse(self: &Arc<Self>, state: &mut State) {
        if !state.order.has_next() {
            return;
        }
        if state.idle > 0 {
            self.work.notify_one();
        } else if state.threads < MAX_THREADS {
            // Without another, those there are take it later.
            let _ = self.start_thread(state);
        }
    }

    fn run(self: Arc<Self>) {
        let mut state = self.lock();
        loop {
            if let Some((ticket, job)) = state.order.take() {
                self.rouse(&mut state);
                drop(state);
                self.execute(job);
                state = self.lock();
                state.order.done(ticket);
            } else if state.closed && state.order.is_empty() {
                return;
            } else {
                state.idle += 1;
                state = self.work.wait(state).expect("no holder of a disk's lock panics");
                state.idle -= 1;
            }
        }
    }

    fn execute(&self, job: Job) {
        match job {
            Job::Request(request, operation) => self.execute_request(request, operation),
            Job::Rewrite { offset, data } => match self.write(offset, &data) {
                Ok(()) | Err(Unwritten::Halting) => {}
                Err(Unwritten::Failed(error)) => self.lost(offset, data.len(), &error),
            },
            Job::Settle(done) => {
                let unflushed = done.is_none() || self.lock().unflushed;
                if unflushed
                    && self.fence.check().is_ok()
                    && let Err(error) = self.flush()
                {
                    self.lost(0, 0, &error);
                }
                if let Some(done) = done {
                    // Whoever asked may have gone; nothing is owed to it then.
                    let _ = done.send(());
                }
            }
        }
    }

    fn lost(&self, offset: u64, len: usize, error: &io::Error) {
        self.errors.say(DiskError::NotDurable, &place(offset, len as u64), error);
        self.lock().lost = true;
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Unwritten> {
        loop {
            let permit = self.fence.check().map_err(|_| Unwritten::Halting)?;
            self.lock().unflushed = true;
            match self.storage.write(permit, offset, data) {
                Ok(()) => return Ok(()),
                Err(WriteError::Io(error)) => return Err(Unwritten::Failed(error)),
                Err(WriteError::Fenced) => self.fence.refused(),
            }
        }
    }

    fn flush(&self) -> io::Result<()> {
        // Before the flush: what is written meanwhile is for the next.
        self.lock().unflushed = false;
        let flushed = self.storage.flush();
        if flushed.is_err() {
            self.lock().unflushed = true;
        }
        flushed
    }

    fn execute_request(&self, request: RequestId, operation: DiskOperation) {
        if matches!(operation, DiskOperation::Flush) && self.fence.check().is_err() {
            // A request that is never answered: this side is halting.
            return;
        }
        let (what, offset, len) = describe(&operation);
        let done = match operation {
            DiskOperation::Read { offset, len } => {
                usize::try_from(len).map_err(io::Error::other).and_then(|len| {
                    let mut data = vec![0; len];
                    self.storage.read(offset, &mut data).map(|()| data)
                })
            }
            DiskOperation::Write { offset, data } => match self.write(offset, &data) {
                Ok(()) => Ok(Vec::new()),
                Err(Unwritten::Failed(error)) => Err(error),
                Err(Unwritten::Halting) => return,
            },
            DiskOperation::Flush if std::mem::take(&mut self.lock().lost) => {
                Err(io::Error::other("earlier writes could not be made durable"))
            }
            DiskOperation::Flush => self.flush().map(|()| Vec::new()),
        };
        let (status, data) = match done {
            Ok(data) => (STATUS_OK, data),
            Err(error) => {
                self.errors.say(DiskError::Request(what), &place(offset, len), &error);
                (STATUS_IO_ERROR, Vec::new())
            }
        };
        self.mailbox.push(Arrival::DiskCompletion { disk: self.disk, request, status, data });
    }
}

/// What a request does, for messages, and the bytes it is about.
fn describe(operation: &DiskOperation) -> (&'static str, u64, u64) {
    match operation {
        DiskOperation::Read { offset, len } => ("reading", *offset, u64::from(*len)),
        DiskOperation::Write { offset, data } => ("writing", *offset, data.len() as u64),
        DiskOperation::Flush => ("making durable", 0, 0),
    }
}

/// Bytes of a disk, for messages; none are all that was written.
fn place(offset: u64, len: u64) -> String {
    match len {
        0 => "what was written".to_owned(),
        _ => format!("{len} bytes at byte {offset}"),
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
