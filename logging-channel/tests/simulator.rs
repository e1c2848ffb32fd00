//! A pure sender and a pure receiver with a faulty pipe between them, driven by one seed.
//!
//! Safety, at every step: what is delivered is a prefix of what was pushed, nothing is acknowledged
//! that was not received, and no frame that differs from what was sent is taken. Liveness, when the
//! pipe is good: everything pushed is delivered and acknowledged.

use std::collections::VecDeque;
use std::time::Duration;
use vmft_fuzzing::Random;
use vmft_log::entry::{Arrival, Entry, EntrySequence, LogPosition, OutputSequence};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::frame::{Frame, FrameDecoder, FrameKind};
use vmft_logging_channel::receiver::{MIN_RECEIVER_CAPACITY, Receiver, ReceiverConfig};
use vmft_logging_channel::sender::{PushError, Sender, SenderConfig};
use vmft_logging_channel::session::SessionId;
use vmft_logging_channel::time::MonotonicTime;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// One bit is flipped.
    Corrupt,
    /// A piece comes twice.
    Duplicate,
    /// A piece is lost.
    Drop,
    /// Two pieces change places.
    Swap,
    /// Nothing comes any more.
    Cut,
}

/// One direction: pieces of the byte stream, each with the moment it arrives.
struct Pipe {
    pieces: VecDeque<(MonotonicTime, Vec<u8>)>,
    fault: Fault,
    /// How many more pieces pass before the fault strikes.
    until_fault: u64,
    sent: Vec<u8>,
    arrived: Vec<u8>,
}

impl Pipe {
    fn new(fault: Fault, until_fault: u64) -> Self {
        Self { pieces: VecDeque::new(), fault, until_fault, sent: Vec::new(), arrived: Vec::new() }
    }

    fn send(&mut self, random: &mut Random, now: MonotonicTime, bytes: &[u8]) {
        self.sent.extend_from_slice(bytes);
        let mut rest = bytes;
        while !rest.is_empty() {
            // Often whole frames, which only their numbers tell apart.
            let len = if random.chance(60) {
                rest.len()
            } else {
                1 + random.below(rest.len() as u64) as usize
            };
            let (piece, after) = rest.split_at(len);
            rest = after;
            let last = self.pieces.back().map_or(now, |(at, _)| *at);
            let at = last.max(now.after(Duration::from_micros(random.below(3_000))));
            self.pieces.push_back((at, piece.to_vec()));
            if self.fault != Fault::None {
                self.strike(random);
            }
        }
    }

    fn strike(&mut self, random: &mut Random) {
        if self.fault == Fault::Cut && self.until_fault == 0 {
            self.pieces.pop_back();
            return;
        }
        if self.until_fault > 0 || (self.fault == Fault::Swap && self.pieces.len() < 2) {
            self.until_fault = self.until_fault.saturating_sub(1);
            return;
        }
        let last = self.pieces.len() - 1;
        match self.fault {
            Fault::Corrupt => {
                let piece = &mut self.pieces[last].1;
                let at = random.below(piece.len() as u64) as usize;
                piece[at] ^= 1 << random.below(8);
            }
            Fault::Duplicate => self.pieces.push_back(self.pieces[last].clone()),
            Fault::Drop => {
                self.pieces.pop_back();
            }
            Fault::Swap => {
                let (newest, before) =
                    (self.pieces[last].1.clone(), self.pieces[last - 1].1.clone());
                self.pieces[last].1 = before;
                self.pieces[last - 1].1 = newest;
            }
            Fault::Cut | Fault::None => unreachable!("handled above"),
        }
        self.fault = Fault::None;
    }

    fn arrivals(&mut self, now: MonotonicTime) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.pieces.front().is_some_and(|(at, _)| *at <= now) {
            bytes.extend(self.pieces.pop_front().map(|(_, piece)| piece).unwrap_or_default());
        }
        self.arrived.extend_from_slice(&bytes);
        bytes
    }

    /// Up to where what arrived is what was sent.
    fn good_bytes(&self) -> u64 {
        self.sent.iter().zip(&self.arrived).take_while(|(sent, arrived)| sent == arrived).count()
            as u64
    }
}

struct World {
    seed: u64,
    random: Random,
    now: MonotonicTime,
    sender: Sender,
    receiver: Receiver,
    to_backup: Pipe,
    to_primary: Pipe,
    backup_decoder: FrameDecoder,
    primary_decoder: FrameDecoder,
    pushed: Vec<Entry>,
    delivered: usize,
    /// Where the last frame that a session took ended.
    backup_took: u64,
    failure: Option<String>,
    only_bits_flip: bool,
}

impl World {
    fn new(seed: u64, up: Fault, down: Fault) -> Self {
        let mut random = Random::new(seed);
        let session = SessionId::derive(&seed.to_le_bytes());
        let (start, now) = (ExecutionPoint::START, MonotonicTime::ZERO);
        let acknowledge_delay = Duration::from_micros(if random.chance(30) { 700 } else { 0 });
        let receiver_config = ReceiverConfig {
            capacity: MIN_RECEIVER_CAPACITY,
            acknowledge_delay,
            ..ReceiverConfig::default()
        };
        let sender_config = SenderConfig { capacity: 1 << 20, ..SenderConfig::default() };
        Self {
            seed,
            now,
            sender: Sender::new(sender_config, session, LogPosition::start_of_log(start), now),
            receiver: Receiver::new(
                receiver_config,
                session,
                LogPosition::start_of_log(start),
                now,
            ),
            to_backup: Pipe::new(up, random.below(60)),
            to_primary: Pipe::new(down, random.below(60)),
            backup_decoder: FrameDecoder::new(session),
            primary_decoder: FrameDecoder::new(session),
            pushed: Vec::new(),
            delivered: 0,
            backup_took: 0,
            failure: None,
            only_bits_flip: matches!(up, Fault::None | Fault::Corrupt),
            random,
        }
    }

    fn push(&mut self) {
        let n = self.pushed.len() as u64 + 1;
        let point = ExecutionPoint::new(n * 10);
        let entry = match self.random.below(10) {
            0..=3 => Entry::OutputMark { point, output: OutputSequence(n) },
            4..=6 => Entry::Progress { point },
            7 => Entry::Released { output: OutputSequence(n) },
            _ => {
                let len = 1 << self.random.below(12);
                Entry::Arrival { point, arrival: Arrival::ConsoleInput(vec![n as u8; len]) }
            }
        };
        match self.sender.push(self.now, &entry) {
            Ok(sequence) => {
                assert_eq!(sequence, EntrySequence(n), "seed {}", self.seed);
                self.pushed.push(entry);
            }
            Err(PushError::Full { .. }) => {}
            Err(error) => panic!("seed {}: {error}", self.seed),
        }
    }

    fn transmit(&mut self) {
        while let Some(frame) = self.sender.poll_transmit(self.now) {
            self.to_backup.send(&mut self.random, self.now, &frame.seal());
        }
        while let Some(frame) = self.receiver.poll_transmit(self.now) {
            self.to_primary.send(&mut self.random, self.now, &frame.seal());
        }
    }

    fn fail(&mut self, error: impl ToString) {
        self.failure.get_or_insert(error.to_string());
    }

    fn deliver(&mut self) {
        let bytes = self.to_backup.arrivals(self.now);
        self.backup_decoder.feed(&bytes);
        while self.failure.is_none() {
            match self.backup_decoder.next_frame() {
                Ok(None) => break,
                Ok(Some(frame)) => match self.receiver.handle_frame(self.now, frame) {
                    Ok(_) => self.backup_took = self.backup_decoder.offset(),
                    Err(error) => self.fail(error),
                },
                Err(error) => self.fail(error),
            }
        }
        let bytes = self.to_primary.arrivals(self.now);
        self.primary_decoder.feed(&bytes);
        while self.failure.is_none() {
            match self.primary_decoder.next_frame() {
                Ok(None) => break,
                Ok(Some(frame)) => {
                    if let Err(error) = self.sender.handle_frame(self.now, &frame) {
                        self.fail(error);
                    }
                }
                Err(error) => self.fail(error),
            }
        }
    }

    fn take(&mut self) {
        if let Some((sequence, entry)) = self.receiver.poll_entry() {
            assert_eq!(sequence.0, self.delivered as u64 + 1, "seed {}", self.seed);
            let pushed = self.pushed.get(self.delivered);
            assert_eq!(Some(&entry), pushed, "seed {}: not what was pushed", self.seed);
            self.delivered += 1;
            if self.random.chance(50) {
                self.receiver.report_applied(sequence, ExecutionPoint::new(sequence.0 * 10));
            }
        }
    }

    fn check(&self) {
        let seed = self.seed;
        assert!(self.sender.acknowledged() <= self.receiver.received(), "seed {seed}");
        assert!(self.receiver.received() <= self.sender.pushed(), "seed {seed}");
        // Of frames lost, repeated or swapped whole, the good ones between may be taken: what was
        // pushed tells whether rightly.
        if self.only_bits_flip {
            let good = self.to_backup.good_bytes();
            assert!(self.backup_took <= good, "seed {seed}: took what was not sent");
        }
    }

    fn step(&mut self) {
        match self.random.below(10) {
            0..=3 => self.push(),
            4 => self.now = self.now.after(Duration::from_micros(self.random.below(5_000))),
            5 => self.sender.flush(),
            6..=7 => self.take(),
            _ => {}
        }
        self.transmit();
        self.deliver();
        self.check();
    }

    /// Lets everything that is under way arrive.
    fn settle(&mut self) {
        for _ in 0..200 {
            self.now = self.now.after(Duration::from_millis(5));
            while self.delivered < self.receiver.received().0 as usize {
                self.take();
            }
            self.transmit();
            self.deliver();
            self.check();
            if self.failure.is_some() {
                return;
            }
        }
        // What was sent last arrives as well.
        self.now = self.now.after(Duration::from_millis(5));
        self.deliver();
        self.check();
    }
}

const SEEDS: u64 = 60;
const STEPS: u64 = 400;

fn run(seed: u64, up: Fault, down: Fault) -> World {
    let mut world = World::new(seed, up, down);
    for _ in 0..STEPS {
        world.step();
        if world.failure.is_some() {
            break;
        }
    }
    world.settle();
    world
}

#[test]
fn over_a_good_pipe_everything_is_delivered_and_acknowledged() {
    for seed in 0..SEEDS {
        let world = run(seed, Fault::None, Fault::None);
        assert_eq!(world.failure, None, "seed {seed}");
        assert!(world.pushed.len() > 50, "seed {seed}");
        assert_eq!(world.delivered, world.pushed.len(), "seed {seed}");
        assert_eq!(world.sender.acknowledged(), world.sender.pushed(), "seed {seed}");
    }
}

#[test]
fn every_fault_on_the_way_to_the_backup_is_found_and_nothing_wrong_is_delivered() {
    for fault in [Fault::Corrupt, Fault::Duplicate, Fault::Drop, Fault::Swap] {
        for seed in 0..SEEDS {
            let world = run(seed, fault, Fault::None);
            assert_eq!(world.to_backup.fault, Fault::None, "seed {seed}: {fault:?} did not strike");
            let harmless = world.to_backup.good_bytes() == world.to_backup.sent.len() as u64;
            assert!(world.failure.is_some() || harmless, "seed {seed}: {fault:?} was not found");
        }
    }
}

#[test]
fn every_corruption_on_the_way_to_the_primary_is_found() {
    for seed in 0..SEEDS {
        let world = run(seed, Fault::None, Fault::Corrupt);
        assert_eq!(world.to_primary.fault, Fault::None, "seed {seed}: it did not strike");
        assert!(world.failure.is_some(), "seed {seed}: it was not found");
    }
}

#[test]
fn other_faults_on_the_way_to_the_primary_never_acknowledge_too_much() {
    // A lost or repeated acknowledgement does no harm, so it need not be found; a torn one, or a
    // lost heartbeat, is. That nothing is acknowledged too early is checked at every step.
    let mut found = 0;
    for fault in [Fault::Duplicate, Fault::Drop, Fault::Swap] {
        for seed in 0..SEEDS {
            found += u64::from(run(seed, Fault::None, fault).failure.is_some());
        }
    }
    assert!(found > SEEDS, "{found}");
}

#[test]
fn what_came_before_a_cut_is_delivered() {
    for seed in 0..SEEDS {
        let world = run(seed, Fault::Cut, Fault::None);
        assert_eq!(world.failure, None, "seed {seed}: bytes missing at the end are no fault yet");
        assert_eq!(world.delivered as u64, world.receiver.received().0, "seed {seed}");
        assert!(world.sender.acknowledged() <= world.receiver.received(), "seed {seed}");
    }
}

#[test]
fn a_recorded_conversation_played_again_is_refused() {
    let mut world = run(1, Fault::None, Fault::None);
    let recording = std::mem::take(&mut world.to_backup.arrived);
    // Into the session it comes from, frame by frame: each is refused.
    let mut decoder = FrameDecoder::new(SessionId::derive(&1u64.to_le_bytes()));
    decoder.feed(&recording);
    let before = world.receiver.stats();
    let mut frames = 0;
    while let Ok(Some(frame)) = decoder.next_frame() {
        let kind = frame.kind();
        assert!(matches!(frame, Frame::Entries(_) | Frame::Heartbeat(_)), "{kind}");
        world.receiver.handle_frame(world.now, frame).expect_err("it has had its time");
        frames += u64::from(kind == FrameKind::Entries);
    }
    assert!(frames > 10);
    assert_eq!(world.receiver.stats(), before);
    // Into another session: not even the first is read.
    let mut decoder = FrameDecoder::new(SessionId::derive(b"another"));
    decoder.feed(&recording);
    decoder.next_frame().expect_err("another session");
}
