//! What compiled code and the engine hand each other, and how one calls the other.
//!
//! Compiled code runs on the thread's own stack: RSP points to a frame of [`SIZE`] bytes that the
//! entry made there. So signals find a stack as ever, and `[rsp + …]` reaches what is not in a
//! register.

use super::arena::Arena;
use super::asm::*;
use crate::soft::flags::AF;
use std::arch::asm;
use std::mem::offset_of;

/// Offsets in the frame on the stack.
pub(super) mod slot {
    /// For one instruction's own use.
    pub(in super::super) const TEMPORARY: i32 = 0;
    /// The data entries of the view.
    pub(in super::super) const TLB: i32 = 8;
    /// The fetch entries of the privilege level.
    pub(in super::super) const FETCH: i32 = 16;
    /// The table of entries by physical address.
    pub(in super::super) const TABLE: i32 = 24;
    /// The linear page of the code that runs.
    pub(in super::super) const PAGE: i32 = 32;
    pub(in super::super) const FS: i32 = 40;
    pub(in super::super) const GS: i32 = 48;
    /// The arithmetic flags: SF, ZF, AF, PF, CF in the second byte as LAHF has them, OF in the first.
    pub(in super::super) const FLAGS: i32 = 56;
    /// Guest R8 to R11.
    pub(in super::super) const R8: i32 = 64;
    /// The registers' place in the CPU.
    pub(in super::super) const REGISTERS: i32 = 96;
    /// The [`super::Exchange`].
    pub(in super::super) const EXCHANGE: i32 = 104;
    /// Which code left, and where.
    pub(in super::super) const CODE: i32 = 112;
    pub(in super::super) const EXIT: i32 = 120;
    /// Not zero: the vector registers and MXCSR are the guest's.
    pub(in super::super) const VECTORS: i32 = 128;
    /// The other bits of RFLAGS.
    pub(in super::super) const SYSTEM: i32 = 136;
    /// Not zero: IF may be changed.
    pub(in super::super) const PRIVILEGED: i32 = 144;
    /// Not zero: vector instructions may be executed.
    pub(in super::super) const MAY_LOAD: i32 = 152;
}

/// Bytes of the frame: with what the entry pushes, a multiple of 16.
pub(super) const SIZE: i32 = 168;

/// The host register that a guest register is in; the others are in the frame.
pub(super) const fn home(guest: u8) -> Option<Reg> {
    match guest {
        0 => Some(R15),
        4 => Some(R12),
        8..=11 => None,
        12..=15 => Some(Reg(guest - 4)),
        same => Some(Reg(same)),
    }
}

/// The frame's slot of a guest register that has no [`home`].
pub(super) const fn spill(guest: u8) -> i32 {
    slot::R8 + 8 * (guest as i32 - 8)
}

/// What goes in and comes out, besides the registers.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Exchange {
    pub(super) tlb: *const u8,
    pub(super) fetch: *const u8,
    pub(super) table: *const u8,
    pub(super) page: u64,
    pub(super) fs: u64,
    pub(super) gs: u64,
    pub(super) flags: u64,
    /// The other bits of RFLAGS, of which code may clear IF.
    pub(super) system: u64,
    /// One if IF may be changed.
    pub(super) privileged: u64,
    /// One if vector instructions may be executed.
    pub(super) may_load: u64,
    /// Instructions that may retire; what is left of them.
    pub(super) left: i64,
    /// Sixteen registers of 16 bytes.
    pub(super) xmm: *mut u128,
    pub(super) code: u64,
    pub(super) exit: u64,
    /// MXCSR of the guest, and of the host.
    pub(super) mxcsr: u32,
    pub(super) host_mxcsr: u32,
}

/// The slots of the frame that come from the exchange.
const INWARDS: [(i32, usize); 10] = [
    (slot::TLB, offset_of!(Exchange, tlb)),
    (slot::FETCH, offset_of!(Exchange, fetch)),
    (slot::TABLE, offset_of!(Exchange, table)),
    (slot::PAGE, offset_of!(Exchange, page)),
    (slot::FS, offset_of!(Exchange, fs)),
    (slot::GS, offset_of!(Exchange, gs)),
    (slot::FLAGS, offset_of!(Exchange, flags)),
    (slot::SYSTEM, offset_of!(Exchange, system)),
    (slot::PRIVILEGED, offset_of!(Exchange, privileged)),
    (slot::MAY_LOAD, offset_of!(Exchange, may_load)),
];
/// Those that go back there.
const OUTWARDS: [(i32, usize); 5] = [
    (slot::PAGE, offset_of!(Exchange, page)),
    (slot::FLAGS, offset_of!(Exchange, flags)),
    (slot::SYSTEM, offset_of!(Exchange, system)),
    (slot::CODE, offset_of!(Exchange, code)),
    (slot::EXIT, offset_of!(Exchange, exit)),
];

const CALLEE_SAVED: [Reg; 6] = [RBX, RBP, R12, R13, R14, R15];

/// The ways in and out, at the arena's beginning.
#[derive(Debug, Clone, Copy)]
pub(super) struct Thunks {
    /// Enters code.
    enter: u32,
    /// Enters code after some was changed: by a serialising instruction, as is due when code was
    /// written through another linear address (SDM volume 3, 8.1.3).
    enter_changed: u32,
    /// Where exits lead: the code's number in EAX, the exit's in R14.
    pub(super) exit: u32,
    /// Makes the vector registers and MXCSR the guest's, and goes on at RAX. R14 is lost.
    pub(super) load_vectors: u32,
}

type Enter = unsafe extern "sysv64" fn(*mut u64, *mut Exchange, *const u8);

/// Loads or stores MXCSR: the instruction's number in its ModRM byte.
fn mxcsr(a: &mut Assembler, number: u8, exchange: Reg, offset: usize) {
    a.op_m(LONG, &[0x0F, 0xAE], Reg(number), Mem::at(exchange, offset as i32));
}

const LDMXCSR: u8 = 2;
const STMXCSR: u8 = 3;

/// Until a block wants them, the vector registers stay where they are: most stays in code are short.
fn load_vectors(a: &mut Assembler) {
    a.load(R14, Mem::frame(slot::EXCHANGE));
    mxcsr(a, LDMXCSR, R14, offset_of!(Exchange, mxcsr));
    a.load(R14, Mem::at(R14, offset_of!(Exchange, xmm) as i32));
    save_or_load_vectors(a, R14, 0x10);
    a.op_m(QUAD, &[0xC7], Reg(0), Mem::frame(slot::VECTORS));
    a.raw(&[1, 0, 0, 0]);
    // jmp rax
    a.raw(&[0xFF, 0xE0]);
}

fn save_or_load_vectors(a: &mut Assembler, pointer: Reg, opcode: u8) {
    for register in 0..16u8 {
        a.op_m(LONG, &[0x0F, opcode], Reg(register), Mem::at(pointer, 16 * i32::from(register)));
    }
}

fn entry(a: &mut Assembler, changed: bool) {
    for reg in CALLEE_SAVED {
        if reg.0 >= 8 {
            a.raw(&[0x41]);
        }
        a.raw(&[0x50 | reg.0 & 7]);
    }
    a.group1(Group1::Sub, QUAD, RSP, SIZE);
    a.store(Mem::frame(slot::REGISTERS), RDI);
    a.store(Mem::frame(slot::EXCHANGE), RSI);
    for (slot, offset) in INWARDS {
        a.load(RAX, Mem::at(RSI, offset as i32));
        a.store(Mem::frame(slot), RAX);
    }
    a.op_m(QUAD, &[0xC7], Reg(0), Mem::frame(slot::VECTORS));
    a.raw(&[0; 4]);
    a.load(R13, Mem::at(RSI, offset_of!(Exchange, left) as i32));
    a.mov(R14, RDX);
    for guest in 0..16u8 {
        let place = Mem::at(RDI, 8 * i32::from(guest));
        match home(guest) {
            Some(RDI) => {}
            Some(reg) => a.load(reg, place),
            None => {
                a.load(RAX, place);
                a.store(Mem::frame(spill(guest)), RAX);
            }
        }
    }
    a.load(RDI, Mem::at(RDI, 8 * i32::from(RDI.0)));
    if changed {
        // mov eax, ss; push rax; lea rax, [rsp + 8]; push rax; pushfq; mov eax, cs; push rax;
        // push r14; iretq
        a.raw(&[0x8C, 0xD0, 0x50]);
        a.lea(RAX, Mem::frame(8));
        a.raw(&[0x50, 0x9C, 0x8C, 0xC8, 0x50, 0x41, 0x56, 0x48, 0xCF]);
    } else {
        a.raw(&[0x41, 0xFF, 0xE6]);
    }
}

/// Equal: the vector registers are not the guest's.
pub(super) fn compare_vectors(a: &mut Assembler) {
    a.op_m(LONG, &[0x83], Reg(Group1::Cmp as u8), Mem::frame(slot::VECTORS));
    a.raw(&[0]);
}

fn leave(a: &mut Assembler) {
    a.store(Mem::frame(slot::CODE), RAX);
    a.store(Mem::frame(slot::EXIT), R14);
    a.load(RAX, Mem::frame(slot::REGISTERS));
    for guest in 0..16u8 {
        let place = Mem::at(RAX, 8 * i32::from(guest));
        match home(guest) {
            Some(reg) => a.store(place, reg),
            None => {
                a.load(R14, Mem::frame(spill(guest)));
                a.store(place, R14);
            }
        }
    }
    a.load(RAX, Mem::frame(slot::EXCHANGE));
    for (slot, offset) in OUTWARDS {
        a.load(R14, Mem::frame(slot));
        a.store(Mem::at(RAX, offset as i32), R14);
    }
    a.store(Mem::at(RAX, offset_of!(Exchange, left) as i32), R13);
    compare_vectors(a);
    let none = a.jcc(condition::EQUAL);
    mxcsr(a, STMXCSR, RAX, offset_of!(Exchange, mxcsr));
    mxcsr(a, LDMXCSR, RAX, offset_of!(Exchange, host_mxcsr));
    a.load(R14, Mem::at(RAX, offset_of!(Exchange, xmm) as i32));
    save_or_load_vectors(a, R14, 0x11);
    a.bind(none);
    a.group1(Group1::Add, QUAD, RSP, SIZE);
    for reg in CALLEE_SAVED.into_iter().rev() {
        if reg.0 >= 8 {
            a.raw(&[0x41]);
        }
        a.raw(&[0x58 | reg.0 & 7]);
    }
    a.raw(&[0xC3]);
}

macro_rules! half_carry_after {
    ($instruction:literal) => {{
        let flags: u16;
        // SAFETY: the instructions change the two registers named and the arithmetic flags, and the
        // caller asks for LAHF first.
        unsafe {
            asm!(
                "mov al, 15",
                "add al, 1",
                $instruction,
                "lahf",
                out("ax") flags,
                inout("cx") 0x5A_u16 => _,
                options(nomem, nostack),
            );
        }
        u64::from(flags >> 8) & AF != 0
    }};
}

/// True if AF is clear after AND, OR, XOR and TEST: what the manuals leave open, all CPUs do, and the
/// engine does. The host must have LAHF.
pub(super) fn logic_clears_half_carry() -> bool {
    !(half_carry_after!("and cl, cl")
        | half_carry_after!("or cl, cl")
        | half_carry_after!("xor cl, cl")
        | half_carry_after!("test cl, cl"))
}

impl Thunks {
    /// Writes them into an empty arena. `None` if they do not fit.
    pub(super) fn write(arena: &mut Arena) -> Option<Self> {
        let mut place = |write: &dyn Fn(&mut Assembler)| {
            let mut a = Assembler::default();
            write(&mut a);
            arena.add(&a.bytes)
        };
        Some(Self {
            enter: place(&|a| entry(a, false))?,
            enter_changed: place(&|a| entry(a, true))?,
            exit: place(&leave)?,
            load_vectors: place(&load_vectors)?,
        })
    }

    /// Runs the code at `offset` until it leaves.
    pub(super) fn call(
        &self,
        arena: &mut Arena,
        offset: u32,
        registers: &mut [u64; 32],
        exchange: &mut Exchange,
    ) {
        let thunk = if arena.take_changed() { self.enter_changed } else { self.enter };
        let code = arena.address(offset);
        // SAFETY: `thunk` is the offset of one of the two entries that `write` put there, which
        // have this signature and keep to the calling convention: they save and restore what the
        // callee has to, MXCSR among it, and leave RFLAGS.DF alone. What they jump to was
        // translated by `translate`, and touches nothing but the frame on the stack, the fields
        // that the caller filled in (`Compiler::run` says why each is valid), and guest memory
        // behind a tag of the TLB, for which `Cpu::load` gives the proof. The arena is neither
        // written nor unmapped meanwhile, since it is borrowed here.
        unsafe {
            let enter: Enter = std::mem::transmute::<*const u8, Enter>(arena.address(thunk));
            enter(registers.as_mut_ptr(), exchange, code);
        }
    }
}
