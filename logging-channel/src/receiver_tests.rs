use super::*;
use crate::frame::FrameDecoder;
use vmft_log::codec::ENTRY_OVERHEAD;

const fn at_us(us: u64) -> MonotonicTime {
    MonotonicTime::from_ns(us * 1_000)
}

fn session() -> SessionId {
    SessionId::derive(b"test")
}

fn receiver(config: ReceiverConfig) -> Receiver {
    let mut receiver = Receiver::new(config, session(), LogPosition::default(), at_us(0));
    let first = transmit(&mut receiver, at_us(0));
    assert_eq!(
        (first.len(), first[0].kind(), first[1].kind()),
        (2, FrameKind::Heartbeat, FrameKind::Acknowledge)
    );
    receiver
}

fn transmit(receiver: &mut Receiver, now: MonotonicTime) -> Vec<Frame> {
    let mut decoder = FrameDecoder::new(session());
    std::iter::from_fn(|| receiver.poll_transmit(now))
        .map(|frame| {
            decoder.feed(&frame.seal());
            decoder.next_frame().expect("our own frame").expect("whole")
        })
        .collect()
}

/// What the last acknowledgement among `frames` says was received.
fn received(frames: &[Frame]) -> Option<u64> {
    frames.iter().rev().find_map(|frame| match frame {
        Frame::Acknowledge(acknowledge) => Some(acknowledge.received.0),
        _ => None,
    })
}

/// A batch of `count` progress entries from `first` on, entry n at point n.
fn batch(first: u64, count: u64) -> Frame {
    let entries = (first..first + count)
        .map(|n| Entry::Progress { point: ExecutionPoint::new(n) })
        .map(|entry| CostedEntry { entry, cost: 2 + ENTRY_OVERHEAD })
        .collect();
    let base = ExecutionPoint::new(first - 1);
    Frame::Entries(EntryBatch { first: EntrySequence(first), base, entries })
}

#[test]
fn entries_are_acknowledged_on_receipt_before_anyone_takes_them() {
    let mut receiver = receiver(ReceiverConfig::default());
    receiver.handle_frame(at_us(1), batch(1, 3)).expect("in order");
    assert!(receiver.has_due_acknowledgement());
    assert_eq!(received(&transmit(&mut receiver, at_us(1))), Some(3));
    receiver.handle_frame(at_us(2), batch(4, 1)).expect("in order");
    let taken: Vec<u64> = std::iter::from_fn(|| receiver.poll_entry()).map(|(n, _)| n.0).collect();
    assert_eq!(taken, [1, 2, 3, 4]);
}

#[test]
fn a_withheld_acknowledgement_comes_exactly_when_its_delay_is_over() {
    let acknowledge_delay = Duration::from_micros(500);
    let mut receiver = receiver(ReceiverConfig { acknowledge_delay, ..ReceiverConfig::default() });
    receiver.handle_frame(at_us(100), batch(1, 1)).expect("in order");
    receiver.handle_frame(at_us(200), batch(2, 1)).expect("in order");
    while receiver.poll_entry().is_some() {}
    receiver.report_applied(EntrySequence(2), ExecutionPoint::new(2));
    assert_eq!(receiver.poll_timeout(), Some(at_us(600)));
    assert_eq!(transmit(&mut receiver, at_us(599)), []);
    let frames = transmit(&mut receiver, at_us(600));
    let Frame::Acknowledge(first) = frames[0] else { panic!("an acknowledgement") };
    assert_eq!((first.received, first.applied), (EntrySequence(1), EntrySequence(0)));
    let frames = transmit(&mut receiver, at_us(700));
    let Frame::Acknowledge(second) = frames[0] else { panic!("an acknowledgement") };
    assert_eq!((second.received, second.applied), (EntrySequence(2), EntrySequence(2)));
}

#[test]
fn heartbeats_do_not_give_a_withheld_acknowledgement_away() {
    let acknowledge_delay = Duration::from_secs(1);
    let mut receiver = receiver(ReceiverConfig { acknowledge_delay, ..ReceiverConfig::default() });
    receiver.handle_frame(at_us(100), batch(1, 1)).expect("in order");
    let frames = transmit(&mut receiver, at_us(20_000));
    assert!(
        matches!(&frames[..], [Frame::Heartbeat(beat)] if beat.last == EntrySequence(0)),
        "{frames:?}"
    );
}

#[test]
fn gaps_and_repeats_are_refused_and_change_nothing() {
    let mut receiver = receiver(ReceiverConfig::default());
    receiver.handle_frame(at_us(1), batch(1, 3)).expect("in order");
    let before = receiver.stats();
    let (had, found) = (EntrySequence(3), EntrySequence);
    let gap = ReceiveError::Gap { received: had, found: found(5) };
    assert_eq!(receiver.handle_frame(at_us(2), batch(5, 1)), Err(gap));
    let repeated = ReceiveError::Repeated { received: had, found: found(1) };
    assert_eq!(receiver.handle_frame(at_us(2), batch(1, 3)), Err(repeated));
    let overlapping = ReceiveError::Repeated { received: had, found: found(3) };
    assert_eq!(receiver.handle_frame(at_us(2), batch(3, 2)), Err(overlapping));
    assert_eq!(receiver.stats(), before);
    receiver.handle_frame(at_us(3), batch(4, 1)).expect("the session could go on");
}

#[test]
fn a_log_that_goes_on_elsewhere_is_refused() {
    let mut receiver = receiver(ReceiverConfig::default());
    receiver.handle_frame(at_us(1), batch(1, 3)).expect("in order");
    let Frame::Entries(mut elsewhere) = batch(4, 1) else { panic!("entries") };
    elsewhere.base = ExecutionPoint::new(2);
    let (last, found) = (ExecutionPoint::new(3), ExecutionPoint::new(2));
    let result = receiver.handle_frame(at_us(2), Frame::Entries(elsewhere));
    assert_eq!(result, Err(ReceiveError::Point { last, found }));
}

#[test]
fn a_heartbeat_that_tells_of_entries_that_never_came_is_refused() {
    let mut receiver = receiver(ReceiverConfig::default());
    let last = EntrySequence(2);
    let heartbeat = Heartbeat { number: 1, sent_at: at_us(0), echo: None, last };
    let result = receiver.handle_frame(at_us(1), Frame::Heartbeat(heartbeat));
    let missing = ReceiveError::Missing { received: EntrySequence(0), sent: last };
    assert_eq!(result, Err(missing));
}

#[test]
fn more_than_the_window_is_refused_and_taking_entries_opens_it() {
    let config = ReceiverConfig { capacity: MIN_RECEIVER_CAPACITY, ..ReceiverConfig::default() };
    let mut receiver = receiver(config);
    let cost = 2 + ENTRY_OVERHEAD;
    let fitting = MIN_RECEIVER_CAPACITY / cost;
    receiver.handle_frame(at_us(1), batch(1, fitting)).expect("fits");
    transmit(&mut receiver, at_us(1));
    let room = receiver.room();
    let result = receiver.handle_frame(at_us(2), batch(fitting + 1, 1));
    assert_eq!(result, Err(ReceiveError::Overrun { cost, room }));
    let mut taken = 0;
    while !receiver.has_due_acknowledgement() {
        receiver.poll_entry().expect("there are more");
        taken += 1;
    }
    assert_eq!(taken, (MIN_RECEIVER_CAPACITY / 8).div_ceil(cost));
    transmit(&mut receiver, at_us(3));
    assert_eq!(receiver.room(), room + taken * cost);
    receiver.handle_frame(at_us(4), batch(fitting + 1, taken)).expect("fits now");
}

#[test]
fn progress_of_the_replay_is_told_with_the_next_heartbeat() {
    let mut receiver = receiver(ReceiverConfig::default());
    receiver.handle_frame(at_us(1), batch(1, 2)).expect("in order");
    transmit(&mut receiver, at_us(1));
    receiver.poll_entry().expect("there is one");
    receiver.report_applied(EntrySequence(1), ExecutionPoint::new(1));
    assert_eq!(
        transmit(&mut receiver, at_us(20_000)),
        [],
        "the acknowledgement was a sign of life"
    );
    let frames = transmit(&mut receiver, at_us(20_001));
    let [Frame::Heartbeat(_), Frame::Acknowledge(acknowledge)] = &frames[..] else {
        panic!("{frames:?}")
    };
    let told = (acknowledge.applied, acknowledge.applied_point);
    assert_eq!(told, (EntrySequence(1), ExecutionPoint::new(1)));
}

#[test]
fn a_stop_in_the_log_is_announced() {
    let mut receiver = receiver(ReceiverConfig::default());
    let reason = StopReason::GuestPowerOff;
    let entry = Entry::Stop { point: ExecutionPoint::new(1), reason };
    let entries = vec![CostedEntry { entry, cost: 3 + ENTRY_OVERHEAD }];
    let (first, base) = (EntrySequence(1), ExecutionPoint::START);
    let event =
        receiver.handle_frame(at_us(1), Frame::Entries(EntryBatch { first, base, entries }));
    assert_eq!(event, Ok(ReceiverEvent::Entries { last: first, stop: Some(reason) }));
}

#[test]
fn nothing_may_follow_a_goodbye() {
    let mut receiver = receiver(ReceiverConfig::default());
    receiver.handle_frame(at_us(1), batch(1, 1)).expect("in order");
    let event = receiver.handle_frame(at_us(1), Frame::Goodbye(GoodbyeReason::Stopped));
    assert_eq!(event, Ok(ReceiverEvent::Departed(GoodbyeReason::Stopped)));
    let result = receiver.handle_frame(at_us(2), batch(2, 1));
    assert_eq!(result, Err(ReceiveError::AfterGoodbye(FrameKind::Entries)));
    assert!(receiver.poll_entry().is_some(), "what came before can still be taken");
}

#[test]
fn leaving_sends_a_goodbye_and_no_acknowledgement() {
    let mut receiver = receiver(ReceiverConfig::default());
    receiver.handle_frame(at_us(1), batch(1, 1)).expect("in order");
    receiver.leave(GoodbyeReason::Leaving);
    assert_eq!(transmit(&mut receiver, at_us(1)), [Frame::Goodbye(GoodbyeReason::Leaving)]);
    assert!(receiver.has_ended());
}

#[test]
fn what_lies_before_a_checkpoint_is_passed_over_only_with_leave_and_counts_as_handed_out() {
    use vmft_log::checkpoint::{
        CheckpointPiece, CheckpointWriter, MemoryBase, PageEncoder, PageNumber,
    };
    let mut receiver = receiver(ReceiverConfig::default());
    receiver.handle_frame(at_us(1), batch(1, 5)).expect("in order");
    receiver.poll_entry().expect("there are five");
    assert_eq!(receiver.skip_to_checkpoint(|_| true), None, "there is no checkpoint");
    let encoder = PageEncoder::for_earlier(0);
    let (writer, mut pieces) =
        CheckpointWriter::begin(MemoryBase::Earlier, PageNumber(9), b"base", encoder)
            .expect("small");
    let position = LogPosition::start_of_log(ExecutionPoint::new(5));
    pieces.extend(writer.finish(position, b"state").expect("small").0);
    let part = |piece: &CheckpointPiece| {
        let (piece, bytes) = (piece.kind(), piece.encode(Vec::new()));
        let cost = 9 + bytes.len() as u64 + ENTRY_OVERHEAD;
        CostedEntry { entry: Entry::CheckpointPart { piece, bytes }, cost }
    };
    let entries: Vec<CostedEntry> = pieces.iter().map(part).collect();
    let header = entries[0].entry.clone();
    let (first, base) = (EntrySequence(6), ExecutionPoint::new(5));
    let frame = Frame::Entries(EntryBatch { first, base, entries });
    receiver.handle_frame(at_us(2), frame).expect("in order");
    assert_eq!(receiver.skip_to_checkpoint(|fixed| fixed == b"another"), None);
    assert_eq!(receiver.delivered(), EntrySequence(1), "nothing was passed over");
    let skipped = receiver.skip_to_checkpoint(|fixed| fixed == b"base").expect("it is whole");
    assert_eq!((skipped.len(), receiver.delivered()), (4, EntrySequence(5)));
    receiver.report_applied(EntrySequence(5), ExecutionPoint::new(1));
    assert_eq!(receiver.poll_entry(), Some((EntrySequence(6), header)));
    assert_eq!(receiver.skip_to_checkpoint(|_| true), None, "it is being taken");
}
