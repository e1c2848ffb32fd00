//! Recording, with worlds and logs of its own.

use super::*;
use crate::inputs::{Asked, AtPoint, ClockControl, HostTime, Place, PointScale, Room};
use crate::machine::BootSource;
use crate::outputs::{Assurance, Output, OutputGate, OutputKind, Outside};
use vmft_log::entry::{Arrival, Packet};
use vmft_log::point::{VirtualClock, VirtualTime};
use vmft_threads::Mutex;

/// A world that the guest is stopped in, so that it need not be waited for.
#[derive(Debug)]
struct Quiet;

impl InputSource for Quiet {
    fn now(&mut self) -> HostTime {
        HostTime(0)
    }
    fn take_asked(&mut self) -> Option<Asked> {
        Some(Asked::Pause)
    }
    fn take_arrival(&mut self, _: Room) -> Option<Arrival> {
        None
    }
    fn wait(&mut self, _: Option<HostTime>, _: Room) -> bool {
        false
    }
    fn start(&mut self, _: DeviceRequest) -> Result<(), InputError> {
        Ok(())
    }
    fn take_boot(&mut self) -> Option<Result<BootSource, String>> {
        None
    }
    fn at(&mut self, _: &Boundary) {}

    fn wall_clock(&mut self) -> Option<vmft_log::point::WallTime> {
        None
    }

    fn hold_back(&mut self) -> bool {
        true
    }
}

/// A log whose reader is lost with entry `lost_at`.
#[derive(Debug)]
struct LosingLog {
    appended: u64,
    lost_at: u64,
}

impl LogSink for LosingLog {
    fn append(&mut self, _: &Entry) -> Result<Option<EntrySequence>, std::io::Error> {
        self.appended += 1;
        Ok((!self.is_closed()).then_some(EntrySequence(self.appended)))
    }
    fn flush(&mut self) -> Result<(), std::io::Error> {
        Ok(())
    }
    fn is_closed(&self) -> bool {
        self.appended >= self.lost_at
    }

    fn hold_back(&mut self) -> bool {
        true
    }

    fn wants_checkpoint(&mut self) -> bool {
        false
    }

    fn is_far_behind(&self) -> bool {
        false
    }
}

#[derive(Debug, Default)]
struct Seen(Mutex<Vec<u64>>);

impl Outside for Seen {
    fn let_out(&self, output: Output, _: Assurance) {
        self.0.lock().push(output.sequence.0);
    }

    fn backlog(&self) -> usize {
        0
    }

    fn not_out(&self) -> Vec<Output> {
        Vec::new()
    }

    fn all_let_out(&self) {}
}

fn boundary(outputs: u64) -> Boundary {
    let clock = VirtualClock {
        sync_point: ExecutionPoint::START,
        sync_time: VirtualTime::ZERO,
        rate: PointScale::SOFT.initial_rate,
    };
    Boundary {
        point: ExecutionPoint::START,
        time: VirtualTime::ZERO,
        clock,
        place: Place::Point(AtPoint { branch: None, idle: true }),
        awaits_boot: false,
        resets: crate::inputs::Resets::default(),
        interrupt_pending: false,
        next_timer: None,
        outputs: OutputSequence(outputs),
        room: Room::default(),
    }
}

/// Two outputs, each at a boundary of its own, on a log that is lost with entry `lost_at`: what
/// is let out once the first entry is acknowledged, and what after this side may go on alone.
fn let_out(lost_at: u64) -> (Vec<u64>, Vec<u64>) {
    let seen = Arc::new(Seen::default());
    let gate = Arc::new(HeldOutputs::open(Arc::clone(&seen) as Arc<dyn Outside>));
    gate.protect();
    let point = ExecutionPoint::START;
    let live = Live::new(Quiet, ClockControl::new(&boundary(0).clock, point, PointScale::SOFT));
    let log = LosingLog { appended: 0, lost_at };
    let mut inputs = Recording::new(live, log, Arc::clone(&gate), point, OutputSequence(0));
    for sequence in [1, 2] {
        // Of several bytes, which stay outputs of their own in every queue.
        let kind = OutputKind::Console { offset: 2 * sequence, bytes: b"xy".to_vec() };
        gate.emit(Output { sequence: OutputSequence(sequence), kind });
        assert_eq!(inputs.next(&boundary(sequence)).expect("the log swallows"), Step::Pause);
        gate.acknowledged(EntrySequence(1));
    }
    let before = seen.0.lock().clone();
    gate.unprotect();
    let after = seen.0.lock().clone();
    (before, after)
}

#[test]
fn an_output_whose_mark_nobody_got_waits_until_this_side_may_go_on_alone() {
    assert_eq!(let_out(1), (vec![], vec![1, 2]));
    assert_eq!(let_out(2), (vec![1], vec![1, 2]));
}

/// A world in which something has arrived.
#[derive(Debug)]
struct Arrived(Option<Arrival>);

impl InputSource for Arrived {
    fn now(&mut self) -> HostTime {
        HostTime(0)
    }
    fn take_asked(&mut self) -> Option<Asked> {
        None
    }
    fn take_arrival(&mut self, _: Room) -> Option<Arrival> {
        self.0.take()
    }
    fn wait(&mut self, _: Option<HostTime>, _: Room) -> bool {
        self.0.is_some()
    }
    fn start(&mut self, _: DeviceRequest) -> Result<(), InputError> {
        Ok(())
    }
    fn take_boot(&mut self) -> Option<Result<BootSource, String>> {
        None
    }
    fn at(&mut self, _: &Boundary) {}

    fn wall_clock(&mut self) -> Option<vmft_log::point::WallTime> {
        None
    }

    fn hold_back(&mut self) -> bool {
        true
    }
}

/// What was appended.
#[derive(Debug, Default)]
struct KeepingLog(Vec<Entry>);

impl LogSink for KeepingLog {
    fn append(&mut self, entry: &Entry) -> Result<Option<EntrySequence>, std::io::Error> {
        self.0.push(entry.clone());
        Ok(Some(EntrySequence(self.0.len() as u64)))
    }
    fn flush(&mut self) -> Result<(), std::io::Error> {
        Ok(())
    }

    fn hold_back(&mut self) -> bool {
        true
    }

    fn wants_checkpoint(&mut self) -> bool {
        false
    }

    fn is_far_behind(&self) -> bool {
        false
    }

    fn is_closed(&self) -> bool {
        false
    }
}

#[test]
fn an_arrival_is_in_the_log_before_the_guest_has_it() {
    let seen: Arc<dyn Outside> = Arc::new(Seen::default());
    let point = ExecutionPoint::START;
    let arrival = Arrival::Packets(vec![Packet { frame: vec![7; 60], ..Packet::default() }]);
    let clock = ClockControl::new(&boundary(0).clock, point, PointScale::SOFT);
    let live = Live::new(Arrived(Some(arrival.clone())), clock);
    let gate = Arc::new(HeldOutputs::open(seen));
    let log = KeepingLog::default();
    let mut inputs = Recording::new(live, log, gate, point, OutputSequence(0));
    let here = AtPoint { branch: None, idle: false };
    let running = Boundary { place: Place::Point(here), ..boundary(0) };
    let delivered = Step::Here(here, PointStep::Deliver(arrival.clone()));
    while inputs.next(&running).expect("the log takes all") != delivered {}
    assert_eq!(inputs.log().0.last(), Some(&Entry::Arrival { point, arrival }));
}

/// What is logged of an arrival at a point, at which something was put out as well.
fn logged(place: Place) -> Vec<Entry> {
    let seen: Arc<dyn Outside> = Arc::new(Seen::default());
    let arrival = Arrival::ConsoleInput(b"x".to_vec());
    let start = ExecutionPoint::START;
    let clock = ClockControl::new(&boundary(0).clock, start, PointScale::BRANCHES);
    let gate = Arc::new(HeldOutputs::open(seen));
    let log = KeepingLog::default();
    let live = Live::new(Arrived(Some(arrival)), clock);
    let mut inputs = Recording::new(live, log, gate, start, OutputSequence(0));
    let point = ExecutionPoint::new(1030);
    let here = Boundary { point, place, ..boundary(1) };
    while !matches!(inputs.next(&here), Ok(Step::RunTo(_))) {}
    // Nothing was logged at the next.
    let there = Boundary { point: point.after(7), ..here };
    while !matches!(inputs.next(&there), Ok(Step::RunTo(_))) {}
    std::mem::take(&mut inputs.log().0)
}

#[test]
fn a_branch_is_logged_once_in_front_of_all_that_is_logged_behind_it() {
    let point = ExecutionPoint::new(1030);
    let behind = |branch| Place::Point(AtPoint { branch, idle: false });
    let without = logged(behind(None));
    assert!(without.len() > 2, "{without:?}");
    assert!(without.iter().all(|entry| entry.point() == Some(point)), "{without:?}");
    let branch = CodeAddress::try_from(0x1234).expect("canonical");
    let mut expected = without;
    expected.insert(0, Entry::Landing { point, branch });
    assert_eq!(logged(behind(Some(branch))), expected);
}

#[test]
fn an_output_whose_mark_is_acknowledged_leaves() {
    assert_eq!(let_out(3).0, [1], "the second mark is not acknowledged");
}
