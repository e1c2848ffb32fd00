use super::*;
use crate::frame::FrameDecoder;
use vmft_log::checkpoint::CheckpointPiece;
use vmft_log::entry::{Arrival, OutputSequence, Packet, RequestId, StopReason};
use vmft_log::point::{ClockRate, VirtualTime};

const fn at_us(us: u64) -> MonotonicTime {
    MonotonicTime::from_ns(us * 1_000)
}

fn session() -> SessionId {
    SessionId::derive(b"test")
}

/// A sender past its first heartbeat, with a window of `window`.
fn sender(config: SenderConfig, window: u64) -> Sender {
    let mut sender = Sender::new(config, session(), LogPosition::default(), at_us(0));
    assert_eq!(transmit(&mut sender, at_us(0)), [FrameKind::Heartbeat]);
    acknowledge(&mut sender, at_us(0), 0, 0, window).expect("the first one");
    sender
}

fn transmit(sender: &mut Sender, now: MonotonicTime) -> Vec<FrameKind> {
    std::iter::from_fn(|| sender.poll_transmit(now)).map(|frame| frame.kind()).collect()
}

fn acknowledge(
    sender: &mut Sender,
    now: MonotonicTime,
    received: u64,
    applied: u64,
    window: u64,
) -> Result<SenderEvent, SendError> {
    let (received, applied) = (EntrySequence(received), EntrySequence(applied));
    let applied_point = ExecutionPoint::START;
    let found = Acknowledge { received, applied, applied_point, window };
    sender.handle_frame(now, &Frame::Acknowledge(found))
}

fn mark(point: u64) -> Entry {
    Entry::OutputMark { point: ExecutionPoint::new(point), output: OutputSequence(1) }
}

fn progress(point: u64) -> Entry {
    Entry::Progress { point: ExecutionPoint::new(point) }
}

fn disk_read(len: usize) -> Entry {
    let (disk, request, status) = (0, RequestId(1), 0);
    let arrival = Arrival::DiskCompletion { disk, request, status, data: vec![0; len] };
    Entry::Arrival { point: ExecutionPoint::new(1), arrival }
}

#[test]
fn an_output_mark_that_is_flushed_is_sent_at_once_and_takes_the_rest_along() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    sender.push(at_us(10), &progress(1)).expect("room");
    assert!(transmit(&mut sender, at_us(20)).is_empty());
    assert!(!sender.has_due_entries());
    sender.push(at_us(30), &mark(2)).expect("room");
    assert!(!sender.has_due_entries());
    sender.flush();
    assert!(sender.has_due_entries());
    let frame = sender.poll_transmit(at_us(30)).expect("due at once");
    let mut decoder = FrameDecoder::new(session());
    decoder.feed(&frame.seal());
    let Ok(Some(Frame::Entries(batch))) = decoder.next_frame() else { panic!("entries") };
    let entries: Vec<Entry> = batch.entries.into_iter().map(|costed| costed.entry).collect();
    assert_eq!((batch.first, entries), (EntrySequence(1), vec![progress(1), mark(2)]));
}

#[test]
fn a_stop_is_sent_at_once() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    let point = ExecutionPoint::new(4);
    sender.push(at_us(1), &Entry::Stop { point, reason: StopReason::Operator }).expect("room");
    assert_eq!(transmit(&mut sender, at_us(1)), [FrameKind::Entries]);
}

#[test]
fn an_entry_nobody_waits_for_waits_for_company_and_no_longer() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    sender.push(at_us(100), &progress(1)).expect("room");
    assert_eq!(sender.poll_timeout(), Some(at_us(1_100)));
    assert!(transmit(&mut sender, at_us(1_099)).is_empty());
    assert_eq!(transmit(&mut sender, at_us(1_100)), [FrameKind::Entries]);
    sender.push(at_us(1_200), &progress(2)).expect("room");
    sender.flush();
    assert_eq!(transmit(&mut sender, at_us(1_200)), [FrameKind::Entries]);
}

/// As many packets as make `bytes`, none larger than an Ethernet frame.
fn packets(bytes: usize) -> Arrival {
    let frames = vec![0; bytes];
    let packet = |frame: &[u8]| Packet { frame: frame.to_vec(), ..Packet::default() };
    Arrival::Packets(frames.chunks(1514).map(packet).collect())
}

#[test]
fn a_clock_correction_and_a_few_packets_go_out_at_once() {
    let (time, rate) = (VirtualTime::from_ns(9), ClockRate::from_raw(7));
    for arrival in [Arrival::ClockSync { time, rate }, packets(60), packets(STREAM_BYTES - 1)] {
        let mut sender = sender(SenderConfig::default(), 1 << 20);
        let point = ExecutionPoint::new(4);
        sender.push(at_us(1), &progress(3)).expect("room");
        assert!(!sender.has_due_entries());
        sender.push(at_us(2), &Entry::Arrival { point, arrival }).expect("room");
        assert!(sender.has_due_entries());
        assert_eq!(transmit(&mut sender, at_us(2)), [FrameKind::Entries]);
    }
}

#[test]
fn packets_of_a_stream_go_with_the_mark_of_their_answer_or_after_the_delay() {
    let point = ExecutionPoint::new(4);
    let streamed = Entry::Arrival { point, arrival: packets(STREAM_BYTES) };
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    sender.push(at_us(1), &streamed).expect("room");
    assert!(transmit(&mut sender, at_us(1)).is_empty());
    sender.push(at_us(2), &mark(5)).expect("room");
    sender.flush();
    assert_eq!(transmit(&mut sender, at_us(2)), [FrameKind::Entries]);
    let streamed = Entry::Arrival { point: ExecutionPoint::new(6), arrival: packets(STREAM_BYTES) };
    sender.push(at_us(10), &streamed).expect("room");
    assert!(transmit(&mut sender, at_us(1_009)).is_empty());
    assert_eq!(transmit(&mut sender, at_us(1_010)), [FrameKind::Entries]);
}

#[test]
fn a_sender_is_never_silent_for_longer_than_an_interval_and_busy_ones_send_few_heartbeats() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    let (mut heartbeats, mut last_frame) = (0, 0);
    for ms in 0..1_000u64 {
        // Entries every 8 ms for the first half, then none.
        if ms < 500 && ms % 8 == 0 {
            sender.push(at_us(ms * 1_000), &mark(ms + 1)).expect("room");
            sender.flush();
        }
        for kind in transmit(&mut sender, at_us(ms * 1_000)) {
            heartbeats += u64::from(kind == FrameKind::Heartbeat);
            last_frame = ms;
        }
        assert!(ms - last_frame < 21, "silent at {ms} ms");
    }
    // Each 200 ms of the first half, each 20 ms of the second.
    assert_eq!(heartbeats, 2 + 25);
}

#[test]
fn nothing_is_sent_beyond_the_window() {
    let mut sender = sender(SenderConfig::default(), 0);
    sender.push(at_us(1), &mark(1)).expect("room");
    sender.flush();
    assert!(transmit(&mut sender, at_us(1)).is_empty());
    let cost = sender.stats(at_us(1)).buffered;
    acknowledge(&mut sender, at_us(2), 0, 0, cost - 1).expect("a window");
    assert!(transmit(&mut sender, at_us(2)).is_empty());
    acknowledge(&mut sender, at_us(3), 0, 0, cost).expect("a window");
    assert_eq!(transmit(&mut sender, at_us(3)), [FrameKind::Entries]);
}

#[test]
fn a_full_sender_says_so_and_stops_taking_at_twice_its_capacity() {
    let config = SenderConfig { capacity: 100_000, ..SenderConfig::default() };
    let mut sender = sender(config, 0);
    let mut pushed = 0;
    while !sender.is_full() {
        pushed = sender.push(at_us(1), &disk_read(9_000)).expect("room").0;
    }
    assert_eq!(pushed, 11);
    let error = loop {
        match sender.push(at_us(1), &disk_read(9_000)) {
            Ok(sequence) => pushed = sequence.0,
            Err(error) => break error,
        }
    };
    assert_eq!(error, PushError::Full { buffered: sender.stats(at_us(1)).buffered });
    assert_eq!(sender.pushed(), EntrySequence(pushed));
    acknowledge(&mut sender, at_us(2), 0, 0, 1 << 30).expect("a window");
    sender.flush();
    transmit(&mut sender, at_us(2));
    assert!(sender.is_empty() && !sender.is_full());
    sender.push(at_us(3), &disk_read(1)).expect("room again");
}

#[test]
fn an_entry_unfit_for_the_log_leaves_no_trace() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    assert!(matches!(
        sender.push(at_us(1), &disk_read((1 << 20) + 1)),
        Err(PushError::Encode(EncodeError::TooLarge { .. }))
    ));
    assert!(transmit(&mut sender, at_us(10_000)).is_empty());
    assert_eq!(sender.push(at_us(1), &progress(9)), Ok(EntrySequence(1)));
    assert!(matches!(
        sender.push(at_us(1), &progress(8)),
        Err(PushError::Encode(EncodeError::PointRunsBackwards { .. }))
    ));
    assert_eq!(sender.push(at_us(1), &progress(9)), Ok(EntrySequence(2)));
}

#[test]
fn an_acknowledgement_of_what_was_not_sent_changes_nothing() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    sender.push(at_us(1), &progress(1)).expect("room");
    let error =
        SendError::AcknowledgedUnsent { received: EntrySequence(1), sent: EntrySequence(0) };
    assert_eq!(acknowledge(&mut sender, at_us(2), 1, 0, 1 << 20), Err(error));
    assert_eq!(sender.acknowledged(), EntrySequence(0));
}

#[test]
fn an_acknowledgement_taken_back_changes_nothing() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    sender.push(at_us(1), &mark(1)).expect("room");
    sender.flush();
    sender.push(at_us(1), &mark(1)).expect("room");
    sender.flush();
    transmit(&mut sender, at_us(1));
    acknowledge(&mut sender, at_us(2), 2, 1, 2 << 20).expect("good");
    for (received, applied, window) in [(1, 1, 2 << 20), (2, 0, 2 << 20), (2, 1, 1 << 20)] {
        let result = acknowledge(&mut sender, at_us(3), received, applied, window);
        assert!(matches!(result, Err(SendError::Retracted { .. })), "{result:?}");
        assert_eq!(sender.acknowledged(), EntrySequence(2));
    }
}

#[test]
fn repeated_and_missing_heartbeats_are_refused() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    let mut beat = |number| {
        let last = EntrySequence(0);
        let heartbeat = Heartbeat { number, sent_at: at_us(1), echo: None, last };
        sender.handle_frame(at_us(5), &Frame::Heartbeat(heartbeat))
    };
    assert_eq!(beat(1), Ok(SenderEvent::Heartbeat));
    for number in [0, 1, 3] {
        let error = HeartbeatError::OutOfOrder { previous: 1, found: number };
        assert_eq!(beat(number), Err(SendError::Heartbeat(error)));
    }
    assert_eq!(beat(2), Ok(SenderEvent::Heartbeat));
}

#[test]
fn the_round_trip_leaves_out_the_time_the_peer_held_the_heartbeat() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    let echo = crate::session::HeartbeatEcho { sent_at: at_us(0), held_ns: 400_000 };
    let heartbeat =
        Heartbeat { number: 1, sent_at: at_us(77), echo: Some(echo), last: EntrySequence(0) };
    sender.handle_frame(at_us(1_000), &Frame::Heartbeat(heartbeat)).expect("good");
    assert_eq!(sender.stats(at_us(1_000)).round_trip, Some(Duration::from_micros(600)));
}

#[test]
fn a_backup_that_lives_but_does_not_acknowledge_is_given_up() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    sender.push(at_us(1_000), &mark(1)).expect("room");
    sender.flush();
    transmit(&mut sender, at_us(1_000));
    sender.handle_timeout(at_us(2_000_999)).expect("patience");
    let (entry, waited) = (EntrySequence(1), Duration::from_secs(2));
    let error = sender.handle_timeout(at_us(2_001_000));
    assert_eq!(error, Err(SendError::Stalled { entry, waited }));
}

#[test]
fn leaving_sends_what_is_left_and_then_the_goodbye() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    sender.push(at_us(1), &progress(1)).expect("room");
    sender.leave(GoodbyeReason::Stopped);
    assert_eq!(sender.push(at_us(1), &progress(1)), Err(PushError::Ended));
    assert_eq!(transmit(&mut sender, at_us(2)), [FrameKind::Entries, FrameKind::Goodbye]);
    assert!(sender.has_ended());
    assert_eq!(sender.poll_timeout(), None);
}

#[test]
fn frames_that_no_backup_sends_are_refused() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    let result =
        sender.handle_frame(at_us(1), &Frame::Checkpoint(CheckpointPiece::State(Vec::new())));
    assert_eq!(result, Err(SendError::Unexpected(FrameKind::CheckpointState)));
}

#[test]
fn latency_counts_from_the_mark_and_lag_from_the_oldest_entry_not_replayed() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    sender.push(at_us(100), &progress(1)).expect("room");
    sender.push(at_us(150), &mark(1)).expect("room");
    sender.flush();
    transmit(&mut sender, at_us(150));
    sender.push(at_us(170), &progress(1)).expect("room");
    acknowledge(&mut sender, at_us(350), 2, 0, 1 << 20).expect("good");
    let stats = sender.stats(at_us(400));
    let latency = stats.acknowledge_latency.expect("one sample");
    assert_eq!((latency.median, latency.samples), (Duration::from_micros(200), 1));
    assert_eq!(stats.execution_lag, Duration::from_micros(300));
    acknowledge(&mut sender, at_us(500), 2, 2, 1 << 20).expect("good");
    assert_eq!(sender.stats(at_us(500)).execution_lag, Duration::from_micros(330));
}

#[test]
fn an_idle_guest_stays_below_a_fifth_of_a_megabit_a_second() {
    let mut sender = sender(SenderConfig::default(), 1 << 40);
    // A clock correction every 4 ms, a digest every 100 ms, after an hour of guest time.
    let hour_ns = 3_600_000_000_000u64;
    for tick in 0..250u64 {
        let now = at_us(1 + tick * 4_000);
        let point = ExecutionPoint::new(hour_ns / 16 + tick * 250_000);
        let time = vmft_log::point::VirtualTime::from_ns(hour_ns + tick * 4_000_000);
        let rate = vmft_log::point::ClockRate::from_raw((16 << 24) + 12_345);
        let arrival = Arrival::ClockSync { time, rate };
        sender.push(now, &Entry::Arrival { point, arrival }).expect("room");
        if tick % 25 == 0 {
            let digest = vmft_log::entry::StateDigest {
                registers: [u64::MAX; 18],
                cpu: u64::MAX,
                devices: u64::MAX,
                memory: u64::MAX,
                places: u64::MAX,
                pages: 900,
            };
            sender.push(now, &Entry::Digest { point, digest }).expect("room");
        }
        sender.flush();
        transmit(&mut sender, now);
    }
    let stats = sender.stats(at_us(1_000_000));
    let bits = (stats.log_bytes + stats.other_bytes) * 8;
    assert!(bits < 200_000, "{bits} bits in a second");
}

#[test]
fn a_goodbye_with_a_long_text_is_cut_not_refused() {
    let mut sender = sender(SenderConfig::default(), 1 << 20);
    sender.leave(GoodbyeReason::Fault("ä".repeat(5_000).into()));
    let frame = sender.poll_transmit(at_us(1)).expect("the goodbye");
    let mut decoder = FrameDecoder::new(session());
    decoder.feed(&frame.seal());
    let goodbye = decoder.next_frame();
    assert_eq!(goodbye, Ok(Some(Frame::Goodbye(GoodbyeReason::Fault("ä".repeat(512).into())))));
}
