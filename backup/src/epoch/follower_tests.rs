use super::*;
use crate::checkpoint::RamPages;
use std::collections::VecDeque;
use std::time::Duration;
use vmft_cpu::memory::{MIN_MEMORY, WriteView};
use vmft_cpu::{CpuCount, ExitRecord};
use vmft_guest_images::probe::ProbeGuest;
use vmft_log::checkpoint::{CheckpointWriter, MemoryBase, PageEncoder};
use vmft_log::entry::{LogPosition, OutputSequence, StateDigest};
use vmft_log::point::CodeAddress;
use vmft_vmm::board::{BoardConfig, Bytes as Size, UnixSeconds};
use vmft_vmm::engine::EngineKind;
use vmft_vmm::inputs::{Boundary, DeviceRequest, InputError, Inputs, Step};
use vmft_vmm::machine::{BootSource, Delta, MachineConfig, RunEnd};
use vmft_vmm::outputs::{OutputGate, OutputKind};

/// Runs a machine to a point, or to where it waits.
struct To(ExecutionPoint);

impl Inputs for To {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        let there = boundary.is_idle() || boundary.point >= self.0;
        Ok(if there { Step::Pause } else { Step::RunTo(self.0) })
    }

    fn request(&mut self, _: DeviceRequest) -> Result<(), InputError> {
        Ok(())
    }

    fn stood_still(&mut self, _: Duration) {}

    fn digest(&mut self, _: ExecutionPoint, _: StateDigest) -> Result<(), InputError> {
        Ok(())
    }

    fn branch_before(&self, _: ExecutionPoint) -> Option<CodeAddress> {
        None
    }

    fn is_base(&self) -> bool {
        true
    }

    fn checkpoint(&mut self, _: Option<Delta>) -> Result<(), InputError> {
        Ok(())
    }

    fn watches_exits(&self) -> bool {
        false
    }

    fn exits(&mut self, _: ExecutionPoint, _: &[ExitRecord]) -> Result<(), InputError> {
        Ok(())
    }
}

struct Nowhere;

impl OutputGate for Nowhere {
    fn emit(&self, _: Output) {}
}

fn machine() -> Machine {
    let config = MachineConfig {
        board: BoardConfig {
            memory: Size(MIN_MEMORY),
            clock_base: UnixSeconds(1_700_000_000),
            disks: vec![],
            entropy: true,
            net: None,
            cpus: CpuCount::ONE,
        },
        engine: EngineKind::Soft,
    };
    let kernel = ProbeGuest::busy().image().into();
    Machine::new(config, BootSource { kernel, ..BootSource::default() }).expect("a probe guest")
}

fn run(machine: &mut Machine, instructions: u64) {
    let to = machine.point().after(instructions);
    let end = machine.run(&mut To(to), &Nowhere).expect("the probe guest runs");
    assert_eq!(end, RunEnd::Paused);
}

/// Another machine's memory, as a join would have brought it.
fn copy(machine: &mut Machine) -> EpochFollower {
    let ram = GuestRam::new(MIN_MEMORY).expect("memory");
    for page in machine.nonzero_pages() {
        let mut bytes = [0; PAGE_SIZE as usize];
        let address = page.address();
        machine.ram().memory().read_slice(&mut bytes, address).expect("memory");
        ram.memory().write_slice(&bytes, address).expect("memory");
    }
    let checkpoint = CompleteCheckpoint {
        position: LogPosition::start_of_log(machine.point()),
        fixed: machine.boot_source().encode(),
        state: machine.state().encode(),
        pages: 0,
    };
    let (state, source) = machine.state().into_parts();
    let machine = Machine::restore_at_once(state.with_source(source), ram).expect("its own state");
    EpochFollower::new(machine, &checkpoint).expect("the machine's own state")
}

type Pieces = VecDeque<(PieceKind, Vec<u8>)>;

fn output(sequence: u64) -> Output {
    let kind = OutputKind::Console { offset: sequence, bytes: vec![b'x'] };
    Output { sequence: OutputSequence(sequence), kind }
}

/// The epoch that ends here.
fn epoch(machine: &mut Machine, view: &WriteView, number: u64) -> Pieces {
    let content = EpochContent { machine: machine.state().encode(), outputs: vec![output(number)] };
    epoch_with(machine, view, number, &content)
}

/// The same with this content.
fn epoch_with(
    machine: &mut Machine,
    view: &WriteView,
    number: u64,
    content: &EpochContent,
) -> Pieces {
    epoch_in_rounds(machine, view, number, 0, |_| content.clone())
}

/// An epoch of which so many rounds were sent while the guest ran; its content is that of its end.
fn epoch_in_rounds(
    machine: &mut Machine,
    view: &WriteView,
    number: u64,
    rounds: u32,
    content: impl FnOnce(&mut Machine) -> EpochContent,
) -> Pieces {
    let limit = crate::checkpoint::page_limit(machine.ram());
    let encoder = PageEncoder::for_earlier(1000);
    let (mut writer, first) =
        CheckpointWriter::begin(MemoryBase::Earlier, limit, &[], encoder).expect("no fixed part");
    let mut pieces = first;
    for round in 0..=rounds {
        let written = machine_pages(machine, view);
        if round < rounds {
            // What is sent of these is what they are by then.
            run(machine, 500);
        }
        let mut pages = RamPages::some(machine.ram(), written);
        while let Some(piece) = writer.next_pages(&mut pages, true) {
            pieces.push(piece);
        }
    }
    let content = content(machine);
    let position = EpochNumber(number).position(machine.point());
    let (last, _) = writer.finish(position, &content.encode()).expect("a small state");
    pieces.extend(last);
    pieces.iter().map(|piece| (piece.kind(), piece.encode(Vec::new()))).collect()
}

fn machine_pages(machine: &mut Machine, view: &WriteView) -> Vec<vmft_cpu::memory::PageNumber> {
    let pages = machine.take_written(view);
    assert!(!pages.is_empty(), "the probe guest writes");
    pages
}

fn feed(follower: &mut EpochFollower, pieces: &Pieces, count: usize) -> Vec<Output> {
    let mut outputs = Vec::new();
    for (kind, bytes) in pieces.iter().take(count) {
        let came = follower.handle_piece(*kind, bytes).expect("a piece of an epoch");
        outputs.extend(came.into_iter().flatten());
    }
    outputs
}

/// State, and memory, to be compared.
fn summary(machine: &mut Machine) -> (Vec<u8>, Vec<(u64, Vec<u8>)>) {
    let ram = machine.ram().clone();
    let pages = machine.nonzero_pages().into_iter().map(|page| {
        let mut bytes = vec![0; PAGE_SIZE as usize];
        ram.memory().read_slice(&mut bytes, page.address()).expect("memory");
        (page.0, bytes)
    });
    let pages = pages.collect();
    (machine.state().encode(), pages)
}

#[test]
fn an_epoch_counts_whole_or_not_at_all_wherever_it_is_cut() {
    let mut machine = machine();
    run(&mut machine, 1_000);
    let view = machine.watch_writes();
    let mut copies: Vec<EpochFollower> = Vec::new();
    for _ in 0..16 {
        copies.push(copy(&mut machine));
    }
    let before = summary(&mut machine);
    run(&mut machine, 3_000);
    let after = summary(&mut machine);
    assert!(before != after, "the guest has done something");
    let pieces = epoch(&mut machine, &view, 1);
    assert!((4..copies.len()).contains(&pieces.len()), "{} pieces", pieces.len());
    for (count, mut follower) in (0..=pieces.len()).zip(copies) {
        let outputs = feed(&mut follower, &pieces, count);
        let mut taken_over = follower.into_machine().expect("a machine's state");
        let found = summary(&mut taken_over);
        if count < pieces.len() {
            assert!(outputs.is_empty() && found == before, "{count} pieces have changed something");
        } else {
            assert_eq!(outputs, [output(1)]);
            assert!(found == after, "the whole epoch is not what the machine was");
        }
    }
}

#[test]
fn an_epoch_sent_in_rounds_while_its_guest_runs_is_the_machine_at_its_end() {
    let mut machine = machine();
    run(&mut machine, 1_000);
    let view = machine.watch_writes();
    let mut follower = copy(&mut machine);
    for number in 1..=3 {
        run(&mut machine, 2_000);
        let content = |machine: &mut Machine| EpochContent {
            machine: machine.state().encode(),
            outputs: vec![output(number)],
        };
        let pieces = epoch_in_rounds(&mut machine, &view, number, 3, content);
        assert_eq!(feed(&mut follower, &pieces, pieces.len()), [output(number)]);
    }
    let mut taken_over = follower.into_machine().expect("a machine's state");
    assert!(summary(&mut taken_over) == summary(&mut machine), "the copy is another machine");
}

#[test]
fn an_epoch_that_is_missing_or_damaged_is_refused_and_changes_nothing() {
    let mut machine = machine();
    run(&mut machine, 1_000);
    let view = machine.watch_writes();
    let (mut gap, mut damaged) = (copy(&mut machine), copy(&mut machine));
    run(&mut machine, 2_000);
    let first = epoch(&mut machine, &view, 1);
    let at_first = summary(&mut machine);
    feed(&mut gap, &first, first.len());
    feed(&mut damaged, &first, first.len());
    run(&mut machine, 2_000);
    let mut third = epoch(&mut machine, &view, 3);
    feed(&mut gap, &third, third.len() - 1);
    let (kind, bytes) = third.back().expect("an end");
    let error = gap.handle_piece(*kind, bytes).expect_err("one is missing");
    assert_eq!(error.to_string(), "epoch 3 came after 1");
    // A bit of the state, which the digest covers.
    let last = third.len() - 2;
    third[last].1[9] ^= 1;
    feed(&mut damaged, &third, third.len() - 1);
    let (kind, bytes) = third.back().expect("an end");
    let error = damaged.handle_piece(*kind, bytes).expect_err("a bit is wrong");
    assert!(matches!(error, EpochError::Checkpoint(CheckpointError::Digest { .. })), "{error}");
    for follower in [gap, damaged] {
        let mut taken_over = follower.into_machine().expect("a machine's state");
        assert!(summary(&mut taken_over) == at_first, "a refused epoch has changed something");
    }
}

#[path = "follower_fuzz.rs"]
mod fuzz;
