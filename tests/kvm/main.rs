//! The probe guest on every engine: live, recorded and replayed, and as a pair that loses its
//! primary; and what is refused.
//!
//! What needs `/dev/kvm` fails where there is none, unless the run says so with `VMFT_NO_KVM=1`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bare;
mod branches;
mod checkpoints;
mod engines;
mod exit_checkpoints;
mod faults;
mod kernel_start;
mod linux;
mod linux_cpus;
mod linux_epochs;
mod lockstep;
mod network;
mod per_exit;
#[path = "../pair/random.rs"]
mod random;
mod refusals;
mod station;
