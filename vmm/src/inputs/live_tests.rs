//! Live inputs, with worlds of their own.

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

const AT_POINT: Place = Place::Point(AtPoint { branch: None, idle: false });

pub(in crate::inputs) fn boundary(is_point: bool) -> Boundary {
    let (sync_point, sync_time) = (ExecutionPoint::START, VirtualTime::ZERO);
    let rate = PointScale::EXITS.initial_rate;
    Boundary {
        point: ExecutionPoint::new(7),
        place: match is_point {
            true => AT_POINT,
            false => Place::Between { nearest: None },
        },
        time: VirtualTime::ZERO,
        clock: VirtualClock { sync_point, sync_time, rate },
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
    assert!(matches!(
        step(None, true),
        Step::Here(_, PointStep::Deliver(Arrival::ClockSync { .. }))
    ));
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
    let Ok(Step::Here(_, PointStep::Deliver(Arrival::ClockSync { time, .. }))) = held.next(&here)
    else {
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
    assert!(!live.is_overdue(&Boundary { place: AT_POINT, ..pending }), "the guest takes it here");
}

#[test]
fn a_guest_spends_at_most_a_fifth_of_its_time_on_being_named() {
    let pending = Boundary { interrupt_pending: true, next_timer: None, ..boundary(false) };
    let clock = ClockControl::new(&pending.clock, pending.point, PointScale::EXITS);
    let mut live = Live::new(Passing(0), clock);
    let waited = |live: &mut Live<Passing>| {
        // What waited is served where the place has its name.
        assert!(!live.is_overdue(&Boundary { place: AT_POINT, ..pending }));
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
                Step::Here(_, PointStep::Deliver(Arrival::ClockSync { time, .. })) => {
                    here.time = time
                }
                Step::Here(_, PointStep::Deliver(Arrival::WallClock { time })) => {
                    told.push(time.as_unix_ns())
                }
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
    let moments = [(0, 1_000 * S), (S, 1_001 * S), (2 * S, 1_002 * S + S / 2), (3 * S, 1_005 * S)];
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
    let Ok(Step::Here(_, PointStep::Deliver(Arrival::ClockSync { time, .. }))) =
        live.next(&boundary)
    else {
        panic!("the first step corrects guest time");
    };
    let after = Boundary { time, next_timer: Some(time.after_ns(1)), ..boundary };
    let step = live.next(&after).expect("the world is well");
    let typed = PointStep::Deliver(Arrival::ConsoleInput(b"x".to_vec()));
    assert!(matches!(&step, Step::Here(_, here) if *here == typed), "{step:?}");
    let due = Boundary { next_timer: Some(time), ..boundary };
    let step = live.next(&due).expect("the world is well");
    assert!(
        matches!(step, Step::Here(_, PointStep::Deliver(Arrival::ClockSync { .. }))),
        "{step:?}"
    );
}
