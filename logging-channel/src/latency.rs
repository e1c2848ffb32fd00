//! Durations of the recent past, summed up.

use std::collections::VecDeque;
use std::time::Duration;

/// How many durations are remembered: some seconds of a busy pair, in 16 KiB.
pub const LATENCY_WINDOW: usize = 1024;

/// The most recent [`LATENCY_WINDOW`] durations.
#[derive(Debug, Clone, Default)]
pub struct LatencyWindow {
    samples: VecDeque<Duration>,
}

/// A summary of a [`LatencyWindow`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatencySummary {
    /// The shortest.
    pub min: Duration,
    /// The middle one (of an even number, the longer of the two).
    pub median: Duration,
    /// The longest.
    pub max: Duration,
    /// How many there are.
    pub samples: usize,
}

impl LatencyWindow {
    /// Adds a duration; the oldest goes when the window is full.
    pub fn add(&mut self, duration: Duration) {
        if self.samples.len() == LATENCY_WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back(duration);
    }

    /// The summary; `None` without samples.
    pub fn summary(&self) -> Option<LatencySummary> {
        let mut sorted: Vec<Duration> = self.samples.iter().copied().collect();
        sorted.sort_unstable();
        Some(LatencySummary {
            min: *sorted.first()?,
            median: sorted[sorted.len() / 2],
            max: *sorted.last()?,
            samples: sorted.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_window_counts() {
        let mut window = LatencyWindow::default();
        assert_eq!(window.summary(), None);
        window.add(Duration::from_secs(9));
        for us in 0..LATENCY_WINDOW as u64 {
            window.add(Duration::from_micros(us));
        }
        let summary = window.summary().expect("there are samples");
        assert_eq!(summary.min, Duration::ZERO);
        assert_eq!(summary.median, Duration::from_micros(512));
        assert_eq!(summary.max, Duration::from_micros(1023));
        assert_eq!(summary.samples, LATENCY_WINDOW);
    }
}
