//! The disk of a live side: requests on their way, its host's cache, the storage.

use crate::guest::{Guest, Write};
use crate::models::ProcessName;
use crate::plan::{Cache, MS};
use crate::side::{Live, Process};
use crate::world::{Event, Plant, World};
use vmft_backup::reign::{LiveEvent, Standing};
use vmft_log::entry::{Arrival, Generation, RequestId};

/// So many writes of a guest are covered by no flush before its disk asks for one.
const FLUSHES_AFTER: usize = 3;

/// What a side asks of the storage.
#[derive(Debug, Clone)]
pub enum Job {
    /// A write of the guest.
    Write(Write),
    /// A flush of its disk.
    Flush,
    /// Writes that a predecessor completed, once more, in order, and then a flush.
    Again(Vec<Write>),
}

impl Job {
    /// What the guest waits for under this number.
    pub fn of(guest: &Guest, request: RequestId) -> Option<Self> {
        let write = guest.outstanding().get(&request).copied().map(Self::Write);
        let flush = || guest.flushing().filter(|flush| flush.request == request);
        write.or_else(|| flush().map(|_| Self::Flush))
    }
}

/// A write in a host's cache.
#[derive(Debug, Clone, Copy)]
pub struct Cached {
    /// Whose it is.
    pub from: ProcessName,
    /// The write.
    pub write: Write,
}

/// Who has sent something to the storage, from a host that had died so often.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    from: ProcessName,
    deaths: u32,
}

impl World {
    /// A guest at its start.
    pub(crate) fn new_guest(&self, seed: u64) -> Guest {
        let flushes_after = match self.plan.cache {
            Cache::None => 0,
            Cache::OfHost => FLUSHES_AFTER,
        };
        Guest::new(seed, flushes_after)
    }

    /// A side goes live: what its predecessor completed, and may have died with its host, is written again
    /// first; then what the guest waits for is asked for again.
    pub(crate) fn take_over_disk(&mut self, side: usize, live: &mut Live) {
        let uncovered = live.guest.uncovered().to_vec();
        if !uncovered.is_empty() && self.plant != Some(Plant::NoRewrite) {
            live.waiting = Some(Vec::new());
            self.send_job(side, RequestId(0), Job::Again(uncovered));
        }
        if self.plant == Some(Plant::NoReissue) {
            return;
        }
        let flush = live.guest.flushing().map(|flush| flush.request);
        let requests: Vec<_> = live.guest.outstanding().keys().copied().chain(flush).collect();
        for request in requests {
            if let Some(job) = Job::of(&live.guest, request) {
                self.begin_job(side, live, request, job);
            }
        }
    }

    /// A request of the guest is let out.
    pub(crate) fn begin_job(&mut self, side: usize, live: &mut Live, request: RequestId, job: Job) {
        match &mut live.waiting {
            Some(waiting) => waiting.push((request, job)),
            None => self.send_job(side, request, job),
        }
    }

    fn send_job(&mut self, side: usize, request: RequestId, job: Job) {
        let (incarnation, way) =
            (self.sides[side].incarnation, self.random.between(1, 900) * 1_000);
        self.schedule(self.now + way, Event::Request(side, incarnation, request, job));
    }

    /// A request is about to be sent: first the fence is asked.
    pub(crate) fn request(&mut self, side: usize, incarnation: u32, request: RequestId, job: Job) {
        if self.sides[side].incarnation != incarnation {
            return;
        }
        let fenced = self.plant != Some(Plant::NoFence);
        // While it is being decided who goes on, nothing is written.
        let in_doubt = matches!(
            &self.sides[side].process,
            Process::Live(live) if *live.reign.standing() == Standing::Deciding
        );
        if self.is_frozen(side) || (fenced && (in_doubt || !self.reaches_arbiter(side))) {
            let again = self.now + 5 * MS;
            self.schedule(again, Event::Request(side, incarnation, request, job));
            return;
        }
        let mut process = std::mem::replace(&mut self.sides[side].process, Process::Off);
        if let Process::Live(live) = &mut process
            && !live.shut
        {
            let next = Generation(live.generation.0 + 1);
            let mine = self.sides[side].candidate(side).id;
            match self.arbiter.winner(next).filter(|winner| fenced && winner.id != mine).cloned() {
                Some(winner) => {
                    let event = LiveEvent::Overtaken { generation: next, winner };
                    self.judge(side, live, event);
                }
                None => {
                    // What a host has sent arrives, whatever becomes of the host, and sometimes late.
                    let late = if self.random.chance(8) { 200_000 } else { 2_000 };
                    let at = self.now + self.random.between(100, late) * 1_000;
                    let sent = Sent { from: (side, incarnation), deaths: self.sides[side].deaths };
                    self.schedule(at, Event::Land(sent, request, job));
                }
            }
        }
        self.sides[side].process = process;
        self.run_side(side);
    }

    /// A request arrives at the storage, or in its host's cache.
    pub(crate) fn land(&mut self, sent: Sent, request: RequestId, job: &Job) {
        let Sent { from: (side, incarnation), deaths } = sent;
        self.note(|| format!("side {side}: {request:?} lands: {job:x?}"));
        let done = match (self.plan.cache, job) {
            (Cache::None, Job::Write(write)) => self.store(sent.from, *write),
            (Cache::None, Job::Flush | Job::Again(_)) => unreachable!("nothing is to be flushed"),
            (Cache::OfHost, _) if self.sides[side].deaths != deaths => false,
            (Cache::OfHost, Job::Write(write)) => {
                self.sides[side].cache.push(Cached { from: sent.from, write: *write });
                let later = self.now + self.random.between(1, 150) * MS;
                self.schedule(later, Event::WriteBack(side, deaths));
                true
            }
            (Cache::OfHost, Job::Flush) => self.write_all_back(sent.from),
            (Cache::OfHost, Job::Again(writes)) => {
                let all = writes.iter().map(|write| Cached { from: sent.from, write: *write });
                self.sides[side].cache.extend(all);
                self.write_all_back(sent.from)
            }
        };
        if !done || self.sides[side].incarnation != incarnation {
            return;
        }
        let Process::Live(live) = &mut self.sides[side].process else { return };
        if matches!(job, Job::Again(_)) {
            for (request, job) in live.waiting.take().into_iter().flatten() {
                self.send_job(side, request, job);
            }
            return;
        }
        // Where another side has the storage, what it holds is newer than this guest's.
        let flush = live.guest.flushing().filter(|flush| flush.request == request);
        if let Some(flush) = flush.filter(|_| self.storage.is_of(sent.from)) {
            self.oracle.check_flush(&live.guest, flush.covers, &self.storage);
        }
        let completion = Arrival::DiskCompletion { disk: 0, request, status: 0, data: Vec::new() };
        live.arrivals.push_back(completion);
    }

    fn store(&mut self, from: ProcessName, write: Write) -> bool {
        let fenced = self.plant != Some(Plant::NoFence);
        let taken = self.storage.write(from, write, fenced);
        self.note(|| format!("storage: {write:x?} of {from:?}: {taken}"));
        if !taken {
            self.note(|| format!("a late write of side {} is refused", from.0));
            self.sides[from.0].refused = Some(from);
        }
        taken
    }

    /// The cache of a host is written back. True if the storage has taken all that is of this process: what it
    /// has refused once, no later flush answers for.
    fn write_all_back(&mut self, process: ProcessName) -> bool {
        for Cached { from, write } in std::mem::take(&mut self.sides[process.0].cache) {
            self.store(from, write);
        }
        self.sides[process.0].refused != Some(process)
    }

    /// A host writes the oldest of its cache to the storage, when it runs.
    pub(crate) fn write_back(&mut self, side: usize, deaths: u32) {
        if self.sides[side].deaths != deaths || self.sides[side].cache.is_empty() {
            return;
        }
        if self.is_frozen(side) {
            self.schedule(self.now + 5 * MS, Event::WriteBack(side, deaths));
            return;
        }
        let Cached { from, write } = self.sides[side].cache.remove(0);
        self.store(from, write);
    }

    /// What the guest of a side has been told is on its disk must be there, if it is live.
    pub(crate) fn check_disk(&mut self, side: usize) {
        let Self { oracle, storage, sides, .. } = self;
        let Process::Live(live) = &sides[side].process else { return };
        let process = (side, sides[side].incarnation);
        let cached = |sector| {
            let own = sides[side].cache.iter().rev().filter(|cached| cached.from == process);
            own.map(|cached| cached.write).find(|write| write.sector == sector)
        };
        oracle.check_disk(&live.guest, |sector| {
            cached(sector).map(|write| write.value).or_else(|| storage.sector(sector))
        });
    }
}
