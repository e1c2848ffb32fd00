//! Keeps guest time near host time: a pure controller.
//!
//! Guest time is a function of retired instructions between two corrections. The controller
//! measures how much host time an instruction takes and sets the rate so that guest time follows.
//! Where guest time has fallen behind it jumps forward; where it has run ahead it is slowed, since
//! it never runs backwards.

use vmft_logging_channel::point::{ClockRate, ExecutionPoint, VirtualClock, VirtualTime};

/// Host nanoseconds since the machine went live on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostTime(pub u64);

/// How often a running guest is corrected, in host nanoseconds.
pub const SYNC_INTERVAL_NS: u64 = 8_000_000;
/// Fastest guest time may pass: 1 µs an instruction, a host a hundred times slower than usual.
const MAX_RATE: u64 = 1_000 << ClockRate::FRACTION_BITS;
/// Slowest guest time may pass while the guest runs: 1/16 ns an instruction. Above zero, so that
/// a guest spinning on its clock always gets on.
const MIN_RATE: u64 = (1 << ClockRate::FRACTION_BITS) / 16;
/// A lead over host time is given back over this much host time.
const SLEW_NS: u64 = 20_000_000;
/// The rate before anything was measured: 10 ns an instruction.
pub const INITIAL_RATE: ClockRate = ClockRate::from_raw(10 << ClockRate::FRACTION_BITS);

/// The controller; one for each go-live.
#[derive(Debug, Clone)]
pub struct ClockControl {
    /// Guest time that corresponds to host time zero.
    origin: VirtualTime,
    last_host: HostTime,
    last_point: ExecutionPoint,
    /// Host time of an instruction, measured, in the units of [`ClockRate`].
    measured: u64,
}

impl ClockControl {
    /// Starts with guest time `now` at host time zero.
    pub fn new(clock: &VirtualClock, point: ExecutionPoint) -> Self {
        Self {
            origin: clock.time_at(point),
            last_host: HostTime(0),
            last_point: point,
            measured: u64::from(clock.rate.raw()),
        }
    }

    /// Guest time that `host` corresponds to.
    pub fn target(&self, host: HostTime) -> VirtualTime {
        self.origin.after_ns(host.0)
    }

    /// Host time at which guest time `time` is due.
    pub fn due(&self, time: VirtualTime) -> HostTime {
        HostTime(time.since(self.origin))
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
        let instructions = point.since(self.last_point);
        let elapsed = host.0.saturating_sub(self.last_host.0);
        if instructions >= 10_000 {
            let sample =
                (u128::from(elapsed) << ClockRate::FRACTION_BITS) / u128::from(instructions);
            let sample = u64::try_from(sample).unwrap_or(MAX_RATE).clamp(MIN_RATE, MAX_RATE);
            self.measured = (self.measured * 3 + sample) / 4;
        }
        self.last_host = host;
        self.last_point = point;

        let target = self.target(host);
        let lead = time.since(target).min(SLEW_NS * 15 / 16);
        let rate = self.measured - self.measured * lead / SLEW_NS;
        let rate = rate.clamp(MIN_RATE, MAX_RATE);
        let rate = ClockRate::from_raw(u32::try_from(rate).unwrap_or(u32::MAX));
        (time.max(target), rate)
    }

    /// How many instructions take about `ns` of host time.
    pub fn instructions_in(&self, ns: u64) -> u64 {
        let instructions =
            (u128::from(ns) << ClockRate::FRACTION_BITS) / u128::from(self.measured.max(1));
        u64::try_from(instructions).unwrap_or(u64::MAX).max(1)
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
        let mut clock = clock(INITIAL_RATE);
        let mut control = ClockControl::new(&clock, ExecutionPoint::START);
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
        let clock = VirtualClock {
            sync_point: ExecutionPoint::START,
            sync_time: VirtualTime::ZERO,
            rate: INITIAL_RATE,
        };
        let mut control = ClockControl::new(&clock, ExecutionPoint::START);
        let ahead = VirtualTime::from_ns(50_000_000);
        let (time, rate) =
            control.sync(HostTime(10_000_000), ExecutionPoint::new(1_000_000), ahead);
        assert_eq!(time, ahead);
        assert!(rate < INITIAL_RATE);
    }
}
