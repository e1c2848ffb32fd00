//! Branches, calls and returns.
//!
//! A branch leaves at its own instruction, with nothing done, as long as it is not known where it
//! leads: the interpreter then takes it, and faults if it has to.

use super::address::{Access, Address, Extent};
use super::asm::*;
use super::flag_state::of_condition;
use super::frame::{home, slot, spill};
use super::integer::condition_of;
use super::translate::{Translator, Unsupported};
use crate::soft::operand::index;
use iced_x86::{Code, Instruction, OpKind};

/// The distance from the block's beginning to the target.
fn distance(i: &Instruction) -> Result<i32, Unsupported> {
    i32::try_from(i.near_branch_target() as i64).map_err(|_| Unsupported)
}

impl Translator {
    /// Translates a branch, or `None` if it is none of those known here.
    pub(super) fn branch(&mut self, i: &Instruction) -> Option<Result<(), Unsupported>> {
        Some(match i.code() {
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => self.jump(i),
            Code::Call_rel32_64 => self.call(i),
            Code::Retnq => self.ret(0),
            Code::Retnq_imm16 => self.ret(i.immediate16().into()),
            Code::Jmp_rm64 => self.jump_indirect(i),
            Code::Call_rm64 => self.call_indirect(i),
            _ if i.is_jcc_short_or_near() => self.jump_if(i),
            _ => return None,
        })
    }

    fn jump(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let distance = distance(i)?;
        self.page_offset.checked_add(distance).ok_or(Unsupported)?;
        self.flags.save(&mut self.a);
        self.go(distance, false);
        Ok(())
    }

    fn jump_if(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        if i.op0_kind() != OpKind::NearBranch64 {
            return Err(Unsupported);
        }
        let condition = condition_of(i).ok_or(Unsupported)?;
        let taken = distance(i)?;
        self.page_offset.checked_add(taken).ok_or(Unsupported)?;
        let flags = of_condition(condition);
        // Restoring may lose nothing that was not saved; saving may lose what is to be restored.
        self.flags.save(&mut self.a);
        self.flags.need(&mut self.a, flags);
        let hole = self.a.jcc(condition);
        self.go_beside(hole, taken);
        Ok(())
    }

    fn call(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let distance = distance(i)?;
        if self.is_near(distance)? {
            let top = self.push_place();
            self.push_return(i, top);
            self.go(distance, true);
            return Ok(());
        }
        let exit = self.own_exit();
        let frame = self.check_page(distance, exit);
        let top = self.push_place();
        self.push_return(i, top);
        self.compute_page(distance);
        self.a.store(Mem::frame(slot::PAGE), R14);
        self.jump_away(distance, frame, exit);
        Ok(())
    }

    /// Stores the address behind the call, and moves RSP.
    fn push_return(&mut self, i: &Instruction, top: Mem) {
        self.a.load(RAX, Mem::frame(slot::PAGE));
        let behind = self.page_offset + i.next_ip() as i32;
        self.a.lea(RAX, Mem::at(RAX, behind));
        self.a.store(top, RAX);
        self.move_stack(-8);
    }

    fn ret(&mut self, extra: i32) -> Result<(), Unsupported> {
        let mem = self.look_up(Address::at(4, 0), Access::Read, Extent::of(8), false);
        self.a.load(R14, mem);
        self.resolve();
        self.move_stack(8 + extra);
        self.enter_page();
        self.a.raw(&[0x41, 0xFF, 0xE6]);
        Ok(())
    }

    /// Loads the operand, a target, into R14.
    fn target_operand(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        if i.op0_kind() == OpKind::Memory {
            let mem = self.look_up(self.address_of(i)?, Access::Read, Extent::of(8), false);
            self.a.load(R14, mem);
            return Ok(());
        }
        let guest = index(i.op0_register());
        match home(guest) {
            Some(reg) => self.a.mov(R14, reg),
            None => self.a.load(R14, Mem::frame(spill(guest))),
        }
        Ok(())
    }

    fn jump_indirect(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        self.target_operand(i)?;
        self.resolve();
        self.enter_page();
        self.a.raw(&[0x41, 0xFF, 0xE6]);
        Ok(())
    }

    fn call_indirect(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        self.target_operand(i)?;
        self.resolve();
        self.a.store(Mem::frame(slot::EXIT), R14);
        let top = self.push_place();
        self.push_return(i, top);
        self.enter_page();
        // jmp [rsp + EXIT]
        self.a.op_m(LONG, &[0xFF], Reg(4), Mem::frame(slot::EXIT));
        Ok(())
    }
}
