//! A second look at the code that was made, for tests: what it may touch, and what it may be.
//!
//! It goes through a block's code from its beginning to its end, and follows what R14 and RAX are: an
//! index into the TLB that was masked, an entry, an addend behind a tag that was compared. Memory is
//! touched through these and through the frame alone.

use super::frame::{SIZE, slot};
use super::table;
use crate::soft::tlb::{FETCH_SLOTS_MASK, TAG_SLOTS};
use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register};

/// What a register holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Anything,
    /// An offset of an entry of this kind.
    Offset(Kind),
    /// The address of one.
    Entry(Kind),
    /// The address of one, whose tag was just compared.
    Compared(Kind),
    /// The same, and it was equal.
    Known(Kind),
    /// The addend of a look-up.
    Addend,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Fetch,
    Code,
}

#[derive(Debug)]
struct Reader {
    r14: Holds,
    rax: Holds,
}

/// Panics if code does what no template does.
pub(super) fn check(code: &[u8]) {
    let mut reader = Reader { r14: Holds::Anything, rax: Holds::Anything };
    for i in &mut Decoder::with_ip(64, code, 0, 0) {
        assert!(i.mnemonic() != Mnemonic::INVALID, "at {:#x} of {code:x?}", i.ip());
        reader.check_flow(&i);
        reader.check_memory(&i);
        reader.follow(&i);
    }
}

fn is_in_frame(i: &Instruction) -> Option<i32> {
    let plain = i.memory_base() == Register::RSP && i.memory_index() == Register::None;
    plain.then_some(i.memory_displacement64() as i32)
}

impl Reader {
    fn check_flow(&self, i: &Instruction) {
        match i.flow_control() {
            FlowControl::Next
            | FlowControl::ConditionalBranch
            | FlowControl::UnconditionalBranch => {}
            FlowControl::IndirectBranch => {
                let known = i.op0_kind() == OpKind::Register && i.op0_register() == Register::R14;
                assert!(known || is_in_frame(i) == Some(slot::EXIT), "{i:?}");
            }
            _ => panic!("{i:?}"),
        }
        let moves_stack = i.op0_kind() == OpKind::Register && i.op0_register() == Register::RSP;
        assert!(!moves_stack && !i.is_stack_instruction() && !i.is_privileged(), "{i:?}");
    }

    fn check_memory(&self, i: &Instruction) {
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if !memory || matches!(i.mnemonic(), Mnemonic::Lea | Mnemonic::Nop) {
            return;
        }
        assert!(i.segment_prefix() == Register::None && !i.has_lock_prefix(), "{i:?}");
        if let Some(offset) = is_in_frame(i) {
            assert!((0..SIZE - 7).contains(&offset), "{i:?}");
            return;
        }
        let alone = i.memory_index() == Register::None;
        let at = i.memory_displacement64() as i64;
        let (compares, loads) = (i.mnemonic() == Mnemonic::Cmp, i.mnemonic() == Mnemonic::Mov);
        let fine = match (i.memory_base(), self.r14, self.rax) {
            (Register::R14, Holds::Addend, _) => true,
            (Register::R14, Holds::Entry(Kind::Data), _) => {
                alone && compares && (at == 0 || at == 8)
            }
            (Register::R14, Holds::Known(Kind::Data), _) => alone && loads && at == 16,
            (Register::R14, Holds::Entry(Kind::Code), _) => alone && compares && at == 0,
            (Register::R14, Holds::Known(Kind::Code), _) => alone && loads && at == 8,
            (Register::RAX, _, Holds::Entry(Kind::Fetch)) => alone && compares && at == 0,
            (Register::RAX, _, Holds::Known(Kind::Fetch)) => alone && loads && at == 8,
            _ => false,
        };
        assert!(fine, "{i:?} with {self:?}");
    }

    fn follow(&mut self, i: &Instruction) {
        let before = (self.r14, self.rax);
        let first =
            if i.op0_kind() == OpKind::Register { i.op0_register() } else { Register::None };
        let immediate = (i.op_count() == 2 && i.op1_kind() != OpKind::Register)
            .then(|| i.try_immediate(1).ok())
            .flatten();
        let frame =
            (i.op_count() == 2 && i.op1_kind() == OpKind::Memory).then(|| is_in_frame(i)).flatten();
        match (i.mnemonic(), first.full_register()) {
            (Mnemonic::Cmp, _) if i.op1_kind() == OpKind::Memory => match i.memory_base() {
                Register::R14 => self.r14 = compared(before.0),
                Register::RAX => self.rax = compared(before.1),
                _ => {}
            },
            (Mnemonic::Jne, _) => {
                self.r14 = known(before.0);
                self.rax = known(before.1);
            }
            (Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Bt, _) => {}
            (Mnemonic::And, Register::R14) if first == Register::R14D => {
                self.r14 = match immediate {
                    Some(mask) if mask as i32 == TAG_SLOTS => Holds::Offset(Kind::Data),
                    Some(mask) if mask as i32 == table::MASK => Holds::Offset(Kind::Code),
                    _ => Holds::Anything,
                }
            }
            (Mnemonic::And, Register::RAX) if first == Register::EAX => {
                self.rax = match immediate {
                    Some(mask) if mask as i32 == FETCH_SLOTS_MASK => Holds::Offset(Kind::Fetch),
                    _ => Holds::Anything,
                }
            }
            (Mnemonic::Shl, Register::R14) if before.0 == Holds::Offset(Kind::Code) => {}
            (Mnemonic::Add, Register::R14) => {
                self.r14 = match (before.0, frame) {
                    (Holds::Offset(Kind::Data), Some(slot::TLB)) => Holds::Entry(Kind::Data),
                    (Holds::Offset(Kind::Code), Some(slot::TABLE)) => Holds::Entry(Kind::Code),
                    _ => Holds::Anything,
                }
            }
            (Mnemonic::Add, Register::RAX) => {
                self.rax = match (before.1, frame) {
                    (Holds::Offset(Kind::Fetch), Some(slot::FETCH)) => Holds::Entry(Kind::Fetch),
                    _ => Holds::Anything,
                }
            }
            (Mnemonic::Mov, Register::R14) if before.0 == Holds::Known(Kind::Data) => {
                self.r14 = Holds::Addend;
            }
            (Mnemonic::Lea, Register::R14)
                if before.0 == Holds::Addend && i.memory_base() == Register::R14 => {}
            (_, Register::R14) => self.r14 = Holds::Anything,
            (_, Register::RAX) => self.rax = Holds::Anything,
            _ => {}
        }
    }
}

fn compared(before: Holds) -> Holds {
    match before {
        Holds::Entry(kind) => Holds::Compared(kind),
        other => other,
    }
}

fn known(before: Holds) -> Holds {
    match before {
        Holds::Compared(kind) => Holds::Known(kind),
        other => other,
    }
}
