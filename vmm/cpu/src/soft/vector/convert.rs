//! Conversions between floating-point formats and integers, and rounding to integral values.

use super::VectorContext;
use super::float::{
    DENORMALS_ARE_ZERO, INVALID, PRECISION, Shape, commit, narrow, operand, reported, settle,
};
use super::host_sse::{IntegerOutcome, Outcome, Run};
use super::lanes::Lanes;
use super::operands::{destination, require_sse, source, source_general, source_part};
use crate::soft::exception::Exception;
use iced_x86::Instruction;

/// A conversion of an aligned 128-bit source.
#[inline]
pub(super) fn whole<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    run: Run,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = source(cpu, instruction)?;
    convert(cpu, instruction, b, run)
}

/// A conversion of a source of `BYTES` bytes.
#[inline]
pub(super) fn part<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    run: Run,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = source_part::<BYTES, C>(cpu, instruction)?;
    convert(cpu, instruction, b, run)
}

/// Converts `b` into operand 0.
#[inline]
pub(super) fn convert<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    b: u128,
    run: Run,
) -> Result<(), Exception> {
    let a = destination(cpu, instruction);
    let mxcsr = cpu.sse().mxcsr;
    let outcome = run(a, b, mxcsr);
    commit(cpu, instruction, Outcome { flags: reported(outcome.flags, mxcsr), ..outcome })
}

/// `CVTPD2PS` and `CVTSD2SS`, which may overflow and underflow.
#[inline]
pub(super) fn to_single<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    shape: Shape,
    run: Run,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = operand(cpu, instruction, shape)?;
    let a = destination(cpu, instruction);
    let lanes = if shape == Shape::PackedDouble { 2 } else { 1 };
    let outcome = narrow(run, lanes, a, b, cpu.sse().mxcsr);
    commit(cpu, instruction, outcome)
}

/// `CVTSD2SI` and its like.
#[inline]
pub(super) fn to_integer<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    shape: Shape,
    run: fn(u128, u32) -> IntegerOutcome,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = operand(cpu, instruction, shape)?;
    let (value, flags) = run(b, cpu.sse().mxcsr);
    settle(cpu, flags)?;
    cpu.set_general(instruction.op0_register(), value);
    Ok(())
}

/// `CVTSI2SD` and its like from a register or memory of `BYTES` bytes.
#[inline]
pub(super) fn from_integer<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    run: fn(u128, i64, u32) -> Outcome,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let source = source_general::<BYTES, C>(cpu, instruction)?;
    let source = if BYTES == 4 { i64::from(source as i32) } else { source as i64 };
    let a = destination(cpu, instruction);
    let outcome = run(a, source, cpu.sse().mxcsr);
    commit(cpu, instruction, outcome)
}

/// RC of MXCSR, or of the immediate of `ROUNDPS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rounding {
    Nearest,
    Down,
    Up,
    Truncate,
}

impl Rounding {
    /// As the immediate of `ROUNDPS` chooses it.
    fn chosen(immediate: u8, mxcsr: u32) -> Self {
        match if immediate & 4 != 0 { mxcsr >> 13 & 3 } else { u32::from(immediate & 3) } {
            0 => Self::Nearest,
            1 => Self::Down,
            2 => Self::Up,
            _ => Self::Truncate,
        }
    }
}

/// Declares rounding of one number's bits to an integral value, with the flags raised.
macro_rules! round_lane {
    ($name:ident, $float:ty, $bits:ty, $quiet:literal) => {
        fn $name(bits: $bits, rounding: Rounding, mxcsr: u32) -> ($bits, u32) {
            let number = <$float>::from_bits(bits);
            if number.is_nan() {
                return (bits | $quiet, if bits & $quiet == 0 { INVALID } else { 0 });
            }
            if number.is_subnormal() && mxcsr & DENORMALS_ARE_ZERO != 0 {
                return (bits & !(<$bits>::MAX >> 1), 0);
            }
            let rounded = match rounding {
                Rounding::Nearest => number.round_ties_even(),
                Rounding::Down => number.floor(),
                Rounding::Up => number.ceil(),
                Rounding::Truncate => number.trunc(),
            };
            // The sign survives, also of a zero.
            (rounded.copysign(number).to_bits(), if rounded == number { 0 } else { PRECISION })
        }
    };
}

round_lane!(round_single, f32, u32, 0x0040_0000);
round_lane!(round_double, f64, u64, 0x0008_0000_0000_0000);

/// `ROUNDPS`, `ROUNDPD`, `ROUNDSS`, `ROUNDSD`: immediate bits 0–1 round, bit 2 takes MXCSR.RC
/// instead, bit 3 suppresses the precision exception.
pub(super) fn round<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    shape: Shape,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = operand(cpu, instruction, shape)?;
    let a = destination(cpu, instruction);
    let mxcsr = cpu.sse().mxcsr;
    let immediate = instruction.immediate8();
    let rounding = Rounding::chosen(immediate, mxcsr);
    let mut flags = 0;
    let mut single = |bits| {
        let (value, raised) = round_single(bits, rounding, mxcsr);
        flags |= raised;
        value
    };
    let value = match shape {
        Shape::PackedSingle => u128::from_doubles(|i| single(b.double(i))),
        Shape::ScalarSingle => a >> 32 << 32 | u128::from(single(b.double(0))),
        Shape::PackedDouble | Shape::ScalarDouble => {
            let mut double = |bits| {
                let (value, raised) = round_double(bits, rounding, mxcsr);
                flags |= raised;
                value
            };
            if shape == Shape::PackedDouble {
                u128::from_quads(|i| double(b.quad(i)))
            } else {
                a >> 64 << 64 | u128::from(double(b.quad(0)))
            }
        }
    };
    if immediate & 8 != 0 {
        flags &= !PRECISION;
    }
    commit(cpu, instruction, Outcome { value, flags: reported(flags, mxcsr) })
}
