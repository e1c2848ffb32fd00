//! SSE, MMX and x87 instructions of the soft engine.
//!
//! [`execute`] runs one instruction against a [`VectorContext`], which the CPU implements; it
//! checks the control registers, reads operands, computes, and commits only when nothing
//! faulted. What lives where:
//!
//! | file | idea |
//! |---|---|
//! | `sse`, `mmx`, `x87` | which code runs which function |
//! | `operands` | registers, memory operands, alignment, `#UD` and `#NM` |
//! | `lanes`, `integer`, `horizontal`, `shuffle` | packed integers, plain values in and out |
//! | `float`, `compare`, `convert`, `approx` | SSE floating point |
//! | `aes`, `sha` | AES-NI, `PCLMULQDQ`, the SHA extensions |
//! | `moves`, `strings`, `state` | data movement, `PCMPxSTRx` and `CRC32`, saved images |
//! | `host_sse`, `host_x87` | the only `unsafe`: IEEE operations done by the host's own units |
//!
//! Not here: general-purpose instructions, `POPCNT`, fences and prefetches, decoding, paging.

/// Declares which codes a module executes, and how: `supports` and `handler` from one list.
macro_rules! instructions {
    ($cpu:ident, $instruction:ident; $($($code:ident)|+ => $action:expr),+ $(,)?) => {
        /// Whether this module executes `code`.
        pub(super) fn supports(code: iced_x86::Code) -> bool {
            matches!(code, $($(iced_x86::Code::$code)|+)|+)
        }

        /// What executes `code`, if this module does.
        #[inline]
        pub(super) fn handler<C: $crate::soft::vector::VectorContext>(
            code: iced_x86::Code,
        ) -> Option<$crate::soft::vector::Handler<C>> {
            #[allow(unused_variables, reason = "some need no more than the CPU")]
            let handler: $crate::soft::vector::Handler<C> = match code {
                $($(iced_x86::Code::$code)|+ => |$cpu, $instruction| $action,)+
                _ => return None,
            };
            Some(handler)
        }
    };
}

mod aes;
mod approx;
mod compare;
mod convert;
mod float;
mod horizontal;
mod host_sse;
mod host_x87;
mod integer;
mod lanes;
mod mmx;
mod moves;
mod operands;
mod sha;
mod shuffle;
mod sse;
pub(crate) mod state;
mod strings;
#[cfg(test)]
mod tests;
mod x87;

use super::exception::Exception;
use crate::state::{SseState, X87State};
use iced_x86::{Code, Instruction, Register};

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
    /// Raises what a store of `len` bytes would raise, and stores nothing.
    fn probe_store(&mut self, address: u64, len: usize) -> Result<(), Exception>;
}

/// Executes one instruction of a code known to it.
type Handler<C> = fn(&mut C, &Instruction) -> Result<(), Exception>;

/// Executes one SSE, MMX or x87 instruction.
///
/// # Errors
/// The exception to deliver. Registers and memory are then as before the instruction; only the
/// sticky exception flags may have changed, where the architecture says so. A code that
/// [`supports`] denies is `#UD`.
pub(super) fn execute<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    let code = instruction.code();
    let handler = sse::handler(code).or_else(|| x87::handler(code)).or_else(|| mmx::handler(code));
    handler.map_or(Err(Exception::InvalidOpcode), |handler| handler(cpu, instruction))
}

/// Whether [`execute`] knows this code.
pub(super) fn supports(code: Code) -> bool {
    sse::supports(code) || x87::supports(code) || mmx::supports(code)
}
