//! Specialised functions with memory operands. Each becomes part of its handler.

use super::handlers::Unary;
use crate::soft::cpu::Cpu;
use crate::soft::event::Flow;
use crate::soft::flags::{Int, cut, signed};
use crate::soft::op::{FULL, Op};
use crate::soft::ops::alu::Alu;
use crate::soft::ops::muldiv::signed_product;
use crate::soft::ops::shift::{Shift, masked};

#[inline(always)]
pub(super) fn mov_rm<T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load::<T>(op.address::<SHAPE>(cpu))?;
    cpu.set_reg::<T>(op.a, value);
    Ok(())
}

#[inline(always)]
pub(super) fn mov_mr<T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.full(op.b);
    cpu.store::<T>(op.address::<SHAPE>(cpu), value)
}

#[inline(always)]
pub(super) fn mov_mi<T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.store::<T>(op.address::<SHAPE>(cpu), op.immediate())
}

#[inline(always)]
pub(super) fn alu_rm<O: Alu, T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = cpu.load::<T>(op.address::<SHAPE>(cpu))?;
    let a = cpu.reg::<T>(op.a);
    let result = O::apply::<T>(&mut cpu.flags, a, b);
    if O::WRITES {
        cpu.set_reg::<T>(op.a, result);
    }
    Ok(())
}

#[inline(always)]
fn update<O: Alu, T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op, b: u64) -> Flow {
    let address = op.address::<SHAPE>(cpu);
    if !O::WRITES {
        let a = cpu.load::<T>(address)?;
        O::apply::<T>(&mut cpu.flags, a, b);
        return Ok(());
    }
    let a = cpu.load_for_update::<T>(address)?;
    let mut flags = cpu.flags;
    let result = O::apply::<T>(&mut flags, a, b);
    cpu.store::<T>(address, result)?;
    cpu.flags = flags;
    Ok(())
}

#[inline(always)]
pub(super) fn alu_mr<O: Alu, T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = cpu.reg::<T>(op.b);
    update::<O, T, SHAPE>(cpu, op, b)
}

#[inline(always)]
pub(super) fn alu_mi<O: Alu, T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    update::<O, T, SHAPE>(cpu, op, cut::<T>(op.immediate()))
}

#[inline(always)]
pub(super) fn unary_m<O: Unary, T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let address = op.address::<SHAPE>(cpu);
    let a = cpu.load_for_update::<T>(address)?;
    let mut flags = cpu.flags;
    let result = O::apply::<T>(&mut flags, a);
    cpu.store::<T>(address, result)?;
    cpu.flags = flags;
    Ok(())
}

#[inline(always)]
pub(super) fn shift_mi<S: Shift, T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let address = op.address::<SHAPE>(cpu);
    let a = cpu.load_for_update::<T>(address)?;
    let mut flags = cpu.flags;
    let result = S::apply::<T>(&mut flags, a, masked::<T>(op.immediate()));
    cpu.store::<T>(address, result)?;
    cpu.flags = flags;
    Ok(())
}

#[inline(always)]
pub(super) fn imul_rm<T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let b = cpu.load::<T>(op.address::<SHAPE>(cpu))?;
    let a = cpu.reg::<T>(op.a);
    let result = signed_product::<T>(&mut cpu.flags, a, b);
    cpu.set_reg::<T>(op.a, result);
    Ok(())
}

#[inline(always)]
pub(super) fn imul_rmi<T: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let a = cpu.load::<T>(op.address::<SHAPE>(cpu))?;
    let result = signed_product::<T>(&mut cpu.flags, a, cut::<T>(op.immediate()));
    cpu.set_reg::<T>(op.a, result);
    Ok(())
}

#[inline(always)]
pub(super) fn movzx_rm<S: Int, const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load::<S>(op.address::<SHAPE>(cpu))?;
    cpu.set_full(op.a, value);
    Ok(())
}

#[inline(always)]
pub(super) fn movsx_rm<S: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load::<S>(op.address::<FULL>(cpu))?;
    cpu.set_reg::<T>(op.a, cut::<T>(signed::<S>(value)));
    Ok(())
}

#[inline(always)]
pub(super) fn cmov_rm<T: Int, const SHAPE: bool, const C: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    let moved = cpu.load::<T>(op.address::<SHAPE>(cpu))?;
    let value = if cpu.flags.holds::<C>() { moved } else { cpu.reg::<T>(op.a) };
    cpu.set_reg::<T>(op.a, value);
    Ok(())
}

#[inline(always)]
pub(super) fn push_m<const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.load::<u64>(op.address::<SHAPE>(cpu))?;
    cpu.push_long(value)
}

#[inline(always)]
pub(super) fn call_m<const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.load::<u64>(op.address::<SHAPE>(cpu))?;
    cpu.call_long(target)
}

#[inline(always)]
pub(super) fn jmp_m<const SHAPE: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = cpu.load::<u64>(op.address::<SHAPE>(cpu))?;
    cpu.branch(target)
}
