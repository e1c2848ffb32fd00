//! SSE floating-point arithmetic: which lanes, which exceptions, what is committed.
//!
//! The host computes with every exception masked (`host_sse`); this file turns its flags into
//! what the guest's MXCSR masks make of them (SDM volume 1, 11.5).

use super::host_sse::{self, Outcome};
use super::host_x87;
use super::lanes::Lanes;
use super::operands::{
    CR4_OSXMMEXCPT, destination, require_sse, set_destination, source, source_part,
};
use super::{VectorContext, shuffle};
use crate::soft::exception::Exception;
use iced_x86::Instruction;

/// MXCSR.IE.
pub(super) const INVALID: u32 = 1;
const DENORMAL: u32 = 1 << 1;
const DIVIDE_BY_ZERO: u32 = 1 << 2;
const OVERFLOW: u32 = 1 << 3;
const UNDERFLOW: u32 = 1 << 4;
/// MXCSR.PE.
pub(super) const PRECISION: u32 = 1 << 5;
/// MXCSR.DAZ.
pub(super) const DENORMALS_ARE_ZERO: u32 = 1 << 6;
/// Flags known before the result is computed.
const PRECOMPUTATION: u32 = INVALID | DENORMAL | DIVIDE_BY_ZERO;
/// Where the masks begin in MXCSR.
const MASK_SHIFT: u32 = 7;

/// An arithmetic operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `ADDPS` and its like.
    Add,
    /// `SUBPS` and its like.
    Sub,
    /// `MULPS` and its like.
    Mul,
    /// `DIVPS` and its like.
    Div,
    /// `MINPS` and its like: the source if either operand is a NaN or both are zeros.
    Min,
    /// `MAXPS` and its like, with the same rule.
    Max,
    /// `SQRTPS` and its like, of the source.
    Sqrt,
}

/// Which lanes an operation works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Four 32-bit lanes.
    PackedSingle,
    /// Two 64-bit lanes.
    PackedDouble,
    /// The lowest 32-bit lane.
    ScalarSingle,
    /// The lowest 64-bit lane.
    ScalarDouble,
}

impl Shape {
    /// How many lanes.
    const fn lanes(self) -> usize {
        match self {
            Self::PackedSingle => 4,
            Self::PackedDouble => 2,
            Self::ScalarSingle | Self::ScalarDouble => 1,
        }
    }

    /// Whether lanes are single precision.
    const fn is_single(self) -> bool {
        matches!(self, Self::PackedSingle | Self::ScalarSingle)
    }

    /// The same precision, one lane.
    const fn scalar(self) -> Self {
        if self.is_single() { Self::ScalarSingle } else { Self::ScalarDouble }
    }
}

/// The exceptions whose masks are clear.
const fn unmasked(mxcsr: u32) -> u32 {
    !(mxcsr >> MASK_SHIFT) & 0x3F
}

/// Accumulates flags in MXCSR; `#XM` (or `#UD` without CR4.OSXMMEXCPT) if one is unmasked.
#[inline]
pub(super) fn settle<C: VectorContext>(cpu: &mut C, flags: u32) -> Result<(), Exception> {
    let mxcsr = &mut cpu.sse().mxcsr;
    *mxcsr |= flags;
    if flags & unmasked(*mxcsr) == 0 {
        return Ok(());
    }
    if cpu.cr4() & CR4_OSXMMEXCPT == 0 {
        Err(Exception::InvalidOpcode)
    } else {
        Err(Exception::SimdFloatingPoint)
    }
}

/// The flags as reported: an unmasked precomputation exception in any lane keeps the results, and
/// so the other exceptions, from being computed.
#[inline]
pub(super) const fn reported(flags: u32, mxcsr: u32) -> u32 {
    if flags & unmasked(mxcsr) & PRECOMPUTATION != 0 { flags & PRECOMPUTATION } else { flags }
}

/// The two numbers of lane `index`, as doubles, denormals zeroed as MXCSR.DAZ wants.
fn lane_as_double(value: u128, index: usize, shape: Shape, mxcsr: u32) -> f64 {
    let (number, denormal) = if shape.is_single() {
        let single = f32::from_bits(value.double(index));
        (f64::from(single), single.is_subnormal())
    } else {
        let double = f64::from_bits(value.quad(index));
        (double, double.is_subnormal())
    };
    if denormal && mxcsr & DENORMALS_ARE_ZERO != 0 { 0.0_f64.copysign(number) } else { number }
}

/// Whether lane `index` holds a denormal.
fn lane_is_denormal(value: u128, index: usize, single: bool) -> bool {
    if single {
        f32::from_bits(value.double(index)).is_subnormal()
    } else {
        f64::from_bits(value.quad(index)).is_subnormal()
    }
}

/// The flags of one lane when overflow or underflow is unmasked: underflow is then any tiny
/// result, and precision refers to a result with an unbounded exponent.
fn lane_flags(flags: u32, tiny: bool, mxcsr: u32, inexact: impl FnOnce() -> bool) -> u32 {
    let open = unmasked(mxcsr);
    let underflow = open & UNDERFLOW != 0 && (tiny || flags & UNDERFLOW != 0);
    let overflow = open & flags & OVERFLOW != 0;
    if !underflow && !overflow {
        return flags;
    }
    let flags = flags & !PRECISION | if underflow { UNDERFLOW } else { 0 };
    if inexact() { flags | PRECISION } else { flags }
}

#[cold]
fn flags_lane_by_lane(kind: Kind, shape: Shape, a: u128, b: u128, mxcsr: u32) -> u32 {
    let width = if shape.is_single() { 32 } else { 64 };
    let run = host_sse::arithmetic(kind, shape.scalar());
    let may_be_tiny = matches!(kind, Kind::Add | Kind::Sub | Kind::Mul | Kind::Div);
    (0..shape.lanes()).fold(0, |flags, i| {
        let outcome = run(a >> (width * i), b >> (width * i), mxcsr);
        let tiny = may_be_tiny && lane_is_denormal(outcome.value, 0, shape.is_single());
        flags
            | lane_flags(outcome.flags, tiny, mxcsr, || {
                let (a, b) =
                    (lane_as_double(a, i, shape, mxcsr), lane_as_double(b, i, shape, mxcsr));
                host_x87::is_inexact_unbounded(kind, a, b, shape.is_single(), mxcsr)
            })
    })
}

/// Computes, with the flags as the guest would see them.
#[inline(always)]
pub(super) fn compute(kind: Kind, shape: Shape, a: u128, b: u128, mxcsr: u32) -> Outcome {
    let mut outcome = host_sse::arithmetic(kind, shape)(a, b, mxcsr);
    if unmasked(mxcsr) != 0 {
        if unmasked(mxcsr) & (OVERFLOW | UNDERFLOW) != 0 {
            outcome.flags = flags_lane_by_lane(kind, shape, a, b, mxcsr);
        }
        outcome.flags = reported(outcome.flags, mxcsr);
    }
    outcome
}

/// Narrows doubles to singles by `run`, with the flags as the guest would see them.
#[inline]
pub(super) fn narrow(run: host_sse::Run, lanes: usize, a: u128, b: u128, mxcsr: u32) -> Outcome {
    let mut outcome = run(a, b, mxcsr);
    if unmasked(mxcsr) & (OVERFLOW | UNDERFLOW) != 0 {
        outcome.flags = (0..lanes).fold(0, |flags, i| {
            let lane = host_sse::cvtsd2ss(0, b >> (64 * i), mxcsr);
            let tiny = lane_is_denormal(lane.value, 0, true);
            let number = lane_as_double(b, i, Shape::PackedDouble, mxcsr);
            let inexact = || host_x87::is_inexact_unbounded(Kind::Add, number, 0.0, true, mxcsr);
            flags | lane_flags(lane.flags, tiny, mxcsr, inexact)
        });
    }
    Outcome { flags: reported(outcome.flags, mxcsr), ..outcome }
}

/// Operand 1 as an operation of this shape reads it.
#[inline(always)]
pub(super) fn operand<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    shape: Shape,
) -> Result<u128, Exception> {
    match shape {
        Shape::PackedSingle | Shape::PackedDouble => source(cpu, instruction),
        Shape::ScalarSingle => source_part::<4, C>(cpu, instruction),
        Shape::ScalarDouble => source_part::<8, C>(cpu, instruction),
    }
}

/// Commits an outcome to operand 0 if none of its exceptions is unmasked.
#[inline]
pub(super) fn commit<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    outcome: Outcome,
) -> Result<(), Exception> {
    settle(cpu, outcome.flags)?;
    set_destination(cpu, instruction, outcome.value);
    Ok(())
}

/// `ADDPS` and its like.
#[inline(always)]
pub(super) fn arithmetic<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    kind: Kind,
    shape: Shape,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = operand(cpu, instruction, shape)?;
    let a = destination(cpu, instruction);
    let outcome = compute(kind, shape, a, b, cpu.sse().mxcsr);
    commit(cpu, instruction, outcome)
}

/// `HADDPS`, `HSUBPS`, `HADDPD`, `HSUBPD`: neighbours combined, the destination's first.
pub(super) fn horizontal<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    kind: Kind,
    shape: Shape,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = operand(cpu, instruction, shape)?;
    let a = destination(cpu, instruction);
    let (even, odd) = if shape.is_single() {
        (shuffle::singles(a, b, 0b10_00_10_00), shuffle::singles(a, b, 0b11_01_11_01))
    } else {
        (shuffle::low_quads(a, b), shuffle::high_quads(a, b))
    };
    let outcome = compute(kind, shape, even, odd, cpu.sse().mxcsr);
    commit(cpu, instruction, outcome)
}

/// `ADDSUBPS`, `ADDSUBPD`: even lanes subtract, odd lanes add.
pub(super) fn add_subtract<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    shape: Shape,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = operand(cpu, instruction, shape)?;
    let a = destination(cpu, instruction);
    let mxcsr = cpu.sse().mxcsr;
    let even = if shape.is_single() {
        u128::from_doubles(|i| if i % 2 == 0 { u32::MAX } else { 0 })
    } else {
        u128::from(u64::MAX)
    };
    // The lanes cleared compute zero and raise nothing.
    let subtracted = compute(Kind::Sub, shape, a & even, b & even, mxcsr);
    let added = compute(Kind::Add, shape, a & !even, b & !even, mxcsr);
    let outcome = Outcome {
        value: subtracted.value & even | added.value & !even,
        flags: reported(subtracted.flags | added.flags, mxcsr),
    };
    commit(cpu, instruction, outcome)
}

/// `DPPS`, `DPPD`: immediate bits 4–7 choose the products, bits 0–3 the lanes of the sum.
pub(super) fn dot_product<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    shape: Shape,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = operand(cpu, instruction, shape)?;
    let a = destination(cpu, instruction);
    let mxcsr = cpu.sse().mxcsr;
    let immediate = instruction.immediate8();
    let chosen = |value: u128, bits: u8| {
        if shape.is_single() {
            shuffle::blend_singles(0, value, bits)
        } else {
            shuffle::blend_doubles(0, value, bits)
        }
    };
    let mut flags = 0;
    let mut step = |kind, a, b| {
        let outcome = compute(kind, shape, a, b, mxcsr);
        flags |= outcome.flags;
        if outcome.flags & unmasked(mxcsr) == 0 { Some(outcome.value) } else { None }
    };
    // The order of the operands decides which of two NaNs survives in each lane.
    let sum = step(Kind::Mul, chosen(a, immediate >> 4), chosen(b, immediate >> 4)).and_then(
        |products| {
            if !shape.is_single() {
                return step(Kind::Add, products, shuffle::quads(products, products, 0b01));
            }
            let pairs = step(Kind::Add, shuffle::doubles(0, products, 0b10_11_00_01), products)?;
            step(Kind::Add, pairs, shuffle::doubles(0, pairs, 0b01_00_11_10))
        },
    );
    settle(cpu, flags)?;
    if let Some(sum) = sum {
        set_destination(cpu, instruction, chosen(sum, immediate));
    }
    Ok(())
}
