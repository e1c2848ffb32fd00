//! Whole pairs: two processes of this program, the default guest, and what happens to them.
//!
//! The guest is booted once and saved; most pairs start from there, on a disk of their own. Pairs
//! run one at a time, so that what is measured of one is not the load of another.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bounded_replay;
mod checkpoint_mode;
mod diverged;
mod ending;
mod events;
mod failed;
mod kill;
mod lag;
mod mirrored;
mod output_rule;
mod partition;
mod pause;
mod proxy;
mod random;
mod rejoin;
mod relay;
mod rounds;
mod service;
mod several;
mod snapshot;
mod stage;
mod switch;
mod terminal;
mod up;
mod watching;
mod witness;
