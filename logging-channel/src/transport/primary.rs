//! The primary's end of the channel: listens for backups, and takes the guest's entries.
//!
//! Every backup has a session, and all get the same entries under the same numbers; what counts as
//! acknowledged is what all of them have.

use super::admission::AdmissionCheck;
use super::primary_session::serve;
use super::{
    DEFAULT_SETUP_TIMEOUT, Listener, LocalAddress, Origin, PeerAddress, SessionEnd, TransportError,
    clock, join_thread, spawn_thread,
};
use crate::checkpoint::CheckpointPiece;
use crate::detector::DetectorConfig;
use crate::entry::{Entry, EntrySequence, Generation, LogPosition};
use crate::fingerprint::Identity;
use crate::handshake::{Admission, SessionTerms};
use crate::point::ExecutionPoint;
use crate::sender::{PushError, Sender, SenderConfig, SenderStats};
use crate::session::{GoodbyeReason, MAX_TEXT, SessionId};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::Notify;

/// What a primary's channel is to be.
#[derive(Debug, Clone)]
pub struct PrimaryConfig {
    /// Where to listen; port 0 picks a free one.
    pub listen: PeerAddress,
    /// That place, if it is taken already.
    pub listener: Option<Arc<Listener>>,
    /// Whom backups must match.
    pub identity: Identity,
    /// How entries are batched and buffered.
    pub sender: SenderConfig,
    /// When a backup is suspected. Its heartbeat interval is for both sides.
    pub detector: DetectorConfig,
    /// How long a greeting may take, and a checkpoint stand still.
    pub setup_timeout: Duration,
    /// How many backups may follow at a time.
    pub backups: usize,
    /// What one must show besides.
    pub check: Option<AdmissionCheck>,
    /// The last entry of the log that this one goes on from.
    pub log_start: EntrySequence,
}

impl PrimaryConfig {
    /// The defaults.
    pub fn new(listen: PeerAddress, identity: Identity) -> Self {
        Self {
            listen,
            listener: None,
            identity,
            sender: SenderConfig::default(),
            detector: DetectorConfig::default(),
            setup_timeout: DEFAULT_SETUP_TIMEOUT,
            backups: 1,
            check: None,
            log_start: EntrySequence(0),
        }
    }
}

/// Names one backup, from its handshake on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SessionKey(pub(super) u64);

/// One backup that is joining.
#[derive(Debug, Clone)]
pub struct JoinTicket {
    pub(super) shared: Arc<Shared>,
    pub(super) key: SessionKey,
    pub(super) sender: SenderConfig,
}

impl JoinTicket {
    /// From here on entries are taken for this backup; the first one follows its checkpoint, whose
    /// state is that of the machine at `point`, at rest now.
    ///
    /// # Errors
    /// [`PrimaryPushError::NoBackup`] if it is gone, or no backup is wanted any more.
    pub fn begin(&self, point: ExecutionPoint) -> Result<Begun, PrimaryPushError> {
        let mut state = self.shared.lock();
        let wanted = state.closed_because.is_none();
        let joining = state.joining.get(&self.key).filter(|_| wanted);
        let joining = joining.ok_or(PrimaryPushError::NoBackup)?;
        let position = LogPosition { entry: state.last, point };
        let sender = Sender::new(self.sender, joining.session, position, clock::now());
        let wake = Arc::clone(&joining.wake);
        let first = state.sessions.is_empty();
        let session = Session { sender, complete: false, protected: false, given_up: None, wake };
        state.sessions.insert(self.key, session);
        Ok(Begun { position, first })
    }
}

/// The checkpoint for one backup, made on a thread of its own, which may wait.
pub trait CheckpointStream: Send {
    /// The next piece; `None` after the end. Before the pieces of the state proper,
    /// [`JoinTicket::begin`] is called, so that what the guest does from there on is logged.
    ///
    /// # Errors
    /// A text that is reported as the reason for not going on with this backup.
    fn next_piece(&mut self) -> Result<Option<CheckpointPiece>, String>;
}

/// What the channel tells the primary, on the channel's thread: nothing else happens there
/// meanwhile, so every call should be brief. No lock is held.
pub trait PrimaryHandler: Send + 'static {
    /// A backup has shaken hands: where its checkpoint is to come from. Dropped when it is over,
    /// complete or not.
    ///
    /// # Errors
    /// A text that is reported as the reason for not going on with this backup.
    fn checkpoint(
        &mut self,
        terms: &SessionTerms,
        ticket: JoinTicket,
    ) -> Result<Box<dyn CheckpointStream>, String>;
    /// The backup has the whole checkpoint and has said so.
    fn protected(&mut self);
    /// Every backup whose session has begun has received the entries up to here: the outputs they
    /// cover may be released now.
    fn acknowledged(&mut self, received: EntrySequence);
    /// A session is over. If that backup may have had the whole checkpoint
    /// ([`SessionEnd::protected`]), no other backup is admitted until [`PrimaryChannel::reopen`].
    fn session_ended(&mut self, end: &SessionEnd);
    /// Somebody who connected got no session (or, after [`Self::session_ended`] of an unprotected
    /// session, did not get as far as the log). The primary goes on listening. Of many like that only a
    /// few are told one by one; `untold` says how many there were since the last of this kind.
    fn peer_refused(&mut self, peer: Origin, error: &TransportError, untold: u64);
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

/// Whether the log has room for more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// It has.
    Available,
    /// It has not: the guest has to wait.
    Full,
    /// There is no session.
    NoBackup,
}

/// One backup's session.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) sender: Sender,
    /// The checkpoint's end is on its way: the backup may come to have it all.
    pub(super) complete: bool,
    /// The backup has said that it has it all.
    pub(super) protected: bool,
    /// Why this side goes on without it, if it does.
    pub(super) given_up: Option<String>,
    /// There is something to send.
    pub(super) wake: Arc<Notify>,
}

/// A backup that joins: what its session will be.
#[derive(Debug)]
pub(super) struct Joining {
    pub(super) session: SessionId,
    pub(super) wake: Arc<Notify>,
}

/// How far the primary is with its backups.
#[derive(Debug)]
pub(super) struct State {
    pub(super) identity: Identity,
    /// Why no backup is wanted, if none is.
    pub(super) closed_because: Option<String>,
    /// Backups that are served or about to be.
    pub(super) occupied: usize,
    pub(super) next_ticket: u64,
    pub(super) joining: BTreeMap<SessionKey, Joining>,
    pub(super) sessions: BTreeMap<SessionKey, Session>,
    /// The last entry pushed.
    last: EntrySequence,
    /// The last entry whose acknowledgement by all the handler has been told of.
    pub(super) told: EntrySequence,
    pub(super) closing: bool,
    pub(super) last_stats: SenderStats,
}

impl State {
    /// What a backup that asks is to be told, where there are places for so many.
    pub(super) fn admission(&self, places: usize) -> Admission {
        match &self.closed_because {
            _ if self.occupied >= places => Admission::HasBackup,
            Some(reason) => Admission::Closed(reason.clone()),
            None => Admission::Open,
        }
    }

    /// The last entry that all backups have; all, if there are none.
    pub(super) fn acknowledged(&self) -> EntrySequence {
        let received = self.sessions.values().map(|session| session.sender.acknowledged());
        received.min().unwrap_or(self.last)
    }

    fn senders(&mut self) -> impl Iterator<Item = &mut Sender> {
        self.sessions.values_mut().map(|session| &mut session.sender)
    }

    /// Gives an entry to every session that still takes some.
    fn push(&mut self, entry: &Entry) -> Result<EntrySequence, PrimaryPushError> {
        if self.sessions.is_empty() {
            return Err(PrimaryPushError::NoBackup);
        }
        if let Some(buffered) = self.senders().find_map(|sender| sender.overfull()) {
            return Err(PushError::Full { buffered }.into());
        }
        let (now, mut pushed) = (clock::now(), None);
        for session in self.sessions.values_mut() {
            let sender = &mut session.sender;
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
                session.wake.notify_one();
            }
        }
        let sequence = pushed.ok_or(PushError::Ended)?;
        self.last = sequence;
        Ok(sequence)
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Something changed that a thread may wait for.
    pub(super) changed: Condvar,
    /// The channel closes.
    pub(super) close: Notify,
}

impl Shared {
    /// A channel with nobody on it.
    pub(super) fn new(config: &PrimaryConfig) -> Self {
        let state = State {
            identity: config.identity.clone(),
            closed_because: None,
            occupied: 0,
            next_ticket: 1,
            joining: BTreeMap::new(),
            sessions: BTreeMap::new(),
            last: config.log_start,
            told: config.log_start,
            closing: false,
            last_stats: SenderStats::default(),
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), close: Notify::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the channel's lock")
    }
}

/// Where a session's log begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// The place.
    pub position: LogPosition,
    /// True if nobody followed before.
    pub first: bool,
}

/// The primary's end of the channel. Methods may be called from any thread.
#[derive(Debug)]
pub struct PrimaryChannel {
    shared: Arc<Shared>,
    local_address: LocalAddress,
    thread: Option<JoinHandle<()>>,
}

impl PrimaryChannel {
    /// Begins to listen. The first backup is welcome.
    ///
    /// # Errors
    /// As [`Listener::bind`], and [`TransportError::Thread`].
    pub fn listen(
        mut config: PrimaryConfig,
        handler: impl PrimaryHandler,
    ) -> Result<Self, TransportError> {
        let listener = match config.listener.take() {
            Some(listener) => listener,
            None => Arc::new(Listener::bind(&config.listen)?),
        };
        let local_address = listener.local_address().clone();
        let tls = listener.tls.clone();
        let socket = listener
            .socket()
            .map_err(|source| TransportError::Listen { address: config.listen.clone(), source })?;
        drop(listener);
        let shared = Arc::new(Shared::new(&config));
        let theirs = Arc::clone(&shared);
        let thread = spawn_thread("vmft-primary", move || {
            serve(config, tls, socket, theirs, Box::new(handler))
        })?;
        Ok(Self { shared, local_address, thread: Some(thread) })
    }

    /// Where it listens.
    pub const fn local_address(&self) -> &LocalAddress {
        &self.local_address
    }

    /// Puts an entry into the log and returns its place. Takes well below a microsecond a backup,
    /// and waits for nothing; an output mark or a stop is on its way at once.
    ///
    /// # Errors
    /// [`PrimaryPushError`]; the log is unchanged.
    pub fn push(&self, entry: &Entry) -> Result<EntrySequence, PrimaryPushError> {
        self.shared.lock().push(entry)
    }

    /// Sends everything pushed so far without waiting for company.
    pub fn flush(&self) {
        let mut state = self.shared.lock();
        for Session { sender, wake, .. } in state.sessions.values_mut() {
            let was_due = sender.has_due_entries();
            sender.flush();
            // Whoever pushed what was due already has woken the channel's thread.
            if !was_due && sender.has_due_entries() {
                wake.notify_one();
            }
        }
    }

    /// Waits until the log has room, for at most `limit`. To be called before the guest runs on.
    pub fn wait_room(&self, limit: Duration) -> Room {
        let room = |state: &mut State| {
            if state.sessions.is_empty() {
                Room::NoBackup
            } else if state.senders().any(|sender| sender.is_full()) {
                Room::Full
            } else {
                Room::Available
            }
        };
        self.wait(limit, |state| room(state) == Room::Full, room)
    }

    /// Waits until a backup protects the machine, for at most `limit`; says whether one does.
    pub fn wait_protected(&self, limit: Duration) -> bool {
        let protected =
            |state: &mut State| state.sessions.values().any(|session| session.protected);
        self.wait(limit, |state| !protected(state), protected)
    }

    /// Waits until all backups have every entry pushed so far and the handler has been told so, for
    /// at most `limit`; says whether that is so. The outputs those entries cover are released then.
    pub fn wait_acknowledged(&self, limit: Duration) -> bool {
        self.flush();
        let outstanding = |state: &mut State| !state.sessions.is_empty() && state.told < state.last;
        self.wait(limit, outstanding, |state| !state.sessions.is_empty() && !outstanding(state))
    }

    fn wait<T>(
        &self,
        limit: Duration,
        waiting: impl FnMut(&mut State) -> bool,
        result: impl FnOnce(&mut State) -> T,
    ) -> T {
        let state = self.shared.lock();
        let (mut state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, limit, waiting)
            .expect("no thread panics while it holds the channel's lock");
        result(&mut state)
    }

    /// Leaves all sessions in order: what was pushed is sent, then a goodbye, and the backups are
    /// waited for, for at most `limit`. True if the sessions are over.
    pub fn leave(&self, reason: GoodbyeReason, limit: Duration) -> bool {
        for session in self.shared.lock().sessions.values_mut() {
            session.sender.leave(reason.clone());
            session.wake.notify_one();
        }
        self.wait(limit, |state| !state.sessions.is_empty(), |state| state.sessions.is_empty())
    }

    /// The primary is of `generation` from now on, and admits backups (again): after a go-live, or
    /// when the generation of a lost backup was won. Those who follow are told.
    pub fn reopen(&self, generation: Generation) {
        let mut state = self.shared.lock();
        state.identity.generation = generation;
        state.closed_because = None;
        for session in state.sessions.values_mut() {
            session.sender.reign(generation);
            session.wake.notify_one();
        }
    }

    /// Admits no backup, for a reason that those who ask are told. Sessions go on.
    pub fn close_admission(&self, reason: &str) {
        let reason = reason.chars().take(MAX_TEXT / 4).collect();
        self.shared.lock().closed_because = Some(reason);
    }

    /// Sessions that have begun: backups that get every entry.
    pub fn followers(&self) -> usize {
        self.shared.lock().sessions.len()
    }

    /// Backups that have the checkpoint, and whose session lasts.
    pub fn protected_by(&self) -> usize {
        self.shared.lock().sessions.values().filter(|session| session.protected).count()
    }

    /// The last entry that all who follow have.
    pub fn acknowledged(&self) -> EntrySequence {
        self.shared.lock().acknowledged()
    }

    /// Age of the oldest entry that a backup has not replayed; zero without a session. Much cheaper
    /// than [`Self::stats`].
    pub fn execution_lag(&self) -> Duration {
        let mut state = self.shared.lock();
        let now = clock::now();
        let lags = state.senders().map(|sender| sender.execution_lag(now));
        lags.max().unwrap_or(Duration::ZERO)
    }

    /// Waits until no backup is further behind than `limit`, for at most `patience`; says whether that
    /// is so.
    pub fn wait_lag(&self, limit: Duration, patience: Duration) -> bool {
        let behind = |state: &mut State| {
            let now = clock::now();
            state.senders().any(|sender| sender.execution_lag(now) > limit)
        };
        self.wait(patience, behind, |state| !behind(state))
    }

    /// Goes on without the backups that are further behind than `limit`: they are told goodbye, and
    /// their sessions end with [`EndCause::GivenUp`](super::EndCause::GivenUp) and `why`.
    pub fn give_up_behind(&self, limit: Duration, why: &str) {
        let mut state = self.shared.lock();
        let now = clock::now();
        let mut any = false;
        for session in state.sessions.values_mut() {
            if session.given_up.is_none() && session.sender.execution_lag(now) > limit {
                session.given_up = Some(why.to_owned());
                session.sender.leave_at_once(GoodbyeReason::Fault(why.into()));
                session.wake.notify_one();
                any = true;
            }
        }
        if any {
            // Nobody begins before the generation of whoever was given up is won.
            state.closed_because =
                Some("it goes on without a backup that was too far behind".to_owned());
        }
    }

    /// Figures of the session with the backup that is furthest behind, or of the last one.
    pub fn stats(&self) -> SenderStats {
        let mut state = self.shared.lock();
        let now = clock::now();
        let last = state.senders().max_by_key(|sender| sender.execution_lag(now));
        last.map(|sender| sender.stats(now)).unwrap_or_else(|| state.last_stats.clone())
    }
}

impl Drop for PrimaryChannel {
    /// Closes the channel. A backup that was not told goodbye takes this for a failure.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        for session in state.sessions.values() {
            session.wake.notify_one();
        }
        drop(state);
        self.shared.close.notify_one();
        join_thread(self.thread.take());
    }
}
