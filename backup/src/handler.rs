//! What a live side's channel has to tell.

use crate::epoch::Protection;
use crate::events::{self, Event, Peer};
use crate::join::JoinStream;
use crate::mirror::{DiskFill, Mirrors};
use crate::policy::LossPolicy;
use crate::reign::LiveEvent;
use crate::requests::Requests;
use crate::status::StatusBoard;
use crate::tell;
use std::sync::Arc;
use vmft_log::entry::EntrySequence;
use vmft_logging_channel::backups::{BackupKey, Protects};
use vmft_logging_channel::handshake::SessionTerms;
use vmft_logging_channel::session::GoodbyeReason;
use vmft_logging_channel::transport::{
    CheckpointStream, EndCause, Followers, JoinTicket, Origin, PrimaryHandler, SessionEnd,
    TransportError,
};
use vmft_vmm::inputs::Asked;
use vmft_vmm::outputs::HeldOutputs;
use vmft_vmm::world::Mailbox;
use vmft_vmm::world::error_text;

/// The channel's news, on the channel's thread.
pub(crate) struct Handler {
    pub(crate) gate: Arc<HeldOutputs>,
    pub(crate) requests: Arc<Requests>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) policy: Arc<LossPolicy>,
    pub(crate) status: Arc<StatusBoard>,
    pub(crate) followers: Followers,
    pub(crate) protection: Protection,
    /// The disks that are sent to who joins.
    pub(crate) mirrors: Arc<Mirrors>,
    /// Backups that left because they had diverged, and that nobody has come for yet.
    pub(crate) unmended: u32,
}

impl Handler {
    fn count_followers(&self) {
        let protected_by = self.followers.protected_by() as u64;
        self.status.update(|status| status.followers = protected_by);
    }
}

impl PrimaryHandler for Handler {
    fn checkpoint(
        &mut self,
        _: &SessionTerms,
        ticket: JoinTicket,
    ) -> Result<Box<dyn CheckpointStream>, String> {
        let (requests, mailbox) = (Arc::clone(&self.requests), Arc::clone(&self.mailbox));
        let status = Arc::clone(&self.status);
        let digests = self.protection == Protection::Lockstep;
        events::note(|| Event::JoinBegun { backup: ticket.key() });
        let disks = DiskFill::begin(&self.mirrors, self.policy.generation(), &status);
        Ok(Box::new(JoinStream::new(requests, mailbox, status, ticket, digests, disks)))
    }

    fn protected(&mut self, backup: BackupKey, protects: Protects) {
        self.count_followers();
        let (Protects::Joined(generation) | Protects::Told(generation)) = protects;
        self.policy.handle(LiveEvent::Protecting(backup, generation));
        if matches!(protects, Protects::Joined(_)) {
            events::note(|| Event::JoinComplete { backup: Some(backup), point: None });
        }
        if matches!(protects, Protects::Joined(_)) && self.unmended > 0 {
            self.unmended -= 1;
            self.status.mended();
            tell!("the divergence is mended: a backup has joined from a checkpoint");
        }
        // A machine that waits for its backups looks whether they are complete.
        self.mailbox.ask(Asked::Pause);
    }

    fn acknowledged(&mut self, received: EntrySequence) {
        self.gate.acknowledged(received);
    }

    fn session_ended(&mut self, end: &SessionEnd) {
        self.count_followers();
        note_end(end);
        if end.protected
            && let EndCause::Departed(GoodbyeReason::Diverged(notice)) = &end.cause
        {
            self.status.diverged(notice);
            self.unmended += 1;
        }
        if let Some(backup) = end.backup {
            self.policy.handle(LiveEvent::SessionEnded {
                backup,
                complete: end.protected,
                left: end.cause == EndCause::Left,
                why: end.cause.to_string(),
            });
        }
    }

    fn peer_refused(&mut self, peer: Origin, error: &TransportError, untold: u64) {
        // A standby asks many times a second, and is told as often that it has to wait.
        if error.is_no_place() {
            tracing::debug!(%peer, "turned away: every place for a backup is taken");
            return;
        }
        events::note(|| Event::JoinRefused {
            with: peer.to_string().into(),
            why: error_text(error).into(),
            untold,
        });
        if untold > 0 {
            tell!("{untold} more did not join, for reasons like the next");
        }
        tell!("{peer} did not join: {}", error_text(error));
    }
}

/// A backup's session is over: for the event log.
fn note_end(end: &SessionEnd) {
    let Some(backup) = end.backup else { return };
    let (peer, why) = (Peer::Backup(backup), end.cause.to_string().into());
    events::note(|| match end.cause {
        _ if !end.protected => {
            Event::JoinRefused { with: backup.to_string().into(), why, untold: 0 }
        }
        EndCause::Left => Event::PeerLeft { peer, why },
        // One that says goodbye is succeeded as well: it may not have meant to go.
        _ => {
            let (last_sign, suspected) = (end.last_contact, end.ended_at);
            Event::PeerLost { peer, why, last_sign, suspected }
        }
    });
}
