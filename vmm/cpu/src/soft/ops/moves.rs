//! Moves, exchanges, conversions, and the flags as data.

use crate::soft::cpu::{Cpu, gpr};
use crate::soft::event::Flow;
use crate::soft::flags::{self, cut, signed};
use crate::soft::operand::{address_mask, by_width, width};
use iced_x86::{ConditionCode, Instruction};

/// `MOV` between general registers, memory and immediates; `MOVZX`.
pub(in super::super) fn mov(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let value = cpu.get(i, 1)?;
    cpu.put(i, 0, value)
}

/// `MOVSX`, `MOVSXD`.
pub(in super::super) fn movsx(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let value = cpu.get(i, 1)?;
    let extended = by_width!(width(i, 1), T => signed::<T>(value));
    cpu.put(i, 0, extended)
}

/// `LEA`.
pub(in super::super) fn lea(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let offset = cpu.offset_of(i);
    cpu.put(i, 0, offset)
}

/// `XCHG`.
pub(in super::super) fn xchg(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let (memory, other) = if i.op1_kind() == iced_x86::OpKind::Memory { (1, 0) } else { (0, 1) };
    let a = cpu.get_for_update(i, memory)?;
    let b = cpu.get(i, other)?;
    cpu.put(i, memory, b)?;
    cpu.put(i, other, a)
}

/// `CMOVcc`: loads its source in any case, and clears the upper half of a 32-bit target.
pub(in super::super) fn cmov(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let source = cpu.get(i, 1)?;
    let value = if cpu.holds(i.condition_code()) { source } else { cpu.get(i, 0)? };
    cpu.put(i, 0, value)
}

/// `SETcc`.
pub(in super::super) fn setcc(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let value = u64::from(cpu.holds(i.condition_code()));
    cpu.put(i, 0, value)
}

/// `CBW`.
pub(in super::super) fn cbw(cpu: &mut Cpu, _: &Instruction) -> Flow {
    let value = cut::<u16>(signed::<u8>(cpu.full(gpr::RAX)));
    cpu.set_reg::<u16>(gpr::RAX, value);
    Ok(())
}

/// `CWDE`.
pub(in super::super) fn cwde(cpu: &mut Cpu, _: &Instruction) -> Flow {
    let value = cut::<u32>(signed::<u16>(cpu.full(gpr::RAX)));
    cpu.set_full(gpr::RAX, value);
    Ok(())
}

/// `CDQE`.
pub(in super::super) fn cdqe(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.set_full(gpr::RAX, signed::<u32>(cpu.full(gpr::RAX)));
    Ok(())
}

/// `CWD`.
pub(in super::super) fn cwd(cpu: &mut Cpu, _: &Instruction) -> Flow {
    let sign = cut::<u16>(((signed::<u16>(cpu.full(gpr::RAX)) as i64) >> 63) as u64);
    cpu.set_reg::<u16>(gpr::RDX, sign);
    Ok(())
}

/// `CDQ`.
pub(in super::super) fn cdq(cpu: &mut Cpu, _: &Instruction) -> Flow {
    let sign = cut::<u32>(((signed::<u32>(cpu.full(gpr::RAX)) as i64) >> 63) as u64);
    cpu.set_full(gpr::RDX, sign);
    Ok(())
}

/// `CQO`.
pub(in super::super) fn cqo(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.set_full(gpr::RDX, ((cpu.full(gpr::RAX) as i64) >> 63) as u64);
    Ok(())
}

/// `LAHF`.
pub(in super::super) fn lahf(cpu: &mut Cpu, _: &Instruction) -> Flow {
    let bits = cut::<u8>(cpu.flags.bits()) | flags::FIXED;
    let rest = cpu.full(gpr::RAX) & !0xFF00;
    cpu.set_full(gpr::RAX, rest | (bits << 8));
    Ok(())
}

/// `SAHF`.
pub(in super::super) fn sahf(cpu: &mut Cpu, _: &Instruction) -> Flow {
    let overflow = cpu.flags.bits() & flags::OF;
    let bits = (cpu.full(gpr::RAX) >> 8) & 0xFF;
    cpu.flags.set(bits | overflow);
    Ok(())
}

/// `CLC`.
pub(in super::super) fn clc(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.flags.set_carry(false);
    Ok(())
}

/// `STC`.
pub(in super::super) fn stc(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.flags.set_carry(true);
    Ok(())
}

/// `CMC`.
pub(in super::super) fn cmc(cpu: &mut Cpu, _: &Instruction) -> Flow {
    let carry = cpu.flags.carry();
    cpu.flags.set_carry(!carry);
    Ok(())
}

/// `CLD`.
pub(in super::super) fn cld(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.system_flags &= !flags::DF;
    Ok(())
}

/// `STD`.
pub(in super::super) fn std(cpu: &mut Cpu, _: &Instruction) -> Flow {
    cpu.system_flags |= flags::DF;
    Ok(())
}

/// `XLATB`.
pub(in super::super) fn xlat(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let offset = cpu.full(gpr::RBX).wrapping_add(cpu.reg::<u8>(gpr::RAX));
    let address = cpu.in_operand_segment(i, offset & address_mask(i), 1);
    let value = cpu.load::<u8>(address)?;
    cpu.set_reg::<u8>(gpr::RAX, value);
    Ok(())
}

/// Instructions that do nothing the guest can see: `NOP`, `PAUSE`, prefetches, fences, cache
/// line flushes of a cache that is always coherent.
pub(in super::super) fn nop(_: &mut Cpu, _: &Instruction) -> Flow {
    Ok(())
}

/// `CLFLUSH`: checks its operand as a one-byte load would.
pub(in super::super) fn clflush(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let address = cpu.address_of(i);
    cpu.load::<u8>(address).map(|_| ())
}

impl Cpu {
    /// Whether a condition holds.
    pub(in super::super) fn holds(&self, condition: ConditionCode) -> bool {
        let flags = &self.flags;
        match condition {
            ConditionCode::None => true,
            ConditionCode::o => flags.holds::<0>(),
            ConditionCode::no => flags.holds::<1>(),
            ConditionCode::b => flags.holds::<2>(),
            ConditionCode::ae => flags.holds::<3>(),
            ConditionCode::e => flags.holds::<4>(),
            ConditionCode::ne => flags.holds::<5>(),
            ConditionCode::be => flags.holds::<6>(),
            ConditionCode::a => flags.holds::<7>(),
            ConditionCode::s => flags.holds::<8>(),
            ConditionCode::ns => flags.holds::<9>(),
            ConditionCode::p => flags.holds::<10>(),
            ConditionCode::np => flags.holds::<11>(),
            ConditionCode::l => flags.holds::<12>(),
            ConditionCode::ge => flags.holds::<13>(),
            ConditionCode::le => flags.holds::<14>(),
            ConditionCode::g => flags.holds::<15>(),
        }
    }
}
