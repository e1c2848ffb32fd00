//! What happens on the primary's channel thread: whoever connects is heard, backups are served.

use super::connection::Connection;
use super::greeting::{self, Stranger};
use super::listener::{ACCEPT_PAUSE, HeardSocket};
use super::lobby::{Lobby, Visit};
use super::primary::{JoinTicket, PrimaryConfig, PrimaryHandler, Shared};
use super::refusals::Refusals;
use super::session_loop::{self, Effect, SessionSide, Transmit};
use super::set_up;
use super::tls::ServerIdentity;
use super::waker::{ThreadWaker, WakeUps};
use super::{EndCause, SessionEnd, TransportError, Violation, clock};
use crate::backups::{BackupKey, BackupSession, Finished};
use crate::detector::Detector;
use crate::frame::Frame;
use crate::handshake::SessionTerms;
use crate::sender::SenderEvent;
use crate::time::MonotonicTime;
use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Notify;

/// What the tasks of the thread share.
pub(super) struct Context {
    pub(super) config: PrimaryConfig,
    pub(super) shared: Arc<Shared>,
    handler: RefCell<Box<dyn PrimaryHandler>>,
    pub(super) lobby: Rc<Lobby>,
    refusals: RefCell<Refusals>,
    task_ended: Notify,
}

impl Context {
    pub(super) fn new(
        config: PrimaryConfig,
        shared: Arc<Shared>,
        handler: Box<dyn PrimaryHandler>,
    ) -> Self {
        Self {
            config,
            shared,
            handler: RefCell::new(handler),
            lobby: Rc::default(),
            refusals: RefCell::default(),
            task_ended: Notify::new(),
        }
    }
}

/// The thread's main: accepts until the channel is closed.
pub(super) async fn serve(
    config: PrimaryConfig,
    tls: Option<Arc<ServerIdentity>>,
    socket: HeardSocket,
    shared: Arc<Shared>,
    handler: Box<dyn PrimaryHandler>,
) {
    let acceptor = socket.acceptor();
    let context = Rc::new(Context::new(config, shared, handler));
    loop {
        tokio::select! {
            biased;
            () = context.shared.close.notified() => break,
            accepted = acceptor.accept() => match accepted {
                Ok((stream, origin)) => {
                    let stranger = Stranger { stream, origin, tls: tls.clone() };
                    let visit = context.lobby.enter(origin);
                    tokio::task::spawn_local(hear(Rc::clone(&context), stranger, visit));
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

/// Hears one who connected, and serves him if he becomes the backup.
async fn hear(context: Rc<Context>, stranger: Stranger, visit: Visit) {
    let origin = stranger.origin;
    let result = match greeting::hear(&context, stranger, visit).await {
        Ok((connection, terms, place)) => {
            let result = serve_backup(&context, connection, &terms).await;
            drop(place);
            result
        }
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        let untold = context.refusals.borrow_mut().count(clock::now(), &error);
        if let Some(untold) = untold {
            context.handler.borrow_mut().peer_refused(origin, &error, untold);
        }
    }
    context.task_ended.notify_one();
}

/// From the checkpoint to the end of the session. An error is one from before the session was
/// taken up; all later ones are told by `session_ended`.
pub(super) async fn serve_backup(
    context: &Context,
    mut connection: Connection,
    terms: &SessionTerms,
) -> Result<(), TransportError> {
    let side = PrimarySide::enter(context, terms).map_err(TransportError::Thread)?;
    let stream = context.handler.borrow_mut().checkpoint(terms, side.ticket());
    let stream = match stream {
        Ok(stream) => stream,
        Err(reason) => {
            context.shared.lock().backups.finish(side.key, clock::now());
            return Err(TransportError::NoCheckpoint(reason));
        }
    };
    let begun = clock::now();
    let result = match set_up::set_up(context, &side, &mut connection, terms, stream).await {
        Ok(now) => {
            (context.config.on_session)();
            let detector = Detector::new(context.config.detector, now);
            let ended =
                session_loop::run(connection, &side, detector, context.config.on_late).await;
            let _ = side.finish(ended.cause, ended.last_contact);
            Ok(())
        }
        Err(error) => {
            let whole = side.finish(EndCause::NotBegun(error.to_string()), begun);
            if whole {
                let limit = context.config.setup_timeout.min(super::LINGER);
                set_up::turn_away(&mut connection, terms.session, &error, limit).await;
            }
            Err(error)
        }
    };
    context.shared.changed.notify_all();
    result
}

/// The primary's session with one backup, for the loop.
pub(super) struct PrimarySide<'a> {
    context: &'a Context,
    key: BackupKey,
    wake_ups: WakeUps,
}

impl<'a> PrimarySide<'a> {
    /// A backup begins to join.
    fn enter(context: &'a Context, terms: &SessionTerms) -> io::Result<Self> {
        let (waker, wake_ups) = WakeUps::new()?;
        let key = context.shared.lock().backups.enter(terms.session, terms.generation, waker);
        Ok(Self { context, key, wake_ups })
    }

    fn ticket(&self) -> JoinTicket {
        let shared = Arc::clone(&self.context.shared);
        JoinTicket { shared, key: self.key, sender: self.context.config.sender }
    }

    /// Does something with the session, which has begun.
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut BackupSession<Arc<ThreadWaker>>) -> T) -> T {
        let mut state = self.context.shared.lock();
        f(state.backups.session(self.key).expect("begun, and not yet finished"))
    }

    /// Forgets the session and tells the handler. True if the backup may have had the whole checkpoint.
    fn finish(&self, cause: EndCause, last_contact: MonotonicTime) -> bool {
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
        complete
    }

    fn tell_acknowledged(&self) {
        let received = self.context.shared.lock().backups.acknowledged();
        self.context.handler.borrow_mut().acknowledged(received);
        let mut state = self.context.shared.lock();
        state.told = state.told.max(received);
        drop(state);
        self.wake_ups.again();
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

    fn is_watched(&self) -> bool {
        true
    }

    fn wake_ups(&self) -> &WakeUps {
        &self.wake_ups
    }
}
