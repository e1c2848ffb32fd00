//! x87 arithmetic done by the host's own x87 unit under the guest's precision and rounding.
//!
//! This stays deterministic across hosts: every operation here is exact or correctly rounded,
//! and the architecture manuals fix its result, flags and NaN choice on each x86-64 CPU. The
//! operations for which CPUs differ (the transcendental ones, and how far `FPREM` reduces in
//! one step) are done in software in `x87`. Exceptions are masked while the operation runs.

use super::float::Kind;
use std::arch::asm;

/// Control word bits that steer a result: PC and RC.
const MODES: u16 = 0x0F00;
/// Every exception masked; bit 6 always reads as one. With the usual PC and RC this is the word that
/// is in force anyway, and loading an equal word is much faster.
const ALL_MASKED: u16 = 0x7F;
const PRECISION_FLAG: u16 = 1 << 5;
/// RC for truncation.
const TRUNCATE: u16 = 0x0C00;

/// An x87 register: significand, then sign and exponent.
pub(super) type Extended = [u8; 10];

/// A result and the status word after the operation: flags in bits 0–5, C1 and the other
/// condition codes where the status word has them.
pub(super) type Outcome<T> = (T, u16);

/// The guest's modes with every exception masked.
const fn control(guest: u16) -> u16 {
    guest & MODES | ALL_MASKED
}

/// Runs x87 instructions with the stack empty and `$control` loaded; they leave the stack empty,
/// and may use the operands given, and `fnstsw ax` once.
///
/// Each use is sound for the same reasons: the operands are pointers to local values or borrows
/// of the size the instructions access, alive throughout; every x87 register is declared
/// clobbered, so the stack is empty on entry, and each use pops what it pushes; every exception is
/// masked by the control word in force, and by the host's own, which Rust knows only in its default,
/// so nothing traps, then or later. The exception flags, like RFLAGS, a block without
/// `preserves_flags` may change; AX and memory are declared or implied.
macro_rules! on_host {
    ($control:expr; $($line:literal),+; $($operand:ident = $value:expr),+) => {{
        let guest: u16 = $control;
        let mut host = 0_u16;
        let status: u16;
        // SAFETY: see the macro's documentation.
        unsafe {
            asm!(
                "fnstcw word ptr [{host}]",
                "fnclex",
                "fldcw word ptr [{guest}]",
                $($line,)+
                "fldcw word ptr [{host}]",
                host = in(reg) &raw mut host,
                guest = in(reg) &raw const guest,
                $($operand = in(reg) $value,)+
                out("ax") status,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                options(nostack),
            );
        }
        status
    }};
}

/// Declares `fn(a, b, control) -> (result, status)` of a register and another operand.
macro_rules! operations {
    ($($name:ident($type:ty): $load:literal, $instruction:literal, $drop:literal)+) => {$(
        #[doc = concat!("`", $instruction, "` of `a` and `b`.")]
        pub(super) fn $name(a: &Extended, b: &$type, guest: u16) -> Outcome<Extended> {
            let mut result = [0; 10];
            let status = on_host!(control(guest);
                $load, "fld tbyte ptr [{a}]", $instruction, "fnstsw ax", "fstp tbyte ptr [{result}]", $drop;
                a = a.as_ptr(), b = b.as_ptr(), result = result.as_mut_ptr());
            (result, status)
        }
    )+};
}

operations! {
    add(Extended): "fld tbyte ptr [{b}]", "fadd st, st(1)", "fstp st(0)"
    sub(Extended): "fld tbyte ptr [{b}]", "fsub st, st(1)", "fstp st(0)"
    sub_reversed(Extended): "fld tbyte ptr [{b}]", "fsubr st, st(1)", "fstp st(0)"
    mul(Extended): "fld tbyte ptr [{b}]", "fmul st, st(1)", "fstp st(0)"
    div(Extended): "fld tbyte ptr [{b}]", "fdiv st, st(1)", "fstp st(0)"
    div_reversed(Extended): "fld tbyte ptr [{b}]", "fdivr st, st(1)", "fstp st(0)"
    scale(Extended): "fld tbyte ptr [{b}]", "fscale", "fstp st(0)"

    add_m32([u8; 4]): "", "fadd dword ptr [{b}]", ""
    sub_m32([u8; 4]): "", "fsub dword ptr [{b}]", ""
    sub_reversed_m32([u8; 4]): "", "fsubr dword ptr [{b}]", ""
    mul_m32([u8; 4]): "", "fmul dword ptr [{b}]", ""
    div_m32([u8; 4]): "", "fdiv dword ptr [{b}]", ""
    div_reversed_m32([u8; 4]): "", "fdivr dword ptr [{b}]", ""

    add_m64([u8; 8]): "", "fadd qword ptr [{b}]", ""
    sub_m64([u8; 8]): "", "fsub qword ptr [{b}]", ""
    sub_reversed_m64([u8; 8]): "", "fsubr qword ptr [{b}]", ""
    mul_m64([u8; 8]): "", "fmul qword ptr [{b}]", ""
    div_m64([u8; 8]): "", "fdiv qword ptr [{b}]", ""
    div_reversed_m64([u8; 8]): "", "fdivr qword ptr [{b}]", ""

    add_i16([u8; 2]): "", "fiadd word ptr [{b}]", ""
    sub_i16([u8; 2]): "", "fisub word ptr [{b}]", ""
    sub_reversed_i16([u8; 2]): "", "fisubr word ptr [{b}]", ""
    mul_i16([u8; 2]): "", "fimul word ptr [{b}]", ""
    div_i16([u8; 2]): "", "fidiv word ptr [{b}]", ""
    div_reversed_i16([u8; 2]): "", "fidivr word ptr [{b}]", ""

    add_i32([u8; 4]): "", "fiadd dword ptr [{b}]", ""
    sub_i32([u8; 4]): "", "fisub dword ptr [{b}]", ""
    sub_reversed_i32([u8; 4]): "", "fisubr dword ptr [{b}]", ""
    mul_i32([u8; 4]): "", "fimul dword ptr [{b}]", ""
    div_i32([u8; 4]): "", "fidiv dword ptr [{b}]", ""
    div_reversed_i32([u8; 4]): "", "fidivr dword ptr [{b}]", ""
}

/// Declares `fn(a, control) -> (result, status)`.
macro_rules! unary_operations {
    ($($name:ident: $instruction:literal)+) => {$(
        #[doc = concat!("`", $instruction, "` of `a`.")]
        pub(super) fn $name(a: &Extended, guest: u16) -> Outcome<Extended> {
            let mut result = [0; 10];
            let status = on_host!(control(guest);
                "fld tbyte ptr [{a}]", $instruction, "fnstsw ax", "fstp tbyte ptr [{result}]";
                a = a.as_ptr(), result = result.as_mut_ptr());
            (result, status)
        }
    )+};
}

unary_operations! {
    sqrt: "fsqrt"
    round_to_integral: "frndint"
}

/// `FXTRACT`: the exponent and the significand.
pub(super) fn extract(a: &Extended, guest: u16) -> Outcome<(Extended, Extended)> {
    let (mut exponent, mut significand) = ([0; 10], [0; 10]);
    let status = on_host!(control(guest);
        "fld tbyte ptr [{a}]", "fxtract", "fnstsw ax",
        "fstp tbyte ptr [{significand}]", "fstp tbyte ptr [{exponent}]";
        a = a.as_ptr(), significand = significand.as_mut_ptr(), exponent = exponent.as_mut_ptr());
    ((exponent, significand), status)
}

/// Declares comparisons `fn(a, b) -> status`.
macro_rules! comparisons {
    ($($name:ident($type:ty): $load:literal, $instruction:literal, $drop:literal)+) => {$(
        #[doc = concat!("`", $instruction, "` of `a` with `b`.")]
        pub(super) fn $name(a: &Extended, b: &$type) -> u16 {
            on_host!(ALL_MASKED;
                $load, "fld tbyte ptr [{a}]", $instruction, "fnstsw ax", "fstp st(0)", $drop;
                a = a.as_ptr(), b = b.as_ptr())
        }
    )+};
}

comparisons! {
    compare(Extended): "fld tbyte ptr [{b}]", "fcom st(1)", "fstp st(0)"
    compare_unordered(Extended): "fld tbyte ptr [{b}]", "fucom st(1)", "fstp st(0)"
    compare_m32([u8; 4]): "", "fcom dword ptr [{b}]", ""
    compare_m64([u8; 8]): "", "fcom qword ptr [{b}]", ""
    compare_i16([u8; 2]): "", "ficom word ptr [{b}]", ""
    compare_i32([u8; 4]): "", "ficom dword ptr [{b}]", ""
}

/// Declares conversions to a register.
macro_rules! loads {
    ($($name:ident($type:ty): $instruction:literal)+) => {$(
        #[doc = concat!("`", $instruction, "`.")]
        pub(super) fn $name(a: &$type) -> Outcome<Extended> {
            let mut result = [0; 10];
            let status = on_host!(0x300 | ALL_MASKED;
                $instruction, "fnstsw ax", "fstp tbyte ptr [{result}]";
                a = a.as_ptr(), result = result.as_mut_ptr());
            (result, status)
        }
    )+};
}

loads! {
    load_m32([u8; 4]): "fld dword ptr [{a}]"
    load_m64([u8; 8]): "fld qword ptr [{a}]"
    load_i16([u8; 2]): "fild word ptr [{a}]"
    load_i32([u8; 4]): "fild dword ptr [{a}]"
    load_i64([u8; 8]): "fild qword ptr [{a}]"
}

/// Declares conversions from a register.
macro_rules! stores {
    ($($name:ident($length:literal): $instruction:literal, $modes:literal)+) => {$(
        #[doc = concat!("`", $instruction, "`.")]
        pub(super) fn $name(a: &Extended, guest: u16) -> Outcome<[u8; $length]> {
            let mut result = [0; $length];
            let status = on_host!(control(guest | $modes);
                "fld tbyte ptr [{a}]", $instruction, "fnstsw ax";
                a = a.as_ptr(), result = result.as_mut_ptr());
            (result, status)
        }
    )+};
}

stores! {
    store_m32(4): "fstp dword ptr [{result}]", 0
    store_m64(8): "fstp qword ptr [{result}]", 0
    store_i16(2): "fistp word ptr [{result}]", 0
    store_i32(4): "fistp dword ptr [{result}]", 0
    store_i64(8): "fistp qword ptr [{result}]", 0
    store_decimal(10): "fbstp tbyte ptr [{result}]", 0
    truncate_i16(2): "fistp word ptr [{result}]", 0x0C00
    truncate_i32(4): "fistp dword ptr [{result}]", 0x0C00
    truncate_i64(8): "fistp qword ptr [{result}]", 0x0C00
}

/// Whether the operation on finite doubles is inexact when rounded to 24 (`single`) or 53 bits
/// with MXCSR's rounding mode, but with more exponent than doubles can use up.
pub(super) fn is_inexact_unbounded(kind: Kind, a: f64, b: f64, single: bool, mxcsr: u32) -> bool {
    let (a, b) = (load_m64(&a.to_le_bytes()).0, load_m64(&b.to_le_bytes()).0);
    let precision = if single { 0 } else { 0x200 };
    let guest = precision | (mxcsr >> 3) as u16 & TRUNCATE;
    let status = match kind {
        Kind::Add => add(&a, &b, guest).1,
        Kind::Sub => sub(&a, &b, guest).1,
        Kind::Mul => mul(&a, &b, guest).1,
        Kind::Div => div(&a, &b, guest).1,
        Kind::Min | Kind::Max | Kind::Sqrt => 0,
    };
    status & PRECISION_FLAG != 0
}
