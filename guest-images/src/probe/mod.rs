//! The probe guest: a kernel of a few hundred bytes that runs on every engine.
//!
//! It prints numbered lines as the demo does, computes before each and waits for the timer after
//! it, and switches itself off. A note in its image vouches for it: it looks at nothing that differs
//! from host to host, so it can be followed on an engine that cannot hide such things.

#[expect(unsafe_code, reason = "the program is assembled into this crate and found by its symbols")]
mod code;

use std::num::NonZeroU32;
use vmft_kernel_gate::{VOUCHER_LEVEL_ZERO, VOUCHER_LOCKSTEP, VOUCHER_NAME};

/// Where it is loaded and entered.
const BASE: u64 = 0x10_0000;
/// Bytes of memory it takes for itself.
const MEMORY_SIZE: u64 = 0x4_0000;
/// Timer ticks a second.
const TICKS_PER_SECOND: u32 = 100;
/// Types of the notes: it can be followed, and it never leaves privilege level 0.
const VOUCHERS: [u32; 2] = [VOUCHER_LOCKSTEP, VOUCHER_LEVEL_ZERO];
/// Where the program begins in the file.
const PROGRAM_OFFSET: u64 = 0x100;

/// What a probe guest is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeGuest {
    /// Numbered lines to print, from 1 on.
    pub lines: NonZeroU32,
    /// Timer ticks, of 10 ms each, to wait between two lines.
    pub ticks: u32,
    /// Rounds of computing before each line, of eight instructions each.
    pub rounds: NonZeroU32,
    /// After these lines it computes and waits as between two lines, and prints nothing, until it
    /// finds a byte at the serial port: however long something takes that a guest has to live
    /// through.
    pub hold: [Option<NonZeroU32>; 2],
}

impl Default for ProbeGuest {
    fn default() -> Self {
        Self {
            lines: const { NonZeroU32::new(60).expect("not zero") },
            ticks: 10,
            rounds: const { NonZeroU32::new(1_000).expect("not zero") },
            hold: [None; 2],
        }
    }
}

impl ProbeGuest {
    /// One that waits about `ms` milliseconds between two lines.
    #[must_use]
    pub fn with_pause(self, ms: u32) -> Self {
        Self { ticks: ms.div_ceil(1_000 / TICKS_PER_SECOND), ..self }
    }

    /// One that prints soon and often, and does not wait.
    #[must_use]
    pub const fn busy() -> Self {
        Self {
            lines: NonZeroU32::new(10_000).expect("not zero"),
            ticks: 0,
            rounds: NonZeroU32::new(20).expect("not zero"),
            hold: [None; 2],
        }
    }

    /// The kernel file: an ELF executable of one segment, and the notes.
    pub fn image(&self) -> Vec<u8> {
        let program = code::program(self);
        let notes = notes();
        let mut file = header();
        // To be loaded: readable, writable, executable.
        file.extend([1u32, 7].iter().flat_map(|word| word.to_le_bytes()));
        let len = program.len() as u64;
        put(&mut file, &[PROGRAM_OFFSET, BASE, BASE, len, MEMORY_SIZE, 0x1000]);
        // The notes: readable.
        file.extend([4u32, 4].iter().flat_map(|word| word.to_le_bytes()));
        let (at, len) = (64 + 2 * 56, notes.len() as u64);
        put(&mut file, &[at, 0, 0, len, len, 4]);
        file.extend(notes);
        file.resize(PROGRAM_OFFSET as usize, 0);
        file.extend(program);
        file
    }
}

fn put(file: &mut Vec<u8>, words: &[u64]) {
    file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

/// The ELF header of an x86-64 executable with two program headers and no sections.
fn header() -> Vec<u8> {
    let mut file = vec![0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    put(&mut file, &[BASE, 64, 0]);
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    file
}

/// The notes: lengths of name and contents, type, name padded to four bytes, no contents.
fn notes() -> Vec<u8> {
    let name = [VOUCHER_NAME, b"\0"].concat();
    let len = u32::try_from(name.len()).expect("five");
    let mut notes = Vec::new();
    for kind in VOUCHERS {
        notes.extend([len, 0, kind].iter().flat_map(|word| word.to_le_bytes()));
        notes.extend(&name);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_holds_what_it_is_to_do_and_fits_below_its_tables() {
        let guest = ProbeGuest {
            lines: NonZeroU32::new(0x0102_0304).expect("not zero"),
            hold: [NonZeroU32::new(7), None],
            ..Default::default()
        };
        let image = guest.image();
        assert!(image.len() < 0x8000 + PROGRAM_OFFSET as usize);
        let tail: Vec<u8> = [0x0102_0304, 10, 1_000, 7, u32::MAX]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        assert!(image.ends_with(&tail));
    }

    #[test]
    fn the_image_passes_the_gate() {
        vmft_kernel_gate::examine(&ProbeGuest::default().image()).unwrap();
    }

    #[test]
    fn a_pause_is_a_whole_number_of_ticks_and_not_shorter() {
        let ticks = |ms| ProbeGuest::default().with_pause(ms).ticks;
        assert_eq!([ticks(0), ticks(1), ticks(10), ticks(101)], [0, 1, 1, 11]);
    }
}
