//! What surrounds every x87 instruction: availability, pending exceptions, operands in memory,
//! the pointers to the last instruction, and committing the state only at the end.

use super::stack::SUMMARY;
use crate::soft::exception::Exception;
use crate::soft::vector::VectorContext;
use crate::soft::vector::operands::{CR0_EM, CR0_MP, CR0_TS};
use crate::state::X87State;
use iced_x86::{Instruction, OpKind, Register};

/// `#NM` if the unit is not available.
pub(super) fn require_available<C: VectorContext>(cpu: &C) -> Result<(), Exception> {
    if cpu.cr0() & (CR0_EM | CR0_TS) != 0 { Err(Exception::DeviceNotAvailable) } else { Ok(()) }
}

/// `#MF` if an unmasked exception waits. CR0.NE is taken as set: there is no FERR# line.
pub(in super::super) fn require_none_pending<C: VectorContext>(
    cpu: &mut C,
) -> Result<(), Exception> {
    if cpu.x87().status & SUMMARY != 0 { Err(Exception::X87FloatingPoint) } else { Ok(()) }
}

/// `WAIT`.
pub(super) fn wait<C: VectorContext>(cpu: &mut C) -> Result<(), Exception> {
    if cpu.cr0() & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        return Err(Exception::DeviceNotAvailable);
    }
    require_none_pending(cpu)
}

/// An instruction without a memory operand.
pub(super) fn plain<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(&mut X87State),
) -> Result<(), Exception> {
    let mut x87 = begin(cpu)?;
    f(&mut x87);
    finish(cpu, instruction, x87);
    Ok(())
}

/// An instruction that reads `BYTES` bytes of memory.
pub(super) fn reading<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(&mut X87State, &[u8; BYTES]),
) -> Result<(), Exception> {
    let mut x87 = begin(cpu)?;
    let mut operand = [0; BYTES];
    cpu.load(cpu.effective_address(instruction), &mut operand)?;
    f(&mut x87, &operand);
    finish(cpu, instruction, x87);
    Ok(())
}

/// An instruction that writes `BYTES` bytes of memory, unless `f` finds that it must not.
pub(super) fn writing<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    f: impl FnOnce(&mut X87State) -> Option<[u8; BYTES]>,
) -> Result<(), Exception> {
    let mut x87 = begin(cpu)?;
    if let Some(bytes) = f(&mut x87) {
        cpu.store(cpu.effective_address(instruction), &bytes)?;
    }
    finish(cpu, instruction, x87);
    Ok(())
}

fn begin<C: VectorContext>(cpu: &mut C) -> Result<X87State, Exception> {
    require_available(cpu)?;
    require_none_pending(cpu)?;
    Ok(*cpu.x87())
}

/// Commits. As current Intel CPUs do (CPUID.7.EBX bit 6, FDP_EXCPTN_ONLY, and fopcode without
/// compatibility mode), FIP follows every instruction, FDP and FOP only those that raise an
/// unmasked exception.
fn finish<C: VectorContext>(cpu: &mut C, instruction: &Instruction, mut x87: X87State) {
    x87.instruction = cpu.instruction_address();
    if x87.status & SUMMARY != 0 {
        x87.opcode = opcode(cpu, instruction);
        let has_memory =
            (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
        x87.data = if has_memory { cpu.effective_address(instruction) } else { 0 };
    }
    *cpu.x87() = x87;
}

/// The 11 bits of the opcode that FOP holds, from the instruction's bytes.
fn opcode<C: VectorContext>(cpu: &mut C, instruction: &Instruction) -> u16 {
    let mut bytes = [0; 15];
    let length = instruction.len().min(bytes.len());
    let address = cpu.instruction_address();
    if cpu.load(address, &mut bytes[..length]).is_err() {
        return 0;
    }
    bytes
        .windows(2)
        .find(|pair| pair[0] & 0xF8 == 0xD8)
        .map_or(0, |pair| u16::from(pair[0] & 7) << 8 | u16::from(pair[1]))
}

/// The number of an ST register operand.
pub(super) fn st_number(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::ST0 as usize) & 7
}
