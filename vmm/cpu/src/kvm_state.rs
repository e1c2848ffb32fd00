//! A CPU as KVM keeps it: its structures, what is carried of them ([`KvmCpu`]), and the same as
//! plain values of the CPU model. All of it is data; the `kvm` engine asks for it and sets it.
//!
//! What KVM does not keep (that the CPU is halted, [`OwnRegisters`]) is the engine's. Of a guest
//! that runs freely, nothing is looked at here. Only an engine that is given such a CPU and is not
//! KVM's, or that must know where the guest is, asks for its values in the CPU model
//! ([`in_the_model`]), and is told what does not fit.

use crate::group::{Activity, CpuidLeaf, KvmCpu, Opaque, Pending};
use crate::msr;
use crate::soft::Origin;
use crate::soft::vector::state::{Pointers, image, parse};
use crate::state::{
    CpuState, DescriptorTable, ModelSpecificRegisters, Segment, Segments, SseState, X87State,
};
use crate::{InvalidState, Vector};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_STI, kvm_debugregs, kvm_dtable, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

/// Bytes of the area `FXSAVE` writes, with which the XSAVE area begins.
const LEGACY_AREA: usize = 512;
/// Words of the XSAVE area's first page.
pub const XSAVE_WORDS: usize = 1024;
/// Index of the word that says which components are not in their initial state.
pub const XSTATE: usize = LEGACY_AREA / 4;
/// Index of the word that has MXCSR, and its bits that the CPU model has.
const MXCSR: usize = 6;
const MODEL_MXCSR: u32 = 0xFFFF;
/// x87 and SSE.
pub const XSTATE_LEGACY: u32 = 3;
/// RFLAGS.RF: KVM's emulator leaves it set between the iterations of a string instruction.
const RESUME: u64 = 1 << 16;
/// The first word of the XSAVE area behind the legacy area and the header: AVX and later registers.
const EXTENDED: usize = XSTATE + 16;
/// #DB, the one exception on its way that comes behind its instruction.
const DEBUG_EXCEPTION: u8 = 1;

/// The registers kept as MSRs, in the order in which they are read and written: those that the guest can change, because
/// KVM answers for them, beyond what is among the special registers.
pub const MSRS: [u32; 9] = [
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::KERNEL_GS_BASE,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::PAT,
];

/// Everything KVM keeps of a stopped CPU.
#[derive(Clone)]
pub struct KvmState {
    /// `KVM_GET_VCPU_EVENTS`.
    pub events: kvm_vcpu_events,
    /// `KVM_GET_REGS`.
    pub regs: kvm_regs,
    /// `KVM_GET_SREGS`.
    pub sregs: kvm_sregs,
    /// `KVM_GET_MSRS` of [`MSRS`].
    pub msrs: [u64; MSRS.len()],
    /// Registers of defences that the host has, and the guest may know: number and value.
    pub defences: Vec<(u32, u64)>,
    /// `KVM_GET_XSAVE`.
    pub xsave: [u32; XSAVE_WORDS],
    /// `KVM_GET_XCRS`, only where the host's CPU has them.
    pub xcrs: Option<kvm_xcrs>,
    /// `KVM_GET_DEBUGREGS`.
    pub debug: kvm_debugregs,
}

impl KvmState {
    /// The same with the plain values in the place of what they cover, and no event on its way.
    pub fn with(&self, state: &CpuState) -> Self {
        let mut next = self.clone();
        next.regs = regs_of(state);
        set_sregs(&mut next.sregs, state);
        let m = &state.msrs;
        next.msrs = [
            m.star,
            m.lstar,
            m.cstar,
            m.sfmask,
            m.kernel_gs_base,
            m.sysenter_cs,
            m.sysenter_esp,
            m.sysenter_eip,
            m.pat,
        ];
        let units = image(&state.x87, &state.sse, Pointers::Wide);
        for (word, bytes) in next.xsave.iter_mut().zip(units.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
        next.xsave[XSTATE] |= XSTATE_LEGACY;
        next.debug = kvm_debugregs {
            db: [state.debug[0], state.debug[1], state.debug[2], state.debug[3]],
            dr6: state.debug[6],
            dr7: state.debug[7],
            ..kvm_debugregs::default()
        };
        next.events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
        if state.interrupt_shadow {
            next.events.interrupt.shadow = KVM_X86_SHADOW_INT_STI as u8;
        }
        next
    }

    /// As plain values; what the engine keeps itself is left at its default. Bits that the CPU model does not have are
    /// not checked, and what it has no place for is left out.
    pub fn plain(&self) -> CpuState {
        let r = &self.regs;
        let s = &self.sregs;
        let (x87, sse) = self.units();
        let [star, lstar, cstar, sfmask, kernel_gs_base, cs, esp, eip, pat] = self.msrs;
        let [db0, db1, db2, db3] = self.debug.db;
        CpuState {
            general: [
                r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
                r.r12, r.r13, r.r14, r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags & !RESUME,
            segments: Segments {
                es: plain_segment(&s.es),
                cs: plain_segment(&s.cs),
                ss: plain_segment(&s.ss),
                ds: plain_segment(&s.ds),
                fs: plain_segment(&s.fs),
                gs: plain_segment(&s.gs),
                ldtr: plain_segment(&s.ldt),
                tr: plain_segment(&s.tr),
            },
            gdtr: DescriptorTable { base: s.gdt.base, limit: s.gdt.limit },
            idtr: DescriptorTable { base: s.idt.base, limit: s.idt.limit },
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            debug: [db0, db1, db2, db3, 0, 0, self.debug.dr6, self.debug.dr7],
            msrs: ModelSpecificRegisters {
                efer: s.efer,
                star,
                lstar,
                cstar,
                sfmask,
                kernel_gs_base,
                sysenter_cs: cs,
                sysenter_esp: esp,
                sysenter_eip: eip,
                pat,
                tsc_aux: 0,
                tsc_adjust: 0,
            },
            x87,
            sse,
            interrupt_shadow: self.events.interrupt.shadow != 0,
            halted: false,
        }
    }

    /// Where the local APIC is, and whether it is on.
    pub fn apic_base(&self) -> u64 {
        self.sregs.apic_base
    }

    /// The same with the local APIC there.
    pub fn with_apic_base(mut self, apic_base: u64) -> Self {
        self.sregs.apic_base = apic_base;
        self
    }

    /// The task priority.
    pub fn cr8(&self) -> u64 {
        self.sregs.cr8
    }

    fn units(&self) -> (X87State, SseState) {
        let mut words = self.xsave;
        words[MXCSR] &= MODEL_MXCSR;
        let mut area = [0; LEGACY_AREA];
        for (bytes, word) in area.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let (x87, sse) = parse(&area, Pointers::Wide).expect("no bit is left that is reserved");
        (x87, SseState { mxcsr: self.xsave[MXCSR], ..sse })
    }
}

impl std::fmt::Debug for KvmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KvmState").field(&self.plain()).finish()
    }
}

fn regs_of(state: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] =
        state.general;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    }
}

fn set_sregs(sregs: &mut kvm_sregs, state: &CpuState) {
    let segments = &state.segments;
    sregs.es = kvm_segment_of(&segments.es);
    sregs.cs = kvm_segment_of(&segments.cs);
    sregs.ss = kvm_segment_of(&segments.ss);
    sregs.ds = kvm_segment_of(&segments.ds);
    sregs.fs = kvm_segment_of(&segments.fs);
    sregs.gs = kvm_segment_of(&segments.gs);
    sregs.ldt = kvm_segment_of(&segments.ldtr);
    sregs.tr = kvm_segment_of(&segments.tr);
    let table = |table: DescriptorTable| kvm_dtable {
        base: table.base,
        limit: table.limit,
        ..kvm_dtable::default()
    };
    sregs.gdt = table(state.gdtr);
    sregs.idt = table(state.idtr);
    sregs.cr0 = state.cr0;
    sregs.cr2 = state.cr2;
    sregs.cr3 = state.cr3;
    sregs.cr4 = state.cr4;
    sregs.cr8 = state.cr8;
    sregs.efer = state.msrs.efer;
    // There is no APIC, unless the caller says so. As long as this enables one, KVM shows it in CPUID.
    sregs.apic_base = 0;
    sregs.interrupt_bitmap = [0; 4];
}

fn kvm_segment_of(segment: &Segment) -> kvm_segment {
    let bits = |at: u32, count: u32| ((segment.attributes >> at) & ((1 << count) - 1)) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: bits(0, 4),
        s: bits(4, 1),
        dpl: bits(5, 2),
        present: bits(7, 1),
        avl: bits(8, 1),
        l: bits(9, 1),
        db: bits(10, 1),
        g: bits(11, 1),
        unusable: 1 - bits(7, 1),
        ..kvm_segment::default()
    }
}

fn plain_segment(segment: &kvm_segment) -> Segment {
    let present = segment.present & (1 - segment.unusable);
    let fields = [
        (segment.type_, 0),
        (segment.s, 4),
        (segment.dpl, 5),
        (present, 7),
        (segment.avl, 8),
        (segment.l, 9),
        (segment.db, 10),
        (segment.g, 11),
    ];
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        attributes: fields.iter().fold(0, |word, (value, at)| word | (u16::from(*value) << at)),
    }
}

/// The registers that KVM does not keep: the engine answers for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OwnRegisters {
    /// `IA32_TSC_ADJUST`.
    pub tsc_adjust: u64,
    /// `IA32_TSC_AUX`.
    pub tsc_aux: u64,
}

impl OwnRegisters {
    /// Those of the CPU model.
    pub fn of(state: &CpuState) -> Self {
        Self { tsc_adjust: state.msrs.tsc_adjust, tsc_aux: state.msrs.tsc_aux }
    }

    /// Those of a CPU that was carried.
    pub fn of_carried(cpu: &KvmCpu) -> Self {
        Self { tsc_adjust: cpu.tsc_adjust, tsc_aux: cpu.tsc_aux }
    }
}

impl KvmState {
    /// What the CPU has of KVM's, as it is to be carried.
    pub fn to_carried(
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

    /// What was carried.
    ///
    /// # Errors
    /// [`InvalidState`] if it is none of KVM's structures.
    pub fn of_carried(cpu: &KvmCpu) -> Result<Self, InvalidState> {
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

    /// True if registers are in use that only `XSAVE` saves.
    fn uses_extended_registers(&self) -> bool {
        let [low, high] = [self.xsave[XSTATE] & !XSTATE_LEGACY, self.xsave[XSTATE + 1]];
        (low | high) != 0 && self.xsave[EXTENDED..].iter().any(|word| *word != 0)
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
pub fn in_the_model(cpus: &[KvmCpu]) -> Result<(CpuState, Option<Pending>), InvalidState> {
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
pub fn view(state: &KvmState, own: &OwnRegisters) -> CpuState {
    let mut view = state.plain();
    view.msrs.tsc_adjust = own.tsc_adjust;
    view.msrs.tsc_aux = own.tsc_aux;
    view
}

#[cfg(test)]
mod tests {
    use super::*;

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
