//! CPUs as KVM gives them, on their way from one KVM to another. Of a guest that runs freely,
//! nothing is looked at.

use super::host_cpu;
use super::power_on::PowerOn;
use super::vcpu::{Stopped, Vcpu};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state,
};
use vmft_cpu::InvalidState;
use vmft_cpu::group::{Activity, KvmCpu, Opaque};
use vmft_cpu::kvm_state::{KvmState, OwnRegisters};
use vmm_sys_util::errno;

/// The same with the registers that this host has, as after power-on where the state says nothing of them.
fn with_defences_of(mut state: KvmState, power_on: &PowerOn) -> Result<KvmState, InvalidState> {
    let found = std::mem::take(&mut state.defences);
    let here = power_on.defences();
    let has = |number| here.iter().any(|(there, _)| *there == number);
    if let Some((number, data)) = found.iter().find(|(number, data)| *data != 0 && !has(*number)) {
        return Err(InvalidState(format!(
            "its register {number:#x} is {data:#x}, and this host's KVM has none of that number"
        )));
    }
    let data_of = |(number, data): &(u32, u64)| {
        let its = found.iter().find(|(there, _)| there == number);
        (*number, its.map_or(*data, |(_, data)| *data))
    };
    state.defences = here.iter().map(data_of).collect();
    Ok(state)
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

/// What the CPU does, of one with a local APIC. What is on its way to it (`INIT`, start-up) is done now.
pub(crate) fn activity_of(stopped: &Stopped<'_>) -> Result<Activity, errno::Error> {
    stopped.mp_state().map(activity)
}

/// A stopped CPU, to be carried. `kept`: what it does, of one without a local APIC; otherwise KVM says it.
pub(crate) fn save(
    vcpu: &mut Vcpu,
    own: &OwnRegisters,
    kept: Option<Activity>,
) -> Result<KvmCpu, errno::Error> {
    let stopped = vcpu.stop();
    let (activity, apic) = match kept {
        Some(activity) => (activity, None),
        // In this order: asking what the CPU does changes registers, asking for the APIC may change that.
        None => {
            let activity = activity_of(&stopped)?;
            (activity, Some(Opaque::of(&stopped.lapic()?.regs)))
        }
    };
    let state = stopped.state()?;
    let cpuid = stopped.shown();
    Ok(KvmCpu { apic, ..state.to_carried(own, activity, cpuid, stopped.time_stamp()?) })
}

/// From where the counter of time goes on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TimeStamp {
    /// From here.
    At(u64),
    /// Exactly like that of a CPU of the same machine that was just set to this.
    Like(u64),
}

/// Makes `vcpu` the CPU that was carried: at an error, it may be neither. `power_on`: what it was then; if it had
/// a local APIC, so must the one that was carried. Gives back the registers that the engine keeps.
pub(crate) fn restore(
    vcpu: &mut Vcpu,
    cpu: &KvmCpu,
    power_on: &PowerOn,
    time_stamp: TimeStamp,
) -> Result<OwnRegisters, InvalidState> {
    let has_apic = power_on.has_apic();
    let state = with_defences_of(KvmState::of_carried(cpu)?, power_on)?;
    let apic = match &cpu.apic {
        Some(apic) => Some(kvm_lapic_state { regs: apic.read("its local APIC")? }),
        None => None,
    };
    if apic.is_some() != has_apic {
        let (its, ours) = if has_apic { ("no", "one") } else { ("a", "none") };
        return Err(InvalidState(format!("it has {its} local APIC, this machine {ours}")));
    }
    let mut stopped = vcpu.stop();
    host_cpu::check(&cpu.cpuid, stopped.offered())?;
    let mut set = || -> Result<(), errno::Error> {
        if has_apic {
            // Requests that are on their way to the CPU are taken by it when it is asked what it does.
            stopped.mp_state()?;
        }
        stopped.show(&cpu.cpuid)?;
        stopped.set_state(&state)?;
        match time_stamp {
            TimeStamp::At(data) => stopped.begin_time_stamp(data)?,
            TimeStamp::Like(data) => stopped.set_time_stamp(data)?,
        }
        if let Some(apic) = &apic {
            // Its timer starts here, which needs the APIC where it is.
            stopped.set_lapic(apic)?;
            stopped.set_events(&state.events)?;
            stopped.set_mp_state(mp_state(cpu.activity))?;
        }
        Ok(())
    };
    set().map_err(refused)?;
    Ok(OwnRegisters::of_carried(cpu))
}

/// KVM has refused a state.
pub(crate) fn refused(error: errno::Error) -> InvalidState {
    InvalidState(format!("this host's KVM refuses it: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_activity_is_a_state_of_kvms() {
        for one in [Activity::Running, Activity::Halted, Activity::Unstarted, Activity::Initialised]
        {
            assert_eq!(activity(mp_state(one)), one);
        }
    }
}

#[cfg(test)]
#[path = "carried_fuzz.rs"]
mod fuzz;
