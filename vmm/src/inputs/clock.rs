//! Keeps guest time near host time: a pure controller.
//!
//! Guest time is a function of the execution point between two corrections. The controller
//! measures how much host time a point takes and sets the rate so that guest time follows.
//! Where guest time has fallen behind it jumps forward; where it has run ahead it is slowed, since
//! it never runs backwards.

use super::scale::{Pace, PointScale};
use vmft_log::point::{ClockRate, ExecutionPoint, VirtualClock, VirtualTime};

/// Host nanoseconds since the machine went live on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostTime(pub u64);

/// How often a running guest is corrected, in host nanoseconds.
pub const SYNC_INTERVAL_NS: u64 = 8_000_000;
/// Slowest guest time may pass while the guest runs: 1/16 ns a point. Above zero, so that
/// a guest spinning on its clock always gets on.
const MIN_RATE: u64 = (1 << ClockRate::FRACTION_BITS) / 16;
/// A lead over host time is given back over this much host time.
const SLEW_NS: u64 = 20_000_000;

/// The controller; one for each go-live.
#[derive(Debug, Clone)]
pub struct ClockControl {
    /// Guest time that corresponds to host time zero.
    origin: VirtualTime,
    last_host: HostTime,
    last_point: ExecutionPoint,
    /// Host time of a point, measured, in the units of [`ClockRate`].
    measured: u64,
    scale: PointScale,
    /// Host time in which the guest stood still, which is no part of its own.
    stood_ns: u64,
}

impl ClockControl {
    /// Starts with the guest's time at `point` at host time zero.
    pub fn new(clock: &VirtualClock, point: ExecutionPoint, scale: PointScale) -> Self {
        Self {
            origin: clock.time_at(point),
            last_host: HostTime(0),
            last_point: point,
            measured: clock.rate.raw().clamp(MIN_RATE, scale.max_rate.raw()),
            scale,
            stood_ns: 0,
        }
    }

    /// The guest has stood still for `ns` of host time, up to now: its own time goes on from where it was.
    pub fn stood_still(&mut self, ns: u64) {
        self.stood_ns += ns;
        self.last_host.0 += ns;
    }

    /// What a point is worth.
    pub fn scale(&self) -> &PointScale {
        &self.scale
    }

    /// Guest time that `host` corresponds to.
    pub fn target(&self, host: HostTime) -> VirtualTime {
        self.origin.after_ns(host.0.saturating_sub(self.stood_ns))
    }

    /// Host time at which guest time `time` is due.
    pub fn due(&self, time: VirtualTime) -> HostTime {
        HostTime(time.since(self.origin) + self.stood_ns)
    }

    /// True if a running guest is due for a correction.
    pub fn sync_due(&self, host: HostTime) -> bool {
        host.0.saturating_sub(self.last_host.0) >= SYNC_INTERVAL_NS
    }

    /// The guest has been waiting until `host`: the time since the last correction says nothing
    /// about its speed.
    pub fn waited(&mut self, host: HostTime, point: ExecutionPoint) {
        self.last_host = host;
        self.last_point = point;
    }

    /// The correction to apply at `point`, where the guest's time is `time`.
    pub fn sync(
        &mut self,
        host: HostTime,
        point: ExecutionPoint,
        time: VirtualTime,
    ) -> (VirtualTime, ClockRate) {
        let points = point.since(self.last_point);
        let elapsed = host.0.saturating_sub(self.last_host.0);
        if points >= self.scale.sample_points {
            self.measure(elapsed, points);
        }
        self.last_host = host;
        self.last_point = point;

        let target = self.target(host);
        let lead = time.since(target).min(SLEW_NS * 15 / 16);
        let given_back = u128::from(self.measured) * u128::from(lead) / u128::from(SLEW_NS);
        let given_back = u64::try_from(given_back).expect("less than what was measured");
        let rate = (self.measured - given_back).clamp(MIN_RATE, self.scale.max_rate.raw());
        (time.max(target), ClockRate::from_raw(rate))
    }

    /// `points` points have passed in `elapsed` nanoseconds of host time.
    fn measure(&mut self, elapsed: u64, points: u64) {
        let max = self.scale.max_rate.raw();
        let sample = (u128::from(elapsed) << ClockRate::FRACTION_BITS) / u128::from(points);
        let sample = u64::try_from(sample).unwrap_or(u64::MAX);
        self.measured = match self.scale.pace {
            Pace::Even => (self.measured * 3 + sample.clamp(MIN_RATE, max)) / 4,
            // The guest has computed in between.
            Pace::Bursts if sample > max => self.measured,
            Pace::Bursts if sample < self.measured => sample.max(MIN_RATE),
            Pace::Bursts => self.measured + (sample - self.measured) / 16,
        };
    }

    /// How many points take about `ns` of host time.
    pub fn points_in(&self, ns: u64) -> u64 {
        let points =
            (u128::from(ns) << ClockRate::FRACTION_BITS) / u128::from(self.measured.max(1));
        u64::try_from(points).unwrap_or(u64::MAX).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(rate: ClockRate) -> VirtualClock {
        VirtualClock { sync_point: ExecutionPoint::START, sync_time: VirtualTime::ZERO, rate }
    }

    /// Runs a guest of `ns_per_instruction` for `steps` corrections; returns the clock's error
    /// against host time at the end, in nanoseconds.
    fn error_after(ns_per_instruction: u64, steps: u64) -> i128 {
        let mut clock = clock(PointScale::SOFT.initial_rate);
        let mut control = ClockControl::new(&clock, ExecutionPoint::START, PointScale::SOFT);
        let mut error = 0;
        for step in 1..=steps {
            let host = HostTime(step * SYNC_INTERVAL_NS);
            let point = ExecutionPoint::new(host.0 / ns_per_instruction);
            let before = clock.time_at(point);
            error = i128::from(before.as_ns()) - i128::from(host.0);
            let (time, rate) = control.sync(host, point, before);
            assert!(time >= before, "guest time ran backwards");
            clock = VirtualClock { sync_point: point, sync_time: time, rate };
        }
        error
    }

    #[test]
    fn guest_time_follows_fast_and_slow_hosts() {
        for ns in [2, 10, 30, 250] {
            let error = error_after(ns, 500);
            assert!(error.abs() < 1_000_000, "{error} ns off at {ns} ns an instruction");
        }
    }

    #[test]
    fn a_lead_is_given_back_without_running_backwards() {
        let initial_rate = PointScale::SOFT.initial_rate;
        let clock = clock(initial_rate);
        let mut control = ClockControl::new(&clock, ExecutionPoint::START, PointScale::SOFT);
        let ahead = VirtualTime::from_ns(50_000_000);
        let (time, rate) =
            control.sync(HostTime(10_000_000), ExecutionPoint::new(1_000_000), ahead);
        assert_eq!(time, ahead);
        assert!(rate < initial_rate);
    }

    #[test]
    fn time_in_which_the_guest_stood_still_is_no_part_of_its_own() {
        let clock = clock(PointScale::SOFT.initial_rate);
        let mut control = ClockControl::new(&clock, ExecutionPoint::START, PointScale::SOFT);
        let (first, hour) = (SYNC_INTERVAL_NS, 3_600_000_000_000);
        control.sync(HostTime(first), ExecutionPoint::new(first / 10), VirtualTime::ZERO);
        let measured = control.measured;
        control.stood_still(hour);
        assert!(!control.sync_due(HostTime(first + hour)));
        assert_eq!(control.due(VirtualTime::from_ns(2 * first)), HostTime(2 * first + hour));
        let (point, at) = (ExecutionPoint::new(2 * first / 10), HostTime(2 * first + hour));
        let (time, _) = control.sync(at, point, VirtualTime::from_ns(first));
        assert_eq!(time, VirtualTime::from_ns(2 * first));
        assert!(control.measured.abs_diff(measured) < measured, "it is as fast as it was");
    }

    #[test]
    fn exits_that_come_in_bursts_after_computing_do_not_put_guest_time_ahead() {
        let mut clock = clock(PointScale::EXITS.initial_rate);
        let mut control = ClockControl::new(&clock, ExecutionPoint::START, PointScale::EXITS);
        let (mut host, mut point) = (HostTime(0), ExecutionPoint::START);
        for _ in 0..200 {
            // A third of a second of computing with an exit now and then, and one full of exits.
            for (exits, each_ns) in [(20, 16_000_000), (40_000, 8_000)] {
                for _ in 0..exits {
                    host.0 += each_ns;
                    point = point.after(1);
                    let before = clock.time_at(point);
                    let lead = before.since(VirtualTime::from_ns(host.0));
                    assert!(lead < 3_000_000, "{lead} ns ahead at {point}");
                    if control.sync_due(host) {
                        let (time, rate) = control.sync(host, point, before);
                        assert!(time >= before, "guest time ran backwards");
                        clock = VirtualClock { sync_point: point, sync_time: time, rate };
                    }
                }
            }
        }
    }
}
