//! The cache of decoded blocks.
//!
//! A block is a run of instructions within one page that ends at the first branch or at the
//! first instruction after which the run loop must look around. It is known by the physical
//! address of its first instruction, and holds nothing that depends on where it is mapped. An
//! instruction that crosses into another page is a block of its own.
//!
//! Nothing here is visible to the guest. What the run loop asks for is a block and its ops; a
//! compiler that attaches machine code to blocks would do so here.

use super::cpu::Cpu;
use super::fast;
use super::generic::{Ending, ends_block};
use super::op::{Op, general_op};
use super::tlb::PAGE_MASK;
use crate::memory::{GuestRam, PAGE_SIZE, PageNumber};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

/// Most instructions of a block.
const MAX_OPS: usize = 64;
/// Longest instruction in bytes.
const MAX_LENGTH: usize = 15;
/// When the cache holds so many ops, decoded instructions or blocks, it starts anew: with 32,
/// 48 and 64 bytes each, that is below 80 MiB.
const MAX_CACHED_OPS: usize = 1 << 20;
const MAX_CACHED_GENERAL: usize = 1 << 19;
const MAX_CACHED_BLOCKS: usize = 1 << 18;

const RECENT: usize = 1 << 13;
/// The CPU model has neither TZCNT nor LZCNT, so that their prefix is ignored; nor WBNOINVD.
const OPTIONS: u32 =
    DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::NO_WBNOINVD;

/// A block in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockId(u32);

const NO_BLOCK: BlockId = BlockId(u32::MAX);

/// A successor in the same page, at a distance from this block's beginning.
#[derive(Debug, Clone, Copy)]
struct Link {
    distance: u64,
    block: BlockId,
}

/// The block has no bytes beyond its first page.
const NO_PAGE: u64 = u64::MAX;
/// No successor in the same page is so far away.
const NO_LINK: Link = Link { distance: 1 << 63, block: NO_BLOCK };

/// A run of decoded instructions.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Block {
    physical: u64,
    first: u32,
    /// Number of instructions, at least one.
    pub(super) count: u16,
    /// Length in bytes.
    pub(super) bytes: u16,
    /// Nothing but RIP needs a look after it.
    linkable: bool,
    /// Physical page of the bytes beyond the first page.
    second: u64,
    links: [Link; 2],
}

#[derive(Debug, Clone, Copy)]
struct Recent {
    physical: u64,
    block: BlockId,
}

const NO_RECENT: Recent = Recent { physical: u64::MAX, block: NO_BLOCK };

/// A block in its page's list: the offset of its first byte, or [`SECOND_PAGE`].
#[derive(Debug, Clone, Copy)]
struct Listed {
    offset: u16,
    block: BlockId,
}

/// The block begins in the page before.
const SECOND_PAGE: u16 = u16::MAX;

/// What decoding at an address needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decoding {
    /// The block is there.
    Done(BlockId),
    /// The first instruction goes on in the next page.
    NeedsNextPage,
}

/// Decoded blocks by physical address.
#[derive(Debug)]
pub(super) struct BlockCache {
    blocks: Vec<Block>,
    ops: Vec<Op>,
    recent: Vec<Recent>,
    /// By page number: 0, or the index in `lists` plus one.
    pages: Vec<u32>,
    lists: Vec<(PageNumber, Vec<Listed>)>,
    /// No specialised ops: for tests that compare them with the general path.
    #[cfg(test)]
    pub(super) general_only: bool,
}

fn recent_slot(physical: u64) -> usize {
    ((physical ^ (physical >> 13)) as usize) % RECENT
}

impl BlockCache {
    /// An empty cache for code in `ram`.
    pub(super) fn new(ram: &GuestRam) -> Self {
        let end = ram.ranges().last().map_or(0, |(start, len)| start.0 + len);
        let pages = usize::try_from(end / PAGE_SIZE).expect("guest memory fits the host");
        Self {
            blocks: Vec::new(),
            ops: Vec::new(),
            recent: vec![NO_RECENT; RECENT],
            pages: vec![0; pages],
            lists: Vec::new(),
            #[cfg(test)]
            general_only: false,
        }
    }

    /// The block.
    #[inline(always)]
    pub(super) fn block(&self, id: BlockId) -> &Block {
        &self.blocks[id.0 as usize]
    }

    /// The block's ops.
    #[inline(always)]
    pub(super) fn ops(&self, id: BlockId) -> &[Op] {
        let block = self.block(id);
        &self.ops[block.first as usize..][..usize::from(block.count)]
    }

    /// The block that follows `id` at `distance` from its beginning, if that is known.
    #[inline(always)]
    pub(super) fn successor(&self, id: BlockId, distance: u64) -> Option<BlockId> {
        let links = &self.block(id).links;
        if links[0].distance == distance {
            return Some(links[0].block);
        }
        if links[1].distance == distance {
            return Some(links[1].block);
        }
        None
    }

    /// Remembers that `next` follows `id` at `distance`, if no translation needs a look on the
    /// way: both lie whole in the same page.
    pub(super) fn link(&mut self, id: BlockId, distance: u64, next: BlockId) {
        let (from, to) = (self.block(id), self.block(next));
        let near = from.linkable
            && from.second == NO_PAGE
            && to.second == NO_PAGE
            && from.physical & PAGE_MASK == to.physical & PAGE_MASK
            && from.physical.wrapping_add(distance) == to.physical;
        if near {
            let links = &mut self.blocks[id.0 as usize].links;
            links[1] = links[0];
            links[0] = Link { distance, block: next };
        }
    }

    /// The block at a physical address, if it is decoded and lies in one page.
    #[inline(always)]
    pub(super) fn recent(&self, physical: u64) -> Option<BlockId> {
        let recent = &self.recent[recent_slot(physical)];
        (recent.physical == physical).then_some(recent.block)
    }

    /// Finds or decodes the block at `physical`. `next_page` is the physical page that follows
    /// in linear order, if it is known.
    pub(super) fn find(
        &mut self,
        cpu: &mut Cpu,
        physical: u64,
        next_page: Option<u64>,
    ) -> Decoding {
        if let Some(id) = self.listed(physical) {
            let second = self.block(id).second;
            if second == NO_PAGE || next_page == Some(second) {
                return Decoding::Done(id);
            }
            if next_page.is_none() {
                return Decoding::NeedsNextPage;
            }
            self.forget_page(cpu, PageNumber::containing(physical));
        }
        self.make_room(cpu);
        self.decode(cpu, physical, next_page)
    }

    fn list(&self, page: PageNumber) -> Option<usize> {
        let index = *self.pages.get(usize::try_from(page.0).ok()?)?;
        (index as usize).checked_sub(1)
    }

    fn listed(&mut self, physical: u64) -> Option<BlockId> {
        let list = self.list(PageNumber::containing(physical))?;
        let offset = (physical % PAGE_SIZE) as u16;
        let id = self.lists[list].1.iter().find(|listed| listed.offset == offset)?.block;
        self.remember(physical, id);
        Some(id)
    }

    fn remember(&mut self, physical: u64, id: BlockId) {
        if self.block(id).second == NO_PAGE {
            self.recent[recent_slot(physical)] = Recent { physical, block: id };
        }
    }

    fn make_room(&mut self, cpu: &mut Cpu) {
        let full = self.ops.len() + MAX_OPS > MAX_CACHED_OPS
            || cpu.decoded.len() + MAX_OPS > MAX_CACHED_GENERAL
            || self.blocks.len() >= MAX_CACHED_BLOCKS;
        if full {
            self.clear(cpu);
        }
    }

    fn decode(&mut self, cpu: &mut Cpu, physical: u64, next_page: Option<u64>) -> Decoding {
        let mut buffer = [0; MAX_OPS * MAX_LENGTH];
        let in_page = (PAGE_SIZE - physical % PAGE_SIZE) as usize;
        let mut available = in_page.min(buffer.len());
        cpu.ram.read(physical, &mut buffer[..available]);
        if in_page < MAX_LENGTH
            && let Some(next) = next_page
        {
            cpu.ram.read(next, &mut buffer[in_page..MAX_LENGTH]);
            available = MAX_LENGTH;
        }
        let mut decoder = Decoder::with_ip(64, &buffer[..available], 0, OPTIONS);
        let first = self.ops.len();
        let (mut bytes, mut ending) = (0, Ending::No);
        while self.ops.len() - first < MAX_OPS && ending == Ending::No && bytes < in_page {
            let instruction = decoder.decode();
            let cut = decoder.last_error() == DecoderError::NoMoreBytes;
            let end = bytes + instruction.len();
            if cut || end > in_page {
                if self.ops.len() > first {
                    break;
                }
                if next_page.is_none() {
                    return Decoding::NeedsNextPage;
                }
            }
            let op = self.translate(cpu, &instruction);
            self.ops.push(op);
            bytes = end;
            ending = ends_block(&instruction);
        }
        let id = BlockId(u32::try_from(self.blocks.len()).expect("the cache is bounded"));
        let second = next_page.filter(|_| bytes > in_page);
        self.blocks.push(Block {
            physical,
            first: u32::try_from(first).expect("the cache is bounded"),
            count: u16::try_from(self.ops.len() - first).expect("at most 64"),
            bytes: u16::try_from(bytes).expect("at most a page"),
            linkable: ending != Ending::System,
            second: second.unwrap_or(NO_PAGE),
            links: [NO_LINK; 2],
        });
        self.enlist(cpu, id, (physical % PAGE_SIZE) as u16, physical, bytes.min(in_page));
        if let Some(next) = second {
            self.enlist(cpu, id, SECOND_PAGE, next, bytes - in_page);
        }
        self.remember(physical, id);
        Decoding::Done(id)
    }

    fn translate(&self, cpu: &mut Cpu, instruction: &Instruction) -> Op {
        #[cfg(test)]
        if self.general_only {
            return general_op(cpu, *instruction);
        }
        fast::select(instruction).unwrap_or_else(|| general_op(cpu, *instruction))
    }

    /// Enters the block in the list of a page it has bytes in.
    fn enlist(&mut self, cpu: &mut Cpu, id: BlockId, offset: u16, physical: u64, bytes: usize) {
        let page = PageNumber::containing(physical);
        let list = match self.list(page) {
            Some(list) => list,
            None => {
                self.lists.push((page, Vec::new()));
                let index = usize::try_from(page.0).expect("guest memory fits the host");
                self.pages[index] = u32::try_from(self.lists.len()).expect("the cache is bounded");
                self.lists.len() - 1
            }
        };
        self.lists[list].1.push(Listed { offset, block: id });
        if cpu.code.add(physical, bytes as u64) {
            cpu.ram.guest().tracker().mark_code(page);
            cpu.tlb.forbid_fast_writes(physical & PAGE_MASK);
        }
    }

    /// Forgets every block with bytes in `page`.
    pub(super) fn forget_page(&mut self, cpu: &mut Cpu, page: PageNumber) {
        cpu.code.remove(page);
        cpu.ram.guest().tracker().clear_code(page);
        let Some(list) = self.list(page) else { return };
        for listed in std::mem::take(&mut self.lists[list].1) {
            let physical = self.block(listed.block).physical;
            let slot = &mut self.recent[recent_slot(physical)];
            if slot.physical == physical {
                *slot = NO_RECENT;
            }
            if listed.offset == SECOND_PAGE
                && let Some(first) = self.list(PageNumber::containing(physical))
            {
                self.lists[first].1.retain(|other| other.block != listed.block);
            }
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self, cpu: &mut Cpu) {
        for (page, _) in std::mem::take(&mut self.lists) {
            cpu.code.remove(page);
            cpu.ram.guest().tracker().clear_code(page);
            self.pages[usize::try_from(page.0).expect("guest memory fits the host")] = 0;
        }
        self.blocks.clear();
        self.ops.clear();
        cpu.decoded.clear();
        self.recent.fill(NO_RECENT);
    }
}
