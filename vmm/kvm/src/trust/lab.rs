//! A minimal way of running a probe guest: one CPU, a few pages, long mode at either privilege
//! level, and no way for the guest to keep it.
//!
//! Not the engine: nothing here is saved, replayed or fast. Every entry of the guest stands
//! under a time limit that the watchdog enforces, and every way in which `KVM_RUN` can come
//! back is a [`Stop`].

use super::facts::Level;
use super::layout::{self, DATA, DATA_PAGES, MEMORY, PAGE};
use super::watchdog::{Limit, Watchdog};
use kvm_bindings::{
    CpuId, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_MEM_LOG_DIRTY_PAGES, Msrs, kvm_guest_debug, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::io;
use std::time::Duration;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Longer than any probe takes on the slowest KVM known, by a factor of ten and more.
pub const PATIENCE: Duration = Duration::from_millis(500);
/// The port a probe ends with: `OUT` works at both privilege levels.
pub const END_PORT: u16 = 0xF0;
/// `OUT END_PORT, AL`.
pub const END: [u8; 2] = [0xE6, 0xF0];
/// What a guest reads from any MSR that comes to us.
pub const MSR_ANSWER: u64 = 0x1122_3344_5566_7788;

/// CR4.TSD: `RDTSC` only at CPL 0.
pub const CR4_TSD: u64 = 1 << 2;
/// CR4.OSXSAVE: `XSAVE` and its kin.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// The trap flag.
pub const RFLAGS_TF: u64 = 1 << 8;
/// The resume flag: no breakpoint at the next instruction.
pub const RFLAGS_RF: u64 = 1 << 16;

/// No exit has this number.
const NO_REASON: u32 = u32::MAX;
const DATA_SLOT: u32 = 1;
/// Reserved bit, and IOPL 3 so that CPL 3 may use ports.
const RFLAGS: u64 = 0x3002;
/// Protected, paged, write-protect at CPL 0, native x87 errors.
const CR0: u64 = 0x8001_0033;
/// PAE and SSE.
const CR4: u64 = 0x620;
/// Long mode, no-execute, SYSCALL.
const EFER: u64 = 0xD01;
const MSR_STAR: u32 = 0xC000_0081;
const MSR_LSTAR: u32 = 0xC000_0082;
const MSR_FMASK: u32 = 0xC000_0084;

/// What `KVM_SET_GUEST_DEBUG` takes for a breakpoint on the instruction at `address`: DR0, enabled in DR7
/// for every task, for execution (SDM 3B, section 19.2.4).
pub fn breakpoint(address: u64) -> kvm_guest_debug {
    const ALWAYS_SET: u64 = 1 << 10;
    const GLOBAL_0: u64 = 1 << 1;
    let mut debug = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
        ..Default::default()
    };
    debug.arch.debugreg[0] = address;
    debug.arch.debugreg[7] = ALWAYS_SET | GLOBAL_0;
    debug
}

/// KVM refused something a probe guest needs.
#[derive(Debug, Error)]
#[error("{doing}: {source}")]
pub struct LabError {
    /// What was asked of it.
    pub doing: &'static str,
    /// Its answer. Part of the text, because reports have one line for it.
    source: io::Error,
}

impl LabError {
    /// What KVM has answered.
    pub fn kvm(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self { doing, source: io::Error::from_raw_os_error(error.errno()) }
    }

    fn memory(doing: &'static str) -> impl FnOnce(vm_memory::GuestMemoryError) -> Self {
        move |error| Self { doing, source: io::Error::other(error) }
    }
}

/// What the CPU pushed for an exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Zero where the exception has none.
    pub error_code: u64,
    /// Where it was raised.
    pub rip: u64,
    /// The code selector there.
    pub cs: u16,
    /// The flags there.
    pub rflags: u64,
}

/// Why the guest is not running.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Stop {
    /// `HLT`, outside the handlers.
    #[error("halted at {rip:#x}")]
    Halted {
        /// Behind the `HLT`.
        rip: u64,
    },
    /// An exception reached its handler.
    #[error("exception {vector} at {:#x}", frame.rip)]
    Exception {
        /// Which.
        vector: u8,
        /// What was pushed.
        frame: Frame,
    },
    /// `OUT`.
    #[error("output to port {0:#x}")]
    Out(u16),
    /// The debugger's trap.
    #[error("trap at {pc:#x}")]
    Trap {
        /// The instruction that would be next.
        pc: u64,
    },
    /// A read of an MSR came to us; [`MSR_ANSWER`] goes back.
    #[error("read of MSR {0:#x}")]
    MsrRead(u32),
    /// A write of an MSR came to us.
    #[error("write of MSR {0:#x}")]
    MsrWrite(u32),
    /// `KVM_EXIT_INTERNAL_ERROR`.
    #[error("internal error {suberror} of KVM")]
    InternalError {
        /// KVM's suberror.
        suberror: u32,
    },
    /// A triple fault.
    #[error("triple fault")]
    Shutdown,
    /// A signal, not the watchdog's.
    #[error("interrupted by a signal")]
    Interrupted,
    /// It did not come back in time.
    #[error("no end in time")]
    TimeUp,
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// What a probe guest begins with.
#[derive(Debug)]
pub struct Program<'a> {
    /// At which level.
    pub level: Level,
    /// What is at [`layout::CODE`].
    pub code: &'a [u8],
    /// Bits of CR4 beyond PAE and SSE.
    pub cr4: u64,
    /// General registers; RIP, RSP and RFLAGS are set by the lab.
    pub registers: kvm_regs,
}

impl<'a> Program<'a> {
    /// `code` at `level`, with registers of zero.
    pub fn new(level: Level, code: &'a [u8]) -> Self {
        Self { level, code, cr4: 0, registers: kvm_regs::default() }
    }
}

/// A virtual machine for probes.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: the memory outlives those who use it.
    vcpu: VcpuFd,
    vm: VmFd,
    memory: GuestMemoryMmap<()>,
    watchdog: Watchdog,
    /// What the CPU had when it was made.
    reset: kvm_sregs,
    /// An exit waits for its completion by the next entry.
    unfinished: bool,
    stepping: bool,
}

impl Lab {
    /// A machine whose guest sees `cpuid`.
    ///
    /// # Errors
    /// The first thing KVM refuses.
    pub fn open(kvm: &Kvm, cpuid: &CpuId) -> Result<Self, LabError> {
        let watchdog = Watchdog::start()
            .map_err(|source| LabError { doing: "starting the watchdog", source })?;
        let vm = kvm.create_vm().map_err(LabError::kvm("KVM_CREATE_VM"))?;
        // Only VMX without unrestricted guests needs it; others may refuse it.
        let _ = vm.set_tss_address(0xFFFB_D000);
        let ranges = [
            (GuestAddress(0), usize::try_from(DATA).expect("128 KiB")),
            (GuestAddress(DATA), usize::try_from(MEMORY - DATA).expect("128 KiB")),
        ];
        let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|error| LabError {
            doing: "mapping the guest's memory",
            source: io::Error::other(error),
        })?;
        for (slot, (at, size)) in (0..).zip(ranges) {
            let host = memory.get_host_address(at).map_err(LabError::memory("guest memory"))?;
            let region = kvm_userspace_memory_region {
                slot,
                flags: if slot == DATA_SLOT { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: at.0,
                memory_size: size as u64,
                userspace_addr: host as u64,
            };
            // SAFETY: the range is `size` bytes of the mapping in `memory`, which lives in the
            // same struct as the VM and is dropped after it.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(LabError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(LabError::kvm("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(LabError::kvm("KVM_SET_CPUID2"))?;
        let reset = vcpu.get_sregs().map_err(LabError::kvm("KVM_GET_SREGS"))?;
        Ok(Self { vcpu, vm, memory, watchdog, reset, unfinished: false, stepping: false })
    }

    /// The VM, for what only one probe needs.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Puts the machine into the state in which `program` begins, whatever ran before.
    ///
    /// # Errors
    /// The first thing KVM refuses.
    pub fn load(&mut self, program: &Program<'_>) -> Result<(), LabError> {
        self.finish();
        self.debug(0)?;
        for (at, bytes) in layout::tables() {
            self.write(at, &bytes)?;
        }
        self.write(layout::CODE, program.code)?;
        let events = kvm_vcpu_events::default();
        self.vcpu.set_vcpu_events(&events).map_err(LabError::kvm("KVM_SET_VCPU_EVENTS"))?;
        let sregs = self.special_registers(program);
        self.vcpu.set_sregs(&sregs).map_err(LabError::kvm("KVM_SET_SREGS"))?;
        if program.cr4 & CR4_OSXSAVE != 0 {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            // XCR0: x87 and SSE.
            xcrs.xcrs[0].value = 3;
            self.vcpu.set_xcrs(&xcrs).map_err(LabError::kvm("KVM_SET_XCRS"))?;
        }
        self.set_syscall_target()?;
        let rsp = match program.level {
            Level::Kernel => layout::KERNEL_STACK,
            Level::User => layout::USER_STACK,
        };
        self.set_registers(&kvm_regs {
            rip: layout::CODE,
            rsp,
            rflags: RFLAGS,
            ..program.registers
        })
    }

    fn special_registers(&self, program: &Program<'_>) -> kvm_sregs {
        let segment = |selector: u16, kind: u8| kvm_segment {
            base: 0,
            limit: 0xFFFF_FFFF,
            selector,
            type_: kind,
            present: 1,
            dpl: (selector & 3) as u8,
            db: u8::from(kind == 3),
            s: 1,
            l: u8::from(kind == 11),
            g: 1,
            ..Default::default()
        };
        let (code, stack) = match program.level {
            Level::Kernel => (layout::KERNEL_CS, layout::KERNEL_SS),
            Level::User => (layout::USER_CS, layout::USER_SS),
        };
        let mut sregs = self.reset;
        sregs.cs = segment(code, 11);
        for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *data = segment(stack, 3);
        }
        sregs.tr = kvm_segment {
            base: layout::TSS,
            limit: u32::from(layout::TSS_LIMIT),
            selector: layout::TSS_SELECTOR,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = layout::GDT_LIMIT;
        sregs.idt.base = layout::IDT;
        sregs.idt.limit = layout::IDT_LIMIT;
        sregs.cr0 = CR0;
        sregs.cr2 = 0;
        sregs.cr3 = layout::PML4;
        sregs.cr4 = CR4 | program.cr4;
        sregs.efer = EFER;
        // While this enables an APIC, KVM shows one in CPUID.
        sregs.apic_base = 0;
        sregs
    }

    fn set_syscall_target(&self) -> Result<(), LabError> {
        let star = u64::from(layout::SYSRET_BASE) << 48 | u64::from(layout::KERNEL_CS) << 32;
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        // FMASK as Linux has it: TF, IF, DF and more are cleared on entry.
        let entries =
            [msr(MSR_STAR, star), msr(MSR_LSTAR, layout::SYSCALL_ENTRY), msr(MSR_FMASK, 0x4_7700)];
        let msrs = Msrs::from_entries(&entries).expect("three entries are not too many");
        let set = self.vcpu.set_msrs(&msrs).map_err(LabError::kvm("KVM_SET_MSRS"))?;
        if set == entries.len() {
            return Ok(());
        }
        let source = io::Error::other(format!("only {set} of 3 were taken"));
        Err(LabError { doing: "KVM_SET_MSRS for SYSCALL", source })
    }

    /// Completes the last exit, so that the next entry begins with what is loaded.
    fn finish(&mut self) {
        if std::mem::take(&mut self.unfinished) {
            // A KVM that does not know of immediate exits runs the guest instead.
            let _limit = self.limit(PATIENCE);
            self.vcpu.set_kvm_immediate_exit(1);
            let _interrupted = self.vcpu.run();
            self.vcpu.set_kvm_immediate_exit(0);
        }
    }

    /// Sets `KVM_SET_GUEST_DEBUG`.
    fn debug(&mut self, control: u32) -> Result<(), LabError> {
        self.set_debug(&kvm_guest_debug { control, ..Default::default() })
    }

    fn set_debug(&mut self, debug: &kvm_guest_debug) -> Result<(), LabError> {
        self.stepping = debug.control != 0;
        self.vcpu.set_guest_debug(debug).map_err(LabError::kvm("KVM_SET_GUEST_DEBUG"))
    }

    /// A limit under which several [`Self::run_under`] may stand.
    pub fn limit(&self, time: Duration) -> Limit {
        self.watchdog.limit(time)
    }

    /// Runs the guest until something happens, for [`PATIENCE`] at most.
    pub fn run(&mut self) -> Stop {
        let limit = self.limit(PATIENCE);
        loop {
            match self.run_under(&limit) {
                Stop::Interrupted => {}
                stop => return stop,
            }
        }
    }

    /// Runs the guest until something happens, [`Stop::Interrupted`] included.
    pub fn run_under(&mut self, limit: &Limit) -> Stop {
        if limit.is_over() {
            return Stop::TimeUp;
        }
        match self.enter() {
            Stop::Interrupted if limit.is_over() => Stop::TimeUp,
            stop => stop,
        }
    }

    /// Executes one instruction, if stepping works.
    pub fn step_under(&mut self, limit: &Limit) -> Stop {
        match self.debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP) {
            Ok(()) => self.run_under(limit),
            Err(error) => Stop::Other(error.to_string()),
        }
    }

    /// Runs the guest with a breakpoint on the instruction at `address`.
    pub fn break_under(&mut self, address: u64, limit: &Limit) -> Stop {
        match self.set_debug(&breakpoint(address)) {
            Ok(()) => self.run_under(limit),
            Err(error) => Stop::Other(error.to_string()),
        }
    }

    /// Lets the guest run freely again.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn stop_stepping(&mut self) -> Result<(), LabError> {
        if self.stepping { self.debug(0) } else { Ok(()) }
    }

    fn enter(&mut self) -> Stop {
        // So that an exit without a reason is not taken for the one before.
        self.vcpu.get_kvm_run().exit_reason = NO_REASON;
        let stop = match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => return self.halted(),
            Ok(VcpuExit::InternalError) => return self.internal_error(),
            Ok(VcpuExit::IoOut(port, _)) => Stop::Out(port),
            Ok(VcpuExit::X86Rdmsr(exit)) => {
                *exit.data = MSR_ANSWER;
                *exit.error = 0;
                Stop::MsrRead(exit.index)
            }
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                *exit.error = 0;
                Stop::MsrWrite(exit.index)
            }
            Ok(VcpuExit::Debug(debug)) => return Stop::Trap { pc: debug.pc },
            Ok(VcpuExit::Shutdown) => return Stop::Shutdown,
            Ok(VcpuExit::Unsupported(NO_REASON)) => {
                return Stop::Other("KVM_RUN came back without a reason".to_owned());
            }
            Ok(VcpuExit::Intr) => return Stop::Interrupted,
            Ok(other) => Stop::Other(format!("exit {other:?}")),
            Err(error) if error.errno() == libc::EINTR => return Stop::Interrupted,
            Err(error) => {
                return Stop::Other(format!(
                    "KVM_RUN: {}",
                    io::Error::from_raw_os_error(error.errno())
                ));
            }
        };
        self.unfinished = true;
        stop
    }

    fn halted(&self) -> Stop {
        let registers = match self.registers() {
            Ok(registers) => registers,
            Err(error) => return Stop::Other(error.to_string()),
        };
        let Some(vector) = layout::handler_at(registers.rip) else {
            return Stop::Halted { rip: registers.rip };
        };
        match self.frame(vector, registers.rsp) {
            Ok(frame) => Stop::Exception { vector, frame },
            Err(error) => Stop::Other(format!("exception {vector} without a frame: {error}")),
        }
    }

    fn frame(&self, vector: u8, rsp: u64) -> Result<Frame, LabError> {
        let (error_code, at) = if layout::has_error_code(vector) {
            (self.read_word(rsp)?, rsp.wrapping_add(8))
        } else {
            (0, rsp)
        };
        Ok(Frame {
            error_code,
            rip: self.read_word(at)?,
            cs: self.read_word(at.wrapping_add(8))? as u16,
            rflags: self.read_word(at.wrapping_add(16))?,
        })
    }

    fn internal_error(&mut self) -> Stop {
        let run = self.vcpu.get_kvm_run();
        // SAFETY: the exit reason says that this member of the union was filled; all of them
        // are plain numbers.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        Stop::InternalError { suberror }
    }

    /// The general registers.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn registers(&self) -> Result<kvm_regs, LabError> {
        self.vcpu.get_regs().map_err(LabError::kvm("KVM_GET_REGS"))
    }

    /// Sets the general registers.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn set_registers(&self, registers: &kvm_regs) -> Result<(), LabError> {
        self.vcpu.set_regs(registers).map_err(LabError::kvm("KVM_SET_REGS"))
    }

    /// Segments and control registers.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn system_registers(&self) -> Result<kvm_sregs, LabError> {
        self.vcpu.get_sregs().map_err(LabError::kvm("KVM_GET_SREGS"))
    }

    /// Pages of the data slot written by the guest since this was last asked.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn dirty_pages(&self) -> Result<Vec<u32>, LabError> {
        let size = usize::try_from(MEMORY - DATA).expect("128 KiB");
        let log = self.vm.get_dirty_log(DATA_SLOT, size);
        let log = log.map_err(LabError::kvm("KVM_GET_DIRTY_LOG"))?;
        let is_set = |page: &u32| {
            log.get(*page as usize / 64).is_some_and(|word| word >> (page % 64) & 1 != 0)
        };
        Ok((0..DATA_PAGES).filter(is_set).collect())
    }

    /// Gives the pages of the data slot back to the host, so that the guest's next access to
    /// each is a fault of the second-level page tables.
    pub fn forget_data_pages(&self) {
        let Ok(host) = self.memory.get_host_address(GuestAddress(DATA)) else { return };
        let size = usize::try_from(u64::from(DATA_PAGES) * PAGE).expect("128 KiB");
        // SAFETY: the range is the whole second mapping of `memory`, private and anonymous,
        // of which nobody holds a reference; afterwards it reads as zeros. Failure changes nothing.
        unsafe { libc::madvise(host.cast(), size, libc::MADV_DONTNEED) };
    }

    /// Writes guest memory.
    ///
    /// # Errors
    /// The address is not memory.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), LabError> {
        let written = self.memory.write_slice(bytes, GuestAddress(at));
        written.map_err(LabError::memory("writing guest memory"))
    }

    /// Reads 8 bytes of guest memory.
    ///
    /// # Errors
    /// The address is not memory.
    pub fn read_word(&self, at: u64) -> Result<u64, LabError> {
        let mut word = [0; 8];
        let read = self.memory.read_slice(&mut word, GuestAddress(at));
        read.map_err(LabError::memory("reading guest memory"))?;
        Ok(u64::from_le_bytes(word))
    }
}
