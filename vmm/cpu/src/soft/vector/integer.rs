//! Packed integer arithmetic, comparison and shifts, lane by lane. Plain values in and out;
//! the first argument is the destination's old value. MMX and SSE share every function.

use super::lanes::Lanes;

/// Eight bytes at once in a quad word, for what string functions use all the time: nothing carried
/// from one byte reaches the next, because top bits are kept out of sums.
mod bytes {
    /// The top bit of every byte.
    const TOP: u64 = 0x8080_8080_8080_8080;

    /// All ones where a byte's top bit is set in `tops`, which has no other bits.
    const fn spread(tops: u64) -> u64 {
        (tops >> 7).wrapping_mul(0xFF)
    }

    pub(super) const fn add(a: u64, b: u64) -> u64 {
        ((a & !TOP) + (b & !TOP)) ^ ((a ^ b) & TOP)
    }

    pub(super) const fn sub(a: u64, b: u64) -> u64 {
        ((a | TOP) - (b & !TOP)) ^ ((a ^ !b) & TOP)
    }

    pub(super) const fn equal(a: u64, b: u64) -> u64 {
        let different = a ^ b;
        let nonzero = (((different & !TOP) + !TOP) | different) & TOP;
        spread(nonzero ^ TOP)
    }

    /// All ones where a byte of `a` is below that of `b`.
    const fn below(a: u64, b: u64) -> u64 {
        // The top bit stays where the lower seven bits need no borrow.
        let no_borrow = (a | TOP) - (b & !TOP);
        spread((!a & b | !(a ^ b) & !no_borrow) & TOP)
    }

    pub(super) const fn min(a: u64, b: u64) -> u64 {
        b ^ (a ^ b) & below(a, b)
    }

    pub(super) const fn max(a: u64, b: u64) -> u64 {
        a ^ (a ^ b) & below(a, b)
    }
}

/// Declares a function that combines two values lane by lane.
macro_rules! lanewise {
    ($($name:ident = $zip:ident($a:ident, $b:ident) $body:expr; $doc:literal)+) => {$(
        #[doc = $doc]
        #[inline]
        pub(super) fn $name<V: Lanes>(first: V, second: V) -> V {
            first.$zip(second, |$a, $b| $body)
        }
    )+};
}

const fn mask8(condition: bool) -> u8 {
    if condition { u8::MAX } else { 0 }
}

const fn mask16(condition: bool) -> u16 {
    if condition { u16::MAX } else { 0 }
}

const fn mask32(condition: bool) -> u32 {
    if condition { u32::MAX } else { 0 }
}

const fn mask64(condition: bool) -> u64 {
    if condition { u64::MAX } else { 0 }
}

lanewise! {
    add_bytes = zip_quads(a, b) bytes::add(a, b); "`PADDB`."
    add_words = zip_words(a, b) a.wrapping_add(b); "`PADDW`."
    add_doubles = zip_doubles(a, b) a.wrapping_add(b); "`PADDD`."
    add_quads = zip_quads(a, b) a.wrapping_add(b); "`PADDQ`."
    add_signed_bytes = zip_bytes(a, b) (a as i8).saturating_add(b as i8) as u8; "`PADDSB`."
    add_signed_words = zip_words(a, b) (a as i16).saturating_add(b as i16) as u16; "`PADDSW`."
    add_unsigned_bytes = zip_bytes(a, b) a.saturating_add(b); "`PADDUSB`."
    add_unsigned_words = zip_words(a, b) a.saturating_add(b); "`PADDUSW`."
    sub_bytes = zip_quads(a, b) bytes::sub(a, b); "`PSUBB`."
    sub_words = zip_words(a, b) a.wrapping_sub(b); "`PSUBW`."
    sub_doubles = zip_doubles(a, b) a.wrapping_sub(b); "`PSUBD`."
    sub_quads = zip_quads(a, b) a.wrapping_sub(b); "`PSUBQ`."
    sub_signed_bytes = zip_bytes(a, b) (a as i8).saturating_sub(b as i8) as u8; "`PSUBSB`."
    sub_signed_words = zip_words(a, b) (a as i16).saturating_sub(b as i16) as u16; "`PSUBSW`."
    sub_unsigned_bytes = zip_bytes(a, b) a.saturating_sub(b); "`PSUBUSB`."
    sub_unsigned_words = zip_words(a, b) a.saturating_sub(b); "`PSUBUSW`."
    average_bytes = zip_bytes(a, b) ((u16::from(a) + u16::from(b) + 1) >> 1) as u8; "`PAVGB`."
    average_words = zip_words(a, b) ((u32::from(a) + u32::from(b) + 1) >> 1) as u16; "`PAVGW`."

    equal_bytes = zip_quads(a, b) bytes::equal(a, b); "`PCMPEQB`."
    equal_words = zip_words(a, b) mask16(a == b); "`PCMPEQW`."
    equal_doubles = zip_doubles(a, b) mask32(a == b); "`PCMPEQD`."
    equal_quads = zip_quads(a, b) mask64(a == b); "`PCMPEQQ`."
    greater_bytes = zip_bytes(a, b) mask8(a as i8 > b as i8); "`PCMPGTB`."
    greater_words = zip_words(a, b) mask16(a as i16 > b as i16); "`PCMPGTW`."
    greater_doubles = zip_doubles(a, b) mask32(a as i32 > b as i32); "`PCMPGTD`."
    greater_quads = zip_quads(a, b) mask64(a as i64 > b as i64); "`PCMPGTQ`."

    min_unsigned_bytes = zip_quads(a, b) bytes::min(a, b); "`PMINUB`."
    min_unsigned_words = zip_words(a, b) a.min(b); "`PMINUW`."
    min_unsigned_doubles = zip_doubles(a, b) a.min(b); "`PMINUD`."
    min_signed_bytes = zip_bytes(a, b) (a as i8).min(b as i8) as u8; "`PMINSB`."
    min_signed_words = zip_words(a, b) (a as i16).min(b as i16) as u16; "`PMINSW`."
    min_signed_doubles = zip_doubles(a, b) (a as i32).min(b as i32) as u32; "`PMINSD`."
    max_unsigned_bytes = zip_quads(a, b) bytes::max(a, b); "`PMAXUB`."
    max_unsigned_words = zip_words(a, b) a.max(b); "`PMAXUW`."
    max_unsigned_doubles = zip_doubles(a, b) a.max(b); "`PMAXUD`."
    max_signed_bytes = zip_bytes(a, b) (a as i8).max(b as i8) as u8; "`PMAXSB`."
    max_signed_words = zip_words(a, b) (a as i16).max(b as i16) as u16; "`PMAXSW`."
    max_signed_doubles = zip_doubles(a, b) (a as i32).max(b as i32) as u32; "`PMAXSD`."

    multiply_low_words = zip_words(a, b) a.wrapping_mul(b); "`PMULLW`."
    multiply_low_doubles = zip_doubles(a, b) a.wrapping_mul(b); "`PMULLD`."
    multiply_high_words = zip_words(a, b) ((i32::from(a as i16) * i32::from(b as i16)) >> 16) as u16; "`PMULHW`."
    multiply_high_unsigned_words = zip_words(a, b) ((u32::from(a) * u32::from(b)) >> 16) as u16; "`PMULHUW`."
    multiply_round_words = zip_words(a, b)
        ((((i32::from(a as i16) * i32::from(b as i16)) >> 14) + 1) >> 1) as u16; "`PMULHRSW`."
    multiply_unsigned_doubles = zip_quads(a, b) u64::from(a as u32) * u64::from(b as u32); "`PMULUDQ`."
    multiply_signed_doubles = zip_quads(a, b) (i64::from(a as i32) * i64::from(b as i32)) as u64; "`PMULDQ`."
    multiply_add_words = zip_doubles(a, b) {
        let low = i32::from(a as i16) * i32::from(b as i16);
        let high = i32::from((a >> 16) as i16) * i32::from((b >> 16) as i16);
        low.wrapping_add(high) as u32
    }; "`PMADDWD`."
    multiply_add_bytes = zip_words(a, b) {
        let low = i32::from(a as u8) * i32::from(b as i8);
        let high = i32::from((a >> 8) as u8) * i32::from((b >> 8) as i8);
        (low + high).clamp(i32::from(i16::MIN), i32::from(i16::MAX)) as u16
    }; "`PMADDUBSW`: unsigned bytes of the first by signed bytes of the second."
    sum_of_differences = zip_quads(a, b) {
        a.to_le_bytes().iter().zip(b.to_le_bytes()).map(|(&x, y)| u64::from(x.abs_diff(y))).sum()
    }; "`PSADBW`."

    sign_bytes = zip_bytes(a, b) (a as i8).wrapping_mul((b as i8).signum()) as u8; "`PSIGNB`."
    sign_words = zip_words(a, b) (a as i16).wrapping_mul((b as i16).signum()) as u16; "`PSIGNW`."
    sign_doubles = zip_doubles(a, b) (a as i32).wrapping_mul((b as i32).signum()) as u32; "`PSIGND`."
    absolute_bytes = zip_bytes(_old, b) (b as i8).unsigned_abs(); "`PABSB`."
    absolute_words = zip_words(_old, b) (b as i16).unsigned_abs(); "`PABSW`."
    absolute_doubles = zip_doubles(_old, b) (b as i32).unsigned_abs(); "`PABSD`."

    and = zip_quads(a, b) a & b; "`PAND`, `ANDPS`, `ANDPD`."
    and_not = zip_quads(a, b) !a & b; "`PANDN`, `ANDNPS`, `ANDNPD`."
    or = zip_quads(a, b) a | b; "`POR`, `ORPS`, `ORPD`."
    xor = zip_quads(a, b) a ^ b; "`PXOR`, `XORPS`, `XORPD`."
}

/// Declares a shift of every lane by one count: logical shifts by the width or more give zero.
macro_rules! shifts {
    ($($name:ident = $zip:ident, $width:literal, $shift:ident; $doc:literal)+) => {$(
        #[doc = $doc]
        #[inline]
        pub(super) fn $name<V: Lanes>(value: V, count: u64) -> V {
            let count = count.min($width) as u32;
            value.$zip(value, |lane, _| lane.$shift(count).unwrap_or(0))
        }
    )+};
}

shifts! {
    left_words = zip_words, 16, checked_shl; "`PSLLW`."
    left_doubles = zip_doubles, 32, checked_shl; "`PSLLD`."
    left_quads = zip_quads, 64, checked_shl; "`PSLLQ`."
    right_words = zip_words, 16, checked_shr; "`PSRLW`."
    right_doubles = zip_doubles, 32, checked_shr; "`PSRLD`."
    right_quads = zip_quads, 64, checked_shr; "`PSRLQ`."
}

/// `PSRAW`: by 16 or more fills with the sign.
#[inline]
pub(super) fn arithmetic_right_words<V: Lanes>(value: V, count: u64) -> V {
    let count = count.min(15);
    value.zip_words(value, |lane, _| ((lane as i16) >> count) as u16)
}

/// `PSRAD`: by 32 or more fills with the sign.
#[inline]
pub(super) fn arithmetic_right_doubles<V: Lanes>(value: V, count: u64) -> V {
    let count = count.min(31);
    value.zip_doubles(value, |lane, _| ((lane as i32) >> count) as u32)
}

/// `PSLLDQ`: the whole register by bytes.
#[inline]
pub(super) fn left_whole(value: u128, bytes: u64) -> u128 {
    if bytes > 15 { 0 } else { value << (8 * bytes) }
}

/// `PSRLDQ`: the whole register by bytes.
#[inline]
pub(super) fn right_whole(value: u128, bytes: u64) -> u128 {
    if bytes > 15 { 0 } else { value >> (8 * bytes) }
}

/// `PMOVMSKB`: the top bit of every byte, byte 0 in bit 0.
#[inline]
pub(super) fn byte_signs<V: Lanes>(value: V) -> u64 {
    // The product moves bit 8i to bit 56+i; no two partial products share a bit.
    let gather =
        |quad: u64| ((quad >> 7) & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56;
    (0..V::BYTES / 8).fold(0, |mask, i| mask | gather(value.quad(i)) << (8 * i))
}

/// `MOVMSKPS`.
#[inline]
pub(super) fn single_signs(value: u128) -> u64 {
    (0..4).fold(0, |mask, i| mask | u64::from(value.double(i) >> 31) << i)
}

/// `MOVMSKPD`.
#[inline]
pub(super) fn double_signs(value: u128) -> u64 {
    (value.quad(0) >> 63) | (value.quad(1) >> 63) << 1
}
