//! What the interpreter does with a piece of code before that runs, to be compared with it.
//!
//! On trial every access takes the slow path, and goes through only if compiled code would hit: a
//! tag in the TLB, one page. The first that does not ends the trial. So nothing changes but
//! registers and bytes of memory, and those are kept as they were. The code itself then runs on
//! copies of the pages that the interpreter has touched, made before it wrote there: [`Trial`]
//! has a view of the TLB with these pages alone, and with the rights that the interpreter used.

use super::access::Ram;
use super::cpu::Cpu;
use super::event::Trap;
use super::tlb::{Entry, NO_ENTRY, PAGE_MASK, SLOTS, View, slot_in_view};
use crate::memory::PAGE_SIZE;

/// A copy of a page of memory, aligned as that is.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE as usize]);

/// Bytes that were overwritten.
#[derive(Debug, Clone, Copy)]
struct Overwritten {
    physical: u64,
    len: usize,
}

/// What was touched, and what it was before.
#[derive(Debug)]
pub(super) struct Trial {
    view: Box<[Entry; SLOTS]>,
    /// The slots that have an entry, and which.
    filled: Vec<(usize, Entry)>,
    /// The physical pages touched; their copies are the first of `copies`.
    frames: Vec<u64>,
    copies: Vec<Box<Page>>,
    overwritten: Vec<Overwritten>,
    /// Their bytes, one behind the other.
    bytes: Vec<u8>,
}

/// A byte of memory that code has left other than the interpreter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ByteDifference {
    pub(super) physical: u64,
    pub(super) interpreted: u8,
    pub(super) compiled: u8,
}

impl Trial {
    pub(super) fn new() -> Self {
        let view = vec![NO_ENTRY; SLOTS].into_boxed_slice();
        Self {
            view: view.try_into().expect("the view has that many entries"),
            filled: Vec::new(),
            frames: Vec::new(),
            copies: Vec::new(),
            overwritten: Vec::new(),
            bytes: Vec::new(),
        }
    }

    /// Begins another.
    pub(super) fn begin(&mut self) {
        for (slot, _) in self.filled.drain(..) {
            self.view[slot] = NO_ENTRY;
        }
        self.frames.clear();
        self.overwritten.clear();
        self.bytes.clear();
    }

    /// The entries that compiled code is to look at.
    pub(super) fn view(&self) -> *const u8 {
        self.view.as_ptr().cast()
    }

    /// Linear page `page`, which lies at `frame`, is accessed.
    fn touch(&mut self, ram: &Ram, page: u64, frame: u64, write: bool) {
        let slot = slot_in_view(page);
        let known = self.view[slot];
        if known.read == page && (!write || known.write == page) {
            return;
        }
        let number = self.frames.iter().position(|known| *known == frame).unwrap_or_else(|| {
            self.frames.push(frame);
            let number = self.frames.len() - 1;
            if self.copies.len() == number {
                self.copies.push(Box::new(Page([0; PAGE_SIZE as usize])));
            }
            let there = ram.read(frame, &mut self.copies[number].0);
            assert!(there, "what the TLB has lies in memory");
            number
        });
        let copy = self.copies[number].0.as_mut_ptr().expose_provenance() as u64;
        let write = write || known.write == page;
        let entry = Entry::beside(page, copy.wrapping_sub(page), write);
        self.view[slot] = entry;
        self.filled.retain(|(other, _)| *other != slot);
        self.filled.push((slot, entry));
    }

    /// Bytes within a page are about to be overwritten.
    pub(super) fn note_write(&mut self, ram: &Ram, physical: u64, len: usize) {
        let first = self.bytes.len();
        self.bytes.resize(first + len, 0);
        ram.read(physical, &mut self.bytes[first..]);
        self.overwritten.push(Overwritten { physical, len });
    }

    /// Memory becomes what it was before.
    pub(super) fn undo(&mut self, ram: &mut Ram) {
        while let Some(Overwritten { physical, len }) = self.overwritten.pop() {
            let first = self.bytes.len() - len;
            ram.write(physical, &self.bytes[first..]);
            self.bytes.truncate(first);
        }
    }

    /// The entries are as they were made: compiled code changes none.
    pub(super) fn is_view_intact(&self) -> bool {
        self.filled.iter().all(|(slot, entry)| self.view[*slot] == *entry)
    }

    /// The first byte that is another in memory than in the copies, on which code has run.
    pub(super) fn difference(&self, ram: &Ram) -> Option<ByteDifference> {
        let mut memory = [0; PAGE_SIZE as usize];
        self.frames.iter().zip(&self.copies).find_map(|(frame, copy)| {
            ram.read(*frame, &mut memory);
            if memory == copy.0 {
                return None;
            }
            let at = memory.iter().zip(&copy.0).position(|(one, other)| one != other)?;
            Some(ByteDifference {
                physical: frame + at as u64,
                interpreted: memory[at],
                compiled: copy.0[at],
            })
        })
    }
}

impl Cpu {
    /// The physical page of linear page `page`, if compiled code would find it.
    pub(super) fn hit_on_trial(&mut self, view: View, page: u64, write: bool) -> Result<u64, Trap> {
        let entry = *self.tlb.entry(view, page);
        let tag = if write { entry.write } else { entry.read };
        let Some(trial) = self.trial.as_mut().filter(|_| tag == page) else { return Err(Trap) };
        let frame = entry.frame();
        debug_assert_eq!(frame & !PAGE_MASK, 0);
        trial.touch(&self.ram, page, frame, write);
        Ok(frame)
    }
}
