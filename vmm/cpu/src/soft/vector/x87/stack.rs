//! The register stack, the tags, and the exception flags with their summary.

use crate::soft::vector::host_x87::Extended;
use crate::state::X87State;

/// Tag of a normal number.
const VALID: u16 = 0;
/// Tag of a zero.
const ZERO: u16 = 1;
/// Tag of a NaN, infinity, denormal or unsupported encoding.
const SPECIAL: u16 = 2;
/// Tag of an empty register.
const EMPTY: u16 = 3;

/// IE.
pub(super) const INVALID: u16 = 1;
/// DE.
pub(super) const DENORMAL: u16 = 1 << 1;
/// ZE.
pub(super) const DIVIDE_BY_ZERO: u16 = 1 << 2;
/// OE.
pub(super) const OVERFLOW: u16 = 1 << 3;
/// UE.
pub(super) const UNDERFLOW: u16 = 1 << 4;
/// PE.
pub(super) const PRECISION: u16 = 1 << 5;
/// SF.
const STACK_FAULT: u16 = 1 << 6;
/// The exception flags of the status word, and their masks in the control word.
pub(super) const EXCEPTIONS: u16 = 0x3F;
/// Flags known before a result is computed: an unmasked one leaves the operands.
pub(super) const PRECOMPUTATION: u16 = INVALID | DENORMAL | DIVIDE_BY_ZERO;
/// Status bits ES and B.
pub(super) const SUMMARY: u16 = 0x8080;
/// C0.
pub(super) const C0: u16 = 1 << 8;
/// C1.
pub(super) const C1: u16 = 1 << 9;
/// C2.
pub(super) const C2: u16 = 1 << 10;
/// C3.
pub(super) const C3: u16 = 1 << 14;
/// Where TOP begins in the status word.
const TOP_SHIFT: u16 = 11;

/// The default NaN, "real indefinite".
pub(super) const INDEFINITE: Extended = [0, 0, 0, 0, 0, 0, 0, 0xC0, 0xFF, 0xFF];

/// Sign and exponent of a register.
pub(super) fn sign_exponent(register: &Extended) -> u16 {
    u16::from_le_bytes([register[8], register[9]])
}

/// The 64 bits below sign and exponent.
pub(super) fn significand(register: &Extended) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&register[..8]);
    u64::from_le_bytes(bytes)
}

/// A register of these parts.
pub(super) fn extended(sign_exponent: u16, significand: u64) -> Extended {
    let mut register = [0; 10];
    register[..8].copy_from_slice(&significand.to_le_bytes());
    register[8..].copy_from_slice(&sign_exponent.to_le_bytes());
    register
}

/// The tag that a value of a register has in the full tag word.
fn tag_of(register: &Extended) -> u16 {
    match (sign_exponent(register) & 0x7FFF, significand(register)) {
        (0, 0) => ZERO,
        (0 | 0x7FFF, _) => SPECIAL,
        (_, significand) if significand >> 63 == 0 => SPECIAL,
        _ => VALID,
    }
}

/// What the instructions do with the unit's registers.
pub(in super::super) trait Stack {
    /// TOP.
    fn top(&self) -> usize;
    /// Changes TOP; the physical registers stay where they are.
    fn set_top(&mut self, top: usize);
    /// Whether ST(`index`) is empty; -1 is the register a push would fill.
    fn is_empty(&self, index: isize) -> bool;
    /// Marks ST(`index`) empty.
    fn free(&mut self, index: usize);
    /// ST(`index`).
    fn st(&self, index: usize) -> Extended;
    /// Writes ST(`index`) and its tag.
    fn set_st(&mut self, index: usize, value: Extended);
    /// Pushes a value.
    fn push(&mut self, value: Extended);
    /// Pops, leaving the register empty.
    fn pop(&mut self);
    /// Flags exceptions; whether one of them is unmasked.
    fn raise(&mut self, flags: u16) -> bool;
    /// Of these flags, those not masked.
    fn unmasked(&self, flags: u16) -> u16;
    /// Replaces condition codes `mask` by those of `codes`.
    fn set_codes(&mut self, mask: u16, codes: u16);
    /// Flags a read of an empty register; whether it is masked.
    fn stack_underflow(&mut self) -> bool;
    /// Flags a push onto a full stack; whether it is masked.
    fn stack_overflow(&mut self) -> bool;
    /// Sets ES and B if an unmasked exception is flagged, and clears them otherwise.
    fn summarise(&mut self);
}

/// The number of the physical register that is ST(`index`).
fn physical(x87: &X87State, index: isize) -> usize {
    (x87.top() as isize + index) as usize & 7
}

fn set_tag(x87: &mut X87State, physical: usize, tag: u16) {
    x87.tags = x87.tags & !(3 << (2 * physical)) | tag << (2 * physical);
}

impl Stack for X87State {
    fn top(&self) -> usize {
        usize::from(self.status >> TOP_SHIFT & 7)
    }

    fn set_top(&mut self, top: usize) {
        let old = self.top();
        self.registers.rotate_left((top + 8 - old) & 7);
        self.status = self.status & !(7 << TOP_SHIFT) | (top as u16 & 7) << TOP_SHIFT;
    }

    fn is_empty(&self, index: isize) -> bool {
        self.tags >> (2 * physical(self, index)) & 3 == EMPTY
    }

    fn free(&mut self, index: usize) {
        let physical = physical(self, index as isize);
        set_tag(self, physical, EMPTY);
    }

    fn st(&self, index: usize) -> Extended {
        self.registers[index & 7]
    }

    fn set_st(&mut self, index: usize, value: Extended) {
        self.registers[index & 7] = value;
        let physical = physical(self, index as isize);
        set_tag(self, physical, tag_of(&value));
    }

    fn push(&mut self, value: Extended) {
        self.set_top((self.top() + 7) & 7);
        self.set_st(0, value);
    }

    fn pop(&mut self) {
        self.free(0);
        self.set_top((self.top() + 1) & 7);
    }

    fn raise(&mut self, flags: u16) -> bool {
        self.status |= flags;
        let unmasked = self.unmasked(flags) != 0;
        if unmasked {
            self.status |= SUMMARY;
        }
        unmasked
    }

    fn unmasked(&self, flags: u16) -> u16 {
        flags & !self.control & EXCEPTIONS
    }

    fn set_codes(&mut self, mask: u16, codes: u16) {
        self.status = self.status & !mask | codes & mask;
    }

    fn stack_underflow(&mut self) -> bool {
        self.set_codes(C1, 0);
        !self.raise(INVALID | STACK_FAULT)
    }

    fn stack_overflow(&mut self) -> bool {
        self.set_codes(C1, C1);
        !self.raise(INVALID | STACK_FAULT)
    }

    fn summarise(&mut self) {
        self.status &= !SUMMARY;
        if self.unmasked(self.status) != 0 {
            self.status |= SUMMARY;
        }
    }
}

/// Completes a state whose control, status and registers were loaded from an image: tags of the
/// physical registers that are not empty follow from their contents, ES and B from the flags;
/// control bits that do not exist read as the hardware has them.
pub(in super::super) fn settle_loaded(x87: &mut X87State, empty: impl Fn(usize) -> bool) {
    x87.control = x87.control & 0x1F3F | 0x40;
    let top = x87.top();
    x87.tags = (0..8).fold(0, |tags, physical| {
        let tag =
            if empty(physical) { EMPTY } else { tag_of(&x87.registers[(physical + 8 - top) & 7]) };
        tags | tag << (2 * physical)
    });
    x87.summarise();
}

/// Marks every register full, as MMX instructions do.
pub(in super::super) fn mark_all_full(x87: &mut X87State) {
    settle_loaded(x87, |_| false);
}

/// Marks every register empty, as `EMMS` does.
pub(in super::super) fn mark_all_empty(x87: &mut X87State) {
    x87.tags = 0xFFFF;
}

/// Whether the physical register is empty in a full tag word.
pub(super) fn is_empty_in(tags: u16, physical: usize) -> bool {
    tags >> (2 * physical) & 3 == EMPTY
}
