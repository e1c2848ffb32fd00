//! x87 arithmetic done by the host's own x87 unit under the guest's precision and rounding.
//!
//! This stays deterministic across hosts: every operation here is exact or correctly rounded,
//! and the architecture manuals fix its result, flags and NaN choice on each x86-64 CPU. The
//! operations for which CPUs differ (the transcendental ones, and how far `FPREM` reduces in
//! one step) are done in software elsewhere. Exceptions are masked while the operation runs.

use super::float::Kind;
use std::arch::asm;

/// Control word bits that steer a result: PC and RC.
const MODES: u16 = 0x0F00;
const ALL_MASKED: u16 = 0x3F;
const PRECISION_FLAG: u16 = 1 << 5;
/// RC as the x87 control word has it, from where MXCSR has it.
const fn rounding(mxcsr: u32) -> u16 {
    ((mxcsr >> 13 & 3) << 10) as u16
}

/// Declares exactness probes: does `op` on doubles need rounding to this many bits when the
/// exponent is (nearly) unbounded?
macro_rules! probes {
    ($($name:ident: $instruction:literal)+) => {$(
        fn $name(a: &f64, b: &f64, control: u16) -> u16 {
            let mut host = 0_u16;
            let status: u16;
            // SAFETY: the block reads the two doubles and the control word and writes `host` and
            // AX, all valid and declared. Every x87 register is declared clobbered, so the stack
            // is empty on entry; two values are pushed, the operation pops one, `fstp` the other,
            // so it is empty on exit. All exceptions are masked and the flags cleared before the
            // host's control word returns, so nothing traps.
            unsafe {
                asm!(
                    "fnstcw word ptr [{host}]",
                    "fnclex",
                    "fldcw word ptr [{control}]",
                    "fld qword ptr [{a}]",
                    "fld qword ptr [{b}]",
                    $instruction,
                    "fnstsw ax",
                    "fstp st(0)",
                    "fnclex",
                    "fldcw word ptr [{host}]",
                    host = in(reg) &raw mut host,
                    control = in(reg) &raw const control,
                    a = in(reg) a,
                    b = in(reg) b,
                    out("ax") status,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                    options(nostack),
                );
            }
            status
        }
    )+};
}

probes! {
    probe_add: "faddp st(1), st"
    probe_sub: "fsubp st(1), st"
    probe_mul: "fmulp st(1), st"
    probe_div: "fdivp st(1), st"
}

/// Whether the operation on finite doubles is inexact when rounded to 24 (`single`) or 53 bits
/// with MXCSR's rounding mode but no limit on the exponent that doubles could reach.
pub(super) fn is_inexact_unbounded(kind: Kind, a: f64, b: f64, single: bool, mxcsr: u32) -> bool {
    let precision = if single { 0 } else { 0x200 };
    let control = (precision | rounding(mxcsr)) & MODES | ALL_MASKED;
    let status = match kind {
        Kind::Add => probe_add(&a, &b, control),
        Kind::Sub => probe_sub(&a, &b, control),
        Kind::Mul => probe_mul(&a, &b, control),
        Kind::Div => probe_div(&a, &b, control),
        Kind::Min | Kind::Max | Kind::Sqrt => 0,
    };
    status & PRECISION_FLAG != 0
}
