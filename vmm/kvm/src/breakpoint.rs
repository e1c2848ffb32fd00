//! Running to a branch, with a hardware breakpoint on it.
//!
//! KVM takes the guest's debug registers from it meanwhile and gives them back afterwards. No flag of
//! the guest's is changed: the trap flag is not used, and the resume flag is not either, because the
//! breakpoint is left by a step without it. A debug exception that the guest causes itself comes to us
//! as well, and is passed on.

use super::KvmEngine;
use super::branches::{Approach, Ended};
use super::landing::{Ground, Reached};
use super::step::{TRAP_FLAG, is_conditional_branch};
use crate::trust::breakpoint::Trusted as Breakpoints;
use kvm_bindings::kvm_debug_exit_arch;
use vmft_log::point::CodeAddress;

/// DR7: any of the guest's own breakpoints, or its watch over these registers.
const DR7_IN_USE: u64 = 0xFF | (1 << 13);
/// DR6.B0.
const DR6_BREAKPOINT_0: u64 = 1;
/// DR6.BD, BS and BT: the guest's own doing. B0 to B3 may be set beside them without meaning anything.
const DR6_OWN: u64 = 0b111 << 13;

impl KvmEngine {
    /// True if the guest can be stopped in front of the branch at `address`, and there is one.
    fn can_break_at(&mut self, address: CodeAddress) -> bool {
        let trusted = self.counting().breakpoints;
        if trusted == Breakpoints::NOWHERE {
            return false;
        }
        let stopped = self.vcpu.stop();
        let (Ok(regs), Ok(sregs)) = (stopped.regs(), stopped.sregs()) else { return false };
        // It would miss its own. One that steps itself is stepped by `soft`.
        let uses_debugging = stopped
            .debug_registers()
            .map_or(true, |debug| debug.dr7 & DR7_IN_USE != 0 || regs.rflags & TRAP_FLAG != 0);
        if uses_debugging {
            return false;
        }
        let view = self.view(sregs.cr3);
        view.place(address.get()).is_some_and(|place| {
            let is_trusted = if place.user { trusted.user } else { trusted.kernel };
            let bytes = view.instruction_bytes(address.get());
            is_trusted && is_conditional_branch(&bytes, address.get())
        })
    }

    /// A hint led past the point it was for: whatever gives them is not believed again.
    pub(crate) fn hint_misled(&mut self) {
        let breakpoints = &mut self.counting().breakpoints;
        if std::mem::replace(breakpoints, Breakpoints::NOWHERE) != Breakpoints::NOWHERE {
            tracing::warn!("a point does not lie behind the branch that it is said to lie behind");
        }
    }

    fn stands_at(&mut self, address: CodeAddress) -> bool {
        self.vcpu.stop().regs().is_ok_and(|regs| regs.rip == address.get())
    }
}

impl Approach<'_> {
    pub(crate) fn run_to_breakpoint(&mut self, address: CodeAddress) -> Result<Reached, Ended> {
        if let Some(ended) = self.before_moving() {
            return Err(ended);
        }
        if !self.engine.can_break_at(address) {
            return Ok(Reached::Nowhere);
        }
        let reached = match self.engine.counting().counter.needs_steps() {
            true => self.step_to(address)?,
            false => self.run_on_to(address)?,
        };
        self.engine.counting().stats.breakpoint_hits += u64::from(reached == Reached::Branch);
        Ok(reached)
    }

    /// For a counter that must hear of every instruction.
    fn step_to(&mut self, address: CodeAddress) -> Result<Reached, Ended> {
        self.overflowed = false;
        while !self.overflowed {
            if self.engine.stands_at(address) {
                return Ok(Reached::Branch);
            }
            if let Some(ended) = self.step() {
                return Err(ended);
            }
        }
        Ok(Reached::Elsewhere)
    }

    fn run_on_to(&mut self, address: CodeAddress) -> Result<Reached, Ended> {
        let engine = &mut *self.engine;
        engine.end_stepping();
        engine.vcpu.request_window(self.want);
        let mut stopped = engine.vcpu.stop();
        if stopped.set_breakpoint(Some(address)).is_err() {
            engine.counting().breakpoints = Breakpoints::NOWHERE;
            return Ok(Reached::Nowhere);
        }
        // That of a step before.
        stopped.take_trap();
        let ended = self.enter();
        let mut stopped = self.engine.vcpu.stop();
        stopped.set_breakpoint(None).expect("what was set can be taken back");
        let trap = stopped.take_trap();
        match (ended, trap) {
            (Some(ended), _) => Err(ended),
            (None, None) => Ok(Reached::Elsewhere),
            (None, Some(trap)) if is_for(&trap, address) => Ok(Reached::Branch),
            (None, Some(trap)) => {
                stopped.raise_debug_exception(trap.dr6 & DR6_OWN).expect(super::REGISTERS);
                Ok(Reached::Elsewhere)
            }
        }
    }
}

/// True if the guest stands at the breakpoint. A step of its own that led there comes first: the
/// breakpoint is met again behind the handler.
fn is_for(trap: &kvm_debug_exit_arch, address: CodeAddress) -> bool {
    trap.dr6 & (DR6_BREAKPOINT_0 | DR6_OWN) == DR6_BREAKPOINT_0 && trap.pc == address.get()
}

#[cfg(test)]
#[path = "breakpoint_tests.rs"]
mod tests;
