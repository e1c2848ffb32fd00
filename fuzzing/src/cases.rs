//! How many cases there are, and which.

use crate::Random;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The variable that says how many cases each target has.
pub const CASES: &str = "VMFT_FUZZ_CASES";
/// The variable that names the first case.
pub const SEED: &str = "VMFT_FUZZ_SEED";

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number, not `{text}`")))
}

/// Does `case` with the numbers of each seed, from 1 on: `quick` times, or as often as [`CASES`] says. Each
/// case takes some milliseconds, so that one number suits all targets.
///
/// # Panics
/// If a case does; how to see it again is said.
pub fn cases(quick: u64, case: impl FnMut(Random)) {
    large_cases(quick, 1, case);
}

/// The same with cases that take longer, each of which counts for so many.
///
/// # Panics
/// If a case does; how to see it again is said.
pub fn large_cases(quick: u64, worth: u64, mut case: impl FnMut(Random)) {
    let first = number(SEED).unwrap_or(1);
    let count = number(CASES).map_or(quick, |count| count.div_ceil(worth));
    for seed in first..first + count {
        let went = catch_unwind(AssertUnwindSafe(|| case(Random::new(seed))));
        assert!(went.is_ok(), "{SEED}={seed} {CASES}=1 shows it again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_that_fails_is_named() {
        if number(SEED).is_some() || number(CASES).is_some() {
            println!("{SEED} or {CASES} is set: the cases are not those that this test counts");
            return;
        }
        let mut numbers = Vec::new();
        cases(3, |mut random| numbers.push(random.next()));
        assert_eq!(numbers, [1, 2, 3].map(|seed| Random::new(seed).next()));
        let unwanted = numbers[1];
        let failed = catch_unwind(|| {
            cases(3, |mut random| assert_ne!(random.next(), unwanted, "planted"));
        });
        let message = failed.expect_err("the second case fails").downcast::<String>();
        let message = message.expect("a message with the seed in it");
        assert_eq!(*message, "VMFT_FUZZ_SEED=2 VMFT_FUZZ_CASES=1 shows it again");
    }
}
