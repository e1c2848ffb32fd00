//! What sides agree on when they shake hands, and what of it changes before a session begins.

mod common;

use common::{
    LateStream, PATIENCE, Scribe, Told, ToyMemory, backup_config, mark, primary_config, wait_for,
};
use std::sync::mpsc::{Receiver, Sender, channel};
use vmft_log::entry::{EntrySequence, Generation};
use vmft_logging_channel::backups::{BackupKey, Protects};
use vmft_logging_channel::handshake::SessionTerms;
use vmft_logging_channel::transport::{
    BackupChannel, CheckpointStream, Delivery, JoinTicket, Origin, PrimaryChannel, PrimaryHandler,
    SessionEnd, TransportError,
};

/// Begins a backup's log when it is told to, and says when one has shaken hands.
struct Late {
    scribe: Scribe,
    shaken: Sender<()>,
    go: Option<Receiver<()>>,
}

impl PrimaryHandler for Late {
    fn checkpoint(
        &mut self,
        _: &SessionTerms,
        ticket: JoinTicket,
    ) -> Result<Box<dyn CheckpointStream>, String> {
        self.shaken.send(()).expect("the test waits for it");
        Ok(Box::new(LateStream::new(ticket, self.go.take().expect("one backup"))))
    }

    fn protected(&mut self, backup: BackupKey, protects: Protects) {
        self.scribe.protected(backup, protects);
    }

    fn acknowledged(&mut self, received: EntrySequence) {
        self.scribe.acknowledged(received);
    }

    fn session_ended(&mut self, end: &SessionEnd) {
        self.scribe.session_ended(end);
    }

    fn peer_refused(&mut self, peer: Origin, error: &TransportError, untold: u64) {
        self.scribe.peer_refused(peer, error, untold);
    }
}

#[test]
fn a_backup_is_told_of_a_generation_that_was_won_while_it_joined() {
    let (tell, told) = channel();
    let (shaken, has_shaken) = channel();
    let (go, waits) = channel();
    let handler = Late { scribe: Scribe::new(tell), shaken, go: Some(waits) };
    let primary = PrimaryChannel::listen(primary_config(), handler).expect("a free port");
    let config = backup_config(&primary);
    let joining = std::thread::spawn(move || BackupChannel::join(config, ToyMemory::default()));
    has_shaken.recv_timeout(PATIENCE).expect("it joins");
    // Another backup is lost here, and the primary wins the next generation without it.
    primary.reopen(Generation(8));
    go.send(()).expect("it waits");
    let joined = joining.join().expect("no panic").expect("a good primary");
    assert_eq!(joined.terms.generation, Generation(1), "what they had agreed on");
    wait_for(&told, |told| matches!(told, Told::Protected).then_some(()));
    primary.push(&mark(60, 1)).expect("room");
    let first = joined.channel.recv(PATIENCE);
    assert!(matches!(first, Delivery::Entry(..)), "{first:?}");
    assert_eq!(joined.channel.generation(), Generation(8), "it was told before the first entry");
}
