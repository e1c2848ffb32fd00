//! The threads that do a disk's jobs, several at a time.

use super::desk::{DiskDesk, DiskNews, DiskPolicy, DiskTrouble, OnError};
use super::errors::{DiskError, DiskErrors};
use super::fence::Fence;
use super::image::{Storage, WriteError};
use super::job::{Doing, Job};
use super::order::{Order, Ticket};
use super::rewrite::newest;
use crate::board::DiskOperation;
use crate::devices::virtio::block::completed::CompletedWrites;
use crate::inputs::Asked;
use crate::world::Mailbox;
use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use vmft_log::entry::{Arrival, RequestId};
use vmft_sandbox::Task;
use vmft_threads::{Condvar, Mutex, MutexGuard};

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

/// Why a job is not done.
#[derive(Debug)]
struct Failure {
    error: io::Error,
    /// It may not be tried again: it would succeed, and what it is about would be lost all the same.
    is_final: bool,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self { error, is_final: false }
    }
}

/// A job that a thread is at.
#[derive(Debug)]
struct UnderWay {
    ticket: Ticket,
    doing: Doing,
    /// It may change the disk even after a later generation has begun.
    may_land_later: bool,
    since: Instant,
    /// It hangs, and that was told.
    is_told: bool,
}

/// A job that has failed, and was not given up.
#[derive(Debug)]
struct Kept {
    ticket: Ticket,
    job: Job,
    failure: Failure,
    since: Instant,
}

#[derive(Debug, Default)]
struct State {
    order: Order<Job>,
    threads: usize,
    idle: usize,
    under_way: Vec<UnderWay>,
    /// In the order in which they failed. What must not overtake them waits.
    kept: Vec<Kept>,
    /// Kept before, and to be tried again.
    again: VecDeque<(Ticket, Job)>,
    /// Nothing is begun.
    frozen: bool,
    /// What came up to here is not done yet, and failed at another side's storage.
    unproved: Option<Ticket>,
    /// No more jobs come.
    closed: bool,
    /// Something was written since the last flush.
    unflushed: bool,
    /// What another side has completed could not be written again, and the guest has not been told.
    lost: bool,
}

impl State {
    fn has_next(&self) -> bool {
        !self.frozen && (!self.again.is_empty() || self.order.has_next())
    }

    fn take(&mut self) -> Option<(Ticket, Job)> {
        if self.frozen {
            return None;
        }
        self.again.pop_front().or_else(|| self.order.take())
    }

    /// True if the threads of a queue that takes no more jobs have nothing to wait for.
    fn is_over(&self) -> bool {
        self.closed && (self.frozen || !self.kept.is_empty() || self.order.is_empty())
    }

    fn done(&mut self, ticket: Ticket) {
        self.order.done(ticket);
        self.unproved = self.unproved.filter(|last| self.order.has_up_to(*last));
    }
}

/// What a disk's threads share.
#[derive(Debug)]
pub(super) struct Shared {
    disk: u8,
    storage: Arc<dyn Storage>,
    fence: Arc<dyn Fence>,
    mailbox: Arc<Mailbox>,
    errors: DiskErrors,
    policy: DiskPolicy,
    desk: Arc<DiskDesk>,
    state: Mutex<State>,
    work: Condvar,
    /// A job has ended.
    ended: Condvar,
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
        policy: DiskPolicy,
        desk: Arc<DiskDesk>,
    ) -> io::Result<Self> {
        let (state, work, ended) = Default::default();
        let shared = Arc::new(Shared {
            disk,
            storage,
            fence,
            mailbox,
            errors,
            policy,
            desk,
            state,
            work,
            ended,
        });
        shared.start_thread(&mut shared.lock())?;
        Ok(Self { shared })
    }

    pub(super) fn downgrade(&self) -> Weak<Shared> {
        Arc::downgrade(&self.shared)
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

#[expect(clippy::disallowed_methods, reason = "how long storage takes is told to people only")]
fn now() -> Instant {
    Instant::now()
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
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
        if !state.has_next() {
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
            if let Some((ticket, job)) = state.take() {
                self.rouse(&mut state);
                let (doing, since) = (job.doing(), now());
                let may_land_later = job.writes() && !self.storage.fences();
                let under_way = UnderWay { ticket, doing, may_land_later, since, is_told: false };
                state.under_way.push(under_way);
                drop(state);
                let done = self.execute(&job);
                state = self.end(ticket, job, done);
            } else if state.is_over() {
                return;
            } else {
                state.idle += 1;
                state = self.work.wait(state);
                state.idle -= 1;
            }
        }
    }

    /// A job has ended, one way or the other.
    fn end(&self, ticket: Ticket, job: Job, done: Result<(), Failure>) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        let index = state.under_way.iter().position(|other| other.ticket == ticket);
        let was = state.under_way.remove(index.expect("it was under way"));
        let hung = was.is_told.then(|| self.told(&was, 1));
        let failed = match done {
            Ok(()) => {
                state.done(ticket);
                false
            }
            Err(failure) => {
                state.kept.push(Kept { ticket, job, failure, since: now() });
                true
            }
        };
        self.ended.notify_all();
        if state.closed {
            self.work.notify_all();
        }
        if hung.is_none() && !failed {
            return state;
        }
        drop(state);
        if let Some(trouble) = hung {
            let time = now().saturating_duration_since(trouble.since);
            self.desk.push_news(DiskNews::Answers(trouble, time));
        }
        if let Some(trouble) = self.trouble().filter(|_| failed) {
            self.desk.push_news(DiskNews::Failed(trouble));
        }
        // The machine's thread decides what becomes of the guest.
        self.mailbox.ask(Asked::Pause);
        self.lock()
    }

    /// Does a job. A failure that comes back is kept.
    fn execute(&self, job: &Job) -> Result<(), Failure> {
        match job {
            Job::Request(request, operation) => match self.execute_request(operation) {
                Ok(Some(data)) => self.answer(*request, STATUS_OK, data),
                // A request that is never answered: this side is halting.
                Ok(None) => {}
                Err(failure) if self.is_kept(&failure) => return Err(failure),
                Err(failure) => self.give_up(job, &failure),
            },
            Job::Rewrite { offset, data } => match self.write(*offset, data) {
                Ok(()) | Err(Unwritten::Halting) => {}
                Err(Unwritten::Failed(error)) => self.keep_or_lose(job, error.into())?,
            },
            Job::Settle(done) => {
                let unflushed = done.is_none() || self.lock().unflushed;
                if unflushed
                    && self.fence.check().is_ok()
                    && let Err(failure) = self.flush()
                {
                    self.keep_or_lose(job, failure)?;
                }
                if let Some(done) = done {
                    // Whoever asked may have gone; nothing is owed to it then.
                    let _ = done.send(());
                }
            }
        }
        Ok(())
    }

    fn is_kept(&self, failure: &Failure) -> bool {
        match self.policy.on_error {
            OnError::Report => false,
            OnError::Stop => !failure.is_final,
            // Another side makes everything again that the flush is about.
            OnError::Failover => true,
        }
    }

    fn keep_or_lose(&self, job: &Job, failure: Failure) -> Result<(), Failure> {
        // Whoever ends a machine that is over waits for an end, and not for an operator.
        let is_last = matches!(job, Job::Settle(Some(_)));
        if !is_last && self.is_kept(&failure) {
            return Err(failure);
        }
        self.give_up(job, &failure);
        Ok(())
    }

    /// Tells the guest of a job that it will not be done.
    fn give_up(&self, job: &Job, failure: &Failure) {
        let doing = job.doing();
        if let Job::Request(request, _) = job {
            self.errors.say(DiskError::Request(doing.what), &doing.place(), &failure.error);
            self.answer(*request, STATUS_IO_ERROR, Vec::new());
        } else {
            self.errors.say(DiskError::NotDurable, &doing.place(), &failure.error);
            self.lock().lost = true;
        }
    }

    fn answer(&self, request: RequestId, status: u8, data: Vec<u8>) {
        self.mailbox.push(Arrival::DiskCompletion { disk: self.disk, request, status, data });
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

    fn flush(&self) -> Result<(), Failure> {
        // Before the flush: what is written meanwhile is for the next.
        self.lock().unflushed = false;
        self.storage.flush().map_err(|error| {
            self.lock().unflushed = true;
            let is_final = !self.storage.repeats_flush(&error);
            Failure { error, is_final }
        })
    }

    /// Does what the guest asks; `None` if this side is halting.
    fn execute_request(&self, operation: &DiskOperation) -> Result<Option<Vec<u8>>, Failure> {
        match operation {
            DiskOperation::Read { offset, len } => {
                let len = usize::try_from(*len).map_err(io::Error::other)?;
                let mut data = vec![0; len];
                self.storage.read(*offset, &mut data)?;
                Ok(Some(data))
            }
            DiskOperation::Write { offset, data } => match self.write(*offset, data) {
                Ok(()) => Ok(Some(Vec::new())),
                Err(Unwritten::Failed(error)) => Err(error.into()),
                Err(Unwritten::Halting) => Ok(None),
            },
            DiskOperation::Flush if self.fence.check().is_err() => Ok(None),
            DiskOperation::Flush if std::mem::take(&mut self.lock().lost) => {
                let error = io::Error::other("earlier writes could not be made durable");
                Err(Failure { error, is_final: true })
            }
            DiskOperation::Flush => self.flush().map(|()| Some(Vec::new())),
        }
    }
}

/// What the desk asks of a disk.
impl Shared {
    fn told(&self, under_way: &UnderWay, requests: usize) -> DiskTrouble {
        DiskTrouble {
            disk: self.disk,
            path: self.errors.path().to_owned(),
            what: under_way.doing.to_string(),
            error: None,
            is_full: false,
            since: under_way.since,
            requests,
            on_error: self.policy.on_error,
            may_land_later: under_way.may_land_later,
        }
    }

    /// A request that takes longer is said to hang.
    pub(super) fn timeout(&self) -> Duration {
        self.policy.timeout
    }

    /// What is wrong with the disk: the first of what is kept, or else of what hangs.
    pub(super) fn trouble(&self) -> Option<DiskTrouble> {
        let state = self.lock();
        if let Some(Kept { job, failure, since, .. }) = state.kept.first() {
            return Some(DiskTrouble {
                disk: self.disk,
                path: self.errors.path().to_owned(),
                what: job.doing().to_string(),
                error: Some(failure.error.to_string()),
                is_full: is_full(&failure.error),
                since: *since,
                requests: state.kept.len(),
                on_error: self.policy.on_error,
                may_land_later: false,
            });
        }
        let hang = || state.under_way.iter().filter(|job| job.is_told);
        let mut trouble = self.told(hang().min_by_key(|job| job.since)?, hang().count());
        trouble.may_land_later = hang().any(|job| job.may_land_later);
        Some(trouble)
    }

    pub(super) fn keeps(&self) -> bool {
        !self.lock().kept.is_empty()
    }

    /// Finds what has been under way for longer than `limit`, and has that told.
    pub(super) fn look(&self, limit: Duration) {
        let (mut state, now) = (self.lock(), now());
        let mut found = false;
        for job in &mut state.under_way {
            if !job.is_told && now.saturating_duration_since(job.since) > limit {
                job.is_told = true;
                found = true;
            }
        }
        let keeps = !state.kept.is_empty();
        drop(state);
        if let Some(trouble) = self.trouble().filter(|_| found && !keeps) {
            self.desk.push_news(DiskNews::Hangs(trouble));
            self.mailbox.ask(Asked::Pause);
        }
    }

    pub(super) fn resume(self: &Arc<Self>) -> usize {
        let mut state = self.lock();
        let mut kept = std::mem::take(&mut state.kept);
        kept.sort_by_key(|kept| kept.ticket);
        let count = kept.len();
        state.again.extend(kept.into_iter().map(|kept| (kept.ticket, kept.job)));
        self.rouse(&mut state);
        count
    }

    pub(super) fn answer_final(self: &Arc<Self>) {
        let mut state = self.lock();
        let (given_up, kept) =
            std::mem::take(&mut state.kept).into_iter().partition(|kept| kept.failure.is_final);
        state.kept = kept;
        drop(state);
        let given_up: Vec<Kept> = given_up;
        for Kept { ticket, job, failure, .. } in given_up {
            self.give_up(&job, &failure);
            let mut state = self.lock();
            state.done(ticket);
            self.rouse(&mut state);
        }
    }

    pub(super) fn freeze(&self) {
        self.lock().frozen = true;
    }

    pub(super) fn wait_quiet(&self, limit: Duration) -> bool {
        let busy = |state: &mut State| state.under_way.iter().any(|job| job.may_land_later);
        let (_, waits_on) = self.ended.wait_timeout_while(self.lock(), limit, busy);
        !waits_on
    }

    pub(super) fn thaw(self: &Arc<Self>) {
        let mut state = self.lock();
        state.frozen = false;
        self.rouse(&mut state);
    }

    pub(super) fn begin_proof(&self) {
        let mut state = self.lock();
        let last = state.order.last();
        state.unproved = Some(last).filter(|last| state.order.has_up_to(*last));
    }

    pub(super) fn is_unproved(&self) -> bool {
        self.lock().unproved.is_some()
    }
}

/// True if the storage says that it has no room.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "trouble_tests.rs"]
mod trouble_tests;
