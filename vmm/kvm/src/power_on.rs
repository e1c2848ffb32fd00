//! A CPU's state after power-on: what a reset leads back to, whatever the guest has left behind.

use super::vcpu::Vcpu;
use kvm_bindings::kvm_lapic_state;
use vmft_cpu::CpuState;
use vmft_cpu::kvm_state::KvmState;
use vmm_sys_util::errno;

/// A local APIC and its CPU, as KVM starts them.
#[derive(Clone)]
struct Apic {
    mp_state: u32,
    lapic: kvm_lapic_state,
}

/// A CPU's state after power-on.
#[derive(Clone)]
pub(crate) struct PowerOn {
    state: KvmState,
    apic: Option<Apic>,
}

impl PowerOn {
    /// Of a CPU without a local APIC that has never run.
    pub(crate) fn of(vcpu: &mut Vcpu) -> Result<Self, errno::Error> {
        Ok(Self { state: vcpu.stop().state()?, apic: None })
    }

    /// Of one with a local APIC.
    pub(crate) fn with_apic(vcpu: &mut Vcpu) -> Result<Self, errno::Error> {
        let stopped = vcpu.stop();
        let mp_state = stopped.mp_state()?;
        let state = stopped.state()?;
        Ok(Self { state, apic: Some(Apic { mp_state, lapic: stopped.lapic()? }) })
    }

    /// It has a local APIC.
    pub(crate) fn has_apic(&self) -> bool {
        self.apic.is_some()
    }

    /// The registers that have to do with defences, as far as the host has them.
    pub(crate) fn defences(&self) -> &[(u32, u64)] {
        &self.state.defences
    }

    /// Sets it; and with `cpu`, the registers that a loader has prepared.
    pub(crate) fn set(&self, vcpu: &mut Vcpu, cpu: Option<&CpuState>) -> Result<(), errno::Error> {
        let Self { state, apic } = self;
        let mut stopped = vcpu.stop();
        let Some(Apic { mp_state, lapic }) = apic else {
            return stopped.set_state(&cpu.map_or_else(|| state.clone(), |cpu| state.with(cpu)));
        };
        // Requests that are on their way to a CPU are taken by it when it is asked what it does.
        stopped.mp_state()?;
        stopped.set_state(state)?;
        if let Some(cpu) = cpu {
            stopped.set_state(&state.with(cpu).with_apic_base(state.apic_base()))?;
        }
        stopped.set_lapic(lapic)?;
        stopped.set_mp_state(*mp_state)
    }
}

impl std::fmt::Debug for PowerOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PowerOn").field("has_apic", &self.apic.is_some()).finish_non_exhaustive()
    }
}
