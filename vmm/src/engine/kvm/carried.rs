//! CPUs as KVM gives them, on their way from one KVM to another; and the part of one that every engine knows.
//!
//! Of a guest that runs freely, nothing is looked at here. Only an engine that is given such a CPU and is not KVM's, or
//! that must know where the guest is, asks for its values in the CPU model ([`in_the_model`]), and is told what does not
//! fit.

use super::host_cpu;
use super::power_on::PowerOn;
use super::registers::OwnRegisters;
use super::state::{KvmState, MSRS, XSAVE_WORDS, XSTATE, XSTATE_LEGACY};
use super::vcpu::{Stopped, Vcpu};
use crate::engine::group::{Activity, CpuidLeaf, KvmCpu, Opaque, Pending};
use crate::engine::soft::Origin;
use crate::engine::{CpuState, InvalidState, Vector};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state, kvm_vcpu_events,
};
use vmm_sys_util::errno;

/// The first word of the XSAVE area behind the legacy area and the header: AVX and later registers.
const EXTENDED: usize = XSTATE + 16;
/// #DB, the one exception on its way that comes behind its instruction.
const DEBUG_EXCEPTION: u8 = 1;

impl KvmState {
    /// What the CPU has of KVM's, as it is to be carried.
    fn to_carried(
        &self,
        own: &OwnRegisters,
        activity: Activity,
        cpuid: &[CpuidLeaf],
        time_stamp: u64,
    ) -> KvmCpu {
        let mut events = self.events;
        if events.interrupt.soft != 0 {
            // Of an `INT` half done KVM does not tell how long the instruction is. RIP is still there, and the
            // instruction is executed again: so KVM itself does with `INT3`.
            events.interrupt.injected = 0;
            events.interrupt.soft = 0;
        }
        // Whether a unit is said to be in its initial state is the host's choice; its values are there in any case.
        let mut xsave = self.xsave;
        xsave[XSTATE] |= XSTATE_LEGACY;
        KvmCpu {
            activity,
            cpuid: cpuid.to_vec(),
            events: Opaque::of(&events),
            regs: Opaque::of(&self.regs),
            sregs: Opaque::of(&self.sregs),
            msrs: MSRS.into_iter().zip(self.msrs).chain(self.defences.iter().copied()).collect(),
            xsave: Opaque::of(&xsave),
            xcrs: self.xcrs.as_ref().map(Opaque::of),
            debug: Opaque::of(&self.debug),
            apic: None,
            time_stamp,
            tsc_adjust: own.tsc_adjust,
            tsc_aux: own.tsc_aux,
        }
    }

    fn of_carried(cpu: &KvmCpu) -> Result<Self, InvalidState> {
        let refused = || InvalidState(format!("its model-specific registers are {:x?}", cpu.msrs));
        let (usual, defences) = cpu.msrs.split_at_checked(MSRS.len()).ok_or_else(refused)?;
        let mut msrs = [0; MSRS.len()];
        for ((value, number), (found, data)) in msrs.iter_mut().zip(MSRS).zip(usual) {
            if *found != number {
                return Err(refused());
            }
            *value = *data;
        }
        Ok(Self {
            events: cpu.events.read("what is on its way into it")?,
            regs: cpu.regs.read("its general registers")?,
            sregs: cpu.sregs.read("its special registers")?,
            msrs,
            defences: defences.to_vec(),
            xsave: cpu.xsave.read::<[u32; XSAVE_WORDS]>("its XSAVE area")?,
            xcrs: cpu.xcrs.as_ref().map(|xcrs| xcrs.read("its XCRs")).transpose()?,
            debug: cpu.debug.read("its debug registers")?,
        })
    }

    /// The same with the registers that this host has, as after power-on where the state says nothing of them.
    fn with_defences_of(mut self, power_on: &PowerOn) -> Result<Self, InvalidState> {
        let found = std::mem::take(&mut self.defences);
        let here = power_on.defences();
        let has = |number| here.iter().any(|(there, _)| *there == number);
        if let Some((number, data)) =
            found.iter().find(|(number, data)| *data != 0 && !has(*number))
        {
            return Err(InvalidState(format!(
                "its register {number:#x} is {data:#x}, and this host's KVM has none of that number"
            )));
        }
        let data_of = |(number, data): &(u32, u64)| {
            let its = found.iter().find(|(there, _)| there == number);
            (*number, its.map_or(*data, |(_, data)| *data))
        };
        self.defences = here.iter().map(data_of).collect();
        Ok(self)
    }

    /// True if registers are in use that only `XSAVE` saves.
    fn uses_extended_registers(&self) -> bool {
        let [low, high] = [self.xsave[XSTATE] & !XSTATE_LEGACY, self.xsave[XSTATE + 1]];
        (low | high) != 0 && self.xsave[EXTENDED..].iter().any(|word| *word != 0)
    }
}

impl OwnRegisters {
    fn of_carried(cpu: &KvmCpu) -> Self {
        Self { tsc_adjust: cpu.tsc_adjust, tsc_aux: cpu.tsc_aux }
    }
}

impl KvmCpu {
    /// The same CPU with other registers, and nothing on its way into it.
    ///
    /// # Errors
    /// [`InvalidState`] if it is none of KVM's.
    pub fn with_registers(&self, registers: &CpuState) -> Result<Self, InvalidState> {
        let state = KvmState::of_carried(self)?;
        let apic_base = state.apic_base();
        let state = state.with(registers).with_apic_base(apic_base);
        let own = OwnRegisters::of(registers);
        let apic = self.apic.clone();
        Ok(Self { apic, ..state.to_carried(&own, self.activity, &self.cpuid, self.time_stamp) })
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

/// What the CPU does, of one with a local APIC. What is on its way to it (`INIT`, start-up) is done now.
pub(super) fn activity_of(stopped: &Stopped<'_>) -> Result<Activity, errno::Error> {
    stopped.mp_state().map(activity)
}

/// A stopped CPU, to be carried. `kept`: what it does, of one without a local APIC; otherwise KVM says it.
pub(super) fn save(
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
pub(super) enum TimeStamp {
    /// From here.
    At(u64),
    /// Exactly like that of a CPU of the same machine that was just set to this.
    Like(u64),
}

/// Makes `vcpu` the CPU that was carried: at an error, it may be neither. `power_on`: what it was then; if it had
/// a local APIC, so must the one that was carried. Gives back the registers that the engine keeps.
pub(super) fn restore(
    vcpu: &mut Vcpu,
    cpu: &KvmCpu,
    power_on: &PowerOn,
    time_stamp: TimeStamp,
) -> Result<OwnRegisters, InvalidState> {
    let has_apic = power_on.has_apic();
    let state = KvmState::of_carried(cpu)?.with_defences_of(power_on)?;
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
pub(super) fn refused(error: errno::Error) -> InvalidState {
    InvalidState(format!("this host's KVM refuses it: {error}"))
}

/// What is on its way into a CPU, for an engine that delivers it itself.
fn pending(events: &kvm_vcpu_events) -> Result<Option<Pending>, InvalidState> {
    let kvm_vcpu_events { exception, interrupt, nmi, smi, .. } = events;
    if (nmi.injected | nmi.pending | nmi.masked | smi.smm | smi.pending) != 0 {
        return Err(does_not_fit("an interrupt that cannot be masked is on its way into it"));
    }
    let error = (exception.has_error_code != 0).then_some(exception.error_code as u16);
    Ok(if exception.injected != 0 || exception.pending != 0 {
        let from = if exception.nr == DEBUG_EXCEPTION { Origin::Trap } else { Origin::Instruction };
        Some(Pending { vector: Vector(exception.nr), error, from })
    } else if interrupt.injected != 0 {
        Some(Pending { vector: Vector(interrupt.nr), error: None, from: Origin::Line })
    } else {
        None
    })
}

fn does_not_fit(what: &str) -> InvalidState {
    InvalidState(format!("{what}, which the CPU model that all engines share does not have"))
}

/// The one CPU of these in the terms of the CPU model, and what is on its way into it. Whether its values are possible
/// there is still to be checked.
///
/// # Errors
/// [`InvalidState`], with what has no place in the model.
pub(in crate::engine) fn in_the_model(
    cpus: &[KvmCpu],
) -> Result<(CpuState, Option<Pending>), InvalidState> {
    let [cpu] = cpus else {
        return Err(does_not_fit(&format!("it has {} CPUs", cpus.len())));
    };
    let state = KvmState::of_carried(cpu)?;
    if state.uses_extended_registers() {
        return Err(does_not_fit("vector registers beyond those of SSE are in use"));
    }
    if cpu.apic.is_some() {
        return Err(does_not_fit("it has a local APIC"));
    }
    let mut model = view(&state, &OwnRegisters::of_carried(cpu));
    model.halted = cpu.activity == Activity::Halted;
    Ok((model, pending(&state.events)?))
}

/// The CPU's registers as far as the CPU model has them, for whoever only looks.
pub(super) fn view(state: &KvmState, own: &OwnRegisters) -> CpuState {
    let mut view = state.plain();
    view.msrs.tsc_adjust = own.tsc_adjust;
    view.msrs.tsc_aux = own.tsc_aux;
    view
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

    /// A CPU in the middle of whatever `change` makes of it.
    fn carried(change: impl FnOnce(&mut KvmState)) -> KvmCpu {
        let mut state = KvmState {
            events: kvm_vcpu_events::default(),
            regs: Default::default(),
            sregs: Default::default(),
            msrs: [0; MSRS.len()],
            defences: Vec::new(),
            xsave: [0; XSAVE_WORDS],
            xcrs: None,
            debug: Default::default(),
        };
        change(&mut state);
        state.to_carried(&OwnRegisters::default(), Activity::Running, &[], 0)
    }

    #[test]
    fn what_is_on_its_way_is_delivered_where_the_cpu_goes_on() {
        let interrupted = carried(|state| {
            state.events.interrupt.injected = 1;
            state.events.interrupt.nr = 0x31;
        });
        let pending = in_the_model(&[interrupted]).expect("it fits").1.expect("an interrupt");
        assert_eq!(pending, Pending { vector: Vector(0x31), error: None, from: Origin::Line });
        let faulting = carried(|state| {
            state.events.exception.injected = 1;
            state.events.exception.nr = 14;
            state.events.exception.has_error_code = 1;
            state.events.exception.error_code = 6;
        });
        let pending = in_the_model(&[faulting]).expect("it fits").1.expect("a fault");
        let wanted = Pending { vector: Vector(14), error: Some(6), from: Origin::Instruction };
        assert_eq!(pending, wanted);
    }

    #[test]
    fn an_int_instruction_half_done_is_executed_again() {
        let cpu = carried(|state| {
            state.events.interrupt.injected = 1;
            state.events.interrupt.nr = 0x80;
            state.events.interrupt.soft = 1;
            state.events.interrupt.shadow = 2;
        });
        let state = KvmState::of_carried(&cpu).expect("a CPU of KVM's");
        assert_eq!((state.events.interrupt.injected, state.events.interrupt.shadow), (0, 2));
        assert_eq!(in_the_model(&[cpu]).expect("it fits").1, None);
    }

    #[test]
    fn a_unit_in_its_initial_state_is_the_same_however_kvm_says_it() {
        let said_to_be_in_use = carried(|state| state.xsave[XSTATE] = XSTATE_LEGACY);
        assert_eq!(carried(|state| state.xsave[XSTATE] = 0), said_to_be_in_use);
    }

    #[test]
    fn what_has_no_place_in_the_model_is_named() {
        let refused = |cpus: &[KvmCpu], says: &str| {
            let error = in_the_model(cpus).expect_err("it does not fit").to_string();
            assert!(error.contains(says) && error.contains("CPU model"), "{error}");
        };
        refused(&[], "0 CPUs");
        refused(&[carried(|_| {}), carried(|_| {})], "2 CPUs");
        refused(&[carried(|state| state.events.nmi.masked = 1)], "cannot be masked");
        let extended = carried(|state| {
            state.xsave[XSTATE] = 7;
            state.xsave[EXTENDED + 3] = 1;
        });
        refused(&[extended], "beyond those of SSE");
        let unused = carried(|state| state.xsave[XSTATE] = 7);
        in_the_model(&[unused]).expect("registers in their initial state are not in use");
        let apic = KvmCpu { apic: Some(Opaque::of(&[0u8; 1024])), ..carried(|_| {}) };
        refused(&[apic], "local APIC");
    }

    #[test]
    fn a_carried_cpu_with_other_registers_of_the_engines_is_refused() {
        let mut cpu = carried(|_| {});
        cpu.msrs.pop();
        assert!(in_the_model(&[cpu]).is_err());
    }
}

#[cfg(test)]
#[path = "carried_fuzz.rs"]
mod fuzz;
