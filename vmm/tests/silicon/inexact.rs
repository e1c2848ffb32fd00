//! What the last instruction of a snippet may get differently on different processors, and by
//! how much.

use crate::case::{Case, Outcome, Ready, Stop};
use crate::corpus::{Inexact, Policy, policy};
use crate::extended;
use iced_x86::{Code, Instruction, Mnemonic, Register};
use std::ops::Range;
use std::slice;

/// How far two correct results may be apart.
#[derive(Debug, Default)]
pub struct Allowance {
    kind: Option<Inexact>,
    /// Bits of the x87 status word that may differ.
    pub status: u16,
    /// The register whose upper half may differ.
    upper_half: Option<usize>,
    /// The XMM register that is approximate, and how many of its lanes are.
    vector: Option<(usize, u32)>,
    /// x87 stack registers that are approximate.
    stack: Range<usize>,
    /// True if those may be anything.
    any_stack: bool,
    /// By how much the argument may be off, in how it is reduced by multiples of π.
    reduction: f64,
    /// The result is a tangent, which grows faster than its argument.
    tangent: bool,
    /// Memory that is not compared.
    bytes: Vec<Range<u64>>,
    /// How far apart the addresses of a page fault may be.
    pub fault_distance: u64,
    /// An MMX instruction faulted: whether it had already taken the x87 registers over (TOP and
    /// tags) is the processor's choice.
    pub entered_mmx: bool,
}

/// What the instructions of the case are allowed, given where it stopped on the host.
pub fn allowance(case: &Case, ready: &Ready, host: &Outcome) -> Allowance {
    let mut allowed = allowed_at_the_end(case, ready, host);
    if let Some(instruction) = faulting(case, ready, host) {
        allowed.entered_mmx = uses_mmx(instruction);
        allowed.fault_distance = match instruction.mnemonic() {
            _ if accesses_in_pieces(instruction) => 512,
            Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => u64::MAX,
            _ => 0,
        };
        if stores_in_pieces(instruction)
            && let Some(address) = effective_address(instruction, host)
        {
            let len = instruction.memory_size().size() as u64;
            allowed.bytes.push(address..address + len);
        }
    }
    allowed
}

/// True if some bytes may have been stored before a later one faults.
fn stores_in_pieces(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Fbstp) || instruction.code() == Code::Fstp_m80fp
}

/// The instruction that faulted on the host.
///
/// After a trap it is the next one, if there is a next one.
pub fn faulting<'a>(case: &'a Case, ready: &Ready, host: &Outcome) -> Option<&'a Instruction> {
    let step = ready.starts.iter().position(|&start| start == host.rip)?;
    let faulted = matches!(host.stop, Stop::Exception { .. });
    case.steps.get(step).filter(|_| faulted).map(|step| &step.instruction)
}

fn uses_mmx(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|n| instruction.op_register(n).is_mm())
}

/// True if the operand is accessed piece by piece, in an order of the processor's choice.
fn accesses_in_pieces(instruction: &Instruction) -> bool {
    let far = matches!(instruction.mnemonic(), Mnemonic::Jmp | Mnemonic::Call)
        && matches!(instruction.memory_size().size(), 4 | 6 | 10);
    far || matches!(
        instruction.mnemonic(),
        Mnemonic::Retf
            | Mnemonic::Iret
            | Mnemonic::Iretd
            | Mnemonic::Iretq
            | Mnemonic::Lss
            | Mnemonic::Lds
            | Mnemonic::Les
            | Mnemonic::Bound
            | Mnemonic::Pusha
            | Mnemonic::Pushad
            | Mnemonic::Popa
            | Mnemonic::Popad
            | Mnemonic::Fldenv
            | Mnemonic::Fnstenv
            | Mnemonic::Frstor
            | Mnemonic::Fnsave
            | Mnemonic::Fxrstor
            | Mnemonic::Fxrstor64
            | Mnemonic::Fxsave
            | Mnemonic::Fxsave64
    )
}

/// What the case's last instruction is allowed, if it ran on the host.
fn allowed_at_the_end(case: &Case, ready: &Ready, host: &Outcome) -> Allowance {
    let Some(last) = case.steps.last() else { return Allowance::default() };
    let instruction = &last.instruction;
    let Policy::Last(kind) = policy(instruction.code()) else { return Allowance::default() };
    let at = ready.starts[case.steps.len() - 1];
    let ran = host.stop == Stop::End || host.rip > at;
    if !ran && kind != Inexact::Image {
        return Allowance::default();
    }
    let mut allowed = Allowance { kind: Some(kind), ..Allowance::default() };
    match kind {
        Inexact::Reciprocal => {
            let packed = matches!(instruction.mnemonic(), Mnemonic::Rcpps | Mnemonic::Rsqrtps);
            let register = instruction.op0_register() as usize - Register::XMM0 as usize;
            allowed.vector = Some((register, if packed { 4 } else { 1 }));
        }
        Inexact::Transcendental => {
            // Precision and underflow come from how the result was worked out, and with them
            // the summary bits.
            allowed.status = 0x80B0;
            allowed.stack = 0..2;
            allowed.tangent = instruction.mnemonic() == Mnemonic::Fptan;
            if !is_in_range(instruction.mnemonic(), case.inputs.floating.stack[0]) {
                allowed.status = 0x80FF;
                allowed.any_stack = true;
            }
            if reduces(instruction.mnemonic()) {
                // Intel takes π to be a number of 66 bits (SDM volume 1, 8.3.8), others are
                // more exact, and the engine is exact.
                let argument = extended::approximate(case.inputs.floating.stack[0]);
                allowed.reduction = argument.abs() * 2f64.powi(-66);
            }
        }
        Inexact::Remainder => {
            const PARTIAL: u16 = 0x400;
            if host.floating.status & PARTIAL != 0 {
                allowed.status = 0x4300;
                allowed.stack = 0..1;
                allowed.any_stack = true;
            }
        }
        Inexact::Image => {
            if let Some(address) = effective_address(instruction, host) {
                allowed.bytes = image(instruction, address, ran);
            }
        }
        Inexact::ZeroSource => {
            const ZF: u64 = 1 << 6;
            if host.rflags & ZF != 0 {
                let register = instruction.op0_register().full_register();
                allowed.upper_half = Some(register as usize - Register::RAX as usize);
            }
        }
    }
    allowed
}

impl Allowance {
    /// The bits of general register `n` to compare.
    pub fn general_mask(&self, n: usize) -> u64 {
        if self.upper_half == Some(n) { 0xFFFF_FFFF } else { u64::MAX }
    }

    /// True if the byte at `address` is not compared.
    pub fn ignores_byte(&self, address: u64) -> bool {
        self.bytes.iter().any(|range| range.contains(&address))
    }

    /// True if two values of XMM register `n` are as close as they must be.
    pub fn vector_is_close(&self, n: usize, host: u128, engine: u128) -> bool {
        let Some((register, lanes)) = self.vector else { return host == engine };
        if register != n {
            return host == engine;
        }
        (0..4).all(|lane| {
            let [one, other] = [host, engine].map(|value| (value >> (32 * lane)) as u32);
            one == other || lane < lanes && reciprocals_are_close(one, other)
        })
    }

    /// True if two values of x87 stack register `n` are as close as they must be.
    pub fn stack_is_close(&self, n: usize, host: [u8; 10], engine: [u8; 10]) -> bool {
        host == engine
            || self.stack.contains(&n)
                && (self.any_stack
                    || self.kind == Some(Inexact::Transcendental)
                        && self.functions_are_close(host, engine))
    }

    /// Both within one unit in the last place of the true value (Intel SDM volume 1, 8.3.10), up
    /// to the reduction of the argument.
    fn functions_are_close(&self, host: [u8; 10], engine: [u8; 10]) -> bool {
        const UNITS: u64 = 2;
        let slope = if self.tangent { 1.0 + extended::approximate(host).powi(2) } else { 1.0 };
        extended::units_apart(host, engine).is_some_and(|units| units <= UNITS)
            || extended::distance(host, engine).is_some_and(|far| far <= self.reduction * slope)
    }
}

/// False for arguments the manuals leave undefined.
fn is_in_range(mnemonic: Mnemonic, argument: [u8; 10]) -> bool {
    let magnitude = extended::approximate(argument).abs();
    match mnemonic {
        Mnemonic::F2xm1 => magnitude <= 1.0,
        Mnemonic::Fyl2xp1 => magnitude <= 1.0 - std::f64::consts::FRAC_1_SQRT_2,
        _ => true,
    }
}

/// True for the functions that reduce their argument by multiples of π.
fn reduces(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Fsin | Mnemonic::Fcos | Mnemonic::Fsincos | Mnemonic::Fptan)
}

/// Both within 1.5 · 2^-12 of the true value, relative to it. A result is zero if the approximation
/// is below the smallest normal number; for a true value next to that either may be (Intel SDM,
/// RCPPS).
fn reciprocals_are_close(one: u32, other: u32) -> bool {
    const BOUND: f64 = 3.1 / 4096.0;
    let [one, other] = [one, other].map(|bits| f64::from(f32::from_bits(bits)));
    let smallest = f64::from(f32::MIN_POSITIVE);
    let flushed = (one == 0.0) != (other == 0.0)
        && one.is_sign_negative() == other.is_sign_negative()
        && (one + other).abs() <= smallest * (1.0 + BOUND);
    let both = one.is_normal() && other.is_normal();
    flushed || both && (one - other).abs() <= BOUND * one.abs().min(other.abs())
}

/// The linear address of the memory operand, given registers it did not change.
fn effective_address(instruction: &Instruction, outcome: &Outcome) -> Option<u64> {
    instruction.virtual_address(0, 0, |register, _, _| match register {
        Register::GS => Some(crate::layout::GS_BASE),
        Register::ES | Register::CS | Register::SS | Register::DS => Some(0),
        _ => {
            let number = register.full_register() as usize - Register::RAX as usize;
            let value = outcome.general.get(number)?;
            Some(if register.size() == 4 { value & 0xFFFF_FFFF } else { *value })
        }
    })
}

/// The parts of an x87 image that are not compared: pointers, opcode, reserved fields. All of it
/// if storing faulted half-way.
fn image(instruction: &Instruction, address: u64, ran: bool) -> Vec<Range<u64>> {
    let len = instruction.memory_size().size() as u64;
    let parts: &[Range<u64>] = match instruction.mnemonic() {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 if !ran => slice::from_ref(&(0..512)),
        _ if !ran => slice::from_ref(&(0..108)),
        // Reserved, FOP, FIP, FDP; MXCSR_MASK.
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => &[5..24, 28..32],
        _ if matches!(len, 14 | 94) => slice::from_ref(&(6..14)),
        // The upper halves of the words; then FIP, FOP, FDP and their selectors.
        _ => &[2..4, 6..8, 10..28],
    };
    parts.iter().map(|part| address + part.start..address + part.end).collect()
}
