//! What is left of many writes when each has replaced what it overlaps.

use crate::devices::virtio::block::completed::CompletedWrite;
use std::collections::{BTreeMap, VecDeque};

/// Bytes of one transfer: neighbours are put together up to this.
const TRANSFER: usize = 1 << 20;

/// The content that `writes` have left, oldest first, without gaps or overlaps inside a piece: so it is
/// written in large transfers, and in any order.
pub(super) fn newest(writes: &VecDeque<CompletedWrite>) -> Vec<(u64, Vec<u8>)> {
    let mut pieces: BTreeMap<u64, &[u8]> = BTreeMap::new();
    for CompletedWrite { offset: start, data } in writes {
        let end = start + data.len() as u64;
        cut_before(&mut pieces, *start);
        cut_before(&mut pieces, end);
        let covered: Vec<u64> = pieces.range(start..&end).map(|(at, _)| *at).collect();
        for at in covered {
            pieces.remove(&at);
        }
        pieces.insert(*start, data);
    }
    let mut transfers: Vec<(u64, Vec<u8>)> = Vec::new();
    for (at, piece) in pieces {
        match transfers.last_mut() {
            Some((start, data))
                if *start + data.len() as u64 == at && data.len() + piece.len() <= TRANSFER =>
            {
                data.extend(piece);
            }
            _ => transfers.push((at, piece.to_vec())),
        }
    }
    transfers
}

/// Cuts the piece that reaches across `place` in two there.
fn cut_before(pieces: &mut BTreeMap<u64, &[u8]>, place: u64) {
    if let Some((at, piece)) = pieces.range(..place).next_back().map(|(at, piece)| (*at, *piece))
        && let Some((front, back)) =
            usize::try_from(place - at).ok().and_then(|len| piece.split_at_checked(len))
        && !back.is_empty()
    {
        pieces.insert(at, front);
        pieces.insert(place, back);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn write(offset: u64, data: &[u8]) -> CompletedWrite {
        CompletedWrite { offset, data: Arc::new(data.to_vec()) }
    }

    #[test]
    fn a_later_write_replaces_what_it_overlaps_and_neighbours_become_one() {
        let writes = [
            write(0, b"aaaaaaaa"),
            write(2, b"bbb"),
            write(8, b"cc"),
            write(20, b"d"),
            write(4, b"ee"),
        ];
        let left = newest(&writes.into());
        assert_eq!(left, [(0, b"aabbeeaacc".to_vec()), (20, b"d".to_vec())]);
    }

    #[test]
    fn many_writes_leave_what_they_would_leave_on_a_disk() {
        let mut disk = vec![0u8; 4096];
        let mut writes = VecDeque::new();
        // A linear congruential generator: the same writes on every run.
        let mut seed = 1u32;
        let mut next = |below: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % below
        };
        for version in 1..=250u8 {
            let (offset, len) = (next(4000) as usize, 1 + next(96) as usize);
            disk[offset..offset + len].fill(version);
            writes.push_back(write(offset as u64, &vec![version; len]));
        }
        let mut again = vec![0u8; 4096];
        let left = newest(&writes);
        assert!(left.windows(2).all(|pair| pair[0].0 + pair[0].1.len() as u64 <= pair[1].0));
        for (offset, data) in left {
            again[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        }
        assert_eq!(again, disk);
    }

    #[test]
    fn a_transfer_has_a_limit() {
        let writes = (0..3).map(|number| write(number * TRANSFER as u64, &vec![1; TRANSFER]));
        assert_eq!(newest(&writes.collect()).len(), 3);
    }
}
