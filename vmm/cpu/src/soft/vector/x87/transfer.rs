//! Loads, stores, constants, exchanges and conditional moves.

use super::arith::underflowed;
use super::stack::{
    C1, DENORMAL, EXCEPTIONS, INDEFINITE, INVALID, OVERFLOW, PRECISION, Stack, UNDERFLOW, extended,
    sign_exponent,
};
use crate::soft::vector::host_x87::{Extended, Outcome};
use crate::state::X87State;

/// Pushes a loaded value, unless the stack is full or an unmasked invalid operand prevents it. An
/// unmasked denormal does not: the register holds it exactly.
pub(super) fn load(x87: &mut X87State, (value, status): Outcome<Extended>) {
    if !x87.is_empty(-1) {
        if x87.stack_overflow() {
            x87.push(INDEFINITE);
        }
        return;
    }
    x87.set_codes(C1, 0);
    x87.raise(status & EXCEPTIONS);
    if x87.unmasked(status & INVALID) == 0 {
        x87.push(value);
    }
}

/// `FLD ST(index)`.
pub(super) fn load_register(x87: &mut X87State, index: usize) {
    let masked = if x87.is_empty(index as isize) {
        x87.stack_underflow()
    } else if !x87.is_empty(-1) {
        x87.stack_overflow()
    } else {
        x87.set_codes(C1, 0);
        return x87.push(x87.st(index));
    };
    if masked {
        x87.push(INDEFINITE);
    }
}

/// `FST ST(index)`, `FSTP ST(index)`.
pub(super) fn store_register(x87: &mut X87State, index: usize, pop: bool) {
    let stored = if x87.is_empty(0) {
        underflowed(x87, index)
    } else {
        x87.set_codes(C1, 0);
        x87.set_st(index, x87.st(0));
        true
    };
    if stored && pop {
        x87.pop();
    }
}

/// `FSTPNCE`: as `FSTP`, but an empty ST(0) is popped without exception and without a copy.
pub(super) fn store_register_if_full(x87: &mut X87State, index: usize) {
    x87.set_codes(C1, 0);
    if !x87.is_empty(0) {
        x87.set_st(index, x87.st(0));
    }
    x87.pop();
}

/// What a store writes, if it writes: `run` converts ST(0); `empty` is the masked result for an
/// empty register; `is_tiny` tells a denormal result, which unmasked underflow does not store.
pub(super) fn store<const BYTES: usize>(
    x87: &mut X87State,
    run: fn(&Extended, u16) -> Outcome<[u8; BYTES]>,
    empty: [u8; BYTES],
    is_tiny: fn(&[u8; BYTES]) -> bool,
    pop: bool,
) -> Option<[u8; BYTES]> {
    let bytes = if x87.is_empty(0) {
        x87.stack_underflow().then_some(empty)?
    } else {
        let (bytes, status) = run(&x87.st(0), x87.control);
        let mut flags = status & EXCEPTIONS;
        x87.set_codes(C1, 0);
        if is_tiny(&bytes) {
            flags |= x87.unmasked(UNDERFLOW);
        }
        if x87.unmasked(flags & (INVALID | DENORMAL | OVERFLOW | UNDERFLOW)) != 0 {
            x87.raise(flags & !PRECISION);
            return None;
        }
        x87.set_codes(C1, status);
        x87.raise(flags);
        bytes
    };
    if pop {
        x87.pop();
    }
    Some(bytes)
}

/// For formats without denormals.
pub(super) fn never<const BYTES: usize>(_: &[u8; BYTES]) -> bool {
    false
}

/// Whether a single is a denormal.
pub(super) fn single_is_tiny(bytes: &[u8; 4]) -> bool {
    f32::from_le_bytes(*bytes).is_subnormal()
}

/// Whether a double is a denormal.
pub(super) fn double_is_tiny(bytes: &[u8; 8]) -> bool {
    f64::from_le_bytes(*bytes).is_subnormal()
}

/// `FSTP m80`: the bytes as they are.
pub(super) fn store_whole(x87: &mut X87State) -> Option<Extended> {
    let bytes = if x87.is_empty(0) {
        x87.stack_underflow().then_some(INDEFINITE)?
    } else {
        x87.set_codes(C1, 0);
        x87.st(0)
    };
    x87.pop();
    Some(bytes)
}

/// `FXCH`: empty registers become indefinite first.
pub(super) fn exchange(x87: &mut X87State, index: usize) {
    x87.set_codes(C1, 0);
    if x87.is_empty(0) || x87.is_empty(index as isize) {
        if !x87.stack_underflow() {
            return;
        }
        for i in [0, index] {
            if x87.is_empty(i as isize) {
                x87.set_st(i, INDEFINITE);
            }
        }
    }
    let (a, b) = (x87.st(0), x87.st(index));
    x87.set_st(0, b);
    x87.set_st(index, a);
}

/// `FCMOVcc`; C1 changes only with a stack underflow.
pub(super) fn move_if(x87: &mut X87State, condition: bool, index: usize) {
    if x87.is_empty(0) || x87.is_empty(index as isize) {
        underflowed(x87, 0);
        return;
    }
    if condition {
        x87.set_st(0, x87.st(index));
    }
}

/// `FCHS`, `FABS`: the sign bit of any value, NaNs too.
pub(super) fn change_sign(x87: &mut X87State, change: fn(u16) -> u16) {
    if x87.is_empty(0) {
        underflowed(x87, 0);
        return;
    }
    x87.set_codes(C1, 0);
    let mut value = x87.st(0);
    let changed = change(sign_exponent(&value));
    value[8..].copy_from_slice(&changed.to_le_bytes());
    x87.set_st(0, value);
}

/// A constant the unit holds with more than 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Constant {
    exponent: u16,
    /// Rounded to nearest.
    nearest: u64,
    /// Whether `nearest` is above the constant.
    above: bool,
}

/// 1.
pub(super) const ONE: Constant = Constant { exponent: 0x3FFF, nearest: 1 << 63, above: false };
/// 0.
pub(super) const NOUGHT: Constant = Constant { exponent: 0, nearest: 0, above: false };
/// log₂ 10.
pub(super) const LOG2_10: Constant =
    Constant { exponent: 0x4000, nearest: 0xD49A_784B_CD1B_8AFE, above: false };
/// log₂ e.
pub(super) const LOG2_E: Constant =
    Constant { exponent: 0x3FFF, nearest: 0xB8AA_3B29_5C17_F0BC, above: true };
/// π.
pub(super) const PI: Constant =
    Constant { exponent: 0x4000, nearest: 0xC90F_DAA2_2168_C235, above: true };
/// log₁₀ 2.
pub(super) const LOG10_2: Constant =
    Constant { exponent: 0x3FFD, nearest: 0x9A20_9A84_FBCF_F799, above: true };
/// ln 2.
pub(super) const LN_2: Constant =
    Constant { exponent: 0x3FFE, nearest: 0xB172_17F7_D1CF_79AC, above: true };

impl Constant {
    /// The constant rounded as RC of `control` wants.
    fn rounded(self, control: u16) -> Extended {
        let exact = matches!(self, ONE | NOUGHT);
        let significand = match (control >> 10 & 3, self.above) {
            _ if exact => self.nearest,
            (1 | 3, true) => self.nearest - 1,
            (2, false) => self.nearest + 1,
            _ => self.nearest,
        };
        extended(self.exponent, significand)
    }
}

/// `FLD1`, `FLDPI` and its like.
pub(super) fn load_constant(x87: &mut X87State, constant: Constant) {
    let value = constant.rounded(x87.control);
    load(x87, (value, 0));
}
