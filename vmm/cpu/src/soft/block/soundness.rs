//! What must hold of the cache between any two of its operations, and of its ids for ever.

use super::*;
use std::collections::BTreeSet;

/// What a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) struct Held {
    pub(in super::super) blocks: usize,
    pub(in super::super) ops: usize,
    pub(in super::super) decoded: usize,
    /// Pages that have a list.
    pub(in super::super) pages: usize,
    /// Slots, free ones included.
    pub(in super::super) slots: usize,
}

impl BlockCache {
    /// What it holds, after a look whether that is what its lists, its blocks and their ops say.
    pub(in super::super) fn sound(&self, cpu: &Cpu) -> Held {
        let mut listed = BTreeSet::new();
        for (index, list) in self.lists.iter().enumerate() {
            assert_eq!(self.pages[list.page.0 as usize] as usize, index + 1);
            assert!(!list.blocks.is_empty() && cpu.code.has_code(list.page));
            assert!(cpu.ram.guest().tracker().is_code(list.page));
            for entry in &list.blocks {
                let block = self.get(entry.block).expect("what is listed is there");
                let second = entry.offset == SECOND_PAGE;
                let place = if second { block.second } else { block.physical };
                assert_eq!(PageNumber::containing(place), list.page);
                let offset = listed_offset(block.physical, block.size);
                assert!(second || entry.offset == offset);
                listed.insert((entry.block.slot, entry.block.epoch));
            }
        }
        assert_eq!(self.pages.iter().filter(|page| **page != 0).count(), self.lists.len());
        let blocks: Vec<&Block> = self.slots.iter().filter(|block| block.ops.len() > 0).collect();
        let ops = || blocks.iter().flat_map(|block| self.ops(block));
        let numbers: BTreeSet<u32> = ops().filter_map(Op::number).collect();
        assert_eq!(blocks.len(), listed.len(), "every block is listed");
        assert_eq!(blocks.len(), self.live);
        assert_eq!(ops().count(), self.ops.used());
        assert_eq!(ops().filter_map(Op::number).count(), numbers.len(), "a number for each");
        assert_eq!(numbers.len(), cpu.decoded.len());
        assert!(self.free.len() + self.live <= self.slots.len());
        for recent in self.recent.iter().filter(|recent| recent.block != NO_BLOCK) {
            let block = self.get(recent.block).expect("what is recent is there");
            assert!(block.physical | block.size.tag() == recent.key && !block.crosses());
        }
        for block in blocks {
            for link in &block.links {
                let to = block.physical.wrapping_add(link.distance as i64 as u64);
                let near = to & PAGE_MASK == block.physical & PAGE_MASK;
                let there = self.get(link.block);
                assert!(!near || there.is_some_and(|next| next.physical == to));
            }
        }
        Held {
            blocks: self.live,
            ops: self.ops.used(),
            decoded: numbers.len(),
            pages: self.lists.len(),
            slots: self.slots.len(),
        }
    }
}

/// Where the tests' code is: no-ops, each block one of them.
const CODE: u64 = 0x5000;

fn cache(limits: CacheLimits) -> (BlockCache, Cpu) {
    let ram = GuestRam::new(crate::memory::MIN_MEMORY).expect("allowed size");
    let mut cpu = Cpu::new(ram.clone(), limits);
    cpu.ram.write(CODE, &[0x90; 4096]);
    (BlockCache::new(&ram, limits), cpu)
}

#[test]
fn an_id_of_a_forgotten_block_finds_nothing_also_when_its_place_is_taken_again() {
    let (mut cache, mut cpu) = cache(CacheLimits::default());
    let old = cache.find(&mut cpu, CODE).expect("within the page");
    cache.forget_page(&mut cpu, PageNumber::containing(CODE));
    assert!(cache.get(old).is_none());
    let new = cache.find(&mut cpu, CODE).expect("within the page");
    assert_eq!(old.slot, new.slot, "the place is used again");
    assert!(cache.get(old).is_none() && cache.get(new).is_some());
    let next = cache.find(&mut cpu, CODE + 64).expect("within the page");
    cache.link(old, 64, next);
    cache.link(new, 64, old);
    let links = cache.get(new).expect("there").links;
    assert!(links.iter().all(|link| link.block == NO_BLOCK), "no link from or to what is gone");
    cache.link(new, 64, next);
    assert_eq!(cache.get(new).expect("there").successor(64), Some(next));
    assert_eq!(cache.sound(&cpu).slots, 2);
}

#[test]
fn an_id_kept_while_the_cache_starts_anew_finds_nothing() {
    let (mut cache, mut cpu) = cache(CacheLimits::tiny(1));
    let first = cache.find(&mut cpu, CODE).expect("within the page");
    let second = cache.find(&mut cpu, CODE + 1).expect("within the page");
    assert!(cache.get(first).is_none() && cache.get(second).is_some());
    cache.link(first, 1, second);
    let held = cache.sound(&cpu);
    assert_eq!((held.blocks, held.ops, held.pages, held.slots), (1, 1, 1, 1));
}

#[test]
fn a_place_whose_epochs_are_used_up_is_not_used_again() {
    let (mut cache, mut cpu) = cache(CacheLimits::default());
    let id = cache.find(&mut cpu, CODE).expect("within the page");
    cache.forget_page(&mut cpu, PageNumber::containing(CODE));
    // As if it had been used so often.
    cache.slots[id.slot as usize].epoch = u32::MAX - 1;
    let last = cache.find(&mut cpu, CODE).expect("within the page");
    assert_eq!(last, BlockId { slot: id.slot, epoch: u32::MAX - 1 });
    cache.forget_page(&mut cpu, PageNumber::containing(CODE));
    assert!(cache.get(last).is_none());
    let other = cache.find(&mut cpu, CODE).expect("within the page");
    assert_ne!(other.slot, id.slot);
    assert_eq!(cache.sound(&cpu).slots, 2);
}

#[test]
fn a_block_across_two_pages_goes_with_either_of_them() {
    for forgotten in [CODE, CODE + 0x1000] {
        let (mut cache, mut cpu) = cache(CacheLimits::default());
        // MOV EAX, imm32, its last two bytes in the next page; and a block in each page besides.
        let at = CODE + 0xFFD;
        cpu.ram.write(at, &[0xB8, 1, 2]);
        cpu.ram.write(CODE + 0x1000, &[3, 4, 0x90, 0xF4]);
        assert_eq!(cache.find(&mut cpu, at), None);
        let crossing = cache.find_crossing(&mut cpu, at, CODE + 0x1000);
        let inside = cache.find(&mut cpu, CODE).expect("within the page");
        let behind = cache.find(&mut cpu, CODE + 0x1002).expect("within the page");
        assert_eq!(cache.sound(&cpu).pages, 2);
        cache.forget_page(&mut cpu, PageNumber::containing(forgotten));
        assert!(cache.get(crossing).is_none());
        assert_eq!(cache.get(inside).is_some(), forgotten != CODE);
        assert_eq!(cache.get(behind).is_some(), forgotten == CODE);
        let held = cache.sound(&cpu);
        assert_eq!((held.blocks, held.pages), (1, 1));
        // With a page that is another now, it is another block.
        let other = cache.find_crossing(&mut cpu, at, CODE + 0x2000);
        assert_ne!(other, crossing);
        assert_eq!(cache.sound(&cpu).pages, if forgotten == CODE { 3 } else { 2 });
    }
}
