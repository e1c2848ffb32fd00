//! Decoded instructions in the form the interpreter executes.

use super::compat::CodeSize;
use super::cpu::Cpu;
use super::event::Flow;
use super::generic;
use iced_x86::Instruction;

/// Executes one op and then the ops that follow it, so that each op jumps to the next without
/// a loop in between. The CPU's RIP slot holds the block's first address meanwhile, and
/// `next_rip` the address behind the block, which a branch replaces. An op that traps leaves
/// the number of ops behind it in `cpu.ops_left`.
pub(super) type Handler = fn(&mut Cpu, &Op, &[Op]) -> Flow;

/// The handler that executes `body` for one op. `body` is a function item: what to call is
/// known from its type alone.
pub(super) fn handler<F>(_body: F) -> Handler
where
    F: Fn(&mut Cpu, &Op) -> Flow + Copy + 'static,
{
    const { assert!(size_of::<F>() == 0, "a function item has no data") };
    run_on::<F>
}

fn run_on<F>(cpu: &mut Cpu, op: &Op, rest: &[Op]) -> Flow
where
    F: Fn(&mut Cpu, &Op) -> Flow + Copy + 'static,
{
    // SAFETY: `F` has no bytes, as `handler` asserts, and a read of no bytes is valid through any
    // aligned pointer that is not null; the value exists and may be copied, since `handler` was
    // given one.
    let body: F = unsafe { std::ptr::NonNull::dangling().read() };
    match body(cpu, op) {
        Ok(()) => run_ops(cpu, rest),
        Err(trap) => {
            cpu.ops_left = rest.len();
            Err(trap)
        }
    }
}

/// Executes ops one after the other, until one traps.
#[inline(always)]
pub(super) fn run_ops(cpu: &mut Cpu, ops: &[Op]) -> Flow {
    match ops.split_first() {
        Some((op, rest)) => (op.handler)(cpu, op, rest),
        None => Ok(()),
    }
}

/// One instruction: what to call, and the operands that matter to it. It stays in its block: see
/// [`super::decoded`].
#[derive(Debug)]
pub(super) struct Op {
    pub(super) handler: Handler,
    /// Immediate, relative branch target, or number among the decoded instructions.
    pub(super) immediate: u64,
    /// Displacement of the memory operand.
    pub(super) displacement: i32,
    /// Bytes from the block's beginning to this instruction.
    pub(super) offset: u16,
    /// Bytes of this instruction.
    pub(super) length: u8,
    /// First register operand.
    pub(super) a: u8,
    /// Second register operand.
    pub(super) b: u8,
    /// Register slot of the memory operand's base.
    pub(super) base: u8,
    /// Register slot of its index.
    pub(super) index: u8,
    /// Left shift of the index.
    pub(super) scale: u8,
    /// Register slot of its segment's base.
    pub(super) segment: u8,
    /// The memory operand is on the stack segment.
    pub(super) stack: bool,
    /// It is an op of the general path.
    pub(super) general: bool,
}

/// A memory operand with base and displacement only.
pub(super) const PLAIN: bool = false;
/// A memory operand that may have an index and a segment base too.
pub(super) const FULL: bool = true;

impl Op {
    /// The linear address of the memory operand.
    #[inline(always)]
    pub(super) fn address<const SHAPE: bool>(&self, cpu: &Cpu) -> u64 {
        let address = cpu.full(self.base).wrapping_add(self.displacement as i64 as u64);
        if SHAPE == PLAIN {
            return address;
        }
        let index = cpu.full(self.index) << self.scale;
        address.wrapping_add(index).wrapping_add(cpu.full(self.segment))
    }
}

/// An op of the general path.
pub(super) fn general(cpu: &mut Cpu, op: &Op) -> Flow {
    let decoded = cpu.decoded.get(op.immediate as u32);
    cpu.executing = Some(op.offset);
    let flow = (decoded.run)(cpu, &decoded.instruction);
    cpu.executing = None;
    flow
}

/// An op of the general path for `instruction`, which is kept in the CPU.
pub(super) fn general_op(cpu: &mut Cpu, instruction: Instruction) -> Op {
    let decoded = generic::Decoded { run: generic::of(&instruction), instruction };
    Op {
        handler: handler(general),
        immediate: cpu.decoded.insert(decoded).into(),
        displacement: 0,
        offset: instruction.ip() as u16,
        length: instruction.len() as u8,
        a: 0,
        b: 0,
        base: 0,
        index: 0,
        scale: 0,
        segment: 0,
        stack: is_on_stack(&instruction, cpu.code_size),
        general: true,
    }
}

/// True if the memory operand is on the stack segment: in 64-bit code by its base alone, since it
/// ignores overrides other than FS and GS (SDM volume 1, 3.3.7.1).
pub(super) fn is_on_stack(instruction: &Instruction, size: CodeSize) -> bool {
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
