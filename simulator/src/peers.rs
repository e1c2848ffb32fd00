//! Those who have connected to a live side: greeted, sent a checkpoint, served.

use crate::live::{DETECTOR, LINGER, SETUP};
use crate::models::{End, Message};
use crate::side::{Live, Peer, Phase};
use crate::world::World;
use std::time::Duration;
use vmft_backup::reign::LiveEvent;
use vmft_logging_channel::backups::{Finished, Protects};
use vmft_logging_channel::detector::{Detector, Verdict};
use vmft_logging_channel::frame::Frame;
use vmft_logging_channel::handshake::{Answered, HandshakeError, Nonce};
use vmft_logging_channel::sender::SenderEvent;
use vmft_logging_channel::session::{GoodbyeReason, SessionId};
use vmft_logging_channel::time::MonotonicTime;
use vmft_logging_channel::transport::EndCause;

impl World {
    /// What has come from one who has connected, and whether the session is over.
    pub(crate) fn run_peer(
        &mut self,
        side: usize,
        live: &mut Live,
        index: usize,
    ) -> Option<EndCause> {
        let connection = live.peers[index].connection;
        while let Some(message) = self.receive(connection, End::Primary) {
            match message {
                Message::Frame(bytes) => {
                    live.peers[index].decoder.feed(&bytes);
                }
                Message::Closed => {
                    let cause = self.take_frames(side, live, index);
                    let peer = &mut live.peers[index];
                    return cause.or_else(|| match &mut peer.phase {
                        _ if peer.left_at.is_some() => Some(EndCause::Left),
                        Phase::Session(detector) => of_verdict(detector.handle_closed()),
                        _ => Some(EndCause::NotBegun("closed".to_owned())),
                    });
                }
                Message::Checkpoint(..) => unreachable!("a backup sends no checkpoint"),
            }
        }
        if let Some(cause) = self.take_frames(side, live, index) {
            return Some(cause);
        }
        let now = self.local(side);
        let peer = &mut live.peers[index];
        if peer.left_at.is_some_and(|at| now >= at.after(LINGER)) {
            return Some(EndCause::Left);
        }
        match &mut peer.phase {
            Phase::Session(detector) => of_verdict(detector.handle_timeout(now)),
            Phase::Rest(until, content, position) if *until <= now => {
                let checkpoint = Message::Checkpoint(content.clone(), *position);
                peer.phase = Phase::Accepting;
                peer.deadline = now.after(SETUP);
                let key = peer.key.expect("it has shaken hands");
                live.backups.session(key).expect("its log has begun").complete();
                self.send(connection, End::Primary, checkpoint);
                None
            }
            _ if now >= peer.deadline => Some(EndCause::NotBegun("too slow".to_owned())),
            _ => None,
        }
    }

    fn take_frames(&mut self, side: usize, live: &mut Live, index: usize) -> Option<EndCause> {
        loop {
            // While a checkpoint is sent, nothing is read.
            if matches!(live.peers[index].phase, Phase::Sending(_) | Phase::Rest(..)) {
                return None;
            }
            let frame = match live.peers[index].decoder.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return None,
                Err(error) => return Some(EndCause::Violation(error.into())),
            };
            let cause = match live.peers[index].phase {
                Phase::Hello | Phase::Confirm(_) => self.greet(side, live, index, &frame),
                _ => self.take_session_frame(side, live, index, &frame),
            };
            if cause.is_some() {
                return cause;
            }
        }
    }

    fn greet(
        &mut self,
        side: usize,
        live: &mut Live,
        index: usize,
        frame: &Frame,
    ) -> Option<EndCause> {
        let (now, connection) = (self.local(side), live.peers[index].connection);
        let peer = &mut live.peers[index];
        match std::mem::replace(&mut peer.phase, Phase::Hello) {
            Phase::Hello => {
                let nonce = self.nonce();
                let admission = live.backups.admission(self.plan.backups);
                let identity = live.backups.identity().clone();
                match Answered::new(frame, identity, nonce, &admission) {
                    Ok((answered, reply)) => {
                        live.backups.take_place();
                        peer.has_place = true;
                        peer.decoder.set_session(answered.session());
                        peer.phase = Phase::Confirm(Box::new(answered));
                        peer.deadline = now.after(SETUP);
                        self.send_frame(connection, End::Primary, &reply, SessionId::HANDSHAKE);
                        None
                    }
                    Err(error) => Some(self.refuse(connection, error)),
                }
            }
            Phase::Confirm(answered) => match answered.handle_frame(frame) {
                Ok(terms) => {
                    let long = Duration::from_millis(self.random.between(1, 90));
                    peer.session = terms.session;
                    peer.key = Some(live.backups.enter(terms.session, terms.generation, ()));
                    peer.phase = Phase::Sending(now.after(long));
                    peer.deadline = now.after(SETUP + long);
                    None
                }
                Err(error) => Some(self.refuse(connection, error)),
            },
            _ => unreachable!("greeted already"),
        }
    }

    fn refuse(&mut self, connection: usize, error: HandshakeError) -> EndCause {
        let text = error.to_string();
        if let HandshakeError::Refused(refusal) = error {
            self.send_frame(
                connection,
                End::Primary,
                &Frame::Refusal(refusal),
                SessionId::HANDSHAKE,
            );
        }
        EndCause::NotBegun(text)
    }

    pub(crate) fn nonce(&mut self) -> Nonce {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.random.next().to_le_bytes());
        Nonce(bytes)
    }

    pub(crate) fn send_frame(
        &mut self,
        connection: usize,
        from: End,
        frame: &Frame,
        session: SessionId,
    ) {
        let frame = frame.encode(session).expect("control frames are small");
        self.send(connection, from, Message::Frame(frame.seal()));
    }

    fn take_session_frame(
        &mut self,
        side: usize,
        live: &mut Live,
        index: usize,
        frame: &Frame,
    ) -> Option<EndCause> {
        let now = self.local(side);
        let peer = &mut live.peers[index];
        let key = peer.key.expect("it has shaken hands");
        let accepts =
            matches!(peer.phase, Phase::Accepting) && matches!(frame, Frame::Acknowledge(_));
        let session = live.backups.session(key).expect("begun, and not yet finished");
        if accepts {
            session.accepted();
        }
        let event = match session.sender().handle_frame(now, frame) {
            Ok(event) => event,
            Err(error) => return Some(EndCause::Violation(error.into())),
        };
        if let Phase::Session(detector) = &mut peer.phase {
            detector.handle_contact(now);
        }
        match event {
            SenderEvent::Departed(reason) => return Some(EndCause::Departed(reason)),
            SenderEvent::Acknowledged(_) => {
                live.gate.acknowledged(live.backups.acknowledged());
                self.release(side, live);
            }
            SenderEvent::Heartbeat => {}
        }
        if accepts {
            live.peers[index].phase = Phase::Session(Box::new(Detector::new(DETECTOR, now)));
        }
        let session = live.backups.session(key).expect("begun, and not yet finished");
        if let Some(Protects::Joined(generation) | Protects::Told(generation)) =
            session.poll_protects()
        {
            self.judge(side, live, LiveEvent::Protecting(key, generation));
        }
        None
    }

    /// A session is over, or one who connected has not got as far.
    pub(crate) fn end_peer(&mut self, side: usize, live: &mut Live, index: usize, cause: EndCause) {
        let peer = live.peers.remove(index);
        self.note(|| format!("side {side}: connection {} is over: {cause}", peer.connection));
        self.sides[side].connections.retain(|(connection, _)| *connection != peer.connection);
        if let Some(backup) = peer.key {
            let now = self.local(side);
            let Finished { complete, .. } = live.backups.finish(backup, now);
            if complete && matches!(cause, EndCause::NotBegun(_)) {
                // It must not take the end of the connection for the end of its primary.
                let goodbye = Frame::Goodbye(GoodbyeReason::Fault(cause.to_string().into()));
                self.send_frame(peer.connection, End::Primary, &goodbye, peer.session);
            }
            let left = cause == EndCause::Left;
            let why = cause.to_string();
            self.judge(side, live, LiveEvent::SessionEnded { backup, complete, left, why });
        }
        self.send(peer.connection, End::Primary, Message::Closed);
        if peer.has_place {
            live.backups.leave_place();
        }
    }
}

/// The end of a session, if the detector says so.
pub(crate) fn of_verdict(verdict: &Verdict) -> Option<EndCause> {
    match verdict {
        Verdict::Alive => None,
        Verdict::Departed(reason) => Some(EndCause::Departed(reason.clone())),
        Verdict::Lost(suspicion) => Some(EndCause::Lost(*suspicion)),
    }
}

/// One who connects to a live side.
pub(crate) fn connected(live: &mut Live, connection: usize, now: MonotonicTime) {
    live.peers.push(Peer::new(connection, now.after(SETUP)));
}
