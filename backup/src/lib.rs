//! Following and taking over: who may go live, what a side does when its peer is lost.

pub mod arbiter;
mod channel_log;
pub mod checkpoint;
pub mod epoch;
pub mod events;
pub mod fault;
pub mod follower;
pub mod following;
pub mod hand_over;
mod handler;
pub mod identity;
mod join;
mod join_content;
pub mod lag;
pub mod live;
mod mending;
mod nudges;
mod policy;
mod rate_probe;
pub mod recorded;
pub mod reign;
pub mod requests;
pub mod side;
pub mod status;
pub mod storage;
mod succession;
pub mod tell;
