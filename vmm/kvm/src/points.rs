//! What counts as an execution point on `kvm`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What [`ExecutionPoint`](vmft_log::point::ExecutionPoint) counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PointKind {
    /// Deterministic exits and the host's kicks: nothing can be replayed. For unprotected runs of
    /// any kernel.
    Free,
    /// Deterministic exits: an instruction that used a port or a device, `HLT`, or an access to
    /// a model-specific register that the engine answered. The host's kicks are no points.
    Exit,
    /// Instructions, stepped one by one. A `REP` string instruction counts as one.
    Step,
    /// Deterministic exits, and between two of them the conditional branches that the guest has
    /// retired since.
    Pmu,
}

impl PointKind {
    /// True if two runs with the same inputs pass the same points.
    pub const fn is_deterministic(self) -> bool {
        !matches!(self, Self::Free)
    }
}

impl fmt::Display for PointKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Free => "free",
            Self::Exit => "exit",
            Self::Step => "step",
            Self::Pmu => "pmu",
        })
    }
}
