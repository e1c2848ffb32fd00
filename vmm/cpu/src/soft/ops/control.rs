//! Near branches, calls and returns.
//!
//! A target that is not canonical faults in the branch, with nothing changed.

use crate::soft::cpu::{Cpu, gpr, is_canonical};
use crate::soft::event::{Event, Flow, Trap};
use crate::soft::exception::Exception;
use crate::soft::flags::{Int, cut};
use crate::soft::operand::width;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

impl Cpu {
    /// Sets the part of RCX that counts.
    pub(in super::super) fn set_counter(&mut self, mask: u64, value: u64) {
        match mask {
            0xFFFF => self.set_reg::<u16>(gpr::RCX, value),
            _ => self.set_full(gpr::RCX, value),
        }
    }

    /// Execution goes on at `target`, or `#GP(0)`.
    #[inline(always)]
    pub(in super::super) fn branch(&mut self, target: u64) -> Flow {
        if !is_canonical(target) {
            return Err(self.general_protection(0));
        }
        self.next_rip = target;
        Ok(())
    }

    /// Pushes the address behind the block's last instruction and goes to `target`, in 64-bit code.
    #[inline(always)]
    pub(in super::super) fn call_long(&mut self, target: u64) -> Flow {
        if !is_canonical(target) {
            return Err(self.general_protection(0));
        }
        let back = self.next_rip;
        self.push_long(back)?;
        self.next_rip = target;
        Ok(())
    }

    /// Pops the address to go on at, and `extra` bytes, in 64-bit code.
    #[inline(always)]
    pub(in super::super) fn ret_long(&mut self, extra: u64) -> Flow {
        let target = self.top_long()?;
        self.branch(target)?;
        self.drop_long(8 + extra);
        Ok(())
    }

    /// Near `CALL` of 32-bit and 16-bit code.
    fn call_near<T: Int>(&mut self, target: u64) -> Flow {
        let target = self.near_target(target, T::BYTES)?;
        self.push::<T>(cut::<T>(self.next_rip))?;
        self.next_rip = target;
        Ok(())
    }

    /// Near `RET` of 32-bit and 16-bit code.
    fn ret_near<T: Int>(&mut self, extra: u64) -> Flow {
        let target = self.top::<T>()?;
        self.branch_near(target, T::BYTES)?;
        self.drop_stack(T::BYTES as u64 + extra);
        Ok(())
    }
}

fn target(cpu: &mut Cpu, i: &Instruction) -> Result<u64, Trap> {
    match i.op0_kind() {
        OpKind::NearBranch64 | OpKind::NearBranch32 | OpKind::NearBranch16 => {
            Ok(cpu.branch_target(i))
        }
        _ => cpu.get(i, 0),
    }
}

/// Bytes of a near branch's target in 32-bit and 16-bit code.
fn target_bytes(i: &Instruction) -> usize {
    match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        _ => width(i, 0),
    }
}

/// Near `JMP`.
pub(in super::super) fn jmp(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let target = target(cpu, i)?;
    cpu.branch_near(target, target_bytes(i))
}

/// `Jcc`.
pub(in super::super) fn jcc(cpu: &mut Cpu, i: &Instruction) -> Flow {
    if cpu.holds(i.condition_code()) {
        let target = cpu.branch_target(i);
        return cpu.branch_near(target, target_bytes(i));
    }
    Ok(())
}

/// The part of RCX that a loop counts in.
fn count_mask(code: Code) -> u64 {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loope_rel8_16_CX
        | Code::Loopne_rel8_16_CX
        | Code::Jcxz_rel8_16
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_32_CX
        | Code::Jcxz_rel8_32 => 0xFFFF,
        Code::Loop_rel8_16_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loopne_rel8_16_ECX
        | Code::Jecxz_rel8_16
        | Code::Loop_rel8_32_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Jecxz_rel8_32
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_64_ECX
        | Code::Jecxz_rel8_64 => u64::from(u32::MAX),
        _ => u64::MAX,
    }
}

/// `LOOP`, `LOOPE`, `LOOPNE`, `JRCXZ`, `JECXZ`, `JCXZ`.
pub(in super::super) fn count_branch(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let mask = count_mask(i.code());
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
        cpu.branch_near(target, target_bytes(i))?;
    }
    if counts {
        cpu.set_counter(mask, left);
    }
    Ok(())
}

/// Near `CALL`.
pub(in super::super) fn call(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let target = target(cpu, i)?;
    if cpu.is_long() {
        return cpu.call_long(target);
    }
    match target_bytes(i) {
        2 => cpu.call_near::<u16>(target),
        _ => cpu.call_near::<u32>(target),
    }
}

/// Near `RET`.
pub(in super::super) fn ret(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let extra = if i.op_count() == 1 { cut::<u16>(cpu.get(i, 0)?) } else { 0 };
    if cpu.is_long() {
        return cpu.ret_long(extra);
    }
    match i.code() {
        Code::Retnw | Code::Retnw_imm16 => cpu.ret_near::<u16>(extra),
        _ => cpu.ret_near::<u32>(extra),
    }
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
    Err(Trap)
}

/// `INT1`.
pub(in super::super) fn int1(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.event = Event::Interrupt { vector: 1, privileged: true };
    Err(Trap)
}

/// `INT n`.
pub(in super::super) fn int(cpu: &mut Cpu, i: &Instruction) -> Flow {
    cpu.event = Event::Interrupt { vector: i.immediate8(), privileged: false };
    Err(Trap)
}
