//! The exit stream, from a recording side to a replaying one.

use super::*;
use crate::inputs::Place;
use crate::inputs::exits::ExitEncoder;
use std::collections::VecDeque;
use vmft_cpu::memory::MIN_MEMORY;
use vmft_cpu::{Access, ExitReason};

#[derive(Debug)]
struct Entries(VecDeque<Entry>);

impl LogSource for Entries {
    fn next(&mut self, _: ExecutionPoint) -> Result<Entry, LogEnd> {
        self.0.pop_front().ok_or(LogEnd::Ended)
    }

    fn skip_to_checkpoint(&mut self, _: &dyn Fn(&[u8]) -> bool) -> Option<Vec<Entry>> {
        None
    }
}

fn exit(number: u64) -> ExitRecord {
    let mut registers = [number * 3; 18];
    registers[16] = 0x10_0000 + number;
    let record = ExitRecord::new(ExitReason::PortWrite, Access::default(), registers);
    ExitRecord { address: 0x3F8, width: 1, data: number, ..record }
}

fn entry(point: u64, exits: impl IntoIterator<Item = u64>) -> Entry {
    let mut encoder = ExitEncoder::default();
    exits.into_iter().for_each(|number| encoder.push(&exit(number)));
    Entry::Exits { point: ExecutionPoint::new(point), exits: encoder.take() }
}

fn boundary(point: u64) -> Boundary {
    use crate::inputs::PointScale;
    use vmft_log::point::{VirtualClock, VirtualTime};
    Boundary {
        point: ExecutionPoint::new(point),
        place: Place::Point(AtPoint { branch: None, idle: false }),
        time: VirtualTime::ZERO,
        clock: VirtualClock {
            sync_point: ExecutionPoint::START,
            sync_time: VirtualTime::ZERO,
            rate: PointScale::EXITS.initial_rate,
        },
        awaits_boot: false,
        resets: crate::inputs::Resets::default(),
        interrupt_pending: false,
        next_timer: None,
        outputs: OutputSequence(0),
        room: crate::inputs::Room::default(),
    }
}

/// Replays exits 1 to 6 with `entries`, one exit a point, with `change` made to each.
fn replay(
    entries: impl IntoIterator<Item = Entry>,
    change: impl Fn(&mut ExitRecord),
) -> Result<u64, Box<Divergence>> {
    let kept = Arc::new(KeptOutputs::default());
    let log = Entries(entries.into_iter().collect());
    let mut inputs = Replaying::new(log, kept, ExecutionPoint::START, MIN_MEMORY);
    assert!(inputs.watches_exits());
    for point in 0..=6 {
        if point > 0 {
            let mut here = exit(point);
            change(&mut here);
            inputs.exits(ExecutionPoint::new(point), &[here]).expect("few enough");
        }
        match inputs.next(&boundary(point)) {
            Ok(Step::RunTo(next)) => assert!(next > ExecutionPoint::new(point)),
            Ok(Step::LogEnded) => return Ok(inputs.exits_agreed()),
            Err(InputError::Divergence(divergence)) => return Err(divergence),
            other => panic!("{other:?}"),
        }
    }
    panic!("the log does not end");
}

#[test]
fn the_same_exits_agree_however_they_are_grouped() {
    let groups = [
        vec![entry(6, 1..=6)],
        vec![entry(2, 1..=2), entry(6, 3..=6)],
        (1..=6).map(|number| entry(number, [number])).collect(),
        // Two entries at one point.
        vec![entry(6, 1..=4), entry(6, 5..=6)],
    ];
    for entries in groups {
        assert_eq!(replay(entries, |_| {}), Ok(6));
    }
}

#[test]
fn the_first_differing_exit_is_named_with_both_sides_registers() {
    let changed = |record: &mut ExitRecord| {
        if record.data >= 4 {
            record.registers[3] = 0xBAD;
        }
    };
    let found = replay([entry(6, 1..=6)], changed).expect_err("they differ");
    let Difference::Exits(difference) = &found.what else { panic!("{found}") };
    assert_eq!((difference.index, found.point), (3, ExecutionPoint::new(6)));
    assert_eq!(difference.logged, Some(exit(4)));
    let text = found.to_string();
    for part in ["exit 4", "wrote port 0x3f8", "rbx is 0xbad, logged 0xc", "at 0x100004"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn another_reason_is_told_of_both_sides() {
    let changed = |record: &mut ExitRecord| {
        if record.data == 2 {
            record.reason = ExitReason::Halt;
        }
    };
    let text = replay([entry(6, 1..=6)], changed).expect_err("they differ").to_string();
    assert!(text.contains("this side HLT before 0x100002, logged: wrote port"), "{text}");
}

#[test]
fn an_exit_too_few_or_too_many_is_a_divergence() {
    let more = replay([entry(6, 1..=7)], |_| {}).expect_err("the log has one more");
    assert!(more.to_string().contains("this side had none"), "{more}");
    let fewer = [entry(5, 1..=4), entry(6, [6])];
    let found = replay(fewer, |_| {}).expect_err("the log has one less");
    assert!(found.to_string().contains("wrote port"), "{found}");
    // Exit 5 is left over when exit 6 is compared.
    let before_a_digest = Entry::Digest { point: ExecutionPoint::new(6), digest: digest() };
    let kept = Arc::new(KeptOutputs::default());
    let log = Entries([entry(6, 1..=5), before_a_digest].into());
    let mut inputs = Replaying::new(log, kept, ExecutionPoint::START, MIN_MEMORY);
    let all: Vec<_> = (1..=6).map(exit).collect();
    inputs.exits(ExecutionPoint::new(6), &all).expect("few enough");
    assert!(matches!(inputs.next(&boundary(6)), Ok(Step::Here(_, PointStep::Digest))));
    let error = inputs.digest(ExecutionPoint::new(6), digest()).expect_err("one is left");
    assert!(error.to_string().contains("logged none"), "{error}");
}

fn digest() -> StateDigest {
    StateDigest { registers: [0; 18], cpu: 0, devices: 0, memory: 0, places: 0, pages: 0 }
}

#[test]
fn exits_that_are_none_and_exits_without_end_are_refused() {
    let point = ExecutionPoint::new(3);
    let entries = [Entry::Exits { point, exits: vec![99, 0, 0] }];
    let found = replay(entries, |_| {}).expect_err("no such reason");
    assert_eq!(found.what, Difference::MalformedExits);

    let kept = Arc::new(KeptOutputs::default());
    let mut inputs =
        Replaying::new(Entries(VecDeque::new()), kept, ExecutionPoint::START, MIN_MEMORY);
    let many = vec![exit(1); MAX_UNCOMPARED];
    inputs.exits(point, &many).expect("as many as may wait");
    let error = inputs.exits(point, &many[..1]).expect_err("one too many");
    let InputError::Divergence(divergence) = error else { panic!("{error}") };
    assert_eq!(divergence.what, Difference::UncomparedExits);
}

#[test]
fn the_branch_of_the_next_point_is_told_until_the_guest_is_there() {
    let point = ExecutionPoint::new(5);
    let branch = CodeAddress::try_from(0xFFFF_8000_0000_1234).expect("canonical");
    let log = [
        Entry::Landing { point, branch },
        Entry::Progress { point },
        Entry::Progress { point: ExecutionPoint::new(9) },
    ];
    let kept = Arc::new(KeptOutputs::default());
    let mut inputs = Replaying::new(Entries(log.into()), kept, ExecutionPoint::START, MIN_MEMORY);
    assert_eq!(inputs.branch_before(point), None, "nothing was read yet");
    for at in [0, 3] {
        assert_eq!(inputs.next(&boundary(at)).expect("on the way"), Step::RunTo(point));
        assert_eq!(inputs.branch_before(point), Some(branch));
        assert_eq!(inputs.branch_before(ExecutionPoint::new(4)), None);
    }
    let next = ExecutionPoint::new(9);
    assert_eq!(inputs.next(&boundary(5)).expect("it asks nothing"), Step::RunTo(next));
    assert_eq!((inputs.branch_before(point), inputs.branch_before(next)), (None, None));
}
