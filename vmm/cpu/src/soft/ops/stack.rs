//! The stack: pushes, pops, frames, and RFLAGS on it.

use crate::soft::cpu::{Cpu, gpr};
use crate::soft::event::{Event, Flow, Trap};
use crate::soft::exception::Exception;
use crate::soft::flags::{self, Int, cut};
use crate::soft::operand::{by_width, width};
use iced_x86::{Code, Instruction, OpKind};

impl Cpu {
    /// Stores below RSP and moves RSP, in 64-bit code.
    #[inline(always)]
    pub(in super::super) fn push_long(&mut self, value: u64) -> Flow {
        let top = self.full(gpr::RSP).wrapping_sub(8);
        match self.store::<u64>(top, value) {
            Ok(()) => {
                self.set_full(gpr::RSP, top);
                Ok(())
            }
            Err(trap) => Err(self.on_stack(trap)),
        }
    }

    /// Loads at RSP, without moving RSP, in 64-bit code.
    #[inline(always)]
    pub(in super::super) fn top_long(&mut self) -> Result<u64, Trap> {
        let top = self.full(gpr::RSP);
        match self.load::<u64>(top) {
            Ok(value) => Ok(value),
            Err(trap) => Err(self.on_stack(trap)),
        }
    }

    /// Moves RSP up by `bytes`, in 64-bit code.
    #[inline(always)]
    pub(in super::super) fn drop_long(&mut self, bytes: u64) {
        self.set_full(gpr::RSP, self.full(gpr::RSP).wrapping_add(bytes));
    }

    /// Stores below the stack pointer and moves it.
    pub(in super::super) fn push<T: Int>(&mut self, value: u64) -> Flow {
        let top = self.stack_pointer(-(T::BYTES as i64));
        let address = self.on_stack_at(top, T::BYTES);
        self.store::<T>(address, value).map_err(|trap| self.on_stack(trap))?;
        self.set_stack_pointer(top);
        Ok(())
    }

    /// Loads `offset` bytes above the stack pointer, without moving it.
    pub(in super::super) fn on_top<T: Int>(&mut self, offset: u64) -> Result<u64, Trap> {
        let address = self.on_stack_at(self.stack_pointer(offset as i64), T::BYTES);
        self.load::<T>(address).map_err(|trap| self.on_stack(trap))
    }

    /// Loads at the stack pointer, without moving it.
    pub(in super::super) fn top<T: Int>(&mut self) -> Result<u64, Trap> {
        self.on_top::<T>(0)
    }

    /// Moves the stack pointer up by `bytes`.
    pub(in super::super) fn drop_stack(&mut self, bytes: u64) {
        let pointer = self.stack_pointer(bytes as i64);
        self.set_stack_pointer(pointer);
    }

    /// A non-canonical stack address is `#SS(0)`.
    #[cold]
    pub(in super::super) fn on_stack(&mut self, trap: Trap) -> Trap {
        if self.event == Event::NonCanonical {
            return self.raise(Exception::StackFault(0));
        }
        trap
    }

    /// The flags that `POPF` and `IRET` may change at the current privilege.
    pub(in super::super) fn changeable_flags(&self) -> u64 {
        let mut kept = flags::ALL & !flags::FIXED;
        if self.cpl > 0 {
            kept &= !flags::IOPL;
        }
        if u64::from(self.cpl) > (self.system_flags & flags::IOPL) >> 12 {
            kept &= !flags::IF;
        }
        kept
    }
}

/// The operand width of a push or pop: segment registers and immediates take the stack's.
fn stack_width(i: &Instruction) -> usize {
    i.stack_pointer_increment().unsigned_abs() as usize
}

/// `PUSH`.
pub(in super::super) fn push(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let value = cpu.get(i, 0)?;
    by_width!(stack_width(i), T => cpu.push::<T>(cut::<T>(value)))
}

/// `POP` to a general register or memory.
pub(in super::super) fn pop(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let bytes = width(i, 0);
    let value = by_width!(bytes, T => cpu.top::<T>())?;
    let before = cpu.full(gpr::RSP);
    // The address of a memory operand uses RSP as it is after the pop.
    cpu.drop_stack(bytes as u64);
    if i.op0_kind() == OpKind::Register {
        return cpu.put(i, 0, value);
    }
    cpu.put(i, 0, value).inspect_err(|_| cpu.set_full(gpr::RSP, before))
}

/// `PUSHF`.
pub(in super::super) fn pushf(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let value = cpu.rflags() & !flags::RF;
    by_width!(stack_width(i), T => cpu.push::<T>(cut::<T>(value)))
}

/// `POPF`.
pub(in super::super) fn popf(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let bytes = stack_width(i);
    let value = by_width!(bytes, T => cpu.top::<T>())?;
    cpu.drop_stack(bytes as u64);
    let mut changed = cpu.changeable_flags();
    if bytes == 2 {
        changed &= 0xFFFF;
    }
    let old = cpu.rflags();
    // RF is cleared whatever was popped.
    cpu.load_rflags(((old & !changed) | (value & changed)) & !flags::RF);
    Ok(())
}

/// `ENTER`.
pub(in super::super) fn enter(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let size = cpu.get(i, 0)?;
    let level = cpu.get(i, 1)? % 32;
    match i.code() {
        Code::Enterw_imm16_imm8 => enter_frame::<u16>(cpu, size, level),
        Code::Enterd_imm16_imm8 => enter_frame::<u32>(cpu, size, level),
        _ => enter_frame::<u64>(cpu, size, level),
    }
}

fn enter_frame<T: Int>(cpu: &mut Cpu, size: u64, level: u64) -> Flow {
    let before = cpu.full(gpr::RSP);
    let outcome = push_frame::<T>(cpu, level).and_then(|frame| {
        let bottom = cpu.stack_pointer(-(size as i64));
        // The last byte of the new stack must be writable.
        let address = cpu.on_stack_at(bottom, T::BYTES);
        cpu.probe_store(address, T::BYTES).map_err(|trap| cpu.on_stack(trap))?;
        cpu.set_stack_pointer(bottom);
        cpu.set_reg::<T>(gpr::RBP, cut::<T>(frame));
        Ok(())
    });
    if outcome.is_err() {
        cpu.set_full(gpr::RSP, before);
    }
    outcome
}

fn push_frame<T: Int>(cpu: &mut Cpu, level: u64) -> Result<u64, Trap> {
    cpu.push::<T>(cpu.reg::<T>(gpr::RBP))?;
    let frame = cpu.stack_pointer(0);
    let mut pointer = cpu.full(gpr::RBP);
    for _ in 1..level {
        pointer = pointer.wrapping_sub(T::BYTES as u64);
        let address = cpu.on_stack_at(pointer, T::BYTES);
        let value = cpu.load::<T>(address).map_err(|trap| cpu.on_stack(trap))?;
        cpu.push::<T>(value)?;
    }
    if level > 0 {
        cpu.push::<T>(cut::<T>(frame))?;
    }
    Ok(frame)
}

/// `LEAVE`.
pub(in super::super) fn leave(cpu: &mut Cpu, i: &Instruction) -> Flow {
    match i.code() {
        Code::Leavew => leave_frame::<u16>(cpu),
        Code::Leaved => leave_frame::<u32>(cpu),
        _ => leave_frame::<u64>(cpu),
    }
}

fn leave_frame<T: Int>(cpu: &mut Cpu) -> Flow {
    let frame = cpu.full(gpr::RBP);
    let address = cpu.on_stack_at(frame, T::BYTES);
    let value = cpu.load::<T>(address).map_err(|trap| cpu.on_stack(trap))?;
    cpu.set_stack_pointer(frame.wrapping_add(T::BYTES as u64));
    cpu.set_reg::<T>(gpr::RBP, value);
    Ok(())
}
