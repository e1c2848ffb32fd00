//! The dictionaries that an `.xz` stream asks for, found before it is unpacked
//! (`doc/xz-file-format.txt` of XZ Utils): the decoder takes their memory at once, up to 4 GiB,
//! whatever comes out in the end.

/// What a block header says of the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    /// Bytes of the largest dictionary.
    dictionary: u64,
    /// Bytes of the header.
    len: usize,
}

/// LZMA2's number among filters; its one byte of properties is the size of the dictionary.
const LZMA2: u64 = 0x21;

/// True if no block of the stream asks for more than `limit` bytes. Where it is damaged, the decoder says so
/// before it comes to what is behind.
pub(super) fn dictionaries_are_within(stream: &[u8], limit: u64) -> bool {
    let Some(check) = stream.get(7).and_then(|kind| check_len(*kind)) else { return true };
    let mut at = 12;
    while let Some(block) = stream.get(at..).and_then(block) {
        if block.dictionary > limit {
            return false;
        }
        let Some(end) = end_of_chunks(stream, at + block.len) else { return true };
        // Chunks are padded to four bytes, headers are multiples of that, and so is the check.
        at = end.next_multiple_of(4) + check;
    }
    true
}

/// Bytes of the check behind each block, by its kind.
fn check_len(kind: u8) -> Option<usize> {
    match kind {
        0 => Some(0),
        1..=3 => Some(4),
        4..=6 => Some(8),
        7..=9 => Some(16),
        10..=12 => Some(32),
        13..=15 => Some(64),
        _ => None,
    }
}

/// The block that begins here; none at the index behind the last.
fn block(bytes: &[u8]) -> Option<Block> {
    let len = match *bytes.first()? {
        0 => return None,
        words => (usize::from(words) + 1) * 4,
    };
    let flags = *bytes.get(1)?;
    let mut rest = bytes.get(2..len)?;
    for present in [0x40, 0x80] {
        if flags & present != 0 {
            number(&mut rest)?;
        }
    }
    let mut dictionary = 0;
    for _ in 0..=flags & 3 {
        let (filter, properties) = (number(&mut rest)?, number(&mut rest)?);
        let (properties, behind) = rest.split_at_checked(usize::try_from(properties).ok()?)?;
        rest = behind;
        if filter == LZMA2 {
            dictionary = dictionary.max(size(*properties.first()?));
        }
    }
    Some(Block { dictionary, len })
}

/// A number of seven bits a byte, the lowest first.
fn number(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..63).step_by(7) {
        let (byte, behind) = rest.split_first()?;
        *rest = behind;
        number |= u64::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The size that a byte of properties stands for.
fn size(property: u8) -> u64 {
    match property & 0x3F {
        40 => u32::MAX.into(),
        bits @ 0..40 => u64::from(2 | bits & 1) << (bits / 2 + 11),
        _ => u64::MAX,
    }
}

/// Where the LZMA2 chunks from `at` on end.
fn end_of_chunks(stream: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let control = *stream.get(at)?;
        let word = |offset| {
            Some(usize::from(u16::from_be_bytes([
                *stream.get(at + offset)?,
                *stream.get(at + offset + 1)?,
            ])))
        };
        at += match control {
            0 => return Some(at + 1),
            // Not packed.
            1 | 2 => 3 + word(1)? + 1,
            3..0x80 => return None,
            // With new properties from 0xC0 on.
            _ => 5 + usize::from(control >= 0xC0) + word(3)? + 1,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::super::synthetic::{vmlinux, xz};
    use super::*;

    #[test]
    fn sizes_are_those_of_the_format() {
        assert_eq!([0, 1, 2, 3, 39, 40].map(size), [4096, 6144, 8192, 12288, 3 << 30, 0xFFFF_FFFF]);
        assert_eq!(size(41), u64::MAX);
    }

    #[test]
    fn the_dictionary_of_every_block_is_found() {
        let stream = xz(&vmlinux());
        let block = block(&stream[12..]).expect("a block");
        assert_eq!(block.dictionary, 1 << 20, "of preset 1");
        assert!(dictionaries_are_within(&stream, block.dictionary));
        assert!(!dictionaries_are_within(&stream, block.dictionary - 1));
        // A second block behind the first.
        let check = check_len(stream[7]).expect("a kind of check");
        let end =
            end_of_chunks(&stream, 12 + block.len).expect("whole").next_multiple_of(4) + check;
        assert_eq!(stream[end], 0, "the index");
        let mut two = [&stream[..end], &stream[12..]].concat();
        assert!(dictionaries_are_within(&two, block.dictionary));
        let property =
            two[end..].windows(3).position(|three| three[..2] == [0x21, 1]).expect("LZMA2");
        two[end + property + 2] = 40;
        assert!(!dictionaries_are_within(&two, block.dictionary));
        for cut in 0..stream.len() {
            dictionaries_are_within(&stream[..cut], 0);
        }
    }
}
