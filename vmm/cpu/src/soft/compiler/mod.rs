//! Blocks as host code.
//!
//! What a block becomes is the same instructions with other operands: guest registers lie in host
//! registers, guest flags in the host's, and memory is reached through the engine's own TLB, looked up in
//! line. What is not translated, and what a look-up does not find, *leaves*: the interpreter goes on at that
//! instruction, of which nothing is done. So compiled code fills nothing, faults never, asks no bus; it
//! retires instructions, and hits what the interpreter would hit. `docs/compiler.md` has the details.
//!
//! | file | idea |
//! |---|---|
//! | `translate` | a block: its beginning, its end, its exits, the ways to other blocks |
//! | `integer`, `bits`, `stack`, `control`, `vector` | which instructions are translated, and how |
//! | `operands`, `address`, `flag_state` | host operands; look-ups; where the flags are |
//! | `asm` | bytes of host instructions |
//! | `table` | which code is where, for indirect jumps |
//! | `check` | what code does, compared with what the interpreter does |
//! | `arena`, `frame` | the only `unsafe`: memory that is executed, and the way in and out |
//!
//! **Invalidation.** Code belongs to its block, which alone has its [`Code`]. When the block is
//! forgotten, the code's entry is overwritten with a jump that leaves, and the table forgets it: jumps
//! to it, of which there is no list, then find the run loop, and code that is made for the same physical
//! address later. The arena is emptied only when no code is left.

mod address;
mod arena;
mod asm;
mod bits;
mod check;
mod control;
mod flag_state;
mod frame;
mod integer;
mod operands;
mod stack;
mod table;
mod translate;
mod vector;
mod verify;

use super::block::BlockId;
use super::cpu::{CR0_EM, CR0_TS, CR4_OSFXSR, Cpu, slot};
use super::flags;
use super::limits::CacheLimits;
use super::tlb::{PAGE_MASK, View};
use super::trial::Trial;
use arena::Arena;
pub use check::{Difference, Miscompiled};
use frame::{Exchange, Thunks};
use iced_x86::Instruction;
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use table::Table;
use translate::{HostFeatures, Place, Site, Translator, exit};

/// A way is not patched more often than this.
const MAX_PATCHES: u8 = 32;
/// All exceptions masked.
const MXCSR_MASKS: u32 = 0x1F80;

/// The code of one block, which has it for as long as it lives.
#[derive(Debug)]
pub(super) struct Code(NonZeroU32);

/// What is known of a code.
#[derive(Debug)]
struct Coded {
    block: BlockId,
    /// Physical address of the block.
    physical: u64,
    /// Instructions of the block.
    count: u8,
    /// Offset in the arena.
    entry: u32,
    /// Where its entry leads once it is gone, as an offset in the arena.
    gone: u32,
    sites: Vec<Site>,
    resumes: Vec<(u8, u32)>,
    /// Its instructions that are left to the interpreter, a bit each.
    interpreted: u64,
}

/// How compiled code left. The CPU is as it was at the beginning of the block, unless it says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Between blocks.
    Between,
    /// At an instruction of this block: those before it are done, though not counted.
    At {
        /// The block.
        block: BlockId,
        /// How many instructions are done.
        done: usize,
        /// A look-up of this one found nothing.
        missed: bool,
    },
    /// Between blocks, by a way that can be made a jump.
    Through {
        /// The block that was left.
        block: BlockId,
        /// The number of the way.
        site: usize,
    },
}

/// Why there is no code for a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotCompiled {
    /// There is nothing to translate in it.
    NotWorth,
    /// The arena is full.
    Full,
}

/// Makes code of blocks, keeps it and runs it.
#[derive(Debug)]
pub(super) struct Compiler {
    arena: Arena,
    thunks: Thunks,
    table: Table,
    codes: Vec<Coded>,
    /// By physical address: the last code that was forgotten there. Jumps to it go on to the next.
    gone: BTreeMap<u64, u32>,
    /// Codes that blocks have.
    live: usize,
    /// Where codes begin in the arena.
    first: usize,
    host: HostFeatures,
    /// Executions that make a block worth it.
    pub(super) hot: u16,
    /// Instructions that code has executed.
    pub(super) executed: u64,
    /// Where code is checked: what the interpreter did of it.
    trial: Option<Box<Trial>>,
    /// A fault of the compiler, for tests that have it found.
    #[cfg(feature = "planted-faults")]
    pub(super) planted: Option<fn(&mut Instruction)>,
}

/// A stay in compiled code.
#[derive(Debug)]
struct Stay {
    /// Where it begins, in the arena.
    offset: u32,
    /// Instructions that may retire, once the block entered is done.
    left: u64,
    /// Instructions of the block entered that are counted, and not executed, because they were
    /// before.
    before: u64,
    /// Instructions of the block entered that are executed, and counted already.
    counted: u64,
    /// The entries of the TLB.
    data: *const u8,
}

impl Compiler {
    /// `None` if it is not wanted, or if this host does not let memory be executed.
    pub(super) fn new(limits: &CacheLimits) -> Option<Self> {
        if limits.code == 0 || host_lacks().is_some() {
            return None;
        }
        let mut arena = Arena::new(limits.code).ok()?;
        let thunks = Thunks::write(&mut arena)?;
        let first = arena.next();
        Some(Self {
            arena,
            thunks,
            table: Table::new(),
            codes: Vec::new(),
            gone: BTreeMap::new(),
            live: 0,
            first,
            host: HostFeatures {
                popcnt: is_x86_feature_detected!("popcnt"),
                cmpxchg16b: is_x86_feature_detected!("cmpxchg16b"),
                sse4: is_x86_feature_detected!("sse3")
                    && is_x86_feature_detected!("ssse3")
                    && is_x86_feature_detected!("sse4.1")
                    && is_x86_feature_detected!("sse4.2"),
            },
            hot: limits.hot,
            executed: 0,
            trial: limits.check.then(|| Box::new(Trial::new())),
            #[cfg(feature = "planted-faults")]
            planted: None,
        })
    }

    /// Compiles the instructions of a block that lies in one page at `physical`.
    ///
    /// # Errors
    /// [`NotCompiled`]
    pub(super) fn compile(
        &mut self,
        block: BlockId,
        physical: u64,
        instructions: &[Instruction],
    ) -> Result<Code, NotCompiled> {
        let number = self.codes.len() as u32;
        let place = Place { next: self.arena.next(), thunks: self.thunks };
        #[cfg(feature = "planted-faults")]
        let instructions = &self.with_fault(instructions);
        let made = Translator::translate(instructions, physical, number, self.host, place);
        let made = made.ok_or(NotCompiled::NotWorth)?;
        if cfg!(test) || self.trial.is_some() {
            verify::check(&made.bytes);
        }
        let Some(entry) = self.arena.add(&made.bytes) else {
            let empty = self.live == 0;
            return Err(if empty { NotCompiled::NotWorth } else { NotCompiled::Full });
        };
        let in_arena = |site: Site| Site {
            jump: site.jump + entry,
            frame: site.frame.map(|frame| frame + entry),
            ..site
        };
        self.codes.push(Coded {
            block,
            physical,
            count: instructions.len() as u8,
            entry,
            gone: made.gone + entry,
            sites: made.sites.into_iter().map(in_arena).collect(),
            resumes: made.resumes.into_iter().map(|(n, at)| (n, at + entry)).collect(),
            interpreted: made.interpreted,
        });
        self.live += 1;
        self.table.insert(physical, self.arena.address(entry));
        if let Some(before) = self.gone.remove(&physical) {
            let before = self.codes[before as usize].entry;
            self.arena.patch_jump(before + 1, entry);
        }
        Ok(Code(NonZeroU32::MIN.saturating_add(number)))
    }

    #[cfg(feature = "planted-faults")]
    fn with_fault(&self, instructions: &[Instruction]) -> Vec<Instruction> {
        let mut instructions = instructions.to_vec();
        if let Some(plant) = self.planted {
            instructions.iter_mut().for_each(plant);
        }
        instructions
    }

    /// Code is compared with what the interpreter does: it is run by [`Self::run_checked`].
    pub(super) fn checks(&self) -> bool {
        self.trial.is_some()
    }

    fn coded(&self, code: &Code) -> &Coded {
        &self.codes[code.0.get() as usize - 1]
    }

    /// The block of this code is forgotten.
    pub(super) fn forget(&mut self, code: Code) {
        let coded = &self.codes[code.0.get() as usize - 1];
        let (entry, gone, physical) = (coded.entry, coded.gone, coded.physical);
        self.arena.patch(entry, &[0xE9]);
        self.arena.patch_jump(entry + 1, gone);
        self.table.remove(physical);
        self.gone.insert(physical, code.0.get() - 1);
        self.live -= 1;
    }

    /// No block has code any more: there is room for others.
    pub(super) fn start_anew(&mut self) {
        assert_eq!(self.live, 0, "every code was given back");
        self.codes.clear();
        self.gone.clear();
        self.table.clear();
        self.arena.truncate(self.first);
    }

    /// True if compiled code may run: 64-bit code whose accesses the TLB answers.
    #[inline(always)]
    pub(super) fn may_run(cpu: &Cpu) -> bool {
        cpu.view != View::None && cpu.is_long() && cpu.stale.is_empty()
    }

    /// True if vector instructions may be executed in code: none of them faults.
    #[inline(always)]
    fn may_load(cpu: &Cpu) -> bool {
        cpu.cr0 & (CR0_EM | CR0_TS) == 0
            && cpu.cr4 & CR4_OSFXSR != 0
            && cpu.sse.mxcsr & MXCSR_MASKS == MXCSR_MASKS
    }

    /// Where code goes on after its instruction `done` - 1 was left to the interpreter.
    fn resume(&self, code: &Code, done: usize) -> Option<u32> {
        let resumes = &self.coded(code).resumes;
        resumes.iter().find(|(next, _)| usize::from(*next) == done).map(|(_, at)| *at)
    }

    /// What it is to enter a block behind its first `done` instructions. RIP is its beginning. At
    /// most `left` instructions, and at least as many as it has, may retire.
    fn stay(&self, cpu: &Cpu, code: &Code, done: usize, left: u64) -> Option<Stay> {
        let coded = self.coded(code);
        let data = cpu.tlb.data_of(cpu.view);
        if done == 0 {
            return Some(Stay { offset: coded.entry, left, before: 0, counted: 0, data });
        }
        let (offset, count) = (self.resume(code, done)?, u64::from(coded.count));
        Some(Stay { offset, left: left - count, before: done as u64, counted: count, data })
    }

    /// Runs a block from its beginning, or behind its first `done` instructions, and whatever
    /// follows it, for `left` instructions at most and at least as many as the block has. `None`
    /// if it cannot be entered there.
    #[inline]
    pub(super) fn run(
        &mut self,
        cpu: &mut Cpu,
        code: &Code,
        done: usize,
        left: u64,
    ) -> Option<Left> {
        let stay = self.stay(cpu, code, done, left)?;
        Some(self.enter(cpu, &stay).0)
    }

    /// Enters code: how it left, and the number of the code that did.
    fn enter(&mut self, cpu: &mut Cpu, stay: &Stay) -> (Left, u32) {
        let left = stay.left.min(1 << 62) as i64;
        // The pointers are valid until the call returns: what they lead to belongs to `cpu` and to
        // `self`, which are borrowed, and neither is touched meanwhile but by the code itself. It reads
        // the entries of the view and of the privilege level at indices it masks, the table likewise.
        let mut exchange = Exchange {
            tlb: stay.data,
            fetch: cpu.tlb.fetches_of(cpu.cpl == 3),
            table: self.table.as_ptr(),
            page: cpu.rip() & PAGE_MASK,
            fs: cpu.full(slot::FS),
            gs: cpu.full(slot::GS),
            flags: flag_state::to_word(cpu.flags.bits()),
            system: cpu.system_flags & u64::from(u32::MAX),
            privileged: cpu.io_privileged().into(),
            may_load: Self::may_load(cpu).into(),
            left,
            xmm: cpu.sse.registers.as_mut_ptr(),
            code: 0,
            exit: 0,
            mxcsr: cpu.sse.mxcsr,
            host_mxcsr: MXCSR_MASKS,
        };
        self.thunks.call(&mut self.arena, stay.offset, &mut cpu.regs, &mut exchange);
        cpu.sse.mxcsr = exchange.mxcsr;
        cpu.flags.set(flag_state::from_word(exchange.flags));
        cpu.system_flags &= exchange.system | !flags::IF;
        let counted = (left - exchange.left) as u64 + stay.counted;
        let (code, word) = (exchange.code as u32, exchange.exit as u32);
        if word >= exit::GONE {
            cpu.set_rip(exchange.page + u64::from(word - exit::GONE));
            cpu.retired += counted;
            self.executed += counted - stay.before;
            return (Left::Between, code);
        }
        let coded = &self.codes[code as usize];
        let rip = exchange.page + (coded.physical & !PAGE_MASK);
        if word >= exit::SITE {
            let site = (word - exit::SITE) as usize;
            cpu.set_rip(rip.wrapping_add(coded.sites[site].distance as i64 as u64));
            cpu.retired += counted;
            self.executed += counted - stay.before;
            return (Left::Through { block: coded.block, site }, code);
        }
        cpu.set_rip(rip);
        let whole = counted - u64::from(coded.count);
        cpu.retired += whole;
        let done = (word & !exit::MISS) as usize;
        self.executed = (self.executed + whole + done as u64).wrapping_sub(stay.before);
        (Left::At { block: coded.block, done, missed: word & exit::MISS != 0 }, code)
    }

    /// Makes a way from one block to another a jump, if the other is what it leads to; without such a
    /// way, sees to it that indirect jumps find the other.
    pub(super) fn join(&mut self, from: &Code, distance: u64, to: &Code) {
        let Coded { sites, interpreted, count, .. } = self.coded(from);
        let Some(number) = sites.iter().position(|site| site.distance as i64 as u64 == distance)
        else {
            if interpreted >> (count - 1) & 1 != 0 {
                // Its last instruction never asks the table.
                return;
            }
            let (physical, entry) = {
                let to = self.coded(to);
                (to.physical, to.entry)
            };
            self.table.insert(physical, self.arena.address(entry));
            return;
        };
        self.join_through(from, number, to);
    }

    /// The same for the way with this number.
    pub(super) fn join_through(&mut self, from: &Code, number: usize, to: &Code) {
        let (from_page, target) = {
            let from = self.coded(from);
            let distance = from.sites[number].distance as i64 as u64;
            (from.physical & PAGE_MASK, from.physical.wrapping_add(distance))
        };
        let (entry, physical) = {
            let to = self.coded(to);
            (to.entry, to.physical)
        };
        let site = &mut self.codes[from.0.get() as usize - 1].sites[number];
        if site.patched >= MAX_PATCHES || (physical ^ target) & !PAGE_MASK != 0 {
            return;
        }
        match site.frame {
            None if physical & PAGE_MASK != from_page => return,
            None => {}
            Some(frame) => match u32::try_from(physical >> 12) {
                Ok(page) if page != u32::MAX => self.arena.patch(frame, &page.to_le_bytes()),
                _ => return,
            },
        }
        site.patched += 1;
        self.arena.patch_jump(site.jump, entry);
    }
}

/// What this host's CPU lacks.
fn host_lacks() -> Option<&'static str> {
    use std::arch::x86_64::__cpuid;
    let lahf = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & 1 != 0;
    if !lahf {
        // As the first x86-64 CPUs.
        return Some("the CPU has no LAHF in 64-bit code");
    }
    if is_emulated() {
        return Some("the CPU is emulated by QEMU's TCG, which is not exact");
    }
    (!frame::logic_clears_half_carry()).then_some("the CPU does not clear AF as others do")
}

/// True where QEMU's TCG stands in for a CPU: compiled code is as exact as the CPU that executes it, and
/// version 7 gets results of ours wrong, and `IRETQ` of a program under SMAP.
fn is_emulated() -> bool {
    let hypervisor = std::arch::x86_64::__cpuid(0x4000_0000);
    let name = [hypervisor.ebx, hypervisor.ecx, hypervisor.edx].map(u32::to_le_bytes);
    name.as_flattened() == b"TCGTCGTCGTCG"
}

/// Why this host's engines compile nothing, if it cannot be otherwise.
pub(crate) fn obstacle() -> Option<String> {
    if let Some(lack) = host_lacks() {
        return Some(lack.to_owned());
    }
    let arena = Arena::new(1 << 16);
    arena.err().map(|error| format!("memory cannot be executed: {error}"))
}
