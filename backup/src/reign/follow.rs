//! What a side does that follows, when its log ends: go live, halt, join again or stop.
//!
//! ```text
//!  Following ──primary lost──▶ GivingWay ──▶ Asking ──won──▶ Won ──all is replayed──▶ goes live
//!      │                        (where others follow) │ ▲
//!      │                                              │ └──RETRY── the arbiter is away
//!      │                                              └──lost──▶ Beaten ──▶ halts, a standby joins again
//!      └──a goodbye──▶ stops with its primary, or joins again
//! ```
//! The race is run while what was received is still being replayed: [`FollowReign::ruling`] says
//! whether to go on with that. What becomes of the side is said once, by [`FollowAction::Decide`], when
//! the log is at its end and the arbiter has answered.
//!
//! **Invariant.** A side goes live only in the generation after its primary's, only if it has won it, and
//! never after its primary has stopped the machine on purpose.

use crate::arbiter::{ANNOUNCE, Candidate, HEAD_START, RETRY, Verdict};
use crate::status::Role;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vmft_log::entry::{EntrySequence, Generation, StopReason};
use vmft_logging_channel::session::GoodbyeReason;
use vmft_logging_channel::time::MonotonicTime;
use vmft_logging_channel::transport::EndCause;

/// How a session ended, as far as it matters who goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionOver {
    /// The primary must be taken to have failed, for this reason.
    Lost(String),
    /// The primary has stopped its machine.
    Stopped,
    /// The primary wants another session, for this reason.
    Departed(String),
    /// This side has left.
    Left,
}

impl From<&EndCause> for SessionOver {
    fn from(cause: &EndCause) -> Self {
        match cause {
            EndCause::Lost(_)
            | EndCause::Violation(_)
            | EndCause::Departed(
                GoodbyeReason::Failed(_)
                | GoodbyeReason::HandedOver
                | GoodbyeReason::StorageFailed(_),
            ) => Self::Lost(cause.to_string()),
            EndCause::Departed(GoodbyeReason::Stopped) => Self::Stopped,
            EndCause::Departed(reason) => Self::Departed(reason.to_string()),
            EndCause::Left | EndCause::GivenUp(_) | EndCause::NotBegun(_) => Self::Left,
        }
    }
}

/// What a following side learns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FollowEvent {
    /// The primary has won this generation, and says so.
    GenerationChanged(Generation),
    /// The session is over.
    SessionOver {
        /// How.
        over: SessionOver,
        /// The log goes up to here.
        received: EntrySequence,
        /// The primary has said something since its checkpoint: it may have counted on this side.
        heard: bool,
    },
    /// Whether anyone who has announced how far it is, is further: the answer to
    /// [`FollowAction::Announce`].
    Announced {
        /// Someone is.
        ahead: bool,
    },
    /// Whether to go on giving way: the answer to [`FollowAction::Look`].
    Looked {
        /// The generation is still to be had.
        free: bool,
    },
    /// The arbiter's answer to [`FollowAction::Ask`].
    Verdict(Verdict),
    /// The arbiter cannot be asked, for this reason.
    Unreachable(String),
    /// Everything there was to replay is replayed.
    LogEnded,
    /// The log says that the machine stops, and the session is over.
    MachineStopped {
        /// Why it stops.
        reason: StopReason,
        /// Something may be left to be let out: no goodbye has come, and not everything is out.
        owes: bool,
    },
    /// This side is not where the log says.
    Diverged(String),
    /// The operator stops this side.
    Leave,
}

/// What a following side is to do, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FollowAction {
    /// Say to the others who ask for this generation how far the log goes, and hear how far theirs do.
    Announce(Generation, EntrySequence),
    /// See whether this generation is still to be had.
    Look(Generation),
    /// Ask the arbiter for this generation.
    Ask(Generation),
    /// Nothing is left to be decided.
    Decide(Fate),
    /// What the operator sees of this side.
    Show(Role),
    /// What the operator is told.
    Tell(String),
}

/// What becomes of a side whose log has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It runs the guest, in this generation.
    GoLive(Generation),
    /// It lets out what the stopped machine may have left, in this generation, and stops.
    FinishOutputs(Generation, StopReason),
    /// It joins whoever is live, knowing of this generation.
    JoinAgain(Generation),
    /// It halts.
    Halt(String),
    /// It stops.
    Stop(StopReason),
}

/// What the replaying machine is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ruling {
    /// Take what comes.
    Follow,
    /// Take what is there, and wait: the arbiter is being asked.
    Wait,
    /// Take what is there, to the end: this side goes live.
    GoOn,
    /// Stop: what is left is for another side.
    Stop,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Following,
    /// Announced once; after a while the others will have, too.
    Announcing {
        second: bool,
        next: Option<MonotonicTime>,
    },
    /// Somebody's log goes further: it goes first, until then.
    GivingWay {
        until: MonotonicTime,
        next: Option<MonotonicTime>,
    },
    Asking,
    Retrying(MonotonicTime),
    Won,
    Beaten(Candidate),
    /// The session ended in order, or this side gave up waiting.
    Over(SessionOver),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum LogEnd {
    Replayed,
    Stopped(StopReason),
    Diverged(String),
}

/// The judge of a side that follows, for one session.
#[derive(Debug)]
pub struct FollowReign {
    generation: Generation,
    /// Joins again instead of halting.
    standby: bool,
    /// There may be other backups that ask.
    several: bool,
    received: EntrySequence,
    /// The primary may have counted on this side.
    heard: bool,
    state: State,
    log_end: Option<LogEnd>,
    leaving: bool,
    told_away: bool,
    decided: bool,
    actions: VecDeque<FollowAction>,
}

impl FollowReign {
    /// A side that has joined a primary of `generation`. `several`: other backups may be there, too;
    /// `standby`: it is never done with looking for a primary.
    pub const fn new(generation: Generation, several: bool, standby: bool) -> Self {
        Self {
            generation,
            standby,
            several,
            received: EntrySequence(0),
            heard: false,
            state: State::Following,
            log_end: None,
            leaving: false,
            told_away: false,
            decided: false,
            actions: VecDeque::new(),
        }
    }

    /// True if there may be other backups that ask.
    pub const fn several(&self) -> bool {
        self.several
    }

    /// True if this side joins again instead of halting.
    pub const fn standby(&self) -> bool {
        self.standby
    }

    /// The primary's generation, as last heard.
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// The generation this side asks for, or has won.
    pub const fn next(&self) -> Generation {
        Generation(self.generation.0 + 1)
    }

    /// What the machine that replays is to do.
    pub fn ruling(&self) -> Ruling {
        match &self.state {
            State::Following | State::Over(SessionOver::Stopped | SessionOver::Departed(_)) => {
                Ruling::Follow
            }
            State::Announcing { .. }
            | State::GivingWay { .. }
            | State::Asking
            | State::Retrying(_) => Ruling::Wait,
            State::Won => Ruling::GoOn,
            State::Beaten(_) | State::Over(_) => Ruling::Stop,
        }
    }

    /// True if this side has won the generation after its primary's.
    pub fn has_won(&self) -> bool {
        self.state == State::Won
    }

    /// What is to be done next, if anything. To be asked until it says `None`.
    pub fn poll_action(&mut self) -> Option<FollowAction> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`]; `None` while nothing depends on the time.
    pub const fn poll_timeout(&self) -> Option<MonotonicTime> {
        match self.state {
            State::Announcing { next, .. } | State::GivingWay { next, .. } => next,
            State::Retrying(at) => Some(at),
            _ => None,
        }
    }

    /// Looks at the clock.
    pub fn handle_timeout(&mut self, now: MonotonicTime) {
        if self.poll_timeout().is_none_or(|at| at > now) {
            return;
        }
        match &mut self.state {
            State::Announcing { second, next } => {
                (*second, *next) = (true, None);
                self.act(FollowAction::Announce(self.next(), self.received));
            }
            State::GivingWay { next, .. } => {
                *next = None;
                self.act(FollowAction::Look(self.next()));
            }
            State::Retrying(_) => self.ask(),
            _ => {}
        }
    }

    /// Something has happened.
    pub fn handle_event(&mut self, now: MonotonicTime, event: FollowEvent) {
        match event {
            FollowEvent::GenerationChanged(generation) => {
                if self.state == State::Following {
                    self.generation = self.generation.max(generation);
                }
            }
            FollowEvent::SessionOver { over, received, heard } => {
                self.heard = heard;
                self.session_over(over, received);
            }
            FollowEvent::Announced { ahead } => self.announced(now, ahead),
            FollowEvent::Looked { free } => self.looked(now, free),
            FollowEvent::Verdict(verdict) => self.verdict(verdict),
            FollowEvent::Unreachable(why) => self.unreachable(now, &why),
            FollowEvent::LogEnded => {
                self.log_end.get_or_insert(LogEnd::Replayed);
            }
            FollowEvent::MachineStopped { reason, owes } => self.stopped(reason, owes),
            FollowEvent::Diverged(text) => self.diverged(text),
            FollowEvent::Leave => self.leave(),
        }
        self.settle();
    }

    fn act(&mut self, action: FollowAction) {
        self.actions.push_back(action);
    }

    fn session_over(&mut self, over: SessionOver, received: EntrySequence) {
        if self.state != State::Following {
            return;
        }
        let SessionOver::Lost(why) = over else {
            self.state = State::Over(over);
            return;
        };
        self.received = received;
        self.act(FollowAction::Show(Role::Deciding));
        self.act(FollowAction::Tell(format!("the primary is lost: {why}")));
        if self.leaving {
            self.state = State::Over(SessionOver::Left);
        } else if self.several {
            self.state = State::Announcing { second: false, next: None };
            self.act(FollowAction::Announce(self.next(), received));
        } else {
            self.ask();
        }
    }

    fn announced(&mut self, now: MonotonicTime, ahead: bool) {
        match &mut self.state {
            State::Announcing { second: false, next } => *next = Some(now.after(ANNOUNCE)),
            State::Announcing { .. } if ahead => {
                let until = now.after(HEAD_START);
                self.state = State::GivingWay { until, next: Some(now) };
            }
            State::Announcing { .. } => self.ask(),
            _ => {}
        }
    }

    fn looked(&mut self, now: MonotonicTime, free: bool) {
        if let State::GivingWay { until, next } = &mut self.state {
            if free && now < *until {
                *next = Some(now.after(ANNOUNCE / 4));
            } else {
                self.ask();
            }
        }
    }

    fn ask(&mut self) {
        assert!(
            !matches!(self.log_end, Some(LogEnd::Diverged(_))),
            "a side that knows it has diverged asks for nothing"
        );
        self.state = State::Asking;
        self.act(FollowAction::Ask(self.next()));
    }

    fn verdict(&mut self, verdict: Verdict) {
        if self.state == State::Asking {
            self.state = match verdict {
                Verdict::Won => State::Won,
                Verdict::Lost { winner } => State::Beaten(winner),
            };
        }
    }

    fn unreachable(&mut self, now: MonotonicTime, why: &str) {
        if self.state != State::Asking {
            return;
        }
        if self.leaving {
            self.state = State::Over(SessionOver::Left);
            return;
        }
        if matches!(self.log_end, Some(LogEnd::Diverged(_))) {
            // Found while the arbiter was being asked: it is not asked again.
            self.state = State::Over(SessionOver::Departed("it diverged".to_owned()));
            return;
        }
        self.state = State::Retrying(now.after(RETRY));
        if !std::mem::replace(&mut self.told_away, true) {
            self.act(FollowAction::Tell(format!("{why}; this side waits until it answers")));
        }
    }

    /// The machine has stopped on purpose. If its primary died before its goodbye, this side lets out
    /// what may be left; that, too, only one side does.
    fn stopped(&mut self, reason: StopReason, owes: bool) {
        self.log_end = Some(LogEnd::Stopped(reason));
        let in_order = matches!(self.state, State::Following | State::Over(_));
        if owes && in_order && !self.leaving {
            self.ask();
        }
    }

    fn diverged(&mut self, text: String) {
        self.log_end = Some(LogEnd::Diverged(text));
        // One that has not asked yet leaves the generation to others.
        let waiting = matches!(
            self.state,
            State::Following
                | State::Announcing { .. }
                | State::GivingWay { .. }
                | State::Retrying(_)
        );
        if waiting {
            self.state = State::Over(SessionOver::Departed("it diverged".to_owned()));
        }
    }

    fn leave(&mut self) {
        self.leaving = true;
        match self.state {
            State::Announcing { .. } | State::GivingWay { .. } | State::Retrying(_) => {
                self.state = State::Over(SessionOver::Left);
            }
            _ => {}
        }
    }

    /// Says what becomes of this side, once nothing is left to be decided.
    fn settle(&mut self) {
        if self.decided || self.ruling() == Ruling::Wait {
            return;
        }
        let Some(end) = &self.log_end else { return };
        let fate = match (end, &self.state) {
            (LogEnd::Replayed, State::Following) => Fate::Stop(StopReason::Operator),
            (LogEnd::Replayed, State::Won) => Fate::GoLive(self.next()),
            (LogEnd::Stopped(reason), State::Won) => Fate::FinishOutputs(self.next(), *reason),
            (LogEnd::Stopped(reason), _) => Fate::Stop(*reason),
            (LogEnd::Diverged(text), State::Won) => Fate::Halt(self.diverged_heir(text)),
            (_, State::Beaten(winner)) => self.beaten(winner),
            (LogEnd::Diverged(_), _) => Fate::JoinAgain(self.generation),
            (LogEnd::Replayed, State::Over(over)) => match over {
                SessionOver::Stopped => Fate::Stop(StopReason::GuestPowerOff),
                SessionOver::Departed(_) => Fate::JoinAgain(self.generation),
                SessionOver::Left | SessionOver::Lost(_) => Fate::Stop(StopReason::Operator),
            },
            (LogEnd::Replayed, _) => unreachable!("waiting is handled above"),
        };
        self.decide(fate);
    }

    /// The primary is gone and this side is its heir, with a state that was never the guest's.
    fn diverged_heir(&self, text: &str) -> String {
        format!(
            "{text}; the primary is lost, and this side has won generation {} but does not go on with \
             a state that is not the guest's",
            self.next().0
        )
    }

    fn beaten(&self, winner: &Candidate) -> Fate {
        // A side that nobody has counted on was turned away while it joined: it is no loser of anything.
        if self.standby || !self.heard {
            // Whoever is still of this session's generation has lost it, whether it knows or not.
            Fate::JoinAgain(self.next())
        } else {
            Fate::Halt(format!("generation {} was won by {winner}", self.next().0))
        }
    }

    fn decide(&mut self, fate: Fate) {
        match (&fate, &self.state) {
            (Fate::JoinAgain(_), State::Beaten(winner)) => {
                let text =
                    format!("generation {} was won by {winner}; joining again", self.next().0);
                self.act(FollowAction::Tell(text));
            }
            (Fate::JoinAgain(_), State::Over(SessionOver::Departed(reason)))
                if self.log_end == Some(LogEnd::Replayed) =>
            {
                let text = format!("the primary ended the session: {reason}; joining again");
                self.act(FollowAction::Tell(text));
            }
            (Fate::Halt(_), _) => self.act(FollowAction::Show(Role::Halted)),
            (Fate::Stop(_) | Fate::FinishOutputs(..), _) => {
                self.act(FollowAction::Show(Role::Stopped));
            }
            (Fate::GoLive(_), state) => {
                assert_eq!(*state, State::Won, "only a side that has won goes live");
                assert_eq!(self.log_end, Some(LogEnd::Replayed), "and only with all it received");
            }
            (Fate::JoinAgain(_), _) => {}
        }
        self.decided = true;
        self.act(FollowAction::Decide(fate));
    }
}
