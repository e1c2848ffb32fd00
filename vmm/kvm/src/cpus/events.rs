//! Interrupts of the board's for a CPU with a local APIC, and whether such a CPU waits for ever.

use super::super::carried::activity_of;
use super::super::vcpu::Vcpu;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
};
use vmft_cpu::group::Activity;
use vmm_sys_util::errno;

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// Has an interrupt of the board's delivered to a CPU at rest that can take it, and wakes the CPU.
pub(super) fn inject(vcpu: &mut Vcpu, vector: u8) -> Result<(), errno::Error> {
    let mut stopped = vcpu.stop();
    if stopped.mp_state()? == KVM_MP_STATE_HALTED {
        stopped.set_mp_state(KVM_MP_STATE_RUNNABLE)?;
    }
    let mut events = stopped.events()?;
    events.flags = KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING;
    events.interrupt.injected = 1;
    events.interrupt.nr = vector;
    events.interrupt.soft = 0;
    stopped.set_events(&events)
}

/// True if nothing but another CPU wakes this one, which is at rest: it halts with interrupts off, or was
/// never started.
pub(super) fn is_off(vcpu: &mut Vcpu) -> Result<bool, errno::Error> {
    let stopped = vcpu.stop();
    Ok(match activity_of(&stopped)? {
        Activity::Running => false,
        Activity::Halted => {
            stopped.regs()?.rflags & INTERRUPT_FLAG == 0 && stopped.events()?.nmi.pending == 0
        }
        Activity::Unstarted | Activity::Initialised => true,
    })
}
