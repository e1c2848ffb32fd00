//! The backup's end of the channel: joins a primary, and hands out its entries.

use super::clock::Wait;
use super::connection::Connection;
use super::session_loop::{self, Effect, SessionSide, Transmit};
use super::waker::{ThreadWaker, WakeUps};
use super::{
    DEFAULT_SETUP_TIMEOUT, PROGRESS_EVERY, PeerAddress, SessionEnd, TransportError, Violation,
    clock, fresh_nonce, join_thread, spawn_thread, tls,
};
use crate::detector::{Detector, DetectorConfig};
use crate::fingerprint::Identity;
use crate::frame::Frame;
use crate::handshake::{HandshakeError, Offered, SessionTerms};
use crate::receiver::{ReceiveError, Receiver, ReceiverConfig, ReceiverEvent, ReceiverStats};
use crate::session::{GoodbyeReason, Progress, SessionId};
use crate::time::MonotonicTime;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use vmft_log::checkpoint::{CheckpointError, CheckpointReader, CompleteCheckpoint, JoinSink};
use vmft_log::entry::{Entry, EntrySequence, Generation};
use vmft_log::point::ExecutionPoint;
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// How often a backup's own storage is looked at while it is waited for.
const STORAGE_POLL: Duration = Duration::from_millis(2);

/// What a backup's channel is to be.
#[derive(Debug, Clone)]
pub struct BackupConfig {
    /// Where the primary listens.
    pub primary: PeerAddress,
    /// Whom the primary must match; the generation is the last one this side knows of.
    pub identity: Identity,
    /// How much is buffered, and (in tests) how late it is acknowledged.
    pub receiver: ReceiverConfig,
    /// When the primary is suspected. Its heartbeat interval is for both sides.
    pub detector: DetectorConfig,
    /// How long the greeting may take, and a checkpoint stand still.
    pub setup_timeout: Duration,
    /// Called on the channel's thread when the session begins: it may give the thread priority.
    pub on_session: fn(),
    /// Called on the channel's thread when it was so late with what was due, heartbeats among it, that with as
    /// much again the other side would suspect this one.
    pub on_late: fn(Duration),
}

impl BackupConfig {
    /// The defaults.
    pub fn new(primary: PeerAddress, identity: Identity) -> Self {
        Self {
            primary,
            identity,
            receiver: ReceiverConfig::default(),
            detector: DetectorConfig::default(),
            setup_timeout: DEFAULT_SETUP_TIMEOUT,
            on_session: || (),
            on_late: |_| (),
        }
    }
}

/// A backup that has joined its primary.
#[derive(Debug)]
pub struct Joined<S> {
    /// The channel; the log has begun.
    pub channel: BackupChannel,
    /// What was agreed.
    pub terms: SessionTerms,
    /// The state to start from.
    pub checkpoint: CompleteCheckpoint,
    /// The sink, with the memory to start from.
    pub sink: S,
}

/// What [`BackupChannel::recv`] brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// The next entry.
    Entry(EntrySequence, Entry),
    /// There are no more entries, and none will come.
    Ended(SessionEnd),
    /// Nothing came in the time given.
    TimedOut,
}

#[derive(Debug)]
struct State {
    receiver: Receiver,
    /// The primary's generation.
    generation: Generation,
    /// It has said something since its checkpoint.
    heard: bool,
    end: Option<SessionEnd>,
    closing: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Entries came, or the end.
    changed: Condvar,
    /// There is something to send.
    waker: Arc<ThreadWaker>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// The backup's end of the channel. Methods may be called from any thread.
#[derive(Debug)]
pub struct BackupChannel {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the channel's thread has to tell before the session.
type JoinResult<S> = Result<(Arc<Shared>, SessionTerms, CompleteCheckpoint, S), TransportError>;

impl BackupChannel {
    /// Joins the primary: connects, shakes hands, and receives the checkpoint, whose memory goes to
    /// `sink`. Blocks until then.
    ///
    /// # Errors
    /// [`TransportError`]; the sink is dropped.
    pub fn join<S: JoinSink + Send + 'static>(
        config: BackupConfig,
        sink: S,
    ) -> Result<Joined<S>, TransportError> {
        let (tell, told) = mpsc::sync_channel(1);
        let thread = spawn_thread("vmft-backup", move || follow(config, sink, tell))?;
        match told.recv().expect("the thread tells before it ends") {
            Ok((shared, terms, checkpoint, sink)) => {
                let channel = Self { shared, thread: Some(thread) };
                Ok(Joined { channel, terms, checkpoint, sink })
            }
            Err(error) => {
                // It has nothing left to do.
                let _ = thread.join();
                Err(error)
            }
        }
    }

    /// The next entry, in order. What was received before the session ended is delivered first.
    /// Waits for at most `limit`.
    pub fn recv(&self, limit: Duration) -> Delivery {
        let state = self.shared.lock();
        let nothing = |state: &mut State| {
            state.end.is_none() && state.receiver.delivered() == state.receiver.received()
        };
        let (mut state, _) = self.shared.changed.wait_timeout_while(state, limit, nothing);
        let was_due = state.receiver.has_due_acknowledgement();
        if let Some((sequence, entry)) = state.receiver.poll_entry() {
            if !was_due && state.receiver.has_due_acknowledgement() {
                self.shared.waker.wake();
            }
            return Delivery::Entry(sequence, entry);
        }
        state.end.clone().map_or(Delivery::TimedOut, Delivery::Ended)
    }

    /// As [`Receiver::skip_to_checkpoint`]; with what was passed over comes the number of the last entry
    /// handed out.
    pub fn skip_to_checkpoint(
        &self,
        may: impl FnOnce(&[u8]) -> bool,
    ) -> Option<(EntrySequence, Vec<Entry>)> {
        let mut state = self.shared.lock();
        let was_due = state.receiver.has_due_acknowledgement();
        let skipped = state.receiver.skip_to_checkpoint(may)?;
        if !was_due && state.receiver.has_due_acknowledgement() {
            self.shared.waker.wake();
        }
        Some((state.receiver.delivered(), skipped))
    }

    /// Says that every entry up to `entry` was replayed, and where the guest is.
    ///
    /// # Panics
    /// As [`Receiver::report_applied`].
    pub fn report_applied(&self, entry: EntrySequence, point: ExecutionPoint) {
        self.shared.lock().receiver.report_applied(entry, point);
    }

    /// How the session ended, if it has. Entries may be left to take.
    pub fn end(&self) -> Option<SessionEnd> {
        self.shared.lock().end.clone()
    }

    /// Waits until the session has ended, for at most `limit`; says whether it has.
    pub fn wait_end(&self, limit: Duration) -> bool {
        let state = self.shared.lock();
        let (state, _) =
            self.shared.changed.wait_timeout_while(state, limit, |state| state.end.is_none());
        state.end.is_some()
    }

    /// True when the primary has said goodbye. A session that ended by a `Stop` entry and a closed
    /// connection ended in order too, but without one.
    pub fn peer_has_left(&self) -> bool {
        self.shared.lock().receiver.peer_has_left()
    }

    /// The primary's generation, as last heard.
    pub fn generation(&self) -> Generation {
        self.shared.lock().generation
    }

    /// True if the primary has said something since its checkpoint: it may count on this side.
    pub fn has_heard(&self) -> bool {
        self.shared.lock().heard
    }

    /// The last entry in memory.
    pub fn received(&self) -> EntrySequence {
        self.shared.lock().receiver.received()
    }

    /// Leaves the session in order, with a goodbye, and waits for its end for at most `limit`.
    /// True if it is over.
    pub fn leave(&self, reason: GoodbyeReason, limit: Duration) -> bool {
        self.shared.lock().receiver.leave(reason);
        self.shared.waker.wake();
        self.wait_end(limit)
    }

    /// Figures of the session.
    pub fn stats(&self) -> ReceiverStats {
        self.shared.lock().receiver.stats()
    }
}

impl Drop for BackupChannel {
    /// Closes the channel. A primary that was not told goodbye takes this for a failure.
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.waker.wake();
        join_thread(self.thread.take());
    }
}

/// The thread's main: joins, tells, and carries the session.
async fn follow<S: JoinSink>(
    config: BackupConfig,
    mut sink: S,
    tell: mpsc::SyncSender<JoinResult<S>>,
) {
    let joined = join(&config, &mut sink).await.and_then(|joined| {
        let (waker, wake_ups) = WakeUps::new().map_err(TransportError::Thread)?;
        Ok((joined, waker, wake_ups))
    });
    let ((connection, terms, checkpoint), waker, wake_ups) = match joined {
        Ok(joined) => joined,
        Err(error) => {
            // If nobody listens any more, nobody needs it.
            let _ = tell.send(Err(error));
            return;
        }
    };
    let (begun, generation) = (clock::now(), terms.generation);
    let receiver = Receiver::new(config.receiver, terms.session, checkpoint.position, begun);
    let shared = Arc::new(Shared {
        state: Mutex::new(State { receiver, generation, heard: false, end: None, closing: false }),
        changed: Condvar::new(),
        waker,
    });
    if tell.send(Ok((Arc::clone(&shared), terms, checkpoint, sink))).is_err() {
        return;
    }
    let side = BackupSide { shared: &shared, wake_ups };
    (config.on_session)();
    let detector = Detector::new(config.detector, begun);
    let session_loop::Ended { cause, last_contact } =
        session_loop::run(connection, &side, detector, config.on_late).await;
    let ended_at = clock::now();
    let end =
        SessionEnd { cause, last_contact, ended_at, protected: true, backup: None, others: 0 };
    shared.lock().end = Some(end);
    shared.changed.notify_all();
}

/// Everything before the session.
async fn join(
    config: &BackupConfig,
    sink: &mut dyn JoinSink,
) -> Result<(Connection, SessionTerms, CompleteCheckpoint), TransportError> {
    let limit = config.setup_timeout;
    let timed_out = TransportError::TimedOut { what: "its greeting", limit };
    let greeted = clock::within(limit, greet(config)).await;
    let (mut connection, terms) = greeted.unwrap_or(Err(timed_out))?;
    let checkpoint = take_checkpoint(&mut connection, terms.session, sink, limit).await?;
    Ok((connection, terms, checkpoint))
}

/// Takes the pieces as they come, and says how many while it works and while it waits. The primary has
/// `limit` to say something.
pub(super) async fn take_checkpoint(
    connection: &mut Connection,
    session: SessionId,
    sink: &mut dyn JoinSink,
    limit: Duration,
) -> Result<CompleteCheckpoint, TransportError> {
    let (what, every) = ("the checkpoint", PROGRESS_EVERY.min(limit / 4));
    let mut reader = CheckpointReader::new();
    let (mut heard, mut said, mut taken) = (Wait::begin(), Wait::begin(), Progress { pieces: 0 });
    let mut complete: Option<CompleteCheckpoint> = None;
    loop {
        if said.left(every).is_zero() {
            let frame = Frame::Progress(taken).encode(session)?;
            connection.writer.send(frame, limit, "hearing of the join's progress").await?;
            said = Wait::begin();
        }
        let disks = sink.poll_disks().map_err(CheckpointError::Sink)?;
        if let Some(digests) = disks.digests {
            let frame = Frame::DiskDigests(digests).encode(session)?;
            connection.writer.send(frame, limit, "hearing what its disks hold").await?;
        }
        if let Some(checkpoint) = complete.take_if(|_| disks.is_settled) {
            sink.ready(&checkpoint).map_err(CheckpointError::Sink)?;
            return Ok(checkpoint);
        }
        if complete.is_some() || !disks.has_room {
            // Its own storage is what is waited for.
            Wait::begin().over(STORAGE_POLL).await;
            heard = Wait::begin();
            continue;
        }
        let frame = connection.reader.buffered_frame().map_err(TransportError::from_frame_error)?;
        let piece = match frame {
            Some(Frame::Checkpoint(piece)) => piece,
            Some(Frame::Disk(piece)) => {
                taken.pieces += 1;
                sink.disk(piece).map_err(CheckpointError::Sink)?;
                continue;
            }
            Some(Frame::Progress(_)) => continue,
            Some(Frame::Goodbye(reason)) => return Err(TransportError::Departed(reason)),
            Some(other) => {
                return Err(Violation::from(ReceiveError::Unexpected(other.kind())).into());
            }
            None => {
                let due = said.left(every);
                let due = if disks.is_settled { due } else { due.min(STORAGE_POLL) };
                tokio::select! {
                    biased;
                    filled = connection.reader.fill() => {
                        if !filled? {
                            return Err(TransportError::Closed { what });
                        }
                        heard = Wait::begin();
                    }
                    () = Wait::begin().over(due) => {}
                    () = heard.over(limit) => return Err(TransportError::TimedOut { what, limit }),
                }
                continue;
            }
        };
        taken.pieces += 1;
        complete = reader.handle_piece(piece, sink)?;
    }
}

/// The handshake, from connecting to the confirmation.
async fn greet(config: &BackupConfig) -> Result<(Connection, SessionTerms), TransportError> {
    let limit = config.setup_timeout;
    let mut connection = connect(config).await.map_err(|source| match source {
        exposed @ TransportError::Exposed { .. } => exposed,
        source => {
            TransportError::Connect { address: config.primary.clone(), source: Box::new(source) }
        }
    })?;
    let (offered, hello) = Offered::new(config.identity.clone(), fresh_nonce());
    let hello = hello.encode(SessionId::HANDSHAKE)?;
    connection.writer.send(hello, limit, "taking the hello").await?;
    let reply = connection.reader.next_frame(limit, "its reply to the hello").await?;
    let (terms, confirm) = match offered.handle_frame(&reply) {
        Ok(agreed) => agreed,
        Err(HandshakeError::Refused(refusal)) => {
            let trusted = config.primary.tls_dir.is_some();
            let told = if trusted { refusal.clone() } else { refusal.to_a_stranger() };
            let frame = Frame::Refusal(told).encode(SessionId::HANDSHAKE)?;
            // The primary may be gone; that it was refused is what matters here.
            let _ = connection.writer.send(frame, limit, "taking the refusal").await;
            return Err(HandshakeError::Refused(refusal).into());
        }
        Err(error) => return Err(error.into()),
    };
    connection.reader.set_session(terms.session);
    let confirm = confirm.encode(terms.session)?;
    connection.writer.send(confirm, limit, "taking the confirmation").await?;
    Ok((connection, terms))
}

async fn connect(config: &BackupConfig) -> Result<Connection, TransportError> {
    let place = config.primary.resolve()?;
    let tls = config.primary.tls_dir.as_deref().map(tls::client_config).transpose()?;
    let limit = config.setup_timeout;
    let timed_out = TransportError::TimedOut { what: "the connection", limit };
    clock::within(limit, Connection::connect(&place, tls)).await.ok_or(timed_out)?
}

/// The backup's session, for the loop.
struct BackupSide<'a> {
    shared: &'a Shared,
    wake_ups: WakeUps,
}

impl SessionSide for BackupSide<'_> {
    fn handle_frame(&self, now: MonotonicTime, frame: Frame) -> Result<Effect, Violation> {
        let mut state = self.shared.lock();
        let event = state.receiver.handle_frame(now, frame)?;
        state.heard = true;
        drop(state);
        Ok(match event {
            ReceiverEvent::Heartbeat => Effect::Continue,
            ReceiverEvent::Entries { stop, .. } => {
                self.wake_ups.again();
                if stop.is_some() { Effect::Stopped } else { Effect::Continue }
            }
            ReceiverEvent::Reign(generation) => {
                let mut state = self.shared.lock();
                state.generation = state.generation.max(generation);
                Effect::Continue
            }
            ReceiverEvent::Departed(reason) => Effect::Departed(reason),
        })
    }

    fn frames_handled(&self) {
        self.shared.changed.notify_all();
    }

    fn poll_transmit(&self, now: MonotonicTime) -> Result<Transmit, Violation> {
        let mut state = self.shared.lock();
        if state.closing {
            return Ok(Transmit::Abandoned);
        }
        Ok(match state.receiver.poll_transmit(now) {
            Some(frame) => Transmit::Frame(frame),
            None if state.receiver.has_ended() => Transmit::Finished,
            None => Transmit::Wait(state.receiver.poll_timeout()),
        })
    }

    fn frame_sent(&self, _bytes: Vec<u8>) {}

    fn is_watched(&self) -> bool {
        false
    }

    fn wake_ups(&self) -> &WakeUps {
        &self.wake_ups
    }
}
