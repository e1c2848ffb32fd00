//! What says that a side is there: keys that hang on a lease, which its side keeps alive.
//!
//! A lease is evidence that an arbiter is in use, and nothing more: a side whose lease has run out while
//! its host was frozen, or cut off from etcd, has lost nothing by that, and one that has a lease has won
//! nothing. Who reigns is in the keys of the generations, which hang on no lease.

use super::members::{CALL_LIMIT, Members};
use super::wire::{Answer, LeaseId, Question, Transaction};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use vmft_threads::Mutex;

/// For how long a side counts as there that says nothing any more, by etcd's clock: after both sides of a
/// pair have died, a new one waits as long.
pub const LEASE_SECONDS: u64 = 20;
/// How often it is kept alive: three times may fail.
pub(super) const KEEP_EVERY: Duration = Duration::from_secs(5);
/// How long a side that ends tries to give its lease up.
const REVOKE_LIMIT: Duration = Duration::from_millis(500);

/// What a side asks to be there as.
type Entry = Box<dyn Fn(LeaseId) -> Transaction + Send>;

/// A side's lease, made when it is needed.
pub(super) struct Lease {
    members: Arc<Members>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lease: Option<LeaseId>,
    /// What is put again under another lease, where the one there was has run out.
    entry: Option<Entry>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("members", &self.members).finish_non_exhaustive()
    }
}

impl Lease {
    pub(super) fn new(members: Arc<Members>) -> Self {
        Self { members, state: Mutex::default() }
    }

    fn current(&self) -> io::Result<LeaseId> {
        if let Some(lease) = self.state.lock().lease {
            return Ok(lease);
        }
        match self.members.ask(&Question::Grant(LEASE_SECONDS), CALL_LIMIT)? {
            // Another thread may have had one as well: that one runs out.
            Answer::Granted(lease) => Ok(*self.state.lock().lease.get_or_insert(lease)),
            _ => Err(unexpected()),
        }
    }

    fn is_gone(&self, lease: LeaseId) {
        let mut state = self.state.lock();
        if state.lease == Some(lease) {
            state.lease = None;
        }
    }

    /// Asks with the lease, and once more with another where it has run out meanwhile.
    pub(super) fn ask(&self, question: impl Fn(LeaseId) -> Transaction) -> io::Result<Answer> {
        for _ in 0..2 {
            let lease = self.current()?;
            let question = Question::Transaction(question(lease));
            match self.members.ask(&question, CALL_LIMIT)? {
                Answer::LeaseGone => self.is_gone(lease),
                answer => return Ok(answer),
            }
        }
        Err(io::Error::other("leases run out before they are used"))
    }

    /// From now on this is put again whenever the lease has run out.
    pub(super) fn stand(&self, entry: impl Fn(LeaseId) -> Transaction + Send + 'static) {
        self.state.lock().entry = Some(Box::new(entry));
    }

    /// Keeps the lease alive, if there is one. What cannot be done now is tried the next time.
    pub(super) fn keep(&self) {
        let Some(lease) = self.state.lock().lease else { return };
        match self.members.ask(&Question::KeepAlive(lease), CALL_LIMIT) {
            Ok(Answer::LeaseGone) => self.is_gone(lease),
            Ok(_) => return,
            Err(error) => {
                tracing::debug!(%error, "a lease is not kept alive");
                return;
            }
        }
        let has_entry = self.state.lock().entry.is_some();
        if let Some(again) = has_entry.then(|| self.put_again())
            && let Err(error) = again
        {
            tracing::debug!(%error, "what hung on a lease is not there");
        }
    }

    fn put_again(&self) -> io::Result<()> {
        let question = |lease| {
            let state = self.state.lock();
            state.entry.as_ref().map_or_else(Transaction::default, |entry| entry(lease))
        };
        self.ask(question).map(drop)
    }

    /// Gives it up, so that nobody waits until it runs out.
    pub(super) fn revoke(&self) {
        let State { lease, entry } = std::mem::take(&mut *self.state.lock());
        drop(entry);
        let Some(lease) = lease else { return };
        // Where etcd is away, it runs out.
        let _ = self.members.ask(&Question::Revoke(lease), REVOKE_LIMIT);
    }
}

pub(super) fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an answer to another question")
}
