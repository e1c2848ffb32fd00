//! What a replay says of disks: which requests are made, and which of them are completed.

use super::Mirrors;
use std::collections::BTreeMap;
use std::sync::Arc;
use vmft_cpu::ExitRecord;
use vmft_log::entry::{Arrival, RequestId, StateDigest};
use vmft_log::point::{CodeAddress, ExecutionPoint};
use vmft_threads::Mutex;
use vmft_vmm::board::{DiskOperation, Effect};
use vmft_vmm::devices::virtio::block::DiskStatus;
use vmft_vmm::inputs::{Boundary, DeviceRequest, InputError, Inputs, PointStep, Step};
use vmft_vmm::machine::Delta;

/// The writes and flushes that a replayed guest waits for, of mirrored disks.
#[derive(Debug)]
pub(crate) struct Feed {
    mirrors: Arc<Mirrors>,
    waiting: Mutex<BTreeMap<(u8, RequestId), DiskOperation>>,
}

impl Feed {
    /// For a guest with these requests on their way; `None` on a side without copies.
    pub(crate) fn begin(mirrors: &Arc<Mirrors>, outstanding: Vec<Effect>) -> Option<Arc<Self>> {
        if mirrors.is_empty() {
            return None;
        }
        let feed = Self { mirrors: Arc::clone(mirrors), waiting: Mutex::default() };
        for effect in outstanding {
            if let Effect::Disk { disk, request, operation } = effect {
                feed.asked(disk, request, &operation);
            }
        }
        Some(Arc::new(feed))
    }

    /// The guest asks for this.
    pub(crate) fn asked(&self, disk: u8, request: RequestId, operation: &DiskOperation) {
        let changes = !matches!(operation, DiskOperation::Read { .. });
        if changes && self.mirrors.has(disk) {
            self.waiting.lock().insert((disk, request), operation.clone());
        }
    }

    pub(super) fn completed(&self, arrival: &Arrival) {
        let Arrival::DiskCompletion { disk, request, status, .. } = arrival else { return };
        let Some(operation) = self.waiting.lock().remove(&(*disk, *request)) else { return };
        if DiskStatus::from_byte(*status) == Some(DiskStatus::Ok) {
            self.mirrors.completed(*disk, operation);
        }
    }
}

/// Replayed inputs, by which a side's copies learn what is completed.
#[derive(Debug)]
pub(crate) struct Feeding<I> {
    inputs: I,
    feed: Option<Arc<Feed>>,
}

impl<I> Feeding<I> {
    pub(crate) fn new(inputs: I, feed: Option<Arc<Feed>>) -> Self {
        Self { inputs, feed }
    }

    pub(crate) fn inputs(&mut self) -> &mut I {
        &mut self.inputs
    }
}

impl<I: Inputs> Inputs for Feeding<I> {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        let step = self.inputs.next(boundary)?;
        if let (Some(feed), Step::Here(_, PointStep::Deliver(arrival))) = (&self.feed, &step) {
            feed.completed(arrival);
        }
        Ok(step)
    }

    fn branch_before(&self, point: ExecutionPoint) -> Option<CodeAddress> {
        self.inputs.branch_before(point)
    }

    fn is_base(&self) -> bool {
        self.inputs.is_base()
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), InputError> {
        self.inputs.request(request)
    }

    fn stood_still(&mut self, time: std::time::Duration) {
        self.inputs.stood_still(time);
    }

    fn digest(&mut self, point: ExecutionPoint, digest: StateDigest) -> Result<(), InputError> {
        self.inputs.digest(point, digest)
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
