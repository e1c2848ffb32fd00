//! Addition, subtraction, bitwise logic and comparison.

use crate::soft::cpu::Cpu;
use crate::soft::event::Flow;
use crate::soft::flags::{Int, LazyFlags, cut};
use crate::soft::operand::{by_width, width};
use iced_x86::Instruction;

/// A two-operand operation that sets all arithmetic flags.
pub(in super::super) trait Alu: 'static {
    /// Whether the result goes to the first operand.
    const WRITES: bool;
    /// Computes; `a` and `b` are zero-extended from `T`, and so is the result.
    fn apply<T: Int>(flags: &mut LazyFlags, a: u64, b: u64) -> u64;
}

macro_rules! alu {
    ($name:ident, $writes:literal, |$flags:ident, $a:ident, $b:ident, $T:ident| $body:block) => {
        #[derive(Debug)]
        pub(in super::super) struct $name;
        impl Alu for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<$T: Int>($flags: &mut LazyFlags, $a: u64, $b: u64) -> u64 $body
        }
    };
}

alu!(Add, true, |flags, a, b, T| {
    let result = cut::<T>(a.wrapping_add(b));
    flags.after_add::<T>(a, b, result);
    result
});
alu!(Adc, true, |flags, a, b, T| {
    let result = cut::<T>(a.wrapping_add(b).wrapping_add(u64::from(flags.carry())));
    flags.after_add::<T>(a, b, result);
    result
});
alu!(Sub, true, |flags, a, b, T| {
    let result = cut::<T>(a.wrapping_sub(b));
    flags.after_sub::<T>(a, b, result);
    result
});
alu!(Sbb, true, |flags, a, b, T| {
    let result = cut::<T>(a.wrapping_sub(b).wrapping_sub(u64::from(flags.carry())));
    flags.after_sub::<T>(a, b, result);
    result
});
alu!(Cmp, false, |flags, a, b, T| {
    flags.after_sub::<T>(a, b, cut::<T>(a.wrapping_sub(b)));
    a
});
alu!(And, true, |flags, a, b, T| {
    flags.after_logic::<T>(a & b);
    a & b
});
alu!(Or, true, |flags, a, b, T| {
    flags.after_logic::<T>(a | b);
    a | b
});
alu!(Xor, true, |flags, a, b, T| {
    flags.after_logic::<T>(a ^ b);
    a ^ b
});
alu!(Test, false, |flags, a, b, T| {
    flags.after_logic::<T>(a & b);
    a
});

/// `INC`: leaves CF.
#[inline(always)]
pub(in super::super) fn increment<T: Int>(flags: &mut LazyFlags, a: u64) -> u64 {
    let carry = flags.carry();
    let result = Add::apply::<T>(flags, a, 1);
    flags.set_carry(carry);
    result
}

/// `DEC`: leaves CF.
#[inline(always)]
pub(in super::super) fn decrement<T: Int>(flags: &mut LazyFlags, a: u64) -> u64 {
    let carry = flags.carry();
    let result = Sub::apply::<T>(flags, a, 1);
    flags.set_carry(carry);
    result
}

/// Any [`Alu`] instruction.
pub(in super::super) fn binary<O: Alu>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    by_width!(width(i, 0), T => {
        let b = cut::<T>(cpu.get(i, 1)?);
        let a = if O::WRITES { cpu.get_for_update(i, 0)? } else { cpu.get(i, 0)? };
        let mut flags = cpu.flags;
        let result = O::apply::<T>(&mut flags, a, b);
        if O::WRITES {
            cpu.put(i, 0, result)?;
        }
        cpu.flags = flags;
        Ok(())
    })
}

/// `INC`.
pub(in super::super) fn inc(cpu: &mut Cpu, i: &Instruction) -> Flow {
    unary(cpu, i, |flags, a, bytes| by_width!(bytes, T => increment::<T>(flags, a)))
}

/// `DEC`.
pub(in super::super) fn dec(cpu: &mut Cpu, i: &Instruction) -> Flow {
    unary(cpu, i, |flags, a, bytes| by_width!(bytes, T => decrement::<T>(flags, a)))
}

/// `NEG`.
pub(in super::super) fn neg(cpu: &mut Cpu, i: &Instruction) -> Flow {
    unary(cpu, i, |flags, a, bytes| by_width!(bytes, T => Sub::apply::<T>(flags, 0, a)))
}

/// `NOT`.
pub(in super::super) fn not(cpu: &mut Cpu, i: &Instruction) -> Flow {
    unary(cpu, i, |_, a, bytes| by_width!(bytes, T => cut::<T>(!a)))
}

fn unary(
    cpu: &mut Cpu,
    i: &Instruction,
    operation: impl Fn(&mut LazyFlags, u64, usize) -> u64,
) -> Flow {
    let a = cpu.get_for_update(i, 0)?;
    let mut flags = cpu.flags;
    let result = operation(&mut flags, a, width(i, 0));
    cpu.put(i, 0, result)?;
    cpu.flags = flags;
    Ok(())
}

/// `XADD`.
pub(in super::super) fn xadd(cpu: &mut Cpu, i: &Instruction) -> Flow {
    by_width!(width(i, 0), T => {
        let a = cpu.get_for_update(i, 0)?;
        let b = cpu.get(i, 1)?;
        let mut flags = cpu.flags;
        let result = Add::apply::<T>(&mut flags, a, b);
        // With both operands the same register, the sum is what stays.
        if i.op0_kind() == iced_x86::OpKind::Memory {
            cpu.put(i, 0, result)?;
            cpu.put(i, 1, a)?;
        } else {
            cpu.put(i, 1, a)?;
            cpu.put(i, 0, result)?;
        }
        cpu.flags = flags;
        Ok(())
    })
}

/// `CMPXCHG`.
pub(in super::super) fn cmpxchg(cpu: &mut Cpu, i: &Instruction) -> Flow {
    by_width!(width(i, 0), T => {
        let old = cpu.get_for_update(i, 0)?;
        let expected = cpu.reg::<T>(0);
        let mut flags = cpu.flags;
        Cmp::apply::<T>(&mut flags, expected, old);
        if expected == old {
            let new = cpu.get(i, 1)?;
            cpu.put(i, 0, new)?;
        } else {
            if i.op0_kind() == iced_x86::OpKind::Memory {
                cpu.put(i, 0, old)?;
            }
            cpu.set_reg::<T>(0, old);
        }
        cpu.flags = flags;
        Ok(())
    })
}

/// `CMPXCHG8B`.
pub(in super::super) fn cmpxchg8b(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let address = cpu.address_of(i);
    let old = cpu.load_for_update::<u64>(address)?;
    let expected = cpu.reg::<u32>(0) | (cpu.reg::<u32>(2) << 32);
    let equal = old == expected;
    let new = if equal { cpu.reg::<u32>(3) | (cpu.reg::<u32>(1) << 32) } else { old };
    cpu.store::<u64>(address, new)?;
    if !equal {
        cpu.set_reg::<u32>(0, cut::<u32>(old));
        cpu.set_reg::<u32>(2, old >> 32);
    }
    cpu.flags.set_zero(equal);
    Ok(())
}

/// `CMPXCHG16B`: the operand must be aligned.
pub(in super::super) fn cmpxchg16b(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let address = cpu.address_of(i);
    if !address.is_multiple_of(16) {
        return Err(cpu.general_protection(0));
    }
    let low = cpu.load_for_update::<u64>(address)?;
    let high = cpu.load_for_update::<u64>(address.wrapping_add(8))?;
    let equal = low == cpu.full(0) && high == cpu.full(2);
    let (new_low, new_high) = if equal { (cpu.full(3), cpu.full(1)) } else { (low, high) };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&new_low.to_le_bytes());
    bytes[8..].copy_from_slice(&new_high.to_le_bytes());
    cpu.store_bytes(address, &bytes)?;
    if !equal {
        cpu.set_full(0, low);
        cpu.set_full(2, high);
    }
    cpu.flags.set_zero(equal);
    Ok(())
}
