//! Executes what the judge of a following side decides ([`FollowReign`]).
//!
//! The machine's thread, which takes the log's entries, tells the judge how the session ended. The
//! arbiter is asked on a thread of its own, while what was received is still being replayed.

use crate::arbiter::{Arbiter, Candidate, RETRY};
use crate::events::{self, Event, Judge, JudgeInput, JudgeLog, JudgeOrder, Peer};
use crate::following::BackupControl;
use crate::policy::ask_arbiter;
use crate::reign::{Fate, FollowAction, FollowEvent, FollowReign, Ruling, SessionOver};
use crate::status::{FailoverReport, StatusBoard, ms};
use crate::storage_look::StorageLook;
use crate::tell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_log::entry::Generation;
use vmft_logging_channel::session::GoodbyeReason;
use vmft_logging_channel::transport::{BackupChannel, EndCause, SessionEnd, now};
use vmft_sandbox::Task;
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// What was found out while the peer was being lost.
#[derive(Debug, Clone, Default)]
pub(crate) struct Race {
    pub(crate) report: FailoverReport,
    pub(crate) asked: Option<Instant>,
    pub(crate) decided: Option<Instant>,
    pub(crate) last_contact: Option<Instant>,
    /// The peer has handed the guest over, since its storage fails.
    pub(crate) storage_failed: bool,
}

#[derive(Debug)]
struct State {
    reign: FollowReign,
    race: Race,
    /// The judge has been told how the session ended.
    over: bool,
    /// What the judge has ordered, and is still to be done.
    ordered: VecDeque<FollowAction>,
    /// What the arbiter is still to be asked.
    questions: VecDeque<FollowAction>,
    /// A thread asks.
    asking: bool,
    fate: Option<Fate>,
}

/// What the actions of the judge are about.
#[derive(Debug)]
struct Parts {
    arbiter: Arc<dyn Arbiter>,
    who: Candidate,
    status: Arc<StatusBoard>,
    control: Arc<BackupControl>,
    look: StorageLook,
}

/// The policy of one side that follows, for one session.
#[derive(Debug)]
pub(crate) struct FollowPolicy {
    parts: Parts,
    state: Mutex<State>,
    log: JudgeLog,
    changed: Condvar,
}

impl FollowPolicy {
    pub(crate) fn new(
        reign: FollowReign,
        arbiter: Arc<dyn Arbiter>,
        who: Candidate,
        status: Arc<StatusBoard>,
        control: Arc<BackupControl>,
        look: StorageLook,
    ) -> Self {
        let log = JudgeLog::begin(Judge::Follow {
            generation: reign.generation(),
            several: reign.several(),
            standby: reign.standby(),
        });
        let state = State {
            reign,
            race: Race::default(),
            over: false,
            ordered: VecDeque::new(),
            questions: VecDeque::new(),
            asking: false,
            fate: None,
        };
        let parts = Parts { arbiter, who, status, control, look };
        Self { parts, state: Mutex::new(state), log, changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// What the machine that replays is to do.
    pub(crate) fn ruling(&self) -> Ruling {
        self.lock().reign.ruling()
    }

    /// True if this side has won the generation after its primary's.
    pub(crate) fn has_won(&self) -> bool {
        self.lock().reign.has_won()
    }

    /// Waits while the arbiter is being asked, for at most `limit`.
    pub(crate) fn wait_ruled(&self, limit: Duration) {
        let waiting = |state: &mut State| state.reign.ruling() == Ruling::Wait;
        drop(self.changed.wait_timeout_while(self.lock(), limit, waiting));
    }

    /// How the peer was lost, as far as is known.
    pub(crate) fn race(&self) -> Race {
        self.lock().race.clone()
    }

    /// True once the judge knows how the session ended.
    pub(crate) fn knows_the_end(&self) -> bool {
        self.lock().over
    }

    /// Tells the judge how the session ended, if it has.
    pub(crate) fn look(self: &Arc<Self>, channel: &BackupChannel) {
        self.parts.status.liveness().pass();
        if self.lock().over {
            return;
        }
        let Some(end) = channel.end() else { return };
        let mut state = self.lock();
        if std::mem::replace(&mut state.over, true) {
            return;
        }
        state.race.begin(&end);
        note_end(&end);
        self.tell_judge(&mut state, FollowEvent::GenerationChanged(channel.generation()));
        let fails = self.parts.look.failing().filter(|_| state.race.storage_failed);
        let over = match fails {
            // As good as it can be: its primary asks for the guest again, and this side follows it.
            Some(why) => SessionOver::Departed(format!("{}; here, {why}", end.cause)),
            None => SessionOver::from(&end.cause),
        };
        let over = FollowEvent::SessionOver {
            over,
            received: channel.received(),
            heard: channel.has_heard(),
        };
        self.tell_judge(&mut state, over);
        self.execute(state);
    }

    /// The log of `channel` is at its end: waits until it is clear what becomes of this side.
    pub(crate) fn decide(self: &Arc<Self>, channel: &BackupChannel, event: FollowEvent) -> Fate {
        self.look(channel);
        self.handle(event);
        loop {
            let undecided = |state: &mut State| state.fate.is_none();
            let mut state = self.changed.wait_timeout_while(self.lock(), RETRY, undecided).0;
            if let Some(fate) = state.fate.take() {
                return fate;
            }
        }
    }

    /// Tells the judge, and has that in the event log.
    fn tell_judge(&self, state: &mut State, event: FollowEvent) {
        let at = now();
        self.log.heard(at, || JudgeInput::Follow(event.clone()));
        state.reign.handle_event(at, event);
        self.take_orders(state);
    }

    /// Takes what the judge has ordered, before it is told anything else: so the log has what came of each.
    fn take_orders(&self, state: &mut State) {
        while let Some(action) = state.reign.poll_action() {
            self.log.ordered(|| JudgeOrder::Follow(action.clone()));
            state.ordered.push_back(action);
        }
    }

    /// The time that the judge asked for has come.
    fn wake_judge(&self, state: &mut State) {
        let at = now();
        self.log.heard(at, || JudgeInput::Timeout);
        state.reign.handle_timeout(at);
        self.take_orders(state);
    }

    fn handle(self: &Arc<Self>, event: FollowEvent) {
        let mut state = self.lock();
        self.tell_judge(&mut state, event);
        self.execute(state);
    }

    fn execute(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        let mut told = Vec::new();
        while let Some(action) = state.ordered.pop_front() {
            match action {
                FollowAction::Announce(..) | FollowAction::Look(_) | FollowAction::Ask(_) => {
                    state.questions.push_back(action);
                }
                FollowAction::Decide(fate) => state.fate = Some(fate),
                FollowAction::Show(role) => {
                    self.parts.status.set_role(role, state.reign.generation());
                }
                FollowAction::Tell(text) => told.push(text),
            }
        }
        let begin = !state.questions.is_empty() && !std::mem::replace(&mut state.asking, true);
        drop(state);
        self.changed.notify_all();
        told.iter().for_each(|text| tell!("{text}"));
        if begin {
            let policy = Arc::clone(self);
            vmft_sandbox::spawn(Task::Arbiter, "arbiter", move || policy.ask_all())
                .expect("a host that cannot start a thread cannot run a machine");
        }
    }

    /// Asks the arbiter what there is to be asked, until there is nothing.
    fn ask_all(self: &Arc<Self>) {
        loop {
            let mut state = self.lock();
            if let Some(question) = state.questions.pop_front() {
                drop(state);
                let answer = self.answer(&question);
                let mut state = self.lock();
                if matches!(answer, FollowEvent::Verdict(_)) {
                    let next = state.reign.next();
                    state.race.decided(next);
                }
                self.tell_judge(&mut state, answer);
                self.execute(state);
            } else if self.parts.control.is_leaving() && state.reign.poll_timeout().is_some() {
                self.tell_judge(&mut state, FollowEvent::Leave);
                self.execute(state);
            } else if let Some(at) = state.reign.poll_timeout() {
                drop(state);
                std::thread::sleep(at.since(now()));
                let mut state = self.lock();
                self.wake_judge(&mut state);
                self.execute(state);
            } else {
                state.asking = false;
                return;
            }
        }
    }

    fn answer(&self, question: &FollowAction) -> FollowEvent {
        let Parts { arbiter, who, .. } = &self.parts;
        match question {
            FollowAction::Announce(generation, last) => {
                // What cannot be asked here is asked again, by the question that counts.
                let others = arbiter.announce(*generation, who, *last);
                let ahead = others.is_ok_and(|others| others.iter().any(|other| other > last));
                FollowEvent::Announced { ahead }
            }
            FollowAction::Look(generation) => {
                FollowEvent::Looked { free: matches!(arbiter.winner(*generation), Ok(None)) }
            }
            FollowAction::Ask(generation) => match ask_arbiter(&**arbiter, *generation, who) {
                Ok(verdict) => FollowEvent::Verdict(verdict),
                Err(error) => FollowEvent::Unreachable(error.to_string()),
            },
            other => unreachable!("{other:?} asks nothing"),
        }
    }
}

/// The session with the primary is over: for the event log.
fn note_end(end: &SessionEnd) {
    let (peer, why) = (Peer::Primary, end.cause.to_string().into());
    let (last_sign, suspected) = (end.last_contact, end.ended_at);
    events::note(|| match end.is_failure() {
        true => Event::PeerLost { peer, why, last_sign, suspected },
        false => Event::PeerLeft { peer, why },
    });
}

impl Race {
    /// The session is over: if the peer is lost, the time runs.
    fn begin(&mut self, end: &SessionEnd) {
        let asked = Instant::now();
        self.last_contact = asked.checked_sub(now().since(end.last_contact));
        self.asked = Some(asked);
        self.report = FailoverReport {
            suspicion: end.cause.to_string().into(),
            detection_ms: ms(end.ended_at.since(end.last_contact)),
            ..FailoverReport::default()
        };
        self.storage_failed =
            matches!(end.cause, EndCause::Departed(GoodbyeReason::StorageFailed(_)));
    }

    /// The arbiter has answered.
    fn decided(&mut self, generation: Generation) {
        self.decided = Some(Instant::now());
        self.report.generation = generation.0;
        self.report.arbiter_ms = self.asked.map_or(0.0, |asked| ms(asked.elapsed()));
    }
}
