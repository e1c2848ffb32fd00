//! Records of the exits, for whoever compares them.

use super::KvmEngine;
use super::vcpu::Outcome;
use kvm_bindings::kvm_regs;
use vmft_cpu::{Access, ExitReason, ExitRecord};
use vmft_log::point::Branches;

/// The general registers in hardware order, RIP and RFLAGS.
pub(crate) fn in_order(regs: &kvm_regs) -> [u64; 18] {
    let r = regs;
    [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15, r.rip, r.rflags,
    ]
}

impl KvmEngine {
    /// Keeps a record of an exit that is a point. `registers` are those with which the guest left; none
    /// if no records are wanted.
    pub(crate) fn note_exit(
        &mut self,
        outcome: Outcome,
        access: Access,
        registers: Option<[u64; 18]>,
        branches: Branches,
    ) {
        let Some(registers) = registers else { return };
        let reason = match outcome {
            Outcome::Access => access.reason,
            Outcome::Register { faulted: false } => Some(ExitReason::Register),
            Outcome::Halted => Some(ExitReason::Halt),
            _ => None,
        };
        if let Some(reason) = reason {
            self.exits.push(ExitRecord { branches, ..ExitRecord::new(reason, access, registers) });
        }
    }
}
