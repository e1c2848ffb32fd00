//! When the next epoch is due.

use std::time::Duration;

/// The shortest interval that may be asked for.
pub const MIN_INTERVAL: Duration = Duration::from_millis(2);
/// The longest interval that may be asked for, and the longest there is: what a failover may undo of
/// the guest's work, none of which anybody has seen.
pub const MAX_INTERVAL: Duration = Duration::from_secs(1);
/// With outputs that wait, an epoch comes after this share of the interval.
const HURRY: u32 = 4;
/// A guest that writes no more pages than this in an epoch, and has nothing that waits, is quiet.
const QUIET_PAGES: usize = 64;
/// A quiet guest is asked so many times more rarely.
const QUIET: u32 = 4;
/// The guest runs at least so many times as long as it rests: a tenth of its time at most is lost.
const RUN_PER_REST: u32 = 9;

/// No interval for epochs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an interval of {} ms: at least {} ms, at most {} ms", .0.as_millis(), MIN_INTERVAL.as_millis(), MAX_INTERVAL.as_millis())]
pub struct IntervalError(pub Duration);

/// The time from one epoch to the next, as the operator asks for it: between [`MIN_INTERVAL`] and
/// [`MAX_INTERVAL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval(Duration);

impl Default for Interval {
    /// 25 ms: forty epochs a second, as the systems of this kind have them.
    fn default() -> Self {
        Self(Duration::from_millis(25))
    }
}

impl Interval {
    /// The time.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl TryFrom<Duration> for Interval {
    type Error = IntervalError;

    fn try_from(duration: Duration) -> Result<Self, IntervalError> {
        let fits = (MIN_INTERVAL..=MAX_INTERVAL).contains(&duration);
        if fits { Ok(Self(duration)) } else { Err(IntervalError(duration)) }
    }
}

/// What the last epoch cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Cost {
    /// How long the guest rested.
    pub(super) rest: Duration,
    /// How long packing and handing over took, while the guest ran.
    pub(super) sending: Duration,
    /// Pages it wrote.
    pub(super) pages: usize,
}

/// When the next epoch is due, counted from the beginning of the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Due {
    /// If outputs wait.
    pub(super) with_outputs: Duration,
    /// If none does.
    pub(super) without: Duration,
}

impl Interval {
    /// When the next epoch is due after one that cost so much.
    ///
    /// An output that waits brings it nearer, to a quarter of the interval at most; so does nothing
    /// else. A guest that writes much puts it off: it is not asked again before what it wrote is packed,
    /// nor before it has run nine times as long as it rested. A quiet guest is asked four times more
    /// rarely. It never takes longer than [`MAX_INTERVAL`], unless sending does.
    pub(super) fn after(self, cost: Cost) -> Due {
        let least =
            cost.sending.max((cost.rest * RUN_PER_REST).min(MAX_INTERVAL)).max(MIN_INTERVAL);
        let quiet = cost.pages <= QUIET_PAGES;
        let slow = if quiet { (self.0 * QUIET).min(MAX_INTERVAL) } else { self.0 };
        Due { with_outputs: (self.0 / HURRY).max(least), without: slow.max(least) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn after(interval: u64, rest: u64, sending: u64, pages: usize) -> (Duration, Duration) {
        let interval = Interval::try_from(ms(interval)).expect("within the bounds");
        let due = interval.after(Cost { rest: ms(rest), sending: ms(sending), pages });
        (due.with_outputs, due.without)
    }

    #[test]
    fn outputs_that_wait_bring_the_next_epoch_nearer() {
        assert_eq!(after(40, 1, 3, 1000), (ms(10), ms(40)));
        assert_eq!(after(4, 0, 0, 1000), (ms(2), ms(4)));
    }

    #[test]
    fn a_guest_that_writes_much_is_asked_more_rarely() {
        assert_eq!(after(20, 5, 10, 9000), (ms(45), ms(45)), "it rests a tenth of the time");
        assert_eq!(after(20, 1, 70, 9000), (ms(70), ms(70)), "what it wrote is packed first");
        assert_eq!(after(20, 400, 0, 9000), (ms(1000), ms(1000)), "but not for ever");
    }

    #[test]
    fn a_quiet_guest_is_asked_more_rarely_unless_it_has_something_to_say() {
        assert_eq!(after(40, 0, 0, 10), (ms(10), ms(160)));
        assert_eq!(after(600, 0, 0, 10), (ms(150), ms(1000)));
    }

    #[test]
    fn an_interval_beyond_the_bounds_is_refused() {
        for wrong in [0, 1, 1001] {
            let error = Interval::try_from(ms(wrong)).expect_err("beyond the bounds");
            let wanted = format!("an interval of {wrong} ms: at least 2 ms, at most 1000 ms");
            assert_eq!(error.to_string(), wanted);
        }
    }
}
