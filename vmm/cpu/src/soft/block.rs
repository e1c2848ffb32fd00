//! The cache of decoded blocks.
//!
//! A block is a run of instructions within one page that ends at the first branch or at the
//! first instruction after which the run loop must look around. It is known by the physical
//! address of its first instruction, and holds nothing that depends on where it is mapped. An
//! instruction that crosses into another page is a block of its own.
//!
//! **What is forgotten.** A block owns its range of ops, and with them its decoded instructions:
//! when a page with bytes of it is overwritten, all of that goes back at once, so code that comes
//! and goes never fills the cache. What is live may fill it; then it starts anew. A slot that is
//! used again has another epoch, and an id names a slot *and* its epoch: an id of a block that
//! is gone finds nothing, whoever kept it for how long.
//!
//! **Links.** A block knows two of its successors. In the same page the next block is known by its
//! distance alone; to another page a link is a guess, which the run loop compares with what the
//! translation says.
//!
//! **Code.** The compiler makes machine code of blocks that are executed often. It belongs to its
//! block, and goes with it.
//!
//! Nothing here is visible to the guest. What the run loop asks for is a block, its ops and its code.

use super::compat::CodeSize;
use super::compiler::{Code, Compiler, Left, NotCompiled};
use super::cpu::Cpu;
use super::fast;
use super::generic::{Ending, ends_block};
use super::limits::{CacheLimits, MAX_BLOCK};
use super::op::{Op, general_op};
use super::op_store::{OpRange, OpStore};
use super::tlb::PAGE_MASK;
use crate::memory::{GuestRam, PAGE_SIZE, PageNumber};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

mod code;
#[cfg(test)]
pub(super) mod soundness;

/// Longest instruction in bytes.
const MAX_LENGTH: usize = 15;
/// The CPU model has neither TZCNT nor LZCNT, so that their prefix is ignored; nor WBNOINVD.
const OPTIONS: u32 =
    DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::NO_WBNOINVD;

/// A block in the cache, for as long as it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockId {
    slot: u32,
    epoch: u32,
}

const NO_BLOCK: BlockId = BlockId { slot: u32::MAX, epoch: 0 };

/// A successor, at a distance from this block's beginning.
#[derive(Debug, Clone, Copy)]
struct Link {
    distance: i32,
    block: BlockId,
}

/// The block has no bytes beyond its first page.
const NO_PAGE: u64 = u64::MAX;
/// No successor is so far away.
const NO_LINK: Link = Link { distance: i32::MIN, block: NO_BLOCK };

/// A run of decoded instructions; at least one, unless the slot is free.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Block {
    pub(super) ops: OpRange,
    /// Address of its first byte.
    pub(super) physical: u64,
    /// Physical page of the bytes beyond the first page.
    second: u64,
    links: [Link; 2],
    /// How many blocks were in this slot before.
    epoch: u32,
    /// Length in bytes.
    pub(super) bytes: u16,
    /// Nothing but RIP needs a look after it.
    linkable: bool,
    /// How it was decoded.
    size: CodeSize,
    /// How often it was executed before it was compiled; [`NEVER`]: it is not to be.
    heat: u16,
    code: Option<Code>,
}

/// The heat of a block that is not to be compiled.
const NEVER: u16 = u16::MAX;

const _: () = assert!(size_of::<Block>() == 64);

impl Block {
    /// It has machine code.
    #[inline(always)]
    pub(super) fn is_compiled(&self) -> bool {
        self.code.is_some()
    }

    /// The block that follows at `distance` from the beginning, if that is known.
    #[inline(always)]
    pub(super) fn successor(&self, distance: u64) -> Option<BlockId> {
        let at = |link: &Link| i64::from(link.distance) as u64 == distance;
        if at(&self.links[0]) {
            return Some(self.links[0].block);
        }
        if at(&self.links[1]) {
            return Some(self.links[1].block);
        }
        None
    }

    /// It has fewer than two successors yet.
    #[inline(always)]
    pub(super) fn has_room(&self) -> bool {
        self.links[1].distance == NO_LINK.distance
    }

    /// It lies in one page, and is 64-bit code.
    #[inline(always)]
    pub(super) fn is_plain(&self) -> bool {
        self.size == CodeSize::Long && !self.crosses()
    }

    #[inline(always)]
    fn crosses(&self) -> bool {
        self.second != NO_PAGE
    }
}

#[derive(Debug, Clone, Copy)]
struct Recent {
    /// Physical address, and the tag of the code size.
    key: u64,
    block: BlockId,
}

const NO_RECENT: Recent = Recent { key: u64::MAX, block: NO_BLOCK };

/// A block in its page's list: the offset of its first byte and its code size, or
/// [`SECOND_PAGE`].
#[derive(Debug, Clone, Copy)]
struct Listed {
    offset: u16,
    block: BlockId,
}

/// The block begins in another page.
const SECOND_PAGE: u16 = u16::MAX;

fn listed_offset(physical: u64, size: CodeSize) -> u16 {
    (physical % PAGE_SIZE) as u16 | (size as u16) << 12
}

/// The blocks with bytes in a page.
#[derive(Debug)]
struct PageList {
    page: PageNumber,
    blocks: Vec<Listed>,
}

/// What was decoded into the scratch, and is not a block of the cache yet.
#[derive(Debug, Clone, Copy)]
struct Draft {
    bytes: usize,
    ending: Ending,
}

/// Decoded blocks by physical address.
#[derive(Debug)]
pub(super) struct BlockCache {
    limits: CacheLimits,
    /// Blocks and free slots.
    slots: Vec<Block>,
    free: Vec<u32>,
    /// Number of blocks.
    live: usize,
    ops: OpStore,
    /// The ops of the block that is being made.
    scratch: Vec<Op>,
    recent: Vec<Recent>,
    /// By page number: 0, or the index in `lists` plus one.
    pages: Vec<u32>,
    /// Of the pages that blocks have bytes in, and of no others.
    lists: Vec<PageList>,
    pub(super) compiler: Option<Compiler>,
    /// No specialised ops: for tests that compare them with the general path.
    #[cfg(test)]
    pub(super) general_only: bool,
}

impl BlockCache {
    /// An empty cache for code in `ram`.
    pub(super) fn new(ram: &GuestRam, limits: CacheLimits) -> Self {
        let end = ram.ranges().last().map_or(0, |(start, len)| start.0 + len);
        let pages = usize::try_from(end / PAGE_SIZE).expect("guest memory fits the host");
        Self {
            limits,
            slots: Vec::new(),
            free: Vec::new(),
            live: 0,
            ops: OpStore::new(limits.ops),
            scratch: Vec::new(),
            recent: vec![NO_RECENT; limits.recent],
            pages: vec![0; pages],
            lists: Vec::new(),
            compiler: Compiler::new(&limits),
            #[cfg(test)]
            general_only: false,
        }
    }

    /// The block, if it was not forgotten since.
    #[inline(always)]
    pub(super) fn get(&self, id: BlockId) -> Option<&Block> {
        self.slots.get(id.slot as usize).filter(|block| block.epoch == id.epoch)
    }

    /// The block's ops.
    #[inline(always)]
    pub(super) fn ops(&self, block: &Block) -> &[Op] {
        self.ops.get(&block.ops)
    }

    /// Remembers that `next` follows `id` at `distance`: for good if no translation needs a look on
    /// the way, because both lie whole in the same page; else as a guess, if there is room for one.
    /// What was forgotten meanwhile follows nothing.
    pub(super) fn link(&mut self, id: BlockId, distance: u64, next: BlockId) {
        let (Some(from), Some(to)) = (self.get(id), self.get(next)) else { return };
        let Ok(distance) = i32::try_from(distance as i64) else { return };
        let there = from.physical.wrapping_add(distance as i64 as u64);
        let leaves = there & PAGE_MASK != from.physical & PAGE_MASK;
        let near = !leaves
            && there == to.physical
            && from.linkable
            && !from.crosses()
            && !to.crosses()
            && from.size == to.size;
        let known = from.links.iter().position(|link| link.distance == distance);
        let guess = leaves && to.is_plain() && (known.is_some() || from.has_room());
        if near || guess {
            let links = &mut self.slots[id.slot as usize].links;
            let link = Link { distance, block: next };
            match known {
                Some(place) => links[place] = link,
                None => *links = [link, links[0]],
            }
        }
    }

    #[inline(always)]
    fn recent_slot(&self, key: u64) -> usize {
        ((key ^ (key >> 13)) as usize) & (self.recent.len() - 1)
    }

    /// The block at a physical address with the tag of its code size, if it is decoded and lies in
    /// one page.
    #[inline(always)]
    pub(super) fn recent(&self, key: u64) -> Option<BlockId> {
        let recent = &self.recent[self.recent_slot(key)];
        (recent.key == key).then_some(recent.block)
    }

    /// Finds or decodes the block at `physical`. `None` if its first instruction goes on in the
    /// page that follows in linear order: see [`Self::find_crossing`].
    pub(super) fn find(&mut self, cpu: &mut Cpu, physical: u64) -> Option<BlockId> {
        if let Some((id, second)) = self.listed(physical, cpu.code_size) {
            return (second == NO_PAGE).then_some(id);
        }
        self.make_room(cpu);
        let draft = self.decode_run(cpu, physical)?;
        Some(self.add(cpu, physical, draft, NO_PAGE))
    }

    /// Finds or decodes the block at `physical`, whose first instruction goes on in the physical page
    /// `next_page`.
    pub(super) fn find_crossing(
        &mut self,
        cpu: &mut Cpu,
        physical: u64,
        next_page: u64,
    ) -> BlockId {
        if let Some((id, second)) = self.listed(physical, cpu.code_size) {
            if second == NO_PAGE || second == next_page {
                return id;
            }
            self.forget_page(cpu, PageNumber::containing(physical));
        }
        self.make_room(cpu);
        let draft = self.decode_crossing(cpu, physical, next_page);
        self.add(cpu, physical, draft, next_page)
    }

    fn list(&self, page: PageNumber) -> Option<usize> {
        let index = *self.pages.get(usize::try_from(page.0).ok()?)?;
        (index as usize).checked_sub(1)
    }

    /// The block at `physical`, and the second page it has bytes in.
    fn listed(&mut self, physical: u64, size: CodeSize) -> Option<(BlockId, u64)> {
        let list = &self.lists[self.list(PageNumber::containing(physical))?];
        let offset = listed_offset(physical, size);
        let id = list.blocks.iter().find(|listed| listed.offset == offset)?.block;
        let second = self.get(id)?.second;
        self.remember(physical | size.tag(), id, second);
        Some((id, second))
    }

    fn remember(&mut self, key: u64, block: BlockId, second: u64) {
        if second == NO_PAGE {
            let slot = self.recent_slot(key);
            self.recent[slot] = Recent { key, block };
        }
    }

    fn make_room(&mut self, cpu: &mut Cpu) {
        let full = self.live >= self.limits.blocks
            || self.ops.used() + self.limits.block > self.limits.ops
            || cpu.decoded.len() + self.limits.block > self.limits.decoded;
        if full {
            self.clear(cpu);
        }
    }

    /// Decodes what lies in the page. `None` if the first instruction does not.
    fn decode_run(&mut self, cpu: &mut Cpu, physical: u64) -> Option<Draft> {
        let mut buffer = [0; MAX_BLOCK * MAX_LENGTH];
        let in_page = (PAGE_SIZE - physical % PAGE_SIZE) as usize;
        let available = in_page.min(buffer.len());
        cpu.ram.read(physical, &mut buffer[..available]);
        let mut decoder = Decoder::with_ip(cpu.code_size.bits(), &buffer[..available], 0, OPTIONS);
        let mut draft = Draft { bytes: 0, ending: Ending::No };
        while self.scratch.len() < self.limits.block
            && draft.ending == Ending::No
            && draft.bytes < available
        {
            let instruction = decoder.decode();
            if decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            let op = self.translate(cpu, &instruction);
            self.scratch.push(op);
            draft.bytes += instruction.len();
            draft.ending = ends_block(&instruction);
        }
        (!self.scratch.is_empty()).then_some(draft)
    }

    /// Decodes one instruction from the end of a page and the beginning of another.
    fn decode_crossing(&mut self, cpu: &mut Cpu, physical: u64, next_page: u64) -> Draft {
        let mut buffer = [0; MAX_LENGTH];
        let in_page = ((PAGE_SIZE - physical % PAGE_SIZE) as usize).min(MAX_LENGTH);
        let (first, second) = buffer.split_at_mut(in_page);
        cpu.ram.read(physical, first);
        cpu.ram.read(next_page, second);
        let instruction = Decoder::with_ip(cpu.code_size.bits(), &buffer, 0, OPTIONS).decode();
        let op = self.translate(cpu, &instruction);
        self.scratch.push(op);
        Draft { bytes: instruction.len(), ending: ends_block(&instruction) }
    }

    fn translate(&self, cpu: &mut Cpu, instruction: &Instruction) -> Op {
        #[cfg(test)]
        if self.general_only {
            return general_op(cpu, *instruction);
        }
        fast::select(instruction, cpu.code_size).unwrap_or_else(|| general_op(cpu, *instruction))
    }

    /// Makes a block of a draft; `next_page` is where its bytes beyond the page are, if it has any.
    fn add(&mut self, cpu: &mut Cpu, physical: u64, draft: Draft, next_page: u64) -> BlockId {
        let in_page = (PAGE_SIZE - physical % PAGE_SIZE) as usize;
        let beyond = draft.bytes.saturating_sub(in_page);
        let second = if beyond > 0 { next_page } else { NO_PAGE };
        let ops = self.ops.keep(&mut self.scratch).unwrap_or_else(|| {
            // It has room, but scattered.
            self.clear(cpu);
            self.ops.keep(&mut self.scratch).expect("there is room for any block")
        });
        let mut block = Block {
            ops,
            physical,
            second,
            links: [NO_LINK; 2],
            epoch: 0,
            bytes: draft.bytes as u16,
            linkable: draft.ending != Ending::System,
            size: cpu.code_size,
            heat: 0,
            code: None,
        };
        self.live += 1;
        let id = match self.free.pop() {
            Some(slot) => {
                let place = &mut self.slots[slot as usize];
                block.epoch = place.epoch;
                *place = block;
                BlockId { slot, epoch: place.epoch }
            }
            None => {
                self.slots.push(block);
                BlockId { slot: (self.slots.len() - 1) as u32, epoch: 0 }
            }
        };
        let offset = listed_offset(physical, cpu.code_size);
        self.enlist(cpu, id, offset, physical, draft.bytes - beyond);
        if second != NO_PAGE {
            self.enlist(cpu, id, SECOND_PAGE, second, beyond);
        }
        self.remember(physical | cpu.code_size.tag(), id, second);
        id
    }

    /// Enters the block in the list of a page it has bytes in.
    fn enlist(&mut self, cpu: &mut Cpu, id: BlockId, offset: u16, physical: u64, bytes: usize) {
        let page = PageNumber::containing(physical);
        let list = match self.list(page) {
            Some(list) => list,
            None => {
                self.lists.push(PageList { page, blocks: Vec::new() });
                self.pages[page.0 as usize] = self.lists.len() as u32;
                self.lists.len() - 1
            }
        };
        self.lists[list].blocks.push(Listed { offset, block: id });
        if cpu.code.add(physical, bytes as u64) {
            cpu.ram.guest().tracker().mark_code(page);
            cpu.tlb.forbid_fast_writes(physical & PAGE_MASK);
        }
    }

    /// The page holds no decoded instructions any more; the blocks that its list had.
    fn drop_list(&mut self, cpu: &mut Cpu, page: PageNumber) -> Vec<Listed> {
        cpu.code.remove(page);
        cpu.ram.guest().tracker().clear_code(page);
        let Some(list) = self.list(page) else { return Vec::new() };
        let dropped = self.lists.swap_remove(list);
        self.pages[page.0 as usize] = 0;
        if let Some(moved) = self.lists.get(list) {
            self.pages[moved.page.0 as usize] = list as u32 + 1;
        }
        dropped.blocks
    }

    /// Forgets every block with bytes in `page`.
    pub(super) fn forget_page(&mut self, cpu: &mut Cpu, page: PageNumber) {
        for listed in self.drop_list(cpu, page) {
            let Some(block) = self.get(listed.block) else { continue };
            let (physical, second, size) = (block.physical, block.second, block.size);
            if listed.offset == SECOND_PAGE {
                self.strike(cpu, listed.block, physical);
            } else if second != NO_PAGE {
                self.strike(cpu, listed.block, second);
            }
            let slot = self.recent_slot(physical | size.tag());
            if self.recent[slot].block == listed.block {
                self.recent[slot] = NO_RECENT;
            }
            self.release(cpu, listed.block);
        }
    }

    /// Takes the block off the list of the page that holds `physical`.
    fn strike(&mut self, cpu: &mut Cpu, id: BlockId, physical: u64) {
        let page = PageNumber::containing(physical);
        let Some(list) = self.list(page) else { return };
        let blocks = &mut self.lists[list].blocks;
        blocks.retain(|other| other.block != id);
        if blocks.is_empty() {
            self.drop_list(cpu, page);
        }
    }

    /// Gives back what the block has; from here on no id finds it.
    fn release(&mut self, cpu: &mut Cpu, id: BlockId) {
        let Some(block) = self.slots.get_mut(id.slot as usize) else { return };
        if block.epoch != id.epoch {
            return;
        }
        let ops = std::mem::take(&mut block.ops);
        if let (Some(code), Some(compiler)) = (block.code.take(), &mut self.compiler) {
            compiler.forget(code);
        }
        self.live -= 1;
        for number in self.ops.give_back(ops).iter().filter_map(Op::number) {
            cpu.decoded.remove(number);
        }
        // No id has the last epoch: a slot that has come to it is not used again.
        block.epoch += 1;
        if block.epoch < u32::MAX {
            self.free.push(id.slot);
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self, cpu: &mut Cpu) {
        for PageList { page, blocks } in std::mem::take(&mut self.lists) {
            cpu.code.remove(page);
            cpu.ram.guest().tracker().clear_code(page);
            self.pages[page.0 as usize] = 0;
            for listed in blocks {
                self.release(cpu, listed.block);
            }
        }
        self.recent.fill(NO_RECENT);
        self.ops.start_anew();
        if let Some(compiler) = &mut self.compiler {
            compiler.start_anew();
        }
    }
}
