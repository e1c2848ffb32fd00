//! SSE arithmetic done by the host's own SSE unit under the guest's rounding and denormal modes.
//!
//! This stays deterministic across hosts: every operation here is one of SSE or SSE2, which each
//! x86-64 CPU has, and IEEE 754 together with the architecture manuals fixes every result bit
//! and every exception flag of it: rounding, NaN operand choice, the default NaN, tininess after
//! rounding, the integer indefinite, DAZ and FTZ. The operations for which CPUs differ (`RCPPS`
//! and `RSQRTPS`) are not here but in `approx`. Exceptions are masked while the operation runs;
//! `float` decides from the flags what the guest sees.

use super::float::{Kind, Shape};
use std::arch::asm;
use std::arch::x86_64::__m128i;

/// MXCSR bits that steer a result: DAZ, RC, FTZ.
const MODES: u32 = 0xE040;
const ALL_MASKED: u32 = 0x1F80;
const FLAGS: u32 = 0x3F;
/// MXCSR as Rust code runs with it: the language knows no other floating-point environment, so
/// this is what is in force before and has to be after. (Saving what is there would say the
/// same ten times slower: `LDMXCSR` waits long for a preceding `STMXCSR` of the same word.)
static HOST: u32 = 0x1F80;
const UNDERFLOW_MASK: u32 = 1 << 11;
const FLUSH_TO_ZERO: u32 = 1 << 15;

/// What an operation gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outcome {
    /// The whole destination register.
    pub(super) value: u128,
    /// MXCSR flags raised: IE (0), DE (1), ZE (2), OE (3), UE (4), PE (5).
    pub(super) flags: u32,
}

/// An operation of destination, source and the guest's MXCSR.
pub(super) type Run = fn(u128, u128, u32) -> Outcome;

/// The guest's modes with every exception masked and no flag set. FTZ holds only while
/// underflow is masked (SDM volume 1, 10.2.3.3).
fn control(mxcsr: u32) -> u32 {
    let ignored = if mxcsr & UNDERFLOW_MASK == 0 { FLUSH_TO_ZERO } else { 0 };
    mxcsr & MODES & !ignored | ALL_MASKED
}

fn to_vector(value: u128) -> __m128i {
    // SAFETY: both types are 16 bytes without padding, and every bit pattern is valid in both.
    unsafe { std::mem::transmute(value) }
}

fn from_vector(value: __m128i) -> u128 {
    // SAFETY: both types are 16 bytes without padding, and every bit pattern is valid in both.
    unsafe { std::mem::transmute(value) }
}

/// Declares operations `destination = op(destination, source)` on XMM registers.
macro_rules! operations {
    ($($name:ident: $instruction:literal)+) => {$(
        #[doc = concat!("`", $instruction, "`.")]
        #[inline]
        pub(super) fn $name(destination: u128, source: u128, mxcsr: u32) -> Outcome {
            let mut value = to_vector(destination);
            let modes = control(mxcsr);
            let mut status = 0_u32;
            // SAFETY: the instructions are SSE2 at most, which every x86-64 host has. They touch
            // only the two named registers, the two local words and `HOST`, all valid for 4 bytes.
            // The values loaded have no reserved bit set, so `ldmxcsr` cannot fault, and mask
            // every exception, so the operation cannot trap. MXCSR is as before but for its flags,
            // which a block without `preserves_flags` may change.
            unsafe {
                asm!(
                    "ldmxcsr [{modes}]",
                    concat!($instruction, " {value}, {source}"),
                    "stmxcsr [{status}]",
                    "ldmxcsr [{host}]",
                    modes = in(reg) &raw const modes,
                    host = in(reg) &raw const HOST,
                    status = in(reg) &raw mut status,
                    value = inout(xmm_reg) value,
                    source = in(xmm_reg) to_vector(source),
                    options(nostack),
                );
            }
            Outcome { value: from_vector(value), flags: status & FLAGS }
        }
    )+};
}

operations! {
    addps: "addps" addpd: "addpd" addss: "addss" addsd: "addsd"
    subps: "subps" subpd: "subpd" subss: "subss" subsd: "subsd"
    mulps: "mulps" mulpd: "mulpd" mulss: "mulss" mulsd: "mulsd"
    divps: "divps" divpd: "divpd" divss: "divss" divsd: "divsd"
    minps: "minps" minpd: "minpd" minss: "minss" minsd: "minsd"
    maxps: "maxps" maxpd: "maxpd" maxss: "maxss" maxsd: "maxsd"
    sqrtps: "sqrtps" sqrtpd: "sqrtpd" sqrtss: "sqrtss" sqrtsd: "sqrtsd"
    cvtps2pd: "cvtps2pd" cvtpd2ps: "cvtpd2ps" cvtss2sd: "cvtss2sd" cvtsd2ss: "cvtsd2ss"
    cvtdq2ps: "cvtdq2ps" cvtps2dq: "cvtps2dq" cvttps2dq: "cvttps2dq"
    cvtdq2pd: "cvtdq2pd" cvtpd2dq: "cvtpd2dq" cvttpd2dq: "cvttpd2dq"
    cmpeqps: "cmpeqps" cmpltps: "cmpltps" cmpleps: "cmpleps" cmpunordps: "cmpunordps"
    cmpneqps: "cmpneqps" cmpnltps: "cmpnltps" cmpnleps: "cmpnleps" cmpordps: "cmpordps"
    cmpeqpd: "cmpeqpd" cmpltpd: "cmpltpd" cmplepd: "cmplepd" cmpunordpd: "cmpunordpd"
    cmpneqpd: "cmpneqpd" cmpnltpd: "cmpnltpd" cmpnlepd: "cmpnlepd" cmpordpd: "cmpordpd"
    cmpeqss: "cmpeqss" cmpltss: "cmpltss" cmpless: "cmpless" cmpunordss: "cmpunordss"
    cmpneqss: "cmpneqss" cmpnltss: "cmpnltss" cmpnless: "cmpnless" cmpordss: "cmpordss"
    cmpeqsd: "cmpeqsd" cmpltsd: "cmpltsd" cmplesd: "cmplesd" cmpunordsd: "cmpunordsd"
    cmpneqsd: "cmpneqsd" cmpnltsd: "cmpnltsd" cmpnlesd: "cmpnlesd" cmpordsd: "cmpordsd"
}

/// The operation of this kind and shape.
#[inline(always)]
pub(super) const fn arithmetic(kind: Kind, shape: Shape) -> Run {
    use Shape::{PackedDouble, PackedSingle, ScalarDouble, ScalarSingle};
    match (kind, shape) {
        (Kind::Add, PackedSingle) => addps,
        (Kind::Add, PackedDouble) => addpd,
        (Kind::Add, ScalarSingle) => addss,
        (Kind::Add, ScalarDouble) => addsd,
        (Kind::Sub, PackedSingle) => subps,
        (Kind::Sub, PackedDouble) => subpd,
        (Kind::Sub, ScalarSingle) => subss,
        (Kind::Sub, ScalarDouble) => subsd,
        (Kind::Mul, PackedSingle) => mulps,
        (Kind::Mul, PackedDouble) => mulpd,
        (Kind::Mul, ScalarSingle) => mulss,
        (Kind::Mul, ScalarDouble) => mulsd,
        (Kind::Div, PackedSingle) => divps,
        (Kind::Div, PackedDouble) => divpd,
        (Kind::Div, ScalarSingle) => divss,
        (Kind::Div, ScalarDouble) => divsd,
        (Kind::Min, PackedSingle) => minps,
        (Kind::Min, PackedDouble) => minpd,
        (Kind::Min, ScalarSingle) => minss,
        (Kind::Min, ScalarDouble) => minsd,
        (Kind::Max, PackedSingle) => maxps,
        (Kind::Max, PackedDouble) => maxpd,
        (Kind::Max, ScalarSingle) => maxss,
        (Kind::Max, ScalarDouble) => maxsd,
        (Kind::Sqrt, PackedSingle) => sqrtps,
        (Kind::Sqrt, PackedDouble) => sqrtpd,
        (Kind::Sqrt, ScalarSingle) => sqrtss,
        (Kind::Sqrt, ScalarDouble) => sqrtsd,
    }
}

/// The comparison of this shape by the predicate in bits 0–2 of an immediate.
#[inline]
pub(super) fn comparison(shape: Shape, predicate: u8) -> Run {
    const SINGLES: [Run; 8] =
        [cmpeqps, cmpltps, cmpleps, cmpunordps, cmpneqps, cmpnltps, cmpnleps, cmpordps];
    const DOUBLES: [Run; 8] =
        [cmpeqpd, cmpltpd, cmplepd, cmpunordpd, cmpneqpd, cmpnltpd, cmpnlepd, cmpordpd];
    const SINGLE: [Run; 8] =
        [cmpeqss, cmpltss, cmpless, cmpunordss, cmpneqss, cmpnltss, cmpnless, cmpordss];
    const DOUBLE: [Run; 8] =
        [cmpeqsd, cmpltsd, cmplesd, cmpunordsd, cmpneqsd, cmpnltsd, cmpnlesd, cmpordsd];
    let predicate = usize::from(predicate & 7);
    match shape {
        Shape::PackedSingle => SINGLES[predicate],
        Shape::PackedDouble => DOUBLES[predicate],
        Shape::ScalarSingle => SINGLE[predicate],
        Shape::ScalarDouble => DOUBLE[predicate],
    }
}

/// An ordering as `COMISS` reports it in ZF, PF and CF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ordering {
    /// ZF.
    pub(super) zero: bool,
    /// PF.
    pub(super) parity: bool,
    /// CF.
    pub(super) carry: bool,
    /// MXCSR flags raised.
    pub(super) flags: u32,
}

macro_rules! orderings {
    ($($name:ident: $instruction:literal)+) => {$(
        #[doc = concat!("`", $instruction, "`.")]
        #[inline]
        pub(super) fn $name(first: u128, second: u128, mxcsr: u32) -> Ordering {
            let modes = control(mxcsr);
            let mut status = 0_u32;
            let (zero, parity, carry): (u8, u8, u8);
            // SAFETY: as for the operations above; besides the locals the block writes three byte
            // registers and RFLAGS, all declared. `ldmxcsr` leaves RFLAGS alone.
            unsafe {
                asm!(
                    "ldmxcsr [{modes}]",
                    concat!($instruction, " {first}, {second}"),
                    "stmxcsr [{status}]",
                    "ldmxcsr [{host}]",
                    "setz {zero}",
                    "setp {parity}",
                    "setc {carry}",
                    modes = in(reg) &raw const modes,
                    host = in(reg) &raw const HOST,
                    status = in(reg) &raw mut status,
                    first = in(xmm_reg) to_vector(first),
                    second = in(xmm_reg) to_vector(second),
                    zero = out(reg_byte) zero,
                    parity = out(reg_byte) parity,
                    carry = out(reg_byte) carry,
                    options(nostack),
                );
            }
            Ordering { zero: zero != 0, parity: parity != 0, carry: carry != 0, flags: status & FLAGS }
        }
    )+};
}

orderings! {
    comiss: "comiss" comisd: "comisd" ucomiss: "ucomiss" ucomisd: "ucomisd"
}

/// An integer result and the MXCSR flags raised.
pub(super) type IntegerOutcome = (u64, u32);

macro_rules! to_integers {
    ($($name:ident: $instruction:literal $modifier:literal)+) => {$(
        #[doc = concat!("`", $instruction, "`, zero-extended.")]
        #[inline]
        pub(super) fn $name(source: u128, mxcsr: u32) -> IntegerOutcome {
            let modes = control(mxcsr);
            let mut status = 0_u32;
            let value: u64;
            // SAFETY: as for the operations above; the block writes one general register.
            unsafe {
                asm!(
                    "ldmxcsr [{modes}]",
                    concat!($instruction, " {value", $modifier, "}, {source}"),
                    "stmxcsr [{status}]",
                    "ldmxcsr [{host}]",
                    modes = in(reg) &raw const modes,
                    host = in(reg) &raw const HOST,
                    status = in(reg) &raw mut status,
                    source = in(xmm_reg) to_vector(source),
                    value = out(reg) value,
                    options(nostack),
                );
            }
            (value, status & FLAGS)
        }
    )+};
}

to_integers! {
    cvtss2si_32: "cvtss2si" ":e" cvtss2si_64: "cvtss2si" ":r"
    cvttss2si_32: "cvttss2si" ":e" cvttss2si_64: "cvttss2si" ":r"
    cvtsd2si_32: "cvtsd2si" ":e" cvtsd2si_64: "cvtsd2si" ":r"
    cvttsd2si_32: "cvttsd2si" ":e" cvttsd2si_64: "cvttsd2si" ":r"
}

macro_rules! from_integers {
    ($($name:ident: $instruction:literal)+) => {$(
        #[doc = concat!("`", $instruction, "` of a 64-bit integer.")]
        #[inline]
        pub(super) fn $name(destination: u128, source: i64, mxcsr: u32) -> Outcome {
            let mut value = to_vector(destination);
            let modes = control(mxcsr);
            let mut status = 0_u32;
            // SAFETY: as for the operations above; the source is a general register.
            unsafe {
                asm!(
                    "ldmxcsr [{modes}]",
                    concat!($instruction, " {value}, {source:r}"),
                    "stmxcsr [{status}]",
                    "ldmxcsr [{host}]",
                    modes = in(reg) &raw const modes,
                    host = in(reg) &raw const HOST,
                    status = in(reg) &raw mut status,
                    value = inout(xmm_reg) value,
                    source = in(reg) source,
                    options(nostack),
                );
            }
            Outcome { value: from_vector(value), flags: status & FLAGS }
        }
    )+};
}

from_integers! {
    cvtsi2ss: "cvtsi2ss" cvtsi2sd: "cvtsi2sd"
}
