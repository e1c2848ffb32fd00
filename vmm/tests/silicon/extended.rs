//! 80-bit floats as far as comparing two close ones needs.

/// Sign, exponent and significand, unless it is infinite or no number.
fn parts(bytes: [u8; 10]) -> Option<(bool, i32, u64)> {
    let significand = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let top = u16::from_le_bytes([bytes[8], bytes[9]]);
    let exponent = i32::from(top & 0x7FFF);
    (exponent != 0x7FFF).then_some((top >> 15 != 0, exponent.max(1), significand))
}

/// `significand · 2^(exponent − 16383 − 63)`, as far as a double can hold it.
fn scaled(significand: f64, exponent: i32) -> f64 {
    significand * 2f64.powi((exponent - 16383 - 63).clamp(-1000, 1000))
}

/// The number as a double; 0 for what is none.
pub fn approximate(bytes: [u8; 10]) -> f64 {
    parts(bytes).map_or(0.0, |(negative, exponent, significand)| {
        let magnitude = scaled(significand as f64, exponent);
        if negative { -magnitude } else { magnitude }
    })
}

/// How many numbers lie between the two, if both are finite and of one sign.
pub fn units_apart(one: [u8; 10], other: [u8; 10]) -> Option<u64> {
    let place = |(_, exponent, significand): (bool, i32, u64)| {
        (i128::from(exponent) << 63) + i128::from(significand)
    };
    let (one, other) = (parts(one)?, parts(other)?);
    let apart = place(one).abs_diff(place(other));
    (one.0 == other.0).then_some(u64::try_from(apart).unwrap_or(u64::MAX))
}

/// How far the two are apart, if both are finite: exactly if they are close.
pub fn distance(one: [u8; 10], other: [u8; 10]) -> Option<f64> {
    let (one, other) = (parts(one)?, parts(other)?);
    let exponent = one.1.min(other.1);
    let aligned = |(negative, own, significand): (bool, i32, u64)| {
        // Beyond 60 places the larger number is the distance.
        let magnitude = i128::from(significand) << (own - exponent).min(60);
        if negative { -magnitude } else { magnitude }
    };
    if one.1.abs_diff(other.1) > 60 {
        let larger = if one.1 > other.1 { one } else { other };
        return Some(scaled(larger.2 as f64, larger.1));
    }
    Some(scaled(aligned(one).abs_diff(aligned(other)) as f64, exponent))
}
