//! Starting the guest again, as a reset button does. Guest time and the count of instructions go on; requests
//! still outside are forgotten by the board.
//!
//! A guest that boots from its disks boots what they have then, which is an input. The machine waits for it
//! without executing anything; on a side that records, the machine that has booted goes into the log as a
//! whole, so that whoever replays needs no disk.

use super::delta::DeltaBase;
use super::{BootSource, Delta, Machine, MachineError, SetupError};
use crate::boot::{self, BootError, GateError};

/// Why a machine does not start with what its disks have.
#[derive(Debug, thiserror::Error)]
pub(super) enum BootRefusal {
    /// It is no kernel, or too large.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The one before could be followed on this engine.
    #[error("the kernel before could be followed on this engine, and this one cannot: {0}")]
    Kernel(#[from] GateError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] crate::engine::InvalidState),
}

impl Machine {
    /// Starts the guest again: from the kernel that it had, or from what its disks have now.
    pub(super) fn reset(&mut self) -> Result<(), MachineError> {
        self.bring_to_rest();
        self.engine.ram().clear();
        self.board.reset();
        self.awaits_boot = self.source.disk.is_some();
        if self.awaits_boot {
            return Ok(());
        }
        let failed = |error: SetupError| MachineError::Reset(Box::new(error));
        let (ram, cpus) = (self.engine.ram(), self.config.cpus());
        let cpu = self.source.load(ram, cpus).map_err(|error| failed(error.into()))?;
        self.engine.restore(&cpu, self.engine.point()).map_err(|error| failed(error.into()))
    }

    /// Starts the guest that was reset with what its disks have.
    pub(super) fn boot(&mut self, source: BootSource) -> Result<(), BootRefusal> {
        assert!(self.awaits_boot, "the guest runs");
        // A log that nobody could replay is worse than a guest that stops.
        if self.config.engine.trusts_the_guest() && boot::examine(&self.source.kernel).is_ok() {
            boot::examine(&source.kernel)?;
        }
        let cpu = source.load(self.engine.ram(), self.config.cpus())?;
        self.engine.restore(&cpu, self.engine.point())?;
        self.source = source;
        self.awaits_boot = false;
        Ok(())
    }

    /// Gives the place a name by all of the machine: of what was before, nothing is left.
    pub(super) fn take_whole(&mut self) -> Delta {
        self.engine.flush_caches();
        let pages = self.used_pages();
        let base = DeltaBase { point: self.engine.point(), is_checkpoint: true };
        let delta = self.copy_delta(pages, base, &[]);
        self.begin_delta_at(true);
        Delta { is_whole: true, ..delta }
    }
}
