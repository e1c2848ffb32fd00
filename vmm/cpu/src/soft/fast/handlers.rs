//! Which specialised function serves which form, and the functions without memory operands.

use super::memory;
use super::{Form, Seen};
use crate::soft::cpu::{Cpu, gpr};
use crate::soft::event::Flow;
use crate::soft::flags::{Int, LazyFlags, cut, signed};
use crate::soft::op::{FULL, Handler, Op, PLAIN, handler};
use crate::soft::operand::width;
use crate::soft::ops::alu::{self, Alu};
use crate::soft::ops::muldiv::signed_product;
use crate::soft::ops::shift::{Shift, masked};
use iced_x86::{Instruction, OpKind};

/// `$f::<$($p,)* T>` for the width, without a memory operand.
macro_rules! reg_form {
    ($seen:expr, $f:ident $(, $p:ty)*) => {
        Some(match $seen.width {
            1 => handler($f::<$($p,)* u8>),
            2 => handler($f::<$($p,)* u16>),
            4 => handler($f::<$($p,)* u32>),
            _ => handler($f::<$($p,)* u64>),
        })
    };
}

/// `$f::<$($p,)* T, SHAPE>` for the width and the address.
macro_rules! mem_form {
    ($seen:expr, $f:ident $(, $p:ty)*) => {
        Some(match ($seen.width, $seen.full) {
            (1, PLAIN) => handler(memory::$f::<$($p,)* u8, PLAIN>),
            (2, PLAIN) => handler(memory::$f::<$($p,)* u16, PLAIN>),
            (4, PLAIN) => handler(memory::$f::<$($p,)* u32, PLAIN>),
            (_, PLAIN) => handler(memory::$f::<$($p,)* u64, PLAIN>),
            (1, FULL) => handler(memory::$f::<$($p,)* u8, FULL>),
            (2, FULL) => handler(memory::$f::<$($p,)* u16, FULL>),
            (4, FULL) => handler(memory::$f::<$($p,)* u32, FULL>),
            (_, FULL) => handler(memory::$f::<$($p,)* u64, FULL>),
        })
    };
}

/// A one-operand operation.
pub(super) trait Unary: 'static {
    fn apply<T: Int>(flags: &mut LazyFlags, a: u64) -> u64;
}

macro_rules! unary {
    ($name:ident, |$flags:ident, $a:ident, $T:ident| $body:expr) => {
        #[derive(Debug)]
        pub(super) struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<$T: Int>($flags: &mut LazyFlags, $a: u64) -> u64 {
                $body
            }
        }
    };
}
unary!(Inc, |flags, a, T| alu::increment::<T>(flags, a));
unary!(Dec, |flags, a, T| alu::decrement::<T>(flags, a));
unary!(Neg, |flags, a, T| alu::Sub::apply::<T>(flags, 0, a));
unary!(Not, |_flags, a, T| cut::<T>(!a));

pub(super) fn mov(seen: Seen) -> Option<Handler> {
    match seen.form {
        Form::RegReg => reg_form!(seen, mov_rr),
        Form::RegImm => reg_form!(seen, mov_ri),
        Form::RegMem => mem_form!(seen, mov_rm),
        Form::MemReg => mem_form!(seen, mov_mr),
        Form::MemImm => mem_form!(seen, mov_mi),
        _ => None,
    }
}

pub(super) fn binary<O: Alu>(seen: Seen) -> Option<Handler> {
    match seen.form {
        Form::RegReg => reg_form!(seen, alu_rr, O),
        Form::RegImm => reg_form!(seen, alu_ri, O),
        Form::RegMem => mem_form!(seen, alu_rm, O),
        Form::MemReg => mem_form!(seen, alu_mr, O),
        Form::MemImm => mem_form!(seen, alu_mi, O),
        _ => None,
    }
}

pub(super) fn unary<O: Unary>(seen: Seen) -> Option<Handler> {
    match seen.form {
        Form::Reg => reg_form!(seen, unary_r, O),
        Form::Mem => mem_form!(seen, unary_m, O),
        _ => None,
    }
}

pub(super) fn shift<S: Shift>(i: &Instruction, seen: Seen) -> Option<Handler> {
    match seen.form {
        Form::RegImm => reg_form!(seen, shift_ri, S),
        // The only register count there is: CL.
        Form::RegReg => reg_form!(seen, shift_rc, S),
        Form::MemImm if i.op1_kind() == OpKind::Immediate8 => mem_form!(seen, shift_mi, S),
        _ => None,
    }
}

pub(super) fn imul(i: &Instruction, seen: Seen) -> Option<Handler> {
    match (seen.form, i.op_count(), seen.width) {
        (_, _, 1) => None,
        (Form::RegReg, 2, _) => reg_form!(seen, imul_rr),
        (Form::RegReg, 3, _) => reg_form!(seen, imul_rri),
        (Form::RegMem, 2, _) => mem_form!(seen, imul_rm),
        (Form::RegMem, 3, _) => mem_form!(seen, imul_rmi),
        _ => None,
    }
}

pub(super) fn movzx(i: &Instruction, seen: Seen) -> Option<Handler> {
    let from = width(i, 1);
    // A 64-bit target is written like a 32-bit one: cleared above the source.
    if seen.width == 2 {
        return None;
    }
    match (seen.form, from, seen.full) {
        (Form::RegReg, 1, _) => Some(handler(movzx_rr::<u8>)),
        (Form::RegReg, 2, _) => Some(handler(movzx_rr::<u16>)),
        (Form::RegMem, 1, PLAIN) => Some(handler(memory::movzx_rm::<u8, PLAIN>)),
        (Form::RegMem, 2, PLAIN) => Some(handler(memory::movzx_rm::<u16, PLAIN>)),
        (Form::RegMem, 1, FULL) => Some(handler(memory::movzx_rm::<u8, FULL>)),
        (Form::RegMem, 2, FULL) => Some(handler(memory::movzx_rm::<u16, FULL>)),
        _ => None,
    }
}

pub(super) fn movsx(i: &Instruction, seen: Seen) -> Option<Handler> {
    let from = width(i, 1);
    match (seen.form, from, seen.width) {
        (Form::RegReg, 1, 4) => Some(handler(movsx_rr::<u8, u32>)),
        (Form::RegReg, 1, 8) => Some(handler(movsx_rr::<u8, u64>)),
        (Form::RegReg, 2, 4) => Some(handler(movsx_rr::<u16, u32>)),
        (Form::RegReg, 2, 8) => Some(handler(movsx_rr::<u16, u64>)),
        (Form::RegReg, 4, 8) => Some(handler(movsx_rr::<u32, u64>)),
        (Form::RegMem, 1, 4) => Some(handler(memory::movsx_rm::<u8, u32>)),
        (Form::RegMem, 1, 8) => Some(handler(memory::movsx_rm::<u8, u64>)),
        (Form::RegMem, 2, 4) => Some(handler(memory::movsx_rm::<u16, u32>)),
        (Form::RegMem, 2, 8) => Some(handler(memory::movsx_rm::<u16, u64>)),
        (Form::RegMem, 4, 8) => Some(handler(memory::movsx_rm::<u32, u64>)),
        _ => None,
    }
}

pub(super) fn lea(i: &Instruction, seen: Seen) -> Option<Handler> {
    // The address of LEA has no segment base.
    let segment = crate::soft::operand::segment_slot(i.memory_segment());
    if segment != crate::soft::cpu::slot::ZERO {
        return None;
    }
    match (seen.width, seen.full) {
        (4, PLAIN) => Some(handler(lea_r::<u32, PLAIN>)),
        (8, PLAIN) => Some(handler(lea_r::<u64, PLAIN>)),
        (4, FULL) => Some(handler(lea_r::<u32, FULL>)),
        (8, FULL) => Some(handler(lea_r::<u64, FULL>)),
        _ => None,
    }
}

pub(super) fn xchg(seen: Seen) -> Option<Handler> {
    match seen.form {
        Form::RegReg => reg_form!(seen, xchg_rr),
        _ => None,
    }
}

pub(super) fn push(seen: Seen) -> Option<Handler> {
    match (seen.form, seen.width, seen.full) {
        (Form::Reg, 8, _) => Some(handler(push_r)),
        (Form::Imm, 8, _) => Some(handler(push_i)),
        (Form::Mem, 8, PLAIN) => Some(handler(memory::push_m::<PLAIN>)),
        (Form::Mem, 8, FULL) => Some(handler(memory::push_m::<FULL>)),
        _ => None,
    }
}

pub(super) fn pop(seen: Seen) -> Option<Handler> {
    match (seen.form, seen.width) {
        (Form::Reg, 8) => Some(handler(pop_r)),
        _ => None,
    }
}

pub(super) fn call(seen: Seen) -> Option<Handler> {
    match (seen.form, seen.full) {
        (Form::Branch, _) => Some(handler(call_near)),
        (Form::Reg, _) => Some(handler(call_r)),
        (Form::Mem, PLAIN) if seen.width == 8 => Some(handler(memory::call_m::<PLAIN>)),
        (Form::Mem, FULL) if seen.width == 8 => Some(handler(memory::call_m::<FULL>)),
        _ => None,
    }
}

pub(super) fn jmp(seen: Seen) -> Option<Handler> {
    match (seen.form, seen.full) {
        (Form::Branch, _) => Some(handler(jmp_near)),
        (Form::Reg, _) => Some(handler(jmp_r)),
        (Form::Mem, PLAIN) if seen.width == 8 => Some(handler(memory::jmp_m::<PLAIN>)),
        (Form::Mem, FULL) if seen.width == 8 => Some(handler(memory::jmp_m::<FULL>)),
        _ => None,
    }
}

pub(super) fn jcc<const C: u8>(seen: Seen) -> Option<Handler> {
    (seen.form == Form::Branch).then(|| handler(jcc_near::<C>))
}

pub(super) fn setcc<const C: u8>(seen: Seen) -> Option<Handler> {
    (seen.form == Form::Reg).then(|| handler(setcc_r::<C>))
}

pub(super) fn cmov<const C: u8>(seen: Seen) -> Option<Handler> {
    match (seen.form, seen.width, seen.full) {
        (Form::RegReg, 4, _) => Some(handler(cmov_rr::<u32, C>)),
        (Form::RegReg, 8, _) => Some(handler(cmov_rr::<u64, C>)),
        (Form::RegMem, 4, PLAIN) => Some(handler(memory::cmov_rm::<u32, PLAIN, C>)),
        (Form::RegMem, 8, PLAIN) => Some(handler(memory::cmov_rm::<u64, PLAIN, C>)),
        (Form::RegMem, 4, FULL) => Some(handler(memory::cmov_rm::<u32, FULL, C>)),
        (Form::RegMem, 8, FULL) => Some(handler(memory::cmov_rm::<u64, FULL, C>)),
        _ => None,
    }
}

fn mov_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<T>(op.b);
    cpu.set_reg::<T>(op.a, value);
    Ok(())
}

fn mov_ri<T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.set_reg::<T>(op.a, cut::<T>(op.wide_immediate()));
    Ok(())
}

fn alu_rr<O: Alu, T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<T>(op.a), cpu.reg::<T>(op.b));
    let result = O::apply::<T>(&mut cpu.flags, a, b);
    if O::WRITES {
        cpu.set_reg::<T>(op.a, result);
    }
    Ok(())
}

fn alu_ri<O: Alu, T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<T>(op.a), cut::<T>(op.immediate()));
    let result = O::apply::<T>(&mut cpu.flags, a, b);
    if O::WRITES {
        cpu.set_reg::<T>(op.a, result);
    }
    Ok(())
}

fn unary_r<O: Unary, T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.reg::<T>(op.a);
    let result = O::apply::<T>(&mut cpu.flags, a);
    cpu.set_reg::<T>(op.a, result);
    Ok(())
}

fn shift_ri<S: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.reg::<T>(op.a);
    let result = S::apply::<T>(&mut cpu.flags, a, masked::<T>(op.immediate()));
    cpu.set_reg::<T>(op.a, result);
    Ok(())
}

fn shift_rc<S: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.reg::<T>(op.a);
    let count = masked::<T>(cpu.full(gpr::RCX));
    let result = S::apply::<T>(&mut cpu.flags, a, count);
    cpu.set_reg::<T>(op.a, result);
    Ok(())
}

fn imul_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<T>(op.a), cpu.reg::<T>(op.b));
    let result = signed_product::<T>(&mut cpu.flags, a, b);
    cpu.set_reg::<T>(op.a, result);
    Ok(())
}

fn imul_rri<T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<T>(op.b), cut::<T>(op.immediate()));
    let result = signed_product::<T>(&mut cpu.flags, a, b);
    cpu.set_reg::<T>(op.a, result);
    Ok(())
}

fn movzx_rr<S: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.reg::<S>(op.b);
    cpu.set_full(op.a, value);
    Ok(())
}

fn movsx_rr<S: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cut::<T>(signed::<S>(cpu.full(op.b)));
    cpu.set_reg::<T>(op.a, value);
    Ok(())
}

fn lea_r<T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let address = op.address::<SHAPE>(cpu);
    cpu.set_reg::<T>(op.a, cut::<T>(address));
    Ok(())
}

fn xchg_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (a, b) = (cpu.reg::<T>(op.a), cpu.reg::<T>(op.b));
    cpu.set_reg::<T>(op.a, b);
    cpu.set_reg::<T>(op.b, a);
    Ok(())
}

fn push_r(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.full(op.a);
    cpu.push_long(value)
}

fn push_i(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.push_long(op.immediate())
}

fn pop_r(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.top_long()?;
    cpu.drop_long(8);
    cpu.set_full(op.a, value);
    Ok(())
}

/// The target of a relative branch. It is canonical or not like any other.
#[inline(always)]
fn relative(cpu: &Cpu, op: &Op) -> u64 {
    cpu.rip().wrapping_add(op.immediate())
}

fn call_near(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = relative(cpu, op);
    cpu.call_long(target)
}

fn call_r(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.full(op.a);
    cpu.call_long(target)
}

fn jmp_near(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = relative(cpu, op);
    cpu.branch(target)
}

fn jmp_r(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.full(op.a);
    cpu.branch(target)
}

pub(super) fn ret(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.ret_long(0)
}

fn jcc_near<const C: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.flags.holds::<C>() {
        let target = relative(cpu, op);
        return cpu.branch(target);
    }
    Ok(())
}

fn setcc_r<const C: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = u64::from(cpu.flags.holds::<C>());
    cpu.set_reg::<u8>(op.a, value);
    Ok(())
}

fn cmov_rr<T: Int, const C: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (kept, moved) = (cpu.reg::<T>(op.a), cpu.reg::<T>(op.b));
    let value = if cpu.flags.holds::<C>() { moved } else { kept };
    cpu.set_reg::<T>(op.a, value);
    Ok(())
}

pub(super) fn leave(cpu: &mut Cpu, _: &Op) -> Flow {
    let frame = cpu.full(gpr::RBP);
    match cpu.load::<u64>(frame) {
        Ok(value) => {
            cpu.set_full(gpr::RSP, frame.wrapping_add(8));
            cpu.set_full(gpr::RBP, value);
            Ok(())
        }
        Err(trap) => Err(cpu.on_stack(trap)),
    }
}

pub(super) fn cdqe(cpu: &mut Cpu, _: &Op) -> Flow {
    cpu.set_full(gpr::RAX, signed::<u32>(cpu.full(gpr::RAX)));
    Ok(())
}

pub(super) fn nop(_: &mut Cpu, _: &Op) -> Flow {
    Ok(())
}
