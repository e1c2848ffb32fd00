//! The judge: who goes live, who halts, what may leave, who may join.
//!
//! Two state machines without sockets, clocks, threads or files: [`LiveReign`] judges for a side that
//! runs the guest, [`FollowReign`] for one that follows. Both are told the time and what has happened,
//! and are asked what is to be done ([`LiveReign::poll_action`]) and when to look at the clock again,
//! the same shape as the sessions of the logging channel. Whoever executes the actions (the shell in
//! `policy` and `following`, the simulator of whole pairs) decides nothing.
//!
//! The invariants of the design that are about who may do what (an output waits while somebody follows,
//! a generation is won before a side goes on, a clean stop starts no race) are assertions here.

mod follow;
#[cfg(test)]
mod follow_tests;
mod live;
#[cfg(test)]
mod live_tests;

pub use follow::{Fate, FollowAction, FollowEvent, FollowReign, Ruling, SessionOver};
pub use live::{HANDED_OVER, LiveAction, LiveEvent, LiveReign, Standing};
