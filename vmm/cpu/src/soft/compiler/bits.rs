//! Bit scans and bit tests.

use super::address::{Access, Extent};
use super::asm::*;
use super::frame::{home, slot, spill};
use super::operands::Form;
use super::translate::{Translator, Unsupported};
use crate::soft::flags::{ARITHMETIC, CF, ZF};
use crate::soft::operand::{index, width};
use iced_x86::{Instruction, Mnemonic, OpKind};

impl Translator {
    pub(super) fn scan(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let wide = width(i, 0) == 8;
        if width(i, 0) < 4 {
            return Err(Unsupported);
        }
        let opcode = [0x0F, if i.mnemonic() == Mnemonic::Bsf { 0xBC } else { 0xBD }];
        if i.op1_kind() == OpKind::Memory {
            let extent = Extent::of(width(i, 0));
            let mem = self.look_up(self.address_of(i)?, Access::Read, extent, false);
            self.a.op_m(wide, &opcode, R14, mem);
        } else {
            let guest = index(i.op1_register());
            match home(guest) {
                Some(reg) => self.a.op_r(wide, &opcode, R14, reg),
                None => self.a.op_m(wide, &opcode, R14, Mem::frame(spill(guest))),
            }
        }
        // Of zero there is no position: cmovnz.
        let guest = index(i.op0_register());
        match home(guest) {
            Some(reg) => self.a.op_r(QUAD, &[0x0F, 0x45], reg, R14),
            None => {
                self.a.load(RAX, Mem::frame(spill(guest)));
                self.a.op_r(QUAD, &[0x0F, 0x45], RAX, R14);
                self.a.store(Mem::frame(spill(guest)), RAX);
            }
        }
        self.flags.wrote(ZF, ARITHMETIC & !ZF);
        Ok(())
    }

    /// Changes CF alone, and hosts need not leave the others.
    pub(super) fn test_bit(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let memory = i.op0_kind() == OpKind::Memory;
        self.flags.save(&mut self.a);
        let changes = i.mnemonic() != Mnemonic::Bt;
        if memory && i.op1_kind() == OpKind::Register {
            self.test_bit_of_string(i, changes)?;
        } else {
            let form = Form { writes: u8::from(changes), ..Form::MOVE }.into_first(i);
            self.same(i, form)?;
        }
        // setc [rsp]; movzx eax, byte [rsp]; and byte [rsp + FLAGS + 1], not CF; or it with al;
        // bt eax, 0
        self.a.op_m(LONG, &[0x0F, 0x92], Reg(0), Mem::frame(slot::TEMPORARY));
        self.a.op_m(LONG, &[0x0F, 0xB6], RAX, Mem::frame(slot::TEMPORARY));
        self.a.op_m(LONG, &[0x80], Reg(4), Mem::frame(slot::FLAGS + 1));
        self.a.raw(&[!(CF as u8)]);
        self.a.op_m(LONG, &[0x08], RAX, Mem::frame(slot::FLAGS + 1));
        self.a.raw(&[0x0F, 0xBA, 0xE0, 0x00]);
        self.flags.saved(CF);
        Ok(())
    }

    /// In memory a bit of any number is found from the operand's address on.
    fn test_bit_of_string(&mut self, i: &Instruction, changes: bool) -> Result<(), Unsupported> {
        let bytes = i.op1_register().size();
        let number = home(index(i.op1_register())).ok_or(Unsupported)?;
        if bytes < 4 {
            return Err(Unsupported);
        }
        let wide = bytes == 8;
        self.flags.clobber();
        self.compute(R14, self.address_of(i)?, Some(RAX));
        if wide {
            self.a.mov(RAX, number);
        } else {
            // movsxd
            self.a.op_r(QUAD, &[0x63], RAX, number);
        }
        // sar rax, …
        self.a.op_r(QUAD, &[0xC1], Reg(7), RAX);
        self.a.raw(&[if wide { 6 } else { 5 }]);
        self.a.lea(R14, Mem { base: Some(R14), index: Some((RAX, bytes as u32)), disp: 0 });
        self.a.store(Mem::frame(slot::TEMPORARY), R14);
        let access = if changes { Access::Write } else { Access::Read };
        self.look_up_r14(access, Extent::of(bytes));
        self.a.load(RAX, Mem::frame(slot::TEMPORARY));
        self.a.lea(R14, Mem { base: Some(R14), index: Some((RAX, 1)), disp: 0 });
        let place = Mem::at(R14, 0);
        self.a.op_m(wide, &[0x8B], RAX, place);
        let opcode = match i.mnemonic() {
            Mnemonic::Bt => 0xA3,
            Mnemonic::Bts => 0xAB,
            Mnemonic::Btr => 0xB3,
            _ => 0xBB,
        };
        self.a.op_r(wide, &[0x0F, opcode], number, RAX);
        if changes {
            self.a.op_m(wide, &[0x89], RAX, place);
        }
        Ok(())
    }
}
