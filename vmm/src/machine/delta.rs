//! A checkpoint in the log: what names a place at which no point is.
//!
//! A machine that is at a place without a name gives it one by its state: pages written since both sides
//! last agreed on all of memory, registers, devices. A replaying side that has come to the point before
//! takes all that over, and is where the primary is.

use super::{Machine, MachineState, StateError};
use crate::board::Board;
use crate::engine::{EngineKind, PointKind};
use crate::memory::{PAGE_SIZE, PageNumber};
use std::collections::VecDeque;
use vm_memory::{Address, Bytes};
use vmft_logging_channel::checkpoint::{self, PAGE_BYTES, Page, PageSource};

/// A machine's state, and what of its memory has changed since the last one, or the last digest: both are
/// places at which the two sides agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    pub(crate) state: MachineState,
    pub(crate) page_limit: checkpoint::PageNumber,
    /// In ascending order.
    pub(crate) pages: VecDeque<(checkpoint::PageNumber, Box<Page>)>,
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

impl Machine {
    /// Both sides agree on all of memory here: what is written from here on is what a delta has.
    pub(super) fn begin_delta(&mut self) {
        if !may_need_delta(self.config.engine) {
            return;
        }
        match self.delta_view.take() {
            Some(view) => {
                self.take_written(&view);
                self.delta_view = Some(view);
            }
            None => self.delta_view = Some(self.watch_writes()),
        }
    }

    /// Gives the place a name by its state: from here on it is a point. `None` if nobody has agreed with
    /// this machine on anything yet.
    pub(super) fn take_delta(&mut self) -> Option<Delta> {
        let view = self.delta_view.take()?;
        self.engine.flush_caches();
        let written = self.take_written(&view);
        self.delta_view = Some(view);
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
        let state = self.state();
        self.at_point = true;
        Some(Delta { state, page_limit, pages })
    }

    /// Becomes the machine that `delta` was taken of.
    ///
    /// # Errors
    /// [`StateError`]; nothing has changed then, unless the host's KVM refuses what it should take.
    pub(super) fn adopt(&mut self, delta: Delta) -> Result<(), StateError> {
        let Delta { state, page_limit: _, pages } = delta;
        if state.config != self.config {
            return Err(StateError::OtherMachine);
        }
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
        let board = Board::restore(&self.config.board, &ram, &state.board)?;
        self.engine.restore(&state.cpu, state.point)?;
        self.engine.restore_group(&state.cpu, state.group.as_ref())?;
        for (number, page) in pages {
            let address = PageNumber(number.0).address();
            ram.memory().write_slice(&page[..], address).expect("looked at above");
        }
        self.board = board;
        self.clock = state.clock;
        self.outputs = state.outputs;
        self.console_offset = state.console_offset;
        self.at_point = true;
        self.begin_delta();
        Ok(())
    }
}
