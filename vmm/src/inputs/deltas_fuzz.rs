//! Checkpoints in the log gone bad: refused, with the machine as it was, or a machine that runs on. What has
//! come takes no more memory than the machine has.

use super::*;
use crate::board::{BoardConfig, Bytes, DiskConfig, UnixSeconds};
use crate::engine::EngineKind;
use crate::inputs::{AtPoint, Boundary, DeviceRequest, InputError, Inputs, PointStep, Step};
use crate::machine::{BootSource, Machine, MachineConfig, MachineError, RunEnd};
use crate::outputs::{KeptOutputs, OutputKind};
use std::time::Duration;
use vmft_cpu::memory::MIN_MEMORY;
use vmft_cpu::{CpuCount, ExitRecord};
use vmft_fuzzing::{Counting, Random, cases, change, damage, peak_of};
use vmft_guest_images::probe::ProbeGuest;
use vmft_log::entry::{OutputSequence, StateDigest, StopReason};
use vmft_log::point::{CodeAddress, ExecutionPoint};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Cases of a quick run.
const CASES: u64 = 500;
/// How many bad checkpoints are made of each good one.
const EACH: usize = 6;

/// Where all of these machines are, on `soft`, which stops at points only.
const HERE: AtPoint = AtPoint { branch: None, idle: false };

/// Does these steps, and keeps the checkpoint it is given.
struct Script {
    steps: VecDeque<Step>,
    taken: Option<Delta>,
}

impl Inputs for Script {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        match self.steps.front() {
            Some(Step::RunTo(to)) if boundary.point < *to && !boundary.is_idle() => {
                Ok(Step::RunTo(*to))
            }
            Some(Step::RunTo(_)) => {
                self.steps.pop_front();
                self.next(boundary)
            }
            _ => Ok(self.steps.pop_front().unwrap_or(Step::Pause)),
        }
    }

    fn branch_before(&self, _: ExecutionPoint) -> Option<CodeAddress> {
        None
    }

    fn request(&mut self, _: DeviceRequest) -> Result<(), InputError> {
        Ok(())
    }

    fn stood_still(&mut self, _: Duration) {}

    fn digest(&mut self, _: ExecutionPoint, _: StateDigest) -> Result<(), InputError> {
        Ok(())
    }

    fn is_base(&self) -> bool {
        true
    }

    fn checkpoint(&mut self, delta: Option<Delta>) -> Result<(), InputError> {
        self.taken = delta;
        Ok(())
    }

    fn watches_exits(&self) -> bool {
        false
    }

    fn exits(&mut self, _: ExecutionPoint, _: &[ExitRecord]) -> Result<(), InputError> {
        Ok(())
    }
}

fn machine() -> Machine {
    let disk = DiskConfig { capacity: Bytes(1 << 20), read_only: false, serial: String::new() };
    let config = MachineConfig {
        board: BoardConfig {
            memory: Bytes(MIN_MEMORY),
            clock_base: UnixSeconds(1_700_000_000),
            disks: vec![disk],
            entropy: true,
            net: None,
            cpus: CpuCount::ONE,
        },
        engine: EngineKind::Soft,
    };
    let kernel = ProbeGuest::busy().image().into();
    let mut machine = Machine::new(config, BootSource { kernel, ..BootSource::default() })
        .expect("the probe guest boots");
    machine.keep_deltas();
    machine
}

fn run(machine: &mut Machine, steps: Vec<Step>) -> Result<Option<Delta>, MachineError> {
    let mut script = Script { steps: steps.into(), taken: None };
    let end = machine.run(&mut script, &KeptOutputs::default())?;
    let over = [RunEnd::Paused, RunEnd::Stopped(StopReason::GuestPowerOff)];
    assert!(over.contains(&end), "{end:?}");
    Ok(script.taken)
}

/// A machine a while after both sides have agreed, and the checkpoint that it names its place by.
fn primary(random: &mut Random) -> Delta {
    let mut machine = machine();
    let to = ExecutionPoint::new(1 + random.below(20_000));
    let steps = vec![Step::Here(HERE, PointStep::Digest), Step::RunTo(to), Step::Checkpoint];
    run(&mut machine, steps).expect("the guest runs").expect("they have agreed")
}

fn output(sequence: u64) -> Output {
    let kind = OutputKind::Console { offset: sequence, bytes: vec![b'x'] };
    Output { sequence: OutputSequence(sequence), kind }
}

/// A checkpoint whose digest is right, and whose content may not be.
fn gone_bad(random: &mut Random, good: &Delta) -> Option<Delta> {
    let mut delta = good.clone();
    if random.chance(60) {
        let mut state = serde_json::to_value(&delta.state).expect("plain values");
        change(random, &mut state);
        delta.state = serde_json::from_value(state).ok()?;
    }
    if random.chance(50) {
        let outputs: Vec<_> = (0..random.below(4)).map(|number| output(number + 1)).collect();
        let mut outputs = serde_json::to_value(outputs).expect("plain values");
        change(random, &mut outputs);
        delta.outputs = serde_json::from_value(outputs).ok();
    }
    if random.chance(20) {
        delta.base.point = ExecutionPoint::new(random.next() >> random.below(64));
    }
    Some(delta)
}

/// Puts the pieces together.
fn assembled(entries: &[Entry], memory: u64) -> Option<Delta> {
    let mut assembly = Assembly::new(memory);
    entries.iter().find_map(|entry| {
        let Entry::CheckpointPart { piece, bytes } = entry else { unreachable!("pieces alone") };
        match assembly.add(*piece, bytes) {
            Ok(whole) => whole,
            Err(error) => {
                assert!(!error.is_empty());
                None
            }
        }
    })
}

#[test]
fn a_checkpoint_in_the_log_gone_bad_is_refused_or_is_a_machine() {
    let (mut whole, mut adopted) = (0u64, 0u64);
    cases(CASES, |mut random| {
        let good = primary(&mut random);
        let mut backup = machine();
        let to = ExecutionPoint::new(1 + random.below(10_000));
        run(&mut backup, vec![Step::Here(HERE, PointStep::Digest), Step::RunTo(to)])
            .expect("the guest runs");
        for _ in 0..EACH {
            let Some(delta) = gone_bad(&mut random, &good) else { continue };
            let mut entries = pack(delta);
            if random.chance(40) {
                let at = random.index(entries.len());
                let Entry::CheckpointPart { bytes, .. } = &mut entries[at] else { continue };
                damage(&mut random, bytes, &[]);
            }
            let size = entries.iter().map(|entry| match entry {
                Entry::CheckpointPart { bytes, .. } => bytes.len(),
                _ => 0,
            });
            let most = (4 << 20) + 64 * size.sum::<usize>();
            let (delta, peak) = peak_of(|| assembled(&entries, MIN_MEMORY));
            assert!(peak <= most, "{peak} bytes, not {most}");
            let Some(delta) = delta else { continue };
            whole += 1;
            let before = backup.state();
            match run(&mut backup, vec![Step::Adopt(Box::new(delta))]) {
                Ok(_) => {
                    adopted += 1;
                    let to = backup.point().after(2_000);
                    match run(
                        &mut backup,
                        vec![Step::RunTo(to), Step::Here(HERE, PointStep::Digest)],
                    ) {
                        Err(MachineError::Broken(report)) => panic!("{report}"),
                        // The guest of other registers may do anything, and this machine is done with.
                        Ok(_) | Err(_) => return,
                    }
                }
                Err(MachineError::Adopt { .. }) => {
                    assert!(backup.state() == before, "a refused checkpoint has changed something");
                }
                Err(error) => panic!("{error}"),
            }
        }
    });
    println!("{whole} whole, {adopted} adopted");
}

#[test]
fn a_checkpoint_of_more_pages_than_the_machine_has_is_refused_before_it_takes_their_memory() {
    let mut delta = primary(&mut Random::new(1));
    let pages = 40;
    let page = |number| (PageNumber(number), Box::new([1; PAGE_SIZE as usize]));
    delta.pages = (0..pages).map(page).collect();
    let entries = pack(delta);
    assert!(assembled(&entries, pages * PAGE_SIZE).is_some());
    assert!(assembled(&entries, (pages - 1) * PAGE_SIZE).is_none());
}

#[test]
fn outputs_that_no_guest_has_put_out_are_refused_and_nothing_has_changed() {
    let disk = crate::board::DiskOperation::Flush;
    let request = vmft_log::entry::RequestId(1);
    let disk = OutputKind::Disk { disk: 200, request, operation: disk };
    let beyond = OutputKind::Console { offset: u64::MAX, bytes: vec![1] };
    for kind in [disk, beyond] {
        let outputs = vec![Output { sequence: OutputSequence(1), kind }];
        let good = primary(&mut Random::new(1));
        assert!(good.state.outputs() > OutputSequence(1), "it has printed");
        let delta = Delta { outputs: Some(outputs), ..good };
        let mut backup = machine();
        let before = backup.state();
        let refused = run(&mut backup, vec![Step::Adopt(Box::new(delta))]).expect_err("impossible");
        assert!(matches!(refused, MachineError::Adopt { .. }), "{refused}");
        assert!(backup.state() == before);
    }
}
