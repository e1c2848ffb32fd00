//! Where the guest's arithmetic flags are while code is made.
//!
//! They are in the host's flags after an instruction that computes them, and in the frame's word at
//! every place where code may leave. What the manuals leave undefined the engine defines as zero,
//! and the host may compute as it likes: those flags are known to be zero until they are saved.

use super::asm::*;
use super::frame::slot;
use crate::soft::flags::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};

/// What LAHF gives.
const IN_AH: u64 = SF | ZF | AF | PF | CF;

/// What is known at a place in the code.
#[derive(Debug, Clone, Copy)]
pub(super) struct FlagState {
    /// Flags that are right in the host.
    host: u64,
    /// Flags that are zero, whatever the host has; meaningless while `current`.
    zero: u64,
    /// All flags are right in the frame.
    current: bool,
}

impl FlagState {
    /// As at the beginning of a block, and wherever code can be entered.
    pub(super) const IN_FRAME: Self = Self { host: 0, zero: 0, current: true };

    /// Sees to it that the frame has the flags. RAX is lost.
    pub(super) fn save(&mut self, a: &mut Assembler) {
        if self.current {
            return;
        }
        self.current = true;
        assert_eq!(self.host | self.zero, ARITHMETIC);
        if self.zero == ARITHMETIC {
            // mov word [rsp + FLAGS], 0x0200
            a.raw(&[0x66]);
            a.op_m(LONG, &[0xC7], Reg(0), Mem::frame(slot::FLAGS));
            a.raw(&[0x00, 0x02]);
            return;
        }
        a.raw(&[0x9F]);
        if self.zero & OF == 0 {
            a.raw(&[0x0F, 0x90, 0xC0]);
        } else {
            a.raw(&[0xB0, 0x00]);
        }
        if self.zero & IN_AH != 0 {
            // and ah, imm8
            a.raw(&[0x80, 0xE4, !(self.zero as u8)]);
            self.host = 0;
        }
        a.raw(&[0x66]);
        a.op_m(LONG, &[0x89], RAX, Mem::frame(slot::FLAGS));
    }

    /// Sees to it that the host has these flags. RAX is lost.
    pub(super) fn need(&mut self, a: &mut Assembler, flags: u64) {
        if self.host & flags == flags {
            return;
        }
        self.save(a);
        // movzx eax, word [rsp + FLAGS]; add al, 127; sahf
        a.op_m(LONG, &[0x0F, 0xB7], RAX, Mem::frame(slot::FLAGS));
        a.raw(&[0x04, 0x7F, 0x9E]);
        self.host = ARITHMETIC;
    }

    /// True if the host has these flags.
    pub(super) fn has(&self, flags: u64) -> bool {
        self.host & flags == flags
    }

    /// The template's own instructions change the host's flags.
    pub(super) fn clobber(&mut self) {
        assert!(self.current, "the flags are saved before they are lost");
        self.host = 0;
    }

    /// An instruction left `right` in the host and defines `zero` as zero; the others are as before.
    pub(super) fn wrote(&mut self, right: u64, zero: u64) {
        let written = right | zero;
        if written == 0 {
            return;
        }
        let kept = ARITHMETIC & !written;
        assert_eq!(self.host & kept, kept, "what is kept was in the host");
        *self = Self { host: kept | right, zero, current: false };
    }

    /// The template saved the flags itself, and the host has these of them.
    pub(super) fn saved(&mut self, host: u64) {
        *self = Self { host, zero: 0, current: true };
    }
}

/// The flags that the condition with this number in the opcode map looks at.
pub(super) const fn of_condition(number: u8) -> u64 {
    match number >> 1 {
        0 => OF,
        1 => CF,
        2 => ZF,
        3 => CF | ZF,
        4 => SF,
        5 => PF,
        6 => SF | OF,
        _ => ZF | SF | OF,
    }
}

/// Bits of RFLAGS as the frame has them.
pub(super) fn to_word(bits: u64) -> u64 {
    (bits & IN_AH) << 8 | u64::from(bits & OF != 0) | 0x200
}

/// The arithmetic bits of RFLAGS.
pub(super) fn from_word(word: u64) -> u64 {
    (word >> 8) & IN_AH | if word & 1 != 0 { OF } else { 0 }
}
