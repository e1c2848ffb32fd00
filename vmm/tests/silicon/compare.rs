//! Compares what the host CPU did with what the engine did, as far as the architecture defines it.
//!
//! Left out, because it is not defined or not the same on all processors:
//! - flags and x87 condition codes the manuals call undefined ([`crate::definedness`]);
//! - FIP, FDP and FOP: Intel writes them at every x87 instruction or only at unmasked exceptions,
//!   as CPUID says, AMD only at exceptions, and both drop the selectors;
//! - the low bits of approximations and transcendental functions ([`crate::inexact`]);
//! - the protection bit of a fault at a kernel address, which Linux sets always;
//! - the write bit of a fault of a read-modify-write instruction on a page that is not there:
//!   the processor reads first or announces the write first as it likes;
//! - which piece of a far pointer, stack frame or x87 image is accessed first, and so the exact
//!   address of a page fault in it;
//! - whether an MMX instruction that faults has already taken over TOP and tags;
//! - the arithmetic flags of a repeated comparison left in the middle by a single step: Intel
//!   keeps the old ones until the end, and shows RF there, which the engine does not;
//! - which operand of CMPS is read first, and so the address if both fault;
//! - of 32-bit code, the upper halves of registers, and the registers it does not have;
//! - what [`crate::vendor`] lists for the host's vendor.

use crate::case::{Case, Floating, Outcome, Ready, Stop};
use crate::definedness::{self, Undefined};
use crate::inexact;
use crate::layout::{EXIT, memory_address};
use crate::vendor;
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, OpAccess};
use std::fmt::Write;

/// Where user addresses end for Linux (`TASK_SIZE_MAX`): one page before they do for the processor.
const KERNEL_ADDRESSES: u64 = 0x7FFF_FFFF_F000;
const RESUME: u64 = 1 << 16;
const ARITHMETIC: u64 = 0x8D5;
const TOP: u16 = 0x3800;

/// One thing that is not the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its name.
    pub what: String,
    /// On the host CPU.
    pub host: String,
    /// On the engine.
    pub engine: String,
}

/// Names of the general registers by number.
pub const NAMES: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
    "R14", "R15",
];

/// Collects differences.
#[derive(Debug, Default)]
pub struct Findings(Vec<Difference>);

impl Findings {
    /// Notes two numbers if they differ.
    pub fn hex(&mut self, what: &str, host: u128, engine: u128) {
        if host != engine {
            self.note(what, format!("{host:#x}"), format!("{engine:#x}"));
        }
    }

    /// Notes a difference.
    pub fn note(&mut self, what: &str, host: String, engine: String) {
        self.0.push(Difference { what: what.to_owned(), host, engine });
    }
}

/// Everything that differs. `retired` is the engine's count of instructions.
pub fn compare(
    case: &Case,
    ready: &Ready,
    host: &Outcome,
    engine: &Outcome,
    retired: u64,
) -> Vec<Difference> {
    let mut findings = Findings::default();
    let undefined = undefined_at(case, ready, host.rip);
    let allowed = inexact::allowance(case, ready, host);
    let faulting = inexact::faulting(case, ready, host);
    let refused = inexact::faulting(case, ready, engine);
    if vendor::refused_before_exception(faulting, host) || vendor::read_unaligned(refused, engine) {
        return findings.0;
    }
    let modifies = faulting.is_some_and(modifies_memory);
    let another = vendor::refused_the_other_operand(faulting, host, engine)
        || vendor::refused_another_word(faulting, host, engine)
        || vendor::reached_around_the_end(host, engine)
        || vendor::bound_by_one(faulting, host, engine);
    if !another {
        stop(host, engine, modifies, allowed.fault_distance, &mut findings);
    }
    findings.hex("RIP", host.rip.into(), engine.rip.into());
    let mid = if vendor::left_comparing(faulting, host) { ARITHMETIC } else { 0 };
    let flags = !undefined.rflags & !step_flags(case, ready, host) & !mid;
    findings.hex("RFLAGS", (host.rflags & flags).into(), (engine.rflags & flags).into());
    for (n, name) in NAMES.iter().enumerate().take(case.bits.registers()) {
        let mask = allowed.general_mask(n) & case.bits.mask();
        findings.hex(name, (host.general[n] & mask).into(), (engine.general[n] & mask).into());
    }
    for (n, name) in ["DS", "ES"].iter().enumerate() {
        findings.hex(name, host.data_selectors[n].into(), engine.data_selectors[n].into());
    }
    floating(host, engine, &undefined, &allowed, &mut findings);
    memory(host, engine, &allowed, &mut findings);
    if let Some(expected) = straight_line_count(case, host) {
        findings.hex("instructions retired", expected.into(), retired.into());
    }
    findings.0
}

/// What is undefined where the snippet stopped.
fn undefined_at(case: &Case, ready: &Ready, rip: u64) -> Undefined {
    let flow = definedness::flow(case);
    if rip == EXIT {
        return flow[case.steps.len()];
    }
    match ready.starts.iter().position(|&start| start == rip) {
        Some(step) => flow[step],
        // In the middle of an instruction, or astray: anything may have run.
        None => Undefined { rflags: ARITHMETIC, conditions: definedness::CONDITIONS },
    }
}

fn describe(stop: Stop) -> String {
    match stop {
        Stop::End => "the end".to_owned(),
        Stop::Exception { vector, error, address } => {
            format!("vector {vector}, error {error:#x}, address {address:#x}")
        }
    }
}

/// Flags that are not compared after a single step: see the module's list.
fn step_flags(case: &Case, ready: &Ready, host: &Outcome) -> u64 {
    if !matches!(host.stop, Stop::Exception { vector: 1, .. }) {
        return 0;
    }
    let step = ready.starts.iter().position(|&start| start == host.rip);
    let next = step.and_then(|step| case.steps.get(step));
    let repeats = next.is_some_and(|step| step.instruction.is_string_instruction());
    match repeats {
        true if vendor::is_intel() => ARITHMETIC | RESUME,
        true => ARITHMETIC,
        false => 0,
    }
}

/// Compares why the snippet stopped; the addresses of page faults may be `distance` bytes apart, also
/// across the end of the address space.
fn stop(host: &Outcome, engine: &Outcome, modifies: bool, distance: u64, findings: &mut Findings) {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 2;
    let [mut one, mut other] = [host.stop, engine.stop];
    if let (
        Stop::Exception { vector: 14, error: error_one, address: one },
        Stop::Exception { vector: 14, error: error_other, address: other },
    ) = (&mut one, &mut other)
        && one != other
        && one.wrapping_sub(*other).min(other.wrapping_sub(*one)) <= distance
    {
        // Of two pages that both refuse, one may be there and the other not.
        *error_one |= PRESENT;
        *error_other |= PRESENT;
        *one = *other;
    }
    for stop in [&mut one, &mut other] {
        let Stop::Exception { vector: 14, error, address } = stop else { continue };
        if *address >= KERNEL_ADDRESSES {
            *error |= PRESENT;
        }
        if *error & PRESENT == 0 && modifies {
            *error |= WRITE;
        }
    }
    if one != other {
        findings.note("stopped by", describe(host.stop), describe(engine.stop));
    }
}

/// True if the instruction reads and writes the same memory.
fn modifies_memory(instruction: &Instruction) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let accesses = factory.info(instruction).used_memory();
    accesses
        .iter()
        .any(|memory| matches!(memory.access(), OpAccess::ReadWrite | OpAccess::ReadCondWrite))
}

fn floating(
    host: &Outcome,
    engine: &Outcome,
    undefined: &Undefined,
    allowed: &inexact::Allowance,
    findings: &mut Findings,
) {
    let [one, other] = [&host.floating, &engine.floating];
    findings.hex("FCW", one.control.into(), other.control.into());
    let top = if allowed.entered_mmx { TOP } else { 0 };
    let mask = !undefined.conditions & !allowed.status & !top;
    findings.hex("FSW", (one.status & mask).into(), (other.status & mask).into());
    if !allowed.entered_mmx {
        findings.hex("registers in use", one.in_use.into(), other.in_use.into());
    }
    for n in 0..8 {
        // From here on by physical number, if TOP may differ.
        let number = |floating: &Floating| {
            let top =
                if allowed.entered_mmx { usize::from((floating.status & TOP) >> 11) } else { 0 };
            floating.stack[(n + 8 - top) & 7]
        };
        let [one, other] = [number(one), number(other)];
        if !allowed.stack_is_close(n, one, other) {
            let wide = |bytes: [u8; 10]| {
                let mut wide = [0; 16];
                wide[..10].copy_from_slice(&bytes);
                u128::from_le_bytes(wide)
            };
            findings.hex(&format!("ST{n}"), wide(one), wide(other));
        }
    }
    findings.hex("MXCSR", one.mxcsr.into(), other.mxcsr.into());
    for n in 0..16 {
        if !allowed.vector_is_close(n, one.xmm[n], other.xmm[n]) {
            findings.hex(&format!("XMM{n}"), one.xmm[n], other.xmm[n]);
        }
    }
}

fn memory(host: &Outcome, engine: &Outcome, allowed: &inexact::Allowance, findings: &mut Findings) {
    if host.memory == engine.memory {
        return;
    }
    let differs = |&at: &usize| {
        host.memory[at] != engine.memory[at] && !allowed.ignores_byte(memory_address(at))
    };
    let Some(first) = (0..host.memory.len()).find(differs) else { return };
    let count = (0..host.memory.len()).filter(differs).count();
    let shown = |outcome: &Outcome| {
        let mut text = String::new();
        for byte in &outcome.memory[first..(first + 16).min(outcome.memory.len())] {
            write!(text, "{byte:02x} ").expect("a string takes everything");
        }
        text
    };
    let what = format!("{count} bytes of memory from {:#x}", memory_address(first));
    findings.note(&what, shown(host), shown(engine));
}

/// How many instructions a case without branches, repetition and single-stepping retires, if it
/// reaches the end: its steps and the jump behind them.
fn straight_line_count(case: &Case, host: &Outcome) -> Option<u64> {
    const TF: u64 = 1 << 8;
    let plain = case.steps.iter().all(|step| {
        let instruction = &step.instruction;
        instruction.flow_control() == FlowControl::Next && !instruction.is_string_instruction()
    });
    let reached = host.stop == Stop::End && (host.rflags | case.inputs.rflags) & TF == 0;
    (plain && reached).then_some(case.steps.len() as u64 + 1)
}
