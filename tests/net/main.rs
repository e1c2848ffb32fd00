//! Pairs on a network: two hosts, a client and a bridge in network namespaces of their own, real
//! clients and real servers, and what happens when a side or a link is lost.
//!
//! Needs root and TAP devices: where there are none the tests fail, unless the run says so with
//! `VMFT_NO_NET=1`. Pairs run one at a time, so that what is measured of one is not the load of another.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod capture;
mod demo;
mod echo;
mod fence;
mod killed;
mod lab;
mod link;
mod partition;
mod recorded;
mod rule;
mod stage;
mod stream;
