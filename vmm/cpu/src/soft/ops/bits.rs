//! Bit tests, bit scans, byte swaps.

use crate::soft::cpu::Cpu;
use crate::soft::event::Flow;
use crate::soft::flags::{Int, signed};
use crate::soft::operand::{address_mask, by_width, width};
use iced_x86::{Instruction, OpKind};

/// What a bit test does to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    Set,
    Reset,
    Complement,
}

/// `BT`.
pub(in super::super) fn bt(cpu: &mut Cpu, i: &Instruction) -> Flow {
    test_bit(cpu, i, Change::None)
}

/// `BTS`.
pub(in super::super) fn bts(cpu: &mut Cpu, i: &Instruction) -> Flow {
    test_bit(cpu, i, Change::Set)
}

/// `BTR`.
pub(in super::super) fn btr(cpu: &mut Cpu, i: &Instruction) -> Flow {
    test_bit(cpu, i, Change::Reset)
}

/// `BTC`.
pub(in super::super) fn btc(cpu: &mut Cpu, i: &Instruction) -> Flow {
    test_bit(cpu, i, Change::Complement)
}

fn test_bit(cpu: &mut Cpu, i: &Instruction, change: Change) -> Flow {
    by_width!(width(i, 0), T => {
        let number = cpu.get(i, 1)?;
        let bit = 1u64 << (number % u64::from(T::BITS));
        if i.op0_kind() == OpKind::Register {
            let value = cpu.get(i, 0)?;
            if change != Change::None {
                cpu.put(i, 0, changed(value, bit, change))?;
            }
            cpu.flags.set_carry(value & bit != 0);
            return Ok(());
        }
        let address = bit_address::<T>(cpu, i, number);
        let value = if change == Change::None {
            cpu.load::<T>(address)?
        } else {
            let value = cpu.load_for_update::<T>(address)?;
            cpu.store::<T>(address, changed(value, bit, change))?;
            value
        };
        cpu.flags.set_carry(value & bit != 0);
        Ok(())
    })
}

/// With a register for the bit number, memory is a string of bits in both directions.
fn bit_address<T: Int>(cpu: &Cpu, i: &Instruction, number: u64) -> u64 {
    if i.op1_kind() != OpKind::Register {
        return cpu.address_of(i);
    }
    let units = (signed::<T>(number) as i64) >> T::BITS.trailing_zeros();
    let offset = cpu.offset_of(i).wrapping_add((units * T::BYTES as i64) as u64);
    cpu.in_operand_segment(i, offset & address_mask(i), T::BYTES)
}

fn changed(value: u64, bit: u64, change: Change) -> u64 {
    match change {
        Change::None => value,
        Change::Set => value | bit,
        Change::Reset => value & !bit,
        Change::Complement => value ^ bit,
    }
}

/// `BSF`: with a zero source the destination stays. The flags but ZF are clear.
pub(in super::super) fn bsf(cpu: &mut Cpu, i: &Instruction) -> Flow {
    scan(cpu, i, |value| u64::from(value.trailing_zeros()))
}

/// `BSR`; see [`bsf`].
pub(in super::super) fn bsr(cpu: &mut Cpu, i: &Instruction) -> Flow {
    scan(cpu, i, |value| u64::from(63 - value.leading_zeros()))
}

fn scan(cpu: &mut Cpu, i: &Instruction, position: impl Fn(u64) -> u64) -> Flow {
    let source = cpu.get(i, 1)?;
    if source != 0 {
        cpu.put(i, 0, position(source))?;
    }
    cpu.flags.after_zero_test(source == 0);
    Ok(())
}

/// `POPCNT`: clears all arithmetic flags but ZF.
pub(in super::super) fn popcnt(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let source = cpu.get(i, 1)?;
    cpu.put(i, 0, u64::from(source.count_ones()))?;
    cpu.flags.after_zero_test(source == 0);
    Ok(())
}

/// `BSWAP`; of a 16-bit register it leaves zero, as processors do.
pub(in super::super) fn bswap(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let value = cpu.get(i, 0)?;
    let swapped = match width(i, 0) {
        8 => value.swap_bytes(),
        4 => u64::from((value as u32).swap_bytes()),
        _ => 0,
    };
    cpu.put(i, 0, swapped)
}
