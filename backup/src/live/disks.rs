//! What a live side does about disks whose storage fails: a backup relieves it, or its guest stands still.

use super::LiveSide;
use crate::hand_over::{HandOver, NotRelieved};
use crate::status::DiskTroubleStatus;
use crate::tell;
use vmft_vmm::world::{DiskTrouble, OnError};

/// Why the guest does not leave a side whose disks fail.
struct WhyNot {
    text: String,
    /// It is not tried again before something else fails.
    is_for_good: bool,
}

const NOBODY: &str = "no backup protects this side";

impl LiveSide<'_> {
    /// Sees to disks whose storage fails, with the machine at rest: has a backup relieve this side, or the
    /// guest stand still. True if another side has the guest.
    pub(super) fn mind_disks(&self, declined: &mut bool) -> bool {
        let (side, desk) = (self.side, &self.side.disk_desk);
        let heard = side.hear_of_disks();
        *declined &= heard.failed.is_empty();
        let troubles = desk.troubles();
        let moves = |disk: &&DiskTrouble| disk.on_error == OnError::Failover;
        let Some(first) = troubles.iter().find(moves).filter(|_| !*declined) else {
            side.tell_of_disks(&heard, None);
            return false;
        };
        let is_news = !heard.failed.is_empty() || !heard.hanging.is_empty();
        let why = DiskTroubleStatus::from(first).text();
        let why_not = match self.relieve(&troubles, &why) {
            Ok(()) => return true,
            Err(why_not) => why_not,
        };
        *declined |= why_not.is_for_good;
        desk.answer_final();
        if is_news || why_not.is_for_good {
            side.tell_of_disks(&heard, Some(&why_not.text));
        }
        false
    }

    /// Has a backup take the guest, because of these disks.
    fn relieve(&self, troubles: &[DiskTrouble], why: &str) -> Result<(), WhyNot> {
        let not_now = |text: String| WhyNot { text, is_for_good: false };
        let channel = self.channel.as_ref().ok_or_else(|| not_now(NOBODY.to_owned()))?;
        if channel.protected_by() == 0 {
            return Err(not_now(NOBODY.to_owned()));
        }
        if self.side.disk_desk.is_unproved() {
            let text = "the storage of the side before this one has failed at the same";
            return Err(not_now(text.to_owned()));
        }
        if troubles.iter().any(|disk| disk.may_land_later) {
            return Err(not_now(NotRelieved::UnderWay.to_string()));
        }
        tell!("{why}; a backup is to go on with its own way to the storage");
        let (output_path, policy) = (&self.output_path, &self.policy);
        let hand_over = HandOver { channel, output_path, policy };
        hand_over.relieve(&self.side.disk_desk, why).map_err(|error| WhyNot {
            text: error.to_string(),
            is_for_good: error != NotRelieved::Nobody,
        })
    }
}
