//! SSE data movement: loads, stores, half registers, non-temporal and masked stores.

use super::VectorContext;
use super::lanes::Lanes;
use super::operands::{
    aligned_address, destination, from_register, memory, require_sse, set_destination, set_memory,
    source, source_general, source_part, source_register, source_unaligned, to_register,
    xmm_number,
};
use crate::soft::exception::Exception;
use iced_x86::Instruction;

/// `MOVAPS`, `MOVDQA`, `MOVNTDQA`: load, or copy between registers.
#[inline]
pub(super) fn load_aligned<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source(cpu, instruction)?;
    set_destination(cpu, instruction, value);
    Ok(())
}

/// `MOVUPS`, `MOVDQU`, `LDDQU`: load, or copy between registers.
#[inline]
pub(super) fn load_unaligned<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_unaligned(cpu, instruction)?;
    set_destination(cpu, instruction, value);
    Ok(())
}

/// `MOVAPS`, `MOVDQA`, `MOVNTPS`: store, or copy between registers.
#[inline]
pub(super) fn store_aligned<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_register(cpu, instruction);
    if to_register(instruction) {
        set_destination(cpu, instruction, value);
        return Ok(());
    }
    let address = aligned_address(cpu, instruction)?;
    cpu.store(address, &value.to_le_bytes())
}

/// `MOVUPS`, `MOVDQU`: store, or copy between registers.
#[inline]
pub(super) fn store_unaligned<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_register(cpu, instruction);
    if to_register(instruction) {
        set_destination(cpu, instruction, value);
        return Ok(());
    }
    set_memory::<16, C>(cpu, instruction, value)
}

/// The low `BYTES` bytes of `value`.
#[inline]
const fn low<const BYTES: usize>(value: u128) -> u128 {
    value & (u128::MAX >> (128 - 8 * BYTES))
}

/// `MOVSS`, `MOVSD` load: memory clears the rest of the register, a register leaves it.
#[inline]
pub(super) fn load_scalar<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_part::<BYTES, C>(cpu, instruction)?;
    let value = if from_register(instruction) {
        let old = destination(cpu, instruction);
        old ^ low::<BYTES>(old ^ value)
    } else {
        value
    };
    set_destination(cpu, instruction, value);
    Ok(())
}

/// `MOVSS`, `MOVSD` store: only the low part, also of a register.
#[inline]
pub(super) fn store_scalar<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_register(cpu, instruction);
    if to_register(instruction) {
        let old = destination(cpu, instruction);
        set_destination(cpu, instruction, old ^ low::<BYTES>(old ^ value));
        return Ok(());
    }
    set_memory::<BYTES, C>(cpu, instruction, value)
}

/// `MOVQ` load: the upper half is cleared in both forms.
#[inline]
pub(super) fn load_quad<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_part::<8, C>(cpu, instruction)?;
    set_destination(cpu, instruction, low::<8>(value));
    Ok(())
}

/// `MOVQ` store: the upper half of a register is cleared.
#[inline]
pub(super) fn store_quad<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_register(cpu, instruction);
    if to_register(instruction) {
        set_destination(cpu, instruction, low::<8>(value));
        return Ok(());
    }
    set_memory::<8, C>(cpu, instruction, value)
}

/// `MOVD`, `MOVQ` from a general register or memory of `BYTES` bytes.
#[inline]
pub(super) fn from_general<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_general::<BYTES, C>(cpu, instruction)?;
    set_destination(cpu, instruction, low::<BYTES>(u128::from(value)));
    Ok(())
}

/// `PINSRB` and its like: `insert(register, value, immediate)` of `BYTES` bytes.
#[inline]
pub(super) fn insert<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    insert: impl FnOnce(u128, u64, u8) -> u128,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_general::<BYTES, C>(cpu, instruction)?;
    let old = destination(cpu, instruction);
    set_destination(cpu, instruction, insert(old, value, instruction.immediate8()));
    Ok(())
}

/// `INSERTPS`: from a lane of a register that immediate bits 6–7 choose, or from memory.
pub(super) fn insert_single<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let immediate = instruction.immediate8();
    let source = source_part::<4, C>(cpu, instruction)?;
    let lane = if from_register(instruction) { usize::from(immediate >> 6) } else { 0 };
    let old = destination(cpu, instruction);
    set_destination(
        cpu,
        instruction,
        super::shuffle::insert_single(old, source.double(lane), immediate),
    );
    Ok(())
}

/// `PEXTRB` and its like: lane `immediate` of `BYTES` bytes to a general register or memory.
#[inline]
pub(super) fn extract<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let lane = usize::from(instruction.immediate8()) % (16 / BYTES);
    let value = low::<BYTES>(source_register(cpu, instruction) >> (8 * BYTES * lane));
    if to_register(instruction) {
        cpu.set_general(instruction.op0_register(), value as u64);
        return Ok(());
    }
    set_memory::<BYTES, C>(cpu, instruction, value)
}

/// `MOVD`, `MOVQ` to a general register or memory of `BYTES` bytes.
#[inline]
pub(super) fn to_general_or_memory<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = low::<BYTES>(source_register(cpu, instruction));
    if to_register(instruction) {
        cpu.set_general(instruction.op0_register(), value as u64);
        return Ok(());
    }
    set_memory::<BYTES, C>(cpu, instruction, value)
}

/// `MOVLPS`, `MOVLPD` load: into the low half.
pub(super) fn load_low<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = memory::<8, C>(cpu, instruction)?;
    let register = &mut cpu.sse().registers[xmm_number(instruction.op0_register())];
    *register = *register >> 64 << 64 | u128::from(value);
    Ok(())
}

/// `MOVLPS`, `MOVLPD`, `MOVHPS`, `MOVHPD` store of the half that begins at bit `SHIFT`.
pub(super) fn store_half<const SHIFT: u32, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = source_register(cpu, instruction) >> SHIFT;
    set_memory::<8, C>(cpu, instruction, value)
}

/// `MOVNTI`, which is a general-register store and needs no SSE state.
pub(super) fn store_general<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    let value = cpu.general(instruction.op1_register());
    set_memory::<BYTES, C>(cpu, instruction, u128::from(value))
}

/// `MASKMOVDQU`: the bytes whose mask byte is negative.
pub(super) fn store_masked<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let data = cpu.sse().registers[xmm_number(instruction.op1_register())];
    let mask = cpu.sse().registers[xmm_number(instruction.op2_register())];
    let address = cpu.string_destination(instruction);
    store_selected(cpu, address, &data.to_le_bytes(), super::integer::byte_signs(mask))
}

/// Stores the bytes of `data` whose bit in `mask` is set, all or none of them.
pub(super) fn store_selected<C: VectorContext>(
    cpu: &mut C,
    address: u64,
    data: &[u8],
    mask: u64,
) -> Result<(), Exception> {
    const PAGE: u64 = 4096;
    let selected = |i: usize| mask >> i & 1 != 0;
    let place = |i: usize| address.wrapping_add(i as u64);
    let in_second_page = |i: usize| place(i) / PAGE != address / PAGE;
    // With bytes in two pages the second could fault after the first was written: writing one
    // byte of it back unchanged finds out first.
    if let Some(probe) = (0..data.len()).find(|&i| selected(i) && in_second_page(i))
        && (0..probe).any(selected)
    {
        let mut byte = [0];
        cpu.load(place(probe), &mut byte).map_err(as_write)?;
        cpu.store(place(probe), &byte)?;
    }
    let mut i = 0;
    while i < data.len() {
        let length = (i..data.len())
            .take_while(|&k| selected(k) && in_second_page(k) == in_second_page(i))
            .count();
        if length > 0 {
            cpu.store(place(i), &data[i..i + length])?;
        }
        i += length.max(1);
    }
    Ok(())
}

/// A fault of a load that stands for a store.
const fn as_write(fault: Exception) -> Exception {
    match fault {
        Exception::PageFault { address, error } => {
            Exception::PageFault { address, error: error | 2 }
        }
        other => other,
    }
}
