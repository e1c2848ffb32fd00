//! The one place that reads a clock.

use crate::time::MonotonicTime;
use rustls::pki_types::UnixTime;
use std::time::Duration;

/// The host's monotonic clock. Processes on one host read the same clock, so their moments can
/// be compared.
#[expect(clippy::disallowed_methods, reason = "the transport hands the time to the pure part")]
pub fn now() -> MonotonicTime {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("every Linux has a monotonic clock");
    let seconds = u64::try_from(time.tv_sec()).expect("the monotonic clock is not negative");
    let ns = u64::try_from(time.tv_nsec()).expect("nanoseconds are not negative");
    MonotonicTime::from_ns(seconds * 1_000_000_000 + ns)
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
