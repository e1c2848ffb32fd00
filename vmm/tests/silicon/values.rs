//! Values worth computing with: random ones, and those at which arithmetic changes its mind.

use crate::rng::Rng;

/// What a vector register or memory operand holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    /// Integers of any width.
    Integer,
    /// 32-bit floats.
    Single,
    /// 64-bit floats.
    Double,
    /// 80-bit floats.
    Extended,
    /// Packed decimals.
    Decimal,
}

/// An integer; narrower users take its low bits.
pub fn integer(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => rng.pick(&[0, 1, u64::MAX, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF]),
        1 => rng.pick(&[
            0x7FFF_FFFF,
            0x8000_0000,
            0xFFFF_FFFF,
            0x1_0000_0000,
            i64::MAX as u64,
            i64::MIN as u64,
            0x8000_8000_8000_8000,
            0x8080_8080_8080_8080,
            0x7FFF_FFFF_7FFF_FFFF,
        ]),
        2 => rng.below(256),
        3 => rng.below(256).wrapping_neg(),
        4 => (1u64 << rng.below(64)).wrapping_add(rng.below(3)).wrapping_sub(1),
        5 => rng.next() >> rng.below(64),
        _ => rng.next(),
    }
}

const SINGLES: [u32; 26] = [
    0,
    0x8000_0000,
    0x3F80_0000,
    0xBF80_0000,
    0x7F80_0000,
    0xFF80_0000,
    0x7FC0_0000,
    0xFFC0_0000,
    0x7F80_0001,
    0xFFA0_1234,
    0x7FD5_5555,
    0x0000_0001,
    0x8000_0001,
    0x007F_FFFF,
    0x807F_FFFF,
    0x0080_0000,
    0x8080_0000,
    0x7F7F_FFFF,
    0xFF7F_FFFF,
    0x4F00_0000,
    0xCF00_0000,
    0x4EFF_FFFF,
    0x5F00_0000,
    0xDF00_0000,
    0x3F00_0000,
    0x4020_0000,
];

/// The bits of a 32-bit float.
pub fn single(rng: &mut Rng) -> u32 {
    match rng.below(8) {
        0..=2 => rng.pick(&SINGLES),
        3 => ((rng.below(4000) as f32 - 2000.0) / 8.0).to_bits(),
        // Close exponents: sums that cancel, products that round.
        4 | 5 => {
            let exponent = (120 + rng.below(16) as u32) << 23;
            (rng.next() as u32 & 0x807F_FFFF) | exponent
        }
        6 => rng.pick(&SINGLES) ^ (1 << rng.below(32)),
        _ => rng.next() as u32,
    }
}

const DOUBLES: [u64; 28] = [
    0,
    0x8000_0000_0000_0000,
    0x3FF0_0000_0000_0000,
    0xBFF0_0000_0000_0000,
    0x7FF0_0000_0000_0000,
    0xFFF0_0000_0000_0000,
    0x7FF8_0000_0000_0000,
    0xFFF8_0000_0000_0000,
    0x7FF0_0000_0000_0001,
    0xFFF4_1234_5678_9ABC,
    0x7FFA_AAAA_AAAA_AAAA,
    0x0000_0000_0000_0001,
    0x8000_0000_0000_0001,
    0x000F_FFFF_FFFF_FFFF,
    0x800F_FFFF_FFFF_FFFF,
    0x0010_0000_0000_0000,
    0x8010_0000_0000_0000,
    0x7FEF_FFFF_FFFF_FFFF,
    0xFFEF_FFFF_FFFF_FFFF,
    // 2^31 and 2^63, and what lies just below; the limits of single precision.
    0x41E0_0000_0000_0000,
    0xC1E0_0000_0020_0000,
    0x41DF_FFFF_FFFF_FFFF,
    0x43E0_0000_0000_0000,
    0xC3E0_0000_0000_0000,
    0x47EF_FFFF_F000_0000,
    0x3690_0000_0000_0000,
    0x3810_0000_0000_0000,
    0x3FE0_0000_0000_0000,
];

/// The bits of a 64-bit float.
pub fn double(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0..=2 => rng.pick(&DOUBLES),
        3 => ((rng.below(4000) as f64 - 2000.0) / 8.0).to_bits(),
        4 => {
            let exponent = (1015 + rng.below(16)) << 52;
            (rng.next() & 0x800F_FFFF_FFFF_FFFF) | exponent
        }
        // Around the limits of single precision, where conversion rounds, over- and underflows.
        5 => {
            let exponent = rng.pick(&[1023 - 150, 1023 - 127, 1023 - 126, 1023 + 127, 1023]);
            (rng.next() & 0x800F_FFFF_FFFF_FFFF) | ((exponent + rng.below(3)) << 52)
        }
        6 => rng.pick(&DOUBLES) ^ (1 << rng.below(64)),
        _ => rng.next(),
    }
}

/// The bytes of an 80-bit float, encodings the processor no longer produces included.
pub fn extended(rng: &mut Rng) -> [u8; 10] {
    const INTEGER_BIT: u64 = 1 << 63;
    let sign = (rng.below(2) as u16) << 15;
    let (exponent, fraction) = match rng.below(16) {
        0 => (0, 0),
        1 => (0x3FFF, INTEGER_BIT),
        2 => (0x7FFF, INTEGER_BIT),
        3 => (0x7FFF, INTEGER_BIT | (1 << 62) | (rng.next() >> 2)),
        4 => (0x7FFF, INTEGER_BIT | (rng.next() >> 2) | 1),
        5 => (0, rng.next() >> (1 + rng.below(63))),
        // Unsupported: pseudo-NaN, pseudo-infinity, unnormal; then pseudo-denormal.
        6 => rng.pick(&[(0x7FFF, 0), (0x7FFF, 1 << 62), (0x4000, 1 << 60), (0, INTEGER_BIT)]),
        7 => (0x3FFF + rng.below(64) as u16, INTEGER_BIT | rng.next()),
        // The limits of double and single precision.
        8 => {
            let limit =
                rng.pick(&[16383 - 1075, 16383 - 1022, 16383 + 1023, 16383 - 150, 16383 + 127]);
            (limit + rng.below(4) as u16 - 1, INTEGER_BIT | rng.next())
        }
        9 => (rng.pick(&[0x7FFE, 1, 2]), INTEGER_BIT | rng.next()),
        10 => (0x3FFF + rng.below(16) as u16, INTEGER_BIT | (rng.next() << (48 + rng.below(15)))),
        11 => (rng.next() as u16 & 0x7FFF, rng.next()),
        12 => (0x403E - rng.below(3) as u16, INTEGER_BIT | rng.next()),
        _ => (0x3FF8 + rng.below(16) as u16, INTEGER_BIT | rng.next()),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&fraction.to_le_bytes());
    bytes[8..].copy_from_slice(&(sign | exponent).to_le_bytes());
    bytes
}

/// 128 bits of the given flavor.
pub fn vector(rng: &mut Rng, flavor: Flavor) -> u128 {
    let bytes = operand(rng, flavor, 16);
    u128::from_le_bytes(bytes.try_into().expect("sixteen bytes were asked for"))
}

/// `len` bytes of the given flavor.
pub fn operand(rng: &mut Rng, flavor: Flavor, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 10);
    // Text now and then: what the string instructions look for.
    let text = flavor == Flavor::Integer && rng.percent(15);
    while bytes.len() < len {
        match flavor {
            Flavor::Integer if text => bytes.push(rng.pick(b"aabbcz\0AZ09")),
            Flavor::Integer => bytes.extend(integer(rng).to_le_bytes()),
            Flavor::Single => bytes.extend(single(rng).to_le_bytes()),
            Flavor::Double => bytes.extend(double(rng).to_le_bytes()),
            Flavor::Extended => bytes.extend(extended(rng)),
            Flavor::Decimal => {
                let digits = (0..9).map(|_| (rng.below(10) | (rng.below(10) << 4)) as u8);
                bytes.extend(digits);
                bytes.push((rng.next() as u8) & 0x80);
                if rng.percent(10) {
                    let at = bytes.len() - 1 - rng.index(10);
                    bytes[at] = rng.next() as u8;
                }
            }
        }
    }
    bytes.truncate(len);
    bytes
}

/// A control and status word for SSE: no reserved bits, and never `MM` (bit 17), which only AMD has.
pub fn mxcsr(rng: &mut Rng) -> u32 {
    if rng.percent(35) {
        return 0x1F80;
    }
    let masks = if rng.percent(60) { 0x1F80 } else { rng.next() as u32 & 0x1F80 };
    let rounding = (rng.below(4) as u32) << 13;
    let zeroing = if rng.percent(30) { rng.next() as u32 & 0x8040 } else { 0 };
    let flags = if rng.percent(25) { rng.next() as u32 & 0x3F } else { 0 };
    masks | rounding | zeroing | flags
}

/// An x87 control word. Precision 01 is reserved and left out.
pub fn x87_control(rng: &mut Rng) -> u16 {
    if rng.percent(35) {
        return 0x37F;
    }
    let masks = if rng.percent(65) { 0x3F } else { rng.next() as u16 & 0x3F };
    let precision = rng.pick(&[0u16, 2, 3, 3, 3]) << 8;
    let rounding = (rng.below(4) as u16) << 10;
    let infinity = (rng.below(8) as u16 & 1) << 12;
    0x40 | masks | precision | rounding | infinity
}

/// An x87 status word that belongs to `control`: ES and B say whether an unmasked flag is set.
pub fn x87_status(rng: &mut Rng, control: u16) -> u16 {
    let conditions = rng.next() as u16 & 0x4700;
    let top = (rng.below(8) as u16) << 11;
    let flags = match rng.below(10) {
        0..=6 => 0,
        7 => rng.next() as u16 & 0x7F,
        _ => rng.next() as u16 & 0x3F & control,
    };
    let summary = if flags & !control & 0x3F == 0 { 0 } else { 0x8080 };
    conditions | top | flags | summary
}

/// Which x87 registers are in use, one bit a physical register, given TOP.
pub fn x87_tags(rng: &mut Rng, top: u16) -> u8 {
    match rng.below(10) {
        0..=4 => 0xFF,
        5 => 0,
        6 => rng.next() as u8,
        _ => {
            let depth = rng.below(9) as u32;
            let in_use = ((1u32 << depth) - 1) as u8;
            in_use.rotate_left(u32::from(top))
        }
    }
}
