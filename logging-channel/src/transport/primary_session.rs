//! What happens on the primary's channel thread: strangers are heard, backups are served.

use super::connection::Connection;
use super::primary::{CheckpointStream, JoinTicket, PrimaryConfig, PrimaryHandler, Shared};
use super::session_loop::{self, Effect, SessionSide, Transmit};
use super::{EndCause, SessionEnd, TransportError, Violation, clock, fresh_nonce};
use crate::backups::{BackupKey, BackupSession, Finished};
use crate::checkpoint::PieceKind;
use crate::detector::Detector;
use crate::frame::Frame;
use crate::handshake::{Answered, HandshakeError, SessionTerms};
use crate::sender::SenderEvent;
use crate::session::SessionId;
use crate::time::MonotonicTime;
use rustls::ServerConfig;
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};

/// Most strangers that are heard at a time; more have to wait. Each can hold some hundred
/// kilobytes, for as long as the set-up timeout.
const MAX_STRANGERS: usize = 16;

/// What the tasks of the thread share.
struct Context {
    config: PrimaryConfig,
    tls: Option<Arc<ServerConfig>>,
    shared: Arc<Shared>,
    handler: RefCell<Box<dyn PrimaryHandler>>,
    strangers: Cell<usize>,
    task_ended: Notify,
}

/// The thread's main: accepts until the channel is closed.
pub(super) async fn serve(
    config: PrimaryConfig,
    tls: Option<Arc<ServerConfig>>,
    listener: std::net::TcpListener,
    shared: Arc<Shared>,
    handler: Box<dyn PrimaryHandler>,
) {
    let listener = TcpListener::from_std(listener).expect("a listening socket, non-blocking");
    let context = Rc::new(Context {
        config,
        tls,
        shared,
        handler: RefCell::new(handler),
        strangers: Cell::new(0),
        task_ended: Notify::new(),
    });
    loop {
        let crowded = context.strangers.get() >= MAX_STRANGERS;
        tokio::select! {
            biased;
            () = context.shared.close.notified() => break,
            () = context.task_ended.notified(), if crowded => {}
            accepted = listener.accept(), if !crowded => match accepted {
                Ok((stream, peer)) => {
                    context.strangers.set(context.strangers.get() + 1);
                    tokio::task::spawn_local(hear(Rc::clone(&context), stream, peer));
                }
                // Out of descriptors, or a connection that was gone at once: others may come.
                Err(_) => clock::sleep_until(Some(clock::now().after(ACCEPT_PAUSE))).await,
            },
        }
    }
    // A session ends by itself when the channel closes, and the handler should hear of it.
    let session_ended = async {
        while context.shared.lock().backups.followers() > 0 {
            context.task_ended.notified().await;
        }
    };
    clock::within(super::LINGER, session_ended).await;
}

/// How long not to accept after an error of the socket.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// Hears one who connected, and serves him if he becomes the backup.
async fn hear(context: Rc<Context>, stream: TcpStream, peer: SocketAddr) {
    let greeted = greet(&context, stream).await;
    context.strangers.set(context.strangers.get() - 1);
    context.task_ended.notify_one();
    let result = match greeted {
        Ok((connection, terms, place)) => {
            let result = serve_backup(&context, connection, &terms).await;
            drop(place);
            result
        }
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        context.handler.borrow_mut().peer_refused(peer, &error);
    }
    context.task_ended.notify_one();
}

/// A place for a backup; taken while this lives.
struct Place {
    shared: Arc<Shared>,
}

impl Place {
    fn take(shared: &Arc<Shared>) -> Self {
        shared.lock().backups.take_place();
        Self { shared: Arc::clone(shared) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.lock().backups.leave_place();
    }
}

/// The handshake, from the first byte to the backup's confirmation.
async fn greet(
    context: &Context,
    stream: TcpStream,
) -> Result<(Connection, SessionTerms, Place), TransportError> {
    let limit = context.config.setup_timeout;
    let accepting = Connection::accept(stream, context.tls.clone());
    let timed_out = TransportError::TimedOut { what: "the TLS handshake", limit };
    let mut connection = clock::within(limit, accepting).await.ok_or(timed_out)??;
    let hello = connection.reader.next_frame(limit, "its hello").await;
    let hello = refuse_on_error(&mut connection, context, hello).await?;
    let (answer, place) = {
        let state = context.shared.lock();
        let identity = state.backups.identity().clone();
        let answer = Answered::new(
            &hello,
            identity,
            fresh_nonce(),
            &state.backups.admission(context.config.backups),
        );
        drop(state);
        // No await between looking and taking: nobody else can take the place meanwhile.
        let place = answer.is_ok().then(|| Place::take(&context.shared));
        (answer.map_err(TransportError::from), place)
    };
    let (answered, reply) = refuse_on_error(&mut connection, context, answer).await?;
    let place = place.expect("taken with every good answer");
    let session = answered.session();
    let reply = reply.encode(SessionId::HANDSHAKE)?;
    connection.writer.send(reply, limit, "taking the hello's reply").await?;
    connection.reader.set_session(session);
    let confirm = connection.reader.next_frame(limit, "its confirmation").await;
    let confirm = refuse_on_error(&mut connection, context, confirm).await?;
    let terms = answered.handle_frame(&confirm).map_err(TransportError::from);
    let terms = refuse_on_error(&mut connection, context, terms).await?;
    Ok((connection, terms, place))
}

/// Tells the peer when it is this side that refuses.
async fn refuse_on_error<T>(
    connection: &mut Connection,
    context: &Context,
    result: Result<T, TransportError>,
) -> Result<T, TransportError> {
    if let Err(TransportError::Handshake(HandshakeError::Refused(refusal))) = &result
        && let Ok(frame) = Frame::Refusal(refusal.clone()).encode(SessionId::HANDSHAKE)
    {
        let limit = context.config.setup_timeout;
        // The peer may be gone; that it was refused is what matters here.
        let _ = connection.writer.send(frame, limit, "taking the refusal").await;
        let _ = connection.writer.shutdown().await;
        let _ = clock::within(limit.min(super::LINGER), drain(connection)).await;
    }
    result
}

/// Reads until the peer closes, so that it is not cut off before it has read.
async fn drain(connection: &mut Connection) {
    while matches!(connection.reader.fill().await, Ok(true)) {}
}

/// From the checkpoint to the end of the session. An error is one from before the session was
/// taken up; all later ones are told by `session_ended`.
async fn serve_backup(
    context: &Context,
    mut connection: Connection,
    terms: &SessionTerms,
) -> Result<(), TransportError> {
    let side = PrimarySide::enter(context, terms);
    let stream = context.handler.borrow_mut().checkpoint(terms, side.ticket());
    let stream = match stream {
        Ok(stream) => stream,
        Err(reason) => {
            context.shared.lock().backups.finish(side.key, clock::now());
            return Err(TransportError::NoCheckpoint(reason));
        }
    };
    let begun = clock::now();
    let set_up = set_up(context, &side, &mut connection, terms.session, stream).await;
    let result = match set_up {
        Ok(now) => {
            let detector = Detector::new(context.config.detector, now);
            let ended = session_loop::run(connection, &side, detector).await;
            side.finish(ended.cause, ended.last_contact);
            Ok(())
        }
        Err(error) => {
            side.finish(EndCause::NotBegun(error.to_string()), begun);
            Err(error)
        }
    };
    context.shared.changed.notify_all();
    result
}

/// Sealed pieces that may wait between the thread that packs and the one that sends: both have
/// something to do then.
const PIECES_AHEAD: usize = 4;

/// A piece ready to be sent, and whether it is the last.
type Sealed = Result<(Vec<u8>, bool), TransportError>;

/// Packs the pieces of a checkpoint on a thread of its own. The stream is dropped when it is over,
/// or when nobody takes its pieces any more.
fn pack(
    mut stream: Box<dyn CheckpointStream>,
    session: SessionId,
) -> Result<mpsc::Receiver<Sealed>, TransportError> {
    let (give, pieces) = mpsc::channel(PIECES_AHEAD);
    let pack = move || {
        loop {
            let sealed = match stream.next_piece() {
                Ok(None) => return,
                Err(reason) => Err(TransportError::NoCheckpoint(reason)),
                Ok(Some(piece)) => {
                    let last = piece.kind() == PieceKind::End;
                    let frame = Frame::Checkpoint(piece).encode(session);
                    frame.map(|frame| (frame.seal(), last)).map_err(TransportError::from)
                }
            };
            let failed = sealed.is_err();
            if give.blocking_send(sealed).is_err() || failed {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("vmft-join".to_owned());
    thread.spawn(pack).map_err(TransportError::Thread)?;
    Ok(pieces)
}

/// Sends the checkpoint and waits until the backup has it.
async fn set_up(
    context: &Context,
    side: &PrimarySide<'_>,
    connection: &mut Connection,
    session: SessionId,
    stream: Box<dyn CheckpointStream>,
) -> Result<MonotonicTime, TransportError> {
    let limit = context.config.setup_timeout;
    let mut pieces = pack(stream, session)?;
    let mut complete = false;
    while let Some(piece) = pieces.recv().await {
        let (bytes, last) = piece?;
        if context.shared.lock().closing {
            return Err(TransportError::Closed { what: "the checkpoint" });
        }
        if last {
            side.with(BackupSession::complete);
            complete = true;
        }
        connection.writer.send_bytes(&bytes, limit, "taking the checkpoint").await?;
    }
    if !complete {
        return Err(TransportError::NoCheckpoint("the machine has stopped".to_owned()));
    }
    loop {
        let frame = connection.reader.next_frame(limit, "accepting the checkpoint").await?;
        let accepted = matches!(frame, Frame::Acknowledge(_));
        let now = clock::now();
        if accepted {
            side.with(BackupSession::accepted);
        }
        if let Effect::Departed(reason) = side.handle_frame(now, frame)? {
            return Err(TransportError::Departed(reason));
        }
        if accepted {
            context.shared.changed.notify_all();
            return Ok(now);
        }
    }
}

/// The primary's session with one backup, for the loop.
struct PrimarySide<'a> {
    context: &'a Context,
    key: BackupKey,
    wake: Arc<Notify>,
}

impl<'a> PrimarySide<'a> {
    /// A backup begins to join.
    fn enter(context: &'a Context, terms: &SessionTerms) -> Self {
        let wake = Arc::new(Notify::new());
        let key =
            context.shared.lock().backups.enter(terms.session, terms.generation, Arc::clone(&wake));
        Self { context, key, wake }
    }

    fn ticket(&self) -> JoinTicket {
        let shared = Arc::clone(&self.context.shared);
        JoinTicket { shared, key: self.key, sender: self.context.config.sender }
    }

    /// Does something with the session, which has begun.
    fn with<T>(&self, f: impl FnOnce(&mut BackupSession<Arc<Notify>>) -> T) -> T {
        let mut state = self.context.shared.lock();
        f(state.backups.session(self.key).expect("begun, and not yet finished"))
    }

    /// Forgets the session and tells the handler.
    fn finish(&self, cause: EndCause, last_contact: MonotonicTime) {
        let ended_at = clock::now();
        let mut state = self.context.shared.lock();
        let Finished { complete, given_up, others, stats } =
            state.backups.finish(self.key, ended_at);
        let cause = given_up.map_or(cause, EndCause::GivenUp);
        if let Some(stats) = stats {
            state.last_stats = stats;
        }
        drop(state);
        self.context.shared.changed.notify_all();
        let end = SessionEnd {
            cause,
            last_contact,
            ended_at,
            protected: complete,
            backup: Some(self.key),
            others,
        };
        self.context.handler.borrow_mut().session_ended(&end);
    }

    fn tell_acknowledged(&self) {
        let received = self.context.shared.lock().backups.acknowledged();
        self.context.handler.borrow_mut().acknowledged(received);
        let mut state = self.context.shared.lock();
        state.told = state.told.max(received);
        drop(state);
        self.wake.notify_one();
    }
}

impl SessionSide for PrimarySide<'_> {
    fn handle_frame(&self, now: MonotonicTime, frame: Frame) -> Result<Effect, Violation> {
        let event = self.with(|session| session.sender().handle_frame(now, &frame))?;
        let effect = match event {
            SenderEvent::Heartbeat => Effect::Continue,
            SenderEvent::Acknowledged(_) => {
                self.tell_acknowledged();
                Effect::Continue
            }
            SenderEvent::Departed(reason) => Effect::Departed(reason),
        };
        if let Some(protects) = self.with(BackupSession::poll_protects) {
            self.context.shared.changed.notify_all();
            self.context.handler.borrow_mut().protected(self.key, protects);
        }
        Ok(effect)
    }

    fn frames_handled(&self) {
        self.context.shared.changed.notify_all();
    }

    fn poll_transmit(&self, now: MonotonicTime) -> Result<Transmit, Violation> {
        if self.context.shared.lock().closing {
            return Ok(Transmit::Abandoned);
        }
        self.with(|session| {
            let sender = session.sender();
            sender.handle_timeout(now)?;
            Ok(match sender.poll_transmit(now) {
                Some(frame) => Transmit::Frame(frame),
                None if sender.has_ended() => Transmit::Finished,
                None => Transmit::Wait(sender.poll_timeout()),
            })
        })
    }

    fn frame_sent(&self, bytes: Vec<u8>) {
        self.with(|session| session.sender().recycle(bytes));
        self.context.shared.changed.notify_all();
    }

    fn wake(&self) -> &Notify {
        &self.wake
    }
}
