//! Decoded instructions in the form the interpreter executes.

use super::compat::CodeSize;
use super::cpu::{Cpu, slot};
use super::event::Flow;
use super::generic;
use iced_x86::Instruction;

/// Executes the first of some ops and then the others, so that each op jumps to the next without
/// a loop in between. The CPU's RIP slot holds the block's first address meanwhile, and
/// `next_rip` the address behind the block, which a branch replaces. An op that traps leaves
/// the number of ops behind it in `cpu.ops_left`.
pub(super) type Handler = fn(&mut Cpu, Ops<'_>) -> Flow;

/// Ops one behind the other, at least one. Handlers pass them on in two registers, and have no
/// length to check before they look at theirs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ops<'a>(&'a [Op]);

impl<'a> Ops<'a> {
    #[inline(always)]
    fn new(ops: &'a [Op]) -> Option<Self> {
        (!ops.is_empty()).then_some(Self(ops))
    }

    #[inline(always)]
    fn first(self) -> &'a Op {
        // SAFETY: the slice is not empty, as `new` and `only`, which alone make one, see to.
        unsafe { self.0.get_unchecked(0) }
    }

    #[inline(always)]
    fn others(self) -> Option<Self> {
        // SAFETY: as in `first`: 1 is at most the length.
        Self::new(unsafe { self.0.get_unchecked(1..) })
    }

    fn only(op: &'a Op) -> Self {
        Self(std::slice::from_ref(op))
    }
}

/// The handler that executes `body` for one op. `body` is a function item: what to call is
/// known from its type alone.
pub(super) fn handler<F>(_body: F) -> Handler
where
    F: Fn(&mut Cpu, &Op) -> Flow + Copy + 'static,
{
    const { assert!(size_of::<F>() == 0, "a function item has no data") };
    run_on::<F>
}

fn run_on<F>(cpu: &mut Cpu, ops: Ops<'_>) -> Flow
where
    F: Fn(&mut Cpu, &Op) -> Flow + Copy + 'static,
{
    // SAFETY: `F` has no bytes, as `handler` asserts, and a read of no bytes is valid through any
    // aligned pointer that is not null; the value exists and may be copied, since `handler` was
    // given one.
    let body: F = unsafe { std::ptr::NonNull::dangling().read() };
    match body(cpu, ops.first()) {
        Ok(()) => match ops.others() {
            Some(others) => (others.first().handler)(cpu, others),
            None => Ok(()),
        },
        Err(trap) => {
            cpu.ops_left = ops.0.len() - 1;
            Err(trap)
        }
    }
}

/// Executes ops one after the other, until one traps.
#[inline(always)]
pub(super) fn run_ops(cpu: &mut Cpu, ops: &[Op]) -> Flow {
    match Ops::new(ops) {
        Some(ops) => (ops.first().handler)(cpu, ops),
        None => Ok(()),
    }
}

/// Executes one op alone.
pub(super) fn run_alone(cpu: &mut Cpu, op: &Op) -> Flow {
    (op.handler)(cpu, Ops::only(op))
}

/// One instruction: what to call, and the operands that matter to it. It stays in its block: see
/// [`super::decoded`]. There are hundreds of thousands of them, and the host's caches hold the more
/// of them the smaller they are.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) handler: Handler,
    /// Immediate, relative branch target, or number among the decoded instructions.
    pub(super) low: i32,
    /// Displacement of the memory operand; without one, the upper half of the immediate.
    pub(super) high: i32,
    /// Bytes from the block's beginning to this instruction.
    pub(super) offset: u16,
    /// First register operand.
    pub(super) a: u8,
    /// Second register operand.
    pub(super) b: u8,
    /// Register slot of the memory operand's base.
    pub(super) base: u8,
    pub(super) index: ScaledIndex,
    /// Register slot of its segment's base.
    pub(super) segment: u8,
    pub(super) traits: Traits,
}

const _: () = assert!(size_of::<Op>() == 24);

/// The index of a memory operand: its register slot, and above it the left shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ScaledIndex(u8);

impl ScaledIndex {
    /// No index.
    pub(super) const NONE: Self = Self(slot::ZERO);

    /// The register in `slot`, times `scale` (1, 2, 4 or 8).
    pub(super) fn new(slot: u8, scale: u32) -> Self {
        Self(slot | (scale.trailing_zeros() as u8) << 5)
    }

    #[inline(always)]
    fn value(self, cpu: &Cpu) -> u64 {
        // The CPU looks at the bits of the slot only.
        cpu.full(self.0) << (self.0 >> 5)
    }
}

/// What is asked of an op when it traps or goes: its length, and two bits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Traits(u8);

impl Traits {
    const ON_STACK: u8 = 1 << 4;
    const GENERAL: u8 = 1 << 5;

    fn new(instruction: &Instruction, size: CodeSize, general: bool) -> Self {
        let stack = if is_on_stack(instruction, size) { Self::ON_STACK } else { 0 };
        let general = if general { Self::GENERAL } else { 0 };
        Self(instruction.len() as u8 | stack | general)
    }
}

impl Op {
    /// An op for `instruction` without operands, with the handler of the general path.
    pub(super) fn bare(instruction: &Instruction, size: CodeSize, general: bool) -> Self {
        Self {
            handler: handler(self::general),
            low: 0,
            high: 0,
            offset: instruction.ip() as u16,
            a: slot::ZERO,
            b: slot::ZERO,
            base: slot::ZERO,
            index: ScaledIndex::NONE,
            segment: slot::ZERO,
            traits: Traits::new(instruction, size, general),
        }
    }

    /// Bytes of this instruction.
    pub(super) fn length(&self) -> u64 {
        u64::from(self.traits.0 & 0xF)
    }

    /// The memory operand is on the stack segment.
    pub(super) fn on_stack(&self) -> bool {
        self.traits.0 & Traits::ON_STACK != 0
    }

    /// The number of its decoded instruction, if it is an op of the general path.
    pub(super) fn number(&self) -> Option<u32> {
        (self.traits.0 & Traits::GENERAL != 0).then_some(self.low as u32)
    }

    /// The immediate or the relative branch target, sign-extended from 32 bits.
    #[inline(always)]
    pub(super) fn immediate(&self) -> u64 {
        self.low as i64 as u64
    }

    /// All 64 bits of the immediate, where there is no memory operand.
    #[inline(always)]
    pub(super) fn wide_immediate(&self) -> u64 {
        u64::from(self.low as u32) | u64::from(self.high as u32) << 32
    }
}

/// A memory operand with base and displacement only.
pub(super) const PLAIN: bool = false;
/// A memory operand that may have an index and a segment base too.
pub(super) const FULL: bool = true;

impl Op {
    /// The linear address of the memory operand.
    #[inline(always)]
    pub(super) fn address<const SHAPE: bool>(&self, cpu: &Cpu) -> u64 {
        let address = cpu.full(self.base).wrapping_add(self.high as i64 as u64);
        if SHAPE == PLAIN {
            return address;
        }
        address.wrapping_add(self.index.value(cpu)).wrapping_add(cpu.full(self.segment))
    }
}

/// An op of the general path.
pub(super) fn general(cpu: &mut Cpu, op: &Op) -> Flow {
    let decoded = cpu.decoded.get(op.low as u32);
    cpu.executing = Some(op.offset);
    let flow = (decoded.run)(cpu, &decoded.instruction);
    cpu.executing = None;
    flow
}

/// An op of the general path for `instruction`, which is kept in the CPU.
pub(super) fn general_op(cpu: &mut Cpu, instruction: Instruction) -> Op {
    let decoded = generic::Decoded { run: generic::of(&instruction), instruction };
    let mut op = Op::bare(&instruction, cpu.code_size, true);
    op.low = cpu.decoded.insert(decoded) as i32;
    op
}

/// True if the memory operand is on the stack segment: in 64-bit code by its base alone, since it
/// ignores overrides other than FS and GS (SDM volume 1, 3.3.7.1).
fn is_on_stack(instruction: &Instruction, size: CodeSize) -> bool {
    use iced_x86::Register;
    if size != CodeSize::Long {
        return instruction.memory_segment() == Register::SS;
    }
    !matches!(instruction.segment_prefix(), Register::FS | Register::GS)
        && matches!(
            instruction.memory_base(),
            Register::RSP | Register::ESP | Register::RBP | Register::EBP
        )
}
