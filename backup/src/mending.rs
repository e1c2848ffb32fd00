//! A backup that is not what the log says: it reports that, and is mended by a checkpoint.
//!
//! Mending is joining again: whatever differs, after that nothing does. A backup that knows that it has
//! diverged never goes live.

use crate::following::Followed;
use crate::reign::{Fate, FollowEvent};
use crate::side::{Side, SideError};
use crate::status::DivergenceReport;
use crate::succession::FollowPolicy;
use crate::tell;
use std::sync::Arc;
use std::time::Duration;
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::session::{DivergenceNotice, GoodbyeReason};
use vmft_logging_channel::transport::BackupChannel;
use vmft_vmm::inputs::InputError;
use vmft_vmm::machine::MachineError;
use vmft_vmm::world::error_text;

/// How long an orderly goodbye may take.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);
/// How often in a row a backup may diverge before it gives up.
const MAX_IN_A_ROW: u32 = 3;
/// So many agreements (digests, epochs) in one session say that mending helped: the next divergence is not
/// in a row with the last. About a second of computing.
const PROGRESS: u64 = 4;

/// The divergences of one side's life.
#[derive(Debug, Default)]
pub(crate) struct Divergences {
    in_a_row: u32,
    /// The last one is not mended yet.
    open: bool,
}

impl Divergences {
    /// Another one, after so many agreements in its session.
    pub(crate) fn add(&mut self, agreements: u64) {
        self.in_a_row = if agreements >= PROGRESS { 1 } else { self.in_a_row + 1 };
        self.open = true;
    }

    /// Why mending is of no use any more: this side cannot do what its primary does.
    pub(crate) fn give_up(&self) -> Option<String> {
        (self.in_a_row >= MAX_IN_A_ROW).then(|| {
            format!(
                "diverged {} times in a row, each time soon after it was mended; see the messages above",
                self.in_a_row
            )
        })
    }

    /// This side has joined. True if that mends a divergence.
    pub(crate) fn joined(&mut self) -> bool {
        std::mem::take(&mut self.open)
    }
}

/// What `error` says of this side's state; `None` if it is no divergence but this side's own failure.
fn notice(error: &MachineError) -> Option<DivergenceNotice> {
    match error {
        MachineError::Input(InputError::Divergence(divergence)) => Some(DivergenceNotice {
            window: Some((divergence.agreed, divergence.point)),
            page: divergence.what.page().map(|page| page.address().0),
            text: divergence.to_string().into(),
        }),
        MachineError::Delivery { .. }
        | MachineError::Adopt { .. }
        | MachineError::Engine(_)
        | MachineError::Broken(_) => {
            Some(DivergenceNotice { text: error_text(error).into(), ..DivergenceNotice::default() })
        }
        MachineError::Input(_) | MachineError::Reset(_) => None,
    }
}

impl Side {
    /// This side is not where the log says: reports it, and joins anew from a checkpoint. If it has
    /// already won its primary's succession, it ends instead.
    pub(crate) fn diverged(
        &self,
        error: MachineError,
        channel: &BackupChannel,
        policy: &Arc<FollowPolicy>,
        divergences: &mut Divergences,
        agreements: u64,
    ) -> Result<Followed, SideError> {
        let Some(notice) = notice(&error) else { return Err(error.into()) };
        let fate = policy.decide(channel, FollowEvent::Diverged(notice.text.to_string()));
        if policy.has_won() && error.is_of_the_guest() {
            // What ended the primary, in all likelihood: the guest goes on nowhere.
            return Err(error.into());
        }
        let reproduce = " (to reproduce, record the same guest with `vmft record --log FILE` and run \
                         `vmft replay FILE`)";
        Ok(self.join_again(notice, reproduce, channel, fate, divergences, agreements))
    }

    /// What this side has is not what the primary sends: says so, and joins anew from a checkpoint,
    /// unless it was to go live. `fate` is what the judge says of that.
    pub(crate) fn join_again(
        &self,
        notice: DivergenceNotice,
        advice: &str,
        channel: &BackupChannel,
        fate: Fate,
        divergences: &mut Divergences,
        agreements: u64,
    ) -> Followed {
        let Fate::JoinAgain(known) = fate else {
            self.status.diverged(&notice);
            return self.concluded(fate);
        };
        divergences.add(agreements);
        tell!("{}; joining again from a checkpoint{advice}", notice.text);
        self.status.diverged(&notice);
        channel.leave(GoodbyeReason::Diverged(notice), LEAVE_PATIENCE);
        Followed::Again(known)
    }

    /// This side has joined at `point`, which mends what had diverged.
    pub(crate) fn mended(&self, point: ExecutionPoint) {
        tell!("the divergence is mended: joined again, from a checkpoint of point {point}");
        self.status.mended();
    }
}

impl From<&DivergenceNotice> for DivergenceReport {
    fn from(notice: &DivergenceNotice) -> Self {
        let DivergenceNotice { window, page, text } = notice;
        Self {
            agreed: window.map(|(agreed, _)| agreed.get()),
            found: window.map(|(_, found)| found.get()),
            page: *page,
            text: text.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_gives_up_when_mending_does_not_help_and_only_then() {
        let mut divergences = Divergences::default();
        assert!(!divergences.joined(), "nothing was to be mended");
        for _ in 0..100 {
            divergences.add(PROGRESS);
            assert_eq!(divergences.give_up(), None);
            assert!(divergences.joined() && !divergences.joined());
        }
        divergences.add(PROGRESS - 1);
        assert_eq!(divergences.give_up(), None);
        divergences.add(0);
        let why = divergences.give_up().expect("three in a row");
        assert!(why.contains("3 times in a row"), "{why}");
    }
}
