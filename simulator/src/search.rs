//! Many schedules, and the smallest form of one that fails.

use crate::coverage::Coverage;
use crate::plan::{Ending, Plan};
use crate::world::{Plant, run};
use std::fmt;

/// A schedule that fails.
#[derive(Debug)]
pub struct Found {
    /// Its seed.
    pub seed: u64,
    /// How many schedules were tried, this one included.
    pub schedules: u64,
    /// What was wrong.
    pub failure: String,
    /// The least that has to go wrong for it.
    pub plan: Plan,
    /// What happens then.
    pub trace: Vec<String>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, schedules, failure, plan, trace } = self;
        writeln!(f, "seed {seed} (schedule {schedules}): {failure}")?;
        writeln!(f, "{plan}")?;
        trace.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        writeln!(f, "to see it again: VMFT_SIM_SEED={seed} VMFT_SIM_COUNT=1 \\")?;
        write!(f, "  cargo test --workspace --test schedules pairs -- --nocapture")
    }
}

/// What many schedules came to.
#[derive(Debug)]
pub struct Search {
    /// The first that fails.
    pub found: Option<Found>,
    /// Which faults struck which step of a join.
    pub coverage: Coverage,
    /// Schedules tried.
    pub schedules: u64,
    /// Events in all of them.
    pub events: u64,
}

/// Tries the schedules of `count` seeds from `first` on, until one fails.
pub fn search(first: u64, count: u64, plant: Option<Plant>) -> Search {
    let mut search = Search { found: None, coverage: Coverage::default(), schedules: 0, events: 0 };
    for seed in first..first + count {
        let outcome = run(seed, Plan::new(seed), plant, false);
        search.schedules += 1;
        search.events += outcome.events;
        search.coverage.merge(&outcome.coverage);
        if let Some(failure) = outcome.failure {
            search.found = Some(minimised(seed, search.schedules, failure, plant));
            break;
        }
    }
    search
}

/// Runs one seed; what is wrong with it, in its smallest form.
pub fn check(seed: u64, plant: Option<Plant>) -> Option<Found> {
    search(seed, 1, plant).found
}

/// Leaves out what need not go wrong, as long as something still fails.
fn minimised(seed: u64, schedules: u64, failure: String, plant: Option<Plant>) -> Found {
    let mut plan = Plan::new(seed);
    let fails = |plan: &Plan| run(seed, plan.clone(), plant, false).failure.is_some();
    loop {
        let faults = 0..plan.faults.len();
        let without = faults.map(|index| {
            let mut smaller = plan.clone();
            smaller.faults.remove(index);
            smaller
        });
        let calm = (plan.ending != Ending::Heal).then(|| {
            let ending = Ending::Heal;
            Plan { ending, ..plan.clone() }
        });
        match without.chain(calm).find(|smaller| fails(smaller)) {
            Some(smaller) => plan = smaller,
            None => break,
        }
    }
    let outcome = run(seed, plan.clone(), plant, true);
    let failure = outcome.failure.unwrap_or(failure);
    Found { seed, schedules, failure, plan, trace: outcome.trace }
}
