//! Is the other side still there? A pure judge of silence.
//!
//! ```text
//!  Alive ──silence, or closed──▶ Lost        (starts the race for the next generation)
//!    └────Stop or Goodbye──────▶ Departed    (never a failure; silence and closing follow)
//! ```
//! A verdict only starts the race; the arbiter decides it. Time in which this side did not look
//! (a stalled thread, a stopped process) is not held against the other.

use crate::session::GoodbyeReason;
use crate::time::MonotonicTime;
use std::time::Duration;

/// How patient the detector is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetectorConfig {
    /// How often both sides send a heartbeat.
    pub heartbeat_interval: Duration,
    /// How long nothing at all may be heard.
    pub suspect_after: Duration,
}

impl Default for DetectorConfig {
    /// A heartbeat every 20 ms, and suspicion after 100 ms: four lost in a row, and half of what a
    /// failover may take.
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(20),
            suspect_after: Duration::from_millis(100),
        }
    }
}

/// How the other side was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Suspicion {
    /// Nothing was heard for too long.
    #[error("nothing heard for {} ms", .0.as_millis())]
    Silent(Duration),
    /// The connection is closed.
    #[error("connection closed")]
    Closed,
    /// This side's host was suspended, for so long that the other must have taken this side for dead.
    #[error("this host was suspended for {} ms", .0.as_millis())]
    Suspended(Duration),
}

/// How long this side's host has been suspended since it was booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Suspended {
    /// Certainly.
    pub at_least: Duration,
    /// Perhaps.
    pub at_most: Duration,
}

/// What the detector thinks of the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is there.
    Alive,
    /// It left, or the machine was stopped: no failure.
    Departed(GoodbyeReason),
    /// It has failed, as far as can be told from here.
    Lost(Suspicion),
}

/// Watches one session from one side.
#[derive(Debug)]
pub struct Detector {
    config: DetectorConfig,
    last_contact: MonotonicTime,
    last_look: MonotonicTime,
    /// Silence since the last contact, as far as this side was looking.
    silence: Duration,
    suspended: Option<Suspended>,
    verdict: Verdict,
}

impl Detector {
    /// A detector of a session that has just begun: that counts as a contact.
    pub const fn new(config: DetectorConfig, now: MonotonicTime) -> Self {
        Self {
            config,
            last_contact: now,
            last_look: now,
            silence: Duration::ZERO,
            suspended: None,
            verdict: Verdict::Alive,
        }
    }

    /// What is known so far.
    pub const fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// When the other side was last heard.
    pub const fn last_contact(&self) -> MonotonicTime {
        self.last_contact
    }

    /// A valid frame came.
    pub const fn handle_contact(&mut self, now: MonotonicTime) {
        self.last_contact = now;
        self.last_look = now;
        self.silence = Duration::ZERO;
    }

    /// The other side leaves on purpose, by a goodbye or by a `Stop` in the log
    /// ([`GoodbyeReason::Stopped`]).
    pub fn handle_departure(&mut self, reason: GoodbyeReason) {
        if self.verdict == Verdict::Alive {
            self.verdict = Verdict::Departed(reason);
        }
    }

    /// The connection is closed, for whatever reason.
    pub fn handle_closed(&mut self) -> &Verdict {
        if self.verdict == Verdict::Alive {
            self.verdict = Verdict::Lost(Suspicion::Closed);
        }
        &self.verdict
    }

    /// Looks at how long this side's host has been suspended, before anything that has come is read: what came
    /// before says nothing about now. For a side that others watch and would replace: one that was away for
    /// longer than they wait has been given up, as far as it can tell.
    pub fn handle_suspension(&mut self, now: Suspended) -> &Verdict {
        let before = self.suspended.replace(now).unwrap_or(now);
        let gap = now.at_least.saturating_sub(before.at_most);
        if self.verdict == Verdict::Alive && gap >= self.config.suspect_after {
            self.verdict = Verdict::Lost(Suspicion::Suspended(gap));
        }
        &self.verdict
    }

    /// Looks at the clock, after everything that has come has been read.
    pub fn handle_timeout(&mut self, now: MonotonicTime) -> &Verdict {
        // A gap longer than two of our own ticks means that we were not looking.
        let seen = now.since(self.last_look).min(self.config.heartbeat_interval * 2);
        self.silence += seen;
        self.last_look = now;
        if self.verdict == Verdict::Alive && self.silence >= self.config.suspect_after {
            self.verdict = Verdict::Lost(Suspicion::Silent(now.since(self.last_contact)));
        }
        &self.verdict
    }

    /// How late this side is at `now` with what was due at `due`, heartbeats among it: if by so much that with
    /// as much again the other side suspects it.
    pub fn own_lateness(&self, due: MonotonicTime, now: MonotonicTime) -> Option<Duration> {
        let late = now.since(due);
        (late >= self.config.suspect_after / 2).then_some(late)
    }

    /// True once the other side has been silent for as long as it takes to suspect it. One that
    /// departs is still owed the time to say goodbye, but not for ever.
    pub fn is_silent(&self) -> bool {
        self.silence >= self.config.suspect_after
    }

    /// When to look next; `None` when there is nothing left to find out.
    pub fn poll_timeout(&self) -> Option<MonotonicTime> {
        let left = self.config.suspect_after.saturating_sub(self.silence);
        let next = self.last_look.after(left.min(self.config.heartbeat_interval));
        let over = matches!(self.verdict, Verdict::Lost(_)) || self.is_silent();
        (!over).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at_ms(ms: u64) -> MonotonicTime {
        MonotonicTime::from_ns(ms * 1_000_000)
    }

    fn look_every_tick(detector: &mut Detector, until: MonotonicTime) -> Option<MonotonicTime> {
        while let Some(next) = detector.poll_timeout().filter(|next| *next <= until) {
            if *detector.handle_timeout(next) != Verdict::Alive {
                return Some(next);
            }
        }
        None
    }

    #[test]
    fn silence_is_suspected_after_exactly_the_configured_time() {
        let mut detector = Detector::new(DetectorConfig::default(), at_ms(0));
        detector.handle_contact(at_ms(37));
        assert_eq!(look_every_tick(&mut detector, at_ms(1_000)), Some(at_ms(137)));
        let lost = Verdict::Lost(Suspicion::Silent(Duration::from_millis(100)));
        assert_eq!(*detector.verdict(), lost);
        assert_eq!(detector.last_contact(), at_ms(37));
        assert_eq!(detector.poll_timeout(), None);
    }

    #[test]
    fn a_peer_that_is_heard_every_heartbeat_is_never_suspected() {
        let mut detector = Detector::new(DetectorConfig::default(), at_ms(0));
        for beat in 1..100 {
            assert_eq!(look_every_tick(&mut detector, at_ms(beat * 20)), None);
            detector.handle_contact(at_ms(beat * 20));
        }
    }

    #[test]
    fn our_own_stall_is_not_held_against_the_peer() {
        let mut detector = Detector::new(DetectorConfig::default(), at_ms(0));
        assert_eq!(*detector.handle_timeout(at_ms(5_000)), Verdict::Alive);
        assert_eq!(look_every_tick(&mut detector, at_ms(10_000)), Some(at_ms(5_060)));
    }

    #[test]
    fn a_side_knows_when_it_is_half_as_late_as_others_wait() {
        let detector = Detector::new(DetectorConfig::default(), at_ms(0));
        assert_eq!(detector.own_lateness(at_ms(20), at_ms(69)), None);
        let late = Some(Duration::from_millis(50));
        assert_eq!(detector.own_lateness(at_ms(20), at_ms(70)), late);
        assert_eq!(detector.own_lateness(at_ms(20), at_ms(10)), None, "early");
    }

    #[test]
    fn a_side_whose_host_was_suspended_for_longer_than_others_wait_takes_itself_for_given_up() {
        let exactly = |ms| Suspended {
            at_least: Duration::from_millis(ms),
            at_most: Duration::from_millis(ms),
        };
        let mut detector = Detector::new(DetectorConfig::default(), at_ms(0));
        // What was before the session, short rests, and clocks that could not be read at once.
        for suspended in [exactly(7_000), exactly(7_099), exactly(7_198)] {
            assert_eq!(*detector.handle_suspension(suspended), Verdict::Alive);
        }
        let at_most = Duration::from_millis(9_000);
        let unsure = Suspended { at_most, ..exactly(7_200) };
        assert_eq!(*detector.handle_suspension(unsure), Verdict::Alive);
        assert_eq!(*detector.handle_suspension(exactly(9_050)), Verdict::Alive);
        let lost = Verdict::Lost(Suspicion::Suspended(Duration::from_millis(100)));
        assert_eq!(*detector.handle_suspension(exactly(9_150)), lost);
    }

    #[test]
    fn a_closed_connection_is_a_loss_at_once() {
        let mut detector = Detector::new(DetectorConfig::default(), at_ms(0));
        assert_eq!(*detector.handle_closed(), Verdict::Lost(Suspicion::Closed));
    }

    #[test]
    fn after_a_departure_neither_silence_nor_closing_is_a_failure() {
        for reason in [GoodbyeReason::Stopped, GoodbyeReason::Leaving] {
            let mut detector = Detector::new(DetectorConfig::default(), at_ms(0));
            detector.handle_departure(reason.clone());
            assert_eq!(*detector.handle_timeout(at_ms(10_000)), Verdict::Departed(reason.clone()));
            assert_eq!(*detector.handle_closed(), Verdict::Departed(reason));
        }
    }

    #[test]
    fn a_departing_peer_has_as_long_to_say_goodbye_as_a_silent_one_to_be_suspected() {
        let mut detector = Detector::new(DetectorConfig::default(), at_ms(0));
        detector.handle_departure(GoodbyeReason::Stopped);
        let mut last = at_ms(0);
        while let Some(next) = detector.poll_timeout() {
            assert!(!detector.is_silent());
            detector.handle_timeout(next);
            last = next;
        }
        assert!(detector.is_silent());
        assert_eq!(last, at_ms(100));
        assert_eq!(*detector.verdict(), Verdict::Departed(GoodbyeReason::Stopped));
    }
}
