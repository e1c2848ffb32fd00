//! Seeded randomness: every case is a pure function of the seed and its number.

/// Numbers for one case.
#[derive(Debug, Clone)]
pub struct Rng(vmft_fuzzing::Random);

impl Rng {
    /// The stream of case `index` under `seed`.
    pub fn new(seed: u64, index: u64) -> Self {
        let seed = seed ^ index.wrapping_mul(0xD129_0D3B_3B2B_9D4D);
        let mut rng = Self(vmft_fuzzing::Random::new(seed));
        rng.next();
        rng
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0.next()
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// An index into something of `len` elements.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True in `percent` of a hundred draws.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One element.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }
}
