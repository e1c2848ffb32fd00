//! How many CPUs a guest has.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Most CPUs a guest can have.
pub const MAX_CPUS: u8 = 4;

/// How many CPUs a guest has: 1 to [`MAX_CPUS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct CpuCount(u8);

/// A number of CPUs that no guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} guest CPUs: a guest has 1 to {MAX_CPUS}")]
pub struct CpuCountError(pub u64);

impl CpuCount {
    /// One CPU, which is all that lockstep can replay.
    pub const ONE: Self = Self(1);

    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// True if there is more than one.
    pub const fn is_several(self) -> bool {
        self.0 > 1
    }

    /// The CPUs' numbers, which are those of their local APICs too. 0 is the one that boots.
    pub fn numbers(self) -> impl Iterator<Item = u8> {
        0..self.0
    }
}

impl Default for CpuCount {
    fn default() -> Self {
        Self::ONE
    }
}

impl TryFrom<u64> for CpuCount {
    type Error = CpuCountError;

    fn try_from(number: u64) -> Result<Self, CpuCountError> {
        match u8::try_from(number) {
            Ok(count @ 1..=MAX_CPUS) => Ok(Self(count)),
            _ => Err(CpuCountError(number)),
        }
    }
}

impl TryFrom<u8> for CpuCount {
    type Error = CpuCountError;

    fn try_from(number: u8) -> Result<Self, CpuCountError> {
        Self::try_from(u64::from(number))
    }
}

impl From<CpuCount> for u8 {
    fn from(count: CpuCount) -> Self {
        count.0
    }
}

impl fmt::Display for CpuCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_one_to_four_cpus() {
        for good in 1..=4 {
            assert_eq!(CpuCount::try_from(good).map(|count| u64::from(count.get())), Ok(good));
        }
        for wrong in [0, 5, 257, u64::MAX] {
            assert_eq!(CpuCount::try_from(wrong), Err(CpuCountError(wrong)));
        }
        assert!(postcard::from_bytes::<CpuCount>(&[9]).is_err(), "a saved count is checked too");
    }
}
