//! Where a machine is between two instructions, as its inputs are told.

use super::Machine;
use crate::inputs::{AtPoint, Boundary, Place, Room};
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
        let (at_point, idle) = (self.at_point, self.is_idle());
        let branches = self.engine.branch_points();
        let place = match at_point {
            true => {
                let branch = branches.and_then(|branches| branches.branch_before());
                Place::Point(AtPoint { branch, idle })
            }
            false => {
                Place::Between { nearest: branches.and_then(|branches| branches.nearest_point()) }
            }
        };
        Boundary {
            point: self.engine.point(),
            place,
            time: self.time(),
            clock: self.clock,
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
