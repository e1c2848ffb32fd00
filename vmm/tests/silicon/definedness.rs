//! What the manuals leave undefined, followed through a snippet.
//!
//! An undefined flag must never be read by a later instruction; where one would be, an
//! instruction that defines it goes in between ([`repair`]). What is still undefined where the
//! snippet stops is not compared ([`Undefined`]).

use crate::case::{Bits, Case, Inputs, Step};
use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};

/// The x87 condition codes in the status word.
pub const CONDITIONS: u16 = 0x4700;
const C0: u16 = 0x100;
const C1: u16 = 0x200;
const C2: u16 = 0x400;
const C3: u16 = 0x4000;

/// Flags whose value is anybody's guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Undefined {
    /// Of RFLAGS, at their places there.
    pub rflags: u64,
    /// Of the x87 status word.
    pub conditions: u16,
}

impl Undefined {
    fn join(&mut self, other: Self) {
        self.rflags |= other.rflags;
        self.conditions |= other.conditions;
    }
}

/// The places in RFLAGS of iced's flag bits.
fn places(bits: u32) -> u64 {
    [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |flags, (_, place)| flags | (1 << place))
}

const CF: u64 = 1 << 0;
const OF: u64 = 1 << 11;

/// The count of a shift or rotate, masked as the processor does, if it can be known.
fn shift_count(instruction: &Instruction, known: Option<&Inputs>) -> Option<u32> {
    let last = instruction.op_count() - 1;
    let count = match instruction.op_kind(last) {
        OpKind::Immediate8 => u32::from(instruction.immediate8()),
        OpKind::Register => (known?.general[1] & 0xFF) as u32,
        _ => return None,
    };
    let wide = instruction.op_kind(0) == OpKind::Register && instruction.op0_register().size() == 8
        || instruction.op_kind(0) == OpKind::Memory && instruction.memory_size().size() == 8;
    Some(count & if wide { 63 } else { 31 })
}

fn is_shift(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    )
}

fn operand_bits(instruction: &Instruction) -> u32 {
    let bytes = match instruction.op_kind(0) {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    };
    bytes as u32 * 8
}

fn rflags_after(before: u64, instruction: &Instruction, known: Option<&Inputs>) -> u64 {
    let undefined = places(instruction.rflags_undefined());
    let mnemonic = instruction.mnemonic();
    if !is_shift(mnemonic) {
        let modified = places(instruction.rflags_modified());
        // A string instruction that repeats zero times changes nothing.
        let conditional = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        let kept = if conditional { before } else { before & !modified };
        return kept | undefined;
    }
    let double = matches!(mnemonic, Mnemonic::Shld | Mnemonic::Shrd);
    // AF is undefined after shifts, and untouched by rotates.
    let plain = matches!(mnemonic, Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar);
    let adjust = if double || plain { 1 << 4 } else { 0 };
    let size = operand_bits(instruction);
    let loses_carry = plain && mnemonic != Mnemonic::Sar;
    match shift_count(instruction, known) {
        Some(0) => before,
        Some(1) => {
            let modified = places(instruction.rflags_modified());
            (before & !modified) | adjust
        }
        Some(count) => {
            let carry = if loses_carry && count >= size { CF } else { 0 };
            let modified = places(instruction.rflags_modified());
            (before & !modified) | adjust | OF | carry
        }
        None => {
            let carry = if loses_carry && size < 32 { CF } else { 0 };
            before | adjust | OF | carry | undefined
        }
    }
}

fn conditions_after(before: u16, instruction: &Instruction) -> u16 {
    match instruction.mnemonic() {
        // Comparisons, FXAM and the remainders define all four; initialising clears them.
        Mnemonic::Fcom
        | Mnemonic::Fcomp
        | Mnemonic::Fcompp
        | Mnemonic::Fucom
        | Mnemonic::Fucomp
        | Mnemonic::Fucompp
        | Mnemonic::Ficom
        | Mnemonic::Ficomp
        | Mnemonic::Ftst
        | Mnemonic::Fxam
        | Mnemonic::Fninit
        | Mnemonic::Fnsave
        | Mnemonic::Fldenv
        | Mnemonic::Frstor
        | Mnemonic::Fxrstor
        | Mnemonic::Fxrstor64 => 0,
        Mnemonic::Fprem | Mnemonic::Fprem1 => 0,
        Mnemonic::Fsin | Mnemonic::Fcos | Mnemonic::Fsincos | Mnemonic::Fptan => C0 | C1 | C3,
        Mnemonic::Fpatan | Mnemonic::F2xm1 | Mnemonic::Fyl2x | Mnemonic::Fyl2xp1 => CONDITIONS,
        Mnemonic::Fcomi | Mnemonic::Fcomip | Mnemonic::Fucomi | Mnemonic::Fucomip => {
            (before & !C1) | C0 | C2 | C3
        }
        // "C0 to C3 undefined": processors keep them, but no manual promises it.
        Mnemonic::Ffree
        | Mnemonic::Ffreep
        | Mnemonic::Fnop
        | Mnemonic::Fnclex
        | Mnemonic::Wait
        | Mnemonic::Fldcw
        | Mnemonic::Fnstcw
        | Mnemonic::Fnstsw
        | Mnemonic::Fnstenv => CONDITIONS,
        // The rest of x87 reports rounding or a stack fault in C1 and leaves the others undefined.
        _ if is_x87(instruction) => (before & !C1) | C0 | C2 | C3,
        _ => before,
    }
}

fn is_x87(instruction: &Instruction) -> bool {
    use iced_x86::CpuidFeature as Feature;
    instruction
        .cpuid_features()
        .iter()
        .any(|feature| matches!(feature, Feature::FPU | Feature::FPU287 | Feature::FPU387))
}

/// What `instruction` makes undefined of what was `before`; `known` are the registers it starts
/// with, if they can be known.
fn after(before: Undefined, instruction: &Instruction, known: Option<&Inputs>) -> Undefined {
    Undefined {
        rflags: rflags_after(before.rflags, instruction, known),
        conditions: conditions_after(before.conditions, instruction),
    }
}

/// What `instruction` takes in, of what could be undefined.
fn reads(instruction: &Instruction) -> Undefined {
    let conditions = match instruction.mnemonic() {
        Mnemonic::Fnstsw | Mnemonic::Fnstenv | Mnemonic::Fnsave => CONDITIONS,
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => CONDITIONS,
        _ => 0,
    };
    let rflags = match instruction.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => u64::MAX,
        // Pushes no flags in 64-bit mode's INT either, but the handler's frame shows them all.
        _ => places(instruction.rflags_read()),
    };
    Undefined { rflags, conditions }
}

/// What is undefined before each step, and at the end; the last element.
pub fn flow(case: &Case) -> Vec<Undefined> {
    let steps = &case.steps;
    let mut before = vec![Undefined::default(); steps.len() + 1];
    // All branches go forward, so one pass is enough. A call may come back behind itself.
    for (n, step) in steps.iter().enumerate() {
        let instruction = &step.instruction;
        let known = (n == 0).then_some(&case.inputs);
        let out = after(before[n], instruction, known);
        if instruction.flow_control() != FlowControl::UnconditionalBranch {
            before[n + 1].join(out);
        }
        for target in targets(case, n) {
            before[target].join(out);
        }
    }
    before
}

/// Where step `n` may branch to.
fn targets(case: &Case, n: usize) -> Vec<usize> {
    let step = &case.steps[n];
    match step.instruction.flow_control() {
        FlowControl::Next | FlowControl::Exception | FlowControl::Interrupt => Vec::new(),
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call => {
            step.target.into_iter().collect()
        }
        // Through a register or memory: any step whose address was put somewhere.
        _ => {
            let linked = case.links.iter().map(|link| link.step);
            let loaded = case.steps[..n].iter().filter_map(|step| step.target);
            linked.chain(loaded).filter(|&step| step > n).collect()
        }
    }
}

/// The first step that reads something undefined, and whether it is RFLAGS.
fn first_reader(case: &Case) -> Option<(usize, bool)> {
    let before = flow(case);
    case.steps.iter().enumerate().find_map(|(n, step)| {
        let reads = reads(&step.instruction);
        if reads.rflags & before[n].rflags != 0 {
            Some((n, true))
        } else if reads.conditions & before[n].conditions != 0 {
            Some((n, false))
        } else {
            None
        }
    })
}

/// True if nothing undefined is ever read.
pub fn is_sound(case: &Case) -> bool {
    first_reader(case).is_none()
}

/// Puts instructions that define flags in front of those that would read undefined ones.
pub fn repair(case: &mut Case) {
    while let Some((n, rflags)) = first_reader(case) {
        let filler = if rflags {
            match case.bits {
                Bits::Long => Instruction::with2(Code::Cmp_r64_rm64, Register::RDX, Register::RCX),
                Bits::Short => Instruction::with2(Code::Cmp_r32_rm32, Register::EDX, Register::ECX),
            }
            .expect("CMP takes two registers")
        } else {
            Instruction::with(Code::Fxam)
        };
        insert(case, n, Step::plain(filler));
    }
}

/// Puts a step before step `n`; branches to `n` go to the new step.
fn insert(case: &mut Case, n: usize, step: Step) {
    case.steps.insert(n, step);
    let moved = |target: &mut usize| {
        if *target > n {
            *target += 1;
        }
    };
    case.steps.iter_mut().filter_map(|step| step.target.as_mut()).for_each(moved);
    case.links.iter_mut().map(|link| &mut link.step).for_each(moved);
    if case.focus_step >= n {
        case.focus_step += 1;
    }
}
