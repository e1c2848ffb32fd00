//! The page of `vmft dashboard` and of `vmft demo --web`: what is served, to whom, and what a pair looks
//! like on it through a failover.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod door;
mod fuzz;
mod pairs;
mod reader;
mod sides;
