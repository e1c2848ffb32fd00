use super::*;
use crate::fingerprint::Fingerprint;
use crate::frame::{Frame, FrameDecoder};
use crate::receiver::{Receiver, ReceiverConfig, ReceiverEvent};

const fn at_ms(ms: u64) -> MonotonicTime {
    MonotonicTime::from_ns(ms * 1_000_000)
}

/// A primary of generation 1 with one backup, which has joined in it.
struct Pair {
    backups: Backups<()>,
    key: BackupKey,
    receiver: Receiver,
    decoders: [FrameDecoder; 2],
    /// The generations the backup has heard of.
    heard: Vec<u64>,
}

impl Pair {
    /// The generation becomes `at_begin` while the backup joins, before its log begins.
    fn new(at_begin: u64) -> Self {
        let pair = "pair".parse().expect("a good name");
        let identity =
            Identity { pair, generation: Generation(1), fingerprint: Fingerprint::new() };
        let mut backups = Backups::new(identity, EntrySequence(0));
        let session = SessionId::derive(b"this one");
        let key = backups.enter(session, Generation(1), ());
        if at_begin > 1 {
            backups.reopen(Generation(at_begin));
        }
        let point = ExecutionPoint::START;
        let begun = backups.begin(key, SenderConfig::default(), point, at_ms(0)).expect("joining");
        backups.session(key).expect("begun").complete();
        let receiver = Receiver::new(ReceiverConfig::default(), session, begun.position, at_ms(0));
        let decoders = [FrameDecoder::new(session), FrameDecoder::new(session)];
        Self { backups, key, receiver, decoders, heard: Vec::new() }
    }

    /// What the backup has to say at `ms` gets to its primary; what the primary has to say gets back.
    fn exchange(&mut self, ms: u64) -> Option<Protects> {
        let (now, session) = (at_ms(ms), self.backups.session(self.key).expect("it goes on"));
        let [to_primary, to_backup] = &mut self.decoders;
        let mut protects = None;
        while let Some(frame) = self.receiver.poll_transmit(now) {
            to_primary.feed(&frame.seal());
            let frame = to_primary.next_frame().expect("good").expect("whole");
            if matches!(frame, Frame::Acknowledge(_)) {
                session.accepted();
            }
            session.sender().handle_frame(now, &frame).expect("by the rules");
            protects = protects.or(session.poll_protects());
        }
        while let Some(frame) = session.sender().poll_transmit(now) {
            to_backup.feed(&frame.seal());
            let frame = to_backup.next_frame().expect("good").expect("whole");
            if let ReceiverEvent::Reign(generation) =
                self.receiver.handle_frame(now, frame).expect("by the rules")
            {
                self.heard.push(generation.0);
            }
        }
        protects
    }
}

#[test]
fn a_backup_that_joined_in_this_generation_protects_once_it_has_the_checkpoint() {
    let mut pair = Pair::new(1);
    assert_eq!(pair.backups.protected_by(), 0);
    assert_eq!(pair.exchange(0), Some(Protects::Joined(Generation(1))));
    assert_eq!(pair.backups.protected_by(), 1);
    assert!(pair.heard.is_empty());
}

#[test]
fn a_backup_that_joined_in_an_earlier_generation_is_told_and_protects_when_it_has_heard() {
    let mut pair = Pair::new(2);
    assert_eq!(pair.exchange(0), None, "it has the checkpoint, and has heard of nothing");
    assert_eq!((pair.backups.protected_by(), &pair.heard[..]), (0, &[2][..]));
    assert_eq!(pair.backups.joined(), 1, "it is told goodbye at a stop all the same");
    // Its next heartbeat echoes one from before it was told, at most.
    assert_eq!(pair.exchange(20), None);
    assert_eq!(pair.exchange(40), Some(Protects::Joined(Generation(2))));
    assert_eq!(pair.backups.protected_by(), 1);
}

#[test]
fn a_backup_that_stays_when_the_generation_changes_protects_again_when_it_has_heard() {
    let mut pair = Pair::new(1);
    assert_eq!(pair.exchange(0), Some(Protects::Joined(Generation(1))));
    pair.backups.reopen(Generation(2));
    assert_eq!((pair.backups.protected_by(), pair.exchange(1)), (0, None));
    assert_eq!(pair.heard, [2]);
    // An acknowledgement of what was sent after the Reign frame shows it as well as an echo.
    let released = Entry::Released { output: vmft_log::entry::OutputSequence(1) };
    pair.backups.push(at_ms(2), &released).expect("it follows");
    assert_eq!(pair.exchange(4), None);
    assert_eq!(pair.exchange(5), Some(Protects::Told(Generation(2))));
}
