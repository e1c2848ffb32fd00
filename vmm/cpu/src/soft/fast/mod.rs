//! Specialised forms of the frequent instructions.
//!
//! [`select`] finds one for an instruction, if there is one; what it does must be what the
//! general path does. Nothing here handles high-byte registers or 32-bit addresses.

mod handlers;
mod memory;

use super::compat::CodeSize;
use super::cpu::slot;
use super::op::{self, Handler, Op, ScaledIndex};
use super::operand::{
    address_slot, has_short_address, index, is_immediate, is_low_gpr, segment_slot,
};
use super::ops::{alu, shift};
use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind};

/// The shape of an instruction's operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    RegReg,
    RegImm,
    RegMem,
    MemReg,
    MemImm,
    Reg,
    Mem,
    Imm,
    Branch,
    None,
}

/// What selection needs to know of an instruction.
#[derive(Debug, Clone, Copy)]
struct Seen {
    form: Form,
    /// Bytes of the first operand.
    width: usize,
    /// The memory operand needs the full address computation.
    full: bool,
}

/// The specialised op for an instruction, if there is one.
pub(super) fn select(instruction: &Instruction, size: CodeSize) -> Option<Op> {
    if size != CodeSize::Long && !is_alike(instruction) {
        return None;
    }
    let (seen, mut op) = look(instruction)?;
    op.handler = handler(instruction, seen)?;
    Some(op)
}

/// True if 64-bit code and other code cannot differ in what the instruction does: it touches
/// neither memory nor the stack, and does not branch.
fn is_alike(instruction: &Instruction) -> bool {
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    !memory
        && !instruction.is_stack_instruction()
        && instruction.flow_control() == FlowControl::Next
}

fn look(i: &Instruction) -> Option<(Seen, Op)> {
    let mut op = Op::bare(i, CodeSize::Long, false);
    let mut immediate = 0;
    let mut kinds = [Kind::None; 2];
    for operand in 0..i.op_count() {
        let kind = kind(i, operand)?;
        match (operand, kind) {
            (0, Kind::Reg) => op.a = index(i.op_register(0)),
            (1, Kind::Reg) => op.b = index(i.op_register(1)),
            (_, Kind::Imm) => immediate = i.immediate(operand),
            (_, Kind::Branch) => immediate = i.near_branch_target(),
            _ => {}
        }
        match operand {
            0 | 1 => kinds[operand as usize] = kind,
            // The third operand of IMUL.
            2 if kind == Kind::Imm => {}
            _ => return None,
        }
    }
    let mut full = false;
    if kinds.contains(&Kind::Mem) {
        full = look_at_memory(i, &mut op)?;
    }
    let form = match kinds {
        [Kind::Reg, Kind::Reg] => Form::RegReg,
        [Kind::Reg, Kind::Imm] => Form::RegImm,
        [Kind::Reg, Kind::Mem] => Form::RegMem,
        [Kind::Mem, Kind::Reg] => Form::MemReg,
        [Kind::Mem, Kind::Imm] => Form::MemImm,
        [Kind::Reg, Kind::None] => Form::Reg,
        [Kind::Mem, Kind::None] => Form::Mem,
        [Kind::Imm, Kind::None] => Form::Imm,
        [Kind::Branch, Kind::None] => Form::Branch,
        [Kind::None, Kind::None] => Form::None,
        _ => return None,
    };
    let width = if i.op_count() > 0 { super::operand::width(i, 0) } else { 0 };
    op.low = immediate as i32;
    if form == Form::RegImm {
        op.high = (immediate >> 32) as i32;
    } else if op.immediate() != immediate && (width == 8 || form == Form::Branch) {
        // A branch farther than there are branches.
        return None;
    }
    Some((Seen { form, width, full }, op))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Reg,
    Mem,
    Imm,
    Branch,
}

fn kind(i: &Instruction, operand: u32) -> Option<Kind> {
    match i.op_kind(operand) {
        OpKind::Register => {
            let register = i.op_register(operand);
            is_low_gpr(register).then_some(Kind::Reg)
        }
        OpKind::Memory => Some(Kind::Mem),
        OpKind::NearBranch64 => Some(Kind::Branch),
        kind if is_immediate(kind) => Some(Kind::Imm),
        _ => None,
    }
}

/// Fills in the memory operand; true if it needs the full address computation.
fn look_at_memory(i: &Instruction, op: &mut Op) -> Option<bool> {
    if has_short_address(i) {
        return None;
    }
    op.high = i32::try_from(i.memory_displacement64() as i64).ok()?;
    op.base = address_slot(i.memory_base());
    op.index = ScaledIndex::new(address_slot(i.memory_index()), i.memory_index_scale());
    op.segment = segment_slot(i.memory_segment());
    Some(op.index != ScaledIndex::NONE || op.segment != slot::ZERO)
}

fn handler(i: &Instruction, seen: Seen) -> Option<Handler> {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Mov => handlers::mov(seen),
        M::Add => handlers::binary::<alu::Add>(seen),
        M::Adc => handlers::binary::<alu::Adc>(seen),
        M::Sub => handlers::binary::<alu::Sub>(seen),
        M::Sbb => handlers::binary::<alu::Sbb>(seen),
        M::And => handlers::binary::<alu::And>(seen),
        M::Or => handlers::binary::<alu::Or>(seen),
        M::Xor => handlers::binary::<alu::Xor>(seen),
        M::Cmp => handlers::binary::<alu::Cmp>(seen),
        M::Test => handlers::binary::<alu::Test>(seen),
        M::Inc => handlers::unary::<handlers::Inc>(seen),
        M::Dec => handlers::unary::<handlers::Dec>(seen),
        M::Neg => handlers::unary::<handlers::Neg>(seen),
        M::Not => handlers::unary::<handlers::Not>(seen),
        M::Shl | M::Sal => handlers::shift::<shift::Shl>(i, seen),
        M::Shr => handlers::shift::<shift::Shr>(i, seen),
        M::Sar => handlers::shift::<shift::Sar>(i, seen),
        M::Rol => handlers::shift::<shift::Rol>(i, seen),
        M::Ror => handlers::shift::<shift::Ror>(i, seen),
        M::Imul => handlers::imul(i, seen),
        M::Movzx => handlers::movzx(i, seen),
        M::Movsx | M::Movsxd => handlers::movsx(i, seen),
        M::Lea => handlers::lea(i, seen),
        M::Xchg => handlers::xchg(seen),
        M::Push => handlers::push(seen),
        M::Pop => handlers::pop(seen),
        M::Call => handlers::call(seen),
        M::Jmp => handlers::jmp(seen),
        M::Ret => (i.code() == iced_x86::Code::Retnq).then(|| op::handler(handlers::ret)),
        M::Leave => (i.code() == iced_x86::Code::Leaveq).then(|| op::handler(handlers::leave)),
        M::Cdqe => Some(op::handler(handlers::cdqe)),
        M::Nop | M::Endbr64 | M::Pause => Some(op::handler(handlers::nop)),
        _ => conditional(i, seen),
    }
}

fn conditional(i: &Instruction, seen: Seen) -> Option<Handler> {
    use Mnemonic as M;
    macro_rules! by_condition {
        ($($name:ident $jump:ident $set:ident $move:ident $number:literal),* $(,)?) => {
            match i.mnemonic() {
                $(
                    M::$jump => handlers::jcc::<$number>(seen),
                    M::$set => handlers::setcc::<$number>(seen),
                    M::$move => handlers::cmov::<$number>(seen),
                )*
                _ => None,
            }
        };
    }
    by_condition!(
        O Jo Seto Cmovo 0, No Jno Setno Cmovno 1, B Jb Setb Cmovb 2, Ae Jae Setae Cmovae 3,
        E Je Sete Cmove 4, Ne Jne Setne Cmovne 5, Be Jbe Setbe Cmovbe 6, A Ja Seta Cmova 7,
        S Js Sets Cmovs 8, Ns Jns Setns Cmovns 9, P Jp Setp Cmovp 10, Np Jnp Setnp Cmovnp 11,
        L Jl Setl Cmovl 12, Ge Jge Setge Cmovge 13, Le Jle Setle Cmovle 14, G Jg Setg Cmovg 15,
    )
}
