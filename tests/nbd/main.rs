//! Disks on a host of their own (`vmft disk serve`): pairs on them, real clients of the protocol,
//! and what is refused.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod clients;
mod generations;
mod pairs;
mod refusals;
mod server;
mod tls;
