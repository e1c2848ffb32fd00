//! `RCPPS` and `RSQRTPS`, whose results the architecture bounds but does not fix.
//!
//! CPUs of different makers give different bits, so the host's are not used: a pair on two
//! kinds of hosts would diverge. These are the correctly rounded quotients and square roots, well
//! within the relative error of 1.5·2⁻¹² the manual allows, with its special cases: denormal
//! sources count as zero, tiny results become zero, MXCSR is neither read nor written.

use super::lanes::Lanes;

const QUIET: u32 = 0x0040_0000;
const SIGN: u32 = 0x8000_0000;
const INFINITY: u32 = 0x7F80_0000;
const DEFAULT_NAN: u32 = 0xFFC0_0000;

/// The reciprocal of one number's bits.
fn reciprocal(bits: u32) -> u32 {
    let number = f32::from_bits(bits);
    if number.is_nan() {
        return bits | QUIET;
    }
    if number.is_subnormal() {
        return bits & SIGN | INFINITY;
    }
    let result = 1.0 / number;
    if result.is_subnormal() { bits & SIGN } else { result.to_bits() }
}

/// The reciprocal square root of one number's bits.
fn reciprocal_root(bits: u32) -> u32 {
    let number = f32::from_bits(bits);
    if number.is_nan() {
        return bits | QUIET;
    }
    if number == 0.0 || number.is_subnormal() {
        return bits & SIGN | INFINITY;
    }
    if number < 0.0 {
        return DEFAULT_NAN;
    }
    ((1.0 / f64::from(number).sqrt()) as f32).to_bits()
}

/// `RCPPS`.
pub(super) fn reciprocals(_old: u128, b: u128) -> u128 {
    u128::from_doubles(|i| reciprocal(b.double(i)))
}

/// `RCPSS`.
pub(super) fn lowest_reciprocal(a: u128, b: u128) -> u128 {
    a >> 32 << 32 | u128::from(reciprocal(b.double(0)))
}

/// `RSQRTPS`.
pub(super) fn reciprocal_roots(_old: u128, b: u128) -> u128 {
    u128::from_doubles(|i| reciprocal_root(b.double(i)))
}

/// `RSQRTSS`.
pub(super) fn lowest_reciprocal_root(a: u128, b: u128) -> u128 {
    a >> 32 << 32 | u128::from(reciprocal_root(b.double(0)))
}
