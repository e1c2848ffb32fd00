//! Control and status words, the environment, and the whole state.

use super::frame::{require_available, require_none_pending};
use super::stack::{C1, EXCEPTIONS, SUMMARY, Stack, is_empty_in, settle_loaded};
use crate::soft::exception::Exception;
use crate::soft::vector::VectorContext;
use crate::soft::vector::operands::{memory, set_general_or_memory};
use crate::state::X87State;
use iced_x86::{Instruction, Register};

/// The two protected-mode formats of an environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Seven words: 16-bit operand size.
    Words,
    /// Seven double words: 32-bit operand size.
    Doubles,
}

impl Format {
    const fn length(self) -> usize {
        match self {
            Self::Words => 14,
            Self::Doubles => 28,
        }
    }
}

const REGISTERS: usize = 80;
const LONGEST: usize = 28 + REGISTERS;

/// Whether pending exceptions are delivered first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// The forms with a `WAIT` before them.
    Yes,
    /// `FNSTCW` and its like.
    No,
}

fn begin<C: VectorContext>(cpu: &mut C, waiting: Waiting) -> Result<X87State, Exception> {
    require_available(cpu)?;
    if waiting == Waiting::Yes {
        require_none_pending(cpu)?;
    }
    Ok(*cpu.x87())
}

/// An instruction that only changes the state.
pub(super) fn change<C: VectorContext>(
    cpu: &mut C,
    waiting: Waiting,
    f: impl FnOnce(&mut X87State),
) -> Result<(), Exception> {
    let mut x87 = begin(cpu, waiting)?;
    f(&mut x87);
    *cpu.x87() = x87;
    Ok(())
}

/// `FINIT`. The registers keep their contents.
pub(super) fn initialise(x87: &mut X87State) {
    x87.set_top(0);
    *x87 = X87State { registers: x87.registers, ..X87State::default() };
}

/// `FCLEX`: the flags, SF, ES and B.
pub(super) fn clear_exceptions(x87: &mut X87State) {
    x87.status &= !(0x7F | SUMMARY);
}

/// `FINCSTP`, `FDECSTP`.
pub(super) fn move_top(x87: &mut X87State, by: usize) {
    x87.set_codes(C1, 0);
    x87.set_top((x87.top() + by) & 7);
}

/// `FLDCW`.
pub(super) fn load_control<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    let mut x87 = begin(cpu, Waiting::Yes)?;
    x87.control = memory::<2, C>(cpu, instruction)? as u16 & 0x1F3F | 0x40;
    x87.summarise();
    *cpu.x87() = x87;
    Ok(())
}

/// `FSTCW`.
pub(super) fn store_control<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    waiting: Waiting,
) -> Result<(), Exception> {
    let control = begin(cpu, waiting)?.control;
    set_general_or_memory::<2, C>(cpu, instruction, u64::from(control))
}

/// `FSTSW`, to AX or memory.
pub(super) fn store_status<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    waiting: Waiting,
) -> Result<(), Exception> {
    let status = begin(cpu, waiting)?.status;
    if instruction.op0_register() == Register::AX {
        cpu.set_general(Register::AX, u64::from(status));
        return Ok(());
    }
    set_general_or_memory::<2, C>(cpu, instruction, u64::from(status))
}

/// The environment's fields in order; a double word's unused half is all ones.
fn environment(x87: &X87State, format: Format) -> [u8; 28] {
    const UNUSED: u32 = 0xFFFF_0000;
    let words = [u32::from(x87.control), u32::from(x87.status), u32::from(x87.tags)];
    let (instruction, data) = (x87.instruction as u32, x87.data as u32);
    let mut bytes = [0; 28];
    match format {
        Format::Words => {
            let fields = [words[0], words[1], words[2], instruction, 0, data, 0];
            for (slot, field) in bytes.chunks_exact_mut(2).zip(fields) {
                slot.copy_from_slice(&(field as u16).to_le_bytes());
            }
        }
        Format::Doubles => {
            let selector_and_opcode = u32::from(x87.opcode & 0x7FF) << 16;
            let [control, status, tags] = words.map(|word| word | UNUSED);
            let fields = [control, status, tags, instruction, selector_and_opcode, data, UNUSED];
            for (slot, field) in bytes.chunks_exact_mut(4).zip(fields) {
                slot.copy_from_slice(&field.to_le_bytes());
            }
        }
    }
    bytes
}

/// Loads an environment; the registers stay in their physical places.
fn load_fields(x87: &mut X87State, bytes: &[u8], format: Format) {
    let stride = format.length() / 7;
    let field = |index: usize| {
        let mut field = [0; 4];
        field[..stride].copy_from_slice(&bytes[index * stride..(index + 1) * stride]);
        u32::from_le_bytes(field)
    };
    x87.control = field(0) as u16;
    x87.set_top((field(1) >> 11 & 7) as usize);
    x87.status = field(1) as u16;
    let tags = field(2) as u16;
    x87.instruction = u64::from(field(3));
    x87.opcode = if format == Format::Doubles { (field(4) >> 16) as u16 & 0x7FF } else { 0 };
    x87.data = u64::from(field(5));
    settle_loaded(x87, |physical| is_empty_in(tags, physical));
}

/// `FSTENV`: then every exception is masked.
pub(super) fn store_environment<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    format: Format,
    waiting: Waiting,
) -> Result<(), Exception> {
    let mut x87 = begin(cpu, waiting)?;
    let bytes = environment(&x87, format);
    cpu.store(cpu.effective_address(instruction), &bytes[..format.length()])?;
    x87.control |= EXCEPTIONS;
    x87.summarise();
    *cpu.x87() = x87;
    Ok(())
}

/// `FLDENV`.
pub(super) fn load_environment<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    format: Format,
) -> Result<(), Exception> {
    let mut x87 = begin(cpu, Waiting::Yes)?;
    let mut bytes = [0; 28];
    cpu.load(cpu.effective_address(instruction), &mut bytes[..format.length()])?;
    load_fields(&mut x87, &bytes, format);
    *cpu.x87() = x87;
    Ok(())
}

/// `FSAVE`: the environment, the registers from ST(0) on; then `FINIT`.
pub(super) fn save<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    format: Format,
    waiting: Waiting,
) -> Result<(), Exception> {
    let mut x87 = begin(cpu, waiting)?;
    let length = format.length();
    let mut bytes = [0; LONGEST];
    bytes[..28].copy_from_slice(&environment(&x87, format));
    for (slot, register) in bytes[length..].chunks_exact_mut(10).zip(x87.registers) {
        slot.copy_from_slice(&register);
    }
    cpu.store(cpu.effective_address(instruction), &bytes[..length + REGISTERS])?;
    initialise(&mut x87);
    *cpu.x87() = x87;
    Ok(())
}

/// `FRSTOR`.
pub(super) fn restore<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    format: Format,
) -> Result<(), Exception> {
    let mut x87 = begin(cpu, Waiting::Yes)?;
    let length = format.length();
    let mut bytes = [0; LONGEST];
    cpu.load(cpu.effective_address(instruction), &mut bytes[..length + REGISTERS])?;
    load_fields(&mut x87, &bytes, format);
    for (register, slot) in x87.registers.iter_mut().zip(bytes[length..].chunks_exact(10)) {
        register.copy_from_slice(slot);
    }
    let tags = x87.tags;
    settle_loaded(&mut x87, |physical| is_empty_in(tags, physical));
    *cpu.x87() = x87;
    Ok(())
}

/// `FFREE`.
pub(super) fn free(x87: &mut X87State, index: usize) {
    x87.set_codes(C1, 0);
    x87.free(index);
}

/// `FFREEP`: frees ST(`index`), then pops.
pub(super) fn free_and_pop(x87: &mut X87State, index: usize) {
    free(x87, index);
    x87.pop();
}
