//! Why a machine cannot go on, or cannot be followed.

use super::{FaultReport, SetupError, StateError};
use crate::board::DeliveryError;
use crate::boot::GateError;
use crate::engine::EngineKind;
use crate::inputs::InputError;
use vmft_cpu::EngineFault;
use vmft_log::point::ExecutionPoint;

/// Why a machine's run cannot be recorded or followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LockstepRefusal {
    /// Its engine stops where the host happens to.
    #[error(
        "this machine was started free-running on kvm, which cannot be replayed; start it with \
         --engine soft, or with --engine kvm --points exit"
    )]
    FreeRunning,
    /// Its kernel may look at what differs from host to host.
    #[error(
        "on engine {engine} a guest reads the host's time stamp counter and random numbers \
         unseen, so only a kernel that is known not to can be followed; use --engine soft, which \
         follows any kernel, or protect a pair by its state with --protect checkpoint, or use the \
         lockstep kernel of `vmft guest --lockstep`"
    )]
    Kernel {
        /// The engine.
        engine: EngineKind,
        /// What the kernel lacks, or has.
        #[source]
        source: GateError,
    },
}

/// Why a machine cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The engine met something it cannot execute.
    #[error(transparent)]
    Engine(#[from] EngineFault),
    /// The guest has met a fault of this program. The machine is of no use any more.
    #[error(transparent)]
    Broken(Box<FaultReport>),
    /// The inputs failed.
    #[error(transparent)]
    Input(#[from] InputError),
    /// An arrival fits no request; on a replaying side, the log is not this machine's.
    #[error("an arrival at point {point} does not fit")]
    Delivery {
        /// Where.
        point: ExecutionPoint,
        /// Why.
        #[source]
        source: DeliveryError,
    },
    /// A checkpoint in the log is none of this machine.
    #[error("a checkpoint in the log at point {point} does not fit")]
    Adopt {
        /// Where.
        point: ExecutionPoint,
        /// Why.
        #[source]
        source: StateError,
    },
    /// The machine could not start again after a reset.
    #[error("restarting after a reset")]
    Reset(#[source] Box<SetupError>),
}

impl MachineError {
    /// True if the guest came to something that this program cannot do or does wrong: whoever follows
    /// the same guest may come to the same.
    pub fn is_of_the_guest(&self) -> bool {
        matches!(self, Self::Engine(_) | Self::Broken(_))
    }
}
