//! Which instructions are translated, and those among them that compute with general registers.

use super::address::{Access, Address, Extent};
use super::asm::*;
use super::flag_state::{FlagState, of_condition};
use super::frame::{home, slot, spill};
use super::operands::{Form, named, set_memory, stripped};
use super::translate::{Translator, Unsupported};
use crate::soft::flags::{AF, ARITHMETIC, CF, IF, OF, PF, SF, ZF};
use crate::soft::operand::{index, is_low_gpr, width};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// Guest RAX.
const ACCUMULATOR: Reg = R15;

/// The number in the opcode map of the condition that the instruction looks at.
pub(super) fn condition_of(i: &Instruction) -> Option<u8> {
    use iced_x86::ConditionCode as C;
    Some(match i.condition_code() {
        C::None => return None,
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    })
}

/// Encodings that no assembler makes, or that have operands which are not named.
fn is_odd(code: Code) -> bool {
    matches!(
        code,
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
            | Code::Test_rm8_imm8_F6r1
            | Code::Test_rm16_imm16_F7r1
            | Code::Test_rm32_imm32_F7r1
            | Code::Test_rm64_imm32_F7r1
    )
}

impl Translator {
    /// Translates one instruction; true if it ends the block. What is unsupported may have left bytes,
    /// which the caller takes back.
    pub(super) fn instruction(&mut self, i: &Instruction) -> Result<bool, Unsupported> {
        if let Some(done) = self.branch(i) {
            return done.map(|()| true);
        }
        self.plain(i).map(|()| false)
    }

    fn plain(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        use Mnemonic as M;
        if is_odd(i.code()) {
            return Err(Unsupported);
        }
        match i.mnemonic() {
            M::Mov => self.same(i, Form::MOVE.into_first(i)),
            M::Movzx | M::Movsx => self.same(i, Form::MOVE),
            M::Movsxd if i.code() == Code::Movsxd_r64_rm32 => self.same(i, Form::MOVE),
            M::Lea => self.lea(i),
            M::Add | M::Sub | M::And | M::Or | M::Xor | M::Neg => {
                self.same(i, Form::ARITHMETIC.into_first(i))
            }
            M::Adc | M::Sbb => self.same(i, Form::ARITHMETIC.reading(CF).into_first(i)),
            M::Cmp | M::Test => self.same(i, Form::COMPARE),
            M::Not => self.same(i, Form::MOVE.into_first(i)),
            M::Inc | M::Dec => self.same(i, Form::MOVE.flags(ARITHMETIC & !CF, 0).into_first(i)),
            M::Shl | M::Shr | M::Sar => self.shift(i),
            M::Rol | M::Ror => self.rotate(i),
            M::Imul if i.op_count() > 1 => {
                self.same(i, Form::MOVE.flags(CF | OF, SF | ZF | PF | AF))
            }
            M::Mul | M::Imul => self.multiply(i),
            M::Div => self.divide(i, false),
            M::Idiv => self.divide(i, true),
            M::Bswap if i.op0_register().size() > 2 => self.same(i, Form::MOVE),
            M::Bsf | M::Bsr => self.scan(i),
            M::Popcnt if self.host.popcnt => self.same(i, Form::MOVE.flags(ZF, ARITHMETIC & !ZF)),
            M::Bt | M::Bts | M::Btr | M::Btc => self.test_bit(i),
            M::Xchg => self.exchange(i),
            M::Xadd => self.same(i, Form { writes: 2, ..Form::ARITHMETIC.into_first(i) }),
            M::Cmpxchg => self.compare_exchange(i),
            M::Cmpxchg16b if self.host.cmpxchg16b => self.compare_exchange_wide(i),
            M::Pushfq => self.push_flags(),
            M::Cli => self.clear_interrupts(),
            M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => self.extend(i),
            M::Push => self.push(i),
            M::Pop => self.pop(i),
            M::Leave if i.code() == Code::Leaveq => self.leave_frame(),
            M::Nop
            | M::Endbr64
            | M::Pause
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetch
            | M::Prefetchw
            | M::Lfence
            | M::Mfence
            | M::Sfence => Ok(()),
            _ => self.conditional(i),
        }
    }

    fn conditional(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let Some(condition) = condition_of(i) else { return self.vector(i) };
        let reads = of_condition(condition);
        if i.op_count() == 2 {
            // CMOVcc: its source is loaded in any case.
            return self.same(i, Form::MOVE.reading(reads));
        }
        if i.op_count() == 1 && matches!(i.op0_kind(), OpKind::Register | OpKind::Memory) {
            return self.same(i, Form::MOVE.reading(reads).into_first(i));
        }
        Err(Unsupported)
    }

    fn lea(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let guest = index(i.op0_register());
        let address = self.offset_of(i)?;
        match (i.op0_register().size(), home(guest)) {
            (8, Some(reg)) => self.compute_into(reg, address),
            (4, Some(reg)) => {
                self.compute(R14, address, Some(RAX));
                self.a.mov_long(reg, R14);
            }
            (8, None) => {
                self.compute(R14, address, Some(RAX));
                self.a.store(Mem::frame(spill(guest)), R14);
            }
            (4, None) => {
                self.compute(R14, address, Some(RAX));
                self.a.mov_long(R14, R14);
                self.a.store(Mem::frame(spill(guest)), R14);
            }
            _ => return Err(Unsupported),
        }
        Ok(())
    }

    /// Computes an address whose parts may be `reg` itself.
    fn compute_into(&mut self, reg: Reg, address: Address) {
        use super::address::Part;
        let host = |part: Part| match part {
            Part::Host(reg) => Some(reg),
            Part::Slot(_) => None,
        };
        let base = address.base.map(host);
        let index = address.index.map(|(part, scale)| host(part).map(|reg| (reg, scale)));
        if base != Some(None) && index != Some(None) {
            let mem = Mem { base: base.flatten(), index: index.flatten(), disp: address.disp };
            self.a.lea(reg, mem);
            return;
        }
        self.compute(R14, address, Some(RAX));
        self.a.mov(reg, R14);
    }

    fn shift(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let bits = 8 * width(i, 0) as u32;
        if i.op1_kind() == OpKind::Register {
            return self.shift_by_cl(i, bits);
        }
        let count = i.immediate8() as u32 & if bits == 64 { 63 } else { 31 };
        let form = match count {
            0 => Form::MOVE,
            1 => Form::MOVE.flags(ARITHMETIC & !AF, AF),
            _ if count < bits || bits >= 32 => Form::MOVE.flags(SF | ZF | PF | CF, AF | OF),
            _ => return Err(Unsupported),
        };
        self.same(i, form.into_first(i))
    }

    fn shift_by_cl(&mut self, i: &Instruction, bits: u32) -> Result<(), Unsupported> {
        if i.op0_kind() != OpKind::Register || !is_low_gpr(i.op0_register()) || bits < 32 {
            return Err(Unsupported);
        }
        if self.flags_are_dead {
            self.same(i, Form::MOVE)?;
            self.forget_flags();
            return Ok(());
        }
        self.flags.save(&mut self.a);
        // The count, before it is shifted itself. The operand, if it has no home, is in RAX.
        self.a.mov_long(R14, RCX);
        self.same(i, Form::MOVE)?;
        // lahf; seto al; and ah, not AF
        self.a.raw(&[0x9F, 0x0F, 0x90, 0xC0, 0x80, 0xE4, !(AF as u8)]);
        self.a.group1(Group1::And, LONG, R14, bits as i32 - 1);
        let none = self.a.jcc(condition::EQUAL);
        self.a.group1(Group1::Cmp, LONG, R14, 1);
        let one = self.a.jcc(condition::EQUAL);
        self.a.raw(&[0xB0, 0x00]);
        self.a.bind(one);
        self.a.raw(&[0x66]);
        self.a.op_m(LONG, &[0x89], RAX, Mem::frame(slot::FLAGS));
        self.a.bind(none);
        self.flags = FlagState::IN_FRAME;
        Ok(())
    }

    fn rotate(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let bits = 8 * width(i, 0) as u32;
        if i.op1_kind() == OpKind::Register {
            let simple = i.op0_kind() == OpKind::Register && is_low_gpr(i.op0_register());
            if !simple || !self.flags_are_dead {
                return Err(Unsupported);
            }
            self.same(i, Form::MOVE)?;
            self.forget_flags();
            return Ok(());
        }
        let count = i.immediate8() as u32 & if bits == 64 { 63 } else { 31 };
        let flags = Form::MOVE.flags(CF | OF, 0).into_first(i);
        match count {
            0 => self.same(i, Form::MOVE.into_first(i)),
            1 => self.same(i, flags),
            _ if i.op0_kind() != OpKind::Register => Err(Unsupported),
            _ if self.flags_are_dead => {
                self.same(i, Form::MOVE)?;
                self.forget_flags();
                Ok(())
            }
            _ => {
                // OF is defined after a rotation by one: let the last step be that.
                self.flags.need(&mut self.a, ARITHMETIC);
                let mut most = *i;
                most.set_immediate8((count - 1) as u8);
                self.same(&most, Form::MOVE)?;
                let mut last = *i;
                last.set_immediate8(1);
                self.same(&last, flags)
            }
        }
    }

    /// Loads the instruction's one explicit operand, a source of 32 or 64 bits, into R14: the same
    /// instruction with R14 as operand.
    fn source(&mut self, i: &Instruction) -> Result<(Instruction, bool), Unsupported> {
        let wide = width(i, 0) == 8;
        if width(i, 0) < 4 {
            return Err(Unsupported);
        }
        if i.op0_kind() == OpKind::Memory {
            let extent = Extent::of(width(i, 0));
            let mem = self.look_up(self.address_of(i)?, Access::Read, extent, false);
            self.a.op_m(wide, &[0x8B], R14, mem);
        } else {
            let guest = index(i.op0_register());
            match home(guest) {
                Some(reg) => self.a.op_r(wide, &[0x8B], R14, reg),
                None => self.a.load(R14, Mem::frame(spill(guest))),
            }
        }
        let mut j = stripped(i);
        j.set_op0_kind(OpKind::Register);
        j.set_op0_register(named(R14, width(i, 0)));
        Ok((j, wide))
    }

    fn multiply(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let (j, _) = self.source(i)?;
        self.a.mov(RAX, ACCUMULATOR);
        self.encode(&j)?;
        self.a.mov(ACCUMULATOR, RAX);
        self.flags.wrote(CF | OF, SF | ZF | PF | AF);
        Ok(())
    }

    /// What would fault is the interpreter's, and so are signed divisions of more than a word.
    fn divide(&mut self, i: &Instruction, signed: bool) -> Result<(), Unsupported> {
        self.flags.save(&mut self.a);
        let (j, wide) = self.source(i)?;
        self.flags.clobber();
        if signed {
            self.a.op_r(wide, &[0x8B], RAX, ACCUMULATOR);
            // sar rax, 63 or 31
            self.a.op_r(wide, &[0xC1], Reg(7), RAX);
            self.a.raw(&[if wide { 63 } else { 31 }]);
            self.a.op_r(wide, &[0x3B], RAX, RDX);
            let long = self.a.jcc(condition::NOT_EQUAL);
            self.leave_here(long);
            self.a.op_m(wide, &[0x8D], RAX, Mem::at(R14, 1));
            self.a.group1(Group1::Cmp, wide, RAX, 1);
            let faults = self.a.jcc(condition::BELOW_OR_EQUAL);
            self.leave_here(faults);
        } else {
            self.a.op_r(wide, &[0x3B], RDX, R14);
            let faults = self.a.jcc(condition::NOT_BELOW);
            self.leave_here(faults);
        }
        self.a.mov(RAX, ACCUMULATOR);
        self.encode(&j)?;
        self.a.mov(ACCUMULATOR, RAX);
        self.forget_flags();
        Ok(())
    }

    fn exchange(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        if i.op0_kind() != OpKind::Memory && i.op1_kind() != OpKind::Memory {
            return self.same(i, Form { writes: 2, ..Form::MOVE });
        }
        let operand = u32::from(i.op0_kind() == OpKind::Memory);
        let register = i.op_register(operand);
        let bytes = register.size();
        let Some(reg) = home(index(register)).filter(|_| is_low_gpr(register)) else {
            return Err(Unsupported);
        };
        let mem = self.look_up(self.address_of(i)?, Access::Write, Extent::of(bytes), true);
        let byte = |code: u8| code & !u8::from(bytes == 1);
        // Without the lock that the instruction would have: there is one CPU.
        self.move_sized(bytes, byte(0x8B), RAX, mem);
        self.move_sized(bytes, byte(0x89), reg, mem);
        match bytes {
            8 => self.a.mov(reg, RAX),
            4 => self.a.mov_long(reg, RAX),
            2 => {
                self.a.raw(&[0x66]);
                self.a.mov_long(reg, RAX);
            }
            _ => self.byte_op(&[0x8A], reg, RAX),
        }
        Ok(())
    }

    /// A move between a register and memory, of 1, 2, 4 or 8 bytes.
    fn move_sized(&mut self, bytes: usize, opcode: u8, reg: Reg, mem: Mem) {
        if bytes == 2 {
            self.a.raw(&[0x66]);
        }
        if bytes == 1 && (4..8).contains(&reg.0) {
            // SPL to DIL need a REX prefix, which R14 as base brings.
            debug_assert!(mem.base == Some(R14));
        }
        self.a.op_m(bytes == 8, &[opcode], reg, mem);
    }

    /// An instruction with two byte registers, the second AL.
    fn byte_op(&mut self, opcode: &[u8], reg: Reg, al: Reg) {
        debug_assert_eq!(al, RAX);
        if (4..8).contains(&reg.0) {
            self.a.raw(&[0x40]);
        }
        self.a.op_r(LONG, opcode, reg, al);
    }

    fn compare_exchange(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        if i.op0_kind() != OpKind::Memory || !is_low_gpr(i.op1_register()) {
            return Err(Unsupported);
        }
        let bytes = i.op1_register().size();
        let reg = home(index(i.op1_register())).ok_or(Unsupported)?;
        let mem = self.look_up(self.address_of(i)?, Access::Write, Extent::of(bytes), true);
        let mut j = stripped(i);
        set_memory(&mut j, mem);
        j.set_op_register(1, named(reg, bytes));
        self.a.mov(RAX, ACCUMULATOR);
        self.encode(&j)?;
        // Where they were equal RAX stays: cmovnz.
        self.a.op_r(QUAD, &[0x0F, 0x45], ACCUMULATOR, RAX);
        self.flags.wrote(ARITHMETIC, 0);
        Ok(())
    }

    fn compare_exchange_wide(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        let extent = Extent { bytes: 16, aligned: true };
        let mem = self.look_up(self.address_of(i)?, Access::Write, extent, true);
        self.flags.need(&mut self.a, ARITHMETIC & !ZF);
        self.a.mov(RAX, ACCUMULATOR);
        self.a.op_m(QUAD, &[0x0F, 0xC7], Reg(1), mem);
        self.a.mov(ACCUMULATOR, RAX);
        self.flags.wrote(ZF, 0);
        Ok(())
    }

    /// With IF clear the run loop has less to look for: the block may go on.
    fn clear_interrupts(&mut self) -> Result<(), Unsupported> {
        self.flags.save(&mut self.a);
        self.flags.clobber();
        self.a.op_m(LONG, &[0x83], Reg(Group1::Cmp as u8), Mem::frame(slot::PRIVILEGED));
        self.a.raw(&[0]);
        let faults = self.a.jcc(condition::EQUAL);
        self.leave_here(faults);
        self.a.op_m(LONG, &[0x81], Reg(Group1::And as u8), Mem::frame(slot::SYSTEM));
        self.a.raw(&(!(IF as u32)).to_le_bytes());
        Ok(())
    }

    /// Sign extensions of RAX, in place and into RDX.
    fn extend(&mut self, i: &Instruction) -> Result<(), Unsupported> {
        match i.mnemonic() {
            Mnemonic::Cdqe => self.a.op_r(QUAD, &[0x63], ACCUMULATOR, ACCUMULATOR),
            Mnemonic::Cwde => self.a.op_r(LONG, &[0x0F, 0xBF], ACCUMULATOR, ACCUMULATOR),
            Mnemonic::Cbw => {
                self.a.raw(&[0x66]);
                self.a.op_r(LONG, &[0x0F, 0xBE], ACCUMULATOR, ACCUMULATOR);
            }
            other => {
                self.a.mov(RAX, ACCUMULATOR);
                self.a.raw(match other {
                    Mnemonic::Cqo => &[0x48, 0x99],
                    Mnemonic::Cdq => &[0x99],
                    _ => &[0x66, 0x99],
                });
            }
        }
        Ok(())
    }
}
