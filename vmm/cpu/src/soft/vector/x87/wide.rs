//! Numbers of 128 significant bits, on integers alone: what the transcendental functions are
//! computed in. Every operation truncates, with a relative error below 2⁻¹²⁶.

use super::stack::{C1, OVERFLOW, PRECISION, UNDERFLOW, extended, sign_exponent, significand};
use crate::soft::vector::host_x87::{Extended, Outcome};
use std::cmp::Ordering;

const BIAS: i32 = 0x3FFF;
const GREATEST: i32 = 0x7FFE;
/// How far an unmasked overflow or underflow moves the exponent.
const WRAP: i32 = 24576;

/// `±significand / 2¹²⁷ · 2^exponent`; the significand's top bit is set, or it is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wide {
    pub(super) negative: bool,
    pub(super) exponent: i32,
    pub(super) significand: u128,
}

impl Wide {
    pub(super) const ZERO: Self = Self { negative: false, exponent: 0, significand: 0 };
    pub(super) const ONE: Self = Self::constant(0, 1 << 127);

    /// A positive constant.
    pub(super) const fn constant(exponent: i32, significand: u128) -> Self {
        Self { negative: false, exponent, significand }
    }

    /// A number whose significand need not be normalised.
    pub(super) fn normalised(negative: bool, exponent: i32, significand: u128) -> Self {
        if significand == 0 {
            return Self { negative, ..Self::ZERO };
        }
        let shift = significand.leading_zeros();
        Self { negative, exponent: exponent - shift as i32, significand: significand << shift }
    }

    /// An integer.
    pub(super) fn integer(value: i32) -> Self {
        Self::normalised(value < 0, 127, u128::from(value.unsigned_abs()))
    }

    /// A finite register, denormals included.
    pub(super) fn from_extended(value: &Extended) -> Self {
        let exponent = i32::from(sign_exponent(value) & 0x7FFF).max(1) - BIAS;
        Self::normalised(
            sign_exponent(value) & 0x8000 != 0,
            exponent,
            u128::from(significand(value)) << 64,
        )
    }

    pub(super) const fn is_zero(self) -> bool {
        self.significand == 0
    }

    pub(super) const fn negated(self) -> Self {
        Self { negative: !self.negative, ..self }
    }

    pub(super) const fn magnitude(self) -> Self {
        Self { negative: false, ..self }
    }

    /// The number times a power of two.
    pub(super) const fn scaled(self, power: i32) -> Self {
        Self { exponent: self.exponent + power, ..self }
    }

    /// Orders magnitudes.
    pub(super) fn compare_magnitude(self, other: Self) -> Ordering {
        match (self.is_zero(), other.is_zero()) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
            _ => (self.exponent, self.significand).cmp(&(other.exponent, other.significand)),
        }
    }

    pub(super) fn add(self, other: Self) -> Self {
        let (large, small) = if self.compare_magnitude(other) == Ordering::Less {
            (other, self)
        } else {
            (self, other)
        };
        if small.is_zero() {
            return large;
        }
        let distance = (large.exponent - small.exponent) as u32;
        let shifted = small.significand.checked_shr(distance).unwrap_or(0);
        let lost = distance > 0 && (distance > 127 || small.significand << (128 - distance) != 0);
        if large.negative != small.negative {
            // What is lost of the small one would have been subtracted as well.
            let significand = large.significand - shifted - u128::from(lost);
            return Self::normalised(large.negative, large.exponent, significand);
        }
        let (sum, carry) = large.significand.overflowing_add(shifted);
        if carry {
            let significand = sum >> 1 | 1 << 127 | sum & 1 | u128::from(lost);
            return Self { negative: large.negative, exponent: large.exponent + 1, significand };
        }
        Self {
            negative: large.negative,
            exponent: large.exponent,
            significand: sum | u128::from(lost),
        }
    }

    pub(super) fn sub(self, other: Self) -> Self {
        self.add(other.negated())
    }

    pub(super) fn mul(self, other: Self) -> Self {
        let negative = self.negative != other.negative;
        if self.is_zero() || other.is_zero() {
            return Self { negative, ..Self::ZERO };
        }
        let high = high_product(self.significand, other.significand);
        let exponent = self.exponent + other.exponent + 1;
        Self::normalised(negative, exponent, high)
    }

    /// The quotient; `other` is not zero.
    pub(super) fn div(self, other: Self) -> Self {
        let negative = self.negative != other.negative;
        if self.is_zero() {
            return Self { negative, ..Self::ZERO };
        }
        let (mut quotient, mut rest) = (0_u128, self.significand);
        let mut exponent = self.exponent - other.exponent;
        if rest < other.significand {
            exponent -= 1;
        } else {
            rest -= other.significand;
            quotient = 1;
        }
        // The first quotient bit is set after this many doublings of the rest.
        let steps = if quotient == 1 { 127 } else { 128 };
        for _ in 0..steps {
            let carry = rest >> 127 != 0;
            rest <<= 1;
            quotient <<= 1;
            if carry || rest >= other.significand {
                rest = rest.wrapping_sub(other.significand);
                quotient |= 1;
            }
        }
        Self { negative, exponent, significand: quotient }
    }

    /// The quotient by a small divisor, below 2³².
    pub(super) fn div_small(self, divisor: u32) -> Self {
        let divisor = u128::from(divisor);
        let (quotient, rest) = (self.significand / divisor, self.significand % divisor);
        if quotient == 0 {
            return Self { negative: self.negative, ..Self::ZERO };
        }
        let shift = quotient.leading_zeros();
        let significand = (quotient << shift) | ((rest << shift) / divisor);
        Self { negative: self.negative, exponent: self.exponent - shift as i32, significand }
    }

    /// Rounds to a register as RC of `control` wants. With `inexact` the number stands for one a
    /// little above it in magnitude. Precision control does not apply to what this serves.
    pub(super) fn rounded(self, inexact: bool, control: u16) -> Outcome<Extended> {
        let sign = if self.negative { 0x8000 } else { 0 };
        if self.is_zero() {
            return (extended(sign, 0), 0);
        }
        let (exponent, digits, up, rest) = self.round_to_64(0, inexact, control);
        let biased = exponent + BIAS;
        let mut status = if rest { PRECISION } else { 0 } | if up { C1 } else { 0 };
        if biased > GREATEST {
            if control & OVERFLOW == 0 {
                return (extended(sign | (biased - WRAP) as u16, digits), status | OVERFLOW);
            }
            let away = rounds_away(control, self.negative).unwrap_or(true);
            let largest = if away {
                extended(sign | 0x7FFF, 1 << 63)
            } else {
                extended(sign | 0x7FFE, u64::MAX)
            };
            return (largest, OVERFLOW | PRECISION | if away { C1 } else { 0 });
        }
        if biased >= 1 {
            return (extended(sign | biased as u16, digits), status);
        }
        if control & UNDERFLOW == 0 {
            return (extended(sign | (biased + WRAP) as u16, digits), status | UNDERFLOW);
        }
        let shift = (1 - (self.exponent + BIAS)) as u32;
        let (_, digits, up, rest) = self.round_to_64(shift, inexact, control);
        status = if up { C1 } else { 0 } | if rest { PRECISION | UNDERFLOW } else { 0 };
        // Rounding up to the least normal number sets the bit that makes the exponent 1.
        (extended(sign | (digits >> 63) as u16, digits), status)
    }

    /// The significand shifted right and rounded to 64 bits: the exponent (for a shift of zero),
    /// the digits, whether they were rounded up, whether anything was cut off.
    fn round_to_64(self, shift: u32, inexact: bool, control: u16) -> (i32, u64, bool, bool) {
        let lost = shift > 0 && (shift > 127 || self.significand << (128 - shift) != 0);
        let shifted = self.significand.checked_shr(shift).unwrap_or(0);
        let (digits, below) = ((shifted >> 64) as u64, shifted as u64);
        let sticky = lost || inexact;
        let rest = below != 0 || sticky;
        let up = match rounds_away(control, self.negative) {
            None => below > 1 << 63 || below == 1 << 63 && (sticky || digits & 1 != 0),
            Some(away) => away && rest,
        };
        match digits.checked_add(u64::from(up)) {
            Some(digits) => (self.exponent, digits, up, rest),
            None => (self.exponent + 1, 1 << 63, up, rest),
        }
    }
}

/// Whether RC rounds away from zero; nothing for rounding to nearest.
fn rounds_away(control: u16, negative: bool) -> Option<bool> {
    match control >> 10 & 3 {
        0 => None,
        1 => Some(negative),
        2 => Some(!negative),
        _ => Some(false),
    }
}

/// The upper half of a 256-bit product.
fn high_product(a: u128, b: u128) -> u128 {
    const LOW: u128 = u64::MAX as u128;
    let (a1, a0, b1, b0) = (a >> 64, a & LOW, b >> 64, b & LOW);
    let middle = a1 * b0 + ((a0 * b0) >> 64);
    let (middle, carry) = middle.overflowing_add(a0 * b1);
    a1 * b1 + (middle >> 64) + (u128::from(carry) << 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soft::vector::host_x87;
    use crate::soft::vector::tests::values::Random;

    fn finite(random: &mut Random) -> Extended {
        loop {
            let value = random.extended();
            let exponent = sign_exponent(&value) & 0x7FFF;
            if exponent != 0x7FFF
                && (exponent == 0 || significand(&value) >> 63 != 0)
                && significand(&value) != 0
            {
                return value;
            }
        }
    }

    #[test]
    fn products_quotients_and_sums_round_as_the_host_rounds() {
        let mut random = Random::new(11);
        for _ in 0..20_000 {
            let (a, b) = (finite(&mut random), finite(&mut random));
            let control = 0x33F | (random.next() as u16 & 0xC00);
            let (x, y) = (Wide::from_extended(&a), Wide::from_extended(&b));
            // A product is exact in 128 bits; what the others cut off only matters as inexactness.
            let product = x.mul(y).rounded(false, control);
            assert_eq!(product.0, host_x87::mul(&a, &b, control).0, "{a:02x?} * {b:02x?}");
            let quotient = x.div(y);
            let exact = quotient.mul(y) == x;
            assert_eq!(
                quotient.rounded(!exact, control).0,
                host_x87::div(&a, &b, control).0,
                "{a:02x?} / {b:02x?}"
            );
            let sum = x.add(y);
            if !sum.is_zero() && (x.negative == y.negative || (x.exponent - y.exponent).abs() < 60)
            {
                assert_eq!(
                    sum.rounded(false, control).0,
                    host_x87::add(&a, &b, control).0,
                    "{a:02x?} + {b:02x?}"
                );
            }
        }
    }

    #[test]
    fn a_small_divisor_divides_like_any_other() {
        let mut random = Random::new(12);
        for _ in 0..1000 {
            let x = Wide::from_extended(&finite(&mut random));
            let divisor = random.below(2000) as u32 + 1;
            assert_eq!(x.div_small(divisor), x.div(Wide::integer(divisor as i32)));
        }
    }
}
