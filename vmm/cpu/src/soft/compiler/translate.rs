//! A block of guest instructions becomes host code.
//!
//! ```text
//! entry:   sub r13, n; js out          n instructions may retire, or none does
//!          instruction 0 … n - 1       each complete, or jumping to its exit with nothing done
//! exits:   mov r14d, i; jmp leave      one for each place
//! leave:   mov eax, code; jmp exit     the way out
//! out:     add r13, n
//! gone:    mov r14d, …; jmp leave      also where the entry leads once the block is forgotten
//! ```

use super::asm::*;
use super::flag_state::FlagState;
use super::frame::{Thunks, compare_vectors, slot};
use super::table;
use crate::memory::PAGE_SIZE;
use crate::soft::flags::ARITHMETIC;
use crate::soft::operand::{is_immediate, is_low_gpr};
use crate::soft::tlb::{FETCH_SHIFT, FETCH_SLOTS_MASK, FetchEntry, PAGE_MASK};
use iced_x86::{Encoder, Instruction, OpKind};
use std::mem::offset_of;

/// The interpreter executes this instruction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unsupported;

/// Where code leaves: the number of an instruction, or one of these.
pub(super) mod exit {
    /// Through a [`super::Site`]: its number is added.
    pub(in super::super) const SITE: u32 = 0x100;
    /// Added to the number of an instruction: a look-up found nothing.
    pub(in super::super) const MISS: u32 = 0x80;
    /// Before the block: the offset in the page is added.
    pub(in super::super) const GONE: u32 = 0x1_0000;
}

/// A way from one block to the next that can be made a jump.
#[derive(Debug, Clone, Copy)]
pub(super) struct Site {
    /// From this block's beginning to the next.
    pub(super) distance: i32,
    /// Offset of the jump's distance.
    pub(super) jump: u32,
    /// Offset of the number of the physical page that it is compared with, if the next block is in
    /// another page.
    pub(super) frame: Option<u32>,
    /// How often it was patched.
    pub(super) patched: u8,
}

/// What a block became. Offsets are from its entry.
#[derive(Debug)]
pub(super) struct Translated {
    pub(super) bytes: Vec<u8>,
    pub(super) sites: Vec<Site>,
    /// Where code can be entered behind an instruction that was left to the interpreter: the
    /// number of the next one.
    pub(super) resumes: Vec<(u8, u32)>,
    /// The instructions that were, a bit each.
    pub(super) interpreted: u64,
    /// Where the entry leads once the block is gone.
    pub(super) gone: u32,
}

/// Code with its exits, and where its entry leads once the block is gone.
struct Finished {
    bytes: Vec<u8>,
    gone: u32,
}

/// What the host can do beyond x86-64-v1, as far as code here makes use of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostFeatures {
    pub(super) popcnt: bool,
    pub(super) cmpxchg16b: bool,
    /// SSE3, SSSE3, SSE4.1 and SSE4.2.
    pub(super) sse4: bool,
}

/// Where a block will lie in the arena, and what it jumps to there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) next: usize,
    pub(super) thunks: Thunks,
}

impl Place {
    /// The distance to a thunk from behind a jump in the block.
    fn distance(&self, behind: usize, thunk: u32) -> [u8; 4] {
        let distance = i64::from(thunk) - (self.next + behind) as i64;
        i32::try_from(distance).expect("the arena is less than 2 GiB").to_le_bytes()
    }
}

/// Fewer instructions than this in a row are not worth entering code for.
const WORTH: usize = 1;

/// A block in the making.
pub(super) struct Translator {
    pub(super) a: Assembler,
    pub(super) encoder: Encoder,
    pub(super) flags: FlagState,
    /// The number of the instruction being translated.
    at: u8,
    exits: Vec<(Hole, u32)>,
    sites: Vec<Site>,
    /// Offset in the page of the block's first byte.
    pub(super) page_offset: i32,
    /// Length of the block.
    end: i32,
    pub(super) host: HostFeatures,
    /// The block has vector instructions.
    pub(super) vectors: bool,
    /// Jumps to where the vector registers are loaded, where the code goes on, and the number of
    /// the instruction there.
    loads: Vec<(Hole, usize, u8)>,
    /// Whether the flags are dead behind the instruction being translated.
    pub(super) flags_are_dead: bool,
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator")
            .field("a", &self.a)
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

/// True if nobody sees the flags that `before` leaves: some instruction behind replaces them all
/// before code can leave.
fn are_flags_dead(after: &[Instruction]) -> bool {
    use iced_x86::Mnemonic as M;
    // Registers and immediates only: of those, none of these instructions is left to the interpreter.
    let plain = |i: &Instruction| {
        (0..i.op_count()).all(|n| match i.op_kind(n) {
            OpKind::Register => is_low_gpr(i.op_register(n)),
            kind => is_immediate(kind) && i.mnemonic() != M::Test,
        })
    };
    for i in after {
        match i.mnemonic() {
            _ if !plain(i) => return false,
            M::Add | M::Sub | M::Cmp | M::And | M::Or | M::Xor | M::Test => return true,
            M::Mov | M::Movzx | M::Movsx => {}
            _ => return false,
        }
    }
    false
}

/// It needs the guest's vector registers, or its MXCSR: conversions from memory name no register of them.
fn has_vectors(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(i.mnemonic(), M::Cvtss2si | M::Cvttss2si | M::Cvtsd2si | M::Cvttsd2si)
        || (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_xmm())
}

impl Translator {
    /// Translates a block whose first byte is at `physical`. `code` is the number that its exits
    /// give. `None` if the interpreter would have to do all of it.
    pub(super) fn translate(
        instructions: &[Instruction],
        physical: u64,
        code: u32,
        host: HostFeatures,
        place: Place,
    ) -> Option<Translated> {
        let mut this = Self {
            a: Assembler::default(),
            encoder: Encoder::new(64),
            flags: FlagState::IN_FRAME,
            at: 0,
            exits: Vec::new(),
            sites: Vec::new(),
            page_offset: (physical & !PAGE_MASK) as i32,
            end: instructions.last()?.next_ip() as i32,
            host,
            vectors: instructions.iter().any(has_vectors),
            loads: Vec::new(),
            flags_are_dead: false,
        };
        let count = instructions.len() as u8;
        this.a.group1(Group1::Sub, QUAD, R13, count.into());
        let out = this.a.jcc(condition::SIGN);
        this.want_vectors(0);
        let mut resumes = Vec::new();
        let (mut translated, mut interpreted) = (0, 0u64);
        let mut ended = false;
        for (n, i) in instructions.iter().enumerate() {
            this.at = n as u8;
            this.flags_are_dead = are_flags_dead(&instructions[n + 1..]);
            match this.attempt(i) {
                Ok(ends) => {
                    translated += 1;
                    ended = ends;
                }
                Err(Unsupported) => {
                    this.flags.save(&mut this.a);
                    let hole = this.a.jmp();
                    this.leave_here(hole);
                    this.flags = FlagState::IN_FRAME;
                    interpreted |= 1 << n;
                    ended = n + 1 == instructions.len();
                    if !ended {
                        resumes.push((n as u8 + 1, this.a.here() as u32));
                        this.want_vectors(n as u8 + 1);
                    }
                }
            }
        }
        if translated < WORTH {
            return None;
        }
        if !ended {
            this.at = count;
            this.flags.save(&mut this.a);
            this.go(this.end, true);
        }
        let Finished { bytes, gone } = this.finish(out, count, code, place);
        Some(Translated { bytes, sites: this.sites, resumes, interpreted, gone })
    }

    /// Translates one instruction, or undoes what was made of it. True if it ends the block.
    fn attempt(&mut self, i: &Instruction) -> Result<bool, Unsupported> {
        let (bytes, exits, sites, flags) =
            (self.a.here(), self.exits.len(), self.sites.len(), self.flags);
        let result = self.instruction(i);
        if result.is_err() {
            self.a.bytes.truncate(bytes);
            self.exits.truncate(exits);
            self.sites.truncate(sites);
            self.flags = flags;
        }
        result
    }

    /// The jump leaves at the instruction being translated.
    pub(super) fn leave_here(&mut self, hole: Hole) {
        self.exits.push((hole, self.at.into()));
    }

    /// The same, because a look-up found nothing.
    pub(super) fn leave_missing(&mut self, hole: Hole) {
        self.exits.push((hole, exit::MISS | u32::from(self.at)));
    }

    fn finish(&mut self, out: Hole, count: u8, code: u32, place: Place) -> Finished {
        let mut exits = std::mem::take(&mut self.exits);
        exits.sort_by_key(|(_, exit)| *exit);
        let mut to_leave = Vec::new();
        for same in exits.chunk_by(|(_, one), (_, other)| one == other) {
            for (hole, _) in same {
                self.a.bind(*hole);
            }
            self.a.set_long(R14, same[0].1);
            to_leave.push(self.a.jmp());
        }
        self.a.bind(out);
        self.a.group1(Group1::Add, QUAD, R13, count.into());
        let gone = self.a.here() as u32;
        self.a.set_long(R14, exit::GONE | self.page_offset as u32);
        for hole in to_leave {
            self.a.bind(hole);
        }
        let leave = self.a.here();
        self.a.set_long(RAX, code);
        self.jump_to_thunk(place, place.thunks.exit);
        for (hole, back, at) in std::mem::take(&mut self.loads) {
            self.a.bind(hole);
            self.a.set_long(R14, at.into());
            // cmp dword [rsp + MAY_LOAD], 0
            self.a.op_m(LONG, &[0x83], Reg(7), Mem::frame(slot::MAY_LOAD));
            self.a.raw(&[0]);
            let refused = self.a.jcc(condition::EQUAL);
            self.a.bind_to(refused, leave);
            // lea rax, [rip + …]
            self.a.raw(&[0x48, 0x8D, 0x05]);
            let distance = back as i64 - (self.a.here() as i64 + 4);
            self.a.raw(&(distance as i32).to_le_bytes());
            self.jump_to_thunk(place, place.thunks.load_vectors);
        }
        Finished { bytes: std::mem::take(&mut self.a.bytes), gone }
    }

    fn jump_to_thunk(&mut self, place: Place, thunk: u32) {
        let Hole(jump) = self.a.jmp();
        let distance = place.distance(jump + 4, thunk);
        self.a.bytes[jump..].copy_from_slice(&distance);
    }

    /// Where code can be entered: from here on the vector registers are the guest's, if the block has
    /// anything to do with them.
    /// Where they may not be, code leaves at instruction `at`.
    fn want_vectors(&mut self, at: u8) {
        if self.vectors {
            compare_vectors(&mut self.a);
            let hole = self.a.jcc(condition::EQUAL);
            self.loads.push((hole, self.a.here(), at));
        }
    }

    /// Where a target at `distance` from the block's beginning lies, from the page's beginning.
    fn target(&self, distance: i32) -> Result<i32, Unsupported> {
        self.page_offset.checked_add(distance).ok_or(Unsupported)
    }

    /// True if the target at `distance` lies in the block's page.
    pub(super) fn is_near(&self, distance: i32) -> Result<bool, Unsupported> {
        Ok((0..PAGE_SIZE as i32).contains(&self.target(distance)?))
    }

    /// The last thing in a block: goes to the block at `distance`. Nothing is left to do but that:
    /// what cannot be reached by a jump leaves, through the site if that is `done`, else at the
    /// instruction being translated.
    pub(super) fn go(&mut self, distance: i32, done: bool) {
        let number = exit::SITE + self.sites.len() as u32;
        let near = self.is_near(distance).is_ok_and(|near| near);
        if near {
            let hole = self.a.jmp();
            self.exits.push((hole, number));
            self.note_site(distance, hole, None);
            return;
        }
        let exit = if done { number } else { self.at.into() };
        let frame = self.check_page(distance, exit);
        self.a.store(Mem::frame(slot::PAGE), R14);
        self.jump_away(distance, frame, exit);
    }

    /// The jump at `hole`, a condition's, goes to the block at `taken`; else the code goes on behind
    /// this instruction.
    pub(super) fn go_beside(&mut self, hole: Hole, taken: i32) {
        let flags = self.flags;
        if self.is_near(taken).is_ok_and(|near| near) {
            self.exits.push((hole, exit::SITE + self.sites.len() as u32));
            self.note_site(taken, hole, None);
            self.go(self.end, true);
            return;
        }
        self.go(self.end, true);
        self.a.bind(hole);
        self.flags = flags;
        self.go(taken, false);
    }

    /// The jump of a way to another page, once the page is known and entered.
    pub(super) fn jump_away(&mut self, distance: i32, frame: usize, exit: u32) {
        // Nothing compares equal before it is patched.
        let hole = self.a.jmp();
        self.exits.push((hole, exit));
        self.note_site(distance, hole, Some(frame));
    }

    fn note_site(&mut self, distance: i32, hole: Hole, frame: Option<usize>) {
        let frame = frame.map(|frame| frame as u32);
        self.sites.push(Site { distance, jump: hole.0 as u32, frame, patched: 0 });
    }

    /// Leaves R14 the linear page of a target in another page, if instructions are fetched there from
    /// the physical page whose number is to be patched in: where that lies.
    pub(super) fn check_page(&mut self, distance: i32, exit: u32) -> usize {
        self.flags.save(&mut self.a);
        self.flags.clobber();
        self.compute_page(distance);
        let a = &mut self.a;
        fetch_entry(a);
        a.op_m(QUAD, &[0x3B], R14, Mem::at(RAX, offset_of!(FetchEntry, page) as i32));
        let elsewhere = a.jcc(condition::NOT_EQUAL);
        a.load(RAX, Mem::at(RAX, offset_of!(FetchEntry, frame) as i32));
        a.shr(QUAD, RAX, 12);
        a.raw(&[0x3D]);
        let frame = a.here();
        a.raw(&[0xFF; 4]);
        let other = a.jcc(condition::NOT_EQUAL);
        self.exits.push((elsewhere, exit));
        self.exits.push((other, exit));
        frame
    }

    /// R14 becomes the linear page of the target at `distance`.
    pub(super) fn compute_page(&mut self, distance: i32) {
        let target = self.page_offset.wrapping_add(distance);
        self.a.load(R14, Mem::frame(slot::PAGE));
        self.a.lea(R14, Mem::at(R14, target & PAGE_MASK as i32));
    }

    /// With a target in R14: its code's address in R14, if it is compiled and instructions are
    /// fetched there; the target itself in the frame's temporary. Leaves at this instruction if not.
    pub(super) fn resolve(&mut self) {
        self.flags.save(&mut self.a);
        self.flags.clobber();
        let a = &mut self.a;
        a.store(Mem::frame(slot::TEMPORARY), R14);
        fetch_entry(a);
        a.group1(Group1::And, QUAD, R14, -4096);
        a.op_m(QUAD, &[0x3B], R14, Mem::at(RAX, offset_of!(FetchEntry, page) as i32));
        let elsewhere = a.jcc(condition::NOT_EQUAL);
        a.load(RAX, Mem::at(RAX, offset_of!(FetchEntry, frame) as i32));
        a.group1(Group1::And, QUAD, RAX, -4096);
        a.load_long(R14, Mem::frame(slot::TEMPORARY));
        a.group1(Group1::And, LONG, R14, 0xFFF);
        a.op_r(QUAD, &[0x0B], RAX, R14);
        // The physical address, and its place in the table.
        a.mov(R14, RAX);
        a.shr(QUAD, R14, table::FOLD);
        a.op_r(LONG, &[0x33], R14, RAX);
        a.group1(Group1::And, LONG, R14, table::MASK);
        a.shl(LONG, R14, 4);
        a.op_m(QUAD, &[0x03], R14, Mem::frame(slot::TABLE));
        a.op_m(QUAD, &[0x3B], RAX, Mem::at(R14, table::KEY));
        let unknown = a.jcc(condition::NOT_EQUAL);
        a.load(R14, Mem::at(R14, table::CODE));
        self.leave_here(elsewhere);
        self.leave_here(unknown);
    }

    /// Enters the page of the target in the frame's temporary. RAX is lost.
    pub(super) fn enter_page(&mut self) {
        self.a.load(RAX, Mem::frame(slot::TEMPORARY));
        self.a.group1(Group1::And, QUAD, RAX, -4096);
        self.a.store(Mem::frame(slot::PAGE), RAX);
    }

    /// The number of this instruction's exit.
    pub(super) fn own_exit(&self) -> u32 {
        self.at.into()
    }

    /// The flags, as far as somebody sees them, are what the host and the manuals agree on.
    pub(super) fn forget_flags(&mut self) {
        self.flags.wrote(0, ARITHMETIC);
    }
}

/// With an address in R14: RAX points to the fetch entry of its page.
fn fetch_entry(a: &mut Assembler) {
    a.mov_long(RAX, R14);
    a.shr(LONG, RAX, FETCH_SHIFT);
    a.group1(Group1::And, LONG, RAX, FETCH_SLOTS_MASK);
    a.op_m(QUAD, &[0x03], RAX, Mem::frame(slot::FETCH));
}
