//! A vector register value seen as lanes of bytes, words, double words or quad words.
//!
//! MMX registers are `u64`, XMM registers `u128`; what is written against [`Lanes`] serves both.

/// A value of several little-endian lanes.
pub(super) trait Lanes: Copy + Sized {
    /// Its width in bytes.
    const BYTES: usize;

    /// Byte `index`.
    fn byte(self, index: usize) -> u8;
    /// Word `index`.
    fn word(self, index: usize) -> u16;
    /// Double word `index`.
    fn double(self, index: usize) -> u32;
    /// Quad word `index`.
    fn quad(self, index: usize) -> u64;

    /// The value whose byte `i` is `f(i)`.
    fn from_bytes(f: impl FnMut(usize) -> u8) -> Self;
    /// The value whose word `i` is `f(i)`.
    fn from_words(f: impl FnMut(usize) -> u16) -> Self;
    /// The value whose double word `i` is `f(i)`.
    fn from_doubles(f: impl FnMut(usize) -> u32) -> Self;
    /// The value whose quad word `i` is `f(i)`.
    fn from_quads(f: impl FnMut(usize) -> u64) -> Self;

    /// Combines two values byte by byte.
    fn zip_bytes(self, other: Self, f: impl Fn(u8, u8) -> u8) -> Self;
    /// Combines two values word by word.
    fn zip_words(self, other: Self, f: impl Fn(u16, u16) -> u16) -> Self;
    /// Combines two values double word by double word.
    fn zip_doubles(self, other: Self, f: impl Fn(u32, u32) -> u32) -> Self;
    /// Combines two values quad word by quad word.
    fn zip_quads(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self;
}

/// Declares a loop over lanes in memory. It is kept out of line because a loop over memory becomes
/// one vector instruction, where the same on values in registers is taken apart lane by lane.
macro_rules! combine {
    ($name:ident, $lane:ty, $width:literal) => {
        #[inline(never)]
        fn $name<const N: usize>(
            a: &[u8; N],
            b: &[u8; N],
            result: &mut [u8; N],
            f: impl Fn($lane, $lane) -> $lane,
        ) {
            let (a, _) = a.as_chunks::<$width>();
            let (b, _) = b.as_chunks::<$width>();
            let (result, _) = result.as_chunks_mut::<$width>();
            for i in 0..N / $width {
                let lane = f(<$lane>::from_le_bytes(a[i]), <$lane>::from_le_bytes(b[i]));
                result[i] = lane.to_le_bytes();
            }
        }
    };
}

combine!(combine_bytes, u8, 1);
combine!(combine_words, u16, 2);
combine!(combine_doubles, u32, 4);

/// Declares `zip_*` by a loop over lanes in memory.
macro_rules! zip {
    ($name:ident, $combine:ident, $lane:ty) => {
        #[inline]
        fn $name(self, other: Self, f: impl Fn($lane, $lane) -> $lane) -> Self {
            let mut result = Self::MIN.to_le_bytes();
            $combine(&self.to_le_bytes(), &other.to_le_bytes(), &mut result, f);
            Self::from_le_bytes(result)
        }
    };
}

/// Declares `from_*`.
macro_rules! from_lanes {
    ($name:ident, $lane:ty, $width:literal) => {
        #[inline]
        fn $name(mut f: impl FnMut(usize) -> $lane) -> Self {
            let mut bytes = Self::MIN.to_le_bytes();
            for (i, lane) in bytes.as_chunks_mut::<$width>().0.iter_mut().enumerate() {
                *lane = f(i).to_le_bytes();
            }
            Self::from_le_bytes(bytes)
        }
    };
}

macro_rules! lanes {
    ($type:ty, $bytes:literal) => {
        impl Lanes for $type {
            const BYTES: usize = $bytes;

            #[inline]
            fn byte(self, index: usize) -> u8 {
                self.to_le_bytes()[index]
            }
            #[inline]
            fn word(self, index: usize) -> u16 {
                (self >> (16 * index)) as u16
            }
            #[inline]
            fn double(self, index: usize) -> u32 {
                (self >> (32 * index)) as u32
            }
            #[inline]
            fn quad(self, index: usize) -> u64 {
                #[allow(clippy::unnecessary_cast, reason = "the value is 64 or 128 bits wide")]
                {
                    (self >> (64 * index)) as u64
                }
            }
            from_lanes!(from_bytes, u8, 1);
            from_lanes!(from_words, u16, 2);
            from_lanes!(from_doubles, u32, 4);
            from_lanes!(from_quads, u64, 8);
            zip!(zip_bytes, combine_bytes, u8);
            zip!(zip_words, combine_words, u16);
            zip!(zip_doubles, combine_doubles, u32);

            #[inline]
            fn zip_quads(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
                // Two registers' worth: nothing to gain from a loop.
                Self::from_quads(|i| f(self.quad(i), other.quad(i)))
            }
        }
    };
}

lanes!(u64, 8);
lanes!(u128, 16);
