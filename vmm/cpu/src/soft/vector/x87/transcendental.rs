//! `FSIN`, `FCOS`, `FSINCOS`, `FPTAN`, `FPATAN`, `F2XM1`, `FYL2X`, `FYL2XP1`, in software,
//! because CPUs give different last bits: their special operands, and the rounding of the rest.

use super::arith::{has_one_and_room, underflowed, write};
use super::series;
use super::stack::{
    C1, C2, DENORMAL, DIVIDE_BY_ZERO, EXCEPTIONS, INDEFINITE, INVALID, PRECISION, Stack, UNDERFLOW,
    extended, sign_exponent, significand,
};
use super::wide::Wide;
use crate::soft::vector::host_x87::{self, Extended, Outcome};
use crate::state::X87State;
use std::cmp::Ordering;

/// What an operand is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Zero,
    Denormal,
    Normal,
    Infinity,
    Nan,
    Unsupported,
}

fn class(value: &Extended) -> Class {
    match (sign_exponent(value) & 0x7FFF, significand(value)) {
        (0, 0) => Class::Zero,
        (0, _) => Class::Denormal,
        (_, significand) if significand >> 63 == 0 => Class::Unsupported,
        (0x7FFF, 0x8000_0000_0000_0000) => Class::Infinity,
        (0x7FFF, _) => Class::Nan,
        _ => Class::Normal,
    }
}

fn is_negative(value: &Extended) -> bool {
    sign_exponent(value) & 0x8000 != 0
}

fn sign(negative: bool) -> u16 {
    if negative { 0x8000 } else { 0 }
}

fn zero(negative: bool) -> Extended {
    extended(sign(negative), 0)
}

fn infinity(negative: bool) -> Extended {
    extended(sign(negative) | 0x7FFF, 1 << 63)
}

const INVALID_RESULT: Outcome<Extended> = (INDEFINITE, INVALID);

/// The result for operands of which one is a NaN or unsupported: as an addition has it.
fn of_nans(a: &Extended, b: &Extended) -> Option<Outcome<Extended>> {
    let decides = |value| matches!(class(value), Class::Nan | Class::Unsupported);
    if !decides(a) && !decides(b) {
        return None;
    }
    let (result, status) = host_x87::add(a, b, 0x300);
    Some((result, status & INVALID))
}

/// DE if an operand is a denormal.
fn denormal_flag(operands: &[&Extended]) -> u16 {
    if operands.iter().any(|value| class(value) == Class::Denormal) { DENORMAL } else { 0 }
}

/// A result that is never exact.
fn inexact(value: Wide, control: u16, flags: u16) -> Outcome<Extended> {
    let (result, status) = value.rounded(true, control);
    (result, status | PRECISION | flags)
}

/// Whether the operand is outside ±2⁶³, where C2 says that nothing was done.
fn is_out_of_range(value: &Extended) -> bool {
    class(value) == Class::Normal && sign_exponent(value) & 0x7FFF >= 0x3FFF + 63
}

/// sin and cos of an operand in range, not zero.
fn sine_and_cosine(x: &Extended) -> (Wide, Wide) {
    let (rest, quadrant) = series::reduce(Wide::from_extended(x));
    let (sine, cosine) = (series::sine(rest), series::cosine(rest));
    match quadrant {
        0 => (sine, cosine),
        1 => (cosine, sine.negated()),
        2 => (sine.negated(), cosine.negated()),
        _ => (cosine.negated(), sine),
    }
}

/// The functions of one angle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trigonometric {
    /// `FSIN`, and the first result of `FSINCOS`.
    Sine,
    /// `FCOS`, and the second result of `FSINCOS`.
    Cosine,
    /// The first result of `FPTAN`.
    Tangent,
}

fn trigonometric(function: Trigonometric, x: &Extended, control: u16) -> Outcome<Extended> {
    match class(x) {
        Class::Nan | Class::Unsupported => return of_nans(x, x).unwrap_or(INVALID_RESULT),
        Class::Infinity => return INVALID_RESULT,
        Class::Zero if function == Trigonometric::Cosine => {
            return Wide::ONE.rounded(false, control);
        }
        Class::Zero => return (*x, 0),
        Class::Denormal | Class::Normal => {}
    }
    let (sine, cosine) = sine_and_cosine(x);
    let value = match function {
        Trigonometric::Sine => sine,
        Trigonometric::Cosine => cosine,
        Trigonometric::Tangent => sine.div(cosine),
    };
    inexact(value, control, denormal_flag(&[x]))
}

/// `FSIN`, `FCOS`.
pub(super) fn of_angle(x87: &mut X87State, function: Trigonometric) {
    x87.set_codes(C2, 0);
    if x87.is_empty(0) {
        underflowed(x87, 0);
        return;
    }
    let x = x87.st(0);
    if is_out_of_range(&x) {
        x87.set_codes(C1 | C2, C2);
        return;
    }
    let outcome = trigonometric(function, &x, x87.control);
    write(x87, 0, outcome, |outcome, _| outcome);
}

/// `FSINCOS` and `FPTAN`: the first result replaces ST(0), the second is pushed.
fn of_angle_with_push(
    x87: &mut X87State,
    function: Trigonometric,
    second: impl FnOnce(&Extended, u16) -> Outcome<Extended>,
) {
    x87.set_codes(C2, 0);
    if !has_one_and_room(x87) {
        return;
    }
    let x = x87.st(0);
    if is_out_of_range(&x) {
        x87.set_codes(C1 | C2, C2);
        return;
    }
    let outcome = trigonometric(function, &x, x87.control);
    let (pushed, status) = second(&x, x87.control);
    if write(x87, 0, outcome, |outcome, _| outcome) {
        x87.push(pushed);
        x87.raise(status & EXCEPTIONS);
    }
}

/// `FSINCOS`.
pub(super) fn sine_cosine(x87: &mut X87State) {
    of_angle_with_push(x87, Trigonometric::Sine, |x, control| {
        trigonometric(Trigonometric::Cosine, x, control)
    });
}

/// `FPTAN`: pushes one, or the NaN again.
pub(super) fn partial_tangent(x87: &mut X87State) {
    of_angle_with_push(x87, Trigonometric::Tangent, |x, control| match class(x) {
        Class::Zero | Class::Denormal | Class::Normal => (extended(0x3FFF, 1 << 63), 0),
        _ => trigonometric(Trigonometric::Tangent, x, control),
    });
}

/// `ST(1) = f(ST(1), ST(0))`, then a pop.
pub(super) fn of_two(x87: &mut X87State, f: fn(&Extended, &Extended, u16) -> Outcome<Extended>) {
    let written = if x87.is_empty(0) || x87.is_empty(1) {
        underflowed(x87, 1)
    } else {
        let outcome = f(&x87.st(1), &x87.st(0), x87.control);
        write(x87, 1, outcome, |outcome, _| outcome)
    };
    if written {
        x87.pop();
    }
}

/// `FPATAN`: the angle of the point (x, y), -π to π (SDM volume 2, table 3-30).
pub(super) fn arctangent(y: &Extended, x: &Extended, control: u16) -> Outcome<Extended> {
    if let Some(outcome) = of_nans(y, x) {
        return outcome;
    }
    let flags = denormal_flag(&[y, x]);
    let signed = |value: Wide| Wide { negative: is_negative(y), ..value };
    let left = is_negative(x);
    let three_quarters = series::PI.sub(series::QUARTER_PI);
    let fixed = match (class(y), class(x)) {
        (Class::Infinity, Class::Infinity) if left => three_quarters,
        (Class::Infinity, Class::Infinity) => series::QUARTER_PI,
        (Class::Infinity, _) | (_, Class::Zero) if class(y) != Class::Zero => series::HALF_PI,
        (Class::Zero, _) | (_, Class::Infinity) if left => series::PI,
        (Class::Zero, _) | (_, Class::Infinity) => return (zero(is_negative(y)), flags),
        _ => return inexact(signed(angle(y, x)), control, flags),
    };
    inexact(signed(fixed), control, flags)
}

/// The magnitude of the angle of finite nonzero coordinates.
fn angle(y: &Extended, x: &Extended) -> Wide {
    let (up, along) = (Wide::from_extended(y).magnitude(), Wide::from_extended(x).magnitude());
    let right = if up.compare_magnitude(along) == Ordering::Greater {
        series::HALF_PI.sub(series::arctangent_of_ratio(along, up))
    } else {
        series::arctangent_of_ratio(up, along)
    };
    if is_negative(x) { series::PI.sub(right) } else { right }
}

/// `F2XM1`. Outside ±1 the manual leaves the result undefined; the operand stays, as on Intel.
pub(super) fn exponential(x87: &mut X87State) {
    if x87.is_empty(0) {
        underflowed(x87, 0);
        return;
    }
    let x = x87.st(0);
    let outcome = exponential_minus_one(&x, x87.control);
    write(x87, 0, outcome, |outcome, _| outcome);
}

fn exponential_minus_one(x: &Extended, control: u16) -> Outcome<Extended> {
    match class(x) {
        Class::Nan | Class::Unsupported => return of_nans(x, x).unwrap_or(INVALID_RESULT),
        Class::Infinity if is_negative(x) => return (extended(0xBFFF, 1 << 63), 0),
        Class::Infinity | Class::Zero => return (*x, 0),
        Class::Denormal | Class::Normal => {}
    }
    let value = Wide::from_extended(x);
    match value.magnitude().compare_magnitude(Wide::ONE) {
        Ordering::Greater => (*x, PRECISION),
        // 2 - 1 and 1/2 - 1; flagged as inexact all the same, as on Intel.
        Ordering::Equal if value.negative => (extended(0xBFFE, 1 << 63), PRECISION),
        Ordering::Equal => (extended(0x3FFF, 1 << 63), PRECISION),
        Ordering::Less => {
            inexact(series::exponential_minus_one(value), control, denormal_flag(&[x]))
        }
    }
}

/// The product of `y` and an infinity.
fn times_infinity(y: &Extended, negative: bool, flags: u16) -> Outcome<Extended> {
    if class(y) == Class::Zero {
        INVALID_RESULT
    } else {
        (infinity(is_negative(y) != negative), flags)
    }
}

/// The product of `y` and the logarithm given, which may be zero.
fn times_logarithm(
    y: &Extended,
    logarithm: Wide,
    exact: bool,
    control: u16,
    flags: u16,
) -> Outcome<Extended> {
    match class(y) {
        Class::Infinity if logarithm.is_zero() => INVALID_RESULT,
        Class::Infinity => (infinity(is_negative(y) != logarithm.negative), flags),
        Class::Zero => (zero(is_negative(y) != logarithm.negative), flags),
        _ if logarithm.is_zero() => (zero(is_negative(y) != logarithm.negative), flags),
        _ => {
            let product = logarithm.mul(Wide::from_extended(y));
            let (result, status) = product.rounded(!exact, control);
            // An exact product is flagged like the others, as on Intel.
            let tiny = if class(&result) == Class::Denormal { UNDERFLOW } else { 0 };
            (result, status | PRECISION | tiny | flags)
        }
    }
}

/// `FYL2X`: y·log₂ x (SDM volume 2, table 3-60).
pub(super) fn logarithm(y: &Extended, x: &Extended, control: u16) -> Outcome<Extended> {
    if let Some(outcome) = of_nans(y, x) {
        return outcome;
    }
    let flags = denormal_flag(&[y, x]);
    match class(x) {
        Class::Zero if class(y) == Class::Infinity => return (infinity(!is_negative(y)), flags),
        Class::Zero if class(y) == Class::Zero => return INVALID_RESULT,
        // Silicon does not report a denormal factor here.
        Class::Zero => return (infinity(!is_negative(y)), DIVIDE_BY_ZERO),
        _ if is_negative(x) => return INVALID_RESULT,
        Class::Infinity => return times_infinity(y, false, flags),
        _ => {}
    }
    let value = Wide::from_extended(x);
    // The logarithm of a power of two is a whole number, and its product short enough.
    let exact = value.significand == 1 << 127;
    times_logarithm(y, series::logarithm(value), exact, control, flags)
}

/// `FYL2XP1`: y·log₂(x + 1). The manual defines it for |x| up to 1 - √½; beyond, it is computed
/// all the same as long as x is above -1, and is x itself from there on, as on Intel.
pub(super) fn logarithm_of_one_plus(y: &Extended, x: &Extended, control: u16) -> Outcome<Extended> {
    if let Some(outcome) = of_nans(y, x) {
        return outcome;
    }
    let flags = denormal_flag(&[y, x]);
    if class(x) == Class::Infinity {
        return if is_negative(x) { INVALID_RESULT } else { times_infinity(y, false, flags) };
    }
    let value = Wide::from_extended(x);
    if value.negative && value.compare_magnitude(Wide::ONE) != Ordering::Less {
        return match class(y) {
            Class::Infinity => (infinity(!is_negative(y)), flags),
            Class::Zero => (zero(!is_negative(y)), flags),
            _ => (*x, PRECISION | flags),
        };
    }
    let logarithm = if value.is_zero() { value } else { series::logarithm_of_one_plus(value) };
    times_logarithm(y, logarithm, value.is_zero(), control, flags)
}
