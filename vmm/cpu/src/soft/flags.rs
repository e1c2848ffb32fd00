//! The arithmetic flags, computed when they are asked for.
//!
//! An arithmetic instruction leaves its result and the carries of its bit positions; each flag
//! is a function of these two words, the same for every operation, so that no reader has to
//! know which instruction came last. The other bits of RFLAGS live in the register file.

/// Carry.
pub(super) const CF: u64 = 1;
/// Parity.
pub(super) const PF: u64 = 1 << 2;
/// Auxiliary carry.
pub(super) const AF: u64 = 1 << 4;
/// Zero.
pub(super) const ZF: u64 = 1 << 6;
/// Sign.
pub(super) const SF: u64 = 1 << 7;
/// Trap after each instruction.
pub(super) const TF: u64 = 1 << 8;
/// Interrupts enabled.
pub(super) const IF: u64 = 1 << 9;
/// String instructions go down.
pub(super) const DF: u64 = 1 << 10;
/// Overflow.
pub(super) const OF: u64 = 1 << 11;
/// I/O privilege level.
pub(super) const IOPL: u64 = 3 << 12;
/// Nested task.
pub(super) const NT: u64 = 1 << 14;
/// Resume.
pub(super) const RF: u64 = 1 << 16;
/// Alignment check.
pub(super) const AC: u64 = 1 << 18;
/// CPUID is there.
pub(super) const ID: u64 = 1 << 21;
/// Reads as one.
pub(super) const FIXED: u64 = 1 << 1;

/// The flags kept lazily.
pub(super) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
/// Every bit of RFLAGS this CPU has.
pub(super) const ALL: u64 = ARITHMETIC | TF | IF | DF | IOPL | NT | RF | AC | ID | FIXED;

/// An operand width.
pub(super) trait Int: Copy + 'static {
    /// Width in bits.
    const BITS: u32;
    /// Width in bytes.
    const BYTES: usize;
    /// The value, zero-extended.
    fn wide(self) -> u64;
    /// The low bits of `value`.
    fn narrow(value: u64) -> Self;
}

macro_rules! int {
    ($($type:ty),*) => {$(
        impl Int for $type {
            const BITS: u32 = <$type>::BITS;
            const BYTES: usize = size_of::<$type>();
            #[inline(always)]
            fn wide(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn narrow(value: u64) -> Self {
                value as $type
            }
        }
    )*};
}
int!(u8, u16, u32, u64);

/// `value` cut to the width of `T`, zero-extended.
#[inline(always)]
pub(super) fn cut<T: Int>(value: u64) -> u64 {
    T::narrow(value).wide()
}

/// `value` cut to the width of `T`, sign-extended.
#[inline(always)]
pub(super) fn signed<T: Int>(value: u64) -> u64 {
    let shift = 64 - T::BITS;
    (((value << shift) as i64) >> shift) as u64
}

/// The top bit of `value` as a `T`.
#[inline(always)]
pub(super) fn sign<T: Int>(value: u64) -> bool {
    (value >> (T::BITS - 1)) & 1 != 0
}

const CARRY: u32 = 63;
const INTO_SIGN: u32 = 62;
const HALF_CARRY: u32 = 3;
const KEPT_CARRIES: u64 = (1 << CARRY) | (1 << INTO_SIGN) | (1 << HALF_CARRY);

/// The arithmetic flags as the last result and its carries.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LazyFlags {
    /// The result, sign-extended.
    result: u64,
    /// Carry out of the top bit (63), carry into the top bit (62), carry out of bit 3 (3),
    /// inversion of SF (0), inversion of the result's low byte for PF (8 to 15).
    carries: u64,
}

impl LazyFlags {
    /// Sets all arithmetic flags from the bits of RFLAGS.
    pub(super) fn set(&mut self, bits: u64) {
        let carry = u64::from(bits & CF != 0);
        let overflow = u64::from(bits & OF != 0);
        let zero = bits & ZF != 0;
        self.result = u64::from(!zero);
        let odd_result = u64::from(!zero);
        let odd_wanted = u64::from(bits & PF == 0);
        self.carries = (carry << CARRY)
            | ((carry ^ overflow) << INTO_SIGN)
            | (u64::from(bits & AF != 0) << HALF_CARRY)
            | u64::from(bits & SF != 0)
            | ((odd_result ^ odd_wanted) << 8);
    }

    /// The arithmetic bits of RFLAGS.
    pub(super) fn bits(&self) -> u64 {
        let mut bits = 0;
        for (set, bit) in [
            (self.carry(), CF),
            (self.parity(), PF),
            (self.half_carry(), AF),
            (self.zero(), ZF),
            (self.sign(), SF),
            (self.overflow(), OF),
        ] {
            if set {
                bits |= bit;
            }
        }
        bits
    }

    /// CF.
    #[inline(always)]
    pub(super) fn carry(&self) -> bool {
        self.carries >> CARRY != 0
    }

    /// OF.
    #[inline(always)]
    pub(super) fn overflow(&self) -> bool {
        (self.carries ^ (self.carries << 1)) >> CARRY != 0
    }

    /// AF.
    #[inline(always)]
    pub(super) fn half_carry(&self) -> bool {
        self.carries & (1 << HALF_CARRY) != 0
    }

    /// ZF.
    #[inline(always)]
    pub(super) fn zero(&self) -> bool {
        self.result == 0
    }

    /// SF.
    #[inline(always)]
    pub(super) fn sign(&self) -> bool {
        (self.result >> 63) ^ (self.carries & 1) != 0
    }

    /// PF.
    #[inline(always)]
    pub(super) fn parity(&self) -> bool {
        let byte = (self.result ^ (self.carries >> 8)) & 0xFF;
        let nibble = (byte ^ (byte >> 4)) & 0xF;
        (0x6996_u32 >> nibble) & 1 == 0
    }

    /// After `a + b (+ carry) = result`, all zero-extended from `T`.
    #[inline(always)]
    pub(super) fn after_add<T: Int>(&mut self, a: u64, b: u64, result: u64) {
        self.result = signed::<T>(result);
        self.carries = aligned::<T>((a & b) | ((a | b) & !result));
    }

    /// After `a - b (- borrow) = result`, all zero-extended from `T`.
    #[inline(always)]
    pub(super) fn after_sub<T: Int>(&mut self, a: u64, b: u64, result: u64) {
        self.result = signed::<T>(result);
        self.carries = aligned::<T>((!a & b) | ((!a | b) & result));
    }

    /// After a bitwise operation: CF, OF and AF clear.
    #[inline(always)]
    pub(super) fn after_logic<T: Int>(&mut self, result: u64) {
        self.result = signed::<T>(result);
        self.carries = 0;
    }

    /// After an operation that gives its own CF and OF; AF clear.
    #[inline(always)]
    pub(super) fn after<T: Int>(&mut self, result: u64, carry: bool, overflow: bool) {
        self.result = signed::<T>(result);
        self.carries = (u64::from(carry) << CARRY) | (u64::from(carry ^ overflow) << INTO_SIGN);
    }

    /// After a multiplication: CF and OF say that the product did not fit; the others, which the
    /// manuals leave undefined, are clear.
    #[inline(always)]
    pub(super) fn after_product(&mut self, overflow: bool) {
        // One is not zero, not negative and of odd parity.
        self.result = 1;
        self.carries = u64::from(overflow) << CARRY;
    }

    /// After an instruction that defines ZF alone, or no flag at all: the others are clear.
    #[inline(always)]
    pub(super) fn after_zero_test(&mut self, zero: bool) {
        self.set(if zero { ZF } else { 0 });
    }

    /// Replaces CF.
    #[inline(always)]
    pub(super) fn set_carry(&mut self, carry: bool) {
        let overflow = self.overflow();
        self.set_carry_overflow(carry, overflow);
    }

    /// Replaces CF and OF.
    #[inline(always)]
    pub(super) fn set_carry_overflow(&mut self, carry: bool, overflow: bool) {
        self.carries &= !((1 << CARRY) | (1 << INTO_SIGN));
        self.carries |= (u64::from(carry) << CARRY) | (u64::from(carry ^ overflow) << INTO_SIGN);
    }

    /// Replaces ZF, leaving the others.
    pub(super) fn set_zero(&mut self, zero: bool) {
        let bits = self.bits() & !ZF;
        self.set(if zero { bits | ZF } else { bits });
    }

    /// Whether the condition with the number `C` of the opcode map holds (0 is O, 15 is G).
    #[inline(always)]
    pub(super) fn holds<const C: u8>(&self) -> bool {
        let positive = match C >> 1 {
            0 => self.overflow(),
            1 => self.carry(),
            2 => self.zero(),
            3 => self.carry() || self.zero(),
            4 => self.sign(),
            5 => self.parity(),
            6 => self.sign() != self.overflow(),
            _ => self.zero() || self.sign() != self.overflow(),
        };
        positive != (C & 1 != 0)
    }
}

/// Moves the carries of the two top bits of `T` to where they are kept.
#[inline(always)]
fn aligned<T: Int>(carries: u64) -> u64 {
    if T::BITS == 64 {
        carries & KEPT_CARRIES
    } else {
        let top = (carries << (64 - T::BITS)) & ((1 << CARRY) | (1 << INTO_SIGN));
        top | (carries & (1 << HALF_CARRY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(bits: u64) -> LazyFlags {
        let mut flags = LazyFlags::default();
        flags.set(bits);
        flags
    }

    #[test]
    fn every_combination_of_flags_survives_being_set_and_read() {
        for bits in 0..=ALL {
            if bits & !ARITHMETIC == 0 {
                assert_eq!(with(bits).bits(), bits);
            }
        }
    }

    #[test]
    fn byte_additions_and_subtractions_give_the_flags_of_the_definition() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let mut flags = LazyFlags::default();
                flags.after_add::<u8>(a.into(), b.into(), a.wrapping_add(b).into());
                assert_eq!(flags.carry(), a.checked_add(b).is_none());
                assert_eq!(flags.overflow(), (a as i8).checked_add(b as i8).is_none());
                assert_eq!(flags.half_carry(), (a & 15) + (b & 15) > 15);
                assert_eq!(flags.zero(), a.wrapping_add(b) == 0);
                assert_eq!(flags.sign(), a.wrapping_add(b) > 127);
                assert_eq!(flags.parity(), a.wrapping_add(b).count_ones().is_multiple_of(2));
                flags.after_sub::<u8>(a.into(), b.into(), a.wrapping_sub(b).into());
                assert_eq!(flags.carry(), a < b);
                assert_eq!(flags.overflow(), (a as i8).checked_sub(b as i8).is_none());
                assert_eq!(flags.half_carry(), (a & 15) < (b & 15));
                assert_eq!(flags.holds::<12>(), (a as i8) < (b as i8));
                assert_eq!(flags.holds::<7>(), a > b);
            }
        }
    }

    #[test]
    fn a_product_and_a_test_for_zero_leave_nothing_of_the_flags_before() {
        for before in [0, ARITHMETIC] {
            let mut flags = with(before);
            flags.after_product(false);
            assert_eq!(flags.bits(), 0);
            flags.set(before);
            flags.after_product(true);
            assert_eq!(flags.bits(), CF | OF);
            flags.after_zero_test(true);
            assert_eq!(flags.bits(), ZF);
            flags.after_zero_test(false);
            assert_eq!(flags.bits(), 0);
        }
    }

    #[test]
    fn replacing_the_carry_leaves_the_overflow() {
        for bits in [0, OF, CF, OF | CF, OF | ZF | SF | PF | AF] {
            for carry in [false, true] {
                let mut flags = with(bits);
                flags.set_carry(carry);
                assert_eq!(flags.bits(), (bits & !CF) | u64::from(carry));
            }
        }
    }
}
