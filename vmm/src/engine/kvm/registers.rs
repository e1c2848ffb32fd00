//! Model-specific registers that the engine answers itself, in the way `soft` does: those that have
//! to do with the time-stamp counter, and the microcode's revision. All others that KVM does not own
//! fault.

use crate::engine::msr;
use crate::engine::{Bus, CpuState};
use vmft_log::point::ExecutionPoint;

/// The access faults: `#GP(0)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault;

/// The registers KVM does not keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct OwnRegisters {
    pub(super) tsc_adjust: u64,
    pub(super) tsc_aux: u64,
}

impl OwnRegisters {
    pub(super) fn of(state: &CpuState) -> Self {
        Self { tsc_adjust: state.msrs.tsc_adjust, tsc_aux: state.msrs.tsc_aux }
    }

    /// `RDMSR`.
    pub(super) fn read(
        &self,
        number: u32,
        at: ExecutionPoint,
        bus: &mut dyn Bus,
    ) -> Result<u64, Fault> {
        match number {
            msr::TSC => Ok(bus.time_stamp(at).wrapping_add(self.tsc_adjust)),
            msr::TSC_ADJUST => Ok(self.tsc_adjust),
            msr::MICROCODE_REVISION => Ok(0),
            msr::TSC_AUX => Ok(self.tsc_aux),
            _ => Err(Fault),
        }
    }

    /// `WRMSR`.
    pub(super) fn write(
        &mut self,
        number: u32,
        value: u64,
        at: ExecutionPoint,
        bus: &mut dyn Bus,
    ) -> Result<(), Fault> {
        match number {
            msr::TSC => self.tsc_adjust = value.wrapping_sub(bus.time_stamp(at)),
            msr::TSC_ADJUST => self.tsc_adjust = value,
            msr::MICROCODE_REVISION => {}
            msr::TSC_AUX if value >> 32 == 0 => self.tsc_aux = value,
            _ => return Err(Fault),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::PortWidth;

    struct Clock;

    impl Bus for Clock {
        fn port_read(&mut self, _: ExecutionPoint, _: u16, _: PortWidth) -> u32 {
            unreachable!("no port is read")
        }
        fn port_write(&mut self, _: ExecutionPoint, _: u16, _: PortWidth, _: u32) {
            unreachable!("no port is written")
        }
        fn memory_read(&mut self, _: ExecutionPoint, _: u64, _: &mut [u8]) {
            unreachable!("no device is read")
        }
        fn memory_write(&mut self, _: ExecutionPoint, _: u64, _: &[u8]) {
            unreachable!("no device is written")
        }
        fn time_stamp(&mut self, at: ExecutionPoint) -> u64 {
            at.get() * 10
        }
    }

    #[test]
    fn the_counter_goes_on_from_what_was_written() {
        let mut registers = OwnRegisters::default();
        let at = ExecutionPoint::new;
        assert_eq!(registers.write(msr::TSC, 7, at(100), &mut Clock), Ok(()));
        assert_eq!(registers.read(msr::TSC, at(101), &mut Clock), Ok(17));
        assert_eq!(
            registers.read(msr::TSC_ADJUST, at(101), &mut Clock),
            Ok(7u64.wrapping_sub(1000))
        );
    }

    #[test]
    fn what_the_model_does_not_have_faults() {
        let mut registers = OwnRegisters::default();
        let at = ExecutionPoint::START;
        for number in [0x1B, 0x19C, 0xE7, 0x4B56_4D01] {
            assert_eq!(registers.read(number, at, &mut Clock), Err(Fault));
            assert_eq!(registers.write(number, 0, at, &mut Clock), Err(Fault));
        }
        assert_eq!(registers.write(msr::TSC_AUX, 1 << 32, at, &mut Clock), Err(Fault));
    }
}
