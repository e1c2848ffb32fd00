//! SSE floating-point comparisons: masks (`CMPPS`) and flags (`COMISS`), and `PTEST`.

use super::VectorContext;
use super::float::{Shape, commit, operand, reported, settle};
use super::host_sse::{self, Ordering, Outcome};
use super::operands::{CARRY, PARITY, ZERO, destination, require_sse, source};
use crate::soft::exception::Exception;
use iced_x86::Instruction;

/// `CMPPS` and its like: bits 0–2 of the immediate are the predicate, the others are ignored.
#[inline(always)]
pub(super) fn mask<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    shape: Shape,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = operand(cpu, instruction, shape)?;
    let a = destination(cpu, instruction);
    let mxcsr = cpu.sse().mxcsr;
    let outcome = host_sse::comparison(shape, instruction.immediate8())(a, b, mxcsr);
    commit(cpu, instruction, Outcome { flags: reported(outcome.flags, mxcsr), ..outcome })
}

/// `COMISS` and its like: ZF, PF and CF; OF, SF and AF are cleared.
#[inline(always)]
pub(super) fn ordering<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    shape: Shape,
    run: fn(u128, u128, u32) -> Ordering,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = operand(cpu, instruction, shape)?;
    let a = destination(cpu, instruction);
    let ordering = run(a, b, cpu.sse().mxcsr);
    settle(cpu, ordering.flags)?;
    let flag = |set, bit| if set { bit } else { 0 };
    cpu.set_arithmetic_flags(
        flag(ordering.zero, ZERO) | flag(ordering.parity, PARITY) | flag(ordering.carry, CARRY),
    );
    Ok(())
}

/// `PTEST`: ZF if no bit is common, CF if the source has no bit the destination lacks.
pub(super) fn test<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let b = source(cpu, instruction)?;
    let a = destination(cpu, instruction);
    let zero = if a & b == 0 { ZERO } else { 0 };
    let carry = if !a & b == 0 { CARRY } else { 0 };
    cpu.set_arithmetic_flags(zero | carry);
    Ok(())
}
