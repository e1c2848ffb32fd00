//! The primary's end of the channel: listens for a backup, and takes the guest's entries.

use super::primary_session::serve;
use super::{
    DEFAULT_SETUP_TIMEOUT, Listener, PeerAddress, SessionEnd, TransportError, clock, join_thread,
    spawn_thread,
};
use crate::checkpoint::CheckpointSource;
use crate::detector::DetectorConfig;
use crate::entry::{Entry, EntrySequence, Generation};
use crate::fingerprint::Identity;
use crate::handshake::{Admission, SessionTerms};
use crate::sender::{PushError, Sender, SenderConfig, SenderStats};
use crate::session::{Acknowledge, GoodbyeReason, clip_text};
use std::net::SocketAddr;
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
    /// How long each step before the session may take.
    pub setup_timeout: Duration,
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
        }
    }
}

/// What the channel tells the primary, on the channel's thread: nothing else happens there
/// meanwhile, so every call but [`Self::checkpoint`] should be brief. No lock is held.
pub trait PrimaryHandler: Send + 'static {
    /// A backup has shaken hands: where it is to start. A running guest must be stopped at the
    /// checkpoint's point, until [`Self::started`].
    ///
    /// # Errors
    /// A text that is reported as the reason for not going on with this backup.
    fn checkpoint(
        &mut self,
        terms: &SessionTerms,
    ) -> Result<Box<dyn CheckpointSource + Send>, String>;
    /// From here on entries are taken, the first for the point of the checkpoint. The checkpoint
    /// is still to be sent.
    fn started(&mut self);
    /// The backup has the whole checkpoint: the machine is protected.
    fn protected(&mut self);
    /// The backup has received more entries: the outputs they cover may be released now.
    fn acknowledged(&mut self, acknowledge: &Acknowledge);
    /// The session is over, and entries are not taken any more. If the machine was protected, no
    /// other backup is admitted until [`PrimaryChannel::reopen`].
    fn session_ended(&mut self, end: &SessionEnd);
    /// Somebody who connected got no session (or, after [`Self::session_ended`] of an unprotected
    /// session, did not get as far as the log). The primary goes on listening.
    fn peer_refused(&mut self, peer: SocketAddr, error: &TransportError);
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

/// How far the primary is with its backup.
#[derive(Debug)]
pub(super) struct State {
    pub(super) identity: Identity,
    /// Why no backup is wanted, if none is.
    pub(super) closed_because: Option<String>,
    /// One is being served or about to be.
    pub(super) occupied: bool,
    pub(super) sender: Option<Sender>,
    /// The last entry of this session whose acknowledgement the handler has been told of.
    pub(super) told: EntrySequence,
    pub(super) protected: bool,
    pub(super) closing: bool,
    pub(super) last_stats: SenderStats,
}

impl State {
    /// A session begins.
    pub(super) fn begin(&mut self, sender: Sender) {
        self.sender = Some(sender);
        self.told = EntrySequence(0);
    }

    /// What a backup that asks is to be told.
    pub(super) fn admission(&self) -> Admission {
        match &self.closed_because {
            _ if self.occupied => Admission::HasBackup,
            Some(reason) => Admission::Closed(reason.clone()),
            None => Admission::Open,
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Something changed that a thread may wait for.
    pub(super) changed: Condvar,
    /// There is something to send.
    pub(super) wake: Notify,
    /// The channel closes.
    pub(super) close: Notify,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the channel's lock")
    }
}

/// The primary's end of the channel. Methods may be called from any thread.
#[derive(Debug)]
pub struct PrimaryChannel {
    shared: Arc<Shared>,
    local_address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl PrimaryChannel {
    /// Begins to listen. The first backup is welcome.
    ///
    /// # Errors
    /// [`TransportError::Listen`] if the address is in use or not ours, [`TransportError::Tls`],
    /// [`TransportError::Thread`].
    pub fn listen(
        mut config: PrimaryConfig,
        handler: impl PrimaryHandler,
    ) -> Result<Self, TransportError> {
        let listener = match config.listener.take() {
            Some(listener) => listener,
            None => Arc::new(Listener::bind(&config.listen)?),
        };
        let local_address = listener.local_address();
        let tls = listener.tls.clone();
        let socket = listener
            .socket()
            .map_err(|source| TransportError::Listen { address: config.listen.clone(), source })?;
        drop(listener);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                identity: config.identity.clone(),
                closed_because: None,
                occupied: false,
                sender: None,
                told: EntrySequence(0),
                protected: false,
                closing: false,
                last_stats: SenderStats::default(),
            }),
            changed: Condvar::new(),
            wake: Notify::new(),
            close: Notify::new(),
        });
        let theirs = Arc::clone(&shared);
        let thread = spawn_thread("vmft-primary", move || {
            serve(config, tls, socket, theirs, Box::new(handler))
        })?;
        Ok(Self { shared, local_address, thread: Some(thread) })
    }

    /// Where it listens.
    pub const fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// Puts an entry into the log and returns its place. Takes well below a microsecond, and waits
    /// for nothing; an output mark or a stop is on its way at once.
    ///
    /// # Errors
    /// [`PrimaryPushError`]; the log is unchanged.
    pub fn push(&self, entry: &Entry) -> Result<EntrySequence, PrimaryPushError> {
        let now = clock::now();
        let mut state = self.shared.lock();
        let sender = state.sender.as_mut().ok_or(PrimaryPushError::NoBackup)?;
        let (was_empty, was_due) = (sender.is_empty(), sender.has_due_entries());
        let sequence = sender.push(now, entry)?;
        // The channel's thread must set its timer for the first entry of a batch, and send what is
        // due; for others it need not be woken.
        let wake = was_empty || (!was_due && sender.has_due_entries());
        drop(state);
        if wake {
            self.shared.wake.notify_one();
        }
        Ok(sequence)
    }

    /// Sends everything pushed so far without waiting for company.
    pub fn flush(&self) {
        let mut state = self.shared.lock();
        let Some(sender) = state.sender.as_mut() else { return };
        let was_due = sender.has_due_entries();
        sender.flush();
        // Whoever pushed what was due already has woken the channel's thread.
        let wake = !was_due && sender.has_due_entries();
        drop(state);
        if wake {
            self.shared.wake.notify_one();
        }
    }

    /// Waits until the log has room, for at most `limit`. To be called before the guest runs on.
    pub fn wait_room(&self, limit: Duration) -> Room {
        let room = |state: &mut State| match &state.sender {
            None => Room::NoBackup,
            Some(sender) if sender.is_full() => Room::Full,
            Some(_) => Room::Available,
        };
        self.wait(limit, |state| room(state) == Room::Full, room)
    }

    /// Waits until the machine is protected, for at most `limit`; says whether it is.
    pub fn wait_protected(&self, limit: Duration) -> bool {
        self.wait(limit, |state| !state.protected, |state| state.protected)
    }

    /// Waits until the backup has every entry pushed so far and the handler has been told so, for at
    /// most `limit`; says whether that is so. The outputs those entries cover are released then.
    pub fn wait_acknowledged(&self, limit: Duration) -> bool {
        self.flush();
        let outstanding = |state: &mut State| {
            state.sender.as_ref().is_some_and(|sender| state.told < sender.pushed())
        };
        self.wait(limit, outstanding, |state| state.sender.is_some() && !outstanding(state))
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

    /// Leaves the session in order: what was pushed is sent, then a goodbye, and the backup is
    /// waited for, for at most `limit`. True if the session is over.
    pub fn leave(&self, reason: GoodbyeReason, limit: Duration) -> bool {
        if let Some(sender) = self.shared.lock().sender.as_mut() {
            sender.leave(reason);
        }
        self.shared.wake.notify_one();
        self.wait(limit, |state| state.sender.is_some(), |state| state.sender.is_none())
    }

    /// Admits a backup again, in `generation`: after a go-live, or when the lost backup's
    /// generation was won.
    pub fn reopen(&self, generation: Generation) {
        let mut state = self.shared.lock();
        state.identity.generation = generation;
        state.closed_because = None;
    }

    /// Admits no backup, for a reason that those who ask are told. A session goes on.
    pub fn close_admission(&self, reason: &str) {
        self.shared.lock().closed_because = Some(clip_text(reason.to_owned()));
    }

    /// True while a backup has the checkpoint and the session lasts.
    pub fn is_protected(&self) -> bool {
        self.shared.lock().protected
    }

    /// Age of the oldest entry that the backup has not replayed; zero without a session. Much cheaper
    /// than [`Self::stats`].
    pub fn execution_lag(&self) -> Duration {
        let state = self.shared.lock();
        state.sender.as_ref().map_or(Duration::ZERO, |sender| sender.execution_lag(clock::now()))
    }

    /// Figures of the session, or of the last one.
    pub fn stats(&self) -> SenderStats {
        let state = self.shared.lock();
        match &state.sender {
            Some(sender) => sender.stats(clock::now()),
            None => state.last_stats.clone(),
        }
    }
}

impl Drop for PrimaryChannel {
    /// Closes the channel. A backup that was not told goodbye takes this for a failure.
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.notify_one();
        self.shared.close.notify_one();
        join_thread(self.thread.take());
    }
}
