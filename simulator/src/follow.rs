//! The thin shell of a side that joins and follows, as the simulator has it.

use crate::epochs::Copy;
use crate::live::{DETECTOR, SETUP};
use crate::models::{Connection, End, JoinContent, Message};
use crate::peers::{connected, of_verdict};
use crate::plan::Mode;
use crate::side::{Answer, Following, Join, Joining, Live, Process};
use crate::world::{Event, Plant, Question, World};
use std::time::Duration;
use vmft_backup::reign::{Fate, FollowAction, FollowEvent, FollowReign, Ruling, SessionOver};
use vmft_log::entry::{Entry, Generation, LogPosition};
use vmft_logging_channel::detector::Detector;
use vmft_logging_channel::frame::FrameDecoder;
use vmft_logging_channel::handshake::{HandshakeError, Offered, Refusal, SessionTerms};
use vmft_logging_channel::receiver::{Receiver, ReceiverConfig, ReceiverEvent};
use vmft_logging_channel::session::{GoodbyeReason, SessionId};
use vmft_logging_channel::transport::EndCause;
use vmft_vmm::outputs::{KeptOutputs, OutputGate};

/// How long until a side tries again to join.
const AGAIN: Duration = Duration::from_millis(10);
/// How long a backup that is no standby tries.
const PATIENCE: Duration = Duration::from_millis(800);

impl World {
    /// A side that looks for a live one does its next step; what becomes of it, if that changes.
    pub(crate) fn run_joining(&mut self, side: usize, joining: &mut Joining) -> Option<Process> {
        let now = self.local(side);
        if let Join::Idle(at) = joining.join {
            if at > now {
                self.wake_at(side, Some(at));
                return None;
            }
            self.connect(side, joining);
        }
        let mut failed = None;
        while !matches!(joining.join, Join::Idle(_)) && failed.is_none() {
            let Some(message) = self.receive(joining.connection, End::Backup) else { break };
            match message {
                Message::Frame(bytes) => {
                    joining.decoder.feed(&bytes);
                    failed = self.take_reply(joining);
                }
                Message::Checkpoint(content, position) => {
                    if let Join::Checkpoint(terms) = &joining.join {
                        let terms = terms.clone();
                        return Some(self.joined(side, joining, &terms, *content, position));
                    }
                }
                Message::Closed => failed = Some(None),
            }
        }
        if failed.is_none() && !matches!(joining.join, Join::Idle(_)) && now >= joining.deadline {
            failed = Some(None);
        }
        if let Some(refusal) = failed {
            self.close(side, joining.connection);
            let gives_up = !self.sides[side].standby
                && (matches!(refusal, Some(Refusal::WrongGeneration { .. }))
                    || now.since(joining.since) > PATIENCE);
            if gives_up {
                return Some(Process::Over);
            }
            joining.join = Join::Idle(now.after(AGAIN));
        }
        let next = match joining.join {
            Join::Idle(at) => at,
            _ => joining.deadline,
        };
        self.wake_at(side, Some(next));
        None
    }

    /// Tries the next side.
    fn connect(&mut self, side: usize, joining: &mut Joining) {
        let now = self.local(side);
        joining.join = Join::Idle(now.after(AGAIN));
        let target = joining.next % self.plan.sides;
        joining.next += 1;
        let there = self.local(target);
        let Process::Live(live) = &mut self.sides[target].process else { return };
        let connection = self.connections.len();
        connected(live, connection, there);
        self.connections.push(Connection::new(side, target));
        self.sides[side].connections.push((connection, End::Backup));
        self.sides[target].connections.push((connection, End::Primary));
        joining.connection = connection;
        joining.decoder = FrameDecoder::new(SessionId::HANDSHAKE);
        joining.deadline = now.after(SETUP);
        let (offered, hello) = Offered::new(self.identity(joining.known), self.nonce());
        joining.join = Join::Hello(Box::new(offered));
        self.send_frame(connection, End::Backup, &hello, SessionId::HANDSHAKE);
    }

    /// Takes the answer to a hello. `Some` if the attempt has failed, with the refusal if it was one.
    fn take_reply(&mut self, joining: &mut Joining) -> Option<Option<Refusal>> {
        let Ok(Some(frame)) = joining.decoder.next_frame() else { return None };
        let Join::Hello(offered) = std::mem::replace(&mut joining.join, Join::Idle(joining.since))
        else {
            return Some(None);
        };
        match offered.handle_frame(&frame) {
            Ok((terms, confirm)) => {
                let session = terms.session;
                joining.decoder.set_session(session);
                joining.deadline = joining.deadline.after(SETUP * 2);
                joining.join = Join::Checkpoint(Box::new(terms));
                self.send_frame(joining.connection, End::Backup, &confirm, session);
                None
            }
            Err(HandshakeError::Refused(refusal) | HandshakeError::RefusedByPeer(refusal)) => {
                // Something, so that the attempt counts as under way until it is given up.
                Some(Some(refusal))
            }
            Err(HandshakeError::Unexpected { .. }) => Some(None),
        }
    }

    fn close(&mut self, side: usize, connection: usize) {
        if let Some(at) = self.sides[side].connections.iter().position(|(c, _)| *c == connection) {
            self.sides[side].connections.remove(at);
            self.send(connection, End::Backup, Message::Closed);
        }
    }

    /// The checkpoint is there whole: this side follows.
    fn joined(
        &mut self,
        side: usize,
        joining: &mut Joining,
        terms: &SessionTerms,
        content: JoinContent,
        position: LogPosition,
    ) -> Process {
        let JoinContent { guest, not_out } = content;
        let kept = KeptOutputs::default();
        not_out.into_iter().for_each(|output| kept.emit(output));
        let (now, incarnation) = (self.local(side), self.sides[side].incarnation);
        self.note(|| format!("side {side} follows from {position:?} in {:?}", terms.generation));
        self.schedule(self.now, Event::Replay(side, incarnation));
        let config = ReceiverConfig {
            heartbeat_interval: DETECTOR.heartbeat_interval,
            ..ReceiverConfig::default()
        };
        let (several, standby) = (self.plan.backups > 1, self.sides[side].standby);
        Process::Following(Box::new(Following {
            reign: FollowReign::new(terms.generation, several, standby),
            receiver: Receiver::new(config, terms.session, position, now),
            detector: Detector::new(DETECTOR, now),
            connection: joining.connection,
            decoder: std::mem::replace(
                &mut joining.decoder,
                FrameDecoder::new(SessionId::HANDSHAKE),
            ),
            kept,
            copy: (self.plan.mode == Mode::Checkpoint).then(|| Copy::new(&guest)),
            guest,
            over: None,
            told: false,
            heard: false,
            log_ended: false,
            stopped: None,
            leaving: false,
        }))
    }

    /// Looks at a session that is followed: what has come, what is to be sent, what the clock says.
    pub(crate) fn run_following(&mut self, side: usize, following: &mut Following) {
        let now = self.local(side);
        for answer in std::mem::take(&mut self.sides[side].answers) {
            if let Answer::Follow(event) = answer {
                self.note(|| format!("side {side}: {event:?}"));
                following.reign.handle_event(now, event);
            }
        }
        following.reign.handle_timeout(now);
        self.question(side, following);
        if following.over.is_none() {
            following.over = self.run_session(side, following);
            if let Some(cause) = following.over.clone() {
                self.note(|| format!("side {side}: its session is over: {cause}"));
                self.close(side, following.connection);
            }
        }
        let session = [following.receiver.poll_timeout(), following.detector.poll_timeout()];
        let session = session.into_iter().flatten().filter(|_| following.over.is_none());
        let next = session.chain(following.reign.poll_timeout()).min();
        self.wake_at(side, next);
    }

    fn run_session(&mut self, side: usize, following: &mut Following) -> Option<EndCause> {
        let now = self.local(side);
        while let Some(message) = self.receive(following.connection, End::Backup) {
            match message {
                Message::Frame(bytes) => {
                    following.decoder.feed(&bytes);
                    if let Some(cause) = self.take_primary_frames(side, following) {
                        return Some(cause);
                    }
                }
                Message::Checkpoint(..) => unreachable!("one checkpoint a session"),
                Message::Closed if following.receiver.has_ended() => return Some(EndCause::Left),
                Message::Closed => return of_verdict(following.detector.handle_closed()),
            }
        }
        while let Some(frame) = following.receiver.poll_transmit(now) {
            self.send(following.connection, End::Backup, Message::Frame(frame.seal()));
        }
        let silent = following.detector.is_silent();
        let verdict = following.detector.handle_timeout(now).clone();
        of_verdict(&verdict).filter(|cause| !matches!(cause, EndCause::Departed(_)) || silent)
    }

    fn take_primary_frames(&mut self, side: usize, following: &mut Following) -> Option<EndCause> {
        let now = self.local(side);
        loop {
            let frame = match following.decoder.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => return None,
                Err(error) => return Some(EndCause::Violation(error.into())),
            };
            let event = match following.receiver.handle_frame(now, frame) {
                Ok(event) => event,
                Err(error) => return Some(EndCause::Violation(error.into())),
            };
            following.heard = true;
            following.detector.handle_contact(now);
            match event {
                ReceiverEvent::Heartbeat | ReceiverEvent::Entries { stop: None, .. } => {}
                ReceiverEvent::Entries { .. } => {
                    following.detector.handle_departure(GoodbyeReason::Stopped);
                }
                ReceiverEvent::Reign(generation) => {
                    following.reign.handle_event(now, FollowEvent::GenerationChanged(generation));
                }
                ReceiverEvent::Departed(reason) => return Some(EndCause::Departed(reason)),
            }
        }
    }

    /// Asks what the judge wants to know.
    fn question(&mut self, side: usize, following: &mut Following) -> Option<Fate> {
        let mut fate = None;
        while let Some(action) = following.reign.poll_action() {
            self.note(|| format!("side {side}:   {action:?}"));
            match action {
                FollowAction::Ask(generation) => self.ask(side, Question::Ask(generation)),
                FollowAction::Look(generation) => self.ask(side, Question::Look(generation)),
                FollowAction::Announce(generation, last) => {
                    self.ask(side, Question::Announce(generation, last));
                }
                FollowAction::Decide(decided) => fate = Some(decided),
                FollowAction::Show(_) | FollowAction::Tell(_) => {}
            }
        }
        fate
    }

    /// A backup replays a little of its log, and does what is to be done at the end of it.
    pub(crate) fn replay_of(&mut self, side: usize) {
        if self.is_frozen(side) {
            return;
        }
        let mut process = std::mem::replace(&mut self.sides[side].process, Process::Off);
        let fate = match &mut process {
            Process::Following(following) => self.replay(side, following),
            _ => None,
        };
        self.sides[side].process = process;
        match fate {
            Some(fate) => self.conclude(side, fate),
            None => self.run_side(side),
        }
    }

    fn replay(&mut self, side: usize, following: &mut Following) -> Option<Fate> {
        let now = self.local(side);
        if let Some(cause) = following.over.clone().filter(|_| !following.told) {
            following.told = true;
            let over = FollowEvent::SessionOver {
                over: SessionOver::from(&cause),
                received: following.receiver.received(),
                heard: following.heard,
            };
            following.reign.handle_event(now, over);
        }
        let ruling = following.reign.ruling();
        let mut ended = ruling == Ruling::Stop;
        for _ in 0..self.random.between(1, 6) {
            if ended {
                break;
            }
            match following.receiver.poll_entry() {
                Some((sequence, entry)) => {
                    self.apply(side, following, &entry);
                    following.receiver.report_applied(sequence, following.guest.point());
                }
                None => ended = following.told && ruling != Ruling::Wait,
            }
        }
        if ended && !following.log_ended {
            following.log_ended = true;
            let event = match following.stopped {
                Some(reason) => {
                    let kept = !following.guest.outstanding().is_empty();
                    let owes = !following.receiver.peer_has_left() && kept;
                    FollowEvent::MachineStopped { reason, owes }
                }
                None => FollowEvent::LogEnded,
            };
            following.reign.handle_event(now, event);
        }
        self.question(side, following)
    }

    fn apply(&mut self, side: usize, following: &mut Following, entry: &Entry) {
        if let (Some(point), None) = (entry.point(), &following.copy) {
            following.guest.run_to(point);
        }
        match entry {
            Entry::Arrival { arrival, .. } => {
                for output in following.guest.arrive(arrival) {
                    following.kept.emit(output);
                }
            }
            Entry::OutputMark { output, .. } => {
                if *output != following.guest.outputs() {
                    self.oracle.fail(format!("side {side} diverged at {output:?}"));
                }
            }
            Entry::CheckpointPart { piece, bytes } => {
                self.apply_piece(side, following, *piece, bytes);
            }
            Entry::Released { output } => following.kept.released(*output),
            Entry::Stop { reason, .. } => following.stopped = Some(*reason),
            other => self.oracle.fail(format!("an entry that no simulated guest makes: {other:?}")),
        }
    }

    /// What has become of a side whose log has ended.
    fn conclude(&mut self, side: usize, fate: Fate) {
        match fate {
            Fate::GoLive(generation) => self.succeed(side, generation),
            Fate::JoinAgain(known) => {
                self.end_process(side, "it joins again".to_owned(), true);
                self.begin_again(side, known);
            }
            Fate::FinishOutputs(generation, _) => {
                self.note(|| format!("side {side} lets out what is left in {generation:?}"));
                self.end_process(side, "stopped, with everything out".to_owned(), true);
            }
            Fate::Halt(why) => {
                if let Process::Following(following) = &self.sides[side].process
                    && !following.heard
                {
                    self.oracle.fail(format!("side {side} was turned away at its join, and halts"));
                }
                self.end_process(side, why, true);
            }
            Fate::Stop(reason) => self.end_process(side, format!("stopped: {reason:?}"), true),
        }
    }

    fn begin_again(&mut self, side: usize, known: Generation) {
        let joining = self.joining(side, known);
        self.sides[side].process = joining;
        self.run_side(side);
    }

    /// This side goes on in its primary's place.
    fn succeed(&mut self, side: usize, generation: Generation) {
        let process = std::mem::replace(&mut self.sides[side].process, Process::Off);
        let Process::Following(following) = process else { unreachable!("it followed") };
        let Following { guest, kept, .. } = *following;
        self.note(|| format!("side {side} goes live in {generation:?}"));
        let live = Live::new(generation, guest, &self.identity(generation));
        if self.plant != Some(Plant::KeptDropped) {
            for output in kept.take() {
                live.gate.emit(output);
            }
        }
        // The same process, but nothing of the session is waited for any more.
        self.go_live(side, live);
    }

    /// The operator stops a side that follows.
    pub(crate) fn leave(&mut self, side: usize) {
        let now = self.local(side);
        if let Process::Following(following) = &mut self.sides[side].process {
            following.leaving = true;
            following.receiver.leave(GoodbyeReason::Leaving);
            following.reign.handle_event(now, FollowEvent::Leave);
            self.run_side(side);
        }
    }
}
