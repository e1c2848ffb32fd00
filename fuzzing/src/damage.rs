//! Good bytes gone bad.

use crate::Random;

/// Bytes that are often something's limit.
const CORNERS: &[u8] = &[0, 1, 0x7F, 0x80, 0xFE, 0xFF];

/// Something is wrong with `bytes` afterwards, most likely: bits, bytes, lengths, pieces that are
/// missing, come again, change places, or are one of `others`.
pub fn damage(random: &mut Random, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
    for _ in 0..=random.below(4) {
        let len = bytes.len();
        let at = random.index(len + 1);
        let end = at + random.index(len - at + 1);
        match random.below(10) {
            0 | 1 if len > 0 => bytes[random.index(len)] ^= 1 << random.below(8),
            2 | 3 if len > 0 => bytes[random.index(len)] = *random.pick(CORNERS),
            4 => bytes.truncate(at),
            // The largest integers there are, of all lengths, as varints and as plain ones.
            5 => {
                let most = std::iter::repeat_n(0xFF, random.index(10)).chain([1]);
                drop(bytes.splice(at..at, most));
            }
            6 => drop(bytes.splice(at..at, bytes[at..end].to_vec())),
            7 => drop(bytes.drain(at..end)),
            8 if !others.is_empty() => {
                let other = random.pick(others);
                let from = random.index(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            9 => bytes[at..].rotate_left(end - at),
            _ => bytes.extend((0..random.below(20)).map(|number| (number * 37) as u8)),
        }
    }
}
