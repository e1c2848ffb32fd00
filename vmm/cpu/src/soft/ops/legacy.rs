//! Instructions that only 32-bit and 16-bit code has: decimal arithmetic, all registers on the
//! stack, bounds, and the like.

use crate::soft::cpu::{Cpu, gpr};
use crate::soft::event::{Event, Flow, Trap};
use crate::soft::exception::Exception;
use crate::soft::flags::{AF, CF, Int, OF, cut, signed};
use crate::soft::operand::index;
use iced_x86::{Code, Instruction, OpKind};

fn al(cpu: &Cpu) -> u64 {
    cpu.reg::<u8>(gpr::RAX)
}

/// Sets SF, ZF and PF by AL, and the flags given; OF, which is undefined, is cleared.
fn set_decimal_flags(cpu: &mut Cpu, carry: bool, adjust: bool) {
    let value = al(cpu);
    cpu.flags.after_logic::<u8>(value);
    let kept = cpu.flags.bits() & !(CF | AF | OF);
    let carry = if carry { CF } else { 0 };
    let adjust = if adjust { AF } else { 0 };
    cpu.flags.set(kept | carry | adjust);
}

/// `DAA` and `DAS`: the corrections of each digit.
fn adjust_packed(cpu: &mut Cpu, apply: impl Fn(u64, u64) -> u64, borrow: bool) {
    let (old, carry) = (al(cpu), cpu.flags.carry());
    let low = old & 0xF > 9 || cpu.flags.bits() & AF != 0;
    let high = old > 0x99 || carry;
    let mut value = old;
    let mut carried = false;
    if low {
        carried = if borrow { carry || value < 6 } else { carry || value + 6 > 0xFF };
        value = apply(value, 6);
    }
    if high {
        value = apply(value, 0x60);
        carried = true;
    } else if !borrow {
        carried = false;
    }
    cpu.set_reg::<u8>(gpr::RAX, cut::<u8>(value));
    set_decimal_flags(cpu, carried, low);
}

/// `DAA`.
pub(in super::super) fn daa(cpu: &mut Cpu, _: &Instruction) -> Flow {
    adjust_packed(cpu, u64::wrapping_add, false);
    Ok(())
}

/// `DAS`.
pub(in super::super) fn das(cpu: &mut Cpu, _: &Instruction) -> Flow {
    adjust_packed(cpu, u64::wrapping_sub, true);
    Ok(())
}

/// `AAA` and `AAS`: AX changes by 0x106 if the digit needs it.
fn adjust_unpacked(cpu: &mut Cpu, apply: impl Fn(u64, u64) -> u64) {
    let needed = al(cpu) & 0xF > 9 || cpu.flags.bits() & AF != 0;
    let mut value = cpu.reg::<u16>(gpr::RAX);
    if needed {
        value = cut::<u16>(apply(value, 0x106));
    }
    cpu.set_reg::<u16>(gpr::RAX, value & 0xFF0F);
    set_decimal_flags(cpu, needed, needed);
}

/// `AAA`.
pub(in super::super) fn aaa(cpu: &mut Cpu, _: &Instruction) -> Flow {
    adjust_unpacked(cpu, u64::wrapping_add);
    Ok(())
}

/// `AAS`.
pub(in super::super) fn aas(cpu: &mut Cpu, _: &Instruction) -> Flow {
    adjust_unpacked(cpu, u64::wrapping_sub);
    Ok(())
}

/// `AAM`.
pub(in super::super) fn aam(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let base = u64::from(i.immediate8());
    if base == 0 {
        return Err(cpu.raise(Exception::DivideError));
    }
    let value = al(cpu);
    cpu.set_reg::<u16>(gpr::RAX, ((value / base) << 8) | (value % base));
    set_decimal_flags(cpu, false, false);
    Ok(())
}

/// `AAD`.
pub(in super::super) fn aad(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let high = cpu.reg::<u16>(gpr::RAX) >> 8;
    let value = cut::<u8>(al(cpu) + high * u64::from(i.immediate8()));
    cpu.set_reg::<u16>(gpr::RAX, value);
    set_decimal_flags(cpu, false, false);
    Ok(())
}

/// `SALC`: AL is filled with the carry.
pub(in super::super) fn salc(cpu: &mut Cpu, _: &Instruction) -> Flow {
    let value = if cpu.flags.carry() { 0xFF } else { 0 };
    cpu.set_reg::<u8>(gpr::RAX, value);
    Ok(())
}

/// `INTO`.
pub(in super::super) fn into(cpu: &mut Cpu, _: &Instruction) -> Flow {
    if cpu.flags.bits() & OF == 0 {
        return Ok(());
    }
    cpu.event = Event::Interrupt { vector: 4, privileged: false };
    Err(Trap)
}

/// `BOUND`: `#BR` unless the index lies within the pair of bounds in memory.
pub(in super::super) fn bound(cpu: &mut Cpu, i: &Instruction) -> Flow {
    match i.code() {
        Code::Bound_r16_m1616 => bound_of::<u16>(cpu, i),
        _ => bound_of::<u32>(cpu, i),
    }
}

fn bound_of<T: Int>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let address = cpu.address_of(i);
    let lower = signed::<T>(cpu.load::<T>(address)?) as i64;
    let upper = signed::<T>(cpu.load::<T>(address.wrapping_add(T::BYTES as u64))?) as i64;
    let index = signed::<T>(cpu.register(i.op0_register())) as i64;
    if index < lower || index > upper {
        return Err(cpu.raise(Exception::BoundRange));
    }
    Ok(())
}

/// `ARPL`: raises the privilege bits of a selector to those of another.
pub(in super::super) fn arpl(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let in_register = i.op0_kind() == OpKind::Register;
    let selector = if in_register {
        cut::<u16>(cpu.get(i, 0)?)
    } else {
        // Read as by any other, and written only if it changes.
        let offset = cpu.offset_of(i);
        let address = cpu.in_segment(i.memory_segment(), offset, 2, || false);
        cpu.load::<u16>(address)?
    };
    let wanted = cpu.get(i, 1)? & 3;
    let raised = selector & 3 < wanted;
    if raised {
        let selector = selector & !3 | wanted;
        if in_register {
            // The upper half stays, whatever the operand size.
            cpu.set_reg::<u16>(index(i.op0_register()), selector);
        } else {
            let offset = cpu.offset_of(i);
            let address = cpu.in_segment(i.memory_segment(), offset, 2, || true);
            cpu.store::<u16>(address, selector)?;
        }
    }
    cpu.flags.set_zero(raised);
    Ok(())
}

/// `PUSHA`: the general registers, the stack pointer as it was.
pub(in super::super) fn pusha(cpu: &mut Cpu, i: &Instruction) -> Flow {
    match i.code() {
        Code::Pushaw => push_all::<u16>(cpu),
        _ => push_all::<u32>(cpu),
    }
}

fn push_all<T: Int>(cpu: &mut Cpu) -> Flow {
    // One by one: what is pushed before one faults stays below the stack pointer.
    let place = |cpu: &Cpu, pushed: usize| cpu.stack_pointer(-((pushed * T::BYTES) as i64));
    for register in 0..8u8 {
        let place = place(cpu, usize::from(register) + 1);
        let address = cpu.on_stack_at(place, T::BYTES);
        let value = cpu.reg::<T>(register);
        cpu.store::<T>(address, value).map_err(|trap| cpu.on_stack(trap))?;
    }
    let top = place(cpu, 8);
    cpu.set_stack_pointer(top);
    Ok(())
}

/// `POPA`: the general registers, but for the stack pointer.
pub(in super::super) fn popa(cpu: &mut Cpu, i: &Instruction) -> Flow {
    match i.code() {
        Code::Popaw => pop_all::<u16>(cpu),
        _ => pop_all::<u32>(cpu),
    }
}

fn pop_all<T: Int>(cpu: &mut Cpu) -> Flow {
    let mut frame = [0; 32];
    let len = 8 * T::BYTES;
    let address = cpu.on_stack_at(cpu.stack_pointer(0), len);
    cpu.load_bytes(address, &mut frame[..len]).map_err(|trap| cpu.on_stack(trap))?;
    cpu.drop_stack(len as u64);
    for (register, place) in (0..8).rev().zip(frame.chunks_exact(T::BYTES)) {
        if register != gpr::RSP {
            let mut value = [0; 8];
            value[..T::BYTES].copy_from_slice(place);
            cpu.set_reg::<T>(register, u64::from_le_bytes(value));
        }
    }
    Ok(())
}
