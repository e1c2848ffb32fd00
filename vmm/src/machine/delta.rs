//! A checkpoint in the log: a place that is named by its state, pages written since both sides last agreed on
//! all of memory, registers, devices.
//!
//! **Where no point is.** A machine that is at a place without a name gives it one. A replaying side that has
//! come to the point before takes all that over, and is where the primary is.
//!
//! **Instead of replaying.** What a replaying side has written since its base is part of what the primary has,
//! as long as it is between the two. So it may take the checkpoint over from any place behind the base: every
//! page in which it differs from the primary is in it. It bounds how far a backup has to replay. What the guest
//! has put out on the way comes along, because nobody produces it here.

use super::{Machine, MachineState, StateError};
use crate::devices::virtio::block::completed::WriteCount;
use crate::engine::EngineKind;
use crate::outputs::{Output, are_a_guests};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vm_memory::{Address, Bytes};
use vmft_cpu::memory::{PAGE_SIZE, PageNumber, WriteView};
use vmft_kvm::PointKind;
use vmft_log::checkpoint::{self, PAGE_BYTES, Page, PageSource};
use vmft_log::point::ExecutionPoint;

/// A machine's state, and what of its memory has changed since the last one, or the last digest: both are
/// places at which the two sides agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    pub(crate) state: MachineState,
    pub(crate) page_limit: checkpoint::PageNumber,
    /// In ascending order.
    pub(crate) pages: VecDeque<(checkpoint::PageNumber, Box<Page>)>,
    /// From where on it may be taken over.
    pub(crate) base: DeltaBase,
    /// Where it may be taken over from elsewhere than its own place: what the guest has put out since the
    /// base, but for disk requests, and packets known to be out.
    pub(crate) outputs: Option<Vec<Output>>,
    /// What is not in it of memory is zero: there is no base, and it is for its own place alone.
    pub(crate) is_whole: bool,
}

/// Where both sides agreed on all of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeltaBase {
    /// The point.
    pub(crate) point: ExecutionPoint,
    /// It is a checkpoint of the log. At any other base there may be more at the same point, so only what
    /// lies behind it has passed it.
    pub(crate) is_checkpoint: bool,
}

impl DeltaBase {
    /// True if a side at `point`, whose last checkpoint of the log was at `last`, has passed the base.
    pub(crate) fn is_passed(self, point: ExecutionPoint, last: Option<ExecutionPoint>) -> bool {
        point > self.point || self.is_checkpoint && last.is_some_and(|last| last >= self.point)
    }
}

impl PageSource for Delta {
    fn next_page(&mut self, page: &mut Page) -> Option<checkpoint::PageNumber> {
        let (number, data) = self.pages.pop_front()?;
        *page = *data;
        Some(number)
    }
}

/// True if a machine on this engine may need one: its engine comes back at exits only, which may be long in
/// coming.
pub(super) const fn may_need_delta(engine: EngineKind) -> bool {
    matches!(engine, EngineKind::Kvm { points: PointKind::Exit })
}

/// What has been written since a base.
#[derive(Debug)]
pub(super) struct SinceBase {
    view: WriteView,
    base: DeltaBase,
    /// The writes that the disks had completed there: whoever has passed it has them.
    writes: Vec<WriteCount>,
}

impl Machine {
    /// From now on checkpoints can be taken for the log wherever both sides agree, whether or not the engine
    /// needs them.
    pub fn keep_deltas(&mut self) {
        self.keeps_deltas = true;
    }

    /// Both sides agree on all of memory here: what is written from here on is what a delta has.
    pub(super) fn begin_delta(&mut self) {
        self.begin_delta_at(false);
    }

    pub(super) fn begin_delta_at(&mut self, is_checkpoint: bool) {
        if !self.keeps_deltas && !may_need_delta(self.config.engine) {
            return;
        }
        let base = DeltaBase { point: self.engine.point(), is_checkpoint };
        let view = match self.since_base.take() {
            Some(SinceBase { view, .. }) => {
                self.take_written(&view);
                view
            }
            None => self.watch_writes(),
        };
        let writes = self.board.write_counts();
        self.since_base = Some(SinceBase { view, base, writes });
    }

    /// Gives the place a name by its state: from here on it is a point. `None` if nobody has agreed with
    /// this machine on anything yet.
    pub(super) fn take_delta(&mut self) -> Option<Delta> {
        let SinceBase { view, base, writes: known } = self.since_base.take()?;
        self.engine.flush_caches();
        let written = self.take_written(&view);
        let here = DeltaBase { point: self.engine.point(), is_checkpoint: true };
        let writes = self.board.write_counts();
        self.since_base = Some(SinceBase { view, base: here, writes });
        Some(self.copy_delta(written, base, &known))
    }

    /// The state here, and a copy of these pages. The place is a point from here on.
    pub(super) fn copy_delta(
        &mut self,
        written: Vec<PageNumber>,
        base: DeltaBase,
        known: &[WriteCount],
    ) -> Delta {
        let ram = self.engine.ram();
        let copy = |number: PageNumber| {
            let mut page = Box::new([0; PAGE_BYTES]);
            ram.memory()
                .read_slice(&mut page[..], number.address())
                .expect("written pages are memory");
            (checkpoint::PageNumber(number.0), page)
        };
        let pages = written.into_iter().map(copy).collect();
        let end = ram.ranges().last().map_or(0, |(start, len)| start.raw_value() + len);
        let page_limit = checkpoint::PageNumber(end / PAGE_SIZE);
        let state = self.state_after(known);
        self.at_point = true;
        Delta { state, page_limit, pages, base, outputs: None, is_whole: false }
    }

    /// Becomes the machine that `delta` was taken of. The outputs it makes by that come back.
    ///
    /// # Errors
    /// [`StateError`]; nothing has changed then, unless the host's KVM refuses what it should take.
    pub(super) fn adopt(&mut self, delta: Delta) -> Result<Vec<Output>, StateError> {
        let Delta { state, page_limit: _, pages, base: _, outputs, is_whole } = delta;
        let mut outputs = outputs.unwrap_or_default();
        let is_ahead = state.point >= self.engine.point() && state.outputs >= self.outputs;
        if state.config != self.config || !is_ahead {
            return Err(StateError::OtherMachine);
        }
        if !are_a_guests(&outputs, state.outputs) {
            return Err(StateError::OtherMachine);
        }
        outputs.retain(|output| output.sequence > self.outputs);
        let ram = self.engine.ram().clone();
        let inside = |number: &checkpoint::PageNumber| {
            number.0.checked_mul(PAGE_SIZE).is_some_and(|address| {
                let holds = |(start, len): (vm_memory::GuestAddress, u64)| {
                    address >= start.raw_value() && address - start.raw_value() < len
                };
                ram.ranges().into_iter().any(holds)
            })
        };
        if !pages.iter().all(|(number, _)| inside(number)) {
            return Err(StateError::OtherMachine);
        }
        let state = state.with_earlier_writes(&self.board.completed_writes(&[]))?;
        self.become_state(&state)?;
        if is_whole {
            ram.clear();
        }
        for (number, page) in pages {
            let address = PageNumber(number.0).address();
            ram.memory().write_slice(&page[..], address).expect("looked at above");
        }
        self.begin_delta_at(true);
        Ok(outputs)
    }
}
