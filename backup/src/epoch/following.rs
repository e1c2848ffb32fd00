//! A backup that is kept by epochs: joins like any other, applies what comes, and goes live from the
//! last whole epoch.

use super::follower::EpochFollower;
use crate::channel_log::ChannelSource;
use crate::checkpoint::MachineSink;
use crate::follower::ReplayGate;
use crate::following::{BackupControl, BackupDuties, Followed, Following, won};
use crate::join_content::JoinContent;
use crate::mending::Divergences;
use crate::reign::{Fate, FollowEvent};
use crate::side::{Side, SideError};
use crate::status::{EpochReport, Role};
use crate::tell;
use std::sync::Arc;
use vmft_log::entry::{Entry, StopReason};
use vmft_logging_channel::session::DivergenceNotice;
use vmft_logging_channel::transport::Joined;
use vmft_vmm::inputs::{LogEnd, LogSource};
use vmft_vmm::outputs::{KeptOutputs, OutputGate};
use vmft_vmm::world::error_text;

/// How a log of epochs ended.
enum LogOver {
    /// The primary has stopped its machine.
    Stopped(StopReason),
    /// There is no more.
    Ended,
    /// It cannot be followed.
    Broken(String),
}

impl Side {
    pub(crate) fn follow_epochs(
        &self,
        joined: Joined<MachineSink>,
        duties: &BackupDuties,
        control: &Arc<BackupControl>,
        divergences: &mut Divergences,
    ) -> Result<Followed, SideError> {
        let Joined { channel, terms, mut checkpoint, mut sink } = joined;
        let channel = Arc::new(channel);
        let not_out = JoinContent::unpack(&mut checkpoint)?;
        self.follow_disks(sink.take_disks(), terms.generation, control);
        let machine = sink.into_machine_at_once(&checkpoint)?;
        let mirrors = Arc::clone(&self.mirrors);
        let mut follower = EpochFollower::new(machine, &checkpoint)?.with_mirrors(mirrors);
        drop(checkpoint);
        let (shown, ram) = (follower.console_offset(), follower.ram());
        let following = self.begin_following(&channel, shown, ram, duties, control)?;
        self.status.set_role(Role::Backup, terms.generation);
        self.note_joined(follower.point());
        tell!("following the primary by checkpoints from point {}", follower.point());

        let Following { policy, kept, gate, mut source } = following;
        not_out.into_iter().for_each(|output| gate.emit(output));
        let open = self.faults.epochs();
        let over = self.apply_epochs(&mut follower, &mut source, &gate, &kept);
        drop(open);
        control.set(None);
        match over {
            LogOver::Stopped(reason) => {
                let machine = follower.into_machine()?;
                self.finish_stopped(machine, duties, reason, &channel, &kept, &policy)
            }
            LogOver::Ended => match policy.decide(&channel, FollowEvent::LogEnded) {
                Fate::GoLive(_) => Ok(won(follower.into_machine()?, &policy, &kept)),
                fate => Ok(self.concluded(fate)),
            },
            LogOver::Broken(why) => {
                let text = format!("an epoch is refused: {why}");
                let fate = policy.decide(&channel, FollowEvent::Diverged(text.clone()));
                let notice = DivergenceNotice { text: text.into(), ..DivergenceNotice::default() };
                let epochs = follower.epochs();
                Ok(self.join_again(notice, "", &channel, fate, divergences, epochs))
            }
        }
    }

    fn apply_epochs(
        &self,
        follower: &mut EpochFollower,
        source: &mut ChannelSource,
        gate: &ReplayGate,
        kept: &KeptOutputs,
    ) -> LogOver {
        let _watched = self.status.liveness().begin();
        loop {
            self.status.gauges().set(follower.point(), follower.time(), false);
            let entry = match source.next(follower.point()) {
                Ok(entry) => entry,
                Err(LogEnd::Ended) => return LogOver::Ended,
            };
            match entry {
                Entry::CheckpointPart { piece, bytes } => {
                    match follower.handle_piece(piece, &bytes) {
                        Ok(None) => {}
                        Ok(Some(outputs)) => {
                            outputs.into_iter().for_each(|output| gate.emit(output));
                            let epochs = follower.epochs();
                            let report = EpochReport { epochs, ..EpochReport::default() };
                            self.status.update(|status| status.epochs = Some(report));
                        }
                        Err(error) => return LogOver::Broken(error_text(&error)),
                    }
                }
                Entry::Released { output } => kept.released(output),
                Entry::Stop { reason, .. } => return LogOver::Stopped(reason),
                other => {
                    return LogOver::Broken(format!("a log of epochs has no {other:?}"));
                }
            }
        }
    }
}
