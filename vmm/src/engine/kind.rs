//! Which engine a machine has, and opening it.

use super::soft::SoftEngine;
use super::{Engine, KvmEngine, KvmError, PointKind};
use crate::memory::GuestRam;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The engine of a machine; both sides of a pair have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// The interpreter: a point is a retired instruction.
    #[default]
    Soft,
    /// The host's KVM.
    Kvm {
        /// What a point is.
        points: PointKind,
    },
}

/// Why an engine cannot be opened on this host.
#[derive(Debug, thiserror::Error)]
#[error("the kvm engine cannot run on this host")]
pub struct EngineError(#[from] pub KvmError);

impl EngineKind {
    /// Opens the engine, over the guest's memory.
    ///
    /// # Errors
    /// [`EngineError`] if this host has no such engine.
    pub fn open(self, ram: GuestRam) -> Result<Box<dyn Engine>, EngineError> {
        Ok(match self {
            Self::Soft => Box::new(SoftEngine::new(ram)),
            Self::Kvm { points } => Box::new(KvmEngine::open(ram, points)?),
        })
    }

    /// True if what this engine runs can be run again from its inputs.
    pub const fn is_replayable(self) -> bool {
        match self {
            Self::Soft => true,
            Self::Kvm { points } => points.is_deterministic(),
        }
    }

    /// True if the guest could see what this engine cannot make the same on both sides, and so must
    /// be known not to look.
    pub const fn trusts_the_guest(self) -> bool {
        matches!(self, Self::Kvm { .. })
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Soft => "soft",
            Self::Kvm { points: PointKind::Free } => "kvm, free-running",
            Self::Kvm { points: PointKind::Exit } => "kvm, points at exits",
            Self::Kvm { points: PointKind::Step } => "kvm, points at single steps",
            Self::Kvm { points: PointKind::Pmu } => "kvm, points at branches",
        })
    }
}
