//! Where a machine is between two instructions, as its inputs are told.

use super::Machine;
use crate::inputs::{Boundary, Room};
use vmft_log::point::VirtualTime;

impl Machine {
    pub(super) fn time(&self) -> VirtualTime {
        self.clock.time_at(self.engine.point())
    }

    /// True if the guest waits and nothing is there to wake it.
    pub(super) fn is_idle(&self) -> bool {
        self.awaits_boot || self.engine.is_halted() && !self.board.interrupt_pending()
    }

    /// True if the guest has switched itself off, or waits for what cannot come. A kernel that
    /// knows no way to switch off does that: it halts for good with interrupts off; or, told to go
    /// off all the same, it masks every line of the interrupt controllers and goes on until it
    /// waits.
    pub(super) fn is_off(&self) -> bool {
        let deaf = self.engine.is_halted() && self.board.is_masked();
        !self.awaits_boot && (self.board.is_off() || self.engine.is_off() || deaf)
    }

    pub(super) fn boundary(&mut self) -> Boundary {
        let (nearest, branch) = match self.engine.branch_points() {
            Some(branches) if self.at_point => (None, branches.branch_before()),
            Some(branches) => (branches.nearest_point(), None),
            None => (None, None),
        };
        Boundary {
            point: self.engine.point(),
            is_point: self.at_point,
            nearest,
            branch,
            time: self.time(),
            clock: self.clock,
            idle: self.is_idle(),
            awaits_boot: self.awaits_boot,
            resets: self.history.resets(),
            interrupt_pending: self.board.interrupt_pending(),
            next_timer: self.board.next_timer(),
            outputs: self.outputs,
            room: Room {
                console: self.board.console_input_room(),
                packets: self.board.network_has_room(),
            },
        }
    }
}
