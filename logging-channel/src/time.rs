//! The sessions' notion of time: a number somebody else read from a clock.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A moment on one host's monotonic clock, in nanoseconds since an origin only that host knows.
///
/// The pure part of this crate is handed these and never reads a clock. Moments of two hosts
/// cannot be compared.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct MonotonicTime(u64);

impl MonotonicTime {
    /// The clock's origin.
    pub const ZERO: Self = Self(0);

    /// `ns` nanoseconds after the origin.
    pub const fn from_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since the origin.
    pub const fn as_ns(self) -> u64 {
        self.0
    }

    /// The moment `duration` later, saturating after 584 years.
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Time from `earlier` to this moment; zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}
