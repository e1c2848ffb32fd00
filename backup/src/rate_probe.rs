//! What a live side's channel says of itself: its counters, and the log's rate.

use crate::status::{ChannelStatus, ms};
use std::time::{Duration, Instant};
use vmft_logging_channel::transport::PrimaryChannel;
use vmft_threads::Mutex;

/// Turns counters into a rate.
#[derive(Debug, Default)]
pub(crate) struct RateProbe(Mutex<Option<(Instant, u64, f64)>>);

impl RateProbe {
    /// The channel now, for `vmft status`.
    pub(crate) fn status(&self, channel: &PrimaryChannel) -> ChannelStatus {
        let stats = channel.stats();
        let latency = stats.acknowledge_latency;
        ChannelStatus {
            log_bytes: stats.log_bytes,
            log_entries: stats.entries,
            log_mbit_s: self.rate(stats.log_bytes),
            acknowledgement_us: latency.map_or(0.0, |summary| ms(summary.median) * 1e3),
            acknowledgement_worst_us: latency.map_or(0.0, |summary| ms(summary.max) * 1e3),
            buffered_bytes: stats.buffered,
            execution_lag_ms: ms(stats.execution_lag),
        }
    }

    /// Megabits a second since the last look, if that was long enough ago to tell.
    fn rate(&self, bytes: u64) -> f64 {
        let mut last = self.0.lock();
        let now = Instant::now();
        let rate = match *last {
            Some((then, before, rate)) if now - then < Duration::from_millis(500) => {
                let _ = before;
                return rate;
            }
            Some((then, before, _)) => {
                let bits = bytes.saturating_sub(before) as f64 * 8.0;
                bits / (now - then).as_secs_f64() / 1e6
            }
            None => 0.0,
        };
        *last = Some((now, bytes, rate));
        rate
    }
}
