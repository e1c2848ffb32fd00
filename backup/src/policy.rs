//! What a live side does when its backup is lost.
//!
//! ```text
//!  Protected ──backup lost──▶ Deciding ──won──▶ Alone ──a backup joins──▶ Protected
//!                                └─────lost──▶ Fenced   (halts, lets nothing out)
//! ```
//! **Invariant.** From the loss on, no output leaves before the next generation is won: the lost
//! backup may be alive on the other side of a partition, and going live.

use crate::arbiter::{Arbiter, Candidate, GenerationFence, RETRY, Verdict, win_or_wait};
use crate::status::{Role, StatusBoard};
use crate::tell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use vmft_logging_channel::entry::Generation;
use vmft_vmm::inputs::Asked;
use vmft_vmm::outputs::HeldOutputs;
use vmft_vmm::world::Mailbox;

/// Where a live side stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Alone, by its own generation.
    Alone,
    /// A backup follows.
    Protected,
    /// The backup is lost; the arbiter is asked.
    Deciding,
    /// Another side has the next generation.
    Fenced(String),
}

/// The policy of one live side.
#[derive(Debug)]
pub struct LossPolicy {
    arbiter: Arc<dyn Arbiter>,
    who: Candidate,
    fence: Arc<GenerationFence>,
    gate: Arc<HeldOutputs>,
    mailbox: Arc<Mailbox>,
    status: Arc<StatusBoard>,
    standing: Mutex<Standing>,
    changed: Condvar,
}

impl LossPolicy {
    /// For a side that is alone and live.
    pub fn new(
        arbiter: Arc<dyn Arbiter>,
        who: Candidate,
        fence: Arc<GenerationFence>,
        gate: Arc<HeldOutputs>,
        mailbox: Arc<Mailbox>,
        status: Arc<StatusBoard>,
    ) -> Self {
        let standing = Mutex::new(Standing::Alone);
        Self { arbiter, who, fence, gate, mailbox, status, standing, changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().expect("no holder of the policy's lock panics")
    }

    fn set(&self, standing: Standing, role: Role) {
        *self.lock() = standing;
        self.status.set_role(role, self.fence.generation());
        self.changed.notify_all();
    }

    /// Where the side stands.
    pub fn standing(&self) -> Standing {
        self.lock().clone()
    }

    /// Waits while the arbiter is being asked, for at most `limit`.
    pub fn wait_decided(&self, limit: Duration) -> Standing {
        let standing = self.lock();
        self.changed
            .wait_timeout_while(standing, limit, |standing| *standing == Standing::Deciding)
            .expect("no holder of the policy's lock panics")
            .0
            .clone()
    }

    /// The side's generation.
    pub fn generation(&self) -> Generation {
        self.fence.generation()
    }

    /// A backup has the whole state: from now on outputs wait for it. Called while the machine is
    /// at rest.
    pub fn protected(&self) {
        self.gate.protect();
        self.set(Standing::Protected, Role::Primary);
    }

    /// The backup is lost. Asks the arbiter on a thread of its own; `alone` is called when this side
    /// may go on, with its new generation.
    pub fn backup_lost(
        self: &Arc<Self>,
        reason: String,
        alone: impl FnOnce(Generation) + Send + 'static,
    ) {
        {
            let mut standing = self.lock();
            if *standing != Standing::Protected {
                return;
            }
            *standing = Standing::Deciding;
        }
        self.status.set_role(Role::Deciding, self.fence.generation());
        tell!("the backup is lost: {reason}");
        let policy = Arc::clone(self);
        let decide = move || policy.decide(alone);
        std::thread::Builder::new()
            .name("arbiter".to_owned())
            .spawn(decide)
            .expect("a host that cannot start a thread cannot run a machine");
    }

    fn decide(&self, alone: impl FnOnce(Generation)) {
        let next = Generation(self.fence.generation().0 + 1);
        let mut told = false;
        let verdict = win_or_wait(&*self.arbiter, next, &self.who, |error| {
            if !told {
                tell!("{error}; no output leaves until it answers");
                told = true;
            }
            std::thread::sleep(RETRY);
            true
        })
        .expect("asked until it answers");
        match verdict {
            Verdict::Won => {
                self.fence.advance(next);
                self.gate.unprotect();
                self.set(Standing::Alone, Role::Alone);
                tell!("running unprotected in generation {}", next.0);
                alone(next);
            }
            Verdict::Lost { winner } => self.lost(next, &winner),
        }
    }

    /// Another side has a later generation.
    pub fn lost(&self, generation: Generation, winner: &Candidate) {
        self.fenced(&format!("generation {} was won by {winner}", generation.0));
    }

    /// This side may not go on: nothing leaves any more, and the machine halts. The first reason
    /// stands.
    pub fn fenced(&self, why: &str) {
        self.gate.shut();
        self.fence.shut();
        if matches!(self.standing(), Standing::Fenced(_)) {
            return;
        }
        self.status.update(|status| status.reason = Some(why.to_owned()));
        self.set(Standing::Fenced(why.to_owned()), Role::Halted);
        self.mailbox.ask(Asked::Halt);
    }
}
