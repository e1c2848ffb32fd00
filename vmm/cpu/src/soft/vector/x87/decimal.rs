//! `FBLD` and `FBSTP`: packed decimal integers of 18 digits.

use super::stack::extended;
use crate::soft::vector::host_x87::{Extended, Outcome};

/// The packed decimal indefinite.
pub(super) const INDEFINITE: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0xC0, 0xFF, 0xFF];

/// The number of a packed decimal. Digits above nine, which the manual leaves undefined, count
/// as what they are.
pub(super) fn load(bytes: &[u8; 10]) -> Outcome<Extended> {
    let magnitude = bytes[..9].iter().rev().fold(0_u64, |number, &byte| {
        number * 100 + u64::from(byte >> 4) * 10 + u64::from(byte & 15)
    });
    let sign = if bytes[9] & 0x80 != 0 { 0x8000 } else { 0 };
    if magnitude == 0 {
        return (extended(sign, 0), 0);
    }
    let shift = magnitude.leading_zeros();
    (extended(sign | (0x3FFF + 63 - shift as u16), magnitude << shift), 0)
}
