//! The register file, and the small operations on it that every instruction needs.

use super::access::Ram;
use super::code_map::CodeMap;
use super::compat::CodeSize;
use super::decoded::DecodedInstructions;
use super::event::{BusRequest, Event, Restart, Trap};
use super::exception::Exception;
use super::flags::{self, Int, LazyFlags};
use super::limits::CacheLimits;
use super::system::debug::{Breakpoints, WAITING, WAITING_HITS, WAITING_KNOWN, WAITING_SHIELDED};
use super::tlb::{Tlb, View};
use super::trial::Trial;
use crate::cpu_model::TimeStamp;
use crate::memory::{GuestRam, PageNumber};
use crate::state::{
    CpuState, DescriptorTable, ModelSpecificRegisters, Segment, Segments, SseState, X87State,
};
use crate::{InvalidState, PortWidth};

/// Register slots that are no general registers: operands of address computations.
pub(super) mod slot {
    /// Always zero: no base, no index, no segment base.
    pub(in super::super) const ZERO: u8 = 16;
    /// Address of the first instruction of the block being executed.
    pub(in super::super) const RIP: u8 = 17;
    /// Base of FS.
    pub(in super::super) const FS: u8 = 18;
    /// Base of GS.
    pub(in super::super) const GS: u8 = 19;
}

/// Numbers of the general registers that instructions use implicitly.
pub(super) mod gpr {
    pub(in super::super) const RAX: u8 = 0;
    pub(in super::super) const RCX: u8 = 1;
    pub(in super::super) const RDX: u8 = 2;
    pub(in super::super) const RBX: u8 = 3;
    pub(in super::super) const RSP: u8 = 4;
    pub(in super::super) const RBP: u8 = 5;
    pub(in super::super) const RSI: u8 = 6;
    pub(in super::super) const RDI: u8 = 7;
    pub(in super::super) const R11: u8 = 11;
}

/// CR0.MP.
pub(super) const CR0_MP: u64 = 1 << 1;
/// CR0.EM.
pub(super) const CR0_EM: u64 = 1 << 2;
/// CR0.TS.
pub(super) const CR0_TS: u64 = 1 << 3;
/// CR0.WP.
pub(super) const CR0_WP: u64 = 1 << 16;
/// CR0.AM.
pub(super) const CR0_AM: u64 = 1 << 18;
/// CR0.PE and CR0.PG: always set here.
pub(super) const CR0_ALWAYS: u64 = (1 << 31) | 1;

/// CR4.TSD.
pub(super) const CR4_TSD: u64 = 1 << 2;
/// CR4.PAE: always set here.
pub(super) const CR4_PAE: u64 = 1 << 5;
/// CR4.PGE.
pub(super) const CR4_PGE: u64 = 1 << 7;
/// CR4.PCE.
pub(super) const CR4_PCE: u64 = 1 << 8;
/// CR4.OSFXSR.
pub(super) const CR4_OSFXSR: u64 = 1 << 9;
/// CR4.UMIP.
pub(super) const CR4_UMIP: u64 = 1 << 11;
/// CR4.FSGSBASE.
pub(super) const CR4_FSGSBASE: u64 = 1 << 16;
/// CR4.SMEP.
pub(super) const CR4_SMEP: u64 = 1 << 20;

/// EFER.SCE.
pub(super) const EFER_SCE: u64 = 1;
/// EFER.LME and EFER.LMA: always set here.
pub(super) const EFER_LONG: u64 = (1 << 8) | (1 << 10);
/// EFER.NXE.
pub(super) const EFER_NXE: u64 = 1 << 11;

/// Internal bits kept beside RFLAGS: what the run loop must look at between instructions.
/// No interrupt at this boundary.
pub(super) const SHADOW: u64 = 1 << 32;
/// The shadow was cast by a load of SS: no single-step trap either.
pub(super) const SS_SHADOW: u64 = 1 << 33;
/// Waiting in `HLT`.
pub(super) const HALTED: u64 = 1 << 34;
/// A triple fault happened.
pub(super) const SHUT_DOWN: u64 = 1 << 35;
/// The instruction being executed began with TF set and loaded RFLAGS: its single step is due
/// even if it cleared TF.
pub(super) const STEP_DUE: u64 = 1 << 36;
/// DR7 enables a breakpoint.
pub(super) const ARMED: u64 = 1 << 37;
/// The code segment is neither 64-bit nor flat: each instruction is looked at.
pub(super) const CHECKED_CODE: u64 = 1 << 38;
/// The instruction just executed is a string instruction with iterations left.
pub(super) const UNFINISHED: u64 = 1 << 39;
const INTERNAL: u64 =
    SHADOW | SS_SHADOW | HALTED | SHUT_DOWN | STEP_DUE | ARMED | CHECKED_CODE | UNFINISHED;

/// The CPU.
#[derive(Debug)]
pub(super) struct Cpu {
    /// General registers, then the slots of [`slot`].
    pub(super) regs: [u64; 32],
    /// Where execution goes on after the block.
    pub(super) next_rip: u64,
    /// The arithmetic flags.
    pub(super) flags: LazyFlags,
    /// The other bits of RFLAGS, and the internal bits.
    pub(super) system_flags: u64,
    /// Which data translations the fast path may use.
    pub(super) view: View,
    /// What CS makes of the code.
    pub(super) code_size: CodeSize,
    /// Current privilege level.
    pub(super) cpl: u8,
    /// Ops of the block behind the one that trapped.
    pub(super) ops_left: usize,
    /// Instructions retired before the block being executed.
    pub(super) retired: u64,
    /// Why the last handler trapped.
    pub(super) event: Event,
    pub(super) tlb: Tlb,
    pub(super) ram: Ram,
    pub(super) code: CodeMap,
    /// Instructions of the general path.
    pub(super) decoded: DecodedInstructions,
    /// While an instruction of the general path is executed: its offset from the block's beginning.
    pub(super) executing: Option<u16>,
    /// Pages whose decoded instructions were overwritten.
    pub(super) stale: Vec<PageNumber>,
    pub(super) restart: Restart,
    /// While the interpreter tries what compiled code is to do.
    pub(super) trial: Option<Box<Trial>>,
    /// Events delivered since an instruction last retired, and the count of retired
    /// instructions then.
    pub(super) deliveries: u32,
    pub(super) delivered_at: u64,
    pub(super) cr0: u64,
    pub(super) cr2: u64,
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) cr8: u64,
    pub(super) debug: [u64; 8],
    /// What `debug` enables.
    pub(super) breakpoints: Breakpoints,
    /// The watchpoints hit and not yet delivered, as in DR6.
    pub(super) hits: u64,
    /// The bases of FS and GS are in `regs`.
    pub(super) segments: Segments,
    pub(super) gdtr: DescriptorTable,
    pub(super) idtr: DescriptorTable,
    pub(super) msrs: ModelSpecificRegisters,
    pub(super) sse: SseState,
    pub(super) x87: X87State,
    /// What `CPUID` says of the time-stamp counter.
    pub(super) time_stamp_counter: TimeStamp,
}

impl Cpu {
    /// Sets RFLAGS as an instruction that loads them does.
    pub(super) fn load_rflags(&mut self, rflags: u64) {
        if self.system_flags & flags::TF != 0 {
            self.system_flags |= STEP_DUE;
        }
        self.set_rflags(rflags);
    }
}

/// True if bits 63 to 47 of `address` are equal.
#[inline(always)]
pub(super) fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

impl Cpu {
    /// A CPU in the default (invalid) state, to be set by [`Self::restore`].
    pub(super) fn new(ram: GuestRam, limits: CacheLimits) -> Self {
        let code = CodeMap::new(&ram);
        Self {
            regs: [0; 32],
            next_rip: 0,
            flags: LazyFlags::default(),
            system_flags: flags::FIXED,
            view: View::Supervisor,
            code_size: CodeSize::Long,
            cpl: 0,
            ops_left: 0,
            retired: 0,
            event: Event::None,
            tlb: Tlb::new(limits.flushed_by_name),
            ram: Ram::new(ram),
            code,
            decoded: DecodedInstructions::default(),
            executing: None,
            stale: Vec::new(),
            restart: Restart::default(),
            trial: None,
            deliveries: 0,
            delivered_at: 0,
            cr0: CR0_ALWAYS,
            cr2: 0,
            cr3: 0,
            cr4: CR4_PAE,
            cr8: 0,
            debug: [0; 8],
            breakpoints: Breakpoints::default(),
            hits: 0,
            segments: Segments::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            msrs: ModelSpecificRegisters::default(),
            sse: SseState::default(),
            x87: X87State::default(),
            time_stamp_counter: TimeStamp::Shown,
        }
    }

    /// Register or slot `index`, all 64 bits.
    #[inline(always)]
    pub(super) fn full(&self, index: u8) -> u64 {
        self.regs[usize::from(index & 31)]
    }

    /// The low part of register `index`, zero-extended.
    #[inline(always)]
    pub(super) fn reg<T: Int>(&self, index: u8) -> u64 {
        flags::cut::<T>(self.full(index))
    }

    /// Replaces all 64 bits of register `index`.
    #[inline(always)]
    pub(super) fn set_full(&mut self, index: u8, value: u64) {
        self.regs[usize::from(index & 31)] = value;
    }

    /// Writes the low part of register `index`; 32-bit writes clear the upper half, narrower
    /// ones leave the rest. `value` is zero-extended.
    #[inline(always)]
    pub(super) fn set_reg<T: Int>(&mut self, index: u8, value: u64) {
        let register = &mut self.regs[usize::from(index & 31)];
        *register = if T::BITS >= 32 { value } else { (*register & !((1 << T::BITS) - 1)) | value };
    }

    /// Address of the first instruction of the current block, or between blocks of the next
    /// instruction.
    #[inline(always)]
    pub(super) fn rip(&self) -> u64 {
        self.full(slot::RIP)
    }

    /// Sets [`Self::rip`].
    #[inline(always)]
    pub(super) fn set_rip(&mut self, rip: u64) {
        self.set_full(slot::RIP, rip);
    }

    /// RFLAGS.
    pub(super) fn rflags(&self) -> u64 {
        (self.system_flags & !INTERNAL) | self.flags.bits()
    }

    /// Replaces RFLAGS; bits this CPU does not have are dropped.
    pub(super) fn set_rflags(&mut self, value: u64) {
        self.flags.set(value);
        let kept = flags::ALL & !flags::ARITHMETIC;
        self.system_flags = (self.system_flags & INTERNAL) | (value & kept) | flags::FIXED;
        self.update_view();
    }

    /// Changes the privilege level.
    pub(super) fn set_cpl(&mut self, cpl: u8) {
        self.cpl = cpl;
        self.update_view();
    }

    /// Chooses what the fast path may use, after CPL, CR0.AM, EFLAGS.AC or the watchpoints
    /// changed. With alignment checks or watchpoints on, everything goes the slow way.
    pub(super) fn update_view(&mut self) {
        let slow = self.checks_alignment() || self.breakpoints.on_memory;
        self.view = if slow { View::None } else { View::of(self.cpl == 3) };
    }

    /// True if misaligned data accesses fault.
    pub(super) fn checks_alignment(&self) -> bool {
        self.cpl == 3 && self.cr0 & CR0_AM != 0 && self.system_flags & flags::AC != 0
    }

    /// Records an exception.
    #[cold]
    pub(super) fn raise(&mut self, exception: Exception) -> Trap {
        self.event = Event::Exception(exception);
        Trap
    }

    /// Records `#GP(error)`.
    #[cold]
    pub(super) fn general_protection(&mut self, error: u16) -> Trap {
        self.raise(Exception::GeneralProtection(error))
    }

    /// Records that the engine lacks something it should have.
    #[cold]
    pub(super) fn missing(&mut self, what: &'static str) -> Trap {
        self.event = Event::Missing(what);
        Trap
    }

    /// `#GP(0)` unless at privilege level 0.
    #[inline]
    pub(super) fn require_supervisor(&mut self) -> Result<(), Trap> {
        if self.cpl == 0 { Ok(()) } else { Err(self.general_protection(0)) }
    }

    /// Asks the bus; at the first attempt this traps, at the next the answer is there.
    pub(super) fn bus(&mut self, request: BusRequest) -> Result<u64, Trap> {
        if self.system_flags & ARMED != 0
            && let BusRequest::PortRead { port, width } | BusRequest::PortWrite { port, width, .. } =
                request
        {
            self.note_port(port, width.bytes());
        }
        if let Some(answer) = self.restart.take() {
            return Ok(answer);
        }
        if self.restart.detached {
            return Ok(u64::MAX);
        }
        self.event = Event::Bus(request);
        Err(Trap)
    }

    /// The time-stamp counter as the guest sees it.
    pub(super) fn time_stamp(&mut self) -> Result<u64, Trap> {
        let stamp = self.bus(BusRequest::TimeStamp)?;
        Ok(stamp.wrapping_add(self.msrs.tsc_adjust))
    }

    /// The CPU as plain values; between instructions.
    pub(super) fn save(&self) -> CpuState {
        let mut general = [0; 16];
        general.copy_from_slice(&self.regs[..16]);
        let mut segments = self.segments;
        segments.fs.base = self.full(slot::FS);
        segments.gs.base = self.full(slot::GS);
        let mut debug = self.debug;
        debug[WAITING] = self.hits;
        if self.system_flags & (ARMED | SS_SHADOW) == ARMED | SS_SHADOW {
            debug[WAITING] |= WAITING_SHIELDED;
        }
        CpuState {
            general,
            rip: self.own_rip(),
            rflags: self.rflags(),
            segments,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.cr8,
            debug,
            msrs: self.msrs,
            x87: self.x87,
            sse: self.sse,
            interrupt_shadow: self.system_flags & SHADOW != 0,
            halted: self.system_flags & HALTED != 0,
        }
    }

    /// Sets the CPU from plain values.
    pub(super) fn restore(&mut self, state: &CpuState) -> Result<(), InvalidState> {
        validate(state)?;
        self.regs = [0; 32];
        self.regs[..16].copy_from_slice(&state.general);
        self.set_rip(state.rip);
        self.set_full(slot::FS, state.segments.fs.base);
        self.set_full(slot::GS, state.segments.gs.base);
        self.segments = state.segments;
        self.cr0 = state.cr0;
        self.cr2 = state.cr2;
        self.cr3 = state.cr3;
        self.cr4 = state.cr4;
        self.cr8 = state.cr8;
        self.debug = state.debug;
        self.debug[WAITING] = 0;
        self.hits = state.debug[WAITING] & WAITING_HITS;
        self.gdtr = state.gdtr;
        self.idtr = state.idtr;
        self.msrs = state.msrs;
        self.x87 = state.x87;
        self.sse = state.sse;
        self.system_flags = 0;
        self.set_rflags(state.rflags);
        self.arm();
        if state.interrupt_shadow {
            self.system_flags |= SHADOW;
        }
        if state.debug[WAITING] & WAITING_SHIELDED != 0 {
            self.system_flags |= SHADOW | SS_SHADOW;
        }
        if state.halted {
            self.system_flags |= HALTED;
        }
        self.set_code_segment(state.segments.cs);
        self.set_cpl((state.segments.cs.selector & 3) as u8);
        self.event = Event::None;
        self.restart = Restart::default();
        self.deliveries = 0;
        self.stale.clear();
        Ok(())
    }

    /// The segment register with number `index` (ES, CS, SS, DS, FS, GS).
    pub(super) fn segment_mut(&mut self, index: u8) -> &mut Segment {
        let segments = &mut self.segments;
        match index {
            0 => &mut segments.es,
            1 => &mut segments.cs,
            2 => &mut segments.ss,
            3 => &mut segments.ds,
            4 => &mut segments.fs,
            _ => &mut segments.gs,
        }
    }
}

/// CS as a far transfer can have loaded it, and RIP as code in it can have it.
fn validate_code(state: &CpuState) -> Result<(), InvalidState> {
    use super::system::segments::attribute::{BIG, CODE, LONG, NOT_SYSTEM};
    let attributes = state.segments.cs.attributes;
    if attributes & (NOT_SYSTEM | CODE) != NOT_SYSTEM | CODE
        || attributes & (LONG | BIG) == LONG | BIG
    {
        return Err(InvalidState(format!("CS is no code segment ({attributes:#x})")));
    }
    if attributes & LONG == 0 && (state.rip >> 32 != 0 || state.segments.cs.base >> 32 != 0) {
        return Err(InvalidState(format!("RIP {:#x} is beyond 32-bit code", state.rip)));
    }
    Ok(())
}

pub(super) fn validate(state: &CpuState) -> Result<(), InvalidState> {
    let refuse = |what: String| Err(InvalidState(what));
    if state.cr0 & CR0_ALWAYS != CR0_ALWAYS || state.cr0 >> 32 != 0 {
        return refuse(format!("CR0 {:#x} is not that of long mode", state.cr0));
    }
    if state.cr4 & CR4_PAE == 0 || state.cr4 & !super::system::control::CR4_OFFERED != 0 {
        return refuse(format!("CR4 {:#x} is not possible", state.cr4));
    }
    if state.msrs.efer & EFER_LONG != EFER_LONG {
        return refuse(format!("EFER {:#x} is not that of long mode", state.msrs.efer));
    }
    validate_code(state)?;
    if state.rflags & !flags::ALL != 0 || state.rflags & flags::FIXED == 0 {
        return refuse(format!("RFLAGS {:#x} is not possible", state.rflags));
    }
    if state.cr8 > 15 {
        return refuse(format!("CR8 {:#x} is not possible", state.cr8));
    }
    if state.cr3 >> crate::cpu_model::PHYSICAL_BITS != 0 {
        return refuse(format!("CR3 {:#x} is beyond the physical address space", state.cr3));
    }
    for (name, address) in [
        ("the base of FS", state.segments.fs.base),
        ("the base of GS", state.segments.gs.base),
        ("KERNEL_GS_BASE", state.msrs.kernel_gs_base),
        ("LSTAR", state.msrs.lstar),
        ("the base of the GDT", state.gdtr.base),
        ("the base of the IDT", state.idtr.base),
    ] {
        if !is_canonical(address) {
            return refuse(format!("{name} is {address:#x}, which is not canonical"));
        }
    }
    if state.debug[6] >> 32 != 0 || state.debug[7] >> 32 != 0 {
        let [status, control] = [state.debug[6], state.debug[7]];
        return refuse(format!("DR6 {status:#x} and DR7 {control:#x} are not possible"));
    }
    if state.debug[WAITING] & !WAITING_KNOWN != 0 {
        return refuse(format!("debug events {:#x} are not possible", state.debug[WAITING]));
    }
    if state.sse.mxcsr >> 16 != 0 {
        return refuse(format!("MXCSR {:#x} is not possible", state.sse.mxcsr));
    }
    Ok(())
}

/// The width of a port access of `bytes` bytes.
pub(super) fn port_width(bytes: usize) -> PortWidth {
    match bytes {
        1 => PortWidth::Byte,
        2 => PortWidth::Word,
        _ => PortWidth::Long,
    }
}
