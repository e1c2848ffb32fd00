//! The one place that reads a clock.

use crate::detector::Suspended;
use crate::time::MonotonicTime;
use rustls::pki_types::UnixTime;
use std::time::Duration;

/// How long something has been waited for: a limit of patience, not the age of evidence. Time in which the
/// host was suspended does not count.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wait(tokio::time::Instant);

impl Wait {
    /// It begins now.
    pub(super) fn begin() -> Self {
        Self(tokio::time::Instant::now())
    }

    /// What is left of `limit`.
    pub(super) fn left(self, limit: Duration) -> Duration {
        limit.saturating_sub(self.0.elapsed())
    }

    /// Sleeps until `limit` is over.
    pub(super) async fn over(self, limit: Duration) {
        tokio::time::sleep_until(self.0 + limit).await;
    }
}

/// The host's monotonic clock, by which evidence ages: it goes on while the host is suspended. Processes on one host read the same clock, so their moments can
/// be compared.
pub fn now() -> MonotonicTime {
    read(nix::time::ClockId::CLOCK_BOOTTIME)
}

#[expect(clippy::disallowed_methods, reason = "the transport hands the time to the pure part")]
fn read(clock: nix::time::ClockId) -> MonotonicTime {
    let time = nix::time::clock_gettime(clock).expect("every Linux has a monotonic clock");
    let seconds = u64::try_from(time.tv_sec()).expect("the monotonic clock is not negative");
    let ns = u64::try_from(time.tv_nsec()).expect("nanoseconds are not negative");
    MonotonicTime::from_ns(seconds * 1_000_000_000 + ns)
}

/// How long the host has been suspended since it was booted: at least, and at most, since the clocks cannot be
/// read at once.
pub(super) fn suspended() -> Suspended {
    let before = read(nix::time::ClockId::CLOCK_MONOTONIC);
    let with = read(nix::time::ClockId::CLOCK_BOOTTIME);
    let after = read(nix::time::ClockId::CLOCK_MONOTONIC);
    Suspended { at_least: with.since(after), at_most: with.since(before) }
}

/// What the date is, for certificates. A host that takes itself for older than 1970 gets that.
#[expect(clippy::disallowed_methods, reason = "certificates are valid from one date to another")]
pub(super) fn today() -> UnixTime {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)
        .expect("every Linux has a wall clock");
    let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

/// Waits until `moment`, to about a millisecond; for ever if there is none.
#[expect(clippy::disallowed_methods, reason = "the transport waits on behalf of the pure part")]
pub(super) async fn sleep_until(moment: Option<MonotonicTime>) {
    match moment {
        Some(moment) => tokio::time::sleep(moment.since(now())).await,
        None => std::future::pending().await,
    }
}

/// Runs `future` for at most `limit`; `None` if it took longer.
#[expect(clippy::disallowed_methods, reason = "a peer that stalls has to be dropped")]
pub(super) async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    tokio::time::timeout(limit, future).await.ok()
}
