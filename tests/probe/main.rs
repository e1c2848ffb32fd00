//! Record and replay in one process, with a guest of a few hundred bytes: equal digests whatever
//! the slices, a log from an earlier day, and divergence that is caught.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod divergence;
mod guest;
mod jumps;
mod recording;
mod vector;
mod watching;
