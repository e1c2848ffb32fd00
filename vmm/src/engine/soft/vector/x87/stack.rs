//! The register stack: TOP, tags, and the status word's summary bits.

use crate::engine::state::X87State;

/// Tag of a normal number.
const VALID: u16 = 0;
/// Tag of a zero.
const ZERO: u16 = 1;
/// Tag of a NaN, infinity, denormal or unsupported encoding.
const SPECIAL: u16 = 2;
/// Tag of an empty register.
const EMPTY: u16 = 3;

/// The six exception flags of the status word, and masks of the control word.
pub(in super::super) const EXCEPTIONS: u16 = 0x3F;
/// Status bits ES and B.
pub(in super::super) const SUMMARY: u16 = 0x8080;

/// The tag that a value of a register has in the full tag word.
pub(super) fn tag_of(register: &[u8; 10]) -> u16 {
    let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7FFF;
    let significand = significand(register);
    match (exponent, significand) {
        (0, 0) => ZERO,
        (0 | 0x7FFF, _) => SPECIAL,
        _ if significand >> 63 == 0 => SPECIAL,
        _ => VALID,
    }
}

/// The 64 bits below sign and exponent.
fn significand(register: &[u8; 10]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&register[..8]);
    u64::from_le_bytes(bytes)
}

/// TOP.
pub(super) fn top(x87: &X87State) -> usize {
    usize::from(x87.status >> 11 & 7)
}

/// Sets ES and B if an unmasked exception is flagged, and clears them otherwise.
pub(super) fn summarise(x87: &mut X87State) {
    x87.status &= !SUMMARY;
    if x87.status & !x87.control & EXCEPTIONS != 0 {
        x87.status |= SUMMARY;
    }
}

/// Completes a state whose control, status and registers were loaded from an image: tags of the
/// physical registers that are not empty follow from their contents, ES and B from the flags;
/// control bits that do not exist read as the hardware has them.
pub(in super::super) fn settle_loaded(x87: &mut X87State, empty: impl Fn(usize) -> bool) {
    x87.control = x87.control & 0x1F3F | 0x40;
    let top = top(x87);
    x87.tags = (0..8).fold(0, |tags, physical| {
        let tag =
            if empty(physical) { EMPTY } else { tag_of(&x87.registers[(physical + 8 - top) & 7]) };
        tags | tag << (2 * physical)
    });
    summarise(x87);
}
