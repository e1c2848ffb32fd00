//! What a live side does as backups join it and are lost.
//!
//! ```text
//!  Alone ──a backup's log begins──▶ Protected ──a complete backup lost──▶ Deciding ──lost──▶ Fenced
//!    ▲                                │  ▲                                 │  │
//!    ├──the last joiner was lost──────┘  └────────won, others follow───────┘  │
//!    └───────────────────────────won, nobody left─────────────────────────────┘
//! ```
//! A backup that joins counts from the moment its log begins: outputs wait for it. It is lost like
//! any other once the end of its checkpoint is on its way; before, it costs nothing.
//!
//! **Invariant.** From the loss on, no output leaves before the next generation is won: the lost
//! backup may be alive on the other side of a partition, and going live.

use crate::arbiter::{Candidate, RETRY, Verdict};
use crate::status::Role;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use vmft_log::entry::Generation;
use vmft_logging_channel::backups::BackupKey;
use vmft_logging_channel::time::MonotonicTime;

/// How long a backup that the guest is handed over to may take before this side asks for the generation
/// itself: longer than a test-and-set on busy storage.
pub const HANDED_OVER: Duration = Duration::from_secs(1);

/// Where a live side stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Alone, by its own generation: outputs leave at once.
    Alone,
    /// The log of a backup has begun: outputs wait for its acknowledgement.
    Protected,
    /// A backup is lost, and the arbiter is asked: nothing leaves.
    Deciding,
    /// Another side has the next generation: nothing leaves any more.
    Fenced(String),
}

/// What a live side learns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LiveEvent {
    /// A backup's log is about to begin, with the machine at rest. Answered by
    /// [`LiveAction::Admit`] or [`LiveAction::TurnAway`].
    LogBegins(BackupKey),
    /// The log did not begin after all: that backup was gone.
    NotBegun(BackupKey),
    /// The backup has the whole checkpoint and knows this generation: it could go live in this side's place,
    /// if this side is still of that generation.
    Protecting(BackupKey, Generation),
    /// A session is over.
    SessionEnded {
        /// Whose.
        backup: BackupKey,
        /// The backup may have had the whole checkpoint, and may go live.
        complete: bool,
        /// This side has left the session, at a stop: nobody is lost.
        left: bool,
        /// Why, for people.
        why: String,
    },
    /// The arbiter's answer to [`LiveAction::Ask`].
    Verdict(Verdict),
    /// The arbiter cannot be asked, for this reason.
    Unreachable(String),
    /// A generation after this side's was found to be another's.
    Overtaken {
        /// Which.
        generation: Generation,
        /// Whose.
        winner: Candidate,
    },
    /// The operator hands the guest over to a backup: the machine rests, everything is out, and the backup
    /// is about to be told. If it does not win the next generation soon, this side asks for it, and runs on.
    HandOver,
    /// This side is stopped and will not wait for a decision any more, for this reason.
    GivenUp(String),
}

/// What a live side is to do, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LiveAction {
    /// The log of that backup may begin.
    Admit(BackupKey),
    /// It may not.
    TurnAway(BackupKey),
    /// From now on outputs wait.
    Protect,
    /// From now on nothing leaves.
    Hold,
    /// Fewer backups have to acknowledge: what all that are left have acknowledged leaves.
    Release,
    /// Outputs that every backup has acknowledged leave again.
    Resume,
    /// What waits, and what comes, leaves at once.
    Unprotect,
    /// Nothing leaves any more, and no write is begun.
    Shut,
    /// Ask the arbiter for this generation.
    Ask(Generation),
    /// This side is of this generation from now on, and writes in it.
    Advance(Generation),
    /// Backups may join (again) in this generation, and those who follow are told of it.
    Reopen(Generation),
    /// The machine halts.
    Halt(String),
    /// What the operator sees of this side.
    Show(Role),
    /// What the operator is told.
    Tell(String),
}

/// How far a backup is whose log has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backup {
    /// It is still being sent its checkpoint.
    Joining,
    /// It has that, and has still to hear of this side's generation.
    Untold,
    /// It could go live.
    Protecting,
}

/// What leaves, as far as the judge has ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    Protecting,
    Holding,
    Shut,
}

/// The judge of a live side.
#[derive(Debug)]
pub struct LiveReign {
    generation: Generation,
    standing: Standing,
    gate: Gate,
    /// Whose logs have begun.
    backups: BTreeMap<BackupKey, Backup>,
    /// When to ask an arbiter again that could not be reached.
    retry_at: Option<MonotonicTime>,
    /// The arbiter has been asked, and its answer is awaited.
    asked: Option<Generation>,
    /// The operator has been told that the arbiter is away.
    told_away: bool,
    actions: VecDeque<LiveAction>,
}

impl LiveReign {
    /// A side that is live and alone, in a generation it has won.
    pub const fn new(generation: Generation) -> Self {
        Self {
            generation,
            standing: Standing::Alone,
            gate: Gate::Open,
            backups: BTreeMap::new(),
            retry_at: None,
            asked: None,
            told_away: false,
            actions: VecDeque::new(),
        }
    }

    /// The side's generation.
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Where the side stands.
    pub const fn standing(&self) -> &Standing {
        &self.standing
    }

    /// What is to be done next, if anything. To be asked until it says `None`.
    pub fn poll_action(&mut self) -> Option<LiveAction> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`]; `None` while nothing depends on the time.
    pub const fn poll_timeout(&self) -> Option<MonotonicTime> {
        self.retry_at
    }

    /// Looks at the clock.
    pub fn handle_timeout(&mut self, now: MonotonicTime) {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.ask();
        }
        self.check();
    }

    /// Something has happened.
    pub fn handle_event(&mut self, now: MonotonicTime, event: LiveEvent) {
        match event {
            LiveEvent::LogBegins(backup) => self.log_begins(backup),
            LiveEvent::NotBegun(backup) => self.left_early(backup),
            LiveEvent::Protecting(backup, generation) if generation == self.generation => {
                self.protecting(backup);
            }
            // It will be told of the generation that this side has won meanwhile.
            LiveEvent::Protecting(..) => {}
            LiveEvent::SessionEnded { backup, complete: false, .. } => self.left_early(backup),
            LiveEvent::SessionEnded { backup, left: true, .. } => {
                self.backups.remove(&backup);
            }
            LiveEvent::SessionEnded { backup, why, .. } => self.lost(backup, &why),
            LiveEvent::Verdict(verdict) => self.decided(verdict),
            LiveEvent::Unreachable(why) => self.unreachable(now, &why),
            LiveEvent::Overtaken { generation, winner } => self.overtaken(generation, &winner),
            LiveEvent::HandOver => self.hand_over(now),
            LiveEvent::GivenUp(why) => self.fenced(why),
        }
        self.check();
    }

    fn act(&mut self, action: LiveAction) {
        match action {
            LiveAction::Protect | LiveAction::Resume => self.gate = Gate::Protecting,
            LiveAction::Hold => self.gate = Gate::Holding,
            LiveAction::Unprotect => self.gate = Gate::Open,
            LiveAction::Shut => self.gate = Gate::Shut,
            _ => {}
        }
        self.actions.push_back(action);
    }

    fn log_begins(&mut self, backup: BackupKey) {
        match self.standing {
            Standing::Alone => {
                self.act(LiveAction::Protect);
                self.standing = Standing::Protected;
            }
            Standing::Protected => {}
            // Its outputs could not be told from those that are held for the generation's sake.
            Standing::Deciding | Standing::Fenced(_) => {
                self.act(LiveAction::TurnAway(backup));
                return;
            }
        }
        self.backups.insert(backup, Backup::Joining);
        self.act(LiveAction::Admit(backup));
    }

    /// A backup is gone that cannot have had the whole checkpoint: it costs nothing.
    fn left_early(&mut self, backup: BackupKey) {
        if self.backups.remove(&backup).is_none() || self.standing != Standing::Protected {
            return;
        }
        if self.backups.is_empty() {
            self.standing = Standing::Alone;
            self.act(LiveAction::Unprotect);
        } else {
            // What only this one had still to acknowledge waits for nobody, and nobody else may have
            // anything to acknowledge before it is out.
            self.act(LiveAction::Release);
        }
    }

    fn protecting(&mut self, backup: BackupKey) {
        let Some(known) = self.backups.get_mut(&backup) else { return };
        let before = std::mem::replace(known, Backup::Protecting);
        if self.standing == Standing::Protected {
            self.act(LiveAction::Show(Role::Primary));
        }
        if before == Backup::Joining {
            let text = match self.protected_by() {
                0 | 1 => "protected: a backup follows".to_owned(),
                count => format!("protected: {count} backups follow"),
            };
            self.act(LiveAction::Tell(text));
        }
    }

    /// How many backups could go live in this side's place.
    pub fn protected_by(&self) -> usize {
        self.backups.values().filter(|backup| **backup == Backup::Protecting).count()
    }

    /// True if that backup could go live in this side's place.
    pub fn is_protecting(&self, backup: BackupKey) -> bool {
        self.backups.get(&backup) == Some(&Backup::Protecting)
    }

    /// A backup is lost that may have had the whole checkpoint.
    ///
    /// Whoever is lost while this is being decided is covered by the same generation: it cannot have
    /// been told of a later one.
    fn lost(&mut self, backup: BackupKey, why: &str) {
        self.backups.remove(&backup);
        if self.standing != Standing::Protected {
            return;
        }
        self.standing = Standing::Deciding;
        self.act(LiveAction::Hold);
        self.act(LiveAction::Show(Role::Deciding));
        self.act(LiveAction::Tell(format!("the backup is lost: {why}")));
        self.told_away = false;
        self.ask();
    }

    /// The guest is handed over, if anybody could take it. From here on it is as if that backup were lost,
    /// but it is let ask first.
    fn hand_over(&mut self, now: MonotonicTime) {
        if self.standing != Standing::Protected || self.protected_by() == 0 {
            return;
        }
        self.standing = Standing::Deciding;
        self.act(LiveAction::Hold);
        self.act(LiveAction::Show(Role::Deciding));
        self.act(LiveAction::Tell("the guest is handed over".to_owned()));
        self.told_away = false;
        self.retry_at = Some(now.after(HANDED_OVER));
    }

    fn ask(&mut self) {
        if self.standing == Standing::Deciding {
            let next = Generation(self.generation.0 + 1);
            self.asked = Some(next);
            self.act(LiveAction::Ask(next));
        }
    }

    fn unreachable(&mut self, now: MonotonicTime, why: &str) {
        self.asked = None;
        if self.standing != Standing::Deciding {
            return;
        }
        self.retry_at = Some(now.after(RETRY));
        if !std::mem::replace(&mut self.told_away, true) {
            self.act(LiveAction::Tell(format!("{why}; no output leaves until it answers")));
        }
    }

    fn decided(&mut self, verdict: Verdict) {
        let Some(next) = self.asked.take() else { return };
        match verdict {
            Verdict::Won if self.standing == Standing::Deciding => self.go_on(next),
            // It was won by a side that has given up: nobody writes in it.
            Verdict::Won => {}
            Verdict::Lost { winner } => self.overtaken(next, &winner),
        }
    }

    /// This side has won `next`, and goes on with the backups it still has, or alone.
    fn go_on(&mut self, next: Generation) {
        assert_eq!(next.0, self.generation.0 + 1, "generations are won one after the other");
        self.generation = next;
        self.act(LiveAction::Advance(next));
        for backup in self.backups.values_mut() {
            if *backup == Backup::Protecting {
                *backup = Backup::Untold;
            }
        }
        let (followers, text) = (self.backups.len(), format!("generation {}", next.0));
        if followers > 0 {
            self.standing = Standing::Protected;
            self.act(LiveAction::Resume);
            self.act(LiveAction::Tell(format!("{followers} more follow, in {text}")));
        } else {
            self.standing = Standing::Alone;
            self.act(LiveAction::Unprotect);
            self.act(LiveAction::Tell(format!("running unprotected in {text}")));
        }
        // Nobody could go live in its place before it has heard of the generation.
        self.act(LiveAction::Show(Role::Alone));
        // After the standing: a backup that is told of the generation and then lost is another loss.
        self.act(LiveAction::Reopen(next));
    }

    fn overtaken(&mut self, generation: Generation, winner: &Candidate) {
        self.fenced(format!("generation {} was won by {winner}", generation.0));
    }

    /// This side may not go on: nothing leaves any more, and the machine halts. The first reason
    /// stands.
    fn fenced(&mut self, why: String) {
        if matches!(self.standing, Standing::Fenced(_)) {
            return;
        }
        self.standing = Standing::Fenced(why.clone());
        self.retry_at = None;
        self.act(LiveAction::Shut);
        self.act(LiveAction::Halt(why));
        self.act(LiveAction::Show(Role::Halted));
    }

    /// The invariants, after every step.
    fn check(&self) {
        let gate = match self.standing {
            Standing::Alone => Gate::Open,
            Standing::Protected => Gate::Protecting,
            Standing::Deciding => Gate::Holding,
            Standing::Fenced(_) => Gate::Shut,
        };
        assert_eq!(self.gate, gate, "what leaves is what the standing allows");
        assert!(
            self.gate != Gate::Open || self.backups.is_empty(),
            "no output leaves at once while somebody follows"
        );
        assert!(
            self.standing != Standing::Deciding || self.asked.is_some() || self.retry_at.is_some(),
            "a side that waits for the arbiter has asked it, or will"
        );
    }
}
