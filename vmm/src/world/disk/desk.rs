//! What is known of disks whose storage fails, and what is done about it.
//!
//! ```text
//!  a request fails for good ──▶ kept: the guest is not told, and stands still
//!     a backup takes the guest: this side's disks stand still for ever, and that one asks its own way
//!     no backup: the operator makes room or mends the storage, and resumes; the request is tried again
//! ```
//! The disks' threads keep what has failed. The machine's thread decides, with the machine at rest: it hears
//! of news here. Operators ask here, and resume here, on any thread.

use super::queue::{DiskQueue, Shared};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use vmft_threads::{Mutex, MutexGuard};

/// What is done when a disk's storage fails for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// A backup takes the guest, if one can; else as [`Self::Stop`].
    Failover,
    /// The guest stands still until the operator resumes it, and hears nothing of the error.
    Stop,
    /// The guest is told of the error.
    Report,
}

/// How a disk deals with storage that fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskPolicy {
    /// When a request fails.
    pub on_error: OnError,
    /// A request that has been under way for longer is said to hang.
    pub timeout: Duration,
}

impl Default for DiskPolicy {
    /// Failover; 30 s, after which Linux' own drivers count a disk's command as lost.
    fn default() -> Self {
        Self { on_error: OnError::Failover, timeout: Duration::from_secs(30) }
    }
}

/// A disk with which something is wrong now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskTrouble {
    /// Its number on the board.
    pub disk: u8,
    /// As its operator knows it.
    pub path: PathBuf,
    /// What could not be done, such as "writing 4096 bytes at byte 512".
    pub what: String,
    /// The storage's reason; `None` for a request that hangs.
    pub error: Option<String>,
    /// The reason is that there is no room.
    pub is_full: bool,
    /// Since when.
    pub since: Instant,
    /// Requests of the disk that are kept, or hang.
    pub requests: usize,
    /// What is done about it.
    pub on_error: OnError,
    /// The request hangs where its storage would let it land later, over what another side has written.
    pub may_land_later: bool,
}

/// What has become of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskNews {
    /// A request failed, and is kept.
    Failed(DiskTrouble),
    /// A request hangs.
    Hangs(DiskTrouble),
    /// One that hung has ended, well or not, after so long.
    Answers(DiskTrouble, Duration),
}

/// Most news kept for a machine that does not look: more of them say nothing new.
const MAX_NEWS: usize = 64;

/// A side's disks, as far as their storage fails.
#[derive(Debug, Default)]
pub struct DiskDesk {
    /// Of the side that is live in this process.
    queues: Mutex<Vec<Weak<Shared>>>,
    news: Mutex<VecDeque<DiskNews>>,
}

impl DiskDesk {
    fn lock_queues(&self) -> MutexGuard<'_, Vec<Weak<Shared>>> {
        self.queues.lock()
    }

    fn lock_news(&self) -> MutexGuard<'_, VecDeque<DiskNews>> {
        self.news.lock()
    }

    /// From now on these are the side's disks.
    pub(in crate::world) fn attend(&self, queues: &[DiskQueue]) {
        *self.lock_queues() = queues.iter().map(DiskQueue::downgrade).collect();
    }

    pub(super) fn queues(&self) -> Vec<Arc<Shared>> {
        self.lock_queues().iter().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn push_news(&self, news: DiskNews) {
        let mut all = self.lock_news();
        if all.len() < MAX_NEWS {
            all.push_back(news);
        }
    }

    /// The next thing to be told, if any.
    pub fn take_news(&self) -> Option<DiskNews> {
        self.lock_news().pop_front()
    }

    /// What is wrong now, a disk at a time.
    pub fn troubles(&self) -> Vec<DiskTrouble> {
        self.queues().iter().filter_map(|queue| queue.trouble()).collect()
    }

    /// True if a request is kept: the guest must not run on.
    pub fn stands_still(&self) -> bool {
        self.queues().iter().any(|queue| queue.keeps())
    }

    /// Tries again what is kept. How many requests that is.
    pub fn resume(&self) -> usize {
        self.queues().iter().map(|queue| queue.resume()).sum()
    }

    /// Tells the guest of failed flushes that may not be tried again: what they were to make durable may be
    /// lost, and a second one would succeed all the same.
    pub fn answer_final(&self) {
        self.queues().iter().for_each(|queue| queue.answer_final());
    }

    /// Begins nothing more, and waits until nothing is under way that could change a disk later, for at most
    /// `limit` a disk. False if there still is.
    pub fn freeze(&self, limit: Duration) -> bool {
        let queues = self.queues();
        queues.iter().for_each(|queue| queue.freeze());
        queues.iter().all(|queue| queue.wait_quiet(limit))
    }

    /// Goes on after [`Self::freeze`].
    pub fn thaw(&self) {
        self.queues().iter().for_each(|queue| queue.thaw());
    }

    /// What was issued up to here is what another side's storage has failed at: until all of it is done, the
    /// fault is taken to be the storage's own, and not that side's way to it.
    pub fn begin_proof(&self) {
        self.queues().iter().for_each(|queue| queue.begin_proof());
    }

    /// True until what was issued before [`Self::begin_proof`] is done.
    pub fn is_unproved(&self) -> bool {
        self.queues().iter().any(|queue| queue.is_unproved())
    }
}
