//! MMX: the eight registers that are the x87 unit's significands.
//!
//! Every MMX instruction but `EMMS` puts TOP to zero and marks all registers full; a register
//! written gets an exponent of all ones (SDM volume 1, 9.5). Pending x87 exceptions come first.

use super::host_sse::{self, Outcome, Run};
use super::lanes::Lanes;
use super::operands::{
    CR0_EM, CR0_TS, from_register, memory, require_sse, set_destination, set_general_or_memory,
    source_general, source_part, to_register, xmm_number,
};
use super::x87::{Stack, mark_all_empty, mark_all_full, require_none_pending};
use super::{VectorContext, convert, float, horizontal, integer, moves, operands, shuffle};
use crate::soft::exception::Exception;
use crate::state::X87State;
use iced_x86::{Instruction, Register};

/// `#UD`, `#NM` or `#MF` if MMX instructions are not available.
fn require_mmx<C: VectorContext>(cpu: &mut C) -> Result<(), Exception> {
    if cpu.cr0() & CR0_EM != 0 {
        return Err(Exception::InvalidOpcode);
    }
    if cpu.cr0() & CR0_TS != 0 {
        return Err(Exception::DeviceNotAvailable);
    }
    require_none_pending(cpu)
}

/// The x87 unit turned to MMX use.
fn entered<C: VectorContext>(cpu: &mut C) -> X87State {
    let mut x87 = *cpu.x87();
    x87.set_top(0);
    mark_all_full(&mut x87);
    x87
}

fn number(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::MM0 as usize) & 7
}

/// An MMX register of a unit in MMX use.
fn get(x87: &X87State, register: Register) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&x87.registers[number(register)][..8]);
    u64::from_le_bytes(bytes)
}

/// Writes an MMX register of a unit in MMX use.
fn set(x87: &mut X87State, register: Register, value: u64) {
    let mut bytes = [0xFF; 10];
    bytes[..8].copy_from_slice(&value.to_le_bytes());
    x87.set_st(number(register), bytes);
}

/// Operand 1: an MMX register, or `BYTES` bytes of memory, zero-extended.
fn source<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    x87: &X87State,
) -> Result<u64, Exception> {
    if from_register(instruction) {
        Ok(get(x87, instruction.op1_register()))
    } else {
        memory::<BYTES, C>(cpu, instruction)
    }
}

/// `destination = f(destination, source)` with a source of `BYTES` bytes when it is memory.
fn packed_part<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u64, u64) -> u64,
) -> Result<(), Exception> {
    require_mmx(cpu)?;
    let mut x87 = entered(cpu);
    let b = source::<BYTES, C>(cpu, instruction, &x87)?;
    let a = get(&x87, instruction.op0_register());
    set(&mut x87, instruction.op0_register(), f(a, b));
    *cpu.x87() = x87;
    Ok(())
}

/// `destination = f(destination, source)`.
fn packed<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u64, u64) -> u64,
) -> Result<(), Exception> {
    packed_part::<8, C>(cpu, instruction, f)
}

/// `destination = f(destination, source, imm8)`.
fn packed_immediate<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u64, u64, u8) -> u64,
) -> Result<(), Exception> {
    packed(cpu, instruction, |a, b| f(a, b, instruction.immediate8()))
}

/// A shift by the 64-bit source.
fn shift<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u64, u64) -> u64,
) -> Result<(), Exception> {
    packed(cpu, instruction, f)
}

/// A shift of register operand 0 by an immediate.
fn shift_immediate<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u64, u64) -> u64,
) -> Result<(), Exception> {
    require_mmx(cpu)?;
    let mut x87 = entered(cpu);
    let value = f(get(&x87, instruction.op0_register()), u64::from(instruction.immediate8()));
    set(&mut x87, instruction.op0_register(), value);
    *cpu.x87() = x87;
    Ok(())
}

/// `MOVD`, `MOVQ` from a general register or memory of `BYTES` bytes.
fn from_general<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_mmx(cpu)?;
    let value = source_general::<BYTES, C>(cpu, instruction)?;
    let mut x87 = entered(cpu);
    set(&mut x87, instruction.op0_register(), value);
    *cpu.x87() = x87;
    Ok(())
}

/// `MOVD`, `MOVQ` to a general register or memory of `BYTES` bytes.
fn to_general_or_memory<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_mmx(cpu)?;
    let x87 = entered(cpu);
    let value = get(&x87, instruction.op1_register()) & (u64::MAX >> (64 - 8 * BYTES));
    set_general_or_memory::<BYTES, C>(cpu, instruction, value)?;
    *cpu.x87() = x87;
    Ok(())
}

/// `MOVQ`, `MOVNTQ` to memory or another MMX register.
fn store<C: VectorContext>(cpu: &mut C, instruction: &Instruction) -> Result<(), Exception> {
    require_mmx(cpu)?;
    let mut x87 = entered(cpu);
    let value = get(&x87, instruction.op1_register());
    if to_register(instruction) {
        set(&mut x87, instruction.op0_register(), value);
    } else {
        operands::set_memory::<8, C>(cpu, instruction, u128::from(value))?;
    }
    *cpu.x87() = x87;
    Ok(())
}

/// A general register computed from an MMX register and the immediate, if there is one.
fn to_general<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(u64, u8) -> u64,
) -> Result<(), Exception> {
    require_mmx(cpu)?;
    let x87 = entered(cpu);
    let immediate = if instruction.op_count() > 2 { instruction.immediate8() } else { 0 };
    let value = f(get(&x87, instruction.op1_register()), immediate);
    cpu.set_general(instruction.op0_register(), value);
    *cpu.x87() = x87;
    Ok(())
}

/// `PINSRW`.
fn insert_word<C: VectorContext>(cpu: &mut C, instruction: &Instruction) -> Result<(), Exception> {
    require_mmx(cpu)?;
    let word = source_general::<2, C>(cpu, instruction)? as u16;
    let lane = usize::from(instruction.immediate8() & 3);
    let mut x87 = entered(cpu);
    let old = get(&x87, instruction.op0_register());
    set(
        &mut x87,
        instruction.op0_register(),
        u64::from_words(|i| if i == lane { word } else { old.word(i) }),
    );
    *cpu.x87() = x87;
    Ok(())
}

/// `MASKMOVQ`.
fn store_masked<C: VectorContext>(cpu: &mut C, instruction: &Instruction) -> Result<(), Exception> {
    require_mmx(cpu)?;
    let x87 = entered(cpu);
    let data = get(&x87, instruction.op1_register()).to_le_bytes();
    let mask = integer::byte_signs(get(&x87, instruction.op2_register()));
    let address = cpu.string_destination(instruction);
    moves::store_selected(cpu, address, &data, mask)?;
    *cpu.x87() = x87;
    Ok(())
}

/// `EMMS`.
fn empty<C: VectorContext>(cpu: &mut C) -> Result<(), Exception> {
    require_mmx(cpu)?;
    let mut x87 = *cpu.x87();
    x87.set_top(0);
    mark_all_empty(&mut x87);
    *cpu.x87() = x87;
    Ok(())
}

/// `MOVQ2DQ`.
fn to_xmm<C: VectorContext>(cpu: &mut C, instruction: &Instruction) -> Result<(), Exception> {
    require_sse(cpu)?;
    require_none_pending(cpu)?;
    let x87 = entered(cpu);
    let value = get(&x87, instruction.op1_register());
    set_destination(cpu, instruction, u128::from(value));
    *cpu.x87() = x87;
    Ok(())
}

/// `MOVDQ2Q`.
fn from_xmm<C: VectorContext>(cpu: &mut C, instruction: &Instruction) -> Result<(), Exception> {
    require_sse(cpu)?;
    require_none_pending(cpu)?;
    let value = cpu.sse().registers[xmm_number(instruction.op1_register())];
    let mut x87 = entered(cpu);
    set(&mut x87, instruction.op0_register(), value as u64);
    *cpu.x87() = x87;
    Ok(())
}

/// `CVTPI2PS`: into the low half of an XMM register.
fn to_singles(a: u128, b: u128, mxcsr: u32) -> Outcome {
    let outcome = host_sse::cvtdq2ps(0, b, mxcsr);
    Outcome { value: a >> 64 << 64 | outcome.value & u128::from(u64::MAX), ..outcome }
}

/// `CVTPI2PS`, `CVTPI2PD`; from memory they leave the x87 unit alone.
fn from_integers<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    run: Run,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    if !from_register(instruction) {
        return convert::part::<8, C>(cpu, instruction, run);
    }
    require_none_pending(cpu)?;
    let x87 = entered(cpu);
    let b = get(&x87, instruction.op1_register());
    convert::convert(cpu, instruction, u128::from(b), run)?;
    *cpu.x87() = x87;
    Ok(())
}

/// `CVTPS2PI`, `CVTTPS2PI`.
fn from_singles<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    run: Run,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    require_none_pending(cpu)?;
    let b = source_part::<8, C>(cpu, instruction)? & u128::from(u64::MAX);
    to_mmx(cpu, instruction, b, run)
}

/// `CVTPD2PI`, `CVTTPD2PI`.
fn from_doubles<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    run: Run,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    require_none_pending(cpu)?;
    let b = operands::source(cpu, instruction)?;
    to_mmx(cpu, instruction, b, run)
}

/// The low half of a conversion of `b`, into an MMX register.
fn to_mmx<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    b: u128,
    run: Run,
) -> Result<(), Exception> {
    let mxcsr = cpu.sse().mxcsr;
    let outcome = run(0, b, mxcsr);
    float::settle(cpu, float::reported(outcome.flags, mxcsr))?;
    let mut x87 = entered(cpu);
    set(&mut x87, instruction.op0_register(), outcome.value as u64);
    *cpu.x87() = x87;
    Ok(())
}

instructions! { cpu, i;
    // Moves.
    Movd_mm_rm32 => from_general::<4, C>(cpu, i),
    Movq_mm_rm64 => from_general::<8, C>(cpu, i),
    Movd_rm32_mm => to_general_or_memory::<4, C>(cpu, i),
    Movq_rm64_mm => to_general_or_memory::<8, C>(cpu, i),
    Movq_mm_mmm64 => packed(cpu, i, |_, value| value),
    Movq_mmm64_mm | Movntq_m64_mm => store(cpu, i),
    Movq2dq_xmm_mm => to_xmm(cpu, i),
    Movdq2q_mm_xmm => from_xmm(cpu, i),
    Maskmovq_rDI_mm_mm => store_masked(cpu, i),
    Pmovmskb_r32_mm | Pmovmskb_r64_mm => to_general(cpu, i, |value, _| integer::byte_signs(value)),
    Pextrw_r32_mm_imm8 | Pextrw_r64_mm_imm8 => to_general(cpu, i, |value, lane| u64::from(value.word(usize::from(lane & 3)))),
    Pinsrw_mm_r32m16_imm8 | Pinsrw_mm_r64m16_imm8 => insert_word(cpu, i),
    Emms => empty(cpu),
    // Bits.
    Pand_mm_mmm64 => packed(cpu, i, integer::and),
    Pandn_mm_mmm64 => packed(cpu, i, integer::and_not),
    Por_mm_mmm64 => packed(cpu, i, integer::or),
    Pxor_mm_mmm64 => packed(cpu, i, integer::xor),
    // Packed integers.
    Paddb_mm_mmm64 => packed(cpu, i, integer::add_bytes),
    Paddw_mm_mmm64 => packed(cpu, i, integer::add_words),
    Paddd_mm_mmm64 => packed(cpu, i, integer::add_doubles),
    Paddq_mm_mmm64 => packed(cpu, i, integer::add_quads),
    Paddsb_mm_mmm64 => packed(cpu, i, integer::add_signed_bytes),
    Paddsw_mm_mmm64 => packed(cpu, i, integer::add_signed_words),
    Paddusb_mm_mmm64 => packed(cpu, i, integer::add_unsigned_bytes),
    Paddusw_mm_mmm64 => packed(cpu, i, integer::add_unsigned_words),
    Psubb_mm_mmm64 => packed(cpu, i, integer::sub_bytes),
    Psubw_mm_mmm64 => packed(cpu, i, integer::sub_words),
    Psubd_mm_mmm64 => packed(cpu, i, integer::sub_doubles),
    Psubq_mm_mmm64 => packed(cpu, i, integer::sub_quads),
    Psubsb_mm_mmm64 => packed(cpu, i, integer::sub_signed_bytes),
    Psubsw_mm_mmm64 => packed(cpu, i, integer::sub_signed_words),
    Psubusb_mm_mmm64 => packed(cpu, i, integer::sub_unsigned_bytes),
    Psubusw_mm_mmm64 => packed(cpu, i, integer::sub_unsigned_words),
    Pavgb_mm_mmm64 => packed(cpu, i, integer::average_bytes),
    Pavgw_mm_mmm64 => packed(cpu, i, integer::average_words),
    Pcmpeqb_mm_mmm64 => packed(cpu, i, integer::equal_bytes),
    Pcmpeqw_mm_mmm64 => packed(cpu, i, integer::equal_words),
    Pcmpeqd_mm_mmm64 => packed(cpu, i, integer::equal_doubles),
    Pcmpgtb_mm_mmm64 => packed(cpu, i, integer::greater_bytes),
    Pcmpgtw_mm_mmm64 => packed(cpu, i, integer::greater_words),
    Pcmpgtd_mm_mmm64 => packed(cpu, i, integer::greater_doubles),
    Pminub_mm_mmm64 => packed(cpu, i, integer::min_unsigned_bytes),
    Pminsw_mm_mmm64 => packed(cpu, i, integer::min_signed_words),
    Pmaxub_mm_mmm64 => packed(cpu, i, integer::max_unsigned_bytes),
    Pmaxsw_mm_mmm64 => packed(cpu, i, integer::max_signed_words),
    Pmullw_mm_mmm64 => packed(cpu, i, integer::multiply_low_words),
    Pmulhw_mm_mmm64 => packed(cpu, i, integer::multiply_high_words),
    Pmulhuw_mm_mmm64 => packed(cpu, i, integer::multiply_high_unsigned_words),
    Pmulhrsw_mm_mmm64 => packed(cpu, i, integer::multiply_round_words),
    Pmuludq_mm_mmm64 => packed(cpu, i, integer::multiply_unsigned_doubles),
    Pmaddwd_mm_mmm64 => packed(cpu, i, integer::multiply_add_words),
    Pmaddubsw_mm_mmm64 => packed(cpu, i, integer::multiply_add_bytes),
    Psadbw_mm_mmm64 => packed(cpu, i, integer::sum_of_differences),
    Psignb_mm_mmm64 => packed(cpu, i, integer::sign_bytes),
    Psignw_mm_mmm64 => packed(cpu, i, integer::sign_words),
    Psignd_mm_mmm64 => packed(cpu, i, integer::sign_doubles),
    Pabsb_mm_mmm64 => packed(cpu, i, integer::absolute_bytes),
    Pabsw_mm_mmm64 => packed(cpu, i, integer::absolute_words),
    Pabsd_mm_mmm64 => packed(cpu, i, integer::absolute_doubles),
    Psllw_mm_mmm64 => shift(cpu, i, integer::left_words),
    Psllw_mm_imm8 => shift_immediate(cpu, i, integer::left_words),
    Pslld_mm_mmm64 => shift(cpu, i, integer::left_doubles),
    Pslld_mm_imm8 => shift_immediate(cpu, i, integer::left_doubles),
    Psllq_mm_mmm64 => shift(cpu, i, integer::left_quads),
    Psllq_mm_imm8 => shift_immediate(cpu, i, integer::left_quads),
    Psrlw_mm_mmm64 => shift(cpu, i, integer::right_words),
    Psrlw_mm_imm8 => shift_immediate(cpu, i, integer::right_words),
    Psrld_mm_mmm64 => shift(cpu, i, integer::right_doubles),
    Psrld_mm_imm8 => shift_immediate(cpu, i, integer::right_doubles),
    Psrlq_mm_mmm64 => shift(cpu, i, integer::right_quads),
    Psrlq_mm_imm8 => shift_immediate(cpu, i, integer::right_quads),
    Psraw_mm_mmm64 => shift(cpu, i, integer::arithmetic_right_words),
    Psraw_mm_imm8 => shift_immediate(cpu, i, integer::arithmetic_right_words),
    Psrad_mm_mmm64 => shift(cpu, i, integer::arithmetic_right_doubles),
    Psrad_mm_imm8 => shift_immediate(cpu, i, integer::arithmetic_right_doubles),
    Phaddw_mm_mmm64 => packed(cpu, i, horizontal::add_words),
    Phaddsw_mm_mmm64 => packed(cpu, i, horizontal::add_saturated_words),
    Phaddd_mm_mmm64 => packed(cpu, i, horizontal::add_doubles),
    Phsubw_mm_mmm64 => packed(cpu, i, horizontal::sub_words),
    Phsubsw_mm_mmm64 => packed(cpu, i, horizontal::sub_saturated_words),
    Phsubd_mm_mmm64 => packed(cpu, i, horizontal::sub_doubles),
    Packsswb_mm_mmm64 => packed(cpu, i, horizontal::pack_signed_words),
    Packuswb_mm_mmm64 => packed(cpu, i, horizontal::pack_unsigned_words),
    Packssdw_mm_mmm64 => packed(cpu, i, horizontal::pack_signed_doubles),
    // Shuffles.
    Punpcklbw_mm_mmm32 => packed_part::<4, C>(cpu, i, shuffle::low_bytes),
    Punpcklwd_mm_mmm32 => packed_part::<4, C>(cpu, i, shuffle::low_words),
    Punpckldq_mm_mmm32 => packed_part::<4, C>(cpu, i, shuffle::low_doubles),
    Punpckhbw_mm_mmm64 => packed(cpu, i, shuffle::high_bytes),
    Punpckhwd_mm_mmm64 => packed(cpu, i, shuffle::high_words),
    Punpckhdq_mm_mmm64 => packed(cpu, i, shuffle::high_doubles),
    Pshufb_mm_mmm64 => packed(cpu, i, shuffle::bytes),
    Pshufw_mm_mmm64_imm8 => packed_immediate(cpu, i, shuffle::words),
    Palignr_mm_mmm64_imm8 => packed_immediate(cpu, i, shuffle::align_right_mmx),
    // Conversions.
    Cvtpi2ps_xmm_mmm64 => from_integers(cpu, i, to_singles),
    Cvtpi2pd_xmm_mmm64 => from_integers(cpu, i, host_sse::cvtdq2pd),
    Cvtps2pi_mm_xmmm64 => from_singles(cpu, i, host_sse::cvtps2dq),
    Cvttps2pi_mm_xmmm64 => from_singles(cpu, i, host_sse::cvttps2dq),
    Cvtpd2pi_mm_xmmm128 => from_doubles(cpu, i, host_sse::cvtpd2dq),
    Cvttpd2pi_mm_xmmm128 => from_doubles(cpu, i, host_sse::cvttpd2dq),
}
