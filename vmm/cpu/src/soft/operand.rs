//! Operands of decoded instructions, read and written the general way.
//!
//! Instructions are decoded as if their block began at address 0, because a block serves every
//! linear address it is mapped at: addresses relative to RIP, and branch targets, are relative
//! to the block's beginning.

use super::cpu::{Cpu, slot};
use super::event::{Flow, Trap};
use super::flags::cut;
use iced_x86::{Instruction, OpKind, Register};

/// Evaluates an expression with `$T` standing for the unsigned integer of so many bytes.
macro_rules! by_width {
    ($bytes:expr, $T:ident => $body:expr) => {
        match $bytes {
            1 => {
                type $T = u8;
                $body
            }
            2 => {
                type $T = u16;
                $body
            }
            4 => {
                type $T = u32;
                $body
            }
            _ => {
                type $T = u64;
                $body
            }
        }
    };
}
pub(super) use by_width;

/// The number of the general register that `register` is a part of.
pub(super) fn index(register: Register) -> u8 {
    register.full_register().number() as u8
}

/// True for AH, CH, DH and BH.
pub(super) fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// True for a general register that is the low part of its slot.
pub(super) fn is_low_gpr(register: Register) -> bool {
    register.is_gpr() && !is_high_byte(register)
}

/// True for an immediate of any width.
pub(super) const fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// The register slot of an address component.
pub(super) fn address_slot(register: Register) -> u8 {
    match register {
        Register::None => slot::ZERO,
        Register::RIP | Register::EIP => slot::RIP,
        other => index(other),
    }
}

/// The slot of the base of a segment register: only FS and GS have one.
pub(super) fn segment_slot(register: Register) -> u8 {
    match register {
        Register::FS => slot::FS,
        Register::GS => slot::GS,
        _ => slot::ZERO,
    }
}

/// The bits of the memory operand's offset: by its registers, or by its displacement alone.
pub(super) fn address_mask(instruction: &Instruction) -> u64 {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let bytes = match (base, index) {
        (Register::None, Register::None) => instruction.memory_displ_size(),
        _ if base.is_gpr32() || base == Register::EIP || index.is_gpr32() => 4,
        _ if base.is_gpr16() || index.is_gpr16() => 2,
        _ => 8,
    };
    match bytes {
        2 => 0xFFFF,
        4 => u64::from(u32::MAX),
        _ => u64::MAX,
    }
}

/// True if the memory operand is addressed with less than 64 bits.
pub(super) fn has_short_address(instruction: &Instruction) -> bool {
    address_mask(instruction) != u64::MAX
}

/// Width of an operand in bytes.
pub(super) fn width(instruction: &Instruction, operand: u32) -> usize {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size(),
        OpKind::Immediate8 | OpKind::Immediate8_2nd => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
        OpKind::Immediate64 | OpKind::Immediate8to64 | OpKind::Immediate32to64 => 8,
        _ => instruction.memory_size().size(),
    }
}

impl Cpu {
    /// Address of the instruction being executed.
    pub(super) fn own_address(&self, instruction: &Instruction) -> u64 {
        self.rip().wrapping_add(instruction.ip())
    }

    /// The target of a near branch.
    pub(super) fn branch_target(&self, instruction: &Instruction) -> u64 {
        self.rip().wrapping_add(instruction.near_branch_target())
    }

    /// The memory operand's address within its segment, as `LEA` gives it.
    pub(super) fn offset_of(&self, instruction: &Instruction) -> u64 {
        let base = self.full(address_slot(instruction.memory_base()));
        let index = self.full(address_slot(instruction.memory_index()));
        let offset = base
            .wrapping_add(index.wrapping_mul(u64::from(instruction.memory_index_scale())))
            .wrapping_add(instruction.memory_displacement64());
        offset & address_mask(instruction)
    }

    /// The memory operand's linear address.
    pub(super) fn address_of(&self, instruction: &Instruction) -> u64 {
        let offset = self.offset_of(instruction);
        if !self.is_long() {
            let len = instruction.memory_size().size();
            return self.in_operand_segment(instruction, offset, len);
        }
        offset.wrapping_add(self.full(segment_slot(instruction.memory_segment())))
    }

    /// A general or segment register, zero-extended.
    pub(super) fn register(&self, register: Register) -> u64 {
        if register.is_segment_register() {
            return u64::from(self.selector(register.number() as u8));
        }
        let value = self.full(index(register));
        if is_high_byte(register) {
            return (value >> 8) & 0xFF;
        }
        by_width!(register.size(), T => cut::<T>(value))
    }

    fn selector(&self, number: u8) -> u16 {
        let segments = &self.segments;
        match number {
            0 => segments.es.selector,
            1 => segments.cs.selector,
            2 => segments.ss.selector,
            3 => segments.ds.selector,
            4 => segments.fs.selector,
            _ => segments.gs.selector,
        }
    }

    /// Writes a general register; see [`Cpu::set_reg`].
    pub(super) fn set_register(&mut self, register: Register, value: u64) {
        let number = index(register);
        if is_high_byte(register) {
            let rest = self.full(number) & !0xFF00;
            self.set_full(number, rest | (cut::<u8>(value) << 8));
            return;
        }
        by_width!(register.size(), T => self.set_reg::<T>(number, cut::<T>(value)));
    }

    /// An operand's value, zero-extended from its width; immediates are sign-extended to 64 bits
    /// where the instruction says so.
    pub(super) fn get(&mut self, instruction: &Instruction, operand: u32) -> Result<u64, Trap> {
        match instruction.op_kind(operand) {
            OpKind::Register => Ok(self.register(instruction.op_register(operand))),
            OpKind::Memory => {
                let address = self.address_of(instruction);
                by_width!(instruction.memory_size().size(), T => self.load::<T>(address))
            }
            _ => Ok(instruction.immediate(operand)),
        }
    }

    /// As [`Self::get`], for an operand that the same instruction will write.
    pub(super) fn get_for_update(
        &mut self,
        instruction: &Instruction,
        operand: u32,
    ) -> Result<u64, Trap> {
        if instruction.op_kind(operand) != OpKind::Memory {
            return self.get(instruction, operand);
        }
        let address = self.address_of(instruction);
        by_width!(instruction.memory_size().size(), T => self.load_for_update::<T>(address))
    }

    /// Writes the low bytes of `value` to an operand.
    pub(super) fn put(&mut self, instruction: &Instruction, operand: u32, value: u64) -> Flow {
        if instruction.op_kind(operand) == OpKind::Register {
            self.set_register(instruction.op_register(operand), value);
            return Ok(());
        }
        let address = self.address_of(instruction);
        by_width!(instruction.memory_size().size(), T => self.store::<T>(address, value))
    }
}
