//! The `kvm` engine: the guest's instructions run on the host's CPU.

mod error;
mod kick;
mod points;

pub use error::KvmError;
pub use kick::Kicker;
pub use points::PointKind;

use super::{Bus, CpuState, Engine, Exit, InvalidState, Vector};
use crate::memory::GuestRam;
use vmft_logging_channel::point::ExecutionPoint;

/// A CPU of the host.
#[derive(Debug)]
pub struct KvmEngine {
    ram: GuestRam,
}

impl KvmEngine {
    /// Opens `/dev/kvm` and makes a virtual machine of one CPU that runs in `ram`. It has no
    /// valid state yet: call [`Engine::restore`] first.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn open(ram: GuestRam, points: PointKind) -> Result<Self, KvmError> {
        let _ = (ram, points);
        Err(KvmError::Missing)
    }
}

impl Engine for KvmEngine {
    fn run(&mut self, _: ExecutionPoint, _: bool, _: &mut dyn Bus) -> Exit {
        unreachable!()
    }
    fn point(&self) -> ExecutionPoint {
        unreachable!()
    }
    fn inject(&mut self, _: Vector) {
        unreachable!()
    }
    fn save(&self) -> CpuState {
        unreachable!()
    }
    fn restore(&mut self, _: &CpuState, _: ExecutionPoint) -> Result<(), InvalidState> {
        unreachable!()
    }
    fn renew_write_tracking(&mut self) {}
    fn flush_caches(&mut self) {}
    fn is_halted(&self) -> bool {
        unreachable!()
    }
    fn is_off(&self) -> bool {
        unreachable!()
    }
    fn ram(&self) -> &GuestRam {
        &self.ram
    }
}
