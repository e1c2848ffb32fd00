//! The CPU's state as KVM keeps it, and as plain values.
//!
//! What KVM does not keep (that the CPU is halted, the registers the engine answers itself) is the
//! engine's, and is filled in there. An event on its way into the guest has no place in the plain
//! values, nor has whatever the host's CPU has beyond the model: see [`carried`](super::carried).

use crate::engine::msr;
use crate::engine::soft::vector::state::{Pointers, image, parse};
use crate::engine::state::{
    CpuState, DescriptorTable, ModelSpecificRegisters, Segment, Segments, SseState, X87State,
};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_STI, Msrs, kvm_debugregs, kvm_dtable,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

/// Bytes of the area `FXSAVE` writes, with which the XSAVE area begins.
const LEGACY_AREA: usize = 512;
/// Words of the XSAVE area's first page.
pub(super) const XSAVE_WORDS: usize = 1024;
/// Index of the word that says which components are not in their initial state.
pub(super) const XSTATE: usize = LEGACY_AREA / 4;
/// Index of the word that has MXCSR, and its bits that the CPU model has.
const MXCSR: usize = 6;
const MODEL_MXCSR: u32 = 0xFFFF;
/// x87 and SSE.
pub(super) const XSTATE_LEGACY: u32 = 3;
/// RFLAGS.RF: KVM's emulator leaves it set between the iterations of a string instruction.
const RESUME: u64 = 1 << 16;

/// The registers kept as MSRs, in the order in which they are read and written: those that the guest can change, because
/// KVM answers for them, beyond what is among the special registers.
pub(super) const MSRS: [u32; 9] = [
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
pub(super) struct KvmState {
    pub(super) events: kvm_vcpu_events,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) msrs: [u64; MSRS.len()],
    /// Those of [`host_cpu::DEFENCES`](super::host_cpu::DEFENCES) that the host has, and the guest may know: number and
    /// value.
    pub(super) defences: Vec<(u32, u64)>,
    pub(super) xsave: [u32; XSAVE_WORDS],
    /// Only where the host's CPU has them.
    pub(super) xcrs: Option<kvm_xcrs>,
    pub(super) debug: kvm_debugregs,
}

impl KvmState {
    /// Ordering requirements: the events come first, because KVM puts what an exception on its way says into CR2
    /// and DR6 when it is asked for them.
    pub(super) fn read(vcpu: &VcpuFd, defences: &[u32]) -> Result<Self, errno::Error> {
        let events = vcpu.get_vcpu_events()?;
        let numbers = MSRS.iter().chain(defences);
        let entries: Vec<_> =
            numbers.map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("fewer than KVM takes");
        if vcpu.get_msrs(&mut msrs)? != entries.len() {
            return Err(errno::Error::new(libc::EINVAL));
        }
        let (usual, defences) = msrs.as_slice().split_at(MSRS.len());
        let mut values = [0; MSRS.len()];
        for (value, entry) in values.iter_mut().zip(usual) {
            *value = entry.data;
        }
        Ok(Self {
            events,
            regs: vcpu.get_regs()?,
            sregs: vcpu.get_sregs()?,
            msrs: values,
            defences: defences.iter().map(|entry| (entry.index, entry.data)).collect(),
            xsave: vcpu.get_xsave()?.region,
            xcrs: vcpu.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs > 0),
            debug: vcpu.get_debug_regs()?,
        })
    }

    /// Ordering requirements: the special registers come first, because they decide the mode the
    /// others are checked in; the events last, because setting registers drops pending exceptions
    /// and the shadow.
    pub(super) fn write(&self, vcpu: &VcpuFd) -> Result<(), errno::Error> {
        vcpu.set_sregs(&self.sregs)?;
        vcpu.set_regs(&self.regs)?;
        let entries: Vec<_> = MSRS
            .into_iter()
            .zip(self.msrs)
            .chain(self.defences.iter().copied())
            .map(|(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() })
            .collect();
        let msrs = Msrs::from_entries(&entries).expect("fewer than KVM takes");
        if vcpu.set_msrs(&msrs)? != entries.len() {
            return Err(errno::Error::new(libc::EINVAL));
        }
        let xsave = kvm_xsave { region: self.xsave, ..kvm_xsave::default() };
        // SAFETY: the guest's area is larger than this page only with features that a process has
        // to ask the host for, which this one never does.
        unsafe { vcpu.set_xsave(&xsave) }?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs)?;
        }
        vcpu.set_debug_regs(&self.debug)?;
        vcpu.set_vcpu_events(&self.events)
    }

    /// The same with the plain values in the place of what they cover, and no event on its way.
    pub(super) fn with(&self, state: &CpuState) -> Self {
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
    pub(super) fn plain(&self) -> CpuState {
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
    pub(super) fn apic_base(&self) -> u64 {
        self.sregs.apic_base
    }

    /// The same with the local APIC there.
    pub(super) fn with_apic_base(mut self, apic_base: u64) -> Self {
        self.sregs.apic_base = apic_base;
        self
    }

    /// The task priority.
    pub(super) fn cr8(&self) -> u64 {
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
