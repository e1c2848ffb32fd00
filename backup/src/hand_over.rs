//! A planned switch: the guest is handed over to a backup on purpose.
//!
//! ```text
//!  at a point, in checkpoint mode where an epoch is made to end
//!   ──▶ everything marked, acknowledged, out; then disks done ──▶ gate held ──▶ goodbye: handed over
//!     the backup: asks for the next generation at once, replays the rest, goes live
//!     this side, still at rest: asks for it, too, when a second is over. Lost: it halts. Won: it runs on.
//! ```
//! So nothing new decides who runs the guest: this side has left its backup as if it had been lost, but lets
//! it ask first. The guest rests from the first step on, and a side that runs on has lost nothing.

use crate::epoch::{Epochs, NoBackup};
use crate::policy::LossPolicy;
use crate::reign::{LiveEvent, Standing};
use crate::side::OutputPath;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_log::entry::Entry;
use vmft_logging_channel::session::GoodbyeReason;
use vmft_logging_channel::transport::PrimaryChannel;
use vmft_vmm::machine::Machine;
use vmft_vmm::world::DiskDesk;

/// How long the guest rests at most until everything is out.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// How long the goodbye may take.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(1);
/// How long one wait for the arbiter takes.
const STEP: Duration = Duration::from_millis(50);

/// Why a guest is not handed over; it runs on where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandOverError {
    /// Nobody could take it.
    #[error("no backup protects this side, so none can take the guest; see `vmft status`")]
    Nobody,
    /// The guest is between two points, where no log can end, or an epoch is under way.
    #[error("the guest is between two points, or an epoch is under way; ask again")]
    NotNow,
    /// What is to be out first is not.
    #[error(
        "the backup has not acknowledged everything, or a disk has not done everything, within 2 s"
    )]
    NotOut,
    /// The backup did not take it.
    #[error("the backup did not take the guest, which runs on here, unprotected")]
    NotTaken,
}

/// Why a guest does not leave a side whose storage fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotRelieved {
    /// Nobody could take it.
    #[error("no backup protects this side")]
    Nobody,
    /// A write that has been begun could still change the disk, over what another side writes.
    #[error("a write is still under way, and could land after those of a backup")]
    UnderWay,
    /// The backup did not take it: its own storage fails as well, or it is lost.
    #[error("the backup has not taken it")]
    NotTaken,
}

/// What a guest is handed over with.
#[derive(Debug)]
pub(crate) struct HandOver<'a> {
    pub(crate) channel: &'a PrimaryChannel,
    pub(crate) output_path: &'a OutputPath,
    pub(crate) policy: &'a Arc<LossPolicy>,
}

impl HandOver<'_> {
    /// Hands over the guest of `machine`, which is at rest, and stays so until this returns; in checkpoint
    /// mode, with its `epochs`. `Ok` if another side has it.
    pub(crate) fn run(
        self,
        machine: &mut Machine,
        epochs: Option<&Epochs>,
    ) -> Result<(), HandOverError> {
        let Self { channel, output_path, policy } = self;
        if policy.standing() != Standing::Protected || channel.protected_by() == 0 {
            return Err(HandOverError::Nobody);
        }
        match epochs {
            Some(epochs) => match epochs.end_here(machine, &output_path.gate) {
                Ok(true) => {}
                Ok(false) => return Err(HandOverError::NotNow),
                Err(NoBackup) => return Err(HandOverError::Nobody),
            },
            None => Self::mark_here(channel, output_path, machine)?,
        }
        let began = Instant::now();
        let left = || DRAIN_PATIENCE.saturating_sub(began.elapsed());
        // A write of this side that is still on its way would come after those of the next one. What waited
        // for an acknowledgement is on its way from there on, so the disks are asked after that.
        if !channel.wait_acknowledged(left()) || !output_path.outside.drain().wait(left()) {
            return Err(HandOverError::NotOut);
        }
        policy.handle(LiveEvent::HandOver);
        if policy.standing() != Standing::Deciding {
            return Err(HandOverError::Nobody);
        }
        if Self::leave_to_backup(channel, policy, GoodbyeReason::HandedOver) {
            Ok(())
        } else {
            Err(HandOverError::NotTaken)
        }
    }

    /// In lockstep: has those who follow come to this point, and outputs wait for no more than that.
    fn mark_here(
        channel: &PrimaryChannel,
        output_path: &OutputPath,
        machine: &Machine,
    ) -> Result<(), HandOverError> {
        if !machine.is_at_point() {
            return Err(HandOverError::NotNow);
        }
        let (begun, output) = (output_path.gate.begin_mark(), machine.outputs());
        let mark = Entry::OutputMark { point: machine.point(), output };
        if let Ok(entry) = channel.push(&mark) {
            output_path.gate.mark(begun, entry, output);
        }
        // One that is lost meanwhile need not.
        let _ = channel.push(&Entry::Flush { point: machine.point() });
        Ok(())
    }

    /// Gives up the reign of a side whose storage fails, with the machine at rest. `Ok` if another side has
    /// the guest.
    ///
    /// It is as if this side died here: the backup goes live with what it has, which is all that was ever
    /// let out, and issues again what it does not know to be done. What this side did beyond that nobody
    /// has seen. So it takes no point, and no whole epoch; only no write of this side may be under way any
    /// more, since that could land over what the backup writes next.
    pub(crate) fn relieve(self, desk: &DiskDesk, why: &str) -> Result<(), NotRelieved> {
        let Self { channel, policy, .. } = self;
        if policy.standing() != Standing::Protected || channel.protected_by() == 0 {
            return Err(NotRelieved::Nobody);
        }
        if !desk.freeze(DRAIN_PATIENCE) {
            desk.thaw();
            return Err(NotRelieved::UnderWay);
        }
        policy.handle(LiveEvent::HandOver);
        if policy.standing() != Standing::Deciding {
            desk.thaw();
            return Err(NotRelieved::Nobody);
        }
        let goodbye = GoodbyeReason::StorageFailed(why.into());
        if Self::leave_to_backup(channel, policy, goodbye) {
            return Ok(());
        }
        desk.thaw();
        Err(NotRelieved::NotTaken)
    }

    /// Says goodbye to the backups, and waits until the arbiter has decided: true if another side goes on.
    fn leave_to_backup(
        channel: &PrimaryChannel,
        policy: &Arc<LossPolicy>,
        goodbye: GoodbyeReason,
    ) -> bool {
        channel.leave(goodbye, GOODBYE_PATIENCE);
        policy.ask_after_hand_over();
        loop {
            match policy.wait_decided(STEP) {
                Standing::Deciding => {}
                Standing::Alone | Standing::Protected => return false,
                Standing::Fenced(_) => return true,
            }
        }
    }
}
