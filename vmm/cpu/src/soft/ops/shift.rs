//! Shifts and rotates.
//!
//! Flags that the manuals leave undefined have fixed values here, whatever the operands are: AF
//! is clear after a shift, and so is OF after a count other than one. After a rotation by a count
//! other than one OF is computed as for one, as all processors do.

use crate::soft::cpu::{Cpu, gpr};
use crate::soft::event::Flow;
use crate::soft::flags::{Int, LazyFlags, cut, sign, signed};
use crate::soft::operand::{by_width, width};
use iced_x86::Instruction;

/// The count as the CPU uses it.
#[inline(always)]
pub(in super::super) fn masked<T: Int>(count: u64) -> u32 {
    (count & if T::BITS == 64 { 63 } else { 31 }) as u32
}

/// A shift or rotate by a masked count.
pub(in super::super) trait Shift: 'static {
    /// Computes; `a` is zero-extended from `T`, and so is the result.
    fn apply<T: Int>(flags: &mut LazyFlags, a: u64, count: u32) -> u64;
}

macro_rules! shift {
    ($name:ident, |$flags:ident, $a:ident, $count:ident, $T:ident| $body:block) => {
        #[derive(Debug)]
        pub(in super::super) struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<$T: Int>($flags: &mut LazyFlags, $a: u64, $count: u32) -> u64 {
                if $count == 0 {
                    return $a;
                }
                $body
            }
        }
    };
}

shift!(Shl, |flags, a, count, T| {
    let result = cut::<T>(a << count);
    // Narrow operands fit the 64 bits together with what is shifted out.
    let out = if T::BITS == 64 { a >> (64 - count) } else { (a << count) >> T::BITS };
    let carry = out & 1 != 0;
    flags.after::<T>(result, carry, count == 1 && carry != sign::<T>(result));
    result
});
shift!(Shr, |flags, a, count, T| {
    let result = a >> count;
    flags.after::<T>(result, (a >> (count - 1)) & 1 != 0, count == 1 && sign::<T>(a));
    result
});
shift!(Sar, |flags, a, count, T| {
    let extended = signed::<T>(a) as i64;
    let result = cut::<T>((extended >> count) as u64);
    flags.after::<T>(result, (extended >> (count - 1)) & 1 != 0, false);
    result
});
shift!(Rol, |flags, a, count, T| {
    let turn = count % T::BITS;
    let result = if turn == 0 { a } else { cut::<T>((a << turn) | (a >> (T::BITS - turn))) };
    let carry = result & 1 != 0;
    flags.set_carry_overflow(carry, carry != sign::<T>(result));
    result
});
shift!(Ror, |flags, a, count, T| {
    let turn = count % T::BITS;
    let result = if turn == 0 { a } else { cut::<T>((a >> turn) | (a << (T::BITS - turn))) };
    let carry = sign::<T>(result);
    flags.set_carry_overflow(carry, carry != sign::<T>(cut::<T>(result << 1)));
    result
});
shift!(Rcl, |flags, a, count, T| {
    let turn = count % (T::BITS + 1);
    let mut result = a;
    let mut carry = flags.carry();
    for _ in 0..turn {
        let out = sign::<T>(result);
        result = cut::<T>((result << 1) | u64::from(carry));
        carry = out;
    }
    flags.set_carry_overflow(carry, carry != sign::<T>(result));
    result
});
shift!(Rcr, |flags, a, count, T| {
    let turn = count % (T::BITS + 1);
    let mut result = a;
    let mut carry = flags.carry();
    for _ in 0..turn {
        let out = result & 1 != 0;
        result = (result >> 1) | (u64::from(carry) << (T::BITS - 1));
        carry = out;
    }
    let overflow = sign::<T>(result) != sign::<T>(cut::<T>(result << 1));
    flags.set_carry_overflow(carry, overflow);
    result
});

/// Any [`Shift`] instruction.
pub(in super::super) fn by_count<S: Shift>(cpu: &mut Cpu, i: &Instruction) -> Flow {
    by_width!(width(i, 0), T => {
        let count = masked::<T>(cpu.get(i, 1)?);
        let a = cpu.get_for_update(i, 0)?;
        let mut flags = cpu.flags;
        let result = S::apply::<T>(&mut flags, a, count);
        cpu.put(i, 0, result)?;
        cpu.flags = flags;
        Ok(())
    })
}

/// `SHLD`. A count beyond a 16-bit operand's width shifts the first operand in again, as
/// Intel's processors do.
pub(in super::super) fn shld(cpu: &mut Cpu, i: &Instruction) -> Flow {
    double(cpu, i, |bits, a, b, count| {
        let chain = if bits == 16 {
            (u128::from(a) << 32) | (u128::from(b) << 16) | u128::from(a)
        } else {
            (u128::from(a) << bits) | u128::from(b)
        };
        let total = if bits == 16 { 48 } else { 2 * bits };
        let carry = (chain >> (total - count)) & 1 != 0;
        ((chain >> (total - bits - count)) as u64, carry)
    })
}

/// `SHRD`; see [`shld`].
pub(in super::super) fn shrd(cpu: &mut Cpu, i: &Instruction) -> Flow {
    double(cpu, i, |bits, a, b, count| {
        let mut chain = u128::from(a) | (u128::from(b) << bits);
        if bits == 16 {
            chain |= u128::from(a) << 32;
        }
        ((chain >> count) as u64, (chain >> (count - 1)) & 1 != 0)
    })
}

fn double(
    cpu: &mut Cpu,
    i: &Instruction,
    operation: impl Fn(u32, u64, u64, u32) -> (u64, bool),
) -> Flow {
    by_width!(width(i, 0), T => {
        let count = match i.op_count() {
            3 => masked::<T>(cpu.get(i, 2)?),
            _ => masked::<T>(cpu.full(gpr::RCX)),
        };
        let b = cpu.get(i, 1)?;
        let a = cpu.get_for_update(i, 0)?;
        if count == 0 {
            return cpu.put(i, 0, a);
        }
        let (result, carry) = operation(T::BITS, a, b, count);
        let result = cut::<T>(result);
        cpu.put(i, 0, result)?;
        let overflow = count == 1 && sign::<T>(result) != sign::<T>(a);
        cpu.flags.after::<T>(result, carry, overflow);
        Ok(())
    })
}
