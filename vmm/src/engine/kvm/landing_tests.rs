//! Landing with a simulated guest and counters that do everything real ones have been seen to do.

use super::*;

/// Numbers from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// What the counter does wrong.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    /// Branches an overflow comes late by, at most.
    skid: u64,
    /// One overflow in so many comes earlier, for no reason; 0 for none.
    spurious: u64,
    /// One overflow in so many never comes; 0 for none.
    lost: u64,
    /// The count is this many branches ahead of the truth from branch 500 on.
    ahead: u64,
    /// The count misses this many branches at branch 500.
    behind: u64,
    /// The counter is taken away at this branch.
    gone_at: Option<u64>,
}

const MARGIN: Branches = Branches(40);

/// A guest whose instructions are branches or not, as a seed says, and a counter.
struct Simulated {
    /// True for each instruction that is a conditional branch.
    code: Vec<bool>,
    /// Instructions retired.
    at: usize,
    /// Branches retired, in truth.
    branches: u64,
    /// The instruction at which the guest exits.
    exit_at: usize,
    armed: Option<u64>,
    faults: Faults,
    random: Random,
    steps: u64,
    runs: u64,
}

impl Simulated {
    fn new(seed: u64, faults: Faults) -> Self {
        let mut random = Random(seed);
        let code = (0..40_000).map(|_| random.below(6) == 0).collect::<Vec<_>>();
        let exit_at = code.len();
        Self { code, at: 0, branches: 0, exit_at, armed: None, faults, random, steps: 0, runs: 0 }
    }

    /// The first boundary behind the `branches`-th branch, in instructions.
    fn boundary(&self, branches: u64) -> usize {
        let mut seen = 0;
        let branch = self.code.iter().position(|branch| {
            seen += u64::from(*branch);
            seen == branches
        });
        branch.expect("the guest is long enough") + 1
    }

    fn count(&self) -> u64 {
        if self.branches < 500 {
            return self.branches;
        }
        self.branches + self.faults.ahead - self.faults.behind.min(self.branches)
    }

    fn retire(&mut self) -> Option<&'static str> {
        if self.at == self.exit_at {
            return Some("exit");
        }
        self.branches += u64::from(self.code[self.at]);
        self.at += 1;
        None
    }
}

impl Ground for Simulated {
    type Exit = &'static str;

    fn since_exit(&mut self) -> Result<Branches, CounterLost> {
        if self.faults.gone_at.is_some_and(|gone| self.branches >= gone) {
            return Err(CounterLost("taken".to_owned()));
        }
        Ok(Branches(self.count()))
    }

    fn arm(&mut self, after: Option<Branches>) -> Result<(), CounterLost> {
        assert!(after.is_none_or(|after| after.0 >= SHORTEST_RUN), "a short period: {after:?}");
        self.armed = after.map(|after| after.0);
        Ok(())
    }

    fn run(&mut self) -> Option<&'static str> {
        self.runs += 1;
        let start = self.count();
        let Faults { skid, spurious, lost, .. } = self.faults;
        let mut stop = self.armed.map(|after| start + after + self.random.below(skid + 1));
        if lost > 0 && self.random.below(lost) == 0 {
            stop = None;
        }
        if let (Some(late), true) = (stop, spurious > 0 && self.random.below(spurious) == 0) {
            stop = Some(start + self.random.below(late - start + 1));
        }
        loop {
            if stop.is_some_and(|stop| self.count() >= stop) {
                // An overflow comes anywhere between two branches.
                for _ in 0..self.random.below(3) {
                    if self.at < self.exit_at && !self.code[self.at] {
                        self.at += 1;
                    }
                }
                return None;
            }
            if let Some(exit) = self.retire() {
                return Some(exit);
            }
        }
    }

    fn step(&mut self) -> Option<&'static str> {
        self.steps += 1;
        self.retire()
    }
}

fn land(seed: u64, target: u64, faults: Faults) -> (Simulated, Approached<&'static str>) {
    let mut guest = Simulated::new(seed, faults);
    let end = approach(&mut guest, Some(Branches(target)), MARGIN).expect("the counter is there");
    (guest, end)
}

#[test]
fn every_target_is_landed_on_at_its_first_boundary() {
    for seed in 0..40 {
        for target in (1..400).chain((400..4000).step_by(37)) {
            let faults = Faults { skid: MARGIN.0, ..Faults::default() };
            let (guest, end) = land(seed, target, faults);
            let landed = Approached::Landed { at: Branches(target), overshot_by: None };
            assert_eq!(end, landed, "seed {seed}, target {target}");
            assert_eq!(guest.at, guest.boundary(target), "seed {seed}, target {target}");
            // About six instructions a branch.
            let most = (MARGIN.0 + SHORTEST_RUN) * 12 + 50;
            assert!(guest.steps < most, "seed {seed}: {} steps", guest.steps);
        }
    }
}

#[test]
fn spurious_overflows_change_nothing() {
    for seed in 0..200 {
        let faults = Faults { skid: MARGIN.0, spurious: 2, ..Faults::default() };
        let (guest, end) = land(seed, 3000, faults);
        let landed = Approached::Landed { at: Branches(3000), overshot_by: None };
        assert_eq!(end, landed, "seed {seed}");
        assert_eq!(guest.at, guest.boundary(3000), "seed {seed}");
    }
}

#[test]
fn a_late_overflow_is_told_and_the_guest_rests_at_a_place_with_a_number() {
    let mut overshot = 0;
    for seed in 0..400 {
        let faults = Faults { skid: 3 * MARGIN.0, ..Faults::default() };
        let (guest, end) = land(seed, 3000, faults);
        let Approached::Landed { at, overshot_by } = end else { panic!("seed {seed}: {end:?}") };
        assert_eq!(guest.at, guest.boundary(at.0), "seed {seed}");
        match overshot_by {
            None => assert_eq!(at.0, 3000, "seed {seed}"),
            Some(by) => {
                overshot += 1;
                // It was noticed behind `by` more, and rests behind the next one.
                assert_eq!(at.0, 3000 + by + 1, "seed {seed}");
            }
        }
    }
    assert!((200..300).contains(&overshot), "{overshot} of 400");
}

#[test]
fn coming_back_at_the_count_but_behind_its_first_boundary_is_an_overshoot() {
    let mut found = 0;
    for seed in 0..4000 {
        let faults = Faults { skid: MARGIN.0 + 1, ..Faults::default() };
        let (guest, end) = land(seed, 1000, faults);
        if let Approached::Landed { at, overshot_by: Some(0) } = end {
            assert_eq!((at.0, guest.at), (1001, guest.boundary(1001)), "seed {seed}");
            found += 1;
        }
    }
    assert!(found > 10, "{found}");
}

#[test]
fn an_overflow_that_never_comes_ends_at_the_next_exit() {
    for seed in 0..100 {
        let mut guest = Simulated::new(seed, Faults { lost: 1, ..Faults::default() });
        guest.exit_at = 30_000;
        let end = approach(&mut guest, Some(Branches(1000)), MARGIN).expect("counting");
        assert_eq!(end, Approached::Ended("exit"), "seed {seed}");
        assert!(guest.branches > 1000, "the place asked for is behind, which its number says");
        assert_eq!(guest.armed, None, "nothing is left armed");
    }
}

#[test]
fn an_exit_on_the_way_ends_the_approach() {
    for seed in 0..50 {
        for exit_at in (0..12_000).step_by(601) {
            let mut guest = Simulated::new(seed, Faults { skid: 20, ..Faults::default() });
            guest.exit_at = exit_at;
            let target = 1500;
            let behind = guest.boundary(target) <= exit_at;
            let end = approach(&mut guest, Some(Branches(target)), MARGIN).expect("counting");
            if behind {
                let landed = Approached::Landed { at: Branches(target), overshot_by: None };
                assert_eq!(end, landed, "seed {seed}, exit at {exit_at}");
            } else {
                assert_eq!((end, guest.at), (Approached::Ended("exit"), exit_at), "seed {seed}");
                assert_eq!(guest.armed, None, "nothing is left armed");
            }
        }
    }
}

#[test]
fn without_a_target_nothing_is_armed_and_nothing_stepped() {
    let mut guest = Simulated::new(7, Faults::default());
    guest.exit_at = 20_000;
    let end = approach(&mut guest, None, MARGIN).expect("counting");
    assert_eq!((end, guest.at), (Approached::Ended("exit"), 20_000));
    assert_eq!((guest.steps, guest.runs), (0, 1));
}

#[test]
fn a_lost_counter_is_an_error_wherever_it_is_lost() {
    for gone_at in (0..1200).step_by(13) {
        let faults = Faults { gone_at: Some(gone_at), ..Faults::default() };
        let mut guest = Simulated::new(3, faults);
        let end = approach(&mut guest, Some(Branches(1200)), MARGIN);
        assert!(end.is_err(), "gone at {gone_at}: {end:?}");
        assert!(guest.branches <= 1200);
    }
}

/// A count that is wrong leads to a wrong place, at which nothing looks wrong; what tells is the count at
/// the next exit, which the other side has right.
#[test]
fn a_miscount_lands_elsewhere_and_shows_in_the_count_at_the_next_exit() {
    for (ahead, behind) in [(1, 0), (2, 0), (7, 0), (0, 1), (0, 2), (0, 7)] {
        for seed in 0..20 {
            let faults = Faults { ahead, behind, ..Faults::default() };
            let (mut guest, end) = land(seed, 2000, faults);
            let landed = Approached::Landed { at: Branches(2000), overshot_by: None };
            assert_eq!(end, landed, "seed {seed}");
            assert_eq!(guest.at, guest.boundary(2000 - ahead + behind), "seed {seed}");
            guest.exit_at = 30_000;
            let mut other = Simulated::new(seed, Faults::default());
            other.exit_at = 30_000;
            for side in [&mut guest, &mut other] {
                let end = approach(side, None, MARGIN).expect("counting");
                assert_eq!(end, Approached::Ended("exit"));
            }
            let (wrong, right) = (guest.since_exit(), other.since_exit());
            assert_ne!(wrong, right, "seed {seed}");
        }
    }
}

/// Both sides of a pair, with counters of different skid, through a hundred points.
#[test]
fn two_sides_pass_the_same_hundred_places() {
    for seed in 0..20 {
        let mut random = Random(seed);
        let mut sides = [1, MARGIN.0]
            .map(|skid| Simulated::new(seed, Faults { skid, spurious: 5, ..Faults::default() }));
        let mut target = 0;
        for _ in 0..100 {
            target += 1 + random.below(60);
            let places = sides.each_mut().map(|side| {
                let end = approach(side, Some(Branches(target)), MARGIN).expect("counting");
                let landed = Approached::Landed { at: Branches(target), overshot_by: None };
                assert_eq!(end, landed, "seed {seed}, target {target}");
                side.at
            });
            assert_eq!(places[0], places[1], "seed {seed}, target {target}");
        }
    }
}
