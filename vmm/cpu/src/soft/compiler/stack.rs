//! Pushes and pops. RSP moves when all else is done.

use super::address::{Access, Address, Extent};
use super::asm::*;
use super::frame::{home, slot, spill};
use super::translate::{Translator, Unsupported};
use crate::soft::operand::index;
use iced_x86::{Code, Instruction, OpKind};

impl Translator {
    pub(super) fn push(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        if !matches!(
            i.code(),
            Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm8 | Code::Pushq_imm32
        ) {
            return Err(Unsupported);
        }
        if i.op0_kind() == OpKind::Memory {
            let mem = self.look_up(self.address_of(i)?, Access::Read, Extent::of(8), false);
            self.a.load(RAX, mem);
            self.a.store(Mem::frame(slot::TEMPORARY), RAX);
        }
        let top = self.push_place();
        match i.op0_kind() {
            OpKind::Memory => {
                self.a.load(RAX, Mem::frame(slot::TEMPORARY));
                self.a.store(top, RAX);
            }
            OpKind::Register => {
                let guest = index(i.op0_register());
                let reg = home(guest).unwrap_or(RAX);
                if reg == RAX {
                    self.a.load(RAX, Mem::frame(spill(guest)));
                }
                self.a.store(top, reg);
            }
            _ => {
                let value = i32::try_from(i.immediate(0) as i64).map_err(|_| Unsupported)?;
                self.a.op_m(QUAD, &[0xC7], Reg(0), top);
                self.a.raw(&value.to_le_bytes());
            }
        }
        self.move_stack(-8);
        Ok(())
    }

    /// Looks up where the next push stores.
    pub(super) fn push_place(&mut self) -> Mem {
        self.look_up(Address::at(4, -8), Access::Write, Extent::of(8), false)
    }

    /// Moves guest RSP, and leaves the flags.
    pub(super) fn move_stack(&mut self, bytes: i32) {
        self.a.lea(R12, Mem::at(R12, bytes));
    }

    pub(super) fn pop(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        if !(matches!(i.code(), Code::Pop_r64 | Code::Pop_rm64) && i.op0_kind() == OpKind::Register)
        {
            return Err(Unsupported);
        }
        let mem = self.look_up(Address::at(4, 0), Access::Read, Extent::of(8), false);
        let guest = index(i.op0_register());
        match home(guest) {
            Some(R12) => self.a.load(R12, mem),
            Some(reg) => {
                self.a.load(reg, mem);
                self.move_stack(8);
            }
            None => {
                self.a.load(RAX, mem);
                self.a.store(Mem::frame(spill(guest)), RAX);
                self.move_stack(8);
            }
        }
        Ok(())
    }

    pub(super) fn leave_frame(&mut self) -> Result<(), Unsupported> {
        let mem = self.look_up(Address::at(5, 0), Access::Read, Extent::of(8), false);
        self.a.load(RAX, mem);
        self.a.lea(R12, Mem::at(RBP, 8));
        self.a.mov(RBP, RAX);
        Ok(())
    }

    pub(super) fn push_flags(&mut self) -> Result<(), Unsupported> {
        self.flags.save(&mut self.a);
        self.flags.clobber();
        // movzx eax, byte [rsp + FLAGS + 1]; movzx r14d, byte [rsp + FLAGS]; shl r14d, 11
        self.a.op_m(LONG, &[0x0F, 0xB6], RAX, Mem::frame(slot::FLAGS + 1));
        self.a.op_m(LONG, &[0x0F, 0xB6], R14, Mem::frame(slot::FLAGS));
        self.a.shl(LONG, R14, 11);
        self.a.op_r(LONG, &[0x0B], RAX, R14);
        self.a.op_m(QUAD, &[0x0B], RAX, Mem::frame(slot::SYSTEM));
        self.a.store(Mem::frame(slot::TEMPORARY), RAX);
        let top = self.push_place();
        self.a.load(RAX, Mem::frame(slot::TEMPORARY));
        self.a.store(top, RAX);
        self.move_stack(-8);
        Ok(())
    }
}
