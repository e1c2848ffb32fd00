//! What the engine relies on of a host's KVM, and measures before it does: that breakpoints stop a
//! guest where they should, that the counter of branches is exact.
//!
//! Guests of a few dozen bytes show it, on a minimal loop of their own ([`lab`]) and not on the
//! engine, so that what is wrong with a KVM can be said where the engine would not even start. The
//! doctor's report is made of the same.

pub mod breakpoint;
pub mod clock;
pub mod counter;
pub mod device;
pub mod facts;
pub mod host;
pub mod lab;
pub mod layout;
pub mod watchdog;

/// Where KVM is.
pub const DEVICE: &str = "/dev/kvm";
