//! Epochs gone bad: each is refused, with the copy as it was, or applied; then it can be taken over
//! from, or that is refused in words. A good epoch after a refused one is applied.

use super::*;
use vmft_fuzzing::{Counting, Random, change, damage, large_cases, peak_of};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Cases of a quick run.
const CASES: u64 = 60;
/// So many ordinary cases one of these takes as long as: memory is mapped.
const WORTH: u64 = 10;
/// How many bad epochs come before a good one.
const EACH: usize = 8;

/// The content of an epoch, changed: what it says of itself is right.
fn gone_bad(random: &mut Random, good: &EpochContent) -> EpochContent {
    let mut content = good.clone();
    if random.chance(70) {
        let state = MachineState::decode(&good.machine).expect("good");
        let mut value = serde_json::to_value(state).expect("plain values");
        change(random, &mut value);
        if let Ok(state) = serde_json::from_value::<MachineState>(value) {
            content.machine = state.encode();
        }
    }
    if random.chance(40) {
        let mut value = serde_json::to_value(&content.outputs).expect("plain values");
        change(random, &mut value);
        content.outputs = serde_json::from_value(value).unwrap_or_default();
    }
    if random.chance(10) {
        damage(random, &mut content.machine, &[]);
    }
    content
}

/// Feeds pieces; true if they made an epoch whole.
fn was_applied(follower: &mut EpochFollower, pieces: &Pieces) -> bool {
    for (kind, bytes) in pieces {
        match follower.handle_piece(*kind, bytes) {
            Ok(None) => {}
            Ok(Some(_)) => return true,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return false;
            }
        }
    }
    false
}

#[test]
fn an_epoch_gone_bad_is_refused_or_applied_and_the_next_good_one_counts() {
    let (mut applied, mut refused) = (0u64, 0u64);
    large_cases(CASES, WORTH, |mut random| {
        let mut machine = machine();
        run(&mut machine, 1_000 + random.below(2_000));
        let view = machine.watch_writes();
        let mut follower = copy(&mut machine);
        run(&mut machine, 3_000);
        let outputs = vec![output(1)];
        let content = EpochContent { machine: machine.state().encode(), outputs };
        let good = epoch_with(&mut machine, &view, 1, &content);
        let mut others: Vec<Vec<u8>> = good.iter().map(|(_, bytes)| bytes.clone()).collect();
        others.push(content.encode());
        let size: usize = others.iter().map(Vec::len).sum();
        for _ in 0..EACH {
            // Cut off in the middle, the one before would be in the way.
            follower.reader = CheckpointReader::new();
            let mut bad = if random.chance(50) {
                without_pages(&mut machine, &gone_bad(&mut random, &content))
            } else {
                good.clone()
            };
            if random.chance(40) {
                let at = random.index(bad.len());
                match random.below(4) {
                    0 => drop(bad.remove(at)),
                    1 => bad.swap(at, random.index(bad.len())),
                    _ => damage(&mut random, &mut bad[at].1, &others),
                }
            }
            let before = (follower.point(), follower.epochs(), follower.console_offset());
            let (whole, peak) = peak_of(|| was_applied(&mut follower, &bad));
            assert!(peak <= (8 << 20) + 64 * size, "{peak} bytes for {size}");
            if whole {
                applied += 1;
                if let Ok(mut machine) = follower.into_machine() {
                    machine.state();
                }
                return;
            }
            refused += 1;
            let after = (follower.point(), follower.epochs(), follower.console_offset());
            assert_eq!(after, before, "a refused epoch has changed something");
        }
        // What was cut off in the middle is refused by what comes next.
        let taken = was_applied(&mut follower, &good) || was_applied(&mut follower, &good);
        assert!(taken, "a good epoch is refused");
        follower.into_machine().expect("a machine's state");
    });
    println!("{applied} applied, {refused} refused");
}

/// An epoch without pages, with this content.
fn without_pages(machine: &mut Machine, content: &EpochContent) -> Pieces {
    let limit = crate::checkpoint::page_limit(machine.ram());
    let encoder = PageEncoder::for_earlier(0);
    let begun = CheckpointWriter::begin(MemoryBase::Earlier, limit, &[], encoder);
    let (writer, first) = begun.expect("no fixed part");
    let position = EpochNumber(1).position(machine.point());
    let (last, _) = writer.finish(position, &content.encode()).expect("a small state");
    let all = first.iter().chain(&last);
    all.map(|piece| (piece.kind(), piece.encode(Vec::new()))).collect()
}

#[test]
fn an_epoch_with_outputs_that_no_guest_has_put_out_is_refused() {
    let mut machine = machine();
    run(&mut machine, 1_000);
    let view = machine.watch_writes();
    let mut follower = copy(&mut machine);
    run(&mut machine, 2_000);
    let operation = vmft_vmm::board::DiskOperation::Flush;
    let request = vmft_log::entry::RequestId(1);
    let kind = OutputKind::Disk { disk: 200, request, operation };
    let outputs = vec![Output { sequence: OutputSequence(1), kind }];
    assert!(machine.outputs() >= OutputSequence(1), "it has printed");
    let content = EpochContent { machine: machine.state().encode(), outputs };
    let pieces = epoch_with(&mut machine, &view, 1, &content);
    assert!(!was_applied(&mut follower, &pieces));
    assert_eq!(follower.epochs(), 0);
}
