use super::*;
use vmft_log::entry::Packet;

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

/// An outside that takes nothing.
#[derive(Debug, Default)]
struct Stuck(Mutex<Vec<Output>>);

impl Outside for Stuck {
    fn let_out(&self, output: Output, _: Assurance) {
        self.0.lock().push(output);
    }
    fn backlog(&self) -> usize {
        self.0.lock().len() * 100
    }
    fn not_out(&self) -> Vec<Output> {
        self.0.lock().clone()
    }

    fn all_let_out(&self) {}
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
    outside.0.lock().clear();
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
    let request = vmft_log::entry::RequestId(1);
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
    outside.0.lock().clone()
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
        self.0.lock().push(assurance == Assurance::Fresh);
    }

    fn backlog(&self) -> usize {
        0
    }

    fn not_out(&self) -> Vec<Output> {
        Vec::new()
    }

    fn all_let_out(&self) {}
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
    assert_eq!(*outside.0.lock(), [false, true, true]);
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
