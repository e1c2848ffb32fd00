//! Results when overflow or underflow is unmasked: rounded as if the exponent had no bound, then
//! moved by 24576 so that they fit (SDM volume 1, 8.5.4 and 8.5.5).

use super::arith::{Binary, Kind};
use super::stack::{
    C1, EXCEPTIONS, OVERFLOW, PRECISION, UNDERFLOW, extended, sign_exponent, significand,
};
use crate::soft::vector::host_x87::{Extended, Outcome};

const BIAS: i32 = 0x3FFF;
/// The adjustment of the exponent.
const WRAP: i32 = 24576;
const GREATEST: i32 = 0x7FFE;

/// A finite nonzero number: sign, biased exponent (of any size), normalised significand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Number {
    sign: u16,
    exponent: i32,
    significand: u64,
}

impl Number {
    /// `None` for zeros, infinities, NaNs and unsupported encodings.
    fn new(value: &Extended) -> Option<Self> {
        let (sign, exponent) =
            (sign_exponent(value) & 0x8000, i32::from(sign_exponent(value) & 0x7FFF));
        let significand = significand(value);
        if significand == 0 || exponent == 0x7FFF {
            return None;
        }
        let shift = significand.leading_zeros();
        Some(Self {
            sign,
            exponent: exponent.max(1) - shift as i32,
            significand: significand << shift,
        })
    }

    /// The number with another exponent, which must be a normal one.
    fn with_exponent(self, exponent: i32) -> Extended {
        extended(self.sign | exponent as u16, self.significand)
    }
}

/// Whether this outcome is an overflow or underflow that `control` does not mask: then which.
fn trapped(outcome: &Outcome<Extended>, control: u16) -> Option<u16> {
    let open = !control;
    let (result, status) = outcome;
    let tiny = sign_exponent(result) & 0x7FFF == 0 && significand(result) != 0;
    if open & OVERFLOW != 0 && status & OVERFLOW != 0 {
        Some(OVERFLOW)
    } else if open & UNDERFLOW != 0 && (status & UNDERFLOW != 0 || tiny) {
        Some(UNDERFLOW)
    } else {
        None
    }
}

/// The outcome as `control` wants it: unchanged, or computed again away from the bounds.
pub(super) fn again(
    kind: Kind,
    run: Binary,
    a: &Extended,
    b: &Extended,
    outcome: Outcome<Extended>,
    control: u16,
) -> Outcome<Extended> {
    let Some(flag) = trapped(&outcome, control) else { return outcome };
    // Operands whose exponents are moved so that the result is an ordinary number, and how far
    // that result is from the true one.
    let (p, q, distance) = match (kind, Number::new(a), Number::new(b)) {
        (Kind::Sum, x, y) => {
            let exponent =
                |number: Option<Number>| number.map_or(i32::MIN, |number| number.exponent);
            let distance = exponent(x).max(exponent(y)) - BIAS;
            // A sum that leaves the range has a greater operand near the bound; the lesser one, if
            // far below, only has to stay as it is: nonzero and far below, or zero.
            let moved = |number: Option<Number>, value: &Extended| {
                number.map_or(*value, |number| {
                    number.with_exponent((number.exponent - distance).max(1))
                })
            };
            (moved(x, a), moved(y, b), distance)
        }
        (_, Some(x), Some(y)) => {
            let exponents = (x.exponent - BIAS, y.exponent - BIAS);
            let distance = match kind {
                Kind::Quotient => exponents.0 - exponents.1,
                Kind::QuotientReversed => exponents.1 - exponents.0,
                _ => exponents.0 + exponents.1,
            };
            (x.with_exponent(BIAS), y.with_exponent(BIAS), distance)
        }
        _ => return outcome,
    };
    let (result, status) = run(&p, &q, control);
    wrapped(
        &result,
        distance,
        status & (PRECISION | C1) | outcome.1 & EXCEPTIONS & !PRECISION,
        flag,
    )
}

/// A result of true exponent `distance` above what it has, moved into range.
fn wrapped(result: &Extended, distance: i32, status: u16, flag: u16) -> Outcome<Extended> {
    let Some(number) = Number::new(result) else { return (*result, status | flag) };
    let moved = if flag == OVERFLOW { -WRAP } else { WRAP };
    let exponent = number.exponent + distance + moved;
    debug_assert!(
        (1..=GREATEST).contains(&exponent),
        "one adjustment brings any product into range"
    );
    (number.with_exponent(exponent), status | flag)
}

/// `FSCALE` with overflow or underflow unmasked; beyond the adjustment's reach the result is
/// an infinity or zero.
pub(super) fn scale_again(
    a: &Extended,
    b: &Extended,
    outcome: Outcome<Extended>,
    control: u16,
) -> Outcome<Extended> {
    let Some(flag) = trapped(&outcome, control) else { return outcome };
    let (Some(x), Some(by)) = (Number::new(a), Number::new(b)) else { return outcome };
    // The truncated power, limited to what cannot matter any more.
    let magnitude = match by.exponent - BIAS {
        ..0 => 0,
        exponent @ 0..=16 => (by.significand >> (63 - exponent)) as i32,
        _ => 0x2_0000,
    };
    let power = if by.sign == 0 { magnitude } else { -magnitude };
    let moved = if flag == OVERFLOW { -WRAP } else { WRAP };
    let exponent = x.exponent + power + moved;
    let status = outcome.1 & EXCEPTIONS & !PRECISION | flag;
    match exponent {
        1..=GREATEST => (x.with_exponent(exponent), status),
        ..1 => (extended(x.sign, 0), status | PRECISION),
        _ => (extended(x.sign | 0x7FFF, 1 << 63), status | PRECISION | C1),
    }
}
