//! Landing with a simulated guest and counters that do everything real ones have been seen to do.

use super::*;
use vmft_fuzzing::Random;

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
    /// Where each instruction is: branches repeat themselves, as in loops.
    addresses: Vec<u64>,
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
    /// Stops at a breakpoint.
    hits: u64,
    misled: u64,
}

fn address(address: u64) -> CodeAddress {
    CodeAddress::try_from(address).expect("canonical")
}

/// Addresses of branches are below this, those of other instructions are not.
const OTHERS: u64 = 0x2000;
/// A branch that is never executed.
const NEVER_MET: u64 = 0x1FFF;

/// Three in four branches are that before, in a loop; the others are some out of forty.
fn addresses(seed: u64, code: &[bool]) -> Vec<u64> {
    let mut random = Random::new(!seed);
    let mut last = 0x1000;
    let place = |branch: &bool| {
        if !branch {
            return OTHERS + random.below(100);
        }
        if random.below(4) == 0 {
            last = 0x1000 + random.below(40);
        }
        last
    };
    code.iter().map(place).collect()
}

impl Simulated {
    fn new(seed: u64, faults: Faults) -> Self {
        let mut random = Random::new(seed);
        let code = (0..40_000).map(|_| random.below(6) == 0).collect::<Vec<_>>();
        let exit_at = code.len();
        let addresses = addresses(seed, &code);
        Self {
            code,
            addresses,
            at: 0,
            branches: 0,
            exit_at,
            armed: None,
            faults,
            random,
            steps: 0,
            runs: 0,
            hits: 0,
            misled: 0,
        }
    }

    /// Where the `branches`-th branch is.
    fn branch(&self, branches: u64) -> CodeAddress {
        address(self.addresses[self.boundary(branches) - 1])
    }

    /// How often the guest comes by `address` from the boundary behind `branches` up to that behind `last`.
    fn visits(&self, branch: CodeAddress, branches: u64, last: u64) -> u64 {
        let start = if branches == 0 { 0 } else { self.boundary(branches) };
        let way = &self.addresses[start..self.boundary(last)];
        way.iter().filter(|address| **address == branch.get()).count() as u64
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

impl Simulated {
    /// Runs until something stops it.
    fn go(&mut self, breakpoint: Option<CodeAddress>) -> Result<Reached, &'static str> {
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
        let breakpoint = breakpoint.map(CodeAddress::get);
        loop {
            if breakpoint.is_some() && self.addresses.get(self.at).copied() == breakpoint {
                self.hits += 1;
                return Ok(Reached::Branch);
            }
            if stop.is_some_and(|stop| self.count() >= stop) {
                // An overflow comes anywhere between two branches.
                for _ in 0..self.random.below(3) {
                    if self.at < self.exit_at && !self.code[self.at] {
                        self.at += 1;
                    }
                }
                return Ok(Reached::Elsewhere);
            }
            if let Some(exit) = self.retire() {
                return Err(exit);
            }
        }
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
        self.go(None).err()
    }

    fn run_to(&mut self, branch: CodeAddress) -> Result<Reached, &'static str> {
        if branch.get() >= OTHERS {
            return Ok(Reached::Nowhere);
        }
        self.go(Some(branch))
    }

    fn step(&mut self) -> Option<&'static str> {
        self.steps += 1;
        self.retire()
    }

    fn misled(&mut self) {
        self.misled += 1;
    }
}

fn land(seed: u64, target: u64, faults: Faults) -> (Simulated, Approached<&'static str>) {
    land_by(seed, target, faults, |_| None)
}

/// The same with a hint.
fn land_by(
    seed: u64,
    target: u64,
    faults: Faults,
    hint: impl Fn(&Simulated) -> Option<CodeAddress>,
) -> (Simulated, Approached<&'static str>) {
    let mut guest = Simulated::new(seed, faults);
    let hint = hint(&guest);
    let end = approach(&mut guest, Some(Branches(target)), MARGIN, hint);
    (guest, end.expect("the counter is there"))
}

/// The branch that the target lies behind.
fn right(target: u64) -> impl Fn(&Simulated) -> Option<CodeAddress> {
    move |guest| Some(guest.branch(target))
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
        let end = approach(&mut guest, Some(Branches(1000)), MARGIN, None).expect("counting");
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
            let end = approach(&mut guest, Some(Branches(target)), MARGIN, None).expect("counting");
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
    let end = approach(&mut guest, None, MARGIN, None).expect("counting");
    assert_eq!((end, guest.at), (Approached::Ended("exit"), 20_000));
    assert_eq!((guest.steps, guest.runs), (0, 1));
}

#[test]
fn a_lost_counter_is_an_error_wherever_it_is_lost() {
    for gone_at in (0..1200).step_by(13) {
        let faults = Faults { gone_at: Some(gone_at), ..Faults::default() };
        let mut guest = Simulated::new(3, faults);
        let end = approach(&mut guest, Some(Branches(1200)), MARGIN, None);
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
                let end = approach(side, None, MARGIN, None).expect("counting");
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
        let mut random = Random::new(seed);
        let mut sides = [1, MARGIN.0]
            .map(|skid| Simulated::new(seed, Faults { skid, spurious: 5, ..Faults::default() }));
        let mut target = 0;
        for _ in 0..100 {
            target += 1 + random.below(60);
            let places = sides.each_mut().map(|side| {
                let end = approach(side, Some(Branches(target)), MARGIN, None).expect("counting");
                let landed = Approached::Landed { at: Branches(target), overshot_by: None };
                assert_eq!(end, landed, "seed {seed}, target {target}");
                side.at
            });
            assert_eq!(places[0], places[1], "seed {seed}, target {target}");
        }
    }
}

#[test]
fn a_right_hint_leads_to_every_target_with_a_step_for_each_time_its_branch_is_met() {
    let (mut steps, mut without) = (0, 0);
    for seed in 0..10 {
        for target in (1..400).step_by(3).chain((400..4000).step_by(37)) {
            let faults = Faults { skid: MARGIN.0, ..Faults::default() };
            let (guest, end) = land_by(seed, target, faults, right(target));
            let landed = Approached::Landed { at: Branches(target), overshot_by: None };
            assert_eq!(end, landed, "seed {seed}, target {target}");
            assert_eq!(guest.at, guest.boundary(target), "seed {seed}, target {target}");
            let near = target.saturating_sub(MARGIN.0 + SHORTEST_RUN);
            let visits = guest.visits(guest.branch(target), near, target);
            assert!(guest.hits <= visits, "seed {seed}, target {target}: {} hits", guest.hits);
            assert_eq!(guest.steps, guest.hits, "seed {seed}, target {target}");
            assert_eq!(guest.misled, 0, "seed {seed}, target {target}");
            steps += guest.steps;
            without += land(seed, target, faults).0.steps;
        }
    }
    assert!(steps * 20 < without, "{steps} steps, without hints {without}");
}

#[test]
fn spurious_overflows_and_late_ones_change_nothing_for_a_right_hint() {
    for seed in 0..200 {
        for (skid, spurious) in [(MARGIN.0, 2), (0, 1), (MARGIN.0, 1)] {
            let faults = Faults { skid, spurious, ..Faults::default() };
            let (guest, end) = land_by(seed, 3000, faults, right(3000));
            let landed = Approached::Landed { at: Branches(3000), overshot_by: None };
            assert_eq!(end, landed, "seed {seed}");
            assert_eq!(guest.at, guest.boundary(3000), "seed {seed}");
        }
    }
}

#[test]
fn a_right_hint_needs_no_overflow_where_the_target_is_near() {
    for seed in 0..100 {
        let target = MARGIN.0 + SHORTEST_RUN;
        let faults = Faults { lost: 1, ..Faults::default() };
        let (guest, end) = land_by(seed, target, faults, right(target));
        let landed = Approached::Landed { at: Branches(target), overshot_by: None };
        assert_eq!((end, guest.at), (landed, guest.boundary(target)), "seed {seed}");
        // Further away it ends at the next exit, as it does without a hint.
        let (guest, end) = land_by(seed, 1000, faults, right(1000));
        assert_eq!((end, guest.armed), (Approached::Ended("exit"), None), "seed {seed}");
    }
}

#[test]
fn what_is_no_branch_is_no_hint() {
    for seed in 0..100 {
        for target in [1, 7, 100, 169, 1000] {
            let faults = Faults { skid: MARGIN.0, ..Faults::default() };
            let (stepped, end) = land(seed, target, faults);
            let wrong = |_: &Simulated| Some(address(OTHERS + 3));
            let (guest, led) = land_by(seed, target, faults, wrong);
            assert_eq!((led, guest.at), (end, stepped.at), "seed {seed}, target {target}");
            assert_eq!((guest.steps, guest.misled), (stepped.steps, 0), "seed {seed}");
        }
    }
}

/// The branches of a guest are those that a hint can name: each of them, and one that is never met.
#[test]
fn no_hint_makes_another_place_of_the_target() {
    let (mut landed, mut past) = (0, 0);
    for seed in 0..20 {
        for target in [1, 2, 17, 100, 169, 1000] {
            for branch in (0x1000..0x1000 + 40).chain([NEVER_MET]) {
                let faults = Faults { skid: MARGIN.0, ..Faults::default() };
                let (guest, end) = land_by(seed, target, faults, |_| Some(address(branch)));
                let Approached::Landed { at, overshot_by } = end else {
                    panic!("seed {seed}, target {target}: {end:?}")
                };
                let case = format!("seed {seed}, target {target}, hint {branch:#x}");
                assert_eq!(guest.at, guest.boundary(at.0), "{case}");
                match overshot_by {
                    None => {
                        landed += 1;
                        assert_eq!((at.0, guest.misled), (target, 0), "{case}");
                    }
                    Some(by) => {
                        past += 1;
                        assert!(guest.branch(target).get() != branch, "{case}");
                        // Told, and no further than the counter's next overflow.
                        assert_eq!((at.0, guest.misled), (target + by + 1, 1), "{case}");
                        assert!(by <= SHORTEST_RUN + MARGIN.0, "{case}: {by}");
                    }
                }
                assert!(guest.hits <= SHORTEST_RUN + MARGIN.0 + 1, "{case}: {}", guest.hits);
                assert_eq!(guest.armed, None, "{case}: nothing is left armed");
            }
        }
    }
    assert!(landed > 100 && past > 100, "{landed} landed, {past} past the target");
}

/// A branch that faults, or that a signal keeps from retiring, is met once; then the rest is stepped.
#[test]
fn a_step_that_retires_no_branch_ends_the_belief_in_the_hint() {
    let branch = address(0x1000);
    assert_eq!(HintState::Met(branch).after_step(1), HintState::Ahead(branch));
    assert_eq!(HintState::Met(branch).after_step(0), HintState::None);
    assert_eq!(HintState::Ahead(branch).after_step(1), HintState::Ahead(branch));
    assert_eq!(HintState::None.after_step(1), HintState::None);
}

/// As without a hint: what is wrong shows at the next exit at the latest.
#[test]
fn a_miscount_with_a_right_hint_is_told_or_shows_in_the_count_at_the_next_exit() {
    for (ahead, behind) in [(1, 0), (2, 0), (7, 0), (0, 1), (0, 2), (0, 7)] {
        for seed in 0..20 {
            let faults = Faults { ahead, behind, ..Faults::default() };
            let (mut guest, end) = land_by(seed, 2000, faults, right(2000));
            let Approached::Landed { at, overshot_by } = end else { panic!("seed {seed}") };
            assert_eq!(guest.at, guest.boundary(at.0 - ahead + behind), "seed {seed}");
            assert_eq!(at.0, 2000 + overshot_by.map_or(0, |by| by + 1), "seed {seed}");
            guest.exit_at = 30_000;
            let mut other = Simulated::new(seed, Faults::default());
            other.exit_at = 30_000;
            for side in [&mut guest, &mut other] {
                let end = approach(side, None, MARGIN, None).expect("counting");
                assert_eq!(end, Approached::Ended("exit"));
            }
            assert_ne!(guest.since_exit(), other.since_exit(), "seed {seed}");
        }
    }
}

#[test]
fn an_exit_on_the_way_ends_the_approach_with_a_hint_as_without() {
    for seed in 0..50 {
        for exit_at in (0..12_000).step_by(601) {
            let mut guest = Simulated::new(seed, Faults { skid: 20, ..Faults::default() });
            let hint = guest.branch(1500);
            guest.exit_at = exit_at;
            let behind = guest.boundary(1500) <= exit_at;
            let end = approach(&mut guest, Some(Branches(1500)), MARGIN, Some(hint));
            let expected = match behind {
                true => Approached::Landed { at: Branches(1500), overshot_by: None },
                false => Approached::Ended("exit"),
            };
            assert_eq!(end, Ok(expected), "seed {seed}, exit at {exit_at}");
            assert_eq!(guest.armed, None, "nothing is left armed");
        }
    }
}

#[test]
fn a_counter_that_is_lost_on_the_way_to_a_breakpoint_is_an_error() {
    for gone_at in (1030..1200).step_by(13) {
        let mut guest = Simulated::new(3, Faults { gone_at: Some(gone_at), ..Faults::default() });
        let hint = Some(guest.branch(1200));
        let end = approach(&mut guest, Some(Branches(1200)), MARGIN, hint);
        assert!(end.is_err(), "gone at {gone_at}: {end:?}");
    }
}
