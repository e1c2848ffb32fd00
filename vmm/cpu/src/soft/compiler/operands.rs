//! Guest instructions encoded again with host operands.

use super::address::{Access, Extent};
use super::asm::*;
use super::frame::{home, spill};
use super::translate::{Translator, Unsupported};
use crate::soft::flags::ARITHMETIC;
use crate::soft::operand::{index, is_high_byte, is_immediate, is_low_gpr};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

/// The host register `reg`, of `bytes` bytes.
pub(super) fn named(reg: Reg, bytes: usize) -> Register {
    const BYTES: [Register; 16] = [
        Register::AL,
        Register::CL,
        Register::DL,
        Register::BL,
        Register::SPL,
        Register::BPL,
        Register::SIL,
        Register::DIL,
        Register::R8L,
        Register::R9L,
        Register::R10L,
        Register::R11L,
        Register::R12L,
        Register::R13L,
        Register::R14L,
        Register::R15L,
    ];
    let number = u32::from(reg.0);
    match bytes {
        1 => BYTES[usize::from(reg.0)],
        2 => Register::AX + number,
        4 => Register::EAX + number,
        _ => Register::RAX + number,
    }
}

/// What an instruction does to its operands and to the flags. What it is not said to do it does not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    /// Flags it reads.
    pub(super) reads: u64,
    /// Flags that it leaves the same on every host, as the engine does.
    pub(super) right: u64,
    /// Flags that the engine has zero after it.
    pub(super) zero: u64,
    /// Register operands it writes: none, the first, or both.
    pub(super) writes: u8,
    /// What it does to its memory operand.
    pub(super) access: Access,
}

impl Form {
    /// Moves something into its first operand.
    pub(super) const MOVE: Self =
        Self { reads: 0, right: 0, zero: 0, writes: 1, access: Access::Read };
    /// Computes its first operand and all flags.
    pub(super) const ARITHMETIC: Self = Self { right: ARITHMETIC, ..Self::MOVE };
    /// Computes all flags.
    pub(super) const COMPARE: Self = Self { right: ARITHMETIC, writes: 0, ..Self::MOVE };

    pub(super) const fn reading(self, reads: u64) -> Self {
        Self { reads, ..self }
    }

    pub(super) const fn flags(self, right: u64, zero: u64) -> Self {
        Self { right, zero, ..self }
    }

    /// If its first operand is in memory, that is written.
    pub(super) fn into_first(self, i: &Instruction) -> Self {
        let memory = i.op0_kind() == OpKind::Memory && self.writes > 0;
        Self { access: if memory { Access::Write } else { self.access }, ..self }
    }

    /// Flags that the host must have before it.
    fn needs(self) -> u64 {
        let written = self.right | self.zero;
        let kept = if written == 0 { 0 } else { ARITHMETIC & !written };
        self.reads | kept
    }
}

/// The same instruction without a register that is implied by its opcode.
fn explicit(code: Code) -> Code {
    match code {
        Code::Add_AL_imm8 => Code::Add_rm8_imm8,
        Code::Add_AX_imm16 => Code::Add_rm16_imm16,
        Code::Add_EAX_imm32 => Code::Add_rm32_imm32,
        Code::Add_RAX_imm32 => Code::Add_rm64_imm32,
        Code::Or_AL_imm8 => Code::Or_rm8_imm8,
        Code::Or_AX_imm16 => Code::Or_rm16_imm16,
        Code::Or_EAX_imm32 => Code::Or_rm32_imm32,
        Code::Or_RAX_imm32 => Code::Or_rm64_imm32,
        Code::Adc_AL_imm8 => Code::Adc_rm8_imm8,
        Code::Adc_AX_imm16 => Code::Adc_rm16_imm16,
        Code::Adc_EAX_imm32 => Code::Adc_rm32_imm32,
        Code::Adc_RAX_imm32 => Code::Adc_rm64_imm32,
        Code::Sbb_AL_imm8 => Code::Sbb_rm8_imm8,
        Code::Sbb_AX_imm16 => Code::Sbb_rm16_imm16,
        Code::Sbb_EAX_imm32 => Code::Sbb_rm32_imm32,
        Code::Sbb_RAX_imm32 => Code::Sbb_rm64_imm32,
        Code::And_AL_imm8 => Code::And_rm8_imm8,
        Code::And_AX_imm16 => Code::And_rm16_imm16,
        Code::And_EAX_imm32 => Code::And_rm32_imm32,
        Code::And_RAX_imm32 => Code::And_rm64_imm32,
        Code::Sub_AL_imm8 => Code::Sub_rm8_imm8,
        Code::Sub_AX_imm16 => Code::Sub_rm16_imm16,
        Code::Sub_EAX_imm32 => Code::Sub_rm32_imm32,
        Code::Sub_RAX_imm32 => Code::Sub_rm64_imm32,
        Code::Xor_AL_imm8 => Code::Xor_rm8_imm8,
        Code::Xor_AX_imm16 => Code::Xor_rm16_imm16,
        Code::Xor_EAX_imm32 => Code::Xor_rm32_imm32,
        Code::Xor_RAX_imm32 => Code::Xor_rm64_imm32,
        Code::Cmp_AL_imm8 => Code::Cmp_rm8_imm8,
        Code::Cmp_AX_imm16 => Code::Cmp_rm16_imm16,
        Code::Cmp_EAX_imm32 => Code::Cmp_rm32_imm32,
        Code::Cmp_RAX_imm32 => Code::Cmp_rm64_imm32,
        Code::Test_AL_imm8 => Code::Test_rm8_imm8,
        Code::Test_AX_imm16 => Code::Test_rm16_imm16,
        Code::Test_EAX_imm32 => Code::Test_rm32_imm32,
        Code::Test_RAX_imm32 => Code::Test_rm64_imm32,
        Code::Xchg_r16_AX => Code::Xchg_rm16_r16,
        Code::Xchg_r32_EAX => Code::Xchg_rm32_r32,
        Code::Xchg_r64_RAX => Code::Xchg_rm64_r64,
        other => other,
    }
}

/// The instruction alone, without the prefixes that only a memory operand or another CPU makes
/// something of.
pub(super) fn stripped(i: &Instruction) -> Instruction {
    let mut j = *i;
    j.set_code(explicit(i.code()));
    j.set_has_lock_prefix(false);
    j.set_has_rep_prefix(false);
    j.set_has_repne_prefix(false);
    j.set_has_xacquire_prefix(false);
    j.set_has_xrelease_prefix(false);
    j.set_segment_prefix(Register::None);
    j
}

/// Puts a host address in the place of the memory operand.
pub(super) fn set_memory(j: &mut Instruction, mem: Mem) {
    j.set_memory_base(mem.base.map_or(Register::None, |reg| named(reg, 8)));
    j.set_memory_index(mem.index.map_or(Register::None, |(reg, _)| named(reg, 8)));
    j.set_memory_index_scale(mem.index.map_or(1, |(_, scale)| scale));
    j.set_memory_displacement64(mem.disp as i64 as u64);
    j.set_memory_displ_size(u32::from(mem.disp != 0));
}

impl Translator {
    /// Adds an instruction with host operands.
    pub(super) fn encode(&mut self, j: &Instruction) -> Result<(), Unsupported> {
        self.encoder.encode(j, 0).map_err(|_| Unsupported)?;
        let mut bytes = self.encoder.take_buffer();
        self.a.raw(&bytes);
        bytes.clear();
        self.encoder.set_buffer(bytes);
        Ok(())
    }

    /// Translates an instruction whose operands are all named: general registers, vector registers,
    /// immediates, one memory operand.
    pub(super) fn same(&mut self, i: &Instruction, form: Form) -> Result<(), Unsupported> {
        let bytes = i.memory_size().size();
        self.same_in(i, form, Extent::of(bytes))
    }

    /// The same with another extent of the access.
    pub(super) fn same_in(
        &mut self,
        i: &Instruction,
        form: Form,
        extent: Extent,
    ) -> Result<(), Unsupported> {
        if (0..i.op_count())
            .any(|n| i.op_kind(n) == OpKind::Register && is_high_byte(i.op_register(n)))
        {
            return self.same_high(i, form);
        }
        let mut spilled = Spilled::default();
        let mut memory = false;
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register if is_low_gpr(i.op_register(n)) => {
                    spilled.note(index(i.op_register(n)));
                }
                OpKind::Register if i.op_register(n).is_xmm() => {}
                OpKind::Memory => memory = true,
                kind if is_immediate(kind) => {}
                _ => return Err(Unsupported),
            }
        }
        let mut j = stripped(i);
        let needs_restore = !self.flags.has(form.needs()) || memory;
        if memory {
            let free = spilled.count > 0 || (form.needs() != 0 && needs_restore);
            let mem = self.look_up(self.address_of(i)?, form.access, extent, free);
            set_memory(&mut j, mem);
            if spilled.count > 1 {
                return Err(Unsupported);
            }
        }
        if form.needs() != 0 {
            self.flags.need(&mut self.a, form.needs());
        }
        for n in 0..i.op_count() {
            if i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr() {
                let reg = self.operand(&mut spilled, index(i.op_register(n)));
                j.set_op_register(n, named(reg, i.op_register(n).size()));
            }
        }
        self.encode(&j)?;
        for n in 0..u32::from(form.writes).min(i.op_count()) {
            if i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr() {
                self.written(&spilled, index(i.op_register(n)));
            }
        }
        self.flags.wrote(form.right, form.zero);
        Ok(())
    }

    /// Translates an instruction with AH, BH, CH or DH, which cannot be named beside registers that are
    /// newer than they are.
    fn same_high(&mut self, i: &Instruction, form: Form) -> Result<(), Unsupported> {
        let old = |register: Register| register.size() == 1 && index(register) < 4;
        let widens = i.mnemonic() == Mnemonic::Movzx && i.op0_register().size() >= 4;
        let operands = u32::from(widens)..i.op_count();
        for n in operands.clone() {
            match i.op_kind(n) {
                OpKind::Register if old(i.op_register(n)) => {}
                kind if is_immediate(kind) => {}
                _ => return Err(Unsupported),
            }
        }
        self.flags.need(&mut self.a, form.needs());
        let registers = || operands.clone().filter(|n| i.op_kind(*n) == OpKind::Register);
        if registers().any(|n| index(i.op_register(n)) == 0) {
            self.a.mov(RAX, R15);
        }
        if widens {
            // movzx eax, …
            let number = i.op1_register() as u8 - Register::AL as u8;
            self.a.op_r(LONG, &[0x0F, 0xB6], RAX, Reg(number));
            let guest = index(i.op0_register());
            match home(guest) {
                Some(reg) => self.a.mov_long(reg, RAX),
                None => self.a.store(Mem::frame(spill(guest)), RAX),
            }
            return Ok(());
        }
        self.encode(&stripped(i))?;
        if registers().any(|n| n < u32::from(form.writes) && index(i.op_register(n)) == 0) {
            self.a.mov(R15, RAX);
        }
        self.flags.wrote(form.right, form.zero);
        Ok(())
    }

    /// The host register that has guest register `guest`: it is loaded into RAX, or R14 after that, if
    /// it has none of its own.
    pub(super) fn operand(&mut self, spilled: &mut Spilled, guest: u8) -> Reg {
        if let Some(reg) = home(guest) {
            return reg;
        }
        let (place, known) = spilled.place(guest);
        if !known {
            self.a.load(place, Mem::frame(spill(guest)));
        }
        place
    }

    /// A guest register was written in the register that [`Self::operand`] gave.
    pub(super) fn written(&mut self, spilled: &Spilled, guest: u8) {
        if let Some(place) = spilled.find(guest) {
            self.a.store(Mem::frame(spill(guest)), place);
        }
    }
}

/// The guest registers of an instruction that have no home, at most two.
#[derive(Debug, Default)]
pub(super) struct Spilled {
    guests: [Option<u8>; 2],
    loaded: [bool; 2],
    pub(super) count: usize,
}

impl Spilled {
    /// The instruction has this register.
    pub(super) fn note(&mut self, guest: u8) {
        if home(guest).is_none() && !self.guests.contains(&Some(guest)) && self.count < 2 {
            self.guests[self.count] = Some(guest);
            self.count += 1;
        }
    }

    fn place(&mut self, guest: u8) -> (Reg, bool) {
        let number = usize::from(self.guests[0] != Some(guest));
        let known = std::mem::replace(&mut self.loaded[number], true);
        ([RAX, R14][number], known)
    }

    fn find(&self, guest: u8) -> Option<Reg> {
        let number = self.guests.iter().position(|known| *known == Some(guest))?;
        self.loaded[number].then_some([RAX, R14][number])
    }
}
