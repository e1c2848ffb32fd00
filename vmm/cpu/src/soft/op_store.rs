//! Where the ops of all blocks lie: one block's beside another's, as they were decoded.
//!
//! A block owns a range of places. Ranges are neither copied nor cloned: one that is given back
//! cannot be looked at any more, and serves the next block with as many ops.

use super::limits::MAX_BLOCK;
use super::op::Op;

/// The places of a block's ops; none, by default.
#[derive(Debug, Default)]
pub(super) struct OpRange {
    first: u32,
    count: u16,
}

impl OpRange {
    /// How many ops there are.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        usize::from(self.count)
    }
}

/// The ops of all blocks.
#[derive(Debug)]
pub(super) struct OpStore {
    ops: Vec<Op>,
    /// The most there may be, those in free ranges included.
    most: usize,
    /// Ops of blocks.
    used: usize,
    /// The first places of the free ranges, by their length.
    free: [Vec<u32>; MAX_BLOCK + 1],
}

impl OpStore {
    /// Room for so many ops, which must be enough for one block.
    pub(super) fn new(most: usize) -> Self {
        Self { ops: Vec::new(), most, used: 0, free: [const { Vec::new() }; MAX_BLOCK + 1] }
    }

    /// How many ops blocks have.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// The ops of a block.
    #[inline(always)]
    pub(super) fn get(&self, range: &OpRange) -> &[Op] {
        &self.ops[range.first as usize..][..range.len()]
    }

    /// Moves a block's ops in. `None`, and nothing moved, if there is no room: free ranges may be left
    /// that are too short.
    pub(super) fn keep(&mut self, block: &mut Vec<Op>) -> Option<OpRange> {
        let count = block.len();
        let first = match self.free[count].pop() {
            Some(first) => {
                let places = &mut self.ops[first as usize..][..count];
                for (place, op) in places.iter_mut().zip(block.drain(..)) {
                    *place = op;
                }
                first
            }
            None if self.ops.len() + count <= self.most => {
                let first = self.ops.len() as u32;
                self.ops.append(block);
                first
            }
            None => {
                let longer = (count + 1..=MAX_BLOCK).find(|len| !self.free[*len].is_empty())?;
                let first = self.free[longer].pop()?;
                self.free[longer - count].push(first + count as u32);
                self.free[count].push(first);
                return self.keep(block);
            }
        };
        self.used += count;
        Some(OpRange { first, count: count as u16 })
    }

    /// Takes a block's ops back: a last look at them.
    pub(super) fn give_back(&mut self, range: OpRange) -> &[Op] {
        let OpRange { first, count } = range;
        let count = usize::from(count);
        if count > 0 {
            self.free[count].push(first);
            self.used -= count;
        }
        &self.ops[first as usize..][..count]
    }

    /// No block has ops any more: there is room for blocks of any length.
    pub(super) fn start_anew(&mut self) {
        assert_eq!(self.used, 0, "every range was given back");
        self.ops.clear();
        self.free.iter_mut().for_each(Vec::clear);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soft::compat::CodeSize;
    use iced_x86::Instruction;

    /// Ops that know which they are.
    fn ops(numbers: std::ops::Range<i32>) -> Vec<Op> {
        let op = |number| {
            let mut op = Op::bare(&Instruction::default(), CodeSize::Long, false);
            op.low = number;
            op
        };
        numbers.map(op).collect()
    }

    fn numbers(ops: &[Op]) -> Vec<i32> {
        ops.iter().map(|op| op.low).collect()
    }

    #[test]
    fn a_range_that_was_given_back_serves_a_block_of_its_length() {
        let mut store = OpStore::new(5);
        let two = store.keep(&mut ops(0..2)).expect("there is room");
        let three = store.keep(&mut ops(2..5)).expect("there is room");
        assert!(store.keep(&mut ops(5..6)).is_none(), "it is full");
        assert_eq!(numbers(store.give_back(two)), [0, 1]);
        assert!(store.keep(&mut ops(5..8)).is_none(), "what is free is too short");
        let two = store.keep(&mut ops(8..10)).expect("there is room");
        assert_eq!(numbers(store.get(&two)), [8, 9]);
        assert_eq!(numbers(store.get(&three)), [2, 3, 4]);
        assert_eq!(store.used(), 5);
    }

    #[test]
    fn a_longer_range_is_divided_when_there_is_no_other_room() {
        let mut store = OpStore::new(MAX_BLOCK);
        let all = store.keep(&mut ops(0..64)).expect("there is room");
        store.give_back(all);
        let blocks: Vec<OpRange> = (0..21)
            .map(|n| store.keep(&mut ops(3 * n..3 * n + 3)).expect("there is room"))
            .collect();
        assert!(store.keep(&mut ops(0..2)).is_none());
        let one = store.keep(&mut ops(63..64)).expect("there is room");
        let kept: Vec<i32> =
            blocks.iter().chain([&one]).flat_map(|range| numbers(store.get(range))).collect();
        assert_eq!(kept, (0..64).collect::<Vec<i32>>());
        for range in blocks.into_iter().chain([one]) {
            store.give_back(range);
        }
        store.start_anew();
        assert_eq!(store.keep(&mut ops(0..64)).map(|range| range.len()), Some(64));
    }
}
