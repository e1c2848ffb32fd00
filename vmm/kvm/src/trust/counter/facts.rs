//! What is known of the counter of guest branches, and whether it may be trusted.

use crate::trust::facts::{Level, Outcome};
use serde::{Deserialize, Serialize};

/// The event that counts retired conditional branches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchCounter {
    /// `perf_event_attr.type`.
    pub kind: u32,
    /// `perf_event_attr.config`: event and unit mask.
    pub raw: u64,
    /// Branches it may come late by, from others' experience with this kind of CPU.
    pub skid: u64,
}

/// The counter, tested or not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CounterFacts {
    /// There is none, and why.
    Absent(String),
    /// There is one, and this is what it did.
    Tested {
        /// Which event.
        event: BranchCounter,
        /// What it did.
        checks: CounterChecks,
    },
}

/// One run of a guest whose branches are known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exactness {
    /// What the guest did between its branches.
    pub what: String,
    /// Where.
    pub level: Level,
    /// How many conditional branches it retired.
    pub expected: u64,
    /// How many were counted.
    pub counted: Outcome<u64>,
}

/// Overflows, and how late they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overflows {
    /// How many were asked for.
    pub wanted: u32,
    /// How many brought the guest back.
    pub arrived: u32,
    /// Branches the latest of them was late by.
    pub worst_skid: u64,
}

/// Attempts to stop at an exact branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Landings {
    /// How many there was time for.
    pub tried: u32,
    /// How many ended at the wanted count, instruction and registers.
    pub landed: u32,
}

/// The self-test of the counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterChecks {
    /// Guests whose branches are known.
    pub exact: Vec<Exactness>,
    /// Branches counted while only the host ran.
    pub host_branches: Outcome<u64>,
    /// Whether the counter ran whenever it was enabled.
    pub always_running: bool,
    /// Overflows.
    pub overflows: Outcome<Overflows>,
    /// Landings.
    pub landings: Outcome<Landings>,
    /// Whether counters stand still during system management; `None` where the host has no
    /// such switch.
    pub freeze_on_smi: Option<bool>,
    /// Whether the host has CPUs of several kinds; then one kind was tested, and the guest must
    /// stay on it.
    pub hybrid: bool,
}

/// Fewer landings than this prove nothing.
const ENOUGH_LANDINGS: u32 = 20;

impl CounterChecks {
    /// Branches to stop short of a target: twice the latest overflow seen, and never less than
    /// experience says.
    pub fn margin(&self, event: BranchCounter) -> u64 {
        let seen = self.overflows.measured().map_or(0, |overflows| overflows.worst_skid);
        event.skid.max(seen.saturating_mul(2))
    }

    /// Why execution points must not be named by this counter; empty if they may.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for run in &self.exact {
            match &run.counted {
                Outcome::Measured(counted) if *counted == run.expected => {}
                Outcome::Measured(counted) => faults.push(format!(
                    "{} at {}: counted {counted} branches of {}",
                    run.what, run.level, run.expected
                )),
                Outcome::Odd(what) => {
                    faults.push(format!("{} at {}: {what}", run.what, run.level));
                }
            }
        }
        if self.exact.is_empty() {
            faults.push("no guest was counted".to_owned());
        }
        match &self.host_branches {
            Outcome::Measured(0) => {}
            Outcome::Measured(count) => {
                faults.push(format!("counted {count} branches while only the host ran"));
            }
            Outcome::Odd(what) => faults.push(format!("counting while the host runs: {what}")),
        }
        if !self.always_running {
            faults.push("others use the counter too: it did not run all the time".to_owned());
        }
        match &self.overflows {
            Outcome::Measured(overflows) if overflows.arrived == overflows.wanted => {}
            Outcome::Measured(overflows) => faults
                .push(format!("{} of {} overflows arrived", overflows.arrived, overflows.wanted)),
            Outcome::Odd(what) => faults.push(format!("overflows: {what}")),
        }
        match &self.landings {
            Outcome::Measured(Landings { tried, landed })
                if tried == landed && *tried >= ENOUGH_LANDINGS => {}
            Outcome::Measured(Landings { tried, landed }) => {
                faults.push(format!("landed {landed} times of {tried}"));
            }
            Outcome::Odd(what) => faults.push(format!("landing: {what}")),
        }
        if self.freeze_on_smi == Some(false) {
            faults.push(
                "counters run during system management; \
                 `echo 1 > /sys/devices/cpu/freeze_on_smi` stops that"
                    .to_owned(),
            );
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> CounterChecks {
        CounterChecks {
            exact: vec![Exactness {
                what: "a loop".to_owned(),
                level: Level::Kernel,
                expected: 1000,
                counted: Outcome::Measured(1000),
            }],
            host_branches: Outcome::Measured(0),
            always_running: true,
            overflows: Outcome::Measured(Overflows { wanted: 9, arrived: 9, worst_skid: 70 }),
            landings: Outcome::Measured(Landings { tried: 100, landed: 100 }),
            freeze_on_smi: Some(true),
            hybrid: false,
        }
    }

    #[test]
    fn a_counter_that_passes_every_check_has_no_fault() {
        assert_eq!(good().faults(), Vec::<String>::new());
        assert!(CounterChecks { freeze_on_smi: None, hybrid: true, ..good() }.faults().is_empty());
    }

    #[test]
    fn each_failed_check_alone_is_a_fault() {
        let odd = || "no end in time".to_owned();
        let mut miscount = good();
        miscount.exact[0].counted = Outcome::Measured(1001);
        let mut lost = good();
        lost.exact[0].counted = Outcome::Odd(odd());
        let bad = [
            miscount,
            lost,
            CounterChecks { exact: Vec::new(), ..good() },
            CounterChecks { host_branches: Outcome::Measured(1), ..good() },
            CounterChecks { host_branches: Outcome::Odd(odd()), ..good() },
            CounterChecks { always_running: false, ..good() },
            CounterChecks {
                overflows: Outcome::Measured(Overflows { wanted: 9, arrived: 8, worst_skid: 1 }),
                ..good()
            },
            CounterChecks { overflows: Outcome::Odd(odd()), ..good() },
            CounterChecks {
                landings: Outcome::Measured(Landings { tried: 100, landed: 99 }),
                ..good()
            },
            CounterChecks {
                landings: Outcome::Measured(Landings { tried: 3, landed: 3 }),
                ..good()
            },
            CounterChecks { landings: Outcome::Odd(odd()), ..good() },
            CounterChecks { freeze_on_smi: Some(false), ..good() },
        ];
        for checks in bad {
            assert_eq!(checks.faults().len(), 1, "{checks:?}");
        }
    }

    #[test]
    fn the_margin_is_twice_what_was_seen_and_never_below_experience() {
        let event = BranchCounter { kind: 4, raw: 0x1c4, skid: 100 };
        assert_eq!(good().margin(event), 140);
        assert_eq!(good().margin(BranchCounter { skid: 10_000, ..event }), 10_000);
    }
}
