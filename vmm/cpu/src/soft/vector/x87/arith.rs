//! Addition to division, square root, scaling, rounding: results written to a register.

use super::stack::{C1, EXCEPTIONS, INDEFINITE, OVERFLOW, PRECOMPUTATION, Stack, UNDERFLOW};
use super::unmasked;
use crate::soft::vector::host_x87::{self, Extended, Outcome};
use crate::state::X87State;

/// What is computed, so that an unmasked overflow or underflow can be computed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `a + b`, `a - b`, `b - a`.
    Sum,
    /// `a * b`.
    Product,
    /// `a / b`.
    Quotient,
    /// `b / a`.
    QuotientReversed,
}

/// An operation of two registers.
pub(super) type Binary = fn(&Extended, &Extended, u16) -> Outcome<Extended>;

/// `ST(target) = run(ST(target), ST(other))`, then a pop if wanted.
pub(super) fn binary(
    x87: &mut X87State,
    kind: Kind,
    run: Binary,
    target: usize,
    other: usize,
    pop: bool,
) {
    let stored = if x87.is_empty(target as isize) || x87.is_empty(other as isize) {
        underflowed(x87, target)
    } else {
        let (a, b) = (x87.st(target), x87.st(other));
        let outcome = run(&a, &b, x87.control);
        write(x87, target, outcome, |outcome, control| {
            unmasked::again(kind, run, &a, &b, outcome, control)
        })
    };
    if stored && pop {
        x87.pop();
    }
}

/// An operation of a register and a memory operand.
#[derive(Debug, Clone, Copy)]
pub(super) struct WithMemory<const BYTES: usize> {
    /// What it computes.
    pub(super) kind: Kind,
    /// The operation.
    pub(super) run: fn(&Extended, &[u8; BYTES], u16) -> Outcome<Extended>,
    /// The same on registers.
    pub(super) on_registers: Binary,
    /// The memory operand as a register.
    pub(super) convert: fn(&[u8; BYTES]) -> Outcome<Extended>,
}

/// `ST(0) = run(ST(0), operand)`.
pub(super) fn with_memory<const BYTES: usize>(
    x87: &mut X87State,
    operation: WithMemory<BYTES>,
    operand: &[u8; BYTES],
) {
    if x87.is_empty(0) {
        underflowed(x87, 0);
        return;
    }
    let WithMemory { kind, run, on_registers, convert } = operation;
    let a = x87.st(0);
    let outcome = run(&a, operand, x87.control);
    write(x87, 0, outcome, |outcome, control| {
        unmasked::again(kind, on_registers, &a, &convert(operand).0, outcome, control)
    });
}

/// `FSQRT`, `FRNDINT`.
pub(super) fn unary(x87: &mut X87State, run: fn(&Extended, u16) -> Outcome<Extended>) {
    if x87.is_empty(0) {
        underflowed(x87, 0);
        return;
    }
    let outcome = run(&x87.st(0), x87.control);
    write(x87, 0, outcome, |outcome, _| outcome);
}

/// `FSCALE`: ST(0) by the power of two that ST(1) truncates to.
pub(super) fn scale(x87: &mut X87State) {
    if x87.is_empty(0) || x87.is_empty(1) {
        underflowed(x87, 0);
        return;
    }
    let (a, b) = (x87.st(0), x87.st(1));
    let outcome = host_x87::scale(&a, &b, x87.control);
    write(x87, 0, outcome, |outcome, control| unmasked::scale_again(&a, &b, outcome, control));
}

/// `FXTRACT`: the exponent replaces ST(0), the significand is pushed.
pub(super) fn extract(x87: &mut X87State) {
    if !has_one_and_room(x87) {
        return;
    }
    let ((exponent, significand), status) = host_x87::extract(&x87.st(0), x87.control);
    x87.set_codes(C1, 0);
    if !x87.raise(status & EXCEPTIONS) {
        x87.set_st(0, exponent);
        x87.push(significand);
    }
}

/// Whether ST(0) is full and a push has room. If not, the stack fault is flagged, and if it is
/// masked both results become indefinite.
pub(super) fn has_one_and_room(x87: &mut X87State) -> bool {
    let masked = if x87.is_empty(0) {
        x87.stack_underflow()
    } else if !x87.is_empty(-1) {
        x87.stack_overflow()
    } else {
        return true;
    };
    if masked {
        x87.set_st(0, INDEFINITE);
        x87.push(INDEFINITE);
    }
    false
}

/// Flags a stack underflow whose masked result goes to ST(target); whether it was masked.
pub(super) fn underflowed(x87: &mut X87State, target: usize) -> bool {
    let masked = x87.stack_underflow();
    if masked {
        x87.set_st(target, INDEFINITE);
    }
    masked
}

/// Flags an outcome's exceptions and writes its result to ST(target), unless an unmasked
/// exception keeps the operands; whether it was written. `again` adjusts the outcome when
/// overflow or underflow is unmasked.
pub(super) fn write(
    x87: &mut X87State,
    target: usize,
    outcome: Outcome<Extended>,
    again: impl FnOnce(Outcome<Extended>, u16) -> Outcome<Extended>,
) -> bool {
    let flags = outcome.1 & EXCEPTIONS;
    x87.set_codes(C1, 0);
    if x87.unmasked(flags & PRECOMPUTATION) != 0 {
        x87.raise(flags & PRECOMPUTATION);
        return false;
    }
    let (result, status) =
        if x87.unmasked(OVERFLOW | UNDERFLOW) != 0 { again(outcome, x87.control) } else { outcome };
    x87.set_codes(C1, status);
    x87.set_st(target, result);
    x87.raise(status & EXCEPTIONS);
    true
}
