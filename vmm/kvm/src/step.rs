//! The run loop for points that are instructions.
//!
//! KVM steps with the trap flag, which suits a plain instruction only: others show the flag to the
//! guest (`PUSHF`, the frames of events), lose it (`SYSCALL`, `POPF`, faults), run two
//! instructions at once (after a load of SS), or exit without it (`HLT`, devices). So every
//! instruction is looked at first, and takes one of three ways:
//!
//! * a plain one whose operands are memory it may access is stepped; where it must lead is known
//!   beforehand, and ending up elsewhere ends the run;
//! * one that uses a port or a device runs without the flag, for it exits by itself;
//! * every other one is executed by `soft`, on the same memory and the same CPU state.

use super::open::is_owned_by_kvm;
use super::vcpu::{ExitContext, Outcome};
use super::walk::LinearView;
use super::watch::in_order;
use super::{Halted, KvmEngine, PointKind};
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register,
};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vmft_cpu::cpu_model::{self, TimeStamp};
use vmft_cpu::{Bus, Engine, Exit, WatchedBus};
use vmft_log::point::{Branches, ExecutionPoint};

/// Why the guest cannot be stepped.
const NOT_64_BIT: &str = "the guest is stepped in code that is not 64-bit code";
pub(crate) const TRAP_FLAG: u64 = 1 << 8;
/// CR0.EM and CR0.TS: the vector units fault.
const UNITS_FAULT: u64 = (1 << 2) | (1 << 3);
/// CR0.WP.
const WRITE_PROTECT: u64 = 1 << 16;
/// CR4.SMEP.
const SMEP: u64 = 1 << 20;
/// The exception masks of MXCSR.
const MASKS: u32 = 0x1F80;
/// The exception summary of the x87 status word.
const SUMMARY: u16 = 1 << 7;
/// The exception masks of the x87 control word.
const X87_MASKS: u16 = 0x3F;

/// How an instruction is executed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Method {
    /// Stepped; it leads to one of these addresses.
    Step([u64; 2]),
    /// Without stepping: it exits by itself, and leads to this address.
    Exit(u64),
    /// By `soft`.
    Soft,
}

/// What became of a step.
#[derive(Debug)]
pub(crate) enum Stepped {
    /// The instruction is done.
    Retired {
        /// It was a conditional branch, taken or not.
        branched: bool,
        /// The host's CPU did not execute it.
        softly: bool,
        /// Where it is.
        address: u64,
    },
    /// Not yet, or it faulted instead.
    Unfinished,
    /// It exited, and is done (but for a faulting access to a register).
    Exited {
        /// Why.
        outcome: Outcome,
        /// With which registers: see [`ExitRecord`](vmft_cpu::ExitRecord).
        registers: [u64; 18],
    },
    /// The run ends.
    Ended(Exit),
}

/// How the next instruction is executed.
struct Plan {
    method: Method,
    /// It uses the vector units.
    units: bool,
    /// It is a conditional branch.
    branches: bool,
}

/// True between two iterations of a string instruction.
fn again(before: &kvm_regs, after: &kvm_regs) -> bool {
    after.rip == before.rip && after.rcx != before.rcx
}

impl KvmEngine {
    pub(crate) fn run_steps(
        &mut self,
        bound: ExecutionPoint,
        want: bool,
        bus: &mut dyn Bus,
    ) -> Exit {
        let _running = self.vcpu.kicks.enter();
        loop {
            if let Some(exit) = self.at_boundary(bound, want) {
                return exit;
            }
            if self.vcpu.kicks.take() {
                return Exit::Kicked;
            }
            if let Some(exit) = self.step(bus) {
                return exit;
            }
        }
    }

    /// One instruction, or one iteration of a string instruction, where instructions are points.
    fn step(&mut self, bus: &mut dyn Bus) -> Option<Exit> {
        let mut bus = WatchedBus::new(bus);
        let stepped = self.step_one(self.point, &mut bus);
        match stepped {
            Stepped::Unfinished => return None,
            Stepped::Ended(exit) => return Some(exit),
            Stepped::Retired { .. } | Stepped::Exited { .. } => self.point = self.point.after(1),
        }
        let Stepped::Exited { outcome, registers } = stepped else { return None };
        let registers = self.exits.is_wanted().then_some(registers);
        self.note_exit(outcome, bus.access(), registers, Branches(0));
        if outcome == Outcome::Halted {
            let interruptible = self.vcpu.interrupt_flag();
            self.halted = Halted::Waiting { interruptible };
        }
        (outcome == Outcome::Access).then_some(Exit::BusAccess)
    }

    /// Executes one instruction, or one iteration of a string instruction. `at` is the moment of
    /// what it does at the bus.
    pub(crate) fn step_one(&mut self, at: ExecutionPoint, bus: &mut dyn Bus) -> Stepped {
        let stopped = self.vcpu.stop();
        let (Ok(regs), Ok(sregs)) = (stopped.regs(), stopped.sregs()) else {
            return Stepped::Ended(self.fatal("KVM does not tell the registers of a stopped CPU"));
        };
        if sregs.cs.l == 0 {
            // Every instruction is looked at as one of 64-bit code.
            return Stepped::Ended(self.outside_the_model(NOT_64_BIT));
        }
        let all_exits = self.points == PointKind::Pmu;
        let view = self.view(sregs.cr3);
        let Plan { method, units, branches } =
            Stepper { regs: &regs, sregs: &sregs, view }.plan(all_exits);
        if method == Method::Soft || (units && self.units_may_fault(&sregs)) {
            return self.step_softly(at, &regs, branches, bus);
        }
        if self.vcpu.stop().set_stepping(matches!(method, Method::Step(_))).is_err() {
            return Stepped::Ended(self.fatal("this host's KVM does not single-step"));
        }
        let mut around =
            ExitContext { at, bus: &mut *bus, registers: &mut self.registers, ram: self.vm.ram() };
        let entered = self.vcpu.enter();
        let registers = entered.registers();
        let outcome = entered.settle(&mut around);
        let Ok(after) = self.vcpu.stop().regs() else {
            return Stepped::Ended(self.fatal("KVM does not tell the registers of a stopped CPU"));
        };
        let led_to = match method {
            Method::Step(targets) => targets,
            Method::Exit(next) => [next; 2],
            Method::Soft => unreachable!("handled above"),
        };
        match (outcome, &method) {
            (Outcome::Interrupted, _) if after.rip == regs.rip => Stepped::Unfinished,
            (Outcome::Stepped, Method::Step(_)) if led_to.contains(&after.rip) => {
                self.shadow = false;
                Stepped::Retired { branched: branches, softly: false, address: regs.rip }
            }
            (
                Outcome::Access | Outcome::Halted | Outcome::Register { faulted: false },
                Method::Exit(next),
            ) if *next == after.rip => {
                self.shadow = false;
                Stepped::Exited { outcome, registers }
            }
            (Outcome::Register { faulted: true }, Method::Exit(_)) => {
                Stepped::Exited { outcome, registers }
            }
            // Between two iterations.
            (Outcome::Stepped, Method::Step(_)) if again(&regs, &after) => Stepped::Unfinished,
            (Outcome::Access, Method::Exit(_)) if again(&regs, &after) && all_exits => {
                Stepped::Exited { outcome, registers }
            }
            (Outcome::Access, Method::Exit(_)) if again(&regs, &after) => Stepped::Unfinished,
            (Outcome::Failed(what), _) => Stepped::Ended(self.fatal(what)),
            _ => {
                tracing::error!(?outcome, ?method, from = regs.rip, to = after.rip, "step lost");
                Stepped::Ended(self.fatal("the host lost a single step: the guest ran on"))
            }
        }
    }

    /// `soft` executes the instruction; events before and after it are delivered.
    fn step_softly(
        &mut self,
        at: ExecutionPoint,
        regs: &kvm_regs,
        branched: bool,
        bus: &mut dyn Bus,
    ) -> Stepped {
        // While KVM steps, it hides the trap flag, also the guest's own.
        if self.vcpu.stop().set_stepping(false).is_err() {
            return Stepped::Ended(self.fatal("this host's KVM does not single-step"));
        }
        let borrowed = self.borrow_helper_at(at, |helper| {
            let exit = helper.run(at.after(1), false, bus);
            (exit, helper.point() > at)
        });
        let (exit, retired) = match borrowed {
            Ok(borrowed) => borrowed,
            Err(ended) => return Stepped::Ended(ended),
        };
        match exit {
            Exit::Fatal(_) | Exit::Caught(_) => Stepped::Ended(exit),
            Exit::BusAccess => {
                Stepped::Exited { outcome: Outcome::Access, registers: in_order(regs) }
            }
            Exit::Halted { .. } => {
                let after = self.vcpu.stop().regs().unwrap_or(*regs);
                Stepped::Exited { outcome: Outcome::Halted, registers: in_order(&after) }
            }
            _ if retired => Stepped::Retired { branched, softly: true, address: regs.rip },
            // It faulted, and the fault is delivered.
            _ => Stepped::Unfinished,
        }
    }

    /// True if an instruction of the vector units could fault.
    fn units_may_fault(&mut self, sregs: &kvm_sregs) -> bool {
        if sregs.cr0 & UNITS_FAULT != 0 {
            return true;
        }
        let state = self.save();
        state.sse.mxcsr & MASKS != MASKS
            || state.x87.status & SUMMARY != 0
            || state.x87.control & X87_MASKS != X87_MASKS
    }
}

/// Looks at the next instruction.
struct Stepper<'a> {
    regs: &'a kvm_regs,
    sregs: &'a kvm_sregs,
    view: LinearView<'a>,
}

/// What the operands of an instruction are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operands {
    Memory,
    Device,
    /// Accessing them faults.
    Faulting,
}

impl Stepper<'_> {
    fn user(&self) -> bool {
        self.sregs.cs.selector & 3 == 3
    }

    /// How the next instruction is executed. With `all_exits`, whatever exits by itself does.
    fn plan(&self, all_exits: bool) -> Plan {
        let bytes = self.view.instruction_bytes(self.regs.rip);
        let mut decoder = Decoder::with_ip(64, &bytes, self.regs.rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        let branches = instruction.flow_control() == FlowControl::ConditionalBranch;
        let plan = |method, units| Plan { method, units, branches };
        if self.regs.rflags & TRAP_FLAG != 0 || !self.can_fetch(&instruction) {
            return plan(Method::Soft, false);
        }
        let next = instruction.next_ip();
        if all_exits && self.exits_by_itself(&instruction) {
            return plan(Method::Exit(next), false);
        }
        if needs_care(&instruction)
            || (self.user() && (instruction.is_privileged() || is_port(&instruction)))
        {
            return plan(Method::Soft, false);
        }
        let runs = !has_repeat(&instruction) || self.regs.rcx != 0;
        let method = match self.operands(&instruction) {
            Operands::Faulting => Method::Soft,
            _ if runs && is_port(&instruction) => Method::Exit(next),
            Operands::Device if runs => Method::Exit(next),
            _ => self.targets(&instruction).map_or(Method::Soft, Method::Step),
        };
        plan(method, uses_units(instruction.code()))
    }

    /// True for `HLT`, and for an access to a register that the engine answers.
    fn exits_by_itself(&self, instruction: &Instruction) -> bool {
        !self.user()
            && match instruction.mnemonic() {
                Mnemonic::Hlt => true,
                Mnemonic::Rdmsr | Mnemonic::Wrmsr => !is_owned_by_kvm(self.regs.rcx as u32),
                _ => false,
            }
    }

    fn can_fetch(&self, instruction: &Instruction) -> bool {
        let last = self.regs.rip.wrapping_add(instruction.len().saturating_sub(1) as u64);
        !instruction.is_invalid()
            && [self.regs.rip, last].into_iter().all(|address| {
                self.view.place(address).is_some_and(|place| {
                    let smep = self.sregs.cr4 & SMEP != 0;
                    let allowed = if self.user() { place.user } else { !(place.user && smep) };
                    place.executable && allowed && self.view.is_memory(place.physical)
                })
            })
    }

    fn register(&self, register: Register) -> Option<u64> {
        let full = register.full_register();
        let r = self.regs;
        let s = self.sregs;
        let value = match full {
            Register::RAX => r.rax,
            Register::RCX => r.rcx,
            Register::RDX => r.rdx,
            Register::RBX => r.rbx,
            Register::RSP => r.rsp,
            Register::RBP => r.rbp,
            Register::RSI => r.rsi,
            Register::RDI => r.rdi,
            Register::R8 => r.r8,
            Register::R9 => r.r9,
            Register::R10 => r.r10,
            Register::R11 => r.r11,
            Register::R12 => r.r12,
            Register::R13 => r.r13,
            Register::R14 => r.r14,
            Register::R15 => r.r15,
            Register::FS => s.fs.base,
            Register::GS => s.gs.base,
            Register::ES | Register::CS | Register::SS | Register::DS => 0,
            _ => return None,
        };
        // A narrow register as part of an address: the low bytes only.
        Some(if register.size() == 4 { value & u64::from(u32::MAX) } else { value })
    }

    /// What the memory operands lead to.
    fn operands(&self, instruction: &Instruction) -> Operands {
        let mut found = Operands::Memory;
        let mut factory = InstructionInfoFactory::new();
        for used in factory.info(instruction).used_memory() {
            let value = |register: Register, _: usize, _: usize| self.register(register);
            let Some(address) = used.virtual_address(0, value) else { return Operands::Faulting };
            let size = match used.memory_size().size() {
                0 => instruction.memory_size().size().max(1),
                size => size,
            };
            let writes = matches!(
                used.access(),
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            );
            match self.operand(address, size as u64, writes) {
                Operands::Faulting => return Operands::Faulting,
                Operands::Device => found = Operands::Device,
                Operands::Memory => {}
            }
        }
        found
    }

    fn operand(&self, address: u64, size: u64, writes: bool) -> Operands {
        let mut found = Operands::Memory;
        for address in [address, address.wrapping_add(size - 1)] {
            let Some(place) = self.view.place(address) else { return Operands::Faulting };
            let protected = self.user() || self.sregs.cr0 & WRITE_PROTECT != 0;
            if (self.user() && !place.user) || (writes && protected && !place.writable) {
                return Operands::Faulting;
            }
            if !self.view.is_memory(place.physical) {
                found = Operands::Device;
            }
        }
        found
    }

    /// Where the instruction may lead; nothing if that cannot be told.
    fn targets(&self, instruction: &Instruction) -> Option<[u64; 2]> {
        let next = instruction.next_ip();
        match instruction.flow_control() {
            FlowControl::Next => Some([next; 2]),
            FlowControl::ConditionalBranch => Some([next, instruction.near_branch_target()]),
            FlowControl::UnconditionalBranch | FlowControl::Call => {
                Some([instruction.near_branch_target(); 2])
            }
            FlowControl::Return => self.view.word(self.regs.rsp).map(|target| [target; 2]),
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                let target = if instruction.op0_kind() == OpKind::Register {
                    self.register(instruction.op0_register())
                } else {
                    let value = |register: Register, _: usize, _: usize| self.register(register);
                    self.view.word(instruction.virtual_address(0, 0, value)?)
                };
                target.map(|target| [target; 2])
            }
            FlowControl::Interrupt | FlowControl::XbeginXabortXend | FlowControl::Exception => None,
        }
    }
}

/// True for the bytes of a conditional branch at `address`.
pub(crate) fn is_conditional_branch(bytes: &[u8], address: u64) -> bool {
    let instruction = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE).decode();
    instruction.flow_control() == FlowControl::ConditionalBranch
}

fn is_port(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::In
            | Mnemonic::Out
            | Mnemonic::Insb
            | Mnemonic::Insw
            | Mnemonic::Insd
            | Mnemonic::Outsb
            | Mnemonic::Outsw
            | Mnemonic::Outsd
    ) && !uses_units(instruction.code())
}

fn has_repeat(instruction: &Instruction) -> bool {
    instruction.is_string_instruction()
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

/// True for an instruction that the trap flag does not suit, or that can fault in other ways than
/// by its memory operands.
fn needs_care(instruction: &Instruction) -> bool {
    let loads_segment = (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand).is_segment_register()
    });
    let system_register = (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register
            && (instruction.op_register(operand).is_cr()
                || instruction.op_register(operand).is_dr())
    });
    let far = matches!(instruction.code(), Code::Retfq | Code::Retfd | Code::Retfw)
        || instruction.is_call_far()
        || instruction.is_jmp_far()
        || instruction.is_call_far_indirect()
        || instruction.is_jmp_far_indirect();
    let plain = matches!(
        instruction.flow_control(),
        FlowControl::Next
            | FlowControl::ConditionalBranch
            | FlowControl::UnconditionalBranch
            | FlowControl::Call
            | FlowControl::Return
            | FlowControl::IndirectBranch
            | FlowControl::IndirectCall
    );
    let named = matches!(
        instruction.mnemonic(),
        Mnemonic::Pushf
            | Mnemonic::Pushfd
            | Mnemonic::Pushfq
            | Mnemonic::Popf
            | Mnemonic::Popfd
            | Mnemonic::Popfq
            | Mnemonic::Iret
            | Mnemonic::Iretd
            | Mnemonic::Iretq
            | Mnemonic::Retf
            | Mnemonic::Syscall
            | Mnemonic::Sysret
            | Mnemonic::Sysretq
            | Mnemonic::Sysenter
            | Mnemonic::Sysexit
            | Mnemonic::Sysexitq
            | Mnemonic::Sti
            | Mnemonic::Hlt
            | Mnemonic::Lss
            | Mnemonic::Lfs
            | Mnemonic::Lgs
            | Mnemonic::Lldt
            | Mnemonic::Ltr
            | Mnemonic::Div
            | Mnemonic::Idiv
            | Mnemonic::Rdmsr
            | Mnemonic::Wrmsr
            | Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Rdpmc
            | Mnemonic::Monitor
            | Mnemonic::Mwait
            | Mnemonic::Enter
            | Mnemonic::Fxrstor
            | Mnemonic::Fxrstor64
            | Mnemonic::Ldmxcsr
            | Mnemonic::Fldcw
            | Mnemonic::Fldenv
            | Mnemonic::Frstor
    );
    let offered = cpu_model::offers(instruction.code(), TimeStamp::Hidden);
    !plain || !offered || far || named || loads_segment || system_register
}

fn uses_units(code: Code) -> bool {
    code.cpuid_features().iter().any(|feature| {
        matches!(
            feature,
            CpuidFeature::FPU
                | CpuidFeature::FPU287
                | CpuidFeature::FPU387
                | CpuidFeature::MMX
                | CpuidFeature::FXSR
                | CpuidFeature::SSE
                | CpuidFeature::SSE2
                | CpuidFeature::SSE3
                | CpuidFeature::SSSE3
                | CpuidFeature::SSE4_1
                | CpuidFeature::SSE4_2
        )
    })
}
