//! The `kvm` engine through its public face: small guests at privilege level 0 on this host's
//! `/dev/kvm`, and the same guests on `soft`.
//!
//! Where there is no `/dev/kvm` these tests fail, unless the environment says `VMFT_NO_KVM=1`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod agreement;
mod counting;
mod cpus;
mod exit_stream;
mod exits;
mod free;
mod guest;
mod interrupts;
mod kicks;
mod levels;
mod state;
