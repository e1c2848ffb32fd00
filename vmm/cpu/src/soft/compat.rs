//! Compatibility mode: 32-bit and 16-bit code under a 64-bit kernel (APM volume 2, chapter 4;
//! SDM volume 3, chapters 3 and 5).
//!
//! Beside the decoding, three things differ from 64-bit code: memory is reached through segments
//! with a base and a limit, at addresses of 32 bits; the stack pointer is as wide as SS says; and
//! so is the instruction pointer, which the code segment limits. The general path asks here for
//! all of them. Specialised functions touch memory or the stack in 64-bit code only.
//!
//! What a segment does not allow comes out as an address that is not canonical, which raises
//! `#SS(0)` or `#GP(0)` as it does in 64-bit code.

use super::cpu::{CHECKED_CODE, Cpu, gpr, slot};
use super::event::{Flow, Trap};
use super::flags::cut;
use super::operand::segment_slot;
use super::system::segments::attribute;
use crate::state::Segment;
use iced_x86::{Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

/// How code in a segment is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum CodeSize {
    /// 64-bit code.
    #[default]
    Long,
    /// 32-bit code.
    Big,
    /// 16-bit code.
    Small,
}

impl CodeSize {
    /// The size of code in the segment.
    pub(super) fn of(cs: &Segment) -> Self {
        match (cs.attributes & attribute::LONG != 0, cs.attributes & attribute::BIG != 0) {
            (true, _) => Self::Long,
            (false, true) => Self::Big,
            (false, false) => Self::Small,
        }
    }

    /// What the decoder calls it.
    pub(super) const fn bits(self) -> u32 {
        match self {
            Self::Long => 64,
            Self::Big => 32,
            Self::Small => 16,
        }
    }

    /// Added to a physical address, it tells blocks of different sizes apart.
    pub(super) const fn tag(self) -> u64 {
        (self as u64) << 62
    }
}

/// An address outside its segment: not canonical, and as aligned as the one it stands for.
const OUTSIDE: u64 = 1 << 63;

/// True if a code segment needs no look at each instruction: 32-bit code in all of 4 GiB.
fn is_flat_code(cs: &Segment) -> bool {
    cs.attributes & attribute::BIG != 0 && cs.base == 0 && cs.limit == u32::MAX
}

/// True if `len` bytes at `offset` may be accessed.
fn allows(segment: &Segment, offset: u64, len: u64, writes: impl Fn() -> bool) -> bool {
    let kind = segment.attributes;
    let has = |bits: u16| kind & bits == bits;
    if !has(attribute::PRESENT | attribute::NOT_SYSTEM) {
        return false;
    }
    let code = has(attribute::CODE);
    if code && !has(attribute::READ_WRITE) {
        return false;
    }
    if (code || !has(attribute::READ_WRITE)) && writes() {
        return false;
    }
    let last = offset + len.max(1) - 1;
    let limit = u64::from(segment.limit);
    if !code && has(attribute::CONFORMING) {
        // Expand-down: the limit is below.
        let top = if has(attribute::BIG) { u64::from(u32::MAX) } else { 0xFFFF };
        return offset > limit && last <= top;
    }
    last <= limit
}

/// True if the instruction writes its memory operand.
fn writes_memory(instruction: &Instruction) -> bool {
    // Not what it writes besides, such as the stack.
    let mut operands = 0..instruction.op_count();
    let Some(operand) = operands.find(|n| instruction.op_kind(*n) == OpKind::Memory) else {
        return false;
    };
    let mut factory = InstructionInfoFactory::new();
    let access = factory.info(instruction).op_access(operand);
    !matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead)
}

impl Cpu {
    /// True if the code being executed is 64-bit code.
    #[inline(always)]
    pub(super) fn is_long(&self) -> bool {
        self.code_size == CodeSize::Long
    }

    /// Loads CS.
    pub(super) fn set_code_segment(&mut self, cs: Segment) {
        self.segments.cs = cs;
        self.code_size = CodeSize::of(&cs);
        if self.is_long() || is_flat_code(&cs) {
            self.system_flags &= !CHECKED_CODE;
        } else {
            self.system_flags |= CHECKED_CODE;
        }
    }

    /// RIP as this code has it.
    pub(super) fn own_rip(&self) -> u64 {
        if self.is_long() { self.rip() } else { cut::<u32>(self.rip()) }
    }

    /// The linear address of RIP.
    pub(super) fn linear_rip(&self) -> u64 {
        self.linear(self.rip())
    }

    /// The linear address of code at `rip`.
    pub(super) fn linear(&self, rip: u64) -> u64 {
        if self.is_long() { rip } else { cut::<u32>(self.segments.cs.base.wrapping_add(rip)) }
    }

    /// `#GP(0)` unless `len` bytes at RIP lie within the code segment.
    pub(super) fn check_code(&mut self, len: u64) -> Flow {
        if !self.is_long() && self.own_rip() + len - 1 > u64::from(self.segments.cs.limit) {
            return Err(self.general_protection(0));
        }
        Ok(())
    }

    /// A segment register that operands can be in.
    fn data_segment(&self, register: Register) -> (&Segment, u64) {
        let segments = &self.segments;
        match register {
            Register::ES => (&segments.es, segments.es.base),
            Register::CS => (&segments.cs, segments.cs.base),
            Register::SS => (&segments.ss, segments.ss.base),
            Register::FS => (&segments.fs, self.full(slot::FS)),
            Register::GS => (&segments.gs, self.full(slot::GS)),
            _ => (&segments.ds, segments.ds.base),
        }
    }

    /// The linear address of `len` bytes at `offset` of a segment.
    pub(super) fn in_segment(
        &self,
        register: Register,
        offset: u64,
        len: usize,
        writes: impl Fn() -> bool,
    ) -> u64 {
        if self.is_long() {
            return offset.wrapping_add(self.full(segment_slot(register)));
        }
        let (segment, base) = self.data_segment(register);
        let linear = cut::<u32>(base.wrapping_add(offset));
        if allows(segment, offset, len as u64, writes) { linear } else { linear | OUTSIDE }
    }

    /// The linear address of `len` bytes at `offset` of the memory operand's segment.
    pub(super) fn in_operand_segment(&self, i: &Instruction, offset: u64, len: usize) -> u64 {
        self.in_segment(i.memory_segment(), offset, len, || writes_memory(i))
    }

    /// True if offsets of a segment are linear addresses, and all are allowed.
    pub(super) fn is_flat(&self, register: Register) -> bool {
        if self.is_long() {
            return true;
        }
        let (segment, base) = self.data_segment(register);
        base == 0 && segment.limit == u32::MAX && allows(segment, 0, 1, || true)
    }

    /// The bits of RSP that are the stack pointer.
    fn stack_mask(&self) -> u64 {
        if self.is_long() {
            u64::MAX
        } else if self.segments.ss.attributes & attribute::BIG != 0 {
            u64::from(u32::MAX)
        } else {
            0xFFFF
        }
    }

    /// The stack pointer, moved by so many bytes.
    pub(super) fn stack_pointer(&self, moved: i64) -> u64 {
        self.full(gpr::RSP).wrapping_add(moved as u64) & self.stack_mask()
    }

    /// Sets the stack pointer.
    pub(super) fn set_stack_pointer(&mut self, pointer: u64) {
        match self.stack_mask() {
            0xFFFF => self.set_reg::<u16>(gpr::RSP, cut::<u16>(pointer)),
            mask => self.set_full(gpr::RSP, pointer & mask),
        }
    }

    /// The linear address of `len` bytes on the stack; `pointer` need not be cut to its width.
    pub(super) fn on_stack_at(&self, pointer: u64, len: usize) -> u64 {
        if self.is_long() {
            return pointer;
        }
        self.in_segment(Register::SS, pointer & self.stack_mask(), len, || true)
    }

    /// A near branch whose operand size is `bytes`: execution goes on at `target`, or `#GP(0)`.
    pub(super) fn branch_near(&mut self, target: u64, bytes: usize) -> Flow {
        if self.is_long() {
            return self.branch(target);
        }
        self.next_rip = self.near_target(target, bytes)?;
        Ok(())
    }

    /// Where a near branch of 32-bit or 16-bit code goes.
    pub(super) fn near_target(&mut self, target: u64, bytes: usize) -> Result<u64, Trap> {
        let target = if bytes == 2 { cut::<u16>(target) } else { cut::<u32>(target) };
        if target > u64::from(self.segments.cs.limit) {
            return Err(self.general_protection(0));
        }
        Ok(target)
    }
}
