//! The clock by which evidence ages.

use std::time::Duration;

/// Time by a clock that goes on while the host is suspended. Only differences mean something.
///
/// # Panics
/// On a kernel that has no such clock; Linux has had one since 2.6.39.
pub fn time_with_suspension() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    time.expect("Linux has this clock").into()
}
