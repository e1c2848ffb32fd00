//! The channel over real sockets on the loopback: pairs, and the guests nobody invited.

mod common;
#[path = "transport/strangers.rs"]
mod strangers;

use common::{
    PATIENCE, Told, ToyMemory, backup_config, chain, disk_read, identity, mark, primary,
    primary_config, toy_stream, wait_for, wait_for_end, wait_for_refusal,
};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;
use vmft_log::checkpoint::{CheckpointPiece, JoinPiece};
use vmft_log::entry::{Entry, EntrySequence, Generation, StopReason};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::backups::{BackupKey, Protects};
use vmft_logging_channel::detector::Suspicion;
use vmft_logging_channel::fingerprint::Fingerprint;
use vmft_logging_channel::frame::{Frame, FrameDecoder};
use vmft_logging_channel::handshake::{HandshakeError, Nonce, Offered, Refusal, SessionTerms};
use vmft_logging_channel::session::{GoodbyeReason, SessionId};
use vmft_logging_channel::transport::{
    BackupChannel, CheckpointStream, Delivery, EndCause, JoinTicket, Joined, Origin, PeerAddress,
    PrimaryChannel, PrimaryConfig, PrimaryHandler, PrimaryPushError, Room, SessionEnd,
    TakesDigests, TransportError, now,
};

fn join(primary: &PrimaryChannel) -> Joined<ToyMemory> {
    BackupChannel::join(backup_config(primary), ToyMemory::default()).expect("a good primary")
}

fn stranger(primary: &PrimaryChannel) -> TcpStream {
    TcpStream::connect(primary.local_address().socket_address()).expect("it listens")
}

fn refusal(error: TransportError) -> Refusal {
    match error {
        TransportError::Handshake(HandshakeError::RefusedByPeer(refusal)) => refusal,
        other => panic!("a refusal by the primary was expected: {}", chain(&other)),
    }
}

fn take(backup: &BackupChannel, count: u64) -> Vec<Entry> {
    (0..count)
        .map(|_| match backup.recv(PATIENCE) {
            Delivery::Entry(_, entry) => entry,
            other => panic!("an entry was expected: {other:?}"),
        })
        .collect()
}

fn wait_for_backup_end(backup: &BackupChannel) -> EndCause {
    loop {
        match backup.recv(PATIENCE) {
            Delivery::Ended(end) => return end.cause,
            Delivery::Entry(..) => {}
            Delivery::TimedOut => panic!("the session should have ended by now"),
        }
    }
}

#[test]
fn a_backup_starts_from_the_checkpoint_and_gets_every_entry() {
    let (primary, _told) = primary(primary_config());
    let joined = join(&primary);
    assert_eq!(joined.checkpoint.position.point, ExecutionPoint::new(50));
    assert_eq!(joined.checkpoint.state, b"registers and devices");
    let written: Vec<(u64, u8)> = (1..200).filter(|n| n % 3 == 0).map(|n| (n, n as u8)).collect();
    assert_eq!(joined.sink.0, written);
    assert_eq!(joined.terms.peer, identity());

    assert!(primary.wait_protected(PATIENCE));
    let entries: Vec<Entry> = (51..400)
        .map(|n| if n % 5 == 0 { mark(n, n) } else { disk_read(n, n as usize * 30) })
        .collect();
    for (entry, sequence) in entries.iter().zip(1..) {
        assert_eq!(primary.push(entry), Ok(EntrySequence(sequence)));
    }
    assert!(primary.wait_acknowledged(PATIENCE));
    assert_eq!(take(&joined.channel, entries.len() as u64), entries);
    let (stats, count) = (primary.stats(), entries.len() as u64);
    assert_eq!((stats.entries, stats.acknowledged), (count, EntrySequence(count)));
    assert!(stats.acknowledge_latency.expect("there were marks").samples > 0);
}

#[test]
fn the_acknowledgement_of_a_mark_is_told_on_the_channels_thread() {
    let (primary, told) = primary(primary_config());
    let joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    let sequence = primary.push(&mark(60, 1)).expect("room");
    wait_for(&told, |told| match told {
        Told::Acknowledged(received) => (received >= sequence).then_some(()),
        _ => None,
    });
    joined.channel.recv(PATIENCE);
    joined.channel.report_applied(sequence, ExecutionPoint::new(60));
    wait_for(&told, |told| {
        let applied = primary.stats().applied == sequence;
        (matches!(told, Told::Acknowledged(_)) && applied).then_some(())
    });
    assert_eq!(primary.stats().applied_point, ExecutionPoint::new(60));
}

#[test]
fn nothing_is_acknowledged_before_the_delay_is_over() {
    let (primary, told) = primary(primary_config());
    let mut config = backup_config(&primary);
    config.receiver.acknowledge_delay = Duration::from_millis(150);
    let _joined = BackupChannel::join(config, ToyMemory::default()).expect("a good primary");
    assert!(primary.wait_protected(PATIENCE));
    let pushed_at = now();
    let sequence = primary.push(&mark(60, 1)).expect("room");
    wait_for(&told, |told| match told {
        Told::Acknowledged(received) => (received >= sequence).then_some(()),
        _ => None,
    });
    assert!(now().since(pushed_at) >= Duration::from_millis(150));
}

#[test]
fn who_waits_for_an_acknowledgement_waits_until_the_handler_knows_of_it() {
    struct Slow {
        entered: std::sync::mpsc::Sender<()>,
        go_on: std::sync::mpsc::Receiver<()>,
    }
    impl PrimaryHandler for Slow {
        fn checkpoint(
            &mut self,
            _terms: &SessionTerms,
            ticket: JoinTicket,
        ) -> Result<Box<dyn CheckpointStream>, String> {
            Ok(toy_stream(ticket))
        }
        fn protected(&mut self, _: BackupKey, _: Protects) {}
        fn acknowledged(&mut self, received: EntrySequence) {
            if received > EntrySequence(0) {
                self.entered.send(()).expect("the test is there");
                // An error says that everything may go on.
                let _ = self.go_on.recv();
            }
        }
        fn session_ended(&mut self, _end: &SessionEnd) {}
        fn peer_refused(&mut self, _peer: Origin, _error: &TransportError, _untold: u64) {}
    }
    let (entered, has_entered) = std::sync::mpsc::channel();
    let (let_go, go_on) = std::sync::mpsc::channel();
    let handler = Slow { entered, go_on };
    let primary = PrimaryChannel::listen(primary_config(), handler).expect("a port");
    let _joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    primary.push(&mark(60, 1)).expect("room");
    has_entered.recv_timeout(PATIENCE).expect("acknowledged");
    let early = primary.wait_acknowledged(Duration::from_millis(20));
    drop(let_go);
    assert!(!early, "its outputs were still held");
    assert!(primary.wait_acknowledged(PATIENCE));
}

#[test]
fn a_channel_can_be_closed_by_its_own_handler() {
    struct Closer(std::sync::mpsc::Receiver<PrimaryChannel>, std::sync::mpsc::Sender<()>);
    impl PrimaryHandler for Closer {
        fn checkpoint(
            &mut self,
            _terms: &SessionTerms,
            _: JoinTicket,
        ) -> Result<Box<dyn CheckpointStream>, String> {
            drop(self.0.recv().expect("the test hands it over"));
            self.1.send(()).expect("the test waits");
            Err("closed".to_owned())
        }
        fn protected(&mut self, _: BackupKey, _: Protects) {}
        fn acknowledged(&mut self, _: EntrySequence) {}
        fn session_ended(&mut self, _end: &SessionEnd) {}
        fn peer_refused(&mut self, _peer: Origin, _error: &TransportError, _untold: u64) {}
    }
    let ((give, take), (tell, told)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let primary = PrimaryChannel::listen(primary_config(), Closer(take, tell)).expect("a port");
    let config = backup_config(&primary);
    give.send(primary).expect("the handler is there");
    BackupChannel::join(config, ToyMemory::default()).expect_err("closed");
    told.recv_timeout(PATIENCE).expect("closing does not wait for itself");
}

#[test]
fn without_a_backup_nothing_is_taken() {
    let (primary, _told) = primary(primary_config());
    assert_eq!(primary.push(&mark(60, 1)), Err(PrimaryPushError::NoBackup));
    assert_eq!(primary.wait_room(Duration::ZERO), Room::NoBackup);
    assert!(!primary.wait_protected(Duration::ZERO));
    assert!(!primary.wait_acknowledged(Duration::ZERO));
}

#[test]
fn a_backup_that_takes_nothing_stops_the_primary_and_taking_lets_it_go_on() {
    let mut config = primary_config();
    config.sender.capacity = 4 << 20;
    let (primary, _told) = primary(config);
    let mut config = backup_config(&primary);
    config.receiver.capacity = 4 << 20;
    let joined = BackupChannel::join(config, ToyMemory::default()).expect("a good primary");
    assert!(primary.wait_protected(PATIENCE));
    let mut pushed = 0;
    // What fits: the backup's window and the primary's capacity. Once the window is used up
    // only taking entries makes room again.
    let limit = Duration::from_millis(100);
    while primary.wait_room(limit) == Room::Available {
        primary.push(&disk_read(60, 100_000)).expect("room");
        pushed += 1;
        assert!(pushed < 200, "buffers are bounded");
    }
    assert_eq!(primary.wait_room(Duration::ZERO), Room::Full);
    assert!(pushed * 100_000 >= 7 << 20, "only {pushed}");
    assert!((primary.protected_by() == 1), "a full buffer is no failure");
    take(&joined.channel, pushed);
    assert_eq!(primary.wait_room(PATIENCE), Room::Available);
    primary.push(&mark(60, 1)).expect("room");
    assert_eq!(take(&joined.channel, 1), [mark(60, 1)]);
}

#[test]
fn a_machine_that_stops_is_no_failure_on_either_side() {
    let (primary, told) = primary(primary_config());
    let joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    let point = ExecutionPoint::new(70);
    primary.push(&Entry::Stop { point, reason: StopReason::GuestPowerOff }).expect("room");
    assert!(primary.leave(GoodbyeReason::Stopped, PATIENCE));
    let end = wait_for_end(&told);
    assert_eq!((&end.cause, end.is_failure(), end.protected), (&EndCause::Left, false, true));
    assert_eq!(
        take(&joined.channel, 1),
        [Entry::Stop { point, reason: StopReason::GuestPowerOff }]
    );
    assert_eq!(wait_for_backup_end(&joined.channel), EndCause::Departed(GoodbyeReason::Stopped));
}

#[test]
fn a_stop_in_the_log_makes_even_a_broken_connection_no_failure() {
    let (primary, _told) = primary(primary_config());
    let joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    let point = ExecutionPoint::new(70);
    primary.push(&Entry::Stop { point, reason: StopReason::Operator }).expect("room");
    assert!(primary.wait_acknowledged(PATIENCE));
    drop(primary);
    assert_eq!(wait_for_backup_end(&joined.channel), EndCause::Departed(GoodbyeReason::Stopped));
}

#[test]
fn a_backup_that_leaves_is_no_failure() {
    let (primary, told) = primary(primary_config());
    let joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    assert!(joined.channel.leave(GoodbyeReason::Leaving, PATIENCE));
    let end = wait_for_end(&told);
    assert_eq!(end.cause, EndCause::Departed(GoodbyeReason::Leaving));
    assert_eq!(wait_for_backup_end(&joined.channel), EndCause::Left);
}

#[test]
fn a_closed_connection_is_a_loss_on_the_other_side() {
    let (primary_channel, _told) = primary(primary_config());
    let joined = join(&primary_channel);
    assert!(primary_channel.wait_protected(PATIENCE));
    drop(primary_channel);
    assert_eq!(wait_for_backup_end(&joined.channel), EndCause::Lost(Suspicion::Closed));

    let (primary_channel, told) = primary(primary_config());
    let joined = join(&primary_channel);
    assert!(primary_channel.wait_protected(PATIENCE));
    drop(joined);
    let end = wait_for_end(&told);
    assert!(end.is_failure() && end.protected);
    assert_eq!(end.cause, EndCause::Lost(Suspicion::Closed));
    assert_ne!(primary_channel.protected_by(), 1);
}

#[test]
fn what_was_received_is_delivered_before_the_loss() {
    let (primary, _told) = primary(primary_config());
    let joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    let entries: Vec<Entry> = (51..151).map(|n| mark(n, n)).collect();
    for entry in &entries {
        primary.push(entry).expect("room");
    }
    assert!(primary.wait_acknowledged(PATIENCE));
    drop(primary);
    assert_eq!(take(&joined.channel, 100), entries);
    assert_eq!(wait_for_backup_end(&joined.channel), EndCause::Lost(Suspicion::Closed));
}

#[test]
fn a_second_backup_is_refused_and_the_first_is_not_disturbed() {
    let (primary, told) = primary(primary_config());
    let first = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    let error = BackupChannel::join(backup_config(&primary), ToyMemory::default());
    assert_eq!(refusal(error.expect_err("there is one already")), Refusal::HasBackup);
    assert!(wait_for_refusal(&told).contains("has a backup already"));
    primary.push(&mark(60, 1)).expect("room");
    assert_eq!(take(&first.channel, 1), [mark(60, 1)]);
}

#[test]
fn after_a_loss_no_backup_is_admitted_until_the_next_generation() {
    let (primary, told) = primary(primary_config());
    let joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    drop(joined);
    assert!(wait_for_end(&told).protected);
    let error = BackupChannel::join(backup_config(&primary), ToyMemory::default());
    assert!(matches!(refusal(error.expect_err("runs alone")), Refusal::NotAccepting(_)));
    primary.reopen(Generation(2));
    let joined = join(&primary);
    assert_eq!(joined.terms.generation, Generation(2));
    assert!(primary.wait_protected(PATIENCE));
    assert_eq!(primary.push(&mark(60, 1)), Ok(EntrySequence(1)), "a new log");
}

#[test]
fn another_machine_is_refused_and_the_primarys_log_names_the_field_that_differs() {
    let (primary, told) = primary(primary_config());
    let mut config = backup_config(&primary);
    config.identity.fingerprint = Fingerprint::new().with("engine", "other");
    let error = BackupChannel::join(config, ToyMemory::default()).expect_err("another machine");
    assert_eq!(refusal(error), Refusal::Undisclosed);
    assert!(wait_for_refusal(&told).contains("engine is \"toy\""));
    join(&primary);
}

#[test]
fn a_port_in_use_is_a_typed_error() {
    let (first, _told) = primary(primary_config());
    let mut config: PrimaryConfig = primary_config();
    let port = first.local_address().socket_address().port();
    config.listen = PeerAddress::tcp("127.0.0.1", port);
    let (tell, _) = std::sync::mpsc::channel();
    let error = PrimaryChannel::listen(config, common::Scribe::new(tell)).expect_err("in use");
    assert!(matches!(error, TransportError::Listen { .. }));
    assert!(chain(&error).contains("in use"), "{}", chain(&error));
}

#[test]
fn nobody_there_is_a_typed_error() {
    let (gone, _told) = primary(primary_config());
    let config = backup_config(&gone);
    drop(gone);
    let error = BackupChannel::join(config, ToyMemory::default()).expect_err("nobody there");
    assert!(matches!(error, TransportError::Connect { .. }));
    assert!(chain(&error).contains("refused"), "{}", chain(&error));
}

#[test]
fn a_backup_that_dies_before_it_says_that_it_has_the_checkpoint_may_have_it() {
    let (primary, told) = primary(primary_config());
    let mut dying = stranger(&primary);
    let (offered, hello) = Offered::new(identity(), Nonce([1; 16]));
    let hello = hello.encode(SessionId::HANDSHAKE).expect("small").seal();
    dying.write_all(&hello).expect("it listens");
    let mut decoder = FrameDecoder::new(SessionId::HANDSHAKE);
    let reply = loop {
        let mut bytes = [0; 4096];
        let len = dying.read(&mut bytes).expect("a reply");
        decoder.feed(&bytes[..len]);
        if let Some(frame) = decoder.next_frame().expect("a good reply") {
            break frame;
        }
    };
    let (terms, confirm) = offered.handle_frame(&reply).expect("a good reply");
    dying.write_all(&confirm.encode(terms.session).expect("small").seal()).expect("it listens");
    decoder.set_session(terms.session);
    let is_end = |frame: &Frame| matches!(frame, Frame::Checkpoint(CheckpointPiece::End(_)));
    while !decoder.next_frame().expect("a good checkpoint").as_ref().is_some_and(is_end) {
        let mut bytes = [0; 4096];
        let len = dying.read(&mut bytes).expect("the checkpoint");
        decoder.feed(&bytes[..len]);
    }
    // He has the whole checkpoint, and could go live with it.
    drop(dying);
    let end = wait_for_end(&told);
    assert!(end.protected && matches!(end.cause, EndCause::NotBegun(_)), "{end:?}");
    let refused = BackupChannel::join(backup_config(&primary), ToyMemory::default());
    assert!(matches!(refusal(refused.expect_err("not decided")), Refusal::NotAccepting(_)));
    primary.reopen(Generation(8));
    let _joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
}

#[test]
fn a_checkpoint_that_cannot_be_made_costs_the_backup_and_nothing_else() {
    struct Broken(JoinTicket);
    impl CheckpointStream for Broken {
        fn next_piece(&mut self) -> Result<Option<JoinPiece>, String> {
            self.0.begin(ExecutionPoint::new(50)).map_err(|error| error.to_string())?;
            Err("the machine has stopped".to_owned())
        }

        fn digests(&self) -> Option<Arc<dyn TakesDigests>> {
            None
        }
    }
    struct Once(std::sync::mpsc::Sender<Told>, bool);
    impl PrimaryHandler for Once {
        fn checkpoint(
            &mut self,
            _: &SessionTerms,
            ticket: JoinTicket,
        ) -> Result<Box<dyn CheckpointStream>, String> {
            if std::mem::replace(&mut self.1, true) {
                return Ok(toy_stream(ticket));
            }
            Ok(Box::new(Broken(ticket)))
        }
        fn protected(&mut self, _: BackupKey, _: Protects) {}
        fn acknowledged(&mut self, _: EntrySequence) {}
        fn session_ended(&mut self, end: &SessionEnd) {
            // The test may have ended.
            let _ = self.0.send(Told::Ended(end.clone()));
        }
        fn peer_refused(&mut self, _: Origin, error: &TransportError, _: u64) {
            let _ = self.0.send(Told::Refused(chain(error)));
        }
    }
    let (tell, told) = std::sync::mpsc::channel();
    let primary = PrimaryChannel::listen(primary_config(), Once(tell, false)).expect("a port");
    BackupChannel::join(backup_config(&primary), ToyMemory::default()).expect_err("broken");
    let end = wait_for_end(&told);
    assert!(!end.protected && end.others == 0, "{end:?}");
    assert!(wait_for_refusal(&told).contains("the machine has stopped"));
    let _joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
}

/// A middleman between a backup and its primary, to tamper with what passes.
fn middleman(
    primary: &PrimaryChannel,
    mut tamper: impl FnMut(&mut Vec<u8>) -> bool + Send + 'static,
) -> PeerAddress {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let target = primary.local_address().socket_address();
    std::thread::spawn(move || {
        let (backup, _) = listener.accept().expect("the backup connects");
        let primary = TcpStream::connect(target).expect("it listens");
        let mut up = (backup.try_clone().expect("clone"), primary.try_clone().expect("clone"));
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut up.0, &mut up.1);
            let _ = up.1.shutdown(std::net::Shutdown::Write);
        });
        let (mut from, mut to) = (primary, backup);
        let mut bytes = vec![0; 65536];
        while let Ok(len @ 1..) = from.read(&mut bytes) {
            let mut passing = bytes[..len].to_vec();
            let go_on = tamper(&mut passing);
            if to.write_all(&passing).is_err() || !go_on {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
        let _ = from.shutdown(std::net::Shutdown::Both);
    });
    PeerAddress::tcp("127.0.0.1", port)
}

#[test]
fn a_checkpoint_cut_or_damaged_on_its_way_is_a_typed_error_and_the_primary_goes_on() {
    let (primary, told) = primary(primary_config());
    // The stream of this primary has some 300 bytes of handshake and 9,000 of checkpoint.
    for (damage, at) in [(false, 200), (false, 700), (true, 180), (true, 500), (true, 900)] {
        let mut passed = 0;
        let address = middleman(&primary, move |bytes| {
            let here = at - passed;
            passed += bytes.len();
            if passed <= at {
                return true;
            }
            if damage {
                bytes[here] ^= 0x40;
                passed = 0;
                return true;
            }
            bytes.truncate(here);
            false
        });
        let mut config = backup_config(&primary);
        config.primary = address;
        let error = BackupChannel::join(config, ToyMemory::default()).expect_err("tampered with");
        let typed = matches!(
            error,
            TransportError::Frame(_)
                | TransportError::Closed { .. }
                | TransportError::Io(_)
                | TransportError::Handshake(_)
        );
        assert!(typed, "{damage} at {at}: {}", chain(&error));
        wait_for_refusal(&told);
        // Where the end was on its way, the backup may have had it all.
        primary.reopen(Generation(1));
    }
    let _joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
}

#[test]
fn a_primary_whose_machine_failed_says_so_and_is_taken_for_lost() {
    let (primary, _told) = primary(primary_config());
    let joined = join(&primary);
    assert!(primary.wait_protected(PATIENCE));
    primary.push(&mark(60, 1)).expect("room");
    let failed = GoodbyeReason::Failed("the machine failed at point 61".into());
    assert!(primary.leave(failed.clone(), PATIENCE));
    assert_eq!(take(&joined.channel, 1), [mark(60, 1)], "what was logged comes before");
    assert_eq!(wait_for_backup_end(&joined.channel), EndCause::Departed(failed));
    assert!(joined.channel.end().expect("it has ended").is_failure());
    assert!(joined.channel.peer_has_left());
}

#[test]
fn a_silent_primary_is_suspected_after_the_configured_time() {
    let (primary, _told) = primary(primary_config());
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let mut held = false;
    // Once told, the middleman holds everything back, and the connection stays open.
    let (begin, begun) = std::sync::mpsc::channel::<()>();
    let address = middleman(&primary, move |_| {
        held |= begun.try_recv().is_ok();
        if held {
            let _ = stopped.recv();
        }
        true
    });
    let mut config = backup_config(&primary);
    config.primary = address;
    config.detector.suspect_after = Duration::from_millis(100);
    let joined = BackupChannel::join(config, ToyMemory::default()).expect("a good primary");
    assert!(primary.wait_protected(PATIENCE));
    begin.send(()).expect("the middleman is there");
    let cause = wait_for_backup_end(&joined.channel);
    let EndCause::Lost(Suspicion::Silent(silence)) = cause else { panic!("{cause:?}") };
    assert!(silence >= Duration::from_millis(100), "{silence:?}");
    let end = joined.channel.end().expect("it has ended");
    assert!(end.ended_at.since(end.last_contact) >= silence);
    drop(stop);
}

#[test]
fn a_tampered_log_ends_the_session_and_delivers_nothing_wrong() {
    let (primary, told) = primary(primary_config());
    let (begin, begun) = std::sync::mpsc::channel::<()>();
    let mut tampering = false;
    let address = middleman(&primary, move |bytes| {
        tampering |= begun.try_recv().is_ok();
        if tampering {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x01;
        }
        true
    });
    let mut config = backup_config(&primary);
    config.primary = address;
    let joined = BackupChannel::join(config, ToyMemory::default()).expect("a good primary");
    assert!(primary.wait_protected(PATIENCE));
    primary.push(&mark(60, 1)).expect("room");
    assert!(primary.wait_acknowledged(PATIENCE));
    begin.send(()).expect("the middleman is there");
    primary.push(&disk_read(61, 9_000)).expect("room");
    primary.flush();
    assert_eq!(take(&joined.channel, 1), [mark(60, 1)]);
    let cause = match joined.channel.recv(PATIENCE) {
        Delivery::Ended(end) => end.cause,
        other => panic!("nothing may follow: {other:?}"),
    };
    assert!(matches!(cause, EndCause::Violation(_)), "{cause:?}");
    assert!(wait_for_end(&told).is_failure());
}
