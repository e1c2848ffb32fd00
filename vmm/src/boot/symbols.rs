//! The names of a running Linux kernel's variables, from the table that the kernel has of them in its own
//! memory (`kernel/kallsyms.c`, as `scripts/kallsyms.c` of Linux 5.18 to 6.1 lays it out).
//!
//! ```text
//! offsets i32 × n │ relative base u64 │ n u32 │ names │ markers u32 │ token table │ token index u16 × 256
//! ```
//! Each but the base begins at a multiple of 8. A name is a length (one byte, or two for 128 and more) and so
//! many bytes, each of which stands for a token; a marker says where every 256th name begins. Nothing says where
//! the tables are: they are found by the tokens of the digits, which stand for themselves, and believed
//! because index and markers say twice what is there.
//!
//! A guest's memory is as hostile as the guest: everything is looked up within bounds, and searching ends
//! after a bounded number of steps.

use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::GuestRam;

/// Where kernels are searched for: where Debian's and most others are linked to run, and behind it.
const KERNEL_START: u64 = 16 << 20;
const KERNEL_SPAN: u64 = 64 << 20;
/// What the kernel's own mapping adds to a physical address, if it runs where it was linked.
const KERNEL_MAP: u64 = 0xFFFF_FFFF_8000_0000;
/// The names of a kernel take less.
const NAMES_SPAN: usize = 8 << 20;
const SYMBOLS: std::ops::Range<usize> = 1_000..2_000_000;
const TOKENS: usize = 256;
const LONGEST_TOKEN: usize = 64;
const NAMES_A_MARKER: usize = 256;
/// Names that are walked over in search of the tables before it is given up.
const MOST_STEPS: usize = 50_000_000;

/// A variable or function of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Symbol {
    /// Where it is in guest memory.
    pub(crate) address: GuestAddress,
    /// Bytes up to the next one.
    pub(crate) size: u64,
}

/// The tables of one kernel, and the memory they are in.
#[derive(Debug)]
pub(crate) struct Symbols {
    memory: Vec<u8>,
    tokens: Vec<std::ops::Range<usize>>,
    /// Where the names begin, and how many there are.
    names: usize,
    count: usize,
}

fn word(memory: &[u8], at: usize) -> Option<u32> {
    let bytes = memory.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// The length of the name at `at`, and where its tokens begin.
fn name_length(memory: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*memory.get(at)?);
    let (length, begin) = match first {
        0 => return None,
        1..0x80 => (first, at + 1),
        _ => (first & 0x7F | usize::from(*memory.get(at + 1)?) << 7, at + 2),
    };
    Some((length, begin))
}

/// The tokens, if the table with the digits at `digits` is one.
fn tokens(memory: &[u8], digits: usize) -> Option<(usize, Vec<std::ops::Range<usize>>)> {
    let mut start = digits;
    for _ in 0..b'0' {
        // What ends here, and the zero behind the one before it.
        let from = start.checked_sub(LONGEST_TOKEN)?;
        let before = memory.get(from..start.checked_sub(1)?)?;
        start = from + before.iter().rposition(|byte| *byte == 0)? + 1;
    }
    let mut found = Vec::with_capacity(TOKENS);
    let mut at = start;
    for _ in 0..TOKENS {
        let length = memory.get(at..)?.iter().take(LONGEST_TOKEN).position(|byte| *byte == 0)?;
        found.push(at..at + length);
        at += length + 1;
    }
    let index = at.next_multiple_of(8);
    let agree = found.iter().enumerate().all(|(number, token)| {
        let entry = memory.get(index + 2 * number..index + 2 * number + 2);
        entry.is_some_and(|entry| {
            usize::from(u16::from_le_bytes([entry[0], entry[1]])) == token.start - start
        })
    });
    agree.then_some((start, found))
}

/// True if `count` names begin at `names`, end before `end`, and the markers behind them agree.
fn are_names(
    memory: &[u8],
    names: usize,
    count: usize,
    end: usize,
    steps: &mut usize,
) -> Option<()> {
    let mut markers = Vec::with_capacity(count / NAMES_A_MARKER + 1);
    let mut at = names;
    for number in 0..count {
        *steps = steps.checked_sub(1)?;
        if number.is_multiple_of(NAMES_A_MARKER) {
            markers.push(at - names);
        }
        let (length, begin) = name_length(memory, at)?;
        at = begin + length;
        if at > end {
            return None;
        }
    }
    let table = at.next_multiple_of(8);
    let mut markers = markers.into_iter().enumerate();
    let agree = markers.all(|(number, offset)| {
        word(memory, table + 4 * number).is_some_and(|marker| marker as usize == offset)
    });
    agree.then_some(())
}

impl Symbols {
    /// The tables of the kernel that runs in `ram`, where it was linked to run; `None` if there are none.
    pub(crate) fn find(ram: &GuestRam) -> Option<Self> {
        let (_, low) = *ram.ranges().first()?;
        let span = low.checked_sub(KERNEL_START)?.min(KERNEL_SPAN);
        let mut memory = vec![0; usize::try_from(span).ok()?];
        ram.memory().read_slice(&mut memory, GuestAddress(KERNEL_START)).ok()?;
        Self::find_in(memory)
    }

    fn find_in(memory: Vec<u8>) -> Option<Self> {
        let digits: Vec<u8> = (b'0'..=b'9').flat_map(|digit| [digit, 0]).collect();
        let places = memory.windows(digits.len()).enumerate();
        let mut places = places.filter(|(_, at)| at[0] == b'0' && *at == digits).map(|(at, _)| at);
        let (table, tokens) = places.find_map(|at| tokens(&memory, at))?;
        let mut steps = MOST_STEPS;
        let last = (table & !7).checked_sub(8)?;
        let first = last.saturating_sub(NAMES_SPAN);
        for at in (first..=last).rev().step_by(8) {
            let (Some(count), Some(0)) = (word(&memory, at), word(&memory, at + 4)) else {
                continue;
            };
            let count = count as usize;
            if SYMBOLS.contains(&count)
                && are_names(&memory, at + 8, count, table, &mut steps).is_some()
            {
                return Some(Self { memory, tokens, names: at + 8, count });
            }
            if steps == 0 {
                return None;
            }
        }
        None
    }

    /// Where the symbol with that number in the table is, as the kernel's own mapping has it.
    fn address(&self, number: usize) -> Option<u64> {
        let base_at = self.names.checked_sub(16)?;
        let offsets = base_at.checked_sub((4 * self.count).next_multiple_of(8))?;
        let base = self.memory.get(base_at..base_at + 8)?;
        let base = u64::from_le_bytes(base.try_into().ok()?);
        let offset = word(&self.memory, offsets + 4 * number)?.cast_signed();
        match u64::try_from(offset) {
            // One of each CPU's.
            Ok(absolute) => Some(absolute),
            Err(_) => base.checked_add(u64::from(offset.unsigned_abs()))?.checked_sub(1),
        }
    }

    /// True if the tokens of the name at `at` spell `wanted`, behind the letter of its kind.
    fn spells(&self, begin: usize, length: usize, wanted: &[u8]) -> bool {
        let Some(tokens) = self.memory.get(begin..begin + length) else { return false };
        let parts = tokens.iter().map(|token| &self.tokens[usize::from(*token)]);
        let text = parts.flat_map(|part| &self.memory[part.clone()]);
        text.skip(1).eq(wanted)
    }

    /// The one symbol called `name`; `None` if there are none or several, or it is no part of the kernel's
    /// image.
    pub(crate) fn get(&self, name: &str) -> Option<Symbol> {
        let mut at = self.names;
        let mut found = None;
        for number in 0..self.count {
            let (length, begin) = name_length(&self.memory, at)?;
            if self.spells(begin, length, name.as_bytes()) && found.replace(number).is_some() {
                return None;
            }
            at = begin + length;
        }
        let address = self.address(found?)?;
        let others = (0..self.count).filter_map(|number| self.address(number));
        let next = others.filter(|other| *other > address).min()?;
        let physical = address.checked_sub(KERNEL_MAP)?;
        Some(Symbol { address: GuestAddress(physical), size: next - address })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use vmft_cpu::memory::MIN_MEMORY;

    /// Names with their addresses, in the order of addresses, laid out as a kernel has them. Each letter is a token, and one
    /// token is a whole word.
    pub(crate) fn tables(symbols: &[(&str, u64)]) -> Vec<u8> {
        const WORD: &str = "crng";
        let base = symbols[0].1;
        let mut out = Vec::new();
        let pad = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(8), 0);
        for (_, address) in symbols {
            let offset = -1 - i32::try_from(address - base).expect("near");
            out.extend(offset.to_le_bytes());
        }
        pad(&mut out);
        out.extend(base.to_le_bytes());
        out.extend((symbols.len() as u64).to_le_bytes());
        let (mut names, mut markers) = (Vec::new(), Vec::new());
        for (number, (name, _)) in symbols.iter().enumerate() {
            if number % NAMES_A_MARKER == 0 {
                markers.extend((names.len() as u32).to_le_bytes());
            }
            let coded = format!("b{name}").replace(WORD, "\u{1}").into_bytes();
            match coded.len() {
                length @ 0..0x80 => names.push(length as u8),
                length => names.extend([length as u8 & 0x7F | 0x80, (length >> 7) as u8]),
            }
            names.extend(coded);
        }
        out.extend(names);
        pad(&mut out);
        out.extend(markers);
        pad(&mut out);
        let start = out.len();
        let mut index = Vec::new();
        for token in 0..=255u8 {
            index.extend(((out.len() - start) as u16).to_le_bytes());
            match token {
                1 => out.extend(WORD.bytes()),
                b'!'..=b'~' => out.push(token),
                // Unused.
                _ => out.extend(b"??"),
            }
            out.push(0);
        }
        pad(&mut out);
        out.extend(index);
        out
    }

    /// A thousand uninteresting names around some.
    pub(crate) fn kernel(some: &[(&'static str, u64)]) -> Vec<(&'static str, u64)> {
        let first = KERNEL_MAP + KERNEL_START;
        let more = (0..1_200u64).map(|number| ("uninteresting_variable", first + number * 64));
        let mut all: Vec<_> = more.chain(some.iter().copied()).collect();
        all.sort_by_key(|(_, address)| *address);
        all
    }

    fn found(memory: Vec<u8>) -> Option<Symbols> {
        Symbols::find_in(memory)
    }

    #[test]
    fn a_variable_is_found_by_its_name_with_its_address_and_size() {
        let at = KERNEL_MAP + (20 << 20);
        let long: &'static str = Box::leak("long_".repeat(40).into_boxed_str());
        let names =
            kernel(&[("base_crng", at), ("crng_init", at + 56), (long, at + 64), ("end", at + 90)]);
        let mut memory = vec![0xFF; 4096];
        memory.extend(tables(&names));
        memory.resize(memory.len() + 4096, 0);
        let ram = GuestRam::new(MIN_MEMORY).expect("memory");
        ram.memory().write_slice(&memory, GuestAddress(KERNEL_START + 8192)).expect("in range");
        let symbols = Symbols::find(&ram).expect("tables");
        let symbol =
            |address: u64, size| Some(Symbol { address: GuestAddress(address - KERNEL_MAP), size });
        assert_eq!(symbols.get("base_crng"), symbol(at, 56));
        assert_eq!(symbols.get("crng_init"), symbol(at + 56, 8));
        assert_eq!(symbols.get(long), symbol(at + 64, 26));
        assert_eq!(symbols.get("base"), None);
        assert_eq!(symbols.get("end"), None, "the last has no size");
        assert_eq!(symbols.get("uninteresting_variable"), None, "which one?");
    }

    #[test]
    fn damaged_tables_are_no_tables_or_tell_nothing_and_never_panic() {
        let at = KERNEL_MAP + (20 << 20);
        let whole = tables(&kernel(&[("base_crng", at), ("end", at + 56)]));
        for length in (0..whole.len()).step_by(97) {
            if let Some(symbols) = found(whole[..length].to_vec()) {
                symbols.get("base_crng");
            }
        }
        let mut state = 0x2010_u64;
        for _ in 0..64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let mut damaged = whole.clone();
            let place = (state >> 16) as usize % damaged.len();
            damaged[place] ^= (state >> 8) as u8 | 1;
            if let Some(symbols) = found(damaged) {
                symbols.get("base_crng");
            }
        }
    }
}
