//! Inputs from the world.

use super::booting::{OnReboot, asked_step};
use super::clock::HostTime;
use super::{
    AtPoint, Boundary, ClockControl, DeviceRequest, InputError, Inputs, Place, PointScale,
    PointStep, Room, Step,
};
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
        if boundary.place != (Place::Between { nearest: None }) {
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

    fn sync(&mut self, host: HostTime, boundary: &Boundary) -> Arrival {
        self.must_sync = false;
        self.look_at_wall_clock = true;
        let (time, rate) = self.clock.sync(host, boundary.point, boundary.time);
        Arrival::ClockSync { time, rate }
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
        nearest: Option<ExecutionPoint>,
        host: HostTime,
        timer: Option<HostTime>,
    ) -> ExecutionPoint {
        let Some(nearest) = nearest else { return self.slice(boundary) };
        if self.stop_at.is_none() {
            let due = self.clock.scale().sync_for_timers && timer.is_some_and(|due| host >= due);
            if due || self.source.wait(Some(HostTime(0)), boundary.room) {
                self.stop_at = Some(nearest.after(self.clock.points_in(GRACE_NS)));
            }
        }
        self.stop_at.map_or(self.slice(boundary), |point| point.max(nearest))
    }

    /// The next step of an idle guest: waits for an arrival or for its timer.
    fn next_idle(
        &mut self,
        here: AtPoint,
        boundary: &Boundary,
        next_timer: Option<HostTime>,
    ) -> Step {
        let deliver = |arrival| Step::Here(here, PointStep::Deliver(arrival));
        loop {
            if let Some(asked) = self.source.take_asked() {
                return asked_step(asked);
            }
            let host = self.source.now();
            let timer_due = next_timer.is_some_and(|due| host >= due);
            if timer_due || self.must_sync {
                self.clock.waited(host, boundary.point);
                return deliver(self.sync(host, boundary));
            }
            if let Some(arrival) = self.take_wall_clock(boundary) {
                return deliver(arrival);
            }
            if let Some(arrival) = self.source.take_arrival(boundary.room) {
                return deliver(arrival);
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
        if let Some(here) = boundary.here().filter(|here| here.idle) {
            return Ok(self.next_idle(here, boundary, timer));
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
        let here = match boundary.place {
            Place::Point(here) => here,
            Place::Between { nearest } => {
                return Ok(Step::RunTo(self.bound_between(boundary, nearest, host, timer)));
            }
        };
        let deliver = |arrival| Ok(Step::Here(here, PointStep::Deliver(arrival)));
        self.stop_at = None;
        let timer_due = self.clock.scale().sync_for_timers && timer.is_some_and(|due| host >= due);
        if self.must_sync || timer_due || self.clock.sync_due(host) {
            return deliver(self.sync(host, boundary));
        }
        let arrival = self.take_wall_clock(boundary);
        if let Some(arrival) = arrival.or_else(|| self.source.take_arrival(boundary.room)) {
            return deliver(arrival);
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
#[path = "live_tests.rs"]
pub(super) mod tests;
