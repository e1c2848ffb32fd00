//! Multiplication and division.

use crate::soft::cpu::{Cpu, gpr};
use crate::soft::event::{Flow, Trap};
use crate::soft::exception::Exception;
use crate::soft::flags::{Int, LazyFlags, cut, signed};
use crate::soft::operand::{by_width, width};
use iced_x86::Instruction;

/// The two halves of an accumulator pair: AH:AL for bytes, rDX:rAX otherwise.
fn set_pair<T: Int>(cpu: &mut Cpu, low: u64, high: u64) {
    if T::BITS == 8 {
        cpu.set_reg::<u16>(gpr::RAX, low | (high << 8));
    } else {
        cpu.set_reg::<T>(gpr::RAX, low);
        cpu.set_reg::<T>(gpr::RDX, high);
    }
}

fn pair<T: Int>(cpu: &Cpu) -> u128 {
    if T::BITS == 8 {
        return u128::from(cpu.reg::<u16>(gpr::RAX));
    }
    (u128::from(cpu.reg::<T>(gpr::RDX)) << T::BITS) | u128::from(cpu.reg::<T>(gpr::RAX))
}

/// The signed product of two values as `T`, cut to `T`, with CF and OF set if it did not fit.
#[inline(always)]
pub(in super::super) fn signed_product<T: Int>(flags: &mut LazyFlags, a: u64, b: u64) -> u64 {
    let (a, b) = (signed::<T>(a) as i64, signed::<T>(b) as i64);
    let result = cut::<T>(a.wrapping_mul(b) as u64);
    let overflow = i128::from(signed::<T>(result) as i64) != i128::from(a) * i128::from(b);
    flags.after_product(overflow);
    result
}

/// `MUL`.
pub(in super::super) fn mul(cpu: &mut Cpu, i: &Instruction) -> Flow {
    by_width!(width(i, 0), T => {
        let b = cpu.get(i, 0)?;
        let product = u128::from(cpu.reg::<T>(gpr::RAX)) * u128::from(b);
        let (low, high) = (cut::<T>(product as u64), cut::<T>((product >> T::BITS) as u64));
        set_pair::<T>(cpu, low, high);
        cpu.flags.after_product(high != 0);
        Ok(())
    })
}

/// `IMUL` with one, two or three operands.
pub(in super::super) fn imul(cpu: &mut Cpu, i: &Instruction) -> Flow {
    by_width!(width(i, 0), T => {
        if i.op_count() > 1 {
            let (a, b) = match i.op_count() {
                2 => (cpu.get(i, 0)?, cpu.get(i, 1)?),
                _ => (cpu.get(i, 1)?, cpu.get(i, 2)?),
            };
            let mut flags = cpu.flags;
            let result = signed_product::<T>(&mut flags, a, b);
            cpu.put(i, 0, result)?;
            cpu.flags = flags;
            return Ok(());
        }
        let b = cpu.get(i, 0)?;
        let a = cpu.reg::<T>(gpr::RAX);
        let product = i128::from(signed::<T>(a) as i64) * i128::from(signed::<T>(b) as i64);
        let low = cut::<T>(product as u64);
        set_pair::<T>(cpu, low, cut::<T>((product >> T::BITS) as u64));
        let overflow = i128::from(signed::<T>(low) as i64) != product;
        cpu.flags.after_product(overflow);
        Ok(())
    })
}

/// `DIV`. The arithmetic flags, undefined by the manuals, are clear.
pub(in super::super) fn div(cpu: &mut Cpu, i: &Instruction) -> Flow {
    by_width!(width(i, 0), T => {
        let divisor = u128::from(cpu.get(i, 0)?);
        let dividend = pair::<T>(cpu);
        if divisor == 0 || (dividend / divisor) >> T::BITS != 0 {
            return Err(cpu.raise(Exception::DivideError));
        }
        set_pair::<T>(cpu, (dividend / divisor) as u64, (dividend % divisor) as u64);
        cpu.flags.after_zero_test(false);
        Ok(())
    })
}

/// `IDIV`. The arithmetic flags, undefined by the manuals, are clear.
pub(in super::super) fn idiv(cpu: &mut Cpu, i: &Instruction) -> Flow {
    by_width!(width(i, 0), T => {
        let divisor = i128::from(signed::<T>(cpu.get(i, 0)?) as i64);
        let unused = 128 - 2 * T::BITS;
        let dividend = ((pair::<T>(cpu) << unused) as i128) >> unused;
        let (quotient, remainder) = signed_division(cpu, dividend, divisor)?;
        let low = cut::<T>(quotient as u64);
        if i128::from(signed::<T>(low) as i64) != quotient {
            return Err(cpu.raise(Exception::DivideError));
        }
        set_pair::<T>(cpu, low, cut::<T>(remainder as u64));
        cpu.flags.after_zero_test(false);
        Ok(())
    })
}

fn signed_division(cpu: &mut Cpu, dividend: i128, divisor: i128) -> Result<(i128, i128), Trap> {
    match (dividend.checked_div(divisor), dividend.checked_rem(divisor)) {
        (Some(quotient), Some(remainder)) => Ok((quotient, remainder)),
        _ => Err(cpu.raise(Exception::DivideError)),
    }
}
