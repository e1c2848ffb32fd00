//! What fuzz targets share: numbers from one seed, good bytes and good values gone bad, how many cases
//! there are, and what a parser takes of memory. For tests only.
//!
//! A target is an ordinary test that calls [`cases`] or [`large_cases`]. It makes its good bytes
//! with the real encoders, has them [damaged](damage) or [changed](change), and gives them to the
//! parser. What it asserts: a typed error or a value that can be used, no panic, no more memory
//! than the bytes are worth ([`peak_of`]).

#![deny(unsafe_code)]

mod allocations;
mod cases;
mod damage;
mod random;
mod tree;

pub use allocations::{Counting, peak_of};
pub use cases::{CASES, SEED, cases, large_cases};
pub use damage::damage;
pub use random::{Random, mix};
pub use tree::change;
