//! Disks on a host of their own (`vmft disk serve`): pairs on them, real clients of the protocol,
//! what is refused; and storage that fails, on servers and elsewhere.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_way;
mod clients;
mod failing_pairs;
mod failing_storage;
mod generations;
mod pairs;
mod refusals;
mod server;
mod tls;
