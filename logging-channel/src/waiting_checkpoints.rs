//! Which checkpoints wait whole among the entries a backup has received.
//!
//! A checkpoint stands for everything before it, so a backup that is far behind may go to it at once, if
//! its state is one that the checkpoint can be laid over. That, the fixed part says; what it means is the
//! machine's.

use std::collections::VecDeque;
use vmft_log::checkpoint::{CheckpointPiece, MemoryBase, PieceKind};
use vmft_log::entry::{Entry, EntrySequence};

/// The longest fixed part of a checkpoint that is offered, in bytes: it names a place, and no machine.
const MAX_FIXED: usize = 64;

/// A checkpoint whose pieces come in.
#[derive(Debug)]
struct Begun {
    first: EntrySequence,
    fixed_len: usize,
    fixed: Option<Vec<u8>>,
}

/// A checkpoint that is there from its first piece to its last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WaitingCheckpoint {
    /// The entry with its first piece.
    pub(crate) first: EntrySequence,
    /// Its fixed part.
    pub(crate) fixed: Vec<u8>,
}

/// The checkpoints that wait, in the order of the log.
#[derive(Debug, Default)]
pub(crate) struct WaitingCheckpoints {
    begun: Option<Begun>,
    whole: VecDeque<WaitingCheckpoint>,
}

impl WaitingCheckpoints {
    /// The next entry of the log has come.
    pub(crate) fn add(&mut self, sequence: EntrySequence, entry: &Entry) {
        let Entry::CheckpointPart { piece, bytes } = entry else { return };
        match (piece, &mut self.begun) {
            (PieceKind::Header, begun) => *begun = begin(sequence, bytes),
            (PieceKind::State, Some(begun)) if begun.fixed.is_none() => {
                if bytes.len() == begun.fixed_len {
                    begun.fixed = Some(bytes.clone());
                } else {
                    self.begun = None;
                }
            }
            (PieceKind::State | PieceKind::Pages, _) => {}
            (PieceKind::End, begun) => {
                let whole = begun.take().and_then(|Begun { first, fixed, .. }| {
                    fixed.map(|fixed| WaitingCheckpoint { first, fixed })
                });
                self.whole.extend(whole);
            }
        }
    }

    /// The first whole one that begins after `delivered`.
    pub(crate) fn after(&mut self, delivered: EntrySequence) -> Option<&WaitingCheckpoint> {
        while self.whole.front().is_some_and(|checkpoint| checkpoint.first <= delivered) {
            self.whole.pop_front();
        }
        self.whole.front()
    }
}

/// One with a fixed part that may be offered.
fn begin(first: EntrySequence, header: &[u8]) -> Option<Begun> {
    let Ok(CheckpointPiece::Header(header)) = CheckpointPiece::decode(PieceKind::Header, header)
    else {
        return None;
    };
    let fixed_len = usize::try_from(header.fixed_len).ok()?;
    let is_offered = header.base == MemoryBase::Earlier && (1..=MAX_FIXED).contains(&fixed_len);
    is_offered.then_some(Begun { first, fixed_len, fixed: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_log::checkpoint::{CheckpointWriter, PageEncoder, PageNumber};
    use vmft_log::entry::{LogPosition, OutputSequence};
    use vmft_log::point::ExecutionPoint;

    /// The entries of a checkpoint without pages.
    fn checkpoint(base: MemoryBase, fixed: &[u8]) -> Vec<Entry> {
        let encoder = PageEncoder::for_earlier(0);
        let (writer, mut pieces) =
            CheckpointWriter::begin(base, PageNumber(16), fixed, encoder).expect("small");
        let position = LogPosition::start_of_log(ExecutionPoint::new(7));
        pieces.extend(writer.finish(position, b"the state").expect("small").0);
        let part = |piece: CheckpointPiece| Entry::CheckpointPart {
            piece: piece.kind(),
            bytes: piece.encode(Vec::new()),
        };
        pieces.into_iter().map(part).collect()
    }

    fn add_all(waiting: &mut WaitingCheckpoints, from: u64, entries: &[Entry]) {
        for (number, entry) in (from..).zip(entries) {
            waiting.add(EntrySequence(number), entry);
        }
    }

    #[test]
    fn a_checkpoint_is_offered_once_it_is_whole_and_until_it_is_taken() {
        let entries = checkpoint(MemoryBase::Earlier, b"from 3");
        let (last, most) = entries.split_last().expect("it has an end");
        let mut waiting = WaitingCheckpoints::default();
        add_all(&mut waiting, 5, most);
        assert_eq!(waiting.after(EntrySequence(0)), None);
        // A watermark may come between.
        waiting.add(EntrySequence(8), &Entry::Released { output: OutputSequence(1) });
        waiting.add(EntrySequence(9), last);
        let fixed = b"from 3".to_vec();
        let wanted = WaitingCheckpoint { first: EntrySequence(5), fixed };
        assert_eq!(waiting.after(EntrySequence(0)), Some(&wanted));
        assert_eq!(waiting.after(EntrySequence(4)), Some(&wanted));
        assert_eq!(waiting.after(EntrySequence(5)), None, "it has begun to be delivered");
    }

    #[test]
    fn checkpoints_are_offered_in_the_order_of_the_log() {
        let mut waiting = WaitingCheckpoints::default();
        add_all(&mut waiting, 1, &checkpoint(MemoryBase::Earlier, b"one"));
        add_all(&mut waiting, 11, &checkpoint(MemoryBase::Earlier, b"two"));
        let fixed = |waiting: &mut WaitingCheckpoints, delivered| {
            waiting.after(EntrySequence(delivered)).map(|checkpoint| checkpoint.fixed.clone())
        };
        assert_eq!(fixed(&mut waiting, 0), Some(b"one".to_vec()));
        assert_eq!(fixed(&mut waiting, 4), Some(b"two".to_vec()));
    }

    #[test]
    fn what_names_no_place_is_not_offered() {
        let mut waiting = WaitingCheckpoints::default();
        add_all(&mut waiting, 1, &checkpoint(MemoryBase::Earlier, b""));
        add_all(&mut waiting, 11, &checkpoint(MemoryBase::Earlier, &[1; MAX_FIXED + 1]));
        add_all(&mut waiting, 21, &checkpoint(MemoryBase::Zeroes, b"whole"));
        // One that is cut, and one without a beginning.
        let entries = checkpoint(MemoryBase::Earlier, b"cut");
        add_all(&mut waiting, 31, &entries[..1]);
        add_all(&mut waiting, 41, &entries[3..]);
        add_all(&mut waiting, 51, &entries[1..]);
        assert_eq!(waiting.after(EntrySequence(0)), None);
    }
}
