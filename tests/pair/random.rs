//! Seeded choices. Every test prints its seed, and takes it from `VMFT_SEED`.

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
pub struct Random(u64);

impl Random {
    /// From `VMFT_SEED` if that is set, else from `default`; prints it.
    pub fn seeded(test: &str, default: u64) -> Self {
        let seed = std::env::var("VMFT_SEED")
            .ok()
            .map_or(default, |text| text.parse().expect("VMFT_SEED is a number"));
        println!("{test}: seed {seed} (VMFT_SEED={seed} repeats it)");
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number of the range.
    pub fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }
}
