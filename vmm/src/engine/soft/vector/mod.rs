//! SSE and x87 instructions.

use super::exception::Exception;
use crate::engine::state::{SseState, X87State};
use iced_x86::{Instruction, Register};

/// What SSE and x87 instructions need of the CPU around them.
pub(super) trait VectorContext {
    /// The SSE unit.
    fn sse(&mut self) -> &mut SseState;
    /// The x87 unit.
    fn x87(&mut self) -> &mut X87State;
    /// CR0, for TS, EM, MP and NE.
    fn cr0(&self) -> u64;
    /// CR4, for OSFXSR and OSXMMEXCPT.
    fn cr4(&self) -> u64;
    /// Address of the instruction (for FIP).
    fn instruction_address(&self) -> u64;
    /// A general register of any width, zero-extended.
    fn general(&self, register: Register) -> u64;
    /// Writes a general register of any width; a 32-bit write clears the upper half.
    fn set_general(&mut self, register: Register, value: u64);
    /// RFLAGS.
    fn flags(&self) -> u64;
    /// Replaces the arithmetic flags (OF, SF, ZF, AF, PF, CF) by those of `flags`.
    fn set_arithmetic_flags(&mut self, flags: u64);
    /// The linear address of the instruction's memory operand, segment base included.
    fn effective_address(&self, instruction: &Instruction) -> u64;
    /// The linear address of DS:[RDI] or its override, for MASKMOVDQU.
    fn string_destination(&self, instruction: &Instruction) -> u64;
    /// Loads bytes with the current privilege; all or nothing.
    fn load(&mut self, address: u64, into: &mut [u8]) -> Result<(), Exception>;
    /// Stores bytes with the current privilege; all or nothing, also across a page boundary.
    fn store(&mut self, address: u64, bytes: &[u8]) -> Result<(), Exception>;
}

/// True if [`execute`] knows the instruction form.
pub(super) fn supports(_code: iced_x86::Code) -> bool {
    false
}

/// Executes an SSE or x87 instruction.
pub(super) fn execute(
    _context: &mut impl VectorContext,
    _instruction: &Instruction,
) -> Result<(), Exception> {
    Err(Exception::InvalidOpcode)
}
