//! Host time, for limits and for what exits cost. Nothing of it reaches a guest.

use std::time::Instant;

/// Now.
#[expect(clippy::disallowed_methods, reason = "the doctor measures the host, in host time")]
pub fn now() -> Instant {
    Instant::now()
}
