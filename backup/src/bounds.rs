//! What an operator may change of a guest's protection while the guest runs: how far a backup that
//! replays may be behind, and how far apart the checkpoints of checkpoint mode are.

use crate::epoch::{Interval, Protection};
use crate::events::{self, Event};
use crate::lag::{LagBound, LagPolicy};
use crate::status::StatusBoard;
use crate::tell;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use vmft_threads::Mutex;

/// The bounds of one side. They hold while its guest runs here, and whoever it is that follows.
#[derive(Debug, Default)]
pub struct Bounds(Mutex<Bound>);

/// What there is to be bounded.
#[derive(Debug, Clone, Copy, Default)]
enum Bound {
    /// Nobody follows.
    #[default]
    Nothing,
    Lag(LagBound),
    Interval(Interval),
}

/// Another bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum BoundChange {
    /// How far a backup that replays may be behind.
    MaxLag {
        /// Milliseconds: between [`MIN_LAG`](crate::lag::MIN_LAG) and [`MAX_LAG`](crate::lag::MAX_LAG).
        ms: u64,
        /// What happens beyond it.
        then: LagPolicy,
    },
    /// The time from one checkpoint to the next.
    Interval {
        /// Milliseconds: between [`MIN_INTERVAL`](crate::epoch::MIN_INTERVAL) and
        /// [`MAX_INTERVAL`](crate::epoch::MAX_INTERVAL).
        ms: u64,
    },
}

/// Why a bound is not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BoundError {
    /// There is no pair.
    #[error("nobody follows this guest, so nothing of its protection is bounded")]
    NoPair,
    /// Of the other mode.
    #[error(
        "this guest is protected by checkpoints, behind which a backup never is by more than their \
         interval: change that with --interval"
    )]
    NoLag,
    /// Of the other mode.
    #[error(
        "this guest is protected in lockstep, which has no checkpoints: what can be changed is --max-lag"
    )]
    NoInterval,
    /// No lag.
    #[error(transparent)]
    Lag(#[from] crate::lag::LagError),
    /// No interval.
    #[error(transparent)]
    Interval(#[from] crate::epoch::IntervalError),
}

impl Bounds {
    /// The bounds with which a side begins.
    pub fn new(protection: Protection, max_lag: LagBound) -> Self {
        Self(Mutex::new(match protection {
            Protection::Lockstep => Bound::Lag(max_lag),
            Protection::Checkpoint(interval) => Bound::Interval(interval),
        }))
    }

    /// How far a backup that replays may be behind; the default where none does.
    pub(crate) fn max_lag(&self) -> LagBound {
        match *self.0.lock() {
            Bound::Lag(bound) => bound,
            Bound::Nothing | Bound::Interval(_) => LagBound::default(),
        }
    }

    /// The time between two checkpoints; the default where there are none.
    pub(crate) fn interval(&self) -> Interval {
        match *self.0.lock() {
            Bound::Interval(interval) => interval,
            Bound::Nothing | Bound::Lag(_) => Interval::default(),
        }
    }

    /// Has another bound from now on, and says so.
    ///
    /// # Errors
    /// [`BoundError`]; then everything is as before.
    pub fn change(&self, change: BoundChange, status: &StatusBoard) -> Result<(), BoundError> {
        self.set(change)?;
        match change {
            BoundChange::MaxLag { ms, .. } => {
                tell!("from now on a backup may be {ms} ms behind, as its operator says");
            }
            BoundChange::Interval { ms } => {
                tell!("from now on checkpoints are {ms} ms apart, as their operator says");
            }
        }
        events::note(|| Event::BoundChanged(change));
        self.show(status);
        Ok(())
    }

    fn set(&self, change: BoundChange) -> Result<(), BoundError> {
        let mut bound = self.0.lock();
        *bound = match (*bound, change) {
            (Bound::Nothing, _) => return Err(BoundError::NoPair),
            (Bound::Lag(lag), BoundChange::MaxLag { ms, then }) => {
                Bound::Lag(lag.with_limit(Duration::from_millis(ms), then)?)
            }
            (Bound::Interval(_), BoundChange::Interval { ms }) => {
                Bound::Interval(Duration::from_millis(ms).try_into()?)
            }
            (Bound::Lag(_), BoundChange::Interval { .. }) => return Err(BoundError::NoInterval),
            (Bound::Interval(_), BoundChange::MaxLag { .. }) => return Err(BoundError::NoLag),
        };
        Ok(())
    }

    /// Has a side's status say what is in force.
    pub(crate) fn show(&self, status: &StatusBoard) {
        let ms = |time: Duration| Some(u64::try_from(time.as_millis()).expect("at most a minute"));
        let (lag, interval) = match *self.0.lock() {
            Bound::Nothing => (None, None),
            Bound::Lag(bound) => (ms(bound.limit()), None),
            Bound::Interval(interval) => (None, ms(interval.get())),
        };
        status.update(|status| (status.lag_bound_ms, status.interval_bound_ms) = (lag, interval));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::IntervalError;
    use crate::lag::LagError;

    const SLOWER: BoundChange = BoundChange::MaxLag { ms: 200, then: LagPolicy::Stop };
    const RARER: BoundChange = BoundChange::Interval { ms: 100 };

    #[test]
    fn a_bound_is_changed_and_the_status_has_it() {
        let (second, board) = (Duration::from_secs(1), StatusBoard::default());
        let replay = LagBound::default().with_replay_bound(second).expect("within the bounds");
        let bounds = Bounds::new(Protection::Lockstep, replay);
        bounds.change(SLOWER, &board).expect("it is a bound");
        let now = bounds.max_lag();
        assert_eq!((now.limit().as_millis(), now.policy()), (200, LagPolicy::Stop));
        // What the guest was started with stays: its log is made for that.
        assert_eq!(now.replay_bound(), Some(second));
        assert_eq!(
            (board.status().lag_bound_ms, board.status().interval_bound_ms),
            (Some(200), None)
        );

        let bounds = Bounds::new(Protection::Checkpoint(Interval::default()), LagBound::default());
        bounds.change(RARER, &board).expect("it is an interval");
        assert_eq!(bounds.interval().get().as_millis(), 100);
        assert_eq!(
            (board.status().lag_bound_ms, board.status().interval_bound_ms),
            (None, Some(100))
        );
    }

    #[test]
    fn what_is_no_bound_or_not_of_this_mode_changes_nothing() {
        let board = StatusBoard::default();
        assert_eq!(Bounds::default().change(SLOWER, &board), Err(BoundError::NoPair));
        let bounds = Bounds::new(Protection::Lockstep, LagBound::default());
        assert_eq!(bounds.change(RARER, &board), Err(BoundError::NoInterval));
        for ms in [0, 49, 60_001, u64::MAX] {
            let wrong = BoundChange::MaxLag { ms, then: LagPolicy::Slow };
            let error = BoundError::Lag(LagError(Duration::from_millis(ms)));
            assert_eq!(bounds.change(wrong, &board), Err(error));
        }
        assert_eq!(bounds.max_lag(), LagBound::default());
        let bounds = Bounds::new(Protection::Checkpoint(Interval::default()), LagBound::default());
        assert_eq!(bounds.change(SLOWER, &board), Err(BoundError::NoLag));
        for ms in [0, 1, 1001, u64::MAX] {
            let error = BoundError::Interval(IntervalError(Duration::from_millis(ms)));
            assert_eq!(bounds.change(BoundChange::Interval { ms }, &board), Err(error));
        }
        assert_eq!(bounds.interval(), Interval::default());
        assert_eq!(board.status().lag_bound_ms, None);
    }
}
