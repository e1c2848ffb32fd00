//! Arbiters of all kinds, held against one description of what an arbiter does; an etcd whose members
//! fail; and a pair that has its arbiter there.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cluster;
mod conformance;
mod etcd;
mod pair;
#[path = "../nbd/server.rs"]
#[expect(dead_code, reason = "the tests of served disks use more of it")]
mod server;
