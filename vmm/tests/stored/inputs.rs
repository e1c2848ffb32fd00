//! A world that does anything that a world can do, at random, for a while.

use std::cell::Cell;
use std::time::Duration;
use vmft_cpu::ExitRecord;
use vmft_fuzzing::Random;
use vmft_log::entry::{Arrival, Packet, StateDigest, StopReason};
use vmft_log::point::{ClockRate, CodeAddress, ExecutionPoint, WallTime};
use vmft_vmm::board::DiskOperation;
use vmft_vmm::inputs::{Boundary, DeviceRequest, InputError, Inputs, PointStep, Step};
use vmft_vmm::machine::Delta;
use vmft_vmm::outputs::{Output, OutputGate};

/// The inputs of a machine for so many steps.
pub struct World {
    pub random: Random,
    steps: u32,
    requests: Vec<DeviceRequest>,
    /// Boundaries at which the guest had got no further since the one before.
    standing: u32,
    last: ExecutionPoint,
}

/// The most instructions of one step.
const STRIDE: u64 = 400;
/// A machine that is told to run gets on: it halts, or retires something.
const MOST_STANDING: u32 = 8;

impl World {
    pub fn new(random: Random, steps: u32) -> Self {
        Self { random, steps, requests: Vec::new(), standing: 0, last: ExecutionPoint::NEVER }
    }

    /// What is awaited, or what is not.
    fn arrival(&mut self, boundary: &Boundary) -> Arrival {
        let random = &mut self.random;
        match random.below(6) {
            0 => Arrival::ConsoleInput({
                let count = random.index(boundary.room.console.min(20) + 1);
                random.bytes(count)
            }),
            1 if boundary.room.packets => {
                let count = random.index(200);
                Arrival::Packets(vec![Packet { frame: random.bytes(count), ..Packet::default() }])
            }
            2 => Arrival::WallClock { time: WallTime::from_unix_ns(random.next()) },
            _ => {
                let past = random.below(30_000_000);
                Arrival::ClockSync {
                    time: boundary
                        .next_timer
                        .map_or(boundary.time, |timer| timer.min(boundary.time.after_ns(past))),
                    rate: ClockRate::from_raw(1 + random.below(1 << 28)),
                }
            }
        }
    }
}

impl Inputs for World {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        if self.steps == 0 {
            return Ok(Step::Pause);
        }
        self.steps -= 1;
        let here = boundary.here();
        if let Some((here, request)) = here.and_then(|here| Some((here, self.requests.pop()?))) {
            let arrival = match request {
                DeviceRequest::Entropy { request, len } => {
                    Arrival::Entropy { request, data: vec![7; len as usize] }
                }
                DeviceRequest::DiskRead { disk, request, operation } => {
                    let len = match operation {
                        DiskOperation::Read { len, .. } => len as usize,
                        _ => 0,
                    };
                    Arrival::DiskCompletion { disk, request, status: 0, data: vec![5; len] }
                }
            };
            return Ok(Step::Here(here, PointStep::Deliver(arrival)));
        }
        Ok(match (self.random.below(12), here) {
            (_, Some(here)) if here.idle => {
                Step::Here(here, PointStep::Deliver(self.arrival(boundary)))
            }
            (0, Some(here)) => Step::Here(here, PointStep::Digest),
            (1, Some(here)) => Step::Here(here, PointStep::Flush),
            (2, _) => Step::Checkpoint,
            (3, Some(here)) => Step::Here(here, PointStep::Deliver(self.arrival(boundary))),
            _ => {
                // A guest that starts again and again gets nowhere, and comes to no point.
                let stands = here.is_some() && boundary.point == self.last;
                self.standing = if stands { self.standing + 1 } else { 0 };
                assert!(self.standing < MOST_STANDING, "the guest is told to run and stands still");
                self.last = boundary.point;
                Step::RunTo(boundary.point.after(1 + self.random.below(STRIDE)))
            }
        })
    }

    fn branch_before(&self, _: ExecutionPoint) -> Option<CodeAddress> {
        None
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), InputError> {
        self.requests.push(request);
        Ok(())
    }

    fn stood_still(&mut self, _: Duration) {}

    fn digest(&mut self, _: ExecutionPoint, _: StateDigest) -> Result<(), InputError> {
        Ok(())
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

/// Takes outputs, which must follow each other.
#[derive(Default)]
pub struct Gate {
    last: Cell<u64>,
}

impl OutputGate for Gate {
    fn emit(&self, output: Output) {
        let last = self.last.replace(output.sequence.0);
        assert!(last == 0 || output.sequence.0 == last + 1, "{} after {last}", output.sequence.0);
    }
}

/// How a run that was not ended by the world may end.
pub fn is_over(reason: StopReason) -> bool {
    matches!(reason, StopReason::GuestPowerOff | StopReason::Operator)
}
