//! Nondeterminism planted in a replay is caught at the next digest, and reported with the window
//! in which it came.

use crate::guest::WORK_AREA;
use crate::recording::{open, record};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vmft_backup::recorded::RecordedLog;
use vmft_cpu::ExitRecord;
use vmft_cpu::memory::GuestRam;
use vmft_log::entry::{Arrival, Entry, StateDigest};
use vmft_log::point::{CodeAddress, ExecutionPoint};
use vmft_vmm::inputs::{
    Boundary, DeviceRequest, Divergence, InputError, Inputs, LogSource, PointStep, Replaying, Step,
};
use vmft_vmm::machine::{Delta, MachineError};
use vmft_vmm::outputs::KeptOutputs;

/// Something that comes in beside the door.
#[derive(Debug, Clone, Copy)]
enum Plant {
    /// A bit of memory flips.
    FlipBit { address: u64 },
    /// A key is typed that no log has.
    Key,
}

/// Inputs from a log, with a plant at the first boundary from a point on.
struct Planted {
    inputs: Replaying<RecordedLog<std::fs::File>>,
    ram: GuestRam,
    from: ExecutionPoint,
    plant: Option<Plant>,
}

impl Inputs for Planted {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        if boundary.point >= self.from {
            match self.plant.take() {
                None => {}
                Some(Plant::Key) => {
                    let here = boundary.here().expect("`soft` stops at points only");
                    let key = Arrival::ConsoleInput(b"?".to_vec());
                    return Ok(Step::Here(here, PointStep::Deliver(key)));
                }
                Some(Plant::FlipBit { address }) => {
                    let address = GuestAddress(address);
                    let byte: u8 = self.ram.memory().read_obj(address).unwrap();
                    self.ram.memory().write_obj(byte ^ 0x10, address).unwrap();
                }
            }
        }
        self.inputs.next(boundary)
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), InputError> {
        self.inputs.request(request)
    }

    fn stood_still(&mut self, time: Duration) {
        self.inputs.stood_still(time);
    }

    fn digest(&mut self, point: ExecutionPoint, digest: StateDigest) -> Result<(), InputError> {
        self.inputs.digest(point, digest)
    }

    fn branch_before(&self, point: ExecutionPoint) -> Option<CodeAddress> {
        self.inputs.branch_before(point)
    }

    fn is_base(&self) -> bool {
        self.inputs.is_base()
    }

    fn checkpoint(&mut self, delta: Option<Delta>) -> Result<(), InputError> {
        self.inputs.checkpoint(delta)
    }

    fn watches_exits(&self) -> bool {
        self.inputs.watches_exits()
    }

    fn exits(&mut self, point: ExecutionPoint, exits: &[ExitRecord]) -> Result<(), InputError> {
        self.inputs.exits(point, exits)
    }
}

/// The points of the log's digests, after the point at which it begins.
fn digest_points(log: &Path) -> Vec<ExecutionPoint> {
    let (machine, mut log) = open(log);
    let mut points = vec![machine.point()];
    while let Ok(entry) = log.next(machine.point()) {
        if let Entry::Digest { point, .. } = entry {
            points.push(point);
        }
    }
    points
}

fn replay_with(log: &Path, plant: Option<Plant>, from: ExecutionPoint) -> Option<Box<Divergence>> {
    let (mut machine, log) = open(log);
    let kept = Arc::new(KeptOutputs::default());
    let inputs = Replaying::new(log, Arc::clone(&kept), machine.point(), machine.ram().size());
    let mut planted = Planted { inputs, ram: machine.ram().clone(), from, plant };
    match machine.run(&mut planted, &*kept) {
        Ok(_) => None,
        Err(MachineError::Input(InputError::Divergence(divergence))) => Some(divergence),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn planted_nondeterminism_is_caught_and_its_window_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    record(&log);
    let digests = digest_points(&log);
    assert!(digests.len() > 3, "{digests:?}");
    assert_eq!(replay_with(&log, None, ExecutionPoint::START), None, "nothing planted");
    for window in digests.windows(2).take(3) {
        let (before, after) = (window[0], window[1]);
        let middle = before.after(after.since(before) / 2);
        for plant in [Plant::FlipBit { address: WORK_AREA + 0x1238 }, Plant::Key] {
            let found = replay_with(&log, Some(plant), middle);
            let found = found.unwrap_or_else(|| panic!("{plant:?} was not caught"));
            println!("{plant:?} at {middle}: {found}");
            assert_eq!(found.agreed, before, "{plant:?}: {found}");
            assert!(found.point > middle && found.point <= after, "{plant:?}: {found}");
            let window = format!("divergence between points {before} and {}", found.point);
            assert!(found.to_string().starts_with(&window), "{found}");
            if let Plant::FlipBit { .. } = plant {
                assert!(found.to_string().contains("memory is"), "{found}");
                assert_eq!(found.point, after);
            }
        }
    }
}
