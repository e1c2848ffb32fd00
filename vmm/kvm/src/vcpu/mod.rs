//! One CPU of KVM's, and what it stops for.
//!
//! KVM comes back in the middle of an instruction that uses a port, a device or a register, and
//! finishes it at the next entry. Three types keep that apart:
//!
//! ```text
//! Vcpu ── enter ──▶ Entered ── serve ───▶ the access is performed; the next entry finishes it
//!   │                       └─ settle ──▶ the instruction is finished, without going on
//!   └──── stop ───▶ Stopped   the state between two instructions: it can be read, written, injected into
//! ```
//!
//! Only a [`Stopped`] shows registers, and [`Vcpu::stop`] has KVM finish what is unfinished first
//! (`immediate_exit`). A loop of exits at which nobody looks pays nothing for that.
//!
//! **What may stay unfinished** is an instruction of which nothing can be left but registers: one that
//! writes or reads one item at a port, or a model-specific register. One that may use the bus again
//! (a device's memory, several items) is finished at once. KVM does not say whether a single item was
//! read for `IN` or for `INS`, which may write it to a device. So the instruction is looked at when its
//! address is met for the first time. A guest that puts such an `INS` where an `IN` was ends the run.

mod stopped;

use super::kick::Kicks;
use super::registers;
use super::walk::LinearView;
use super::watch::in_order;
use kvm_bindings::{
    KVM_EXIT_IO_IN, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVMIO,
    kvm_debug_exit_arch, kvm_interrupt, kvm_run,
};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use vmft_cpu::group::CpuidLeaf;
use vmft_cpu::kvm_state::OwnRegisters;
use vmft_cpu::memory::GuestRam;
use vmft_cpu::{Bus, PortWidth};
use vmft_log::point::ExecutionPoint;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

/// Why a CPU fails whose `IN` turns out to be something else.
const INPUT_TO_DEVICE: &str =
    "an instruction that reads a port into a device's memory, where another was before";
/// How many addresses are known to hold `IN`; a kernel's drivers have about as many.
const KNOWN_INPUTS: usize = 64;
/// DR7 bit 10.
const DR7_ALWAYS_SET: u64 = 1 << 10;
/// DR7.G0.
const DR7_GLOBAL_0: u64 = 1 << 1;
/// DR6.B0 to B3.
const DR6_BREAKPOINTS: u64 = 0xF;
/// #DB.
const DEBUG_EXCEPTION: u8 = 1;
/// No address of an instruction.
const NOWHERE: u64 = 1 << 63;

/// What the CPU stopped for. Instructions named here are complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The host wanted the thread.
    Interrupted,
    /// An instruction used a port or a device.
    Access,
    /// An instruction used a model-specific register that the engine answers.
    Register {
        /// The access faults; the exception is pending.
        faulted: bool,
    },
    /// `HLT`.
    Halted,
    /// An interrupt can be taken, as was asked for.
    Window,
    /// A single step is over, or the guest stands at a breakpoint, or it has raised a debug exception
    /// while there is one: see [`Stopped::take_trap`].
    Stepped,
    /// A triple fault.
    Shutdown,
    /// KVM cannot go on.
    Failed(&'static str),
}

/// What serving an exit reads and changes beyond the vCPU.
pub(super) struct ExitContext<'a> {
    pub(super) at: ExecutionPoint,
    pub(super) bus: &'a mut dyn Bus,
    pub(super) registers: &'a mut OwnRegisters,
    pub(super) ram: &'a GuestRam,
}

/// What is left of the instruction that was served last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    /// Nothing.
    Done,
    /// Registers, which KVM sets at the next entry.
    Registers,
    /// More than was thought: the CPU runs no more.
    Failed(&'static str),
}

/// A CPU outside of `KVM_RUN`, perhaps in the middle of an instruction.
#[derive(Debug)]
pub(super) struct Vcpu {
    fd: VcpuFd,
    pub(super) kicks: Kicks,
    rest: Rest,
    /// KVM leaves the general registers in the shared pages when it comes back.
    shares_registers: bool,
    /// Addresses at which an instruction is known to be `IN`, by their low bits.
    inputs: [u64; KNOWN_INPUTS],
    /// What the last [`Outcome::Stepped`] was for.
    trap: Option<kvm_debug_exit_arch>,
    /// What `CPUID` can say to the guest here, and what it says.
    offered: Vec<CpuidLeaf>,
    shown: Vec<CpuidLeaf>,
    /// Registers beyond those that every CPU has which belong to its state.
    defences: Vec<u32>,
}

/// A CPU between two instructions (or two iterations of a string instruction).
#[derive(Debug)]
pub(super) struct Stopped<'a>(&'a mut Vcpu);

/// A CPU with an exit that is not dealt with.
pub(super) struct Entered<'a> {
    vcpu: &'a mut Vcpu,
    first: Exited,
}

/// An exit, as far as it can be told without serving it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exited {
    Port,
    Memory,
    Register,
    Other(Outcome),
}

impl Vcpu {
    /// A fresh CPU. `shares_registers`: the host has `KVM_CAP_SYNC_REGS` for the general ones.
    pub(super) fn new(mut fd: VcpuFd, kicks: Kicks, shares_registers: bool) -> Self {
        if shares_registers {
            fd.set_sync_valid_reg(SyncReg::Register);
        }
        let inputs = [NOWHERE; KNOWN_INPUTS];
        Self {
            fd,
            kicks,
            rest: Rest::Done,
            shares_registers,
            inputs,
            trap: None,
            offered: Vec::new(),
            shown: Vec::new(),
            defences: Vec::new(),
        }
    }

    /// Finishes what is unfinished and lets the guest run until it stops for something.
    pub(super) fn enter(&mut self) -> Entered<'_> {
        let rest = std::mem::replace(&mut self.rest, Rest::Done);
        let first = match rest {
            Rest::Failed(what) => Exited::Other(Outcome::Failed(what)),
            Rest::Done | Rest::Registers => self.kvm_run(),
        };
        if let Exited::Other(Outcome::Failed(what)) = first {
            self.rest = Rest::Failed(what);
        }
        Entered { vcpu: self, first }
    }

    /// Lets the guest run until it stops for something. Nothing is kept of what may be unfinished: that is
    /// the caller's, who serves what comes with [`Self::serve_one`].
    pub(super) fn go(&mut self) -> Exited {
        self.kvm_run()
    }

    /// Serves the access of an exit, which the next entry finishes, or goes on with: then it stops for the
    /// next access. What the exit was.
    pub(super) fn serve_one(&mut self, exited: Exited, around: &mut ExitContext<'_>) -> Outcome {
        match exited {
            Exited::Port => {
                self.serve_port(around);
                Outcome::Access
            }
            Exited::Memory => {
                self.serve_memory(around);
                Outcome::Access
            }
            Exited::Register => {
                let faulted = self.serve_register(around);
                Outcome::Register { faulted }
            }
            Exited::Other(outcome) => outcome,
        }
    }

    /// True if an interrupt can be taken, as KVM said when it last came back: of use if nothing was
    /// unfinished then and nothing was done since.
    pub(super) fn was_ready(&mut self) -> bool {
        self.fd.get_kvm_run().ready_for_interrupt_injection != 0
    }

    /// Finishes what is unfinished, without entering the guest.
    pub(super) fn finish(&mut self) {
        if self.rest == Rest::Registers {
            self.kicks.set_immediate_exit();
            self.rest = match self.kvm_run() {
                Exited::Other(Outcome::Interrupted | Outcome::Stepped) => Rest::Done,
                Exited::Other(Outcome::Failed(what)) => Rest::Failed(what),
                _ => Rest::Failed(INPUT_TO_DEVICE),
            };
        }
    }

    /// Finishes what is unfinished, and gives access to the state.
    pub(super) fn stop(&mut self) -> Stopped<'_> {
        self.finish();
        Stopped(self)
    }

    /// Asks for [`Outcome::Window`] as soon as an interrupt can be taken.
    pub(super) fn request_window(&mut self, wanted: bool) {
        self.fd.get_kvm_run().request_interrupt_window = wanted.into();
    }

    /// RFLAGS.IF, as KVM said when it last came back; no instruction that may be unfinished
    /// changes it.
    pub(super) fn interrupt_flag(&mut self) -> bool {
        self.fd.get_kvm_run().if_flag != 0
    }

    /// True if an interrupt can be injected here.
    pub(super) fn can_take_interrupt(&mut self) -> bool {
        // Without the flag no shadow matters, and nothing need be finished.
        self.interrupt_flag() && self.stop().0.fd.get_kvm_run().ready_for_interrupt_injection != 0
    }

    fn kvm_run(&mut self) -> Exited {
        let outcome = match self.fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => return Exited::Port,
            Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => return Exited::Memory,
            Ok(VcpuExit::X86Rdmsr(_) | VcpuExit::X86Wrmsr(_)) => return Exited::Register,
            Ok(VcpuExit::Hlt) => Outcome::Halted,
            Ok(VcpuExit::IrqWindowOpen) => Outcome::Window,
            Ok(VcpuExit::Debug(trap)) => {
                self.trap = Some(trap);
                Outcome::Stepped
            }
            Ok(VcpuExit::Shutdown) => Outcome::Shutdown,
            // The guest lowered its task priority: of no interest to this board.
            Ok(VcpuExit::Intr | VcpuExit::SetTpr) => Outcome::Interrupted,
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                tracing::error!(reason = format_args!("{reason:#x}"), cpu, "guest entry failed");
                Outcome::Failed("the host's CPU refused to enter the guest in this state")
            }
            Ok(VcpuExit::InternalError) => Outcome::Failed(self.internal_error()),
            Ok(exit) => {
                tracing::error!(?exit, "unknown exit");
                Outcome::Failed("KVM stopped for a reason this engine does not know")
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                Outcome::Interrupted
            }
            Err(error) => {
                tracing::error!(%error, "KVM_RUN failed");
                Outcome::Failed("the host refused to run the guest")
            }
        };
        Exited::Other(outcome)
    }

    fn internal_error(&mut self) -> &'static str {
        // SAFETY: the exit reason says that this member of the union is the valid one.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let words = usize::try_from(internal.ndata).map_or(0, |n| n.min(internal.data.len()));
        tracing::error!(
            suberror = internal.suberror,
            data = format_args!("{:x?}", &internal.data[..words]),
            "KVM internal error"
        );
        match internal.suberror {
            KVM_INTERNAL_ERROR_EMULATION => {
                "KVM internal error 1: this host's KVM cannot emulate the instruction"
            }
            KVM_INTERNAL_ERROR_SIMUL_EX => "KVM internal error 2: simultaneous exceptions",
            KVM_INTERNAL_ERROR_DELIVERY_EV => {
                "KVM internal error 3: an event could not be delivered to the guest"
            }
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
                "KVM internal error 4: the host's CPU left the guest for an unknown reason"
            }
            _ => "KVM internal error of an unknown kind",
        }
    }

    /// Performs the port accesses KVM stopped for: several items for a string instruction.
    fn serve_port(&mut self, around: &mut ExitContext<'_>) {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that this member of the union is the valid one.
        let io = unsafe { (*run).__bindgen_anon_1.io };
        let size = usize::from(io.size);
        let bytes = size * io.count as usize;
        let offset = usize::try_from(io.data_offset).expect("an offset into the shared pages");
        // SAFETY: KVM puts the items there, inside the pages shared with it, which are mapped for
        // as long as the CPU is open; while the CPU is stopped nobody else accesses them, and `run`
        // is used no more.
        let data = unsafe { std::slice::from_raw_parts_mut(run.cast::<u8>().add(offset), bytes) };
        let width = match size {
            1 => PortWidth::Byte,
            2 => PortWidth::Word,
            _ => PortWidth::Long,
        };
        for item in data.chunks_exact_mut(size) {
            let mut word = [0; 4];
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                word = around.bus.port_read(around.at, io.port, width).to_le_bytes();
                item.copy_from_slice(&word[..size]);
            } else {
                word[..size].copy_from_slice(item);
                around.bus.port_write(around.at, io.port, width, u32::from_le_bytes(word));
            }
        }
    }

    /// What is left of a port access once it is served; `None` if that may be more accesses.
    fn rest_of_port(&mut self, ram: &GuestRam) -> Option<Rest> {
        // SAFETY: the exit reason says that this member of the union is the valid one.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        if io.count != 1 {
            return None;
        }
        let registers_only = u32::from(io.direction) != KVM_EXIT_IO_IN || self.is_at_input(ram);
        registers_only.then_some(Rest::Registers)
    }

    /// True if the instruction that reads a port is known to be `IN`.
    fn is_at_input(&mut self, ram: &GuestRam) -> bool {
        if !self.shares_registers {
            return false;
        }
        let rip = self.fd.sync_regs().regs.rip;
        let slot = rip as usize % KNOWN_INPUTS;
        if self.inputs[slot] == rip {
            return true;
        }
        let Ok(sregs) = self.fd.get_sregs() else { return false };
        let view = LinearView { ram, cr3: sregs.cr3 };
        let is_input = is_input(&view.instruction_bytes(sregs.cs.base.wrapping_add(rip)));
        if is_input {
            self.inputs[slot] = rip;
        }
        is_input
    }

    fn serve_memory(&mut self, around: &mut ExitContext<'_>) {
        // SAFETY: the exit reason says that this member of the union is the valid one.
        let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        let data = &mut mmio.data[..mmio.len as usize];
        if mmio.is_write != 0 {
            around.bus.memory_write(around.at, mmio.phys_addr, data);
        } else {
            around.bus.memory_read(around.at, mmio.phys_addr, data);
        }
    }

    /// True if the access faults.
    fn serve_register(&mut self, around: &mut ExitContext<'_>) -> bool {
        let run = self.fd.get_kvm_run();
        let is_write = run.exit_reason == kvm_bindings::KVM_EXIT_X86_WRMSR;
        // SAFETY: the exit reason says that this member of the union is the valid one.
        let access = unsafe { &mut run.__bindgen_anon_1.msr };
        let served = if is_write {
            registers::write(around.registers, access.index, access.data, around.at, around.bus)
        } else {
            let value = registers::read(around.registers, access.index, around.at, around.bus);
            value.map(|value| access.data = value)
        };
        access.error = served.is_err().into();
        served.is_err()
    }
}

impl Entered<'_> {
    /// The general registers with which the guest left.
    pub(super) fn registers(&self) -> [u64; 18] {
        if self.vcpu.shares_registers {
            return in_order(&self.vcpu.fd.sync_regs().regs);
        }
        let regs = self.vcpu.fd.get_regs();
        in_order(&regs.expect("KVM reads the registers of a CPU that is not in the guest"))
    }

    /// Deals with the exit. What is left of the instruction may stay unfinished.
    pub(super) fn serve(self, around: &mut ExitContext<'_>) -> Outcome {
        match self.first {
            Exited::Port => {
                let Self { vcpu, first } = self;
                let rest = vcpu.rest_of_port(around.ram);
                let Some(rest) = rest else { return Entered { vcpu, first }.settle(around) };
                vcpu.serve_port(around);
                vcpu.rest = rest;
                Outcome::Access
            }
            Exited::Register => {
                let faulted = self.vcpu.serve_register(around);
                self.vcpu.rest = Rest::Registers;
                if faulted {
                    // The exception is raised now.
                    self.vcpu.finish();
                }
                Outcome::Register { faulted }
            }
            Exited::Memory | Exited::Other(_) => self.settle(around),
        }
    }

    /// Deals with the exit, and has KVM finish the instruction.
    pub(super) fn settle(self, around: &mut ExitContext<'_>) -> Outcome {
        let Self { vcpu, mut first } = self;
        let mut done = None;
        loop {
            match first {
                Exited::Port => {
                    vcpu.serve_port(around);
                    done = Some(Outcome::Access);
                }
                Exited::Memory => {
                    vcpu.serve_memory(around);
                    done = Some(Outcome::Access);
                }
                Exited::Register => {
                    let faulted = vcpu.serve_register(around);
                    done = Some(Outcome::Register { faulted });
                }
                // The instruction is complete; a step over it ends here as well.
                Exited::Other(Outcome::Interrupted | Outcome::Stepped) if done.is_some() => {}
                Exited::Other(outcome) => return outcome,
            }
            match (first, done) {
                (Exited::Other(_), Some(done)) => return done,
                _ => {
                    vcpu.kicks.set_immediate_exit();
                    first = vcpu.kvm_run();
                }
            }
        }
    }
}

/// True for the bytes of `IN`, with prefixes that change nothing but its width.
fn is_input(bytes: &[u8]) -> bool {
    let opcode = bytes.iter().find(|byte| !matches!(byte, 0x66 | 0x40..=0x4F));
    matches!(opcode, Some(0xE4 | 0xE5 | 0xEC | 0xED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_is_told_from_a_string_instruction() {
        for bytes in [&[0xEC][..], &[0x66, 0xED, 0x90], &[0xE4, 0x71], &[0x48, 0xED]] {
            assert!(is_input(bytes), "{bytes:02x?}");
        }
        for bytes in [&[0x6C][..], &[0x66, 0x6D], &[0xF3, 0x6C], &[0x67, 0x6C], &[0xEE], &[]] {
            assert!(!is_input(bytes), "{bytes:02x?}");
        }
    }
}
