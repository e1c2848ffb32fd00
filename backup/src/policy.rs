//! Executes what the judge of a live side decides ([`LiveReign`]).
//!
//! Whoever has news (the channel's thread, the machine's thread, the fence, the thread that asks the
//! arbiter) hands them to the judge and does at once, under the same lock, what comes of them: an
//! acknowledgement that follows the loss of a backup finds the gate held already.

use crate::arbiter::{Arbiter, ArbiterError, Candidate, FenceState, Verdict};
use crate::events::{self, Event, Judge, JudgeInput, JudgeLog, JudgeOrder};
use crate::reign::{LiveAction, LiveEvent, LiveReign, Standing};
use crate::status::StatusBoard;
use crate::tell;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use vmft_log::entry::Generation;
use vmft_logging_channel::backups::BackupKey;
use vmft_logging_channel::transport::{Followers, now};
use vmft_sandbox::Task;
use vmft_threads::{Condvar, Mutex, MutexGuard};
use vmft_vmm::inputs::Asked;
use vmft_vmm::outputs::HeldOutputs;
use vmft_vmm::world::Mailbox;

/// What the actions of the judge are about.
#[derive(Debug)]
pub(crate) struct LiveParts {
    pub(crate) arbiter: Arc<dyn Arbiter>,
    pub(crate) who: Candidate,
    pub(crate) fence: Arc<FenceState>,
    pub(crate) gate: Arc<HeldOutputs>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) status: Arc<StatusBoard>,
    /// Of a side that listens.
    pub(crate) followers: Option<Followers>,
}

/// The policy of one live side.
#[derive(Debug)]
pub(crate) struct LossPolicy {
    parts: LiveParts,
    reign: Mutex<LiveReign>,
    log: JudgeLog,
    changed: Condvar,
}

impl LossPolicy {
    /// For a side that is alone and live.
    pub(crate) fn new(parts: LiveParts) -> Self {
        let generation = parts.fence.generation();
        let reign = Mutex::new(LiveReign::new(generation));
        let log = JudgeLog::begin(Judge::Live { generation });
        Self { parts, reign, log, changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, LiveReign> {
        self.reign.lock()
    }

    /// Where the side stands.
    pub(crate) fn standing(&self) -> Standing {
        self.lock().standing().clone()
    }

    /// Waits while the arbiter is being asked, for at most `limit`.
    pub(crate) fn wait_decided(&self, limit: Duration) -> Standing {
        let reign = self.lock();
        self.changed
            .wait_timeout_while(reign, limit, |reign| *reign.standing() == Standing::Deciding)
            .0
            .standing()
            .clone()
    }

    /// The side's generation.
    pub(crate) fn generation(&self) -> Generation {
        self.lock().generation()
    }

    /// A backup's log begins here, with the machine at rest: from now on outputs wait for it. False if
    /// this side can have no backup now.
    pub(crate) fn begin(self: &Arc<Self>, backup: BackupKey) -> bool {
        self.handle(LiveEvent::LogBegins(backup))
    }

    /// Something has happened: has the judge decide, and does what it says. False if a backup was
    /// turned away.
    pub(crate) fn handle(self: &Arc<Self>, event: LiveEvent) -> bool {
        let (mut reign, at) = (self.lock(), now());
        self.log.heard(at, || JudgeInput::Live(event.clone()));
        reign.handle_event(at, event);
        self.execute(reign)
    }

    fn handle_timeout(self: &Arc<Self>) {
        let (mut reign, at) = (self.lock(), now());
        self.log.heard(at, || JudgeInput::Timeout);
        reign.handle_timeout(at);
        self.execute(reign);
    }

    fn execute(self: &Arc<Self>, mut reign: MutexGuard<'_, LiveReign>) -> bool {
        let (mut admitted, mut told, mut ask) = (true, Vec::new(), None);
        let LiveParts { gate, fence, mailbox, status, followers, .. } = &self.parts;
        while let Some(action) = reign.poll_action() {
            self.log.ordered(|| JudgeOrder::Live(action.clone()));
            match action {
                LiveAction::Admit(_) => {}
                LiveAction::TurnAway(_) => admitted = false,
                LiveAction::Protect => gate.protect(),
                LiveAction::Hold => {
                    gate.hold();
                    // What has left the gate, and waits at the disk, waits as well.
                    fence.doubt();
                }
                LiveAction::Release => {
                    gate.acknowledged(
                        followers.as_ref().map(Followers::acknowledged).unwrap_or_default(),
                    );
                }
                LiveAction::Resume => {
                    gate.resume(
                        followers.as_ref().map(Followers::acknowledged).unwrap_or_default(),
                    );
                }
                LiveAction::Unprotect => gate.unprotect(),
                LiveAction::Shut => {
                    gate.shut();
                    fence.shut();
                }
                LiveAction::Ask(generation) => ask = Some(generation),
                LiveAction::Advance(generation) => fence.advance(generation),
                LiveAction::Reopen(generation) => {
                    if let Some(followers) = followers {
                        followers.reopen(generation);
                    }
                }
                LiveAction::Halt(why) => {
                    status.update(|status| status.reason = Some(why.into()));
                    mailbox.ask(Asked::Halt);
                }
                LiveAction::Show(role) => status.set_role(role, reign.generation()),
                LiveAction::Tell(text) => told.push(text),
            }
        }
        drop(reign);
        self.changed.notify_all();
        told.iter().for_each(|text| tell!("{text}"));
        if let Some(generation) = ask {
            self.ask(generation);
        }
        admitted
    }

    /// Waits, where the guest was handed over, until it is time to ask who has it, and asks.
    pub(crate) fn ask_after_hand_over(self: &Arc<Self>) {
        let at = self.lock().poll_timeout();
        if let Some(at) = at {
            std::thread::sleep(at.since(now()));
            self.handle_timeout();
        }
    }

    /// Asks the arbiter on a thread of its own: it may be long in answering.
    fn ask(self: &Arc<Self>, generation: Generation) {
        let policy = Arc::clone(self);
        let ask = move || {
            let answer = ask_arbiter(&*policy.parts.arbiter, generation, &policy.parts.who);
            let event = match answer {
                Ok(verdict) => LiveEvent::Verdict(verdict),
                Err(error) => LiveEvent::Unreachable(error.to_string()),
            };
            policy.handle(event);
            let retry = policy.lock().poll_timeout();
            if let Some(at) = retry {
                std::thread::sleep(at.since(now()));
                policy.handle_timeout();
            }
        };
        vmft_sandbox::spawn(Task::Arbiter, "arbiter", ask)
            .expect("a host that cannot start a thread cannot run a machine");
    }

    /// From now on the judge is told of a later generation that the fence finds to be another's.
    ///
    /// # Errors
    /// The host's, without a thread for it.
    pub(crate) fn hear_of_later_generations(
        self: &Arc<Self>,
        overtaken: Receiver<(Generation, Candidate)>,
    ) -> io::Result<()> {
        let policy = Arc::clone(self);
        // Ends with the fence.
        let hear = move || {
            for (generation, winner) in overtaken {
                policy.handle(LiveEvent::Overtaken { generation, winner });
            }
        };
        vmft_sandbox::spawn(Task::Arbiter, "overtaken", hear).map(drop)
    }
}

/// Asks for a generation, and has that in the event log.
pub(crate) fn ask_arbiter(
    arbiter: &dyn Arbiter,
    generation: Generation,
    who: &Candidate,
) -> Result<Verdict, ArbiterError> {
    events::note(|| Event::ArbiterAsked { generation });
    let answer = arbiter.try_win(generation, who);
    events::note(|| match &answer {
        Ok(verdict) => Event::ArbiterAnswered { generation, verdict: verdict.clone() },
        Err(error) => Event::ArbiterUnreachable { why: error.to_string().into() },
    });
    answer
}
