//! Whole pairs in one process: the real judge, the real sessions and gates, and models of everything
//! around them, all decided by one seed.
//!
//! What is real: [`LiveReign`](vmft_backup::reign::LiveReign) and
//! [`FollowReign`](vmft_backup::reign::FollowReign), the primary's
//! [`Backups`](vmft_logging_channel::backups::Backups) with a sender for each, the receiver, the detector,
//! the handshake, the frames' bytes, the gates of both sides, the checkpoint streams of epochs. What is a model: the guest, the network, the
//! hosts, their clocks and caches, the arbiter's directory and the storage.
//!
//! A schedule has a time in which things go wrong, then the world is healed, perhaps after one last fault
//! that strikes a pair which says that it is protected, and somebody has to go on.

#![forbid(unsafe_code)]

mod coverage;
mod disk;
mod epochs;
mod follow;
mod guest;
mod live;
mod models;
mod oracle;
mod peers;
mod plan;
mod search;
mod side;
mod world;

pub use coverage::Coverage;
pub use plan::Plan;
pub use search::{Found, Search, check, search};
pub use world::{Outcome, Plant, run};
