//! Model-specific registers that the engine answers itself, in the way `soft` does: those that have
//! to do with the time-stamp counter, and the microcode's revision. All others that KVM does not own
//! fault.

use vmft_cpu::kvm_state::OwnRegisters;
use vmft_cpu::{Bus, msr};
use vmft_log::point::ExecutionPoint;

/// The access faults: `#GP(0)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault;

/// `RDMSR` of a register that KVM does not keep.
pub(crate) fn read(
    own: &OwnRegisters,
    number: u32,
    at: ExecutionPoint,
    bus: &mut dyn Bus,
) -> Result<u64, Fault> {
    match number {
        msr::TSC => Ok(bus.time_stamp(at).wrapping_add(own.tsc_adjust)),
        msr::TSC_ADJUST => Ok(own.tsc_adjust),
        msr::MICROCODE_REVISION => Ok(0),
        msr::TSC_AUX => Ok(own.tsc_aux),
        _ => Err(Fault),
    }
}

/// `WRMSR` of such a register.
pub(crate) fn write(
    own: &mut OwnRegisters,
    number: u32,
    value: u64,
    at: ExecutionPoint,
    bus: &mut dyn Bus,
) -> Result<(), Fault> {
    match number {
        msr::TSC => own.tsc_adjust = value.wrapping_sub(bus.time_stamp(at)),
        msr::TSC_ADJUST => own.tsc_adjust = value,
        msr::MICROCODE_REVISION => {}
        msr::TSC_AUX if value >> 32 == 0 => own.tsc_aux = value,
        _ => return Err(Fault),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_cpu::PortWidth;

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
        assert_eq!(write(&mut registers, msr::TSC, 7, at(100), &mut Clock), Ok(()));
        assert_eq!(read(&registers, msr::TSC, at(101), &mut Clock), Ok(17));
        assert_eq!(
            read(&registers, msr::TSC_ADJUST, at(101), &mut Clock),
            Ok(7u64.wrapping_sub(1000))
        );
    }

    #[test]
    fn what_the_model_does_not_have_faults() {
        let mut registers = OwnRegisters::default();
        let at = ExecutionPoint::START;
        for number in [0x1B, 0x19C, 0xE7, 0x4B56_4D01] {
            assert_eq!(read(&registers, number, at, &mut Clock), Err(Fault));
            assert_eq!(write(&mut registers, number, 0, at, &mut Clock), Err(Fault));
        }
        assert_eq!(write(&mut registers, msr::TSC_AUX, 1 << 32, at, &mut Clock), Err(Fault));
    }
}
