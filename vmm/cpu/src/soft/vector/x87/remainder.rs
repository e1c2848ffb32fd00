//! `FPREM` and `FPREM1`, in software: how far one step reduces a large quotient is the CPU's
//! choice within 32 to 63 bits, and must be the same on every host.

use super::arith::{underflowed, write};
use super::stack::{
    C0, C1, C2, C3, DENORMAL, INDEFINITE, INVALID, Stack, UNDERFLOW, extended, sign_exponent,
    significand,
};
use crate::soft::vector::host_x87::{self, Extended};
use crate::state::X87State;

/// Which quotient the remainder belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quotient {
    /// Truncated: `FPREM`.
    Truncated,
    /// Nearest, ties to even: `FPREM1`.
    Nearest,
}

/// What one step gives.
struct Step {
    result: Extended,
    flags: u16,
    /// C0 to C3; nothing if only C2 is cleared, because there is no quotient.
    codes: Option<u16>,
}

/// `ST(0) = remainder of ST(0) by ST(1)`.
pub(super) fn remainder(x87: &mut X87State, quotient: Quotient) {
    x87.set_codes(C1 | C2, 0);
    if x87.is_empty(0) || x87.is_empty(1) {
        underflowed(x87, 0);
        return;
    }
    let step = step(&x87.st(0), &x87.st(1), quotient);
    let tiny = sign_exponent(&step.result) & 0x7FFF == 0 && significand(&step.result) != 0;
    let written = write(x87, 0, (step.result, step.flags), |(result, flags), control| {
        if tiny && !control & UNDERFLOW != 0 {
            (moved_up(&result), flags | UNDERFLOW)
        } else {
            (result, flags)
        }
    });
    if written && let Some(codes) = step.codes {
        x87.set_codes(C0 | C1 | C2 | C3, codes);
    }
}

/// The result of an unmasked underflow: the exponent 24576 higher.
fn moved_up(result: &Extended) -> Extended {
    let shift = significand(result).leading_zeros();
    extended(
        sign_exponent(result) & 0x8000 | (24576 + 1 - shift as u16),
        significand(result) << shift,
    )
}

/// An operand with its exponent and normalised significand.
struct Finite {
    exponent: i32,
    significand: u64,
}

fn finite(value: &Extended) -> Finite {
    let shift = significand(value).leading_zeros();
    let exponent = i32::from(sign_exponent(value) & 0x7FFF).max(1);
    Finite { exponent: exponent - shift as i32, significand: significand(value) << shift }
}

fn is_unsupported(value: &Extended) -> bool {
    sign_exponent(value) & 0x7FFF != 0 && significand(value) >> 63 == 0
}

fn is_infinity_or_nan(value: &Extended) -> bool {
    sign_exponent(value) & 0x7FFF == 0x7FFF
}

fn is_nan(value: &Extended) -> bool {
    is_infinity_or_nan(value) && significand(value) << 1 != 0
}

fn is_denormal(value: &Extended) -> bool {
    sign_exponent(value) & 0x7FFF == 0 && significand(value) != 0
}

fn step(a: &Extended, b: &Extended, quotient: Quotient) -> Step {
    let invalid = Step { result: INDEFINITE, flags: INVALID, codes: None };
    if is_unsupported(a) || is_unsupported(b) {
        return invalid;
    }
    if is_nan(a) || is_nan(b) {
        // The NaN an addition would give, with its flag.
        let (result, status) = host_x87::add(a, b, 0x300);
        return Step { result, flags: status & INVALID, codes: None };
    }
    if is_infinity_or_nan(a) || significand(b) == 0 {
        return invalid;
    }
    let flags = if is_denormal(a) || is_denormal(b) { DENORMAL } else { 0 };
    if significand(a) == 0 {
        return Step { result: *a, flags, codes: Some(0) };
    }
    if is_infinity_or_nan(b) {
        return Step { result: pack(sign_exponent(a) & 0x8000, &finite(a)), flags, codes: Some(0) };
    }
    Step { flags, ..divide(sign_exponent(a) & 0x8000, &finite(a), &finite(b), quotient) }
}

/// The step for nonzero finite operands.
fn divide(sign: u16, a: &Finite, b: &Finite, quotient: Quotient) -> Step {
    let distance = a.exponent - b.exponent;
    if distance < -1 || distance == -1 && quotient == Quotient::Truncated {
        return Step { result: pack(sign, a), flags: 0, codes: Some(0) };
    }
    if distance >= 64 {
        let bits = 32 + distance % 32;
        let rest = ((u128::from(a.significand) << bits) % u128::from(b.significand)) as u64;
        let result =
            pack(sign, &Finite { exponent: b.exponent + distance - bits, significand: rest });
        return Step { result, flags: 0, codes: Some(C2) };
    }
    // In units of half the divisor's last place, so that a distance of -1 is whole.
    let dividend = u128::from(a.significand) << (distance + 1).min(63);
    let (dividend, divisor) = if distance == 63 {
        // One bit short of room: the dividend's last place is then a whole unit.
        (u128::from(a.significand) << 63, u128::from(b.significand))
    } else {
        (dividend, u128::from(b.significand) << 1)
    };
    let (mut whole, mut rest) = (dividend / divisor, dividend % divisor);
    let mut sign = sign;
    if quotient == Quotient::Nearest
        && (rest > divisor - rest || rest == divisor - rest && whole & 1 != 0)
    {
        whole += 1;
        rest = divisor - rest;
        sign ^= 0x8000;
    }
    let units = if distance == 63 { 0 } else { 1 };
    let codes = [(4, C0), (2, C3), (1, C1)]
        .iter()
        .fold(0, |codes, (bit, code)| codes | if whole & bit != 0 { *code } else { 0 });
    if rest == 0 {
        return Step { result: extended(sign, 0), flags: 0, codes: Some(codes) };
    }
    // At most 65 bits; the last is zero when there are as many.
    let shift = rest.leading_zeros() as i32 - 64;
    let significand = if shift < 0 { rest >> -shift } else { rest << shift } as u64;
    let result = pack(sign, &Finite { exponent: b.exponent - units - shift, significand });
    Step { result, flags: 0, codes: Some(codes) }
}

/// The register of a number whose significand, normalised or not, counts at `exponent`; the
/// result of a remainder is always exact, also as a denormal.
fn pack(sign: u16, number: &Finite) -> Extended {
    if number.significand == 0 {
        return extended(sign, 0);
    }
    let shift = number.significand.leading_zeros();
    let (exponent, significand) = (number.exponent - shift as i32, number.significand << shift);
    if exponent >= 1 {
        extended(sign | exponent as u16, significand)
    } else {
        extended(sign, significand >> (1 - exponent))
    }
}
