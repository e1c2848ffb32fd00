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
    #[inline]
    fn zip_bytes(self, other: Self, mut f: impl FnMut(u8, u8) -> u8) -> Self {
        Self::from_bytes(|i| f(self.byte(i), other.byte(i)))
    }
    /// Combines two values word by word.
    #[inline]
    fn zip_words(self, other: Self, mut f: impl FnMut(u16, u16) -> u16) -> Self {
        Self::from_words(|i| f(self.word(i), other.word(i)))
    }
    /// Combines two values double word by double word.
    #[inline]
    fn zip_doubles(self, other: Self, mut f: impl FnMut(u32, u32) -> u32) -> Self {
        Self::from_doubles(|i| f(self.double(i), other.double(i)))
    }
    /// Combines two values quad word by quad word.
    #[inline]
    fn zip_quads(self, other: Self, mut f: impl FnMut(u64, u64) -> u64) -> Self {
        Self::from_quads(|i| f(self.quad(i), other.quad(i)))
    }
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
            #[inline]
            fn from_bytes(f: impl FnMut(usize) -> u8) -> Self {
                Self::from_le_bytes(std::array::from_fn(f))
            }
            #[inline]
            fn from_words(mut f: impl FnMut(usize) -> u16) -> Self {
                let mut bytes = [0; $bytes];
                for (i, lane) in bytes.chunks_exact_mut(2).enumerate() {
                    lane.copy_from_slice(&f(i).to_le_bytes());
                }
                Self::from_le_bytes(bytes)
            }
            #[inline]
            fn from_doubles(mut f: impl FnMut(usize) -> u32) -> Self {
                let mut bytes = [0; $bytes];
                for (i, lane) in bytes.chunks_exact_mut(4).enumerate() {
                    lane.copy_from_slice(&f(i).to_le_bytes());
                }
                Self::from_le_bytes(bytes)
            }
            #[inline]
            fn from_quads(mut f: impl FnMut(usize) -> u64) -> Self {
                let mut bytes = [0; $bytes];
                for (i, lane) in bytes.chunks_exact_mut(8).enumerate() {
                    lane.copy_from_slice(&f(i).to_le_bytes());
                }
                Self::from_le_bytes(bytes)
            }
        }
    };
}

lanes!(u64, 8);
lanes!(u128, 16);
