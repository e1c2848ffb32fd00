//! What the demo's reader has seen.

use crate::pair::Lines;
use vmft_guest_images::workload::DemoLine;

/// Counts of numbered lines.
#[derive(Debug, Default)]
pub struct Ledger {
    lines: Lines,
    /// Numbers of the lines printed, in the order seen.
    printed: Vec<u32>,
    /// Numbers of the records said to be synced, in the order seen.
    synced: Vec<u32>,
    done: bool,
}

/// What is wrong with a sequence that should be 1, 2, 3, …
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gaps {
    /// Numbers never seen.
    pub missing: u32,
    /// Numbers seen again, or out of order.
    pub repeated: u32,
}

fn gaps(seen: &[u32], wanted: u32) -> Gaps {
    let mut sorted = seen.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let good = sorted.iter().filter(|number| (1..=wanted).contains(*number)).count();
    let good = u32::try_from(good).unwrap_or(u32::MAX);
    let ascending = seen.windows(2).filter(|pair| pair[1] <= pair[0]).count();
    Gaps {
        missing: wanted.saturating_sub(good),
        repeated: u32::try_from(ascending).unwrap_or(u32::MAX),
    }
}

impl Ledger {
    /// Reads console bytes.
    pub fn read(&mut self, bytes: &[u8]) {
        for line in self.lines.add(bytes) {
            match DemoLine::parse(&line) {
                Some(DemoLine::Line(number)) => self.printed.push(number),
                Some(DemoLine::Synced(number)) => self.synced.push(number),
                Some(DemoLine::Done) => self.done = true,
                None => {}
            }
        }
    }

    /// Records said to be synced so far.
    pub fn synced(&self) -> u32 {
        self.synced.iter().copied().max().unwrap_or(0)
    }

    /// Lines printed so far.
    pub fn printed(&self) -> u32 {
        self.printed.iter().copied().max().unwrap_or(0)
    }

    /// Lines seen.
    pub fn printed_count(&self) -> usize {
        self.printed.len()
    }

    /// Records seen.
    pub fn synced_count(&self) -> usize {
        self.synced.len()
    }

    /// True if the guest did all it should.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// What is wrong with the lines.
    pub fn line_gaps(&self, wanted: u32) -> Gaps {
        gaps(&self.printed, wanted)
    }

    /// What is wrong with the records.
    pub fn record_gaps(&self, wanted: u32) -> Gaps {
        gaps(&self.synced, wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_repeated_numbers_are_counted() {
        assert_eq!(gaps(&[1, 2, 3], 3), Gaps::default());
        assert_eq!(gaps(&[1, 3], 3), Gaps { missing: 1, repeated: 0 });
        assert_eq!(gaps(&[1, 2, 2, 3], 3), Gaps { missing: 0, repeated: 1 });
        assert_eq!(gaps(&[1, 2, 1, 2, 3], 3), Gaps { missing: 0, repeated: 1 });
        assert_eq!(gaps(&[], 2), Gaps { missing: 2, repeated: 0 });
    }

    #[test]
    fn lines_split_over_reads_are_read_once() {
        let mut ledger = Ledger::default();
        ledger.read(b"noise\r\nvmft-line 0000");
        ledger.read(b"01\r\nvmft-record 000001 synced\r\nvmft-do");
        assert_eq!((ledger.printed_count(), ledger.synced()), (1, 1));
        assert!(!ledger.is_done());
        ledger.read(b"ne\r\n");
        assert!(ledger.is_done());
    }
}
