//! Host instructions, byte by byte: the few that templates are made of.

/// A general register of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reg(pub(super) u8);

pub(super) const RAX: Reg = Reg(0);
pub(super) const RCX: Reg = Reg(1);
pub(super) const RDX: Reg = Reg(2);
pub(super) const RBX: Reg = Reg(3);
pub(super) const RSP: Reg = Reg(4);
pub(super) const RBP: Reg = Reg(5);
pub(super) const RSI: Reg = Reg(6);
pub(super) const RDI: Reg = Reg(7);
pub(super) const R12: Reg = Reg(12);
pub(super) const R13: Reg = Reg(13);
pub(super) const R14: Reg = Reg(14);
pub(super) const R15: Reg = Reg(15);

/// A memory operand of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mem {
    pub(super) base: Option<Reg>,
    /// The index and its scale, 1, 2, 4 or 8.
    pub(super) index: Option<(Reg, u32)>,
    pub(super) disp: i32,
}

impl Mem {
    /// `[base + disp]`
    pub(super) const fn at(base: Reg, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp }
    }

    /// `[rsp + disp]`
    pub(super) const fn frame(disp: i32) -> Self {
        Self::at(RSP, disp)
    }
}

/// An operand size of 32 bits, which clears the upper half of a register.
pub(super) const LONG: bool = false;
/// An operand size of 64 bits.
pub(super) const QUAD: bool = true;

/// Arithmetic with a 32-bit immediate: the number in the opcode's ModRM byte.
#[derive(Debug, Clone, Copy)]
pub(super) enum Group1 {
    Add = 0,
    And = 4,
    Sub = 5,
    Cmp = 7,
}

/// Where a jump's distance lies, to be filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hole(pub(super) usize);

/// Code in the making.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    pub(super) bytes: Vec<u8>,
}

impl Assembler {
    pub(super) fn here(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn rex(&mut self, wide: bool, reg: Reg, index: Option<Reg>, base: Option<Reg>) {
        let high = |reg: Option<Reg>| u8::from(reg.is_some_and(|reg| reg.0 >= 8));
        let bits = u8::from(wide) << 3 | u8::from(reg.0 >= 8) << 2 | high(index) << 1 | high(base);
        if bits != 0 {
            self.bytes.push(0x40 | bits);
        }
    }

    /// An instruction with a register and a memory operand.
    pub(super) fn op_m(&mut self, wide: bool, opcode: &[u8], reg: Reg, mem: Mem) {
        self.rex(wide, reg, mem.index.map(|(index, _)| index), mem.base);
        self.raw(opcode);
        let middle = (reg.0 & 7) << 3;
        let small = i8::try_from(mem.disp);
        let needs_sib = mem.index.is_some() || mem.base.is_none_or(|base| base.0 & 7 == 4);
        let rm = if needs_sib { 4 } else { mem.base.map_or(4, |base| base.0 & 7) };
        let mode = match mem.base {
            None => 0,
            Some(base) if mem.disp == 0 && base.0 & 7 != 5 => 0,
            Some(_) if small.is_ok() => 0x40,
            Some(_) => 0x80,
        };
        self.bytes.push(mode | middle | rm);
        if needs_sib {
            let base = mem.base.map_or(5, |base| base.0 & 7);
            let (index, scale) = mem.index.map_or((4, 0), |(index, scale)| {
                assert!(index != RSP, "RSP is no index");
                (index.0 & 7, scale.trailing_zeros() as u8)
            });
            self.bytes.push(scale << 6 | index << 3 | base);
        }
        match (mode, small) {
            (0x40, Ok(small)) => self.bytes.push(small as u8),
            (0, _) if mem.base.is_some() => {}
            _ => self.raw(&mem.disp.to_le_bytes()),
        }
    }

    /// An instruction with two register operands.
    pub(super) fn op_r(&mut self, wide: bool, opcode: &[u8], reg: Reg, rm: Reg) {
        self.rex(wide, reg, None, Some(rm));
        self.raw(opcode);
        self.bytes.push(0xC0 | (reg.0 & 7) << 3 | (rm.0 & 7));
    }

    pub(super) fn load(&mut self, to: Reg, from: Mem) {
        self.op_m(QUAD, &[0x8B], to, from);
    }

    pub(super) fn load_long(&mut self, to: Reg, from: Mem) {
        self.op_m(LONG, &[0x8B], to, from);
    }

    pub(super) fn store(&mut self, to: Mem, from: Reg) {
        self.op_m(QUAD, &[0x89], from, to);
    }

    pub(super) fn mov(&mut self, to: Reg, from: Reg) {
        self.op_r(QUAD, &[0x8B], to, from);
    }

    pub(super) fn mov_long(&mut self, to: Reg, from: Reg) {
        self.op_r(LONG, &[0x8B], to, from);
    }

    pub(super) fn lea(&mut self, to: Reg, mem: Mem) {
        self.op_m(QUAD, &[0x8D], to, mem);
    }

    /// `mov r32, imm32`
    pub(super) fn set_long(&mut self, to: Reg, value: u32) {
        self.rex(LONG, Reg(0), None, Some(to));
        self.bytes.push(0xB8 | (to.0 & 7));
        self.raw(&value.to_le_bytes());
    }

    /// Arithmetic of a register with an immediate.
    pub(super) fn group1(&mut self, operation: Group1, wide: bool, to: Reg, value: i32) {
        let number = Reg(operation as u8);
        match i8::try_from(value) {
            Ok(small) => {
                self.op_r(wide, &[0x83], number, to);
                self.bytes.push(small as u8);
            }
            Err(_) => {
                self.op_r(wide, &[0x81], number, to);
                self.raw(&value.to_le_bytes());
            }
        }
    }

    pub(super) fn shr(&mut self, wide: bool, to: Reg, count: u8) {
        self.op_r(wide, &[0xC1], Reg(5), to);
        self.bytes.push(count);
    }

    pub(super) fn shl(&mut self, wide: bool, to: Reg, count: u8) {
        self.op_r(wide, &[0xC1], Reg(4), to);
        self.bytes.push(count);
    }

    /// `jmp rel32`
    pub(super) fn jmp(&mut self) -> Hole {
        self.bytes.push(0xE9);
        self.hole()
    }

    /// `jcc rel32`, by the condition's number in the opcode map.
    pub(super) fn jcc(&mut self, condition: u8) -> Hole {
        self.raw(&[0x0F, 0x80 | condition]);
        self.hole()
    }

    fn hole(&mut self) -> Hole {
        let at = self.here();
        self.raw(&[0; 4]);
        Hole(at)
    }

    /// The jump leads here.
    pub(super) fn bind(&mut self, hole: Hole) {
        self.bind_to(hole, self.here());
    }

    pub(super) fn bind_to(&mut self, hole: Hole, target: usize) {
        let distance = target as i64 - (hole.0 as i64 + 4);
        let distance = i32::try_from(distance).expect("a block is short");
        self.bytes[hole.0..hole.0 + 4].copy_from_slice(&distance.to_le_bytes());
    }
}

/// Numbers of conditions in the opcode map.
pub(super) mod condition {
    pub(in super::super) const NOT_BELOW: u8 = 3;
    pub(in super::super) const EQUAL: u8 = 4;
    pub(in super::super) const NOT_EQUAL: u8 = 5;
    pub(in super::super) const BELOW_OR_EQUAL: u8 = 6;
    pub(in super::super) const SIGN: u8 = 8;
}
