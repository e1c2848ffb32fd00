//! Memory operands: their addresses, and the look-up that turns one into a host address.

use super::asm::*;
use super::frame::{home, slot, spill};
use super::translate::{Translator, Unsupported};
use crate::soft::tlb::{Entry, TAG_SHIFT, TAG_SLOTS};
use iced_x86::{Instruction, Register};
use std::mem::offset_of;

/// Where a part of an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Host(Reg),
    Slot(i32),
}

impl Part {
    /// That of a guest register.
    pub(super) fn of(guest: u8) -> Self {
        home(guest).map_or_else(|| Self::Slot(spill(guest)), Self::Host)
    }
}

/// A linear address of the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address {
    pub(super) base: Option<Part>,
    pub(super) index: Option<(Part, u32)>,
    /// The frame's slot of a segment base.
    pub(super) segment: Option<i32>,
    pub(super) disp: i32,
}

/// What an access is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// The size of an access, and whether a misaligned one is the interpreter's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub(super) bytes: usize,
    pub(super) aligned: bool,
}

impl Extent {
    pub(super) const fn of(bytes: usize) -> Self {
        Self { bytes, aligned: false }
    }
}

impl Address {
    /// `[register + disp]`
    pub(super) fn at(guest: u8, disp: i32) -> Self {
        Self { base: Some(Part::of(guest)), index: None, segment: None, disp }
    }

    /// It can be used beside an addend without being computed again.
    fn simple(self) -> Option<Mem> {
        match (self.base, self.index, self.segment) {
            (Some(Part::Host(base)), None, None) => {
                Some(Mem { base: Some(R14), index: Some((base, 1)), disp: self.disp })
            }
            (None, None, None) => Some(Mem::at(R14, self.disp)),
            _ => None,
        }
    }
}

fn part_of(register: Register) -> Result<Part, Unsupported> {
    if register.is_gpr64() { Ok(Part::of(register.number() as u8)) } else { Err(Unsupported) }
}

impl Translator {
    /// The address of the memory operand, without its segment's base.
    pub(super) fn offset_of(&self, i: &Instruction) -> Result<Address, Unsupported> {
        let mut disp = i.memory_displacement64() as i64;
        let base = match i.memory_base() {
            Register::None => None,
            Register::RIP => {
                // Relative to the block's beginning, as it was decoded.
                disp += i64::from(self.page_offset);
                Some(Part::Slot(slot::PAGE))
            }
            other => Some(part_of(other)?),
        };
        let index = match i.memory_index() {
            Register::None => None,
            other => Some((part_of(other)?, i.memory_index_scale())),
        };
        if base.is_none() && index.is_none() && i.memory_displ_size() < 8 {
            return Err(Unsupported);
        }
        let disp = i32::try_from(disp).map_err(|_| Unsupported)?;
        Ok(Address { base, index, segment: None, disp })
    }

    /// The linear address of the memory operand.
    pub(super) fn address_of(&self, i: &Instruction) -> Result<Address, Unsupported> {
        let segment = match i.memory_segment() {
            Register::FS => Some(slot::FS),
            Register::GS => Some(slot::GS),
            _ => None,
        };
        Ok(Address { segment, ..self.offset_of(i)? })
    }

    /// Computes an address. `other` is a register that may be lost; without one, the host's flags
    /// may be.
    pub(super) fn compute(&mut self, to: Reg, address: Address, other: Option<Reg>) {
        let a = &mut self.a;
        let mut late = None;
        let index = match address.index {
            Some((Part::Slot(at), scale)) => {
                a.load(to, Mem::frame(at));
                Some((to, scale))
            }
            Some((Part::Host(reg), scale)) => Some((reg, scale)),
            None => None,
        };
        let base = match address.base {
            Some(Part::Host(reg)) => Some(reg),
            Some(Part::Slot(at)) if index.is_some_and(|(reg, _)| reg == to) => match other {
                Some(other) => {
                    a.load(other, Mem::frame(at));
                    Some(other)
                }
                None => {
                    late = Some(at);
                    None
                }
            },
            Some(Part::Slot(at)) => {
                a.load(to, Mem::frame(at));
                Some(to)
            }
            None => None,
        };
        a.lea(to, Mem { base, index, disp: address.disp });
        for at in late.into_iter().chain(address.segment) {
            a.op_m(QUAD, &[0x03], to, Mem::frame(at));
        }
    }

    /// Looks an address up: what it gives is the access's host address. What the TLB has no tag for
    /// leaves, at this instruction. R14 is in use from here on; so is RAX, unless it is to be
    /// `free`. The host's flags are lost, and must be in the frame.
    pub(super) fn look_up(
        &mut self,
        address: Address,
        access: Access,
        extent: Extent,
        free: bool,
    ) -> Mem {
        self.flags.save(&mut self.a);
        self.flags.clobber();
        self.compute(R14, address, Some(RAX));
        self.look_up_r14(access, extent);
        if let Some(mem) = address.simple() {
            return mem;
        }
        self.compute(RAX, address, None);
        let mem = Mem { base: Some(R14), index: Some((RAX, 1)), disp: 0 };
        if free {
            self.a.lea(R14, mem);
            return Mem::at(R14, 0);
        }
        mem
    }

    /// Looks up the address in R14: its addend in R14.
    pub(super) fn look_up_r14(&mut self, access: Access, extent: Extent) {
        let a = &mut self.a;
        if extent.aligned || extent.bytes == 1 {
            a.mov(RAX, R14);
        } else {
            a.lea(RAX, Mem::at(R14, extent.bytes as i32 - 1));
        }
        let low = if extent.aligned { extent.bytes as i32 - 1 } else { 0 };
        a.shr(QUAD, R14, TAG_SHIFT);
        a.group1(Group1::And, LONG, R14, TAG_SLOTS);
        a.group1(Group1::And, QUAD, RAX, -4096 | low);
        a.op_m(QUAD, &[0x03], R14, Mem::frame(slot::TLB));
        let tag = match access {
            Access::Read => offset_of!(Entry, read),
            Access::Write => offset_of!(Entry, write),
        };
        a.op_m(QUAD, &[0x3B], RAX, Mem::at(R14, tag as i32));
        let miss = a.jcc(condition::NOT_EQUAL);
        a.load(R14, Mem::at(R14, offset_of!(Entry, addend) as i32));
        self.leave_missing(miss);
    }
}
