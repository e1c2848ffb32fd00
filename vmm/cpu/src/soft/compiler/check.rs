//! Compiled code checked against the interpreter, each time that it runs.
//!
//! A block is executed twice, the second time from the same state: by the interpreter on trial,
//! which does no more than code may ([`Trial`]), and by its code, on copies of the pages that the
//! interpreter touched. Registers, flags, counts, where both go on, and every byte of those pages
//! have to be the same. Code that goes to another page finds none, and leaves where the
//! interpreter went on, which is a difference too. The guest keeps what the interpreter did.

use super::{Code, Compiler, Left, Stay};
use crate::soft::cpu::{Cpu, slot};
use crate::soft::event::Event;
use crate::soft::flags::LazyFlags;
use crate::soft::op::{Op, run_ops};
use crate::soft::tlb::{PAGE_MASK, View};
use crate::soft::trial::{ByteDifference, Trial};
use crate::state::{CpuState, SseState};
use iced_x86::Register;

/// What code has done otherwise than the interpreter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// A general register.
    #[error("{register:?} is {interpreted:#x} interpreted and {compiled:#x} compiled")]
    General {
        /// Which.
        register: Register,
        /// What the interpreter left there.
        interpreted: u64,
        /// What code left there.
        compiled: u64,
    },
    /// RFLAGS.
    #[error("RFLAGS is {interpreted:#x} interpreted and {compiled:#x} compiled")]
    Flags {
        /// As the interpreter left it.
        interpreted: u64,
        /// As code left it.
        compiled: u64,
    },
    /// A vector register.
    #[error("{register:?} is {interpreted:#x} interpreted and {compiled:#x} compiled")]
    Vector {
        /// Which.
        register: Register,
        /// What the interpreter left there.
        interpreted: u128,
        /// What code left there.
        compiled: u128,
    },
    /// MXCSR.
    #[error("MXCSR is {interpreted:#x} interpreted and {compiled:#x} compiled")]
    VectorControl {
        /// As the interpreter left it.
        interpreted: u32,
        /// As code left it.
        compiled: u32,
    },
    /// Where execution goes on.
    #[error("RIP is {interpreted:#x} interpreted and {compiled:#x} compiled")]
    Next {
        /// For the interpreter.
        interpreted: u64,
        /// For code.
        compiled: u64,
    },
    /// The code that is jumped to is of another page than the instructions are fetched from.
    #[error("instructions come from the page at {fetched:#x?}, and the code is of {compiled:#x}")]
    Page {
        /// Physical page of the instructions, if there is a translation.
        fetched: Option<u64>,
        /// Physical page of the code.
        compiled: u64,
    },
    /// A byte of memory.
    #[error(
        "the byte at physical address {physical:#x} is {interpreted:#04x} interpreted and \
         {compiled:#04x} compiled"
    )]
    Memory {
        /// Physical address.
        physical: u64,
        /// What the interpreter left there.
        interpreted: u8,
        /// What code left there.
        compiled: u8,
    },
    /// How many instructions retired.
    #[error("{interpreted} instructions retired interpreted and {compiled} compiled")]
    Count {
        /// In the interpreter.
        interpreted: u64,
        /// In code.
        compiled: u64,
    },
    /// Code did more than it may: the interpreter has to look at an instruction.
    #[error(
        "instruction {interpreted} is the interpreter's, and compiled {compiled} were executed"
    )]
    TooFar {
        /// The first instruction of the block that code may not execute.
        interpreted: usize,
        /// How many instructions of the block code has executed.
        compiled: usize,
    },
    /// A look-up in the TLB found nothing where the interpreter found an entry.
    #[error("instruction {at} finds its translations interpreted, and does not compiled")]
    Missed {
        /// The instruction's number in the block.
        at: usize,
    },
    /// Code left from another block than it is of.
    #[error("code left for another block")]
    Elsewhere,
    /// Code has written to the TLB.
    #[error("code changed translations")]
    Translations,
}

/// Compiled code does not do what the interpreter does. It is thrown, as any fault of this
/// program, to the machine's edge; the engine is then as before the block.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the code of the block of {count} instructions at {address:#x} (physical {physical:#x}, bytes \
     {bytes:02x?}), entered at instruction {first}, does not do what the interpreter does: \
     {difference}; --soft-compiler off does without it"
)]
pub struct Miscompiled {
    /// Linear address of the block.
    pub address: u64,
    /// Its physical address.
    pub physical: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its instructions.
    pub count: usize,
    /// The first that was executed.
    pub first: usize,
    /// The first difference found.
    pub difference: Difference,
    /// The state that both began with.
    pub before: CpuState,
    /// What the interpreter made of it.
    pub interpreted: CpuState,
    /// What code made of it.
    pub compiled: CpuState,
}

/// What code may change of a CPU.
#[derive(Debug, Clone, Copy)]
struct Registers {
    /// General registers, and RIP among the slots behind them.
    general: [u64; 32],
    flags: LazyFlags,
    system_flags: u64,
    sse: SseState,
    retired: u64,
}

impl Registers {
    fn of(cpu: &Cpu) -> Self {
        Self {
            general: cpu.regs,
            flags: cpu.flags,
            system_flags: cpu.system_flags,
            sse: cpu.sse,
            retired: cpu.retired,
        }
    }

    fn put(&self, cpu: &mut Cpu) {
        cpu.regs = self.general;
        cpu.flags = self.flags;
        cpu.system_flags = self.system_flags;
        cpu.sse = self.sse;
        cpu.retired = self.retired;
    }

    fn rflags(&self) -> u64 {
        self.flags.bits() | self.system_flags
    }

    fn state(&self, cpu: &mut Cpu) -> CpuState {
        self.put(cpu);
        cpu.save()
    }

    /// How code's registers differ from these.
    fn difference(&self, compiled: &Self) -> Option<Difference> {
        let general = |number: usize| (self.general[number], compiled.general[number]);
        let vector = |number: usize| (self.sse.registers[number], compiled.sse.registers[number]);
        for number in 0..16 {
            let (interpreted, compiled) = general(number);
            if interpreted != compiled {
                let register = Register::RAX + number as u32;
                return Some(Difference::General { register, interpreted, compiled });
            }
        }
        let (interpreted, rip) = general(slot::RIP.into());
        if interpreted != rip {
            return Some(Difference::Next { interpreted, compiled: rip });
        }
        let (interpreted, bits) = (self.rflags(), compiled.rflags());
        if interpreted != bits {
            return Some(Difference::Flags { interpreted, compiled: bits });
        }
        for number in 0..16 {
            let (interpreted, compiled) = vector(number);
            if interpreted != compiled {
                let register = Register::XMM0 + number as u32;
                return Some(Difference::Vector { register, interpreted, compiled });
            }
        }
        let (interpreted, mxcsr) = (self.sse.mxcsr, compiled.sse.mxcsr);
        if interpreted != mxcsr {
            return Some(Difference::VectorControl { interpreted, compiled: mxcsr });
        }
        (self.retired != compiled.retired)
            .then_some(Difference::Count { interpreted: self.retired, compiled: compiled.retired })
    }
}

/// A block, and where it is entered.
#[derive(Debug, Clone, Copy)]
struct Piece<'a> {
    ops: &'a [Op],
    bytes: u64,
    first: usize,
    before: &'a Registers,
}

impl Piece<'_> {
    /// Executes instructions from the first to `end` on trial: how many instructions of the block
    /// are done then, and the registers as code would leave them there.
    fn interpret(
        &self,
        cpu: &mut Cpu,
        trial: &mut Option<Box<Trial>>,
        mut end: usize,
    ) -> (usize, Registers) {
        let rip = cpu.rip();
        loop {
            self.before.put(cpu);
            cpu.next_rip = rip.wrapping_add(self.bytes);
            let view = std::mem::replace(&mut cpu.view, View::None);
            cpu.trial = trial.take();
            let flow = run_ops(cpu, &self.ops[self.first..end]);
            *trial = cpu.trial.take();
            cpu.view = view;
            if flow.is_ok() {
                break;
            }
            // Those before it once more.
            cpu.event = Event::None;
            end -= 1 + cpu.ops_left;
            trial.as_mut().expect("it was given back").undo(&mut cpu.ram);
        }
        if end == self.ops.len() {
            let next = cpu.next_rip;
            cpu.set_rip(next);
            cpu.retired += end as u64;
        }
        (end, Registers::of(cpu))
    }
}

impl Compiler {
    /// As [`Self::run`], for one block. Code that does anything else than the interpreter ends
    /// the run with a panic whose payload is a boxed [`Miscompiled`].
    pub(in super::super) fn run_checked(
        &mut self,
        cpu: &mut Cpu,
        code: &Code,
        ops: &[Op],
        bytes: u64,
        first: usize,
    ) -> Option<Left> {
        let stay = self.stay(cpu, code, first, ops.len() as u64)?;
        let mut trial = self.trial.take();
        let begun = trial.as_mut().expect("code is checked");
        begun.begin();
        let data = begun.view();
        let before = Registers::of(cpu);
        let piece = Piece { ops, bytes, first, before: &before };
        let end = (first..ops.len()).find(|n| self.coded(code).interpreted & 1 << n != 0);
        let (end, mut interpreted) = piece.interpret(cpu, &mut trial, end.unwrap_or(ops.len()));

        before.put(cpu);
        let (left, last) = self.enter(cpu, &Stay { data, ..stay });
        let compiled = Registers::of(cpu);

        let mut found = None;
        match self.executed_of(code, left, ops.len()) {
            None => found = Some(Difference::Elsewhere),
            Some((done, _)) if done > end => {
                found = Some(Difference::TooFar { interpreted: end, compiled: done });
            }
            Some((at, true)) if at < end => found = Some(Difference::Missed { at }),
            // It may leave at any instruction.
            Some((done, _)) if done < end => {
                trial.as_mut().expect("it was given back").undo(&mut cpu.ram);
                interpreted = piece.interpret(cpu, &mut trial, done).1;
            }
            Some(_) => {}
        }
        let done = trial.as_mut().expect("it was given back");
        let found = found
            .or_else(|| interpreted.difference(&compiled))
            .or_else(|| self.difference_of_pages(cpu, left, last, &interpreted))
            .or_else(|| done.difference(&cpu.ram).map(Into::into))
            .or_else(|| (!done.is_view_intact()).then_some(Difference::Translations));
        if let Some(difference) = found {
            done.undo(&mut cpu.ram);
            let interpreted = interpreted.state(cpu);
            let compiled = compiled.state(cpu);
            let state = before.state(cpu);
            let physical = self.coded(code).physical;
            let mut code = vec![0; bytes as usize];
            cpu.ram.read(physical, &mut code);
            std::panic::panic_any(Box::new(Miscompiled {
                address: cpu.rip(),
                physical,
                bytes: code,
                count: ops.len(),
                first,
                difference,
                before: state,
                interpreted,
                compiled,
            }));
        }
        interpreted.put(cpu);
        self.trial = trial;
        Some(left)
    }

    /// How many instructions of the block with this code are done where it left, and whether a
    /// look-up was the reason. `None` if that is no place of the block.
    fn executed_of(&self, code: &Code, left: Left, count: usize) -> Option<(usize, bool)> {
        match left {
            Left::At { block, done, missed } => {
                (block == self.coded(code).block).then_some((done, missed))
            }
            Left::Between | Left::Through { .. } => Some((count, false)),
        }
    }

    /// Where code has gone on to other code: that has to be of the page that instructions are
    /// fetched from.
    fn difference_of_pages(
        &self,
        cpu: &Cpu,
        left: Left,
        last: u32,
        interpreted: &Registers,
    ) -> Option<Difference> {
        if left != Left::Between {
            return None;
        }
        let rip = interpreted.general[usize::from(slot::RIP)];
        let fetched = cpu.tlb.fetch(cpu.cpl == 3, rip & PAGE_MASK);
        let compiled = self.codes[last as usize].physical & PAGE_MASK;
        (fetched != Some(compiled)).then_some(Difference::Page { fetched, compiled })
    }
}

impl From<ByteDifference> for Difference {
    fn from(byte: ByteDifference) -> Self {
        let ByteDifference { physical, interpreted, compiled } = byte;
        Self::Memory { physical, interpreted, compiled }
    }
}
