//! Every instruction against the host's own CPU, and the availability checks.

mod availability;
mod differential;
mod machine;
mod native;
mod transcendental;
pub(super) mod values;
