//! Seeded choices. Every test prints its seed, and takes it from `VMFT_SEED`.

/// The numbers of a seed that is printed.
pub struct Random(vmft_fuzzing::Random);

impl Random {
    /// From `VMFT_SEED` if that is set, else from `default`; prints it.
    pub fn seeded(test: &str, default: u64) -> Self {
        let seed = std::env::var("VMFT_SEED")
            .ok()
            .map_or(default, |text| text.parse().expect("VMFT_SEED is a number"));
        println!("{test}: seed {seed} (VMFT_SEED={seed} repeats it)");
        Self(vmft_fuzzing::Random::new(seed))
    }

    /// A number of the range.
    pub fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        self.0.between(range.start, range.end - 1)
    }
}
