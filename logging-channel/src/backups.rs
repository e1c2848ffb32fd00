//! The primary's backups: whom it admits, from where each gets the log, and what all of them have.
//!
//! ```text
//!  Hello answered ──▶ joining ──log begins──▶ session ──checkpoint sent──▶ complete ──accepted──▶ protected
//! ```
//! **Invariant.** A backup protects only once it is known to have heard of the primary's generation. What
//! was agreed at its handshake may be old when its log begins: the generation can change while it joins,
//! and one that does not know asks for a generation that is taken when it loses its primary. So whoever
//! joined an earlier one is told where its log begins, and counts when it has shown that it heard.
//! (The pair's name and the machine's fingerprint, which are agreed as well, never change in the life of a
//! primary's channel.)
//!
//! Pure, like the sessions themselves. Whoever carries the sessions is woken through [`Wake`] when there
//! is something to send for one of them.

use crate::fingerprint::Identity;
use crate::handshake::Admission;
use crate::sender::{PushError, Sender, SenderConfig, SenderStats};
use crate::session::{GoodbyeReason, MAX_TEXT, SessionId};
use crate::time::MonotonicTime;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;
use vmft_log::entry::{Entry, EntrySequence, Generation, LogPosition};
use vmft_log::point::ExecutionPoint;

/// Names one backup of one primary, from its handshake on. No two have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BackupKey(u64);

impl fmt::Display for BackupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "backup {}", self.0)
    }
}

/// Tells whoever carries one session that there is something to send.
pub trait Wake: fmt::Debug {
    /// There is.
    fn wake(&self);
}

/// For a caller that looks by itself.
impl Wake for () {
    fn wake(&self) {}
}

/// Why an entry was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrimaryPushError {
    /// There is no session: nobody would get it.
    #[error("there is no backup")]
    NoBackup,
    /// The session did not take it.
    #[error(transparent)]
    Push(#[from] PushError),
}

/// Where a session's log begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// The place.
    pub position: LogPosition,
    /// True if nobody followed before.
    pub first: bool,
}

/// How a backup has come to protect its primary in a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protects {
    /// It has joined.
    Joined(Generation),
    /// It has heard of this later one.
    Told(Generation),
}

/// What is left of a session that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// The backup may have had the whole checkpoint: it may take itself for one that may go live.
    pub complete: bool,
    /// Why this side went on without it, if it did.
    pub given_up: Option<String>,
    /// How many other sessions go on.
    pub others: usize,
    /// Figures of the session, if it had begun.
    pub stats: Option<SenderStats>,
}

/// One backup's session.
#[derive(Debug)]
pub struct BackupSession<W> {
    sender: Sender,
    /// The checkpoint's end is on its way: the backup may come to have it all.
    complete: bool,
    /// The backup has said that it has it all.
    accepted: bool,
    /// The generation it is told of.
    generation: Generation,
    /// It has been said that it protects: in this generation, and at all.
    protects: bool,
    joined: bool,
    /// Why this side goes on without it, if it does.
    given_up: Option<String>,
    wake: W,
}

impl<W> BackupSession<W> {
    /// The session's own end of the log.
    pub const fn sender(&mut self) -> &mut Sender {
        &mut self.sender
    }

    /// The end of the checkpoint is on its way.
    pub const fn complete(&mut self) {
        self.complete = true;
    }

    /// The backup has the whole checkpoint, and has said so.
    pub const fn accepted(&mut self) {
        self.accepted = true;
    }

    const fn is_protecting(&self) -> bool {
        self.accepted && self.sender.knows_generation()
    }

    /// Says once that the backup has come to protect this side: it has the whole checkpoint and knows the
    /// generation. Says so again when it has heard of a later generation.
    pub const fn poll_protects(&mut self) -> Option<Protects> {
        if self.protects == self.is_protecting() {
            return None;
        }
        self.protects = !self.protects;
        match (self.protects, std::mem::replace(&mut self.joined, true)) {
            (false, _) => None,
            (true, false) => Some(Protects::Joined(self.generation)),
            (true, true) => Some(Protects::Told(self.generation)),
        }
    }
}

/// A backup that joins: what its session will be.
#[derive(Debug)]
struct Joining<W> {
    session: SessionId,
    /// The generation it has been told of in the handshake.
    agreed: Generation,
    wake: W,
}

/// All backups of one primary.
#[derive(Debug)]
pub struct Backups<W> {
    identity: Identity,
    /// Why no backup is wanted, if none is.
    closed_because: Option<String>,
    /// Backups that are served or about to be.
    occupied: usize,
    next_key: u64,
    joining: BTreeMap<BackupKey, Joining<W>>,
    sessions: BTreeMap<BackupKey, BackupSession<W>>,
    /// The last entry pushed.
    last: EntrySequence,
}

impl<W: Wake> Backups<W> {
    /// Nobody follows yet; the first entry follows `log_start`.
    pub const fn new(identity: Identity, log_start: EntrySequence) -> Self {
        Self {
            identity,
            closed_because: None,
            occupied: 0,
            next_key: 1,
            joining: BTreeMap::new(),
            sessions: BTreeMap::new(),
            last: log_start,
        }
    }

    /// Whom backups must match, and the generation they join.
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What a backup that asks is to be told, where there are places for so many.
    pub fn admission(&self, places: usize) -> Admission {
        match &self.closed_because {
            _ if self.occupied >= places => Admission::HasBackup,
            Some(reason) => Admission::Closed(reason.clone()),
            None => Admission::Open,
        }
    }

    /// One of the places is taken, until [`Self::leave_place`].
    pub const fn take_place(&mut self) {
        self.occupied += 1;
    }

    /// A place is free again.
    pub const fn leave_place(&mut self) {
        self.occupied -= 1;
    }

    /// A backup has shaken hands, in the generation `agreed`, and begins to join.
    pub fn enter(&mut self, session: SessionId, agreed: Generation, wake: W) -> BackupKey {
        let key = BackupKey(self.next_key);
        self.next_key += 1;
        self.joining.insert(key, Joining { session, agreed, wake });
        key
    }

    /// From here on entries are taken for this backup; the first one follows its checkpoint, whose
    /// state is that of the machine at `point`, at rest now.
    ///
    /// # Errors
    /// [`PrimaryPushError::NoBackup`] if it is gone, or no backup is wanted any more.
    pub fn begin(
        &mut self,
        key: BackupKey,
        config: SenderConfig,
        point: ExecutionPoint,
        now: MonotonicTime,
    ) -> Result<Begun, PrimaryPushError> {
        if self.closed_because.is_some() {
            return Err(PrimaryPushError::NoBackup);
        }
        let Joining { session, agreed, wake } =
            self.joining.remove(&key).ok_or(PrimaryPushError::NoBackup)?;
        let position = LogPosition { entry: self.last, point };
        let mut sender = Sender::new(config, session, position, now);
        if agreed != self.identity.generation {
            sender.reign(self.identity.generation);
        }
        let first = self.sessions.is_empty();
        let session = BackupSession {
            sender,
            complete: false,
            accepted: false,
            generation: self.identity.generation,
            protects: false,
            joined: false,
            given_up: None,
            wake,
        };
        self.sessions.insert(key, session);
        Ok(Begun { position, first })
    }

    /// The session of `key`, if its log has begun and goes on.
    pub fn session(&mut self, key: BackupKey) -> Option<&mut BackupSession<W>> {
        self.sessions.get_mut(&key)
    }

    /// The backup is gone, or its session is over.
    pub fn finish(&mut self, key: BackupKey, now: MonotonicTime) -> Finished {
        self.joining.remove(&key);
        let session = self.sessions.remove(&key);
        let complete = session.as_ref().is_some_and(|session| session.complete);
        let given_up = session.as_ref().and_then(|session| session.given_up.clone());
        if complete {
            self.closed_because = Some("it has lost its backup and runs alone".to_owned());
        }
        let stats = session.map(|session| session.sender.stats(now));
        Finished { complete, given_up, others: self.sessions.len(), stats }
    }

    /// The primary is of `generation` from now on, and admits backups (again): after a go-live, or
    /// when the generation of a lost backup was won. Those who follow are told.
    pub fn reopen(&mut self, generation: Generation) {
        self.identity.generation = generation;
        self.closed_because = None;
        for session in self.sessions.values_mut() {
            session.sender.reign(generation);
            session.generation = generation;
            session.protects = false;
            session.wake.wake();
        }
    }

    /// Admits no backup, for a reason that those who ask are told. Sessions go on.
    pub fn close_admission(&mut self, reason: &str) {
        self.closed_because = Some(reason.chars().take(MAX_TEXT / 4).collect());
    }

    /// Gives an entry to every session that still takes some.
    ///
    /// # Errors
    /// [`PrimaryPushError`]; the log is unchanged.
    pub fn push(
        &mut self,
        now: MonotonicTime,
        entry: &Entry,
    ) -> Result<EntrySequence, PrimaryPushError> {
        if self.sessions.is_empty() {
            return Err(PrimaryPushError::NoBackup);
        }
        if let Some(buffered) = self.senders().find_map(|sender| sender.overfull()) {
            return Err(PushError::Full { buffered }.into());
        }
        let mut pushed = None;
        for BackupSession { sender, wake, .. } in self.sessions.values_mut() {
            let (was_empty, was_due) = (sender.is_empty(), sender.has_due_entries());
            match sender.push(now, entry) {
                Ok(sequence) => pushed = Some(sequence),
                // It is on its way out.
                Err(PushError::Ended) => continue,
                // The same for all of them, so none has taken it.
                Err(error) => return Err(error.into()),
            }
            // The channel's thread must set its timer for the first entry of a batch, and send what
            // is due; for others it need not be woken.
            if was_empty || (!was_due && sender.has_due_entries()) {
                wake.wake();
            }
        }
        let sequence = pushed.ok_or(PushError::Ended)?;
        self.last = sequence;
        Ok(sequence)
    }

    /// Makes everything pushed so far due at once.
    pub fn flush(&mut self) {
        for BackupSession { sender, wake, .. } in self.sessions.values_mut() {
            let was_due = sender.has_due_entries();
            sender.flush();
            // Whoever pushed what was due already has woken the channel's thread.
            if !was_due && sender.has_due_entries() {
                wake.wake();
            }
        }
    }

    /// Leaves all sessions in order: what was pushed is sent, then a goodbye.
    pub fn leave(&mut self, reason: &GoodbyeReason) {
        for BackupSession { sender, wake, .. } in self.sessions.values_mut() {
            sender.leave(reason.clone());
            wake.wake();
        }
    }

    /// Goes on without the backups that are further behind than `limit`: they are told goodbye.
    pub fn give_up_behind(&mut self, limit: Duration, why: &str, now: MonotonicTime) {
        let mut any = false;
        for session in self.sessions.values_mut() {
            if session.given_up.is_none() && session.sender.execution_lag(now) > limit {
                session.given_up = Some(why.to_owned());
                session.sender.leave_at_once(GoodbyeReason::Fault(why.into()));
                session.wake.wake();
                any = true;
            }
        }
        if any {
            // Nobody begins before the generation of whoever was given up is won.
            self.closed_because =
                Some("it goes on without a backup that was too far behind".to_owned());
        }
    }

    /// Wakes everybody: the channel closes.
    pub fn wake_all(&self) {
        self.sessions.values().for_each(|session| session.wake.wake());
    }

    /// Every session's own end of the log.
    pub fn senders(&mut self) -> impl Iterator<Item = &mut Sender> {
        self.sessions.values_mut().map(|session| &mut session.sender)
    }

    /// Backups whose log has begun: they get every entry.
    pub fn followers(&self) -> usize {
        self.sessions.len()
    }

    /// Backups that have the whole checkpoint, whether or not they know of the generation.
    pub fn joined(&self) -> usize {
        self.sessions.values().filter(|session| session.accepted).count()
    }

    /// Backups that could go live if this side were lost now.
    pub fn protected_by(&self) -> usize {
        self.sessions.values().filter(|session| session.is_protecting()).count()
    }

    /// The last entry pushed.
    pub const fn last(&self) -> EntrySequence {
        self.last
    }

    /// The last entry that all backups have; all, if there are none.
    pub fn acknowledged(&self) -> EntrySequence {
        let received = self.sessions.values().map(|session| session.sender.acknowledged());
        received.min().unwrap_or(self.last)
    }
}

#[cfg(test)]
#[path = "backups_tests.rs"]
mod tests;
