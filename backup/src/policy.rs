//! What a live side does when its backup is lost.
//!
//! ```text
//!  Protected ──a backup lost──▶ Deciding ──won, none left──▶ Alone ──a backup joins──▶ Protected
//!                                  ├───────won, others follow──▶ Protected
//!                                  └───────lost──▶ Fenced   (halts, lets nothing out)
//! ```
//! A backup that joins counts from the moment its log begins: outputs wait for it. It is lost like
//! any other once the end of its checkpoint is on its way; before, it costs nothing.
//!
//! **Invariant.** From the loss on, no output leaves before the next generation is won: the lost
//! backup may be alive on the other side of a partition, and going live.

use crate::arbiter::{Arbiter, Candidate, GenerationFence, RETRY, Verdict, win_or_wait};
use crate::status::{Role, StatusBoard};
use crate::tell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::Duration;
use vmft_logging_channel::entry::{EntrySequence, Generation};
use vmft_logging_channel::transport::PrimaryChannel;
use vmft_sandbox::Task;
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

    /// A backup's log begins here, with the machine at rest: from now on outputs wait for it. False if
    /// this side can have no backup now.
    pub fn begin(&self) -> bool {
        let mut standing = self.lock();
        if !matches!(*standing, Standing::Alone | Standing::Protected) {
            return false;
        }
        self.gate.protect();
        *standing = Standing::Protected;
        true
    }

    /// The only backup was lost before it can have had the whole checkpoint: this side is as alone as
    /// it was.
    pub fn join_failed(&self) {
        let mut standing = self.lock();
        if *standing == Standing::Protected {
            self.gate.unprotect();
            *standing = Standing::Alone;
            drop(standing);
            self.changed.notify_all();
        }
    }

    /// A backup has the whole state.
    pub fn protected(&self) {
        self.status.set_role(Role::Primary, self.fence.generation());
        self.changed.notify_all();
    }

    /// A backup is lost. Asks the arbiter on a thread of its own. When this side may go on, `channel`
    /// is opened again in the new generation; backups it still has go on with it.
    ///
    /// Whoever is lost while this is being decided is covered by the same generation: it cannot have
    /// been told of a later one.
    pub fn backup_lost(self: &Arc<Self>, reason: String, channel: Weak<PrimaryChannel>) {
        {
            let mut standing = self.lock();
            if *standing != Standing::Protected {
                return;
            }
            self.gate.hold();
            // What has left the gate, and waits at the disk, waits as well.
            self.fence.doubt();
            *standing = Standing::Deciding;
        }
        self.status.set_role(Role::Deciding, self.fence.generation());
        tell!("the backup is lost: {reason}");
        let policy = Arc::clone(self);
        let decide = move || policy.decide(&channel);
        vmft_sandbox::spawn(Task::Arbiter, "arbiter", decide)
            .expect("a host that cannot start a thread cannot run a machine");
    }

    fn decide(&self, channel: &Weak<PrimaryChannel>) {
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
                self.go_on(next, channel.upgrade().as_deref());
            }
            Verdict::Lost { winner } => self.lost(next, &winner),
        }
    }

    /// This side has won `next`, and goes on with the backups it still has, or alone.
    fn go_on(&self, next: Generation, channel: Option<&PrimaryChannel>) {
        let mut standing = self.lock();
        if *standing != Standing::Deciding {
            return;
        }
        let followers = channel.map_or(0, PrimaryChannel::followers);
        let role = if followers > 0 {
            self.gate.resume(channel.map_or(EntrySequence(0), PrimaryChannel::acknowledged));
            *standing = Standing::Protected;
            Role::Primary
        } else {
            self.gate.unprotect();
            *standing = Standing::Alone;
            Role::Alone
        };
        drop(standing);
        self.status.set_role(role, next);
        self.changed.notify_all();
        match followers {
            0 => tell!("running unprotected in generation {}", next.0),
            _ => tell!("{followers} more follow, in generation {}", next.0),
        }
        // After the standing: a backup that is told of the generation and then lost is another loss.
        if let Some(channel) = channel {
            channel.reopen(next);
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
        self.status.update(|status| status.reason = Some(why.into()));
        self.set(Standing::Fenced(why.to_owned()), Role::Halted);
        self.mailbox.ask(Asked::Halt);
    }
}
