//! Near branches, calls and returns.
//!
//! A target that is not canonical faults in the branch, with nothing changed.

use crate::engine::soft::cpu::{Cpu, gpr, is_canonical};
use crate::engine::soft::event::{Event, Flow};
use crate::engine::soft::exception::Exception;
use crate::engine::soft::flags::cut;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

impl Cpu {
    /// Execution goes on at `target`, or `#GP(0)`.
    #[inline(always)]
    pub(in super::super) fn branch(&mut self, target: u64) -> Flow {
        if !is_canonical(target) {
            return Err(self.general_protection(0));
        }
        self.next_rip = target;
        Ok(())
    }

    /// Pushes the address behind the block's last instruction and goes to `target`.
    #[inline(always)]
    pub(in super::super) fn call(&mut self, target: u64) -> Flow {
        if !is_canonical(target) {
            return Err(self.general_protection(0));
        }
        let back = self.next_rip;
        self.push::<u64>(back)?;
        self.next_rip = target;
        Ok(())
    }

    /// Pops the address to go on at, and `extra` bytes.
    #[inline(always)]
    pub(in super::super) fn ret(&mut self, extra: u64) -> Flow {
        let target = self.top::<u64>()?;
        self.branch(target)?;
        self.drop_stack(8 + extra);
        Ok(())
    }
}

fn target(cpu: &mut Cpu, i: &Instruction) -> Result<u64, crate::engine::soft::event::Trap> {
    match i.op0_kind() {
        OpKind::NearBranch64 => Ok(cpu.branch_target(i)),
        _ => cpu.get(i, 0),
    }
}

/// Near `JMP`.
pub(in super::super) fn jmp(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let target = target(cpu, i)?;
    cpu.branch(target)
}

/// `Jcc`.
pub(in super::super) fn jcc(cpu: &mut Cpu, i: &Instruction) -> Flow {
    if cpu.holds(i.condition_code()) {
        let target = cpu.branch_target(i);
        return cpu.branch(target);
    }
    Ok(())
}

/// `LOOP`, `LOOPE`, `LOOPNE`, `JRCXZ`, `JECXZ`.
pub(in super::super) fn count_branch(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let short = matches!(
        i.code(),
        Code::Loop_rel8_64_ECX
            | Code::Loope_rel8_64_ECX
            | Code::Loopne_rel8_64_ECX
            | Code::Jecxz_rel8_64
    );
    let mask = if short { u64::from(u32::MAX) } else { u64::MAX };
    let count = cpu.full(gpr::RCX) & mask;
    let zero = cpu.flags.zero();
    let left = count.wrapping_sub(1) & mask;
    let (taken, counts) = match i.mnemonic() {
        Mnemonic::Loop => (left != 0, true),
        Mnemonic::Loope => (left != 0 && zero, true),
        Mnemonic::Loopne => (left != 0 && !zero, true),
        _ => (count == 0, false),
    };
    if taken {
        let target = cpu.branch_target(i);
        cpu.branch(target)?;
    }
    if counts {
        cpu.set_full(gpr::RCX, left);
    }
    Ok(())
}

/// Near `CALL`.
pub(in super::super) fn call(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let target = target(cpu, i)?;
    cpu.call(target)
}

/// Near `RET`.
pub(in super::super) fn ret(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let extra = if i.op_count() == 1 { cut::<u16>(cpu.get(i, 0)?) } else { 0 };
    cpu.ret(extra)
}

/// `UD0`, `UD1`, `UD2`, and whatever is not an instruction.
pub(in super::super) fn undefined(cpu: &mut Cpu, _: &Instruction) -> Flow {
    Err(cpu.raise(Exception::InvalidOpcode))
}

/// More bytes than an instruction may have.
pub(in super::super) fn too_long(cpu: &mut Cpu, _: &Instruction) -> Flow {
    Err(cpu.general_protection(0))
}

/// `INT3`.
pub(in super::super) fn int3(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.event = Event::Interrupt { vector: 3, privileged: false };
    Err(crate::engine::soft::event::Trap)
}

/// `INT1`.
pub(in super::super) fn int1(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.event = Event::Interrupt { vector: 1, privileged: true };
    Err(crate::engine::soft::event::Trap)
}

/// `INT n`.
pub(in super::super) fn int(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.event = Event::Interrupt { vector: i.immediate8(), privileged: false };
    Err(crate::engine::soft::event::Trap)
}
