//! The gate of a live side.

use super::queue::OutputQueue;
use super::{OUTPUT_BYTES_LIMIT, OVERHEAD, Output, OutputGate, OutputKind, RecentOutputs};
use crate::evidence::time_with_suspension;
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use vmft_logging_channel::entry::{EntrySequence, OutputSequence};

/// How old the evidence is that this side may still speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Assurance {
    /// The backup has heard from this side so recently that it cannot have taken silence for its
    /// end; or nobody else is there.
    Fresh,
    /// What is let out was sent to the backup long ago. It may have gone live since.
    Stale,
}

/// Evidence younger than this is fresh: less than the shortest silence after which a backup may
/// suspect its primary (40 ms), with room for the way from here to the wire.
const FRESH: Duration = Duration::from_millis(25);

/// Bytes of packets held; what comes beyond is lost, as in a network that is too slow. Far more than
/// is on its way within a round trip.
const PACKET_BYTES_LIMIT: usize = 32 << 20;

/// Lets outputs out into the world. Must not block.
pub trait Outside: fmt::Debug + Send + Sync {
    /// The output may be seen from now on.
    fn let_out(&self, output: Output, assurance: Assurance);
    /// Everything that can be let out now was.
    fn all_let_out(&self) {}
    /// Memory taken by what was let out and is not out yet, in bytes: nobody outside takes it.
    fn backlog(&self) -> usize {
        0
    }
    /// Copies of what was let out and is not known to be out, in order, where it must not be lost.
    fn not_out(&self) -> Vec<Output> {
        Vec::new()
    }
}

/// What outputs wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitsFor {
    /// The backups' acknowledgement.
    Acknowledgement,
    /// The arbiter's decision who goes on.
    Arbiter,
    /// Somebody outside who takes them.
    Outside,
}

/// The memory of outputs that wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitingBytes {
    /// Of those that may not leave yet.
    pub held: usize,
    /// Of those that nobody outside takes.
    pub outside: usize,
    /// What the guest is stopped for, if there are so many that it is.
    pub guest_waits_for: Option<WaitsFor>,
}

/// How long outputs waited between mark and release, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DelayStatistics {
    /// Marks measured.
    pub marks: u64,
    /// Median of the last 1024 marks.
    pub median_ns: u64,
    /// The longest since the start.
    pub worst_ns: u64,
}

/// Marks kept for the median.
const DELAY_WINDOW: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Unprotected: outputs leave at once.
    Open,
    /// Protected: outputs wait for their mark's acknowledgement.
    Protecting,
    /// Protected, and a backup was lost: nothing leaves before it is known who may go on.
    Holding,
    /// Fenced: nothing leaves any more.
    Shut,
}

#[derive(Debug)]
struct Mark {
    entry: EntrySequence,
    output: OutputSequence,
    begun: MarkBegun,
}

/// When a mark began.
#[derive(Debug, Clone, Copy)]
pub struct MarkBegun(Duration);

impl MarkBegun {
    /// How long ago that was, time included in which the host was suspended: evidence ages then, too.
    fn age(self) -> Duration {
        time_with_suspension().saturating_sub(self.0)
    }
}

#[derive(Debug)]
struct Held {
    mode: Mode,
    waiting: OutputQueue,
    /// Bytes of the packets among them.
    packet_bytes: usize,
    marks: VecDeque<Mark>,
    /// The last entry acknowledged. An acknowledgement can be quicker than its mark.
    acknowledged: EntrySequence,
    delays: VecDeque<u64>,
    measured: u64,
    worst_ns: u64,
}

/// The gate of a live side: the output rule (§2.2 of the paper).
#[derive(Debug)]
pub struct HeldOutputs {
    held: Mutex<Held>,
    outside: Arc<dyn Outside>,
    recent: RecentOutputs,
    urgent: AtomicBool,
    /// An output has begun to wait.
    arrived: Condvar,
    /// Outputs have left.
    left: Condvar,
    /// The guest is stopped beyond so many bytes.
    limit: usize,
}

impl HeldOutputs {
    /// A gate that lets everything out at once.
    pub fn open(outside: Arc<dyn Outside>) -> Self {
        Self::with_limit(outside, OUTPUT_BYTES_LIMIT)
    }

    /// The same, which is full when outputs wait that take more than `limit` bytes.
    pub fn with_limit(outside: Arc<dyn Outside>, limit: usize) -> Self {
        Self {
            held: Mutex::new(Held {
                mode: Mode::Open,
                waiting: OutputQueue::default(),
                packet_bytes: 0,
                marks: VecDeque::new(),
                acknowledged: EntrySequence(0),
                delays: VecDeque::new(),
                measured: 0,
                worst_ns: 0,
            }),
            outside,
            recent: RecentOutputs::default(),
            urgent: AtomicBool::new(false),
            arrived: Condvar::new(),
            left: Condvar::new(),
            limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("no holder of the gate's lock panics")
    }

    /// What was put out since the last checkpoint in the log, where that is remembered.
    pub fn recent(&self) -> &RecentOutputs {
        &self.recent
    }

    /// From now on outputs wait for their acknowledgement, in a log that begins with entry 1.
    pub fn protect(&self) {
        let mut held = self.lock();
        if held.mode == Mode::Open {
            held.mode = Mode::Protecting;
            held.marks.clear();
            held.acknowledged = EntrySequence(0);
        }
    }

    /// A backup is lost, and may be going live: acknowledgements of others release nothing before
    /// [`Self::resume`] or [`Self::unprotect`].
    pub fn hold(&self) {
        let mut held = self.lock();
        if held.mode == Mode::Protecting {
            held.mode = Mode::Holding;
        }
    }

    /// This side goes on with its other backups, which have every entry up to `acknowledged`.
    pub fn resume(&self, acknowledged: EntrySequence) {
        let mut held = self.lock();
        if held.mode == Mode::Holding {
            held.mode = Mode::Protecting;
            held.acknowledged = held.acknowledged.max(acknowledged);
            self.release(&mut held);
        }
    }

    /// Protection is over, and this side goes on alone: lets out everything that waits, and
    /// everything that comes.
    pub fn unprotect(&self) {
        let mut held = self.lock();
        if !matches!(held.mode, Mode::Protecting | Mode::Holding) {
            return;
        }
        held.mode = Mode::Open;
        self.recent.end();
        held.marks.clear();
        self.urgent.store(false, Ordering::Relaxed);
        held.packet_bytes = 0;
        while let Some(output) = held.waiting.pop() {
            self.outside.let_out(output, Assurance::Fresh);
        }
        self.outside.all_let_out();
        self.left.notify_all();
    }

    /// This side has lost its generation: nothing leaves any more.
    pub fn shut(&self) {
        let mut held = self.lock();
        held.mode = Mode::Shut;
        held.waiting.clear();
        held.packet_bytes = 0;
        held.marks.clear();
    }

    /// True if an output waits that somebody waits for (the guest itself for a disk request, a peer for
    /// a packet): it is marked without waiting for company.
    pub fn has_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed)
    }

    /// An entry is about to be logged that marks outputs: their delay counts from here. Its
    /// acknowledgement may be back before [`Self::mark`] is called.
    pub fn begin_mark(&self) -> MarkBegun {
        MarkBegun(time_with_suspension())
    }

    /// The log entry `entry`, begun with [`Self::begin_mark`], marks every output up to `output`.
    pub fn mark(&self, begun: MarkBegun, entry: EntrySequence, output: OutputSequence) {
        self.urgent.store(false, Ordering::Relaxed);
        let mut held = self.lock();
        if matches!(held.mode, Mode::Protecting | Mode::Holding) {
            held.marks.push_back(Mark { entry, output, begun });
            self.release(&mut held);
        }
    }

    /// The backup has every entry up to `entry`: lets out what that covers.
    pub fn acknowledged(&self, entry: EntrySequence) {
        let mut held = self.lock();
        held.acknowledged = held.acknowledged.max(entry);
        self.release(&mut held);
    }

    fn release(&self, held: &mut Held) {
        if held.mode == Mode::Holding {
            return;
        }
        let mut covered = None;
        while held.marks.front().is_some_and(|mark| mark.entry <= held.acknowledged) {
            let mark = held.marks.pop_front().expect("just seen");
            // What this mark covers, the backup had heard of when its time began.
            covered = Some((mark.output, mark.begun));
            let delay = u64::try_from(mark.begun.age().as_nanos()).unwrap_or(u64::MAX);
            held.measured += 1;
            held.worst_ns = held.worst_ns.max(delay);
            if held.delays.len() == DELAY_WINDOW {
                held.delays.pop_front();
            }
            held.delays.push_back(delay);
        }
        let Some((covered, begun)) = covered else { return };
        while let Some(output) = held.waiting.pop_up_to(covered) {
            if let OutputKind::Packet(packet) = &output.kind {
                held.packet_bytes -= packet.frame.len() + OVERHEAD;
            }
            let assurance = if begun.age() < FRESH { Assurance::Fresh } else { Assurance::Stale };
            self.outside.let_out(output, assurance);
        }
        self.outside.all_let_out();
        self.left.notify_all();
    }

    /// The outputs after `after` that wait: those an epoch has to tell of.
    pub fn waiting_after(&self, after: OutputSequence) -> Vec<Output> {
        self.lock().waiting.after(after)
    }

    /// Console outputs and packets that were made and are not known to be out, in order: who begins to
    /// follow here has not made them, and must have them all the same. To be called with the machine at
    /// rest.
    pub fn not_out(&self) -> Vec<Output> {
        let held = self.lock();
        let mut outputs = self.outside.not_out();
        outputs.extend(held.waiting.after(OutputSequence(0)));
        outputs.retain(|output| !matches!(output.kind, OutputKind::Disk { .. }));
        outputs
    }

    fn is_full_with(&self, held: &Held) -> bool {
        // A side that is fenced puts nothing out, and is about to halt.
        held.mode != Mode::Shut && held.waiting.cost() + self.outside.backlog() > self.limit
    }

    /// True if so much waits that the guest must not put out more: it is stopped until some of that has
    /// left. Its state knows nothing of it; and nothing is lost.
    pub fn is_full(&self) -> bool {
        self.is_full_with(&self.lock())
    }

    /// Waits until the gate is not full any more, for at most `limit`; says whether that is so.
    pub fn wait_room(&self, limit: Duration) -> bool {
        let held = self.lock();
        let full = |held: &mut Held| self.is_full_with(held);
        let waited = self.left.wait_timeout_while(held, limit, full);
        let (held, _) = waited.expect("no holder of the gate's lock panics");
        // What leaves outside, nobody tells here.
        !self.is_full_with(&held)
    }

    /// What waits, in bytes, and whether the guest waits for that.
    pub fn waiting_bytes(&self) -> WaitingBytes {
        let held = self.lock();
        let (waiting, outside) = (held.waiting.cost(), self.outside.backlog());
        let guest_waits_for = self.is_full_with(&held).then_some(match held.mode {
            _ if outside > waiting => WaitsFor::Outside,
            Mode::Holding => WaitsFor::Arbiter,
            Mode::Open | Mode::Protecting | Mode::Shut => WaitsFor::Acknowledgement,
        });
        WaitingBytes { held: waiting, outside, guest_waits_for }
    }

    /// Waits until an output after `after` waits, for at most `limit`; says whether one does.
    pub fn wait_after(&self, after: OutputSequence, limit: Duration) -> bool {
        let none = |held: &mut Held| held.waiting.last().is_none_or(|last| last <= after);
        let waited = self.arrived.wait_timeout_while(self.lock(), limit, none);
        !waited.expect("no holder of the gate's lock panics").1.timed_out()
    }

    /// Marks whose acknowledgement is still to come.
    pub fn marks_waiting(&self) -> usize {
        self.lock().marks.len()
    }

    /// Outputs that wait.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// How long outputs waited.
    pub fn delays(&self) -> DelayStatistics {
        let held = self.lock();
        let mut window: Vec<u64> = held.delays.iter().copied().collect();
        window.sort_unstable();
        DelayStatistics {
            marks: held.measured,
            median_ns: window.get(window.len() / 2).copied().unwrap_or(0),
            worst_ns: held.worst_ns,
        }
    }
}

impl OutputGate for HeldOutputs {
    fn emit(&self, output: Output) {
        self.recent.add(&output);
        let mut held = self.lock();
        match held.mode {
            Mode::Open => {
                self.outside.let_out(output, Assurance::Fresh);
                self.outside.all_let_out();
            }
            Mode::Protecting | Mode::Holding => {
                match &output.kind {
                    OutputKind::Console { .. } => {}
                    OutputKind::Disk { .. } => self.urgent.store(true, Ordering::Relaxed),
                    OutputKind::Packet(packet) => {
                        let bytes = packet.frame.len() + OVERHEAD;
                        if held.packet_bytes + bytes > PACKET_BYTES_LIMIT {
                            return;
                        }
                        held.packet_bytes += bytes;
                        self.urgent.store(true, Ordering::Relaxed);
                    }
                }
                held.waiting.push(output);
                if held.waiting.cost() > self.limit / 2 {
                    // Or the guest would be stopped before they are marked, and nothing would leave.
                    self.urgent.store(true, Ordering::Relaxed);
                }
                self.arrived.notify_all();
            }
            Mode::Shut => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_logging_channel::entry::Packet;

    #[derive(Debug, Default)]
    struct Seen(Mutex<Vec<u64>>);

    impl Outside for Seen {
        fn let_out(&self, output: Output, _: Assurance) {
            self.0.lock().expect("not poisoned").push(output.sequence.0);
        }
    }

    /// An outside that takes nothing.
    #[derive(Debug, Default)]
    struct Stuck(Mutex<Vec<Output>>);

    impl Outside for Stuck {
        fn let_out(&self, output: Output, _: Assurance) {
            self.0.lock().expect("not poisoned").push(output);
        }
        fn backlog(&self) -> usize {
            self.0.lock().expect("not poisoned").len() * 100
        }
        fn not_out(&self) -> Vec<Output> {
            self.0.lock().expect("not poisoned").clone()
        }
    }

    #[test]
    fn a_gate_is_full_of_what_waits_on_either_side_of_it_and_says_for_what() {
        let outside = Arc::new(Stuck::default());
        let gate = HeldOutputs::with_limit(Arc::clone(&outside) as Arc<dyn Outside>, 1000);
        (1..=10).for_each(|sequence| gate.emit(output(sequence)));
        assert!(!gate.is_full());
        gate.emit(output(11));
        assert_eq!(gate.waiting_bytes().guest_waits_for, Some(WaitsFor::Outside));
        assert!(!gate.wait_room(Duration::ZERO));
        outside.0.lock().unwrap().clear();
        assert!(gate.wait_room(Duration::ZERO));

        gate.protect();
        (12..)
            .take_while(|sequence| {
                gate.emit(output(*sequence));
                !gate.is_full()
            })
            .for_each(drop);
        assert_eq!(gate.waiting_bytes().guest_waits_for, Some(WaitsFor::Acknowledgement));
        assert!(gate.has_urgent(), "they are marked before the guest is stopped");
        gate.hold();
        assert_eq!(gate.waiting_bytes().guest_waits_for, Some(WaitsFor::Arbiter));
        gate.shut();
        assert!(!gate.is_full(), "a side that is fenced halts, and waits for nothing");
    }

    #[test]
    fn who_begins_to_follow_gets_what_is_not_out_in_order() {
        let outside = Arc::new(Stuck::default());
        let gate = HeldOutputs::open(Arc::clone(&outside) as Arc<dyn Outside>);
        gate.emit(output(1));
        gate.protect();
        gate.emit(output(2));
        let operation = crate::board::DiskOperation::Flush;
        let request = vmft_logging_channel::entry::RequestId(1);
        let kind = OutputKind::Disk { disk: 0, request, operation };
        gate.emit(Output { sequence: OutputSequence(3), kind });
        gate.emit(output(4));
        let sequences: Vec<u64> = gate.not_out().iter().map(|output| output.sequence.0).collect();
        assert_eq!(sequences, [1, 2, 4], "disk requests are in the machine");
    }

    fn output(sequence: u64) -> Output {
        Output {
            sequence: OutputSequence(sequence),
            kind: OutputKind::Console { offset: sequence, bytes: vec![b'x'] },
        }
    }

    fn seen(outside: &Seen) -> Vec<u64> {
        outside.0.lock().expect("not poisoned").clone()
    }

    #[test]
    fn output_waits_for_its_acknowledgement() {
        let outside = Arc::new(Seen::default());
        let gate = HeldOutputs::open(Arc::clone(&outside) as Arc<dyn Outside>);
        gate.emit(output(1));
        assert_eq!(seen(&outside), [1]);
        gate.protect();
        gate.emit(output(2));
        gate.emit(output(3));
        gate.mark(gate.begin_mark(), EntrySequence(7), OutputSequence(2));
        gate.acknowledged(EntrySequence(6));
        assert_eq!(seen(&outside), [1]);
        gate.acknowledged(EntrySequence(9));
        assert_eq!(seen(&outside), [1, 2], "output 3 is not marked yet");
    }

    #[test]
    fn an_acknowledgement_quicker_than_its_mark_releases() {
        let outside = Arc::new(Seen::default());
        let gate = HeldOutputs::open(Arc::clone(&outside) as Arc<dyn Outside>);
        gate.protect();
        gate.emit(output(1));
        gate.acknowledged(EntrySequence(5));
        assert!(seen(&outside).is_empty());
        gate.mark(gate.begin_mark(), EntrySequence(5), OutputSequence(1));
        assert_eq!(seen(&outside), [1]);
    }

    #[test]
    fn the_delay_of_an_output_counts_from_before_its_mark_was_logged() {
        let gate = HeldOutputs::open(Arc::new(Seen::default()));
        gate.protect();
        gate.emit(output(1));
        let before = Duration::from_millis(3);
        let begun = gate.begin_mark();
        let begun = MarkBegun(begun.0.checked_sub(before).expect("the host has run for longer"));
        gate.acknowledged(EntrySequence(1));
        gate.mark(begun, EntrySequence(1), OutputSequence(1));
        let delays = gate.delays();
        assert_eq!(delays.marks, 1);
        assert!(u128::from(delays.median_ns) >= before.as_nanos(), "{delays:?}");
    }

    /// What was let out on fresh evidence.
    #[derive(Debug, Default)]
    struct Fresh(Mutex<Vec<bool>>);

    impl Outside for Fresh {
        fn let_out(&self, _: Output, assurance: Assurance) {
            self.0.lock().expect("not poisoned").push(assurance == Assurance::Fresh);
        }
    }

    #[test]
    fn evidence_is_as_old_as_the_newest_mark_that_was_acknowledged() {
        let outside = Arc::new(Fresh::default());
        let gate = HeldOutputs::open(Arc::clone(&outside) as Arc<dyn Outside>);
        gate.protect();
        let ago = |begun: MarkBegun, time| {
            MarkBegun(begun.0.checked_sub(time).expect("the host has run for longer"))
        };
        let old = FRESH + Duration::from_millis(1);
        for (sequence, age) in [(1, old), (2, old), (3, Duration::ZERO)] {
            // Of several bytes, which stay outputs of their own.
            let kind = OutputKind::Console { offset: 2 * sequence, bytes: b"xy".to_vec() };
            gate.emit(Output { sequence: OutputSequence(sequence), kind });
            let begun = ago(gate.begin_mark(), age);
            gate.mark(begun, EntrySequence(sequence), OutputSequence(sequence));
        }
        gate.acknowledged(EntrySequence(1));
        gate.acknowledged(EntrySequence(3));
        assert_eq!(*outside.0.lock().expect("not poisoned"), [false, true, true]);
    }

    #[test]
    fn packets_beyond_the_limit_are_lost_and_make_room_when_they_leave() {
        let outside = Arc::new(Seen::default());
        let gate = HeldOutputs::open(Arc::clone(&outside) as Arc<dyn Outside>);
        gate.protect();
        let packet = |sequence| {
            let frame = vec![0; PACKET_BYTES_LIMIT / 2 - OVERHEAD];
            let kind = OutputKind::Packet(Packet { frame, ..Packet::default() });
            Output { sequence: OutputSequence(sequence), kind }
        };
        (1..=3).for_each(|sequence| gate.emit(packet(sequence)));
        assert!(gate.has_urgent());
        gate.mark(gate.begin_mark(), EntrySequence(1), OutputSequence(3));
        gate.acknowledged(EntrySequence(1));
        gate.emit(packet(4));
        gate.mark(gate.begin_mark(), EntrySequence(2), OutputSequence(4));
        gate.acknowledged(EntrySequence(2));
        assert_eq!(seen(&outside), [1, 2, 4]);
    }

    #[test]
    fn while_it_is_not_known_who_goes_on_acknowledgements_release_nothing() {
        let outside = Arc::new(Seen::default());
        let gate = HeldOutputs::open(Arc::clone(&outside) as Arc<dyn Outside>);
        gate.protect();
        for sequence in [1, 2] {
            gate.emit(output(sequence));
            gate.mark(gate.begin_mark(), EntrySequence(sequence), OutputSequence(sequence));
        }
        gate.hold();
        gate.acknowledged(EntrySequence(1));
        assert!(seen(&outside).is_empty());
        gate.resume(EntrySequence(1));
        assert_eq!(seen(&outside), [1], "the second waits for its acknowledgement as before");
        gate.acknowledged(EntrySequence(2));
        assert_eq!(seen(&outside), [1, 2]);
    }

    #[test]
    fn a_survivor_lets_everything_out_and_a_loser_nothing() {
        let outside = Arc::new(Seen::default());
        let gate = HeldOutputs::open(Arc::clone(&outside) as Arc<dyn Outside>);
        gate.protect();
        gate.emit(output(1));
        gate.unprotect();
        gate.emit(output(2));
        assert_eq!(seen(&outside), [1, 2]);
        gate.protect();
        gate.emit(output(3));
        gate.shut();
        gate.unprotect();
        gate.acknowledged(EntrySequence(99));
        gate.emit(output(4));
        assert_eq!(seen(&outside), [1, 2]);
    }
}
