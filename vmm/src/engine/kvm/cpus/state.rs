//! What KVM keeps of a CPU among several beside its registers, as plain values and back.

use super::super::registers::OwnRegisters;
use super::super::state::KvmState;
use super::super::vcpu::Vcpu;
use crate::engine::group::{
    APIC_REGISTERS, Activity, Companion, Delivery, LocalApic, PendingEvents,
};
use crate::engine::{CpuState, InvalidState};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    kvm_lapic_state, kvm_vcpu_events,
};
use vmm_sys_util::errno;

/// Bytes from one register of a local APIC to the next.
const STRIDE: usize = 16;

/// A CPU's state after power-on.
pub(super) struct PowerOn {
    state: KvmState,
    mp_state: u32,
    lapic: kvm_lapic_state,
}

impl PowerOn {
    /// Of a CPU that has never run.
    pub(super) fn of(vcpu: &mut Vcpu) -> Result<Self, errno::Error> {
        let stopped = vcpu.stop();
        let mp_state = stopped.mp_state()?;
        Ok(Self { state: stopped.state()?, mp_state, lapic: stopped.lapic()? })
    }

    /// Sets it; and with `cpu`, the registers that a loader has prepared.
    pub(super) fn set(&self, vcpu: &mut Vcpu, cpu: Option<&CpuState>) -> Result<(), errno::Error> {
        let mut stopped = vcpu.stop();
        // Requests that are on their way to a CPU are taken by it when it is asked what it does.
        stopped.mp_state()?;
        stopped.set_state(&self.state)?;
        if let Some(cpu) = cpu {
            let apic_base = self.state.apic_base();
            stopped.set_state(&self.state.with(cpu).with_apic_base(apic_base))?;
        }
        stopped.set_lapic(&self.lapic)?;
        stopped.set_mp_state(self.mp_state)
    }
}

impl std::fmt::Debug for PowerOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PowerOn").field("mp_state", &self.mp_state).finish_non_exhaustive()
    }
}

fn activity(mp_state: u32) -> Activity {
    match mp_state {
        KVM_MP_STATE_HALTED => Activity::Halted,
        KVM_MP_STATE_UNINITIALIZED => Activity::Unstarted,
        KVM_MP_STATE_INIT_RECEIVED => Activity::Initialised,
        _ => Activity::Running,
    }
}

fn mp_state(activity: Activity) -> u32 {
    match activity {
        Activity::Running => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::Unstarted => KVM_MP_STATE_UNINITIALIZED,
        Activity::Initialised => KVM_MP_STATE_INIT_RECEIVED,
    }
}

fn pending_of(events: &kvm_vcpu_events) -> PendingEvents {
    let kvm_vcpu_events { exception, interrupt, nmi, .. } = events;
    let raised = exception.injected != 0 || exception.pending != 0;
    PendingEvents {
        exception: raised.then(|| Delivery {
            vector: exception.nr,
            error: (exception.has_error_code != 0).then_some(exception.error_code),
            soft: false,
        }),
        interrupt: (interrupt.injected != 0).then_some(Delivery {
            vector: interrupt.nr,
            error: None,
            soft: interrupt.soft != 0,
        }),
        nmi_injected: nmi.injected != 0,
        nmi_pending: nmi.pending != 0,
        nmi_masked: nmi.masked != 0,
        shadow: interrupt.shadow,
    }
}

fn events_of(pending: &PendingEvents) -> kvm_vcpu_events {
    let PendingEvents { exception, interrupt, nmi_injected, nmi_pending, nmi_masked, shadow } =
        *pending;
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING,
        ..kvm_vcpu_events::default()
    };
    if let Some(Delivery { vector, error, soft: _ }) = exception {
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = error.is_some().into();
        events.exception.error_code = error.unwrap_or_default();
    }
    if let Some(Delivery { vector, error: _, soft }) = interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
        events.interrupt.soft = soft.into();
    }
    events.interrupt.shadow = shadow;
    events.nmi.injected = nmi_injected.into();
    events.nmi.pending = nmi_pending.into();
    events.nmi.masked = nmi_masked.into();
    events
}

/// The whole state of a CPU at rest.
pub(super) fn save(
    vcpu: &mut Vcpu,
    own: &OwnRegisters,
) -> Result<(CpuState, Companion), errno::Error> {
    let stopped = vcpu.stop();
    // First: what is on its way to the CPU (INIT, start-up) is done now, and changes registers.
    let activity = activity(stopped.mp_state()?);
    let state = stopped.state()?;
    let mut cpu = state.plain();
    cpu.msrs.tsc_adjust = own.tsc_adjust;
    cpu.msrs.tsc_aux = own.tsc_aux;
    cpu.halted = activity == Activity::Halted;
    let lapic = stopped.lapic()?;
    let register = |bytes: &[i8]| {
        u32::from_le_bytes([bytes[0] as u8, bytes[1] as u8, bytes[2] as u8, bytes[3] as u8])
    };
    let registers = lapic.regs.chunks_exact(STRIDE).map(register).collect();
    let apic = LocalApic { base: state.apic_base(), registers };
    Ok((cpu, Companion { activity, apic, pending: pending_of(state.events()) }))
}

/// Sets the whole state of a CPU at rest. It has been set to that of power-on before.
pub(super) fn restore(
    vcpu: &mut Vcpu,
    cpu: &CpuState,
    companion: &Companion,
) -> Result<(), InvalidState> {
    let Companion { activity, apic: LocalApic { base, registers }, pending } = companion;
    if registers.len() != APIC_REGISTERS {
        return Err(InvalidState(format!("a local APIC with {} registers", registers.len())));
    }
    if cpu.halted != (*activity == Activity::Halted) {
        return Err(InvalidState("a CPU that halts and does not".to_owned()));
    }
    let mut lapic = kvm_lapic_state::default();
    for (bytes, register) in lapic.regs.chunks_exact_mut(STRIDE).zip(registers) {
        for (byte, value) in bytes.iter_mut().zip(register.to_le_bytes()) {
            *byte = value as i8;
        }
    }
    let mut stopped = vcpu.stop();
    let mut set = || -> Result<(), errno::Error> {
        let state = stopped.state()?.with(cpu).with_apic_base(*base);
        stopped.set_state(&state)?;
        // Its timer starts here, which needs the APIC where it is.
        stopped.set_lapic(&lapic)?;
        stopped.set_events(&events_of(pending))?;
        stopped.set_mp_state(mp_state(*activity))
    };
    set().map_err(|error| InvalidState(format!("this host's KVM refuses it: {error}")))
}

/// Has an interrupt of the board's delivered to a CPU at rest that can take it, and wakes the CPU.
pub(super) fn inject(vcpu: &mut Vcpu, vector: u8) -> Result<(), errno::Error> {
    let mut stopped = vcpu.stop();
    if stopped.mp_state()? == KVM_MP_STATE_HALTED {
        stopped.set_mp_state(KVM_MP_STATE_RUNNABLE)?;
    }
    let pending = PendingEvents {
        interrupt: Some(Delivery { vector, error: None, soft: false }),
        ..pending_of(&stopped.events()?)
    };
    stopped.set_events(&events_of(&pending))
}

/// True if nothing but another CPU wakes this one, which is at rest: it halts with interrupts off, or was
/// never started.
pub(super) fn is_off(vcpu: &mut Vcpu) -> Result<bool, errno::Error> {
    const INTERRUPT_FLAG: u64 = 1 << 9;
    let stopped = vcpu.stop();
    Ok(match activity(stopped.mp_state()?) {
        Activity::Running => false,
        Activity::Halted => {
            stopped.regs()?.rflags & INTERRUPT_FLAG == 0 && stopped.events()?.nmi.pending == 0
        }
        Activity::Unstarted | Activity::Initialised => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_its_way_into_a_cpu_comes_back_as_it_was_saved() {
        let delivery = |vector, error, soft| Some(Delivery { vector, error, soft });
        for pending in [
            PendingEvents::default(),
            PendingEvents { exception: delivery(14, Some(6), false), ..PendingEvents::default() },
            PendingEvents {
                interrupt: delivery(0x30, None, true),
                nmi_pending: true,
                shadow: 2,
                ..PendingEvents::default()
            },
            PendingEvents { nmi_injected: true, nmi_masked: true, ..PendingEvents::default() },
        ] {
            assert_eq!(pending_of(&events_of(&pending)), pending);
        }
    }

    #[test]
    fn every_activity_is_a_state_of_kvms() {
        for one in [Activity::Running, Activity::Halted, Activity::Unstarted, Activity::Initialised]
        {
            assert_eq!(activity(mp_state(one)), one);
        }
    }
}
