//! The primary's end of the channel: listens for backups, and takes the guest's entries.
//!
//! Every backup has a session, and all get the same entries under the same numbers; what counts as
//! acknowledged is what all of them have.

use super::admission::AdmissionCheck;
use super::primary_session::serve;
use super::waker::ThreadWaker;
use super::{
    DEFAULT_SETUP_TIMEOUT, Listener, LocalAddress, Origin, PeerAddress, SessionEnd, TransportError,
    clock, join_thread, spawn_thread,
};
use crate::backups::{BackupKey, Backups, Begun, PrimaryPushError, Protects, Wake};
use crate::detector::DetectorConfig;
use crate::fingerprint::Identity;
use crate::handshake::SessionTerms;
use crate::sender::{SendError, SenderConfig, SenderStats};
use crate::session::GoodbyeReason;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::Notify;
use vmft_log::checkpoint::JoinPiece;
use vmft_log::disk_copy::DiskDigests;
use vmft_log::entry::{Entry, EntrySequence, Generation};
use vmft_log::point::ExecutionPoint;
use vmft_threads::{Condvar, Mutex, MutexGuard};

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
    /// Called on the channel's thread when a session begins: it may give the thread priority.
    pub on_session: fn(),
    /// Called on the channel's thread when it was so late with what was due, heartbeats among it, that with as
    /// much again the other side would suspect this one.
    pub on_late: fn(Duration),
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
            on_session: || (),
            on_late: |_| (),
            check: None,
            log_start: EntrySequence(0),
        }
    }
}

/// One backup that is joining.
#[derive(Debug, Clone)]
pub struct JoinTicket {
    pub(super) shared: Arc<Shared>,
    pub(super) key: BackupKey,
    pub(super) sender: SenderConfig,
}

impl JoinTicket {
    /// From here on entries are taken for this backup; the first one follows its checkpoint, whose
    /// state is that of the machine at `point`, at rest now.
    ///
    /// # Errors
    /// [`PrimaryPushError::NoBackup`] if it is gone, or no backup is wanted any more.
    pub fn begin(&self, point: ExecutionPoint) -> Result<Begun, PrimaryPushError> {
        self.shared.lock().backups.begin(self.key, self.sender, point, clock::now())
    }

    /// Which backup it is.
    pub const fn key(&self) -> BackupKey {
        self.key
    }
}

/// The checkpoint for one backup, made on a thread of its own, which may wait.
pub trait CheckpointStream: Send {
    /// The next piece; `None` after the end. Before the pieces of the state proper,
    /// [`JoinTicket::begin`] is called, so that what the guest does from there on is logged.
    ///
    /// # Errors
    /// A text that is reported as the reason for not going on with this backup.
    fn next_piece(&mut self) -> Result<Option<JoinPiece>, String>;

    /// Who is told of what the backup's copies of disks hold, where it has copies.
    fn digests(&self) -> Option<Arc<dyn TakesDigests>>;
}

/// Takes what a backup says of its copies, on the channel's thread.
pub trait TakesDigests: Send + Sync {
    /// It says this.
    ///
    /// # Errors
    /// Why it cannot be said.
    fn take(&self, digests: DiskDigests) -> Result<(), SendError>;

    /// It says no more.
    fn end(&self);
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
    /// The backup has the whole checkpoint, has said so, and knows the generation: it could go live. Said
    /// again when it has heard of a later generation.
    fn protected(&mut self, backup: BackupKey, protects: Protects);
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

impl Wake for Arc<ThreadWaker> {
    fn wake(&self) {
        ThreadWaker::wake(self);
    }
}

/// How far the primary is with its backups.
#[derive(Debug)]
pub(super) struct State {
    pub(super) backups: Backups<Arc<ThreadWaker>>,
    /// The last entry whose acknowledgement by all the handler has been told of.
    pub(super) told: EntrySequence,
    pub(super) closing: bool,
    pub(super) last_stats: SenderStats,
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
            backups: Backups::new(config.identity.clone(), config.log_start),
            told: config.log_start,
            closing: false,
            last_stats: SenderStats::default(),
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), close: Notify::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// The backups of a channel, for whoever judges them: known before the channel listens.
#[derive(Debug, Clone)]
pub struct Followers(Arc<Shared>);

impl Followers {
    /// Nobody follows yet.
    pub fn new(config: &PrimaryConfig) -> Self {
        Self(Arc::new(Shared::new(config)))
    }

    /// As [`Backups::reopen`].
    pub fn reopen(&self, generation: Generation) {
        self.0.lock().backups.reopen(generation);
    }

    /// As [`Backups::acknowledged`].
    pub fn acknowledged(&self) -> EntrySequence {
        self.0.lock().backups.acknowledged()
    }

    /// As [`Backups::protected_by`].
    pub fn protected_by(&self) -> usize {
        self.0.lock().backups.protected_by()
    }
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
        config: PrimaryConfig,
        handler: impl PrimaryHandler,
    ) -> Result<Self, TransportError> {
        Self::listen_for(Followers::new(&config), config, handler)
    }

    /// The same, where `followers` are those of this channel.
    ///
    /// # Errors
    /// As [`Self::listen`].
    pub fn listen_for(
        followers: Followers,
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
        let Followers(shared) = followers;
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
        self.shared.lock().backups.push(clock::now(), entry)
    }

    /// Sends everything pushed so far without waiting for company.
    pub fn flush(&self) {
        self.shared.lock().backups.flush();
    }

    /// Waits until the log has room, for at most `limit`. To be called before the guest runs on.
    pub fn wait_room(&self, limit: Duration) -> Room {
        let room = |state: &mut State| {
            if state.backups.followers() == 0 {
                Room::NoBackup
            } else if state.backups.senders().any(|sender| sender.is_full()) {
                Room::Full
            } else {
                Room::Available
            }
        };
        self.wait(limit, |state| room(state) == Room::Full, room)
    }

    /// Waits until a backup protects the machine, for at most `limit`; says whether one does.
    pub fn wait_protected(&self, limit: Duration) -> bool {
        let protected = |state: &mut State| state.backups.protected_by() > 0;
        self.wait(limit, |state| !protected(state), protected)
    }

    /// Waits until all backups have every entry pushed so far and the handler has been told so, for
    /// at most `limit`; says whether that is so. The outputs those entries cover are released then.
    pub fn wait_acknowledged(&self, limit: Duration) -> bool {
        self.flush();
        let followed = |state: &State| state.backups.followers() > 0;
        let outstanding = |state: &mut State| followed(state) && state.told < state.backups.last();
        self.wait(limit, outstanding, |state| followed(state) && !outstanding(state))
    }

    fn wait<T>(
        &self,
        limit: Duration,
        waiting: impl FnMut(&mut State) -> bool,
        result: impl FnOnce(&mut State) -> T,
    ) -> T {
        let state = self.shared.lock();
        let (mut state, _) = self.shared.changed.wait_timeout_while(state, limit, waiting);
        result(&mut state)
    }

    /// Leaves all sessions in order: what was pushed is sent, then a goodbye, and the backups are
    /// waited for, for at most `limit`. True if the sessions are over.
    pub fn leave(&self, reason: GoodbyeReason, limit: Duration) -> bool {
        self.shared.lock().backups.leave(&reason);
        let followed = |state: &mut State| state.backups.followers() > 0;
        self.wait(limit, followed, |state| !followed(state))
    }

    /// The primary is of `generation` from now on, and admits backups (again): after a go-live, or
    /// when the generation of a lost backup was won. Those who follow are told.
    pub fn reopen(&self, generation: Generation) {
        self.shared.lock().backups.reopen(generation);
    }

    /// Admits no backup, for a reason that those who ask are told. Sessions go on.
    pub fn close_admission(&self, reason: &str) {
        self.shared.lock().backups.close_admission(reason);
    }

    /// Sessions that have begun: backups that get every entry.
    pub fn followers(&self) -> usize {
        self.shared.lock().backups.followers()
    }

    /// Backups that have the checkpoint, and whose session lasts.
    pub fn joined(&self) -> usize {
        self.shared.lock().backups.joined()
    }

    /// Those among them that could go live if this side were lost now.
    pub fn protected_by(&self) -> usize {
        self.shared.lock().backups.protected_by()
    }

    /// Age of the oldest entry that a backup has not replayed; zero without a session. Much cheaper
    /// than [`Self::stats`].
    pub fn execution_lag(&self) -> Duration {
        let mut state = self.shared.lock();
        let now = clock::now();
        let lags = state.backups.senders().map(|sender| sender.execution_lag(now));
        lags.max().unwrap_or(Duration::ZERO)
    }

    /// Waits until no backup is further behind than `limit`, for at most `patience`; says whether that
    /// is so.
    pub fn wait_lag(&self, limit: Duration, patience: Duration) -> bool {
        let behind = |state: &mut State| {
            let now = clock::now();
            state.backups.senders().any(|sender| sender.execution_lag(now) > limit)
        };
        self.wait(patience, behind, |state| !behind(state))
    }

    /// Goes on without the backups that are further behind than `limit`: they are told goodbye, and
    /// their sessions end with [`EndCause::GivenUp`](super::EndCause::GivenUp) and `why`.
    pub fn give_up_behind(&self, limit: Duration, why: &str) {
        self.shared.lock().backups.give_up_behind(limit, why, clock::now());
    }

    /// Figures of the session with the backup that is furthest behind, or of the last one.
    pub fn stats(&self) -> SenderStats {
        let mut state = self.shared.lock();
        let now = clock::now();
        let last = state.backups.senders().max_by_key(|sender| sender.execution_lag(now));
        last.map(|sender| sender.stats(now)).unwrap_or_else(|| state.last_stats.clone())
    }
}

impl Drop for PrimaryChannel {
    /// Closes the channel. A backup that was not told goodbye takes this for a failure.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        state.backups.wake_all();
        drop(state);
        self.shared.close.notify_one();
        join_thread(self.thread.take());
    }
}
