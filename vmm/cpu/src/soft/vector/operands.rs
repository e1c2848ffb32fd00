//! Operand access shared by every instruction: registers, memory operands of the right width,
//! alignment, and the availability checks on CR0 and CR4.

use super::VectorContext;
use crate::soft::exception::Exception;
use iced_x86::{Instruction, OpKind, Register};

/// CR0.MP.
pub(super) const CR0_MP: u64 = 1 << 1;
/// CR0.EM.
pub(super) const CR0_EM: u64 = 1 << 2;
/// CR0.TS.
pub(super) const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
/// CR4.OSXMMEXCPT.
pub(super) const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// RFLAGS.CF.
pub(super) const CARRY: u64 = 1;
/// RFLAGS.PF.
pub(super) const PARITY: u64 = 1 << 2;
/// RFLAGS.ZF.
pub(super) const ZERO: u64 = 1 << 6;
/// RFLAGS.SF.
pub(super) const SIGN: u64 = 1 << 7;
/// RFLAGS.OF.
pub(super) const OVERFLOW: u64 = 1 << 11;

/// `#UD` or `#NM` if SSE instructions are not available (SDM volume 3, table 2-1 of chapter 13).
#[inline]
pub(super) fn require_sse<C: VectorContext>(cpu: &C) -> Result<(), Exception> {
    let cr0 = cpu.cr0();
    if cr0 & CR0_EM != 0 || cpu.cr4() & CR4_OSFXSR == 0 {
        return Err(Exception::InvalidOpcode);
    }
    if cr0 & CR0_TS != 0 {
        return Err(Exception::DeviceNotAvailable);
    }
    Ok(())
}

/// The number of an XMM register.
#[inline]
pub(super) fn xmm_number(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::XMM0 as usize) & 15
}

/// The value of XMM register operand 0.
#[inline]
pub(super) fn destination<C: VectorContext>(cpu: &mut C, instruction: &Instruction) -> u128 {
    cpu.sse().registers[xmm_number(instruction.op0_register())]
}

/// Writes XMM register operand 0.
#[inline]
pub(super) fn set_destination<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    value: u128,
) {
    cpu.sse().registers[xmm_number(instruction.op0_register())] = value;
}

/// The value of XMM register operand 1.
#[inline]
pub(super) fn source_register<C: VectorContext>(cpu: &mut C, instruction: &Instruction) -> u128 {
    cpu.sse().registers[xmm_number(instruction.op1_register())]
}

/// Whether operand 0 is a register.
#[inline]
pub(super) fn to_register(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::Register
}

/// Whether operand 1 is a register.
#[inline]
pub(super) fn from_register(instruction: &Instruction) -> bool {
    instruction.op1_kind() == OpKind::Register
}

/// The address of the memory operand, which must be a multiple of 16.
#[inline]
pub(super) fn aligned_address<C: VectorContext>(
    cpu: &C,
    instruction: &Instruction,
) -> Result<u64, Exception> {
    let address = cpu.effective_address(instruction);
    if address & 15 != 0 {
        return Err(Exception::GeneralProtection(0));
    }
    Ok(address)
}

/// Operand 1 of 128 bits: a register, or memory aligned to 16 bytes.
#[inline]
pub(super) fn source<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<u128, Exception> {
    if from_register(instruction) {
        return Ok(source_register(cpu, instruction));
    }
    let address = aligned_address(cpu, instruction)?;
    load_16(cpu, address)
}

/// Operand 1 of 128 bits: a register, or memory of any alignment.
#[inline]
pub(super) fn source_unaligned<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<u128, Exception> {
    if from_register(instruction) {
        return Ok(source_register(cpu, instruction));
    }
    let address = cpu.effective_address(instruction);
    load_16(cpu, address)
}

/// Operand 1: a whole XMM register, or `BYTES` bytes of memory, zero-extended.
#[inline]
pub(super) fn source_part<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<u128, Exception> {
    if from_register(instruction) {
        return Ok(source_register(cpu, instruction));
    }
    Ok(u128::from(memory::<BYTES, C>(cpu, instruction)?))
}

/// Operand 1: a general register, or `BYTES` bytes of memory, zero-extended.
#[inline]
pub(super) fn source_general<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<u64, Exception> {
    if from_register(instruction) {
        return Ok(cpu.general(instruction.op1_register()));
    }
    memory::<BYTES, C>(cpu, instruction)
}

/// The memory operand of at most 8 bytes, zero-extended.
#[inline]
pub(super) fn memory<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<u64, Exception> {
    let address = cpu.effective_address(instruction);
    let mut bytes = [0; 8];
    cpu.load(address, &mut bytes[..BYTES])?;
    Ok(u64::from_le_bytes(bytes))
}

/// Sixteen bytes at `address`.
#[inline]
pub(super) fn load_16<C: VectorContext>(cpu: &mut C, address: u64) -> Result<u128, Exception> {
    let mut bytes = [0; 16];
    cpu.load(address, &mut bytes)?;
    Ok(u128::from_le_bytes(bytes))
}

/// Stores the low `BYTES` bytes of `value` in the memory operand.
#[inline]
pub(super) fn set_memory<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    value: u128,
) -> Result<(), Exception> {
    let address = cpu.effective_address(instruction);
    cpu.store(address, &value.to_le_bytes()[..BYTES])
}

/// Writes the low `BYTES` bytes of `value` to operand 0, a general register (zero-extended) or memory.
#[inline]
pub(super) fn set_general_or_memory<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    value: u64,
) -> Result<(), Exception> {
    if to_register(instruction) {
        cpu.set_general(instruction.op0_register(), value);
        return Ok(());
    }
    set_memory::<BYTES, C>(cpu, instruction, u128::from(value))
}

/// `destination = f(destination, source)`, all of 128 bits, memory aligned.
#[inline]
pub(super) fn packed<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u128, u128) -> u128,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let source = source(cpu, instruction)?;
    let register = &mut cpu.sse().registers[xmm_number(instruction.op0_register())];
    *register = f(*register, source);
    Ok(())
}

/// `destination = f(destination, source, imm8)`, all of 128 bits, memory aligned.
#[inline]
pub(super) fn packed_immediate<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u128, u128, u8) -> u128,
) -> Result<(), Exception> {
    let immediate = instruction.immediate8();
    packed(cpu, instruction, |a, b| f(a, b, immediate))
}

/// `destination = f(destination, source)` with a source of `BYTES` bytes when it is memory.
#[inline]
pub(super) fn packed_part<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u128, u128) -> u128,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let source = source_part::<BYTES, C>(cpu, instruction)?;
    let register = &mut cpu.sse().registers[xmm_number(instruction.op0_register())];
    *register = f(*register, source);
    Ok(())
}

/// A shift of register operand 0 by an immediate.
#[inline]
pub(super) fn shift_immediate<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u128, u64) -> u128,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let count = u64::from(instruction.immediate8());
    let register = &mut cpu.sse().registers[xmm_number(instruction.op0_register())];
    *register = f(*register, count);
    Ok(())
}

/// A shift of register operand 0 by the low 64 bits of the aligned 128-bit source.
#[inline]
pub(super) fn shift<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u128, u64) -> u128,
) -> Result<(), Exception> {
    packed(cpu, instruction, |value, count| f(value, count as u64))
}

/// A general register result computed from XMM register operand 1.
#[inline]
pub(super) fn to_general<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u128) -> u64,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = f(source_register(cpu, instruction));
    cpu.set_general(instruction.op0_register(), value);
    Ok(())
}
