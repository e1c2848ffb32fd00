//! Comparisons, `FTST` and `FXAM`.

use super::stack::{C0, C1, C2, C3, EXCEPTIONS, Stack, sign_exponent, significand};
use crate::soft::vector::host_x87::{self, Extended};
use crate::soft::vector::operands::{CARRY, PARITY, ZERO};
use crate::state::X87State;

const CODES: u16 = C0 | C2 | C3;
/// What an unordered comparison reports.
const UNORDERED: u16 = C0 | C2 | C3;

/// A comparison of two registers.
pub(super) type Comparison = fn(&Extended, &Extended) -> u16;

/// What a comparison found, and whether an unmasked exception keeps the operands on the stack:
/// the condition codes are set in either case.
struct Found {
    codes: u16,
    kept: bool,
}

/// Flags a comparison's exceptions.
fn settle(x87: &mut X87State, status: u16) -> Found {
    let kept = x87.raise(status & EXCEPTIONS);
    Found { codes: status & CODES, kept }
}

/// Flags a comparison with an empty register, which is unordered.
fn underflowed(x87: &mut X87State) -> Found {
    let kept = !x87.stack_underflow();
    Found { codes: UNORDERED, kept }
}

fn compare(x87: &mut X87State, run: Comparison, other: usize) -> Found {
    if x87.is_empty(0) || x87.is_empty(other as isize) {
        return underflowed(x87);
    }
    let status = run(&x87.st(0), &x87.st(other));
    settle(x87, status)
}

fn report(x87: &mut X87State, found: &Found, pops: usize) {
    x87.set_codes(CODES | C1, found.codes);
    if !found.kept {
        for _ in 0..pops {
            x87.pop();
        }
    }
}

/// `FCOM`, `FCOMP`, `FCOMPP`, `FUCOM` and its like.
pub(super) fn registers(x87: &mut X87State, run: Comparison, other: usize, pops: usize) {
    let found = compare(x87, run, other);
    report(x87, &found, pops);
}

/// `FCOM` with memory, `FICOM`.
pub(super) fn memory<const BYTES: usize>(
    x87: &mut X87State,
    run: fn(&Extended, &[u8; BYTES]) -> u16,
    operand: &[u8; BYTES],
    pops: usize,
) {
    let found = if x87.is_empty(0) {
        underflowed(x87)
    } else {
        let status = run(&x87.st(0), operand);
        settle(x87, status)
    };
    report(x87, &found, pops);
}

/// `FCOMI` and its like: the arithmetic flags. The condition codes stay.
pub(super) fn to_flags(x87: &mut X87State, run: Comparison, other: usize, pop: bool) -> u64 {
    let found = compare(x87, run, other);
    if pop && !found.kept {
        x87.pop();
    }
    let flag = |code, bit| if found.codes & code != 0 { bit } else { 0 };
    flag(C0, CARRY) | flag(C2, PARITY) | flag(C3, ZERO)
}

/// `FTST`: a comparison with zero.
pub(super) fn with_zero(x87: &mut X87State) {
    let found = if x87.is_empty(0) {
        underflowed(x87)
    } else {
        let status = host_x87::compare(&x87.st(0), &[0; 10]);
        settle(x87, status)
    };
    report(x87, &found, 0);
}

/// `FXAM`.
pub(super) fn examine(x87: &mut X87State) {
    let value = x87.st(0);
    let sign = if sign_exponent(&value) & 0x8000 != 0 { C1 } else { 0 };
    let integer_bit = significand(&value) >> 63 != 0;
    let class = match (sign_exponent(&value) & 0x7FFF, significand(&value)) {
        _ if x87.is_empty(0) => C3 | C0,
        (0, 0) => C3,
        (0, _) => C3 | C2,
        _ if !integer_bit => 0,
        (0x7FFF, 0x8000_0000_0000_0000) => C2 | C0,
        (0x7FFF, _) => C0,
        _ => C2,
    };
    x87.set_codes(CODES | C1, class | sign);
}
