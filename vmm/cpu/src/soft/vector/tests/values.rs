//! Seeded values: random ones, and those at which arithmetic has its corners.

/// Numbers of a seed, as operands.
pub(in super::super) struct Random(vmft_fuzzing::Random);

impl Random {
    pub(in super::super) const fn new(seed: u64) -> Self {
        Self(vmft_fuzzing::Random::new(seed))
    }

    pub(in super::super) fn next(&mut self) -> u64 {
        self.0.next()
    }

    pub(in super::super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    fn single(&mut self) -> u32 {
        const CORNERS: [u32; 20] = [
            0,
            1,
            0x0000_0003,
            0x007F_FFFF,
            0x0080_0000,
            0x0080_0001,
            0x3F00_0000,
            0x3F80_0000,
            0x3FC0_0000,
            0x4020_0000,
            0x4EFF_FFFF,
            0x4F00_0000,
            0x5EFF_FFFF,
            0x5F00_0000,
            0x7F7F_FFFF,
            0x7F80_0000,
            0x7F80_0001,
            0x7FC0_0000,
            0x7FC0_1234,
            0x3F80_0001,
        ];
        let bits = match self.below(3) {
            0 => self.next() as u32,
            1 => 0x3F00_0000 ^ self.next() as u32 & 0x03FF_FFFF,
            _ => self.pick(&CORNERS),
        };
        bits ^ (self.next() as u32 & 0x8000_0000)
    }

    fn double(&mut self) -> u64 {
        const CORNERS: [u64; 20] = [
            0,
            1,
            0x000F_FFFF_FFFF_FFFF,
            0x0010_0000_0000_0000,
            0x0010_0000_0000_0001,
            0x3690_0000_0000_0000,
            0x36A0_0000_0000_0001,
            0x3810_0000_0000_0000,
            0x380F_FFFF_FFFF_FFFF,
            0x3FE0_0000_0000_0000,
            0x3FF0_0000_0000_0000,
            0x4004_0000_0000_0000,
            0x41DF_FFFF_FFFF_FFFF,
            0x41E0_0000_0000_0000,
            0x43E0_0000_0000_0000,
            0x47EF_FFFF_FFFF_FFFF,
            0x7FEF_FFFF_FFFF_FFFF,
            0x7FF0_0000_0000_0000,
            0x7FF0_0000_0000_0001,
            0x7FF8_0000_0000_4321,
        ];
        let bits = match self.below(4) {
            0 => self.next(),
            1 => 0x3FF0_0000_0000_0000 ^ self.next() & 0x007F_FFFF_FFFF_FFFF,
            2 => 0x4000_0000_0000_0000 ^ self.next() & 0x83FF_FFFF_FF00_0000,
            _ => self.pick(&CORNERS),
        };
        bits ^ (self.next() & 0x8000_0000_0000_0000)
    }

    fn integer(&mut self) -> u64 {
        const CORNERS: [u64; 8] = [
            0,
            u64::MAX,
            0x8000_0000_0000_0000,
            0x8080_8080_8080_8080,
            0x7F7F_7F7F_7F7F_7F7F,
            0x8000_7FFF_8000_7FFF,
            0x0001_0000_FFFF_0010,
            0x7FFF_FFFF_8000_0000,
        ];
        match self.below(4) {
            0 => self.pick(&CORNERS),
            1 => self.below(80),
            _ => self.next(),
        }
    }

    /// Any 64 bits: an integer, a double, or two singles.
    pub(in super::super) fn quad(&mut self) -> u64 {
        match self.below(4) {
            0 => self.integer(),
            1 => self.double(),
            2 => u64::from(self.single()) << 32 | u64::from(self.single()),
            // Few different bytes, as strings to compare have.
            _ => self.next() & 0x0301_0003_0100_0203,
        }
    }

    /// Any 128 bits.
    pub(in super::super) fn whole(&mut self) -> u128 {
        u128::from(self.quad()) << 64 | u128::from(self.quad())
    }

    /// An x87 register: any encoding, valid or not.
    pub(in super::super) fn extended(&mut self) -> [u8; 10] {
        const SIGNIFICANDS: [u64; 9] = [
            0,
            1,
            0x8000_0000_0000_0000,
            0x8000_0000_0000_0001,
            0xC000_0000_0000_0000,
            0xC000_0000_0000_1234,
            0xFFFF_FFFF_FFFF_FFFF,
            0x7FFF_FFFF_FFFF_FFFF,
            0x4000_0000_0000_0000,
        ];
        const EXPONENTS: [u16; 12] =
            [0, 1, 2, 0x3FFF, 0x3FFE, 0x4000, 0x7FFE, 0x7FFF, 0x401E, 0x403E, 0x43FF, 0x3C00];
        let significand = match self.below(4) {
            0 => self.pick(&SIGNIFICANDS),
            1 => self.next() << 40 | 1 << 63,
            _ => self.next() | 1 << 63,
        };
        let exponent = match self.below(6) {
            0 => self.pick(&EXPONENTS),
            1 => self.next() as u16 & 0x7FFF,
            2 => 0x3FFF + self.below(140) as u16 - 70,
            3 => 0x3F7F + self.below(260) as u16,
            _ => 0x3FFF + self.below(8) as u16 - 4,
        };
        let sign = self.next() as u16 & 0x8000;
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&significand.to_le_bytes());
        bytes[8..].copy_from_slice(&(exponent | sign).to_le_bytes());
        bytes
    }
}
