//! Lanes moved about: interleaving, shuffling, blending, inserting, widening. Plain values.

use super::lanes::Lanes;

/// Declares an interleaving of the low or high halves of two values, the first value's lanes first.
macro_rules! interleave {
    ($($name:ident = $from:ident, $lane:ident, $width:literal, $high:literal; $doc:literal)+) => {$(
        #[doc = $doc]
        #[inline]
        pub(super) fn $name<V: Lanes>(a: V, b: V) -> V {
            let start = if $high { V::BYTES / $width / 2 } else { 0 };
            V::$from(|i| if i % 2 == 0 { a.$lane(start + i / 2) } else { b.$lane(start + i / 2) })
        }
    )+};
}

interleave! {
    low_bytes = from_bytes, byte, 1, false; "`PUNPCKLBW`."
    low_words = from_words, word, 2, false; "`PUNPCKLWD`."
    low_doubles = from_doubles, double, 4, false; "`PUNPCKLDQ`, `UNPCKLPS`."
    low_quads = from_quads, quad, 8, false; "`PUNPCKLQDQ`, `UNPCKLPD`."
    high_bytes = from_bytes, byte, 1, true; "`PUNPCKHBW`."
    high_words = from_words, word, 2, true; "`PUNPCKHWD`."
    high_doubles = from_doubles, double, 4, true; "`PUNPCKHDQ`, `UNPCKHPS`."
    high_quads = from_quads, quad, 8, true; "`PUNPCKHQDQ`, `UNPCKHPD`."
}

/// Two bits of an immediate, as a lane number.
#[inline]
const fn selector(immediate: u8, index: usize) -> usize {
    (immediate >> (2 * (index & 3)) & 3) as usize
}

/// `PSHUFD`.
#[inline]
pub(super) fn doubles(_old: u128, b: u128, immediate: u8) -> u128 {
    u128::from_doubles(|i| b.double(selector(immediate, i)))
}

/// The words of one quad word rearranged: `PSHUFW`.
#[inline]
pub(super) fn words(_old: u64, b: u64, immediate: u8) -> u64 {
    u64::from_words(|i| b.word(selector(immediate, i)))
}

/// `PSHUFLW`.
#[inline]
pub(super) fn words_of_low(_old: u128, b: u128, immediate: u8) -> u128 {
    u128::from(words(0, b.quad(0), immediate)) | b >> 64 << 64
}

/// `PSHUFHW`.
#[inline]
pub(super) fn words_of_high(_old: u128, b: u128, immediate: u8) -> u128 {
    u128::from(words(0, b.quad(1), immediate)) << 64 | u128::from(b.quad(0))
}

/// `SHUFPS`: two lanes of `a`, then two of `b`.
#[inline]
pub(super) fn singles(a: u128, b: u128, immediate: u8) -> u128 {
    u128::from_doubles(|i| if i < 2 { a } else { b }.double(selector(immediate, i)))
}

/// `SHUFPD`: one lane of `a`, then one of `b`.
#[inline]
pub(super) fn quads(a: u128, b: u128, immediate: u8) -> u128 {
    u128::from_quads(|i| if i < 1 { a } else { b }.quad(usize::from(immediate >> i & 1)))
}

/// `PSHUFB`: bytes of `a` chosen by `b`; a negative choice gives zero.
#[inline]
pub(super) fn bytes<V: Lanes>(a: V, b: V) -> V {
    V::from_bytes(|i| {
        let choice = b.byte(i);
        if choice & 0x80 != 0 { 0 } else { a.byte(usize::from(choice) % V::BYTES) }
    })
}

/// `PALIGNR` of XMM registers: `a` above `b`, shifted right by bytes.
#[inline]
pub(super) fn align_right(a: u128, b: u128, immediate: u8) -> u128 {
    match u32::from(immediate) * 8 {
        0 => b,
        shift @ 1..128 => b >> shift | a << (128 - shift),
        shift @ 128..256 => a >> (shift - 128),
        _ => 0,
    }
}

/// `PALIGNR` of MMX registers.
pub(super) fn align_right_mmx(a: u64, b: u64, immediate: u8) -> u64 {
    let both = u128::from(a) << 64 | u128::from(b);
    both.checked_shr(u32::from(immediate) * 8).unwrap_or(0) as u64
}

/// `PBLENDW`: an immediate bit takes the word of `b`.
pub(super) fn blend_words(a: u128, b: u128, immediate: u8) -> u128 {
    u128::from_words(|i| if immediate >> i & 1 != 0 { b } else { a }.word(i))
}

/// `BLENDPS`.
pub(super) fn blend_singles(a: u128, b: u128, immediate: u8) -> u128 {
    u128::from_doubles(|i| if immediate >> i & 1 != 0 { b } else { a }.double(i))
}

/// `BLENDPD`.
pub(super) fn blend_doubles(a: u128, b: u128, immediate: u8) -> u128 {
    u128::from_quads(|i| if immediate >> i & 1 != 0 { b } else { a }.quad(i))
}

/// `PBLENDVB`: the top bit of a mask byte takes the byte of `b`.
pub(super) fn select_bytes(a: u128, b: u128, mask: u128) -> u128 {
    u128::from_bytes(|i| if mask.byte(i) & 0x80 != 0 { b } else { a }.byte(i))
}

/// `BLENDVPS`.
pub(super) fn select_singles(a: u128, b: u128, mask: u128) -> u128 {
    u128::from_doubles(|i| if mask.double(i) >> 31 != 0 { b } else { a }.double(i))
}

/// `BLENDVPD`.
pub(super) fn select_doubles(a: u128, b: u128, mask: u128) -> u128 {
    u128::from_quads(|i| if mask.quad(i) >> 63 != 0 { b } else { a }.quad(i))
}

/// `INSERTPS` of the single `value`: immediate bits 4–5 choose the place, bits 0–3 clear lanes.
pub(super) fn insert_single(a: u128, value: u32, immediate: u8) -> u128 {
    let place = usize::from(immediate >> 4 & 3);
    u128::from_doubles(|i| match (immediate >> i & 1 != 0, i == place) {
        (true, _) => 0,
        (false, true) => value,
        (false, false) => a.double(i),
    })
}

/// `PINSRB`.
pub(super) fn insert_byte(a: u128, value: u64, immediate: u8) -> u128 {
    insert(a, value & 0xFF, 8, immediate & 15)
}

/// `PINSRW`.
pub(super) fn insert_word(a: u128, value: u64, immediate: u8) -> u128 {
    insert(a, value & 0xFFFF, 16, immediate & 7)
}

/// `PINSRD`.
pub(super) fn insert_double(a: u128, value: u64, immediate: u8) -> u128 {
    insert(a, value & 0xFFFF_FFFF, 32, immediate & 3)
}

/// `PINSRQ`.
pub(super) fn insert_quad(a: u128, value: u64, immediate: u8) -> u128 {
    insert(a, value, 64, immediate & 1)
}

fn insert(a: u128, value: u64, width: u32, index: u8) -> u128 {
    let shift = u32::from(index) * width;
    let lane = u128::from(u64::MAX >> (64 - width)) << shift;
    a & !lane | u128::from(value) << shift
}

/// Declares `PMOVSX`/`PMOVZX`: the low lanes of the source, widened.
macro_rules! widen {
    ($($name:ident = $from:ident, $lane:ident as $($step:ty),+; $doc:literal)+) => {$(
        #[doc = $doc]
        #[inline]
        pub(super) fn $name(_old: u128, b: u128) -> u128 {
            u128::$from(|i| b.$lane(i) $(as $step)+)
        }
    )+};
}

widen! {
    sign_bytes_to_words = from_words, byte as i8, u16; "`PMOVSXBW`."
    sign_bytes_to_doubles = from_doubles, byte as i8, u32; "`PMOVSXBD`."
    sign_bytes_to_quads = from_quads, byte as i8, u64; "`PMOVSXBQ`."
    sign_words_to_doubles = from_doubles, word as i16, u32; "`PMOVSXWD`."
    sign_words_to_quads = from_quads, word as i16, u64; "`PMOVSXWQ`."
    sign_doubles_to_quads = from_quads, double as i32, u64; "`PMOVSXDQ`."
    zero_bytes_to_words = from_words, byte as u16; "`PMOVZXBW`."
    zero_bytes_to_doubles = from_doubles, byte as u32; "`PMOVZXBD`."
    zero_bytes_to_quads = from_quads, byte as u64; "`PMOVZXBQ`."
    zero_words_to_doubles = from_doubles, word as u32; "`PMOVZXWD`."
    zero_words_to_quads = from_quads, word as u64; "`PMOVZXWQ`."
    zero_doubles_to_quads = from_quads, double as u64; "`PMOVZXDQ`."
}

/// `MOVDDUP`.
pub(super) fn duplicate_low_quad(_old: u128, b: u128) -> u128 {
    low_quads(b, b)
}

/// `MOVSLDUP`.
pub(super) fn duplicate_even_doubles(_old: u128, b: u128) -> u128 {
    u128::from_doubles(|i| b.double(i & !1))
}

/// `MOVSHDUP`.
pub(super) fn duplicate_odd_doubles(_old: u128, b: u128) -> u128 {
    u128::from_doubles(|i| b.double(i | 1))
}

/// `MOVHLPS`: the high half of `b` into the low half of `a`.
pub(super) fn high_to_low(a: u128, b: u128) -> u128 {
    a >> 64 << 64 | b >> 64
}

/// `MOVLHPS`, `MOVHPS`, `MOVHPD`: the low half of `b` into the high half of `a`.
pub(super) fn low_to_high(a: u128, b: u128) -> u128 {
    low_quads(a, b)
}
