//! How far a backup may be behind, and what is done about it.
//!
//! The lag is what a failover has to replay before the guest goes on, so it is kept short: a primary is
//! slowed, the more the further its backup falls behind (§2.4 of the paper), long before a full buffer
//! would stop it.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// The shortest bound that may be asked for: acknowledgements tell of the lag some fifty times a second.
pub const MIN_LAG: Duration = Duration::from_millis(50);
/// The longest.
pub const MAX_LAG: Duration = Duration::from_secs(60);
/// How long a backup may be beyond the bound before it is given up, where it is.
pub(crate) const GRACE: Duration = Duration::from_secs(1);
/// The share of the bound, in percent, up to which the primary runs freely.
const FREE_PERCENT: u32 = 15;

/// No bound for a backup's lag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a lag of {} ms: at least {} ms, at most {} ms", .0.as_millis(), MIN_LAG.as_millis(), MAX_LAG.as_millis())]
pub struct LagError(pub Duration);

/// The shortest bound of a replay: a checkpoint costs as much as the guest has written since the last.
pub const MIN_REPLAY: Duration = Duration::from_millis(20);

/// No bound for a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a replay of {} ms: at least {} ms, at most {} ms", .0.as_millis(), MIN_REPLAY.as_millis(), MAX_LAG.as_millis())]
pub struct ReplayBoundError(pub Duration);

/// What happens when slowing the primary does not keep its backup within the bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LagPolicy {
    /// It is slowed further, to a tenth of its speed at most. Only a full buffer stops it.
    #[default]
    Slow,
    /// The primary goes on without a backup that has been beyond the bound for a second, and says so.
    Unprotect,
    /// The guest waits until the backup is within the bound again.
    Stop,
}

/// How far a backup may be behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LagBound {
    limit: Duration,
    policy: LagPolicy,
    /// Beyond this, checkpoints in the log spare it the replay.
    replay: Option<Duration>,
}

impl Default for LagBound {
    /// 120 ms, by slowing: the paper finds a lag below 100 ms typical.
    fn default() -> Self {
        Self { limit: Duration::from_millis(120), policy: LagPolicy::Slow, replay: None }
    }
}

impl LagBound {
    /// A bound between [`MIN_LAG`] and [`MAX_LAG`].
    ///
    /// # Errors
    /// [`LagError`].
    pub fn new(limit: Duration, policy: LagPolicy) -> Result<Self, LagError> {
        Self::default().with_limit(limit, policy)
    }

    /// The same with another limit and another policy.
    ///
    /// # Errors
    /// [`LagError`].
    pub(crate) fn with_limit(self, limit: Duration, policy: LagPolicy) -> Result<Self, LagError> {
        let fits = (MIN_LAG..=MAX_LAG).contains(&limit);
        if fits { Ok(Self { limit, policy, ..self }) } else { Err(LagError(limit)) }
    }

    /// The same, and what a backup that is more than `replay` behind has to replay is bounded too: as
    /// often, there is a checkpoint in the log for it.
    ///
    /// # Errors
    /// [`ReplayBoundError`].
    pub fn with_replay_bound(self, replay: Duration) -> Result<Self, ReplayBoundError> {
        let fits = (MIN_REPLAY..=MAX_LAG).contains(&replay);
        if fits { Ok(Self { replay: Some(replay), ..self }) } else { Err(ReplayBoundError(replay)) }
    }

    /// How far a backup may be behind before checkpoints in the log spare it the replay.
    pub const fn replay_bound(&self) -> Option<Duration> {
        self.replay
    }

    /// The bound.
    pub const fn limit(&self) -> Duration {
        self.limit
    }

    /// What happens beyond it.
    pub const fn policy(&self) -> LagPolicy {
        self.policy
    }

    /// The share of its time, in percent, that a primary waits for a backup behind by `lag`: none at
    /// first, half at the bound, nine tenths far beyond it.
    pub(crate) fn held_back_percent(&self, lag: Duration) -> u32 {
        let free = self.limit * FREE_PERCENT / 100;
        let (over, range) = (lag.saturating_sub(free).as_micros(), (self.limit - free).as_micros());
        u32::try_from((over * 50 / range).min(90)).expect("at most 90")
    }
}

/// Whether a primary is slowed, as it is told: one that is slowed now and then is slowed all the time, and one
/// that was slowed for a moment is not worth a word.
#[derive(Debug, Default)]
pub(crate) struct Slowness(Option<Spell>);

/// A time in which a primary is slowed, now and then at least.
#[derive(Debug)]
struct Spell {
    since: Instant,
    /// When it was slowed last.
    last: Instant,
    is_told: bool,
}

impl Slowness {
    /// It is slowed at `now`, or is not. True if that is to be told as the beginning, false as the end.
    pub(crate) fn look(&mut self, is_slowed: bool, now: Instant) -> Option<bool> {
        let Some(spell) = &mut self.0 else {
            self.0 = is_slowed.then_some(Spell { since: now, last: now, is_told: false });
            return None;
        };
        if is_slowed {
            spell.last = now;
            let is_long = now.saturating_duration_since(spell.since) >= GRACE;
            return (is_long && !std::mem::replace(&mut spell.is_told, is_long)).then_some(true);
        }
        let is_over = now.saturating_duration_since(spell.last) >= GRACE;
        let was_told = spell.is_told;
        if is_over {
            self.0 = None;
        }
        (is_over && was_told).then_some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_primary_is_slowed_gradually_and_never_quite_stopped_by_slowing() {
        let percent = |ms| LagBound::default().held_back_percent(Duration::from_millis(ms));
        assert_eq!(percent(0), 0);
        assert_eq!(percent(18), 0);
        assert_eq!(percent(69), 25);
        assert_eq!(percent(120), 50);
        assert_eq!(percent(60_000), 90);
    }

    #[test]
    fn a_primary_that_is_slowed_now_and_then_for_a_second_is_told_of_once() {
        let (mut slowness, start) = (Slowness::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(slowness.look(false, at(0)), None);
        for ms in (10..1010).step_by(10) {
            assert_eq!(slowness.look(ms % 200 == 10, at(ms)), None);
        }
        assert_eq!(slowness.look(true, at(1010)), Some(true));
        for ms in (1020..2000).step_by(10) {
            assert_eq!(slowness.look(ms % 200 == 0, at(ms)), None);
        }
        assert_eq!(slowness.look(false, at(2799)), None);
        assert_eq!(slowness.look(false, at(2800)), Some(false));
        assert_eq!(slowness.look(false, at(9000)), None);
    }

    #[test]
    fn a_primary_that_is_slowed_for_a_moment_is_not_told_of() {
        let (mut slowness, start) = (Slowness::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        for ms in (0..9000).step_by(10) {
            let is_slowed = ms % 3000 < 900;
            assert_eq!(slowness.look(is_slowed, at(ms)), None);
        }
    }

    #[test]
    fn the_operators_bound_is_where_the_primary_has_half_its_speed() {
        let second = Duration::from_secs(1);
        let bound = LagBound::new(second, LagPolicy::Stop).expect("within the bounds");
        assert_eq!(bound.held_back_percent(Duration::from_millis(150)), 0);
        assert_eq!(bound.held_back_percent(second), 50);
        for wrong in [Duration::from_millis(49), Duration::from_secs(61)] {
            assert_eq!(LagBound::new(wrong, LagPolicy::Slow), Err(LagError(wrong)));
        }
    }
}
