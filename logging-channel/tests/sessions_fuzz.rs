//! The state machines of a session, fed with frames of a peer that keeps to the format and to
//! nothing else: good ones, again, in another order, of another kind, with other values, their
//! checksums right. Each is refused with a typed error that changes nothing, or taken; what was
//! promised holds either way.

mod common;

use common::golden::{golden, reseal};
use common::identity;
use std::collections::VecDeque;
use std::time::Duration;
use vmft_fuzzing::{Counting, Random, cases, damage, peak_of};
use vmft_log::entry::{Arrival, Entry, LogPosition, OutputSequence};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::detector::{Detector, DetectorConfig};
use vmft_logging_channel::frame::{Frame, FrameDecoder, HEADER_LEN};
use vmft_logging_channel::handshake::{Admission, Answered, Nonce, Offered};
use vmft_logging_channel::receiver::{MIN_RECEIVER_CAPACITY, Receiver, ReceiverConfig};
use vmft_logging_channel::sender::{Sender, SenderConfig};
use vmft_logging_channel::session::SessionId;
use vmft_logging_channel::time::MonotonicTime;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Cases of a quick run.
const CASES: u64 = 500;
/// Steps of a session.
const STEPS: u64 = 400;
/// Handshakes in a case.
const HANDSHAKES: usize = 200;

/// A frame that went bad, if it still can be read.
fn gone_bad(
    random: &mut Random,
    session: SessionId,
    frame: &[u8],
    payloads: &[Vec<u8>],
) -> Option<Frame> {
    let mut payload = frame[HEADER_LEN..].to_vec();
    damage(random, &mut payload, payloads);
    let kind = if random.chance(5) { random.below(16) as u8 } else { frame[4] };
    let mut decoder = FrameDecoder::new(session);
    decoder.feed(&reseal(frame, kind, &payload));
    decoder.next_frame().ok().flatten()
}

fn nonce(random: &mut Random) -> Nonce {
    Nonce(std::array::from_fn(|_| random.next() as u8))
}

fn sealed(frame: &Frame, session: SessionId) -> Vec<u8> {
    frame.clone().encode(session).expect("a good frame").seal()
}

#[test]
fn a_handshake_gone_bad_is_refused_or_ends_in_the_same_terms_on_both_sides() {
    let opening = SessionId::HANDSHAKE;
    let golden = golden();
    let payloads: Vec<Vec<u8>> =
        golden.iter().map(|(_, frame)| frame[HEADER_LEN..].to_vec()).collect();
    let (mut agreed, mut refused) = (0u64, 0u64);
    cases(CASES, |mut random| {
        for _ in 0..HANDSHAKES {
            let (offered, hello) = Offered::new(identity(), nonce(&mut random));
            let said = sealed(&hello, opening);
            let heard = match random.below(3) {
                0 => gone_bad(&mut random, opening, &said, &payloads),
                1 => {
                    let (_, frame) = random.pick(&golden);
                    gone_bad(&mut random, opening, frame, &payloads)
                }
                _ => Some(hello.clone()),
            };
            let Some(heard) = heard else { continue };
            let own = nonce(&mut random);
            let answered = Answered::new(&heard, identity(), own, &Admission::Open);
            let Ok((answered, reply)) = answered else {
                refused += 1;
                continue;
            };
            let said = sealed(&reply, opening);
            let back = if random.chance(50) {
                gone_bad(&mut random, opening, &said, &payloads)
            } else {
                Some(reply)
            };
            let Some(back) = back else { continue };
            let Ok((terms, confirm)) = offered.handle_frame(&back) else {
                refused += 1;
                continue;
            };
            let session = answered.session();
            let last = if random.chance(50) {
                gone_bad(&mut random, session, &sealed(&confirm, session), &payloads)
            } else {
                Some(confirm)
            };
            let Some(last) = last else { continue };
            // Damage to the reply and to its confirmation may undo each other.
            let is_confirmed = matches!(&last, Frame::HelloConfirm(confirm) if confirm.echo == own);
            match answered.handle_frame(&last) {
                // Whoever is named otherwise hears nothing of the other: the next frame is of no
                // session of his.
                Ok(_) if !is_confirmed => panic!("{last:?} confirms what was not said"),
                Ok(found) if found.session == terms.session => {
                    assert_eq!(found.peer.pair, terms.peer.pair);
                    agreed += 1;
                }
                Ok(_) => {}
                Err(_) => refused += 1,
            }
        }
    });
    assert!(agreed > 0 && refused > 0, "{agreed} agreed, {refused} refused");
}

/// A session between a real sender and a real receiver, in which somebody meddles.
struct World {
    random: Random,
    now: MonotonicTime,
    session: SessionId,
    sender: Sender,
    receiver: Receiver,
    detector: Detector,
    /// Good frames on their way, and some that were delivered before.
    up: VecDeque<Vec<u8>>,
    down: VecDeque<Vec<u8>>,
    old: Vec<Vec<u8>>,
    pushed: u64,
}

impl World {
    fn new(mut random: Random) -> Self {
        let now = MonotonicTime::ZERO;
        let session = SessionId::derive(&random.next().to_le_bytes());
        let start = LogPosition::start_of_log(ExecutionPoint::START);
        let config =
            ReceiverConfig { capacity: MIN_RECEIVER_CAPACITY, ..ReceiverConfig::default() };
        let sender = SenderConfig { capacity: 1 << 20, ..SenderConfig::default() };
        Self {
            random,
            now,
            session,
            sender: Sender::new(sender, session, start, now),
            receiver: Receiver::new(config, session, start, now),
            detector: Detector::new(DetectorConfig::default(), now),
            up: VecDeque::new(),
            down: VecDeque::new(),
            old: Vec::new(),
            pushed: 0,
        }
    }

    fn push(&mut self) {
        let point = ExecutionPoint::new((self.pushed + 1) * 10);
        let entry = match self.random.below(4) {
            0 => Entry::OutputMark { point, output: OutputSequence(self.pushed + 1) },
            1 => Entry::Progress { point },
            _ => {
                let count = self.random.index(200);
                let typed = self.random.bytes(count);
                Entry::Arrival { point, arrival: Arrival::ConsoleInput(typed) }
            }
        };
        self.pushed += u64::from(self.sender.push(self.now, &entry).is_ok());
        self.sender.flush();
    }

    fn transmit(&mut self) {
        while let Some(frame) = self.sender.poll_transmit(self.now) {
            self.up.push_back(frame.seal());
        }
        while let Some(frame) = self.receiver.poll_transmit(self.now) {
            self.down.push_back(frame.seal());
        }
    }

    fn decode(&self, bytes: &[u8]) -> Frame {
        let mut decoder = FrameDecoder::new(self.session);
        decoder.feed(bytes);
        decoder.next_frame().expect("good").expect("whole")
    }

    /// To the receiver. True if it took what no sender has sent: the session is the meddler's.
    fn give_backup(&mut self, frame: Frame, is_good: bool) -> bool {
        let before = self.receiver.stats();
        match self.receiver.handle_frame(self.now, frame) {
            Ok(_) => !is_good,
            Err(error) => {
                assert!(!is_good, "{error}");
                assert!(error.to_string().len() < 4096);
                assert_eq!(self.receiver.stats(), before, "refused, and changed something");
                false
            }
        }
    }

    fn give_primary(&mut self, frame: &Frame, is_good: bool) -> bool {
        let before = (self.sender.stats(self.now), self.sender.acknowledged());
        match self.sender.handle_frame(self.now, frame) {
            Ok(_) => {
                let acknowledged = self.sender.acknowledged();
                assert!(acknowledged <= self.sender.pushed(), "acknowledged, and never sent");
                !is_good
            }
            Err(error) => {
                assert!(!is_good, "{error}");
                assert!(error.to_string().len() < 4096);
                let after = (self.sender.stats(self.now), self.sender.acknowledged());
                assert_eq!(after, before, "refused, and changed something");
                false
            }
        }
    }

    /// One step. True if the session is the meddler's from here on.
    fn step(&mut self, payloads: &[Vec<u8>]) -> bool {
        self.now = self.now.after(Duration::from_micros(self.random.below(3_000)));
        self.push();
        self.transmit();
        self.detector.handle_contact(self.now);
        self.detector.handle_timeout(self.now);
        let meddles = self.random.chance(50);
        if meddles {
            let ways = [&self.up, &self.down];
            let waiting = ways.into_iter().flatten().chain(&self.old).cloned();
            let all: Vec<Vec<u8>> = waiting.collect();
            if all.is_empty() {
                return false;
            }
            let bytes = self.random.pick(&all).clone();
            let frame = match self.random.below(3) {
                // Again, or too early: of either side's.
                0 => Some(self.decode(&bytes)),
                _ => gone_bad(&mut self.random, self.session, &bytes, payloads),
            };
            let Some(frame) = frame else { return false };
            return match self.random.chance(50) {
                true => self.give_backup(frame, false),
                false => self.give_primary(&frame, false),
            };
        }
        if let Some(bytes) = self.up.pop_front() {
            let frame = self.decode(&bytes);
            self.old.push(bytes);
            self.give_backup(frame, true);
        }
        if let Some(bytes) = self.down.pop_front() {
            let frame = self.decode(&bytes);
            self.old.push(bytes);
            self.give_primary(&frame, true);
        }
        while let Some((sequence, entry)) = self.receiver.poll_entry() {
            let point = entry.point().unwrap_or_default();
            self.receiver.report_applied(sequence, point);
        }
        false
    }
}

#[test]
fn a_session_that_somebody_meddles_with_refuses_or_takes_and_keeps_its_promises() {
    let golden = golden();
    let payloads: Vec<Vec<u8>> =
        golden.iter().map(|(_, frame)| frame[HEADER_LEN..].to_vec()).collect();
    let (mut taken, mut whole) = (0u64, 0u64);
    cases(CASES, |random| {
        let (is_whole, peak) = peak_of(|| {
            let mut world = World::new(random);
            for _ in 0..STEPS {
                if world.step(&payloads) {
                    // What comes now differs from what was sent, and is refused or not. Nothing panics.
                    for _ in 0..20 {
                        world.now = world.now.after(Duration::from_millis(1));
                        world.push();
                        world.transmit();
                        if let Some(bytes) = world.up.pop_front() {
                            let frame = world.decode(&bytes);
                            let _ = world.receiver.handle_frame(world.now, frame);
                        }
                        if let Some(bytes) = world.down.pop_front() {
                            let frame = world.decode(&bytes);
                            let _ = world.sender.handle_frame(world.now, &frame);
                        }
                        let _ = world.sender.handle_timeout(world.now);
                        world.receiver.poll_entry();
                    }
                    return false;
                }
            }
            true
        });
        assert!(peak < 16 << 20, "{peak} bytes");
        taken += u64::from(!is_whole);
        whole += u64::from(is_whole);
    });
    println!("{taken} were taken over, {whole} were not");
}
