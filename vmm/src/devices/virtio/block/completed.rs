//! The writes of one disk that were completed since the last completed flush.
//!
//! The guest was told that they are done, and reads what it wrote. Until a flush has covered them, they may
//! lie where they are lost with the host that made them: in its page cache, or in a cache of its own
//! connection to the storage. So a pair's machine keeps them, on both sides alike, and a side that goes live
//! makes them again before anything else. A flush that a side answers then covers what its predecessor has
//! completed.
//!
//! What is kept is bounded. From [`KeepLimit::flush_bytes`] on, the device asks for a flush of its own, which
//! nobody in the guest waits for; at [`KeepLimit::bytes`], it takes no more requests until that is done. The
//! counts are part of the state that the two sides compare; the data is not, since it is in the guest's
//! requests, which are.

use super::MAX_REQUEST_BYTES;
use super::requests::MAX_IN_FLIGHT_BYTES;
use crate::devices::{InvalidState, require};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;
use vmft_log::wire::MAX_COUNT;

/// How many writes a disk has completed.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash, Serialize, Deserialize,
)]
pub struct WriteCount(pub u64);

/// A write that the guest knows to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletedWrite {
    /// Byte offset on the disk.
    pub offset: u64,
    /// What was written.
    #[serde(with = "shared_bytes")]
    pub data: Arc<Vec<u8>>,
}

/// Consecutive completed writes of one disk, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CompletedWrites {
    /// So many were completed before the first of these.
    pub before: WriteCount,
    /// The writes.
    pub writes: VecDeque<CompletedWrite>,
}

impl CompletedWrites {
    /// None, after so many.
    pub const fn none_after(before: WriteCount) -> Self {
        Self { before, writes: VecDeque::new() }
    }

    /// How many were completed up to the last of these.
    pub fn end(&self) -> WriteCount {
        WriteCount(self.before.0 + self.writes.len() as u64)
    }

    /// These writes, and in front of them those from `from` on that `earlier` has: `None` if one is missing.
    pub fn after(&self, earlier: &Self, from: WriteCount) -> Option<Self> {
        let Some(wanted) = self.before.0.checked_sub(from.0) else {
            // It has more than is wanted.
            let surplus = usize::try_from(from.0 - self.before.0).ok()?;
            let writes = self.writes.iter().skip(surplus).cloned().collect();
            return (from <= self.end()).then_some(Self { before: from, writes });
        };
        if wanted == 0 {
            return Some(self.clone());
        }
        if earlier.before > from || earlier.end() < self.before {
            return None;
        }
        let skip = usize::try_from(from.0 - earlier.before.0).ok()?;
        let wanted = usize::try_from(wanted).ok()?;
        let older = earlier.writes.iter().skip(skip).take(wanted);
        Some(Self { before: from, writes: older.chain(&self.writes).cloned().collect() })
    }

    /// True if these are all that are counted as not covered, of a machine with so many disks.
    pub fn are(&self, counts: CompletedCounts, disks: usize) -> bool {
        counts.durable <= counts.completed
            && self.before == counts.durable
            && self.end() == counts.completed
            && counts.bytes <= KeepLimit::for_disks(disks).bytes() + OVERSHOOT
            && self.writes.iter().map(|write| write.data.len() as u64).sum::<u64>() == counts.bytes
    }
}

/// So many bytes may be kept beyond the limit: requests that were on their way when it was reached.
const OVERSHOOT: u64 = MAX_IN_FLIGHT_BYTES + MAX_REQUEST_BYTES;

/// How much one disk keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepLimit {
    bytes: u64,
}

impl KeepLimit {
    /// What one disk keeps at most, if it is the only one.
    const MOST: u64 = 32 << 20;
    /// What all disks of a machine keep together. With what is on its way, a machine's state stays below the
    /// limit of a checkpoint.
    const ALL: u64 = 64 << 20;

    /// The limit of each disk of a machine with so many.
    pub fn for_disks(disks: usize) -> Self {
        Self { bytes: (Self::ALL / disks.max(1) as u64).min(Self::MOST) }
    }

    /// So many bytes stop the device from taking requests, until a flush has covered them.
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// So many make it ask for a flush.
    pub const fn flush_bytes(self) -> u64 {
        self.bytes / 2
    }
}

/// What both sides know of a disk's completed writes, but for their data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CompletedCounts {
    /// They are kept: the machine is a pair's.
    pub keeps: bool,
    /// So many are covered by a completed flush.
    pub durable: WriteCount,
    /// So many were completed.
    pub completed: WriteCount,
    /// Bytes of those that are not covered.
    pub bytes: u64,
    /// A flush of the device's own has failed. The guest is told at its next one.
    pub in_doubt: bool,
}

/// The completed writes of one disk that no flush has covered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    counts: CompletedCounts,
    writes: VecDeque<CompletedWrite>,
    limit: KeepLimit,
}

impl Kept {
    pub(super) fn new(limit: KeepLimit) -> Self {
        Self { counts: CompletedCounts::default(), writes: VecDeque::new(), limit }
    }

    pub(super) const fn counts(&self) -> CompletedCounts {
        self.counts
    }

    /// From now on they are kept.
    pub(super) fn begin(&mut self) {
        self.counts.keeps = true;
    }

    /// A write is completed.
    pub(super) fn add(&mut self, offset: u64, data: Vec<u8>) {
        if !self.counts.keeps {
            return;
        }
        self.counts.completed.0 += 1;
        self.counts.bytes += data.len() as u64;
        self.writes.push_back(CompletedWrite { offset, data: Arc::new(data) });
    }

    /// A flush that began after `covered` writes is completed.
    pub(super) fn flushed(&mut self, covered: WriteCount) {
        while self.counts.durable < covered {
            let Some(write) = self.writes.pop_front() else { return };
            self.counts.durable.0 += 1;
            self.counts.bytes -= write.data.len() as u64;
        }
    }

    /// A flush of the device's own has failed. What it would have covered is kept for the next, as long as
    /// there is room.
    pub(super) fn own_flush_failed(&mut self, covered: WriteCount) {
        self.counts.in_doubt = self.counts.keeps;
        if self.is_full() {
            self.flushed(covered);
        }
    }

    /// True once after a flush of the device's own has failed.
    pub(super) fn take_doubt(&mut self) -> bool {
        std::mem::take(&mut self.counts.in_doubt)
    }

    /// True if it is time for a flush.
    pub(super) fn wants_flush(&self) -> bool {
        self.counts.bytes >= self.limit.flush_bytes()
    }

    /// True if no more should be completed before a flush.
    pub(super) fn is_full(&self) -> bool {
        self.counts.bytes >= self.limit.bytes()
    }

    /// Those after the first `known`.
    pub(super) fn since(&self, known: WriteCount) -> CompletedWrites {
        let before = known.max(self.counts.durable).min(self.counts.completed);
        let skip = (before.0 - self.counts.durable.0) as usize;
        CompletedWrites { before, writes: self.writes.iter().skip(skip).cloned().collect() }
    }

    /// What a saved device knew; the data comes by [`Self::restore`].
    pub(super) fn counted(counts: CompletedCounts, limit: KeepLimit) -> Self {
        Self { counts, writes: VecDeque::new(), limit }
    }

    /// The data.
    pub(super) fn restore(
        &mut self,
        writes: &CompletedWrites,
        on_disk: impl Fn(&CompletedWrite) -> bool,
    ) -> Result<(), InvalidState> {
        let check = |holds, reason| require("completed disk writes", holds, reason);
        let counts = self.counts;
        check(writes.are(counts, 1), "not those that are counted")?;
        check(counts.completed.0 <= MAX_COUNT, "counted beyond all writes")?;
        check(counts.keeps || writes.writes.is_empty(), "kept for nobody")?;
        check(writes.writes.iter().all(on_disk), "beyond the disk")?;
        self.writes.clone_from(&writes.writes);
        Ok(())
    }
}

/// Bytes as a whole: one by one they would take as long as a failover.
mod shared_bytes {
    use serde::de::{SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};
    use std::fmt;
    use std::sync::Arc;

    pub(super) fn serialize<S: Serializer>(
        bytes: &Arc<Vec<u8>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    struct Bytes;

    impl<'de> Visitor<'de> for Bytes {
        type Value = Arc<Vec<u8>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bytes")
        }

        fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Self::Value, E> {
            Ok(Arc::new(bytes.to_vec()))
        }

        fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Self::Value, E> {
            Ok(Arc::new(bytes))
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Self::Value, A::Error> {
            let mut bytes = Vec::new();
            while let Some(byte) = parts.next_element()? {
                bytes.push(byte);
            }
            Ok(Arc::new(bytes))
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<Vec<u8>>, D::Error> {
        deserializer.deserialize_byte_buf(Bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Kept {
        let mut kept = Kept::new(KeepLimit::for_disks(1));
        kept.begin();
        kept
    }

    fn offsets(writes: &CompletedWrites) -> Vec<u64> {
        writes.writes.iter().map(|write| write.offset).collect()
    }

    #[test]
    fn a_flush_covers_what_was_completed_before_it_began() {
        let mut kept = kept();
        kept.add(1, vec![1]);
        kept.add(2, vec![2]);
        let covered = kept.counts().completed;
        kept.add(3, vec![3; 4]);
        kept.flushed(covered);
        let left = kept.since(WriteCount(0));
        assert_eq!((left.before, offsets(&left)), (WriteCount(2), vec![3]));
        assert_eq!(kept.counts().bytes, 4);
        kept.flushed(covered);
        assert_eq!(offsets(&kept.since(WriteCount(0))), [3], "an older flush covers no more");
    }

    #[test]
    fn a_machine_that_is_no_pairs_keeps_nothing() {
        let mut kept = Kept::new(KeepLimit::for_disks(1));
        kept.add(1, vec![1]);
        assert_eq!(kept.counts(), CompletedCounts::default());
    }

    #[test]
    fn whoever_has_the_older_ones_is_told_the_newer_alone_and_has_all() {
        let mut kept = kept();
        (1..=6).for_each(|offset| kept.add(offset, vec![0]));
        let follower = kept.since(WriteCount(0));
        kept.flushed(WriteCount(2));
        (7..=8).for_each(|offset| kept.add(offset, vec![0]));
        let told = kept.since(WriteCount(6));
        assert_eq!(offsets(&told), [7, 8]);
        let whole = told.after(&follower, kept.counts().durable).expect("nothing is missing");
        assert_eq!(whole, kept.since(WriteCount(0)));
        // One that joined meanwhile has some of them already.
        let joined = told.after(&whole, kept.counts().durable).expect("nothing is missing");
        assert_eq!(joined, whole);
        // All that was told is covered by a flush that came since.
        let none = told.after(&follower, WriteCount(8)).expect("nothing is missing");
        assert_eq!(none, CompletedWrites::none_after(WriteCount(8)));
    }

    #[test]
    fn a_gap_is_noticed() {
        let mut kept = kept();
        (1..=6).for_each(|offset| kept.add(offset, vec![0]));
        let told = kept.since(WriteCount(4));
        let older = CompletedWrites::none_after(WriteCount(0));
        assert_eq!(told.after(&older, WriteCount(2)), None);
        let mut counts = kept.counts();
        counts.bytes += 1;
        let mut restored = Kept::counted(counts, KeepLimit::for_disks(1));
        assert!(restored.restore(&kept.since(WriteCount(0)), |_| true).is_err());
        let mut restored = Kept::counted(kept.counts(), KeepLimit::for_disks(1));
        assert!(restored.restore(&told, |_| true).is_err());
        restored.restore(&kept.since(WriteCount(0)), |_| true).expect("the kept ones");
        assert_eq!(restored, kept);
    }

    #[test]
    fn writes_are_bytes_in_every_encoding() {
        let write = CompletedWrite { offset: 5, data: Arc::new(vec![1, 2, 255]) };
        let packed = postcard::to_stdvec(&write).expect("encodes");
        assert_eq!(packed, [5, 3, 1, 2, 255]);
        assert_eq!(postcard::from_bytes::<CompletedWrite>(&packed).expect("decodes"), write);
        let json = serde_json::to_vec(&write).expect("encodes");
        assert_eq!(serde_json::from_slice::<CompletedWrite>(&json).expect("decodes"), write);
    }
}
