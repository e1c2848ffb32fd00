//! Exit records in the log: encoding, decoding, comparing.
//!
//! ```text
//! exits  = exit × n
//! exit   = reason u8 · width u8 · changed varint · word varint × (bits set in changed)
//! ```
//! The words of an exit are its address, its data, its branches and its registers; only those that differ
//! from the exit before (in the same entry; zeros before the first) are written, as the exclusive
//! or of both. So an exit takes a few dozen bytes, and a comparison names every register.

use std::fmt;
use vmft_cpu::{ExitReason, ExitRecord};
use vmft_log::point::Branches;

/// Words of a record: address, data, branches, registers.
const WORDS: usize = 21;
/// The shortest encoding: nothing changed.
const SHORTEST: usize = 3;
/// Longest varint in bytes.
const VARINT: usize = 10;
/// The longest encoding in bytes.
const LONGEST: usize = 2 + VARINT * (WORDS + 1);
/// Exits after which an entry is made of them.
pub(super) const EXITS_AN_ENTRY: usize = 32;

const REASONS: [ExitReason; 6] = [
    ExitReason::Halt,
    ExitReason::Register,
    ExitReason::PortRead,
    ExitReason::PortWrite,
    ExitReason::DeviceRead,
    ExitReason::DeviceWrite,
];

fn words(record: &ExitRecord) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    words[0] = record.address;
    words[1] = record.data;
    words[2] = record.branches.0;
    words[3..].copy_from_slice(&record.registers);
    words
}

/// Exits on their way into one entry.
#[derive(Debug, Default)]
pub(super) struct ExitEncoder {
    bytes: Vec<u8>,
    last: [u64; WORDS],
    count: usize,
}

impl ExitEncoder {
    pub(super) fn push(&mut self, record: &ExitRecord) {
        let now = words(record);
        let reason = REASONS.iter().position(|reason| *reason == record.reason);
        self.bytes.push(reason.expect("every reason is in the table") as u8);
        self.bytes.push(record.width);
        let changes = now.iter().zip(&self.last).map(|(now, last)| now ^ last);
        let changed = changes.clone().enumerate().filter(|(_, change)| *change != 0);
        let mask = changed.clone().fold(0, |mask, (index, _)| mask | 1 << index);
        put_varint(&mut self.bytes, mask);
        for (_, change) in changed {
            put_varint(&mut self.bytes, change);
        }
        self.last = now;
        self.count += 1;
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// True if one more exit could make the entry too large.
    pub(super) fn is_full(&self) -> bool {
        self.count >= EXITS_AN_ENTRY || self.bytes.len() + LONGEST > vmft_log::entry::MAX_EXITS
    }

    /// The exits of one entry; begins the next.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(self).bytes
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Bytes that no encoder makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    fn byte(&mut self) -> Result<u8, Malformed> {
        self.0.next().copied().ok_or(Malformed)
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0_u64;
        for index in 0..VARINT {
            let byte = self.byte()?;
            let part = u64::from(byte & 0x7F);
            let shifted = part << (7 * index);
            if shifted >> (7 * index) != part || (byte == 0 && index > 0) {
                return Err(Malformed);
            }
            value |= shifted;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed)
    }
}

/// The exits of an entry.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<ExitRecord>, Malformed> {
    let mut records = Vec::with_capacity(bytes.len() / SHORTEST);
    let mut last = [0; WORDS];
    let mut bytes = Bytes(bytes.iter());
    while bytes.0.len() > 0 {
        let reason = *REASONS.get(usize::from(bytes.byte()?)).ok_or(Malformed)?;
        let width = bytes.byte()?;
        let mask = bytes.varint()?;
        if mask >> WORDS != 0 {
            return Err(Malformed);
        }
        for (index, word) in last.iter_mut().enumerate() {
            if mask & 1 << index != 0 {
                let change = bytes.varint()?;
                if change == 0 {
                    return Err(Malformed);
                }
                *word ^= change;
            }
        }
        let mut registers = [0; 18];
        registers.copy_from_slice(&last[3..]);
        let [address, data, branches, ..] = last;
        let branches = Branches(branches);
        records.push(ExitRecord { reason, width, address, data, branches, registers });
    }
    Ok(records)
}

/// The first exit at which the two sides differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitDifference {
    /// Its place among the exits compared with it, from 0.
    pub index: usize,
    /// What the log says; `None` if the guest had no exit there.
    pub logged: Option<ExitRecord>,
    /// What this side has; `None` if the guest had no exit there.
    pub replayed: Option<ExitRecord>,
    /// The exit before, at which both agree; `None` at the beginning of a comparison.
    pub before: Option<ExitRecord>,
}

/// The first difference.
pub(super) fn first_difference(
    logged: &[ExitRecord],
    replayed: &[ExitRecord],
) -> Option<Box<ExitDifference>> {
    let same = logged.iter().zip(replayed).take_while(|(logged, replayed)| logged == replayed);
    let index = same.count();
    let (there, here) = (logged.get(index).copied(), replayed.get(index).copied());
    if there.is_none() && here.is_none() {
        return None;
    }
    let before = index.checked_sub(1).map(|before| logged[before]);
    Some(Box::new(ExitDifference { index, logged: there, replayed: here, before }))
}

/// An exit in a few words.
struct Told<'a>(&'a ExitRecord);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ExitRecord { reason, width, address, data, registers, .. } = self.0;
        let what = match reason {
            ExitReason::Halt => return write!(f, "HLT before {:#x}", registers[16]),
            ExitReason::Register => {
                return write!(f, "register {:#x} at {:#x}", registers[1] as u32, registers[16]);
            }
            ExitReason::PortRead => "read port",
            ExitReason::PortWrite => "wrote port",
            ExitReason::DeviceRead => "read device",
            ExitReason::DeviceWrite => "wrote device",
        };
        write!(f, "{what} {address:#x}, {width} bytes {data:#x}, at {:#x}", registers[16])
    }
}

impl fmt::Display for ExitDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit {} of the last ones: ", self.index + 1)?;
        match (&self.replayed, &self.logged) {
            (Some(here), Some(log)) => {
                if (here.reason, here.width, here.address, here.data)
                    == (log.reason, log.width, log.address, log.data)
                {
                    write!(f, "both sides {}", Told(here))?;
                } else {
                    write!(f, "this side {}, logged: {}", Told(here), Told(log))?;
                }
                if here.branches != log.branches {
                    let (here, log) = (here.branches, log.branches);
                    write!(f, "; branches is {here}, logged {log}")?;
                }
                for (index, name) in super::replaying::REGISTER_NAMES.iter().enumerate() {
                    let (log, here) = (log.registers[index], here.registers[index]);
                    if log != here {
                        write!(f, "; {name} is {here:#x}, logged {log:#x}")?;
                    }
                }
            }
            (Some(here), None) => write!(f, "this side {}, logged none", Told(here))?,
            (None, Some(log)) => write!(f, "this side had none, logged: {}", Told(log))?,
            (None, None) => write!(f, "none")?,
        }
        match &self.before {
            Some(before) => write!(f, "; the one before: {}", Told(before)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_record() -> impl Strategy<Value = ExitRecord> {
        let word = prop_oneof![Just(0), 0..300_u64, any::<u64>()];
        let words = proptest::collection::vec(word, WORDS);
        (0..REASONS.len(), any::<u8>(), words).prop_map(|(reason, width, words)| {
            let mut registers = [0; 18];
            registers.copy_from_slice(&words[3..]);
            let (address, data, branches) = (words[0], words[1], Branches(words[2]));
            ExitRecord { reason: REASONS[reason], width, address, data, branches, registers }
        })
    }

    fn encode(records: &[ExitRecord]) -> Vec<u8> {
        let mut encoder = ExitEncoder::default();
        records.iter().for_each(|record| encoder.push(record));
        assert_eq!(encoder.count(), records.len());
        encoder.take()
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 256,
            failure_persistence: None,
            rng_seed: proptest::test_runner::RngSeed::Fixed(2010),
            ..ProptestConfig::default()
        })]

        #[test]
        fn exits_come_back_and_fit_an_entry(records in proptest::collection::vec(any_record(), 0..32)) {
            let bytes = encode(&records);
            prop_assert!(bytes.len() <= records.len() * LONGEST);
            prop_assert_eq!(decode(&bytes), Ok(records));
        }

        #[test]
        fn random_bytes_are_refused_or_mean_themselves(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(records) = decode(&bytes) {
                prop_assert_eq!(encode(&records), bytes);
            }
        }

        #[test]
        fn any_changed_word_is_found_and_told(
            records in proptest::collection::vec(any_record(), 1..9),
            at in any::<prop::sample::Index>(), word in 0..WORDS, bit in 0..64,
        ) {
            let (index, mut other) = (at.index(records.len()), records.clone());
            let flip = 1_u64 << bit;
            match word {
                0 => other[index].address ^= flip,
                1 => other[index].data ^= flip,
                2 => other[index].branches.0 ^= flip,
                register => other[index].registers[register - 3] ^= flip,
            }
            let found = first_difference(&records, &other).expect("they differ");
            prop_assert_eq!(found.index, index);
            prop_assert_eq!(found.logged, Some(records[index]));
            prop_assert_eq!(found.replayed, Some(other[index]));
            prop_assert!(found.to_string().contains("logged"), "{}", found);
        }
    }

    #[test]
    fn an_exit_that_one_side_lacks_is_a_difference() {
        let record = ExitRecord::default();
        assert_eq!(first_difference(&[record], &[record]), None);
        let found = first_difference(&[record, record], &[record]).expect("one is missing");
        assert_eq!((found.index, found.replayed, found.before), (1, None, Some(record)));
        assert!(found.to_string().contains("had none"), "{found}");
        assert!(first_difference(&[record], &[record, record]).is_some());
    }

    #[test]
    fn an_exit_like_the_one_before_takes_three_bytes() {
        let record = ExitRecord { address: 0x80, registers: [7; 18], ..ExitRecord::default() };
        assert_eq!(encode(&[record; 5]).len(), encode(&[record]).len() + 4 * SHORTEST);
    }
}
