//! The run loop for points that are exits.
//!
//! With [`PointKind::Exit`] an interrupt is taken only at a point: at the exit itself, or from
//! `HLT`. KVM would say when one can be taken between two exits, but not always at the same
//! instruction: where it emulates the guest, it looks only every so often. An interrupt that cannot
//! be taken at a point waits for the next.

use super::vcpu::{ExitContext, Outcome};
use super::{Halted, KvmEngine, PointKind};
use vmft_cpu::{Bus, Exit, WatchedBus};
use vmft_log::point::{Branches, ExecutionPoint};

/// RFLAGS.IF.
pub(crate) const INTERRUPT_FLAG: u64 = 1 << 9;
/// Of a model-specific register that the guest may not access.
pub(crate) const FAULT_IS_DELIVERED: &str = "a general protection fault can always be delivered";

impl KvmEngine {
    pub(crate) fn run_exits(
        &mut self,
        bound: ExecutionPoint,
        want: bool,
        bus: &mut dyn Bus,
    ) -> Exit {
        let _running = self.vcpu.kicks.enter();
        let mut kicked = false;
        loop {
            let want_here = want && !self.between;
            if let Some(exit) = self.at_boundary(bound, want_here) {
                return exit;
            }
            kicked |= self.vcpu.kicks.take();
            if kicked {
                match self.settle() {
                    Ok(true) => return self.kicked(),
                    Ok(false) => {}
                    Err(ended) => return ended,
                }
            }
            self.vcpu.request_window(false);
            self.between = true;
            let mut watched = WatchedBus::new(&mut *bus);
            let mut around = ExitContext {
                at: self.point,
                bus: &mut watched,
                registers: &mut self.registers,
                ram: self.vm.ram(),
            };
            let entered = self.vcpu.enter();
            let registers = self.exits.is_wanted().then(|| entered.registers());
            let outcome = entered.serve(&mut around);
            let access = watched.access();
            self.note_exit(outcome, access, registers, Branches(0));
            if outcome != Outcome::Interrupted {
                self.queued = false;
            }
            match outcome {
                Outcome::Access => {
                    self.reach_point();
                    return Exit::BusAccess;
                }
                Outcome::Register { faulted: false } => self.reach_point(),
                // As in `soft`, an instruction that faults is no point.
                Outcome::Register { faulted: true } => match self.settle() {
                    Ok(settled) => debug_assert!(settled, "{FAULT_IS_DELIVERED}"),
                    Err(ended) => return ended,
                },
                Outcome::Halted => {
                    self.reach_point();
                    let interruptible = self.vcpu.interrupt_flag();
                    self.halted = Halted::Waiting { interruptible };
                }
                Outcome::Shutdown => self.shut_down = true,
                Outcome::Failed(what) => return self.fatal(what),
                Outcome::Interrupted | Outcome::Window | Outcome::Stepped => {}
            }
        }
    }

    fn reach_point(&mut self) {
        self.point = self.point.after(1);
        self.between = false;
    }

    /// What ends the run at this boundary, if anything does. The bound comes before the interrupt:
    /// what arrives at a point comes before the interrupt taken there, on both sides.
    pub(crate) fn at_boundary(&mut self, bound: ExecutionPoint, want: bool) -> Option<Exit> {
        if self.shut_down {
            return Some(Exit::Shutdown);
        }
        if let Halted::Waiting { interruptible } = self.halted {
            return Some(Exit::Halted { interruptible });
        }
        if self.point >= bound {
            match if self.queued { self.settle() } else { Ok(true) } {
                Ok(true) => return Some(Exit::Bound),
                Ok(false) => {}
                Err(ended) => return Some(ended),
            }
        }
        (want && !self.queued && self.can_take_interrupt()).then_some(Exit::InterruptWindow)
    }

    /// True if an interrupt can be taken at this boundary.
    pub(crate) fn can_take_interrupt(&mut self) -> bool {
        if self.shut_down {
            return false;
        }
        match self.points {
            PointKind::Exit | PointKind::Free => self.vcpu.can_take_interrupt(),
            PointKind::Pmu if !self.keeps_shadow() => self.vcpu.can_take_interrupt(),
            PointKind::Step | PointKind::Pmu => !self.shadow && self.vcpu.interrupt_flag(),
        }
    }

    /// Whoever looks at the guest here must be able to make something of what he finds.
    fn kicked(&mut self) -> Exit {
        self.check_model().map_or_else(|ended| ended, |()| Exit::Kicked)
    }
}
