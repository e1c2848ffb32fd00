//! Which engine a machine has, and opening it.

use serde::{Deserialize, Serialize};
use std::fmt;
use vmft_cpu::memory::GuestRam;
use vmft_cpu::soft::SoftEngine;
use vmft_cpu::{CpuCount, Engine};
use vmft_kvm::{FreeEngine, GroupEngine, KvmEngine, KvmError, PointKind};

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

/// Why an engine cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Not on this host.
    #[error("the kvm engine cannot run on this host")]
    Kvm(#[from] KvmError),
    /// Not with several CPUs.
    #[error(
        "engine {engine} has one CPU, because it follows one stream of instructions; {cpus} CPUs need \
         --engine kvm, running freely: unprotected, or in a pair with --protect checkpoint"
    )]
    Cpus {
        /// The engine.
        engine: EngineKind,
        /// The CPUs asked for.
        cpus: CpuCount,
    },
}

impl EngineKind {
    /// The engine can have so many CPUs.
    ///
    /// # Errors
    /// [`EngineError::Cpus`]
    pub fn check_cpus(self, cpus: CpuCount) -> Result<(), EngineError> {
        match self {
            Self::Kvm { points: PointKind::Free } => Ok(()),
            engine if cpus.is_several() => Err(EngineError::Cpus { engine, cpus }),
            Self::Soft | Self::Kvm { .. } => Ok(()),
        }
    }

    /// Opens the engine with its CPUs, over the guest's memory.
    ///
    /// # Errors
    /// [`EngineError`] if this host has no such engine, or it cannot have so many CPUs.
    pub fn open(self, ram: GuestRam, cpus: CpuCount) -> Result<Box<dyn Engine>, EngineError> {
        self.check_cpus(cpus)?;
        Ok(match self {
            Self::Soft => Box::new(SoftEngine::new(ram)),
            Self::Kvm { .. } if cpus.is_several() => Box::new(GroupEngine::open(ram, cpus)?),
            Self::Kvm { points: PointKind::Free } => Box::new(FreeEngine::open(ram)?),
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
