//! Inputs from the world.

use super::booting::{OnReboot, asked_step};
use super::clock::HostTime;
use super::{Boundary, ClockControl, DeviceRequest, InputError, Inputs, PointScale, Room, Step};
use crate::machine::{BootSource, Delta};
use std::time::Duration;
use vmft_cpu::ExitRecord;
use vmft_log::entry::{Arrival, StateDigest, StopReason};
use vmft_log::point::{CodeAddress, ExecutionPoint, WallTime};

/// How long a guest runs before the world is looked at again, in host nanoseconds.
const SLICE_NS: u64 = 500_000;

/// How long an arrival waits for the guest to exit by itself before it is stopped between two exits, in
/// host nanoseconds: an exit costs nothing, stopping between two takes the backup about as long.
const GRACE_NS: u64 = 200_000;

/// How long something waits at least for a guest that computes without exiting, in host nanoseconds, before
/// its place is named by its state: that costs as much as the guest has written.
const OVERDUE_NS: u64 = 10_000_000;

/// How long it waits at most.
const MAX_OVERDUE_NS: u64 = 200_000_000;

/// The wait is so many times what the last naming took: a guest spends at most a fifth of its time on being
/// named.
const WAIT_PER_NAMING: u64 = 4;

/// How far the world's clock may come apart from what the guest was told, in nanoseconds, before it is told
/// again: a host's clock that is set, or a host that slept, is noticed; one that is steered is not.
const WALL_CLOCK_TOLERANCE_NS: u64 = 1_000_000_000;

/// What the operator asks of a live machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Come back between two instructions.
    Pause,
    /// Stop.
    Stop(StopReason),
    /// Run no further: this side has lost its generation.
    Halt,
}

/// The world, as far as inputs come from it. Implemented at the rim, where clocks and threads are.
pub trait InputSource: std::fmt::Debug + Send {
    /// Host time since this side went live.
    fn now(&mut self) -> HostTime;
    /// The world's time, which can be set to anything at any moment; `None` if this source knows none.
    fn wall_clock(&mut self) -> Option<WallTime>;
    /// Takes what the operator asks, if anything.
    fn take_asked(&mut self) -> Option<Asked>;
    /// Takes the next arrival that there is room for.
    fn take_arrival(&mut self, room: Room) -> Option<Arrival>;
    /// Waits until there is something to take, or until `deadline`; true if there is.
    fn wait(&mut self, deadline: Option<HostTime>, room: Room) -> bool;
    /// Starts what will become an arrival.
    ///
    /// # Errors
    /// See [`InputError`].
    fn start(&mut self, request: DeviceRequest) -> Result<(), InputError>;
    /// Holds the guest back before it runs on, while too much of what it has put out waits. False if it
    /// may not run on yet: then this is asked again, after what else there is to do.
    fn hold_back(&mut self) -> bool;
    /// Starts to read what the disks boot, and takes it when it is there; or why there is none.
    fn take_boot(&mut self) -> Option<Result<BootSource, String>>;
    /// Tells the world where the guest is, for status.
    fn at(&mut self, boundary: &Boundary);
}

/// Live inputs: from an [`InputSource`], with guest time kept near host time.
#[derive(Debug)]
pub struct Live<S> {
    pub(super) source: S,
    pub(super) clock: ClockControl,
    /// After a wake: guest time is corrected before the arrival that woke the guest.
    pub(super) must_sync: bool,
    /// What the real-time clock is told.
    wall_clock: WallClock,
    /// What a reset leads to, and how many had been seen.
    pub(super) on_reboot: OnReboot,
    pub(super) resets_seen: Option<u64>,
    /// After a correction of guest time: whether it still tells the world's time has to be seen.
    look_at_wall_clock: bool,
    /// The world's time when guest time began, as it was told last.
    told: Option<i128>,
    /// Where the guest is to be stopped although it does not exit.
    stop_at: Option<ExecutionPoint>,
    /// Since when something waits for a guest that does not exit.
    waits_since: Option<HostTime>,
    /// Since when its place is being named by its state.
    naming_since: Option<HostTime>,
    /// How long something waits before that is done again, in host nanoseconds.
    overdue_ns: u64,
}

/// What a guest's real-time clock is told where its machine comes to life: begins, is restored, or goes live
/// after another side. Guest time goes on from where it was, whatever this says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WallClock {
    /// The world's time, then and whenever it has come apart from it.
    #[default]
    Host,
    /// Nothing, once the guest has begun: it goes on from what it was, with guest time.
    Keep,
}

impl<S: InputSource> Live<S> {
    /// Live inputs for a machine whose guest time goes on from `clock` at `point`.
    pub fn new(source: S, clock: ClockControl) -> Self {
        Self {
            source,
            clock,
            must_sync: true,
            wall_clock: WallClock::Host,
            on_reboot: OnReboot::Restart,
            resets_seen: None,
            look_at_wall_clock: false,
            told: None,
            stop_at: None,
            waits_since: None,
            naming_since: None,
            overdue_ns: OVERDUE_NS,
        }
    }

    /// The same, with a real-time clock that is told so.
    #[must_use]
    pub fn with_wall_clock(self, wall_clock: WallClock) -> Self {
        Self { wall_clock, ..self }
    }

    /// The same, where a reset leads to this.
    #[must_use]
    pub fn with_on_reboot(self, on_reboot: OnReboot) -> Self {
        Self { on_reboot, ..self }
    }

    /// What a point is worth.
    pub fn scale(&self) -> &PointScale {
        self.clock.scale()
    }

    /// The world.
    pub fn source(&mut self) -> &mut S {
        &mut self.source
    }

    /// True if something has waited for too long, at a place without a name that the engine cannot stop
    /// near: the caller names it by its state, and says when that is done ([`Self::named_by_state`]).
    pub(super) fn is_overdue(&mut self, boundary: &Boundary) -> bool {
        if boundary.is_point || boundary.nearest.is_some() || boundary.idle {
            self.waits_since = None;
            return false;
        }
        let host = self.source.now();
        let timer = boundary.next_timer.map(|time| self.clock.due(time));
        // One that was raised where the guest would take none has to wait for the next exit as well.
        let waits = boundary.interrupt_pending
            || timer.is_some_and(|due| host >= due)
            || self.source.wait(Some(HostTime(0)), boundary.room);
        if !waits {
            self.waits_since = None;
            return false;
        }
        let HostTime(since) = *self.waits_since.get_or_insert(host);
        let is_overdue = host.0 - since >= self.overdue_ns;
        self.naming_since = is_overdue.then_some(host);
        is_overdue
    }

    /// The place where something was overdue has its name. What that took decides how long the next waits.
    pub(super) fn named_by_state(&mut self) {
        if let Some(HostTime(since)) = self.naming_since.take() {
            let took = self.source.now().0.saturating_sub(since);
            self.overdue_ns = (took * WAIT_PER_NAMING).clamp(OVERDUE_NS, MAX_OVERDUE_NS);
        }
    }

    fn sync(&mut self, host: HostTime, boundary: &Boundary) -> Step {
        self.must_sync = false;
        self.look_at_wall_clock = true;
        let (time, rate) = self.clock.sync(host, boundary.point, boundary.time);
        Step::Deliver(Arrival::ClockSync { time, rate })
    }

    /// The world's time, if the guest has to be told: asked where guest time has just been corrected.
    fn take_wall_clock(&mut self, boundary: &Boundary) -> Option<Arrival> {
        if !std::mem::take(&mut self.look_at_wall_clock) {
            return None;
        }
        // A guest that has not begun has no clock that could be kept.
        if self.wall_clock == WallClock::Keep && boundary.point != ExecutionPoint::START {
            return None;
        }
        let time = self.source.wall_clock()?;
        let zero = i128::from(time.as_unix_ns()) - i128::from(boundary.time.as_ns());
        let tolerated = i128::from(WALL_CLOCK_TOLERANCE_NS);
        if self.told.is_some_and(|told| (zero - told).abs() < tolerated) {
            return None;
        }
        self.told = Some(zero);
        Some(Arrival::WallClock { time })
    }

    /// How far a guest runs for which there is nothing.
    fn slice(&self, boundary: &Boundary) -> ExecutionPoint {
        match self.clock.scale().stops_anywhere {
            true => boundary.point.after(self.clock.points_in(SLICE_NS)),
            false => ExecutionPoint::NEVER,
        }
    }

    /// How far it runs from a place without a name. If something waits for it, the next exit is
    /// given a while to come; then the guest is stopped between two exits, if that can be done.
    fn bound_between(
        &mut self,
        boundary: &Boundary,
        host: HostTime,
        timer: Option<HostTime>,
    ) -> ExecutionPoint {
        let Some(nearest) = boundary.nearest else { return self.slice(boundary) };
        if self.stop_at.is_none() {
            let due = self.clock.scale().sync_for_timers && timer.is_some_and(|due| host >= due);
            if due || self.source.wait(Some(HostTime(0)), boundary.room) {
                self.stop_at = Some(nearest.after(self.clock.points_in(GRACE_NS)));
            }
        }
        self.stop_at.map_or(self.slice(boundary), |point| point.max(nearest))
    }

    /// The next step of an idle guest: waits for an arrival or for its timer.
    fn next_idle(&mut self, boundary: &Boundary, next_timer: Option<HostTime>) -> Step {
        loop {
            if let Some(asked) = self.source.take_asked() {
                return asked_step(asked);
            }
            let host = self.source.now();
            let timer_due = next_timer.is_some_and(|due| host >= due);
            if timer_due || self.must_sync {
                self.clock.waited(host, boundary.point);
                return self.sync(host, boundary);
            }
            if let Some(arrival) = self.take_wall_clock(boundary) {
                return Step::Deliver(arrival);
            }
            if let Some(arrival) = self.source.take_arrival(boundary.room) {
                return Step::Deliver(arrival);
            }
            if self.source.wait(next_timer, boundary.room) {
                // An arrival comes at the present, not at the time the guest went to sleep.
                self.must_sync = true;
            }
        }
    }
}

impl<S: InputSource> Inputs for Live<S> {
    fn next(&mut self, boundary: &Boundary) -> Result<Step, InputError> {
        self.source.at(boundary);
        if let Some(step) = self.after_resets(boundary) {
            return Ok(step);
        }
        if boundary.awaits_boot {
            return Ok(self.next_boot(boundary));
        }
        let timer = boundary.next_timer.map(|time| self.clock.due(time));
        if boundary.idle {
            return Ok(self.next_idle(boundary, timer));
        }
        // An idle guest puts nothing out.
        let mut was_held = false;
        loop {
            if let Some(asked) = self.source.take_asked() {
                return Ok(asked_step(asked));
            }
            if self.source.hold_back() {
                break;
            }
            was_held = true;
        }
        let host = self.source.now();
        if was_held {
            self.clock.waited(host, boundary.point);
            self.must_sync = true;
        }
        if !boundary.is_point {
            return Ok(Step::RunTo(self.bound_between(boundary, host, timer)));
        }
        self.stop_at = None;
        let timer_due = self.clock.scale().sync_for_timers && timer.is_some_and(|due| host >= due);
        if self.must_sync || timer_due || self.clock.sync_due(host) {
            return Ok(self.sync(host, boundary));
        }
        let arrival = self.take_wall_clock(boundary);
        if let Some(arrival) = arrival.or_else(|| self.source.take_arrival(boundary.room)) {
            return Ok(Step::Deliver(arrival));
        }
        Ok(Step::RunTo(self.slice(boundary)))
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), InputError> {
        self.source.start(request)
    }

    fn digest(&mut self, _: ExecutionPoint, _: StateDigest) -> Result<(), InputError> {
        Ok(())
    }

    fn branch_before(&self, _: ExecutionPoint) -> Option<CodeAddress> {
        None
    }

    fn is_base(&self) -> bool {
        true
    }

    fn stood_still(&mut self, time: Duration) {
        self.clock.stood_still(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        // The real-time clock is told the world's time when the guest goes on.
        self.must_sync = true;
        self.waits_since = None;
    }

    fn checkpoint(&mut self, _: Option<Delta>) -> Result<(), InputError> {
        Ok(())
    }

    fn watches_exits(&self) -> bool {
        false
    }

    fn exits(&mut self, _: ExecutionPoint, _: &[ExitRecord]) -> Result<(), InputError> {
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use vmft_log::entry::OutputSequence;
    use vmft_log::point::{VirtualClock, VirtualTime};

    /// A world in which a second has passed, a key was pressed, and something may be asked.
    #[derive(Debug)]
    struct Waiting(Option<Asked>);

    impl InputSource for Waiting {
        fn now(&mut self) -> HostTime {
            HostTime(1_000_000_000)
        }
        fn take_asked(&mut self) -> Option<Asked> {
            self.0.take()
        }
        fn take_arrival(&mut self, _: Room) -> Option<Arrival> {
            Some(Arrival::ConsoleInput(b"x".to_vec()))
        }
        fn wait(&mut self, _: Option<HostTime>, _: Room) -> bool {
            true
        }
        fn start(&mut self, _: DeviceRequest) -> Result<(), InputError> {
            Ok(())
        }
        fn take_boot(&mut self) -> Option<Result<BootSource, String>> {
            None
        }
        fn at(&mut self, _: &Boundary) {}

        fn wall_clock(&mut self) -> Option<WallTime> {
            None
        }

        fn hold_back(&mut self) -> bool {
            true
        }
    }

    pub(in crate::inputs) fn boundary(is_point: bool) -> Boundary {
        let (sync_point, sync_time) = (ExecutionPoint::START, VirtualTime::ZERO);
        let rate = PointScale::EXITS.initial_rate;
        Boundary {
            point: ExecutionPoint::new(7),
            is_point,
            nearest: None,
            branch: None,
            time: VirtualTime::ZERO,
            clock: VirtualClock { sync_point, sync_time, rate },
            idle: false,
            awaits_boot: false,
            resets: crate::inputs::Resets::default(),
            interrupt_pending: false,
            // Long due on the host.
            next_timer: Some(VirtualTime::from_ns(1_000)),
            outputs: OutputSequence(0),
            room: Room { console: 16, packets: false },
        }
    }

    fn step(asked: Option<Asked>, is_point: bool) -> Step {
        let boundary = boundary(is_point);
        let clock = ClockControl::new(&boundary.clock, boundary.point, PointScale::EXITS);
        Live::new(Waiting(asked), clock).next(&boundary).expect("the world is well")
    }

    #[test]
    fn nothing_but_an_operator_is_served_where_there_is_no_point() {
        assert!(matches!(step(None, true), Step::Deliver(Arrival::ClockSync { .. })));
        assert!(matches!(step(None, false), Step::RunTo(bound) if bound > ExecutionPoint::new(7)));
        assert_eq!(step(Some(Asked::Pause), false), Step::Pause);
        let stop = Asked::Stop(StopReason::Operator);
        assert_eq!(step(Some(stop), false), Step::Stop(StopReason::Operator));
        assert_eq!(step(Some(Asked::Halt), false), Step::Halt);
    }

    /// A world that holds its guest back so often, and then something is asked.
    #[derive(Debug)]
    struct Holding {
        left: u32,
        asked: Option<Asked>,
    }

    impl InputSource for Holding {
        fn now(&mut self) -> HostTime {
            HostTime(1_000_000_000)
        }
        fn take_asked(&mut self) -> Option<Asked> {
            self.asked.take_if(|_| self.left == 0)
        }
        fn take_arrival(&mut self, _: Room) -> Option<Arrival> {
            None
        }
        fn wait(&mut self, _: Option<HostTime>, _: Room) -> bool {
            false
        }
        fn start(&mut self, _: DeviceRequest) -> Result<(), InputError> {
            Ok(())
        }
        fn hold_back(&mut self) -> bool {
            self.left = self.left.saturating_sub(1);
            self.left == 0 && self.asked.is_none()
        }
        fn take_boot(&mut self) -> Option<Result<BootSource, String>> {
            None
        }
        fn at(&mut self, _: &Boundary) {}

        fn wall_clock(&mut self) -> Option<WallTime> {
            None
        }
    }

    #[test]
    fn a_guest_that_is_held_back_can_be_stopped_and_finds_the_time_when_it_goes_on() {
        let here = Boundary { next_timer: None, ..boundary(true) };
        let live = |source| {
            let clock = ClockControl::new(&here.clock, here.point, PointScale::SOFT);
            let mut live = Live::new(source, clock);
            live.must_sync = false;
            live
        };
        let mut stopped = live(Holding { left: 3, asked: Some(Asked::Pause) });
        assert_eq!(stopped.next(&here).expect("the world is well"), Step::Pause);
        let mut held = live(Holding { left: 3, asked: None });
        let Ok(Step::Deliver(Arrival::ClockSync { time, .. })) = held.next(&here) else {
            panic!("guest time is corrected first");
        };
        assert_eq!(time, here.clock.time_at(here.point).after_ns(1_000_000_000));
    }

    /// A world in which nothing happens but that a millisecond passes at every look.
    #[derive(Debug)]
    struct Passing(u64);

    impl InputSource for Passing {
        fn now(&mut self) -> HostTime {
            self.0 += 1_000_000;
            HostTime(self.0)
        }
        fn take_asked(&mut self) -> Option<Asked> {
            None
        }
        fn take_arrival(&mut self, _: Room) -> Option<Arrival> {
            None
        }
        fn wait(&mut self, _: Option<HostTime>, _: Room) -> bool {
            false
        }
        fn start(&mut self, _: DeviceRequest) -> Result<(), InputError> {
            Ok(())
        }
        fn take_boot(&mut self) -> Option<Result<BootSource, String>> {
            None
        }
        fn at(&mut self, _: &Boundary) {}

        fn wall_clock(&mut self) -> Option<WallTime> {
            None
        }

        fn hold_back(&mut self) -> bool {
            true
        }
    }

    #[test]
    fn an_interrupt_that_no_exit_lets_in_is_overdue_after_a_while() {
        let quiet = Boundary { next_timer: None, ..boundary(false) };
        let clock = ClockControl::new(&quiet.clock, quiet.point, PointScale::EXITS);
        let mut live = Live::new(Passing(0), clock);
        assert!((0..100).all(|_| !live.is_overdue(&quiet)), "nothing waits");
        let pending = Boundary { interrupt_pending: true, ..quiet };
        let looks = (0..100).take_while(|_| !live.is_overdue(&pending)).count();
        assert_eq!(looks as u64, OVERDUE_NS / 1_000_000);
        assert!(
            !live.is_overdue(&Boundary { is_point: true, ..pending }),
            "the guest takes it here"
        );
    }

    #[test]
    fn a_guest_spends_at_most_a_fifth_of_its_time_on_being_named() {
        let pending = Boundary { interrupt_pending: true, next_timer: None, ..boundary(false) };
        let clock = ClockControl::new(&pending.clock, pending.point, PointScale::EXITS);
        let mut live = Live::new(Passing(0), clock);
        let waited = |live: &mut Live<Passing>| {
            // What waited is served where the place has its name.
            assert!(!live.is_overdue(&Boundary { is_point: true, ..pending }));
            (0..1_000).take_while(|_| !live.is_overdue(&pending)).count() as u64 * 1_000_000
        };
        assert_eq!(waited(&mut live), OVERDUE_NS);
        for (took_ns, expected) in
            [(1_000_000, OVERDUE_NS), (20_000_000, 80_000_000), (900_000_000, MAX_OVERDUE_NS)]
        {
            // The look at the clock takes the last millisecond.
            live.source().0 += took_ns - 1_000_000;
            live.named_by_state();
            assert_eq!(waited(&mut live), expected, "after a naming of {took_ns} ns");
        }
    }

    /// A world whose clock is a thousand seconds ahead of host time, and set once by two and once by half a
    /// second.
    #[derive(Debug, Default)]
    pub(in crate::inputs) struct Clocks {
        host: u64,
        wall: u64,
    }

    impl InputSource for Clocks {
        fn now(&mut self) -> HostTime {
            HostTime(self.host)
        }
        fn wall_clock(&mut self) -> Option<WallTime> {
            Some(WallTime::from_unix_ns(self.wall))
        }
        fn take_asked(&mut self) -> Option<Asked> {
            None
        }
        fn take_arrival(&mut self, _: Room) -> Option<Arrival> {
            None
        }
        fn wait(&mut self, _: Option<HostTime>, _: Room) -> bool {
            false
        }
        fn start(&mut self, _: DeviceRequest) -> Result<(), InputError> {
            Ok(())
        }
        fn take_boot(&mut self) -> Option<Result<BootSource, String>> {
            None
        }
        fn at(&mut self, _: &Boundary) {}

        fn hold_back(&mut self) -> bool {
            true
        }
    }

    /// What a guest at `point` is told of the world's time while the clocks pass through `moments`.
    fn told(wall_clock: WallClock, point: ExecutionPoint, moments: &[(u64, u64)]) -> Vec<u64> {
        let boundary = Boundary { point, ..boundary(true) };
        let clock = ClockControl::new(&boundary.clock, point, PointScale::EXITS);
        let mut live = Live::new(Clocks { host: 0, wall: 0 }, clock).with_wall_clock(wall_clock);
        let mut told = Vec::new();
        let mut here = Boundary { next_timer: None, ..boundary };
        for (host, wall) in moments {
            *live.source() = Clocks { host: *host, wall: *wall };
            loop {
                match live.next(&here).expect("the world is well") {
                    Step::Deliver(Arrival::ClockSync { time, .. }) => here.time = time,
                    Step::Deliver(Arrival::WallClock { time }) => told.push(time.as_unix_ns()),
                    Step::RunTo(_) => break,
                    other => panic!("{other:?}"),
                }
            }
        }
        told
    }

    #[test]
    fn the_guest_is_told_the_worlds_time_where_it_comes_to_life_and_when_that_is_set() {
        const S: u64 = 1_000_000_000;
        let moments =
            [(0, 1_000 * S), (S, 1_001 * S), (2 * S, 1_002 * S + S / 2), (3 * S, 1_005 * S)];
        let later = ExecutionPoint::new(7);
        assert_eq!(told(WallClock::Host, later, &moments), [1_000 * S, 1_005 * S]);
        assert!(told(WallClock::Keep, later, &moments).is_empty());
        // One that begins has nothing to keep.
        assert_eq!(told(WallClock::Keep, ExecutionPoint::START, &moments[..1]), [1_000 * S]);
    }

    #[test]
    fn a_timer_that_is_due_on_the_host_corrects_guest_time_at_the_next_point() {
        let boundary = boundary(true);
        let clock = ClockControl::new(&boundary.clock, boundary.point, PointScale::EXITS);
        let mut live = Live::new(Waiting(None), clock);
        let Ok(Step::Deliver(Arrival::ClockSync { time, .. })) = live.next(&boundary) else {
            panic!("the first step corrects guest time");
        };
        let after = Boundary { time, next_timer: Some(time.after_ns(1)), ..boundary };
        let step = live.next(&after).expect("the world is well");
        assert_eq!(step, Step::Deliver(Arrival::ConsoleInput(b"x".to_vec())));
        let due = Boundary { next_timer: Some(time), ..boundary };
        let step = live.next(&due).expect("the world is well");
        assert!(matches!(step, Step::Deliver(Arrival::ClockSync { .. })), "{step:?}");
    }
}
