//! Which faults have struck which step of a join.

use crate::plan::FAULT_KINDS;
use crate::side::Phase;
use std::fmt;

/// Counts, by step and fault.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage([[u64; FAULT_KINDS.len()]; Phase::NAMES.len()]);

/// The place of a change of generation among the kinds of faults.
pub(crate) const GENERATION: usize = FAULT_KINDS.len() - 1;

impl Coverage {
    pub(crate) const fn add(&mut self, step: usize, kind: usize) {
        self.0[step][kind] += 1;
    }

    /// Adds what another schedule covered.
    pub fn merge(&mut self, other: &Self) {
        for (ours, theirs) in self.0.iter_mut().flatten().zip(other.0.iter().flatten()) {
            *ours += theirs;
        }
    }

    /// The pair of step and fault that was met least often, and how often.
    pub fn least(&self) -> (&'static str, &'static str, u64) {
        let cells = Phase::NAMES.iter().zip(&self.0).flat_map(|(step, row)| {
            FAULT_KINDS.iter().zip(row).map(|(kind, count)| (*step, *kind, *count))
        });
        cells.min_by_key(|(.., count)| *count).expect("there are some")
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:12}", "")?;
        FAULT_KINDS.iter().try_for_each(|kind| write!(f, "{kind:>12}"))?;
        for (step, row) in Phase::NAMES.iter().zip(&self.0) {
            write!(f, "\n{step:12}")?;
            row.iter().try_for_each(|count| write!(f, "{count:>12}"))?;
        }
        Ok(())
    }
}
