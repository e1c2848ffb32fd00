//! Packed integer operations that cross lanes: neighbours added, halves packed, minima found.

use super::lanes::Lanes;

/// Combines neighbouring words of `low`, then of `high`.
#[inline]
fn word_pairs<V: Lanes>(low: V, high: V, f: impl Fn(i16, i16) -> i16) -> V {
    let half = V::BYTES / 4;
    V::from_words(|i| {
        let (value, pair) = if i < half { (low, i) } else { (high, i - half) };
        f(value.word(2 * pair) as i16, value.word(2 * pair + 1) as i16) as u16
    })
}

/// Combines neighbouring double words of `low`, then of `high`.
#[inline]
fn double_pairs<V: Lanes>(low: V, high: V, f: impl Fn(u32, u32) -> u32) -> V {
    let half = V::BYTES / 8;
    V::from_doubles(|i| {
        let (value, pair) = if i < half { (low, i) } else { (high, i - half) };
        f(value.double(2 * pair), value.double(2 * pair + 1))
    })
}

/// `PHADDW`.
pub(super) fn add_words<V: Lanes>(a: V, b: V) -> V {
    word_pairs(a, b, i16::wrapping_add)
}

/// `PHADDSW`.
pub(super) fn add_saturated_words<V: Lanes>(a: V, b: V) -> V {
    word_pairs(a, b, i16::saturating_add)
}

/// `PHADDD`.
pub(super) fn add_doubles<V: Lanes>(a: V, b: V) -> V {
    double_pairs(a, b, u32::wrapping_add)
}

/// `PHSUBW`.
pub(super) fn sub_words<V: Lanes>(a: V, b: V) -> V {
    word_pairs(a, b, i16::wrapping_sub)
}

/// `PHSUBSW`.
pub(super) fn sub_saturated_words<V: Lanes>(a: V, b: V) -> V {
    word_pairs(a, b, i16::saturating_sub)
}

/// `PHSUBD`.
pub(super) fn sub_doubles<V: Lanes>(a: V, b: V) -> V {
    double_pairs(a, b, u32::wrapping_sub)
}

/// Narrows the words of `low`, then of `high`.
#[inline]
fn narrow_words<V: Lanes>(low: V, high: V, f: impl Fn(i16) -> u8) -> V {
    let half = V::BYTES / 2;
    V::from_bytes(|i| f(if i < half { low.word(i) } else { high.word(i - half) } as i16))
}

/// Narrows the double words of `low`, then of `high`.
#[inline]
fn narrow_doubles<V: Lanes>(low: V, high: V, f: impl Fn(i32) -> u16) -> V {
    let half = V::BYTES / 4;
    V::from_words(|i| f(if i < half { low.double(i) } else { high.double(i - half) } as i32))
}

/// `PACKSSWB`.
pub(super) fn pack_signed_words<V: Lanes>(a: V, b: V) -> V {
    narrow_words(a, b, |word| word.clamp(-128, 127) as u8)
}

/// `PACKUSWB`.
pub(super) fn pack_unsigned_words<V: Lanes>(a: V, b: V) -> V {
    narrow_words(a, b, |word| word.clamp(0, 255) as u8)
}

/// `PACKSSDW`.
pub(super) fn pack_signed_doubles<V: Lanes>(a: V, b: V) -> V {
    narrow_doubles(a, b, |double| double.clamp(-0x8000, 0x7FFF) as u16)
}

/// `PACKUSDW`.
pub(super) fn pack_unsigned_doubles<V: Lanes>(a: V, b: V) -> V {
    narrow_doubles(a, b, |double| double.clamp(0, 0xFFFF) as u16)
}

/// `PHMINPOSUW`: the least word, and where it is first.
pub(super) fn least_word(_old: u128, value: u128) -> u128 {
    let (least, index) = (1..8).fold((value.word(0), 0), |best, i| {
        if value.word(i) < best.0 { (value.word(i), i) } else { best }
    });
    u128::from(least) | (index as u128) << 16
}

/// `MPSADBW`: eight sums of absolute differences of four bytes. Immediate bits 0–1 choose the
/// block of `b`, bit 2 the first byte of `a`.
pub(super) fn block_differences(a: u128, b: u128, immediate: u8) -> u128 {
    let block = usize::from(immediate & 3) * 4;
    let window = usize::from(immediate >> 2 & 1) * 4;
    u128::from_words(|i| {
        (0..4).map(|k| u16::from(a.byte(window + i + k).abs_diff(b.byte(block + k)))).sum()
    })
}
