//! What is said of those who were turned away: each kind a few times, and then only how many there were.
//!
//! Whoever can reach the port can be turned away as often as he likes; the log is not his to fill.

use super::TransportError;
use crate::handshake::{HandshakeError, Refusal};
use crate::time::MonotonicTime;
use std::collections::BTreeMap;
use std::time::Duration;

/// So many of a kind are told one by one in a [`PERIOD`].
pub(super) const TOLD_PER_PERIOD: u32 = 5;
/// How long it is counted.
pub(super) const PERIOD: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Kind {
    since: MonotonicTime,
    told: u32,
    untold: u64,
}

/// Counts by kind.
#[derive(Debug, Default)]
pub(super) struct Refusals(BTreeMap<&'static str, Kind>);

impl Refusals {
    /// Somebody was turned away at `now`: whether that is to be told, and how many before it were not.
    pub(super) fn count(&mut self, now: MonotonicTime, error: &TransportError) -> Option<u64> {
        let kind = self.0.entry(kind(error)).or_default();
        if now.since(kind.since) >= PERIOD {
            (kind.since, kind.told) = (now, 0);
        }
        if kind.told == TOLD_PER_PERIOD {
            kind.untold += 1;
            return None;
        }
        kind.told += 1;
        Some(std::mem::take(&mut kind.untold))
    }
}

fn kind(error: &TransportError) -> &'static str {
    match error {
        TransportError::Handshake(HandshakeError::Refused(refusal)) => match refusal {
            Refusal::Version { .. } => "version",
            Refusal::WrongPair { .. } => "pair",
            Refusal::OtherStorage => "storage",
            Refusal::Fingerprint(_) => "fingerprint",
            Refusal::WrongGeneration { .. } => "generation",
            Refusal::HasBackup | Refusal::NotAccepting(_) => "no place",
            Refusal::WrongRole(_) | Refusal::Replayed | Refusal::Undisclosed => "other refusal",
        },
        TransportError::Handshake(_) => "handshake",
        TransportError::Tls(_) => "own certificate",
        TransportError::Certificate(_) => "certificate",
        TransportError::TlsHandshake(_)
        | TransportError::PeerIsPlain
        | TransportError::PeerUsesTls => "TLS",
        TransportError::Frame(_) => "frame",
        TransportError::TimedOut { .. } | TransportError::MadeWay => "slow",
        TransportError::Closed { .. } | TransportError::Io(_) => "gone",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_of_a_kind_are_told_and_the_rest_are_counted() {
        let mut refusals = Refusals::default();
        let at = |ms: u64| MonotonicTime::from_ns(ms * 1_000_000 + 1_000_000_000_000);
        let mut told = 0;
        for ms in 0..1000 {
            told += u32::from(refusals.count(at(ms), &TransportError::PeerIsPlain).is_some());
        }
        assert_eq!(told, TOLD_PER_PERIOD);
        // Another kind is news.
        assert_eq!(refusals.count(at(1000), &TransportError::MadeWay), Some(0));
        let later = PERIOD.as_millis() as u64;
        let untold = 1000 - u64::from(TOLD_PER_PERIOD);
        assert_eq!(refusals.count(at(later), &TransportError::PeerIsPlain), Some(untold));
        assert_eq!(refusals.count(at(later), &TransportError::PeerIsPlain), Some(0));
    }
}
