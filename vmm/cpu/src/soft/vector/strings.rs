//! `PCMPESTRI`, `PCMPESTRM`, `PCMPISTRI`, `PCMPISTRM` (SDM volume 2, 4.1) and `CRC32`.

use super::VectorContext;
use super::lanes::Lanes;
use super::operands::{
    CARRY, OVERFLOW, SIGN, ZERO, destination, require_sse, source_general, source_unaligned,
};
use crate::soft::exception::Exception;
use iced_x86::{Instruction, Register};

/// What a comparison's result goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// ECX: the number of the first or last element found.
    Index,
    /// XMM0: a bit or element mask.
    Mask,
}

/// Where the lengths of the two strings come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lengths {
    /// The first zero element ends a string.
    Implicit,
    /// The magnitudes of EAX and EDX.
    Explicit32,
    /// The magnitudes of RAX and RDX.
    Explicit64,
}

/// The immediate byte of a string comparison.
#[derive(Debug, Clone, Copy)]
struct Mode(u8);

impl Mode {
    const fn words(self) -> bool {
        self.0 & 1 != 0
    }
    const fn signed(self) -> bool {
        self.0 & 2 != 0
    }
    const fn aggregation(self) -> u8 {
        self.0 >> 2 & 3
    }
    const fn negative(self) -> bool {
        self.0 & 0x10 != 0
    }
    const fn only_valid_negated(self) -> bool {
        self.0 & 0x20 != 0
    }
    const fn last_or_expanded(self) -> bool {
        self.0 & 0x40 != 0
    }
    const fn elements(self) -> usize {
        if self.words() { 8 } else { 16 }
    }

    /// Element `index` as a number that orders as the mode wants.
    fn element(self, value: u128, index: usize) -> i32 {
        match (self.words(), self.signed()) {
            (false, false) => i32::from(value.byte(index)),
            (false, true) => i32::from(value.byte(index) as i8),
            (true, false) => i32::from(value.word(index)),
            (true, true) => i32::from(value.word(index) as i16),
        }
    }
}

/// A string operand: its elements, and how many of them are valid.
#[derive(Debug, Clone, Copy)]
struct Text {
    elements: [i32; 16],
    length: usize,
}

impl Text {
    fn new(value: u128, mode: Mode, length: Option<u64>) -> Self {
        let count = mode.elements();
        let mut elements = [0; 16];
        for (i, element) in elements.iter_mut().enumerate().take(count) {
            *element = mode.element(value, i);
        }
        let length = match length {
            Some(length) => length.min(count as u64) as usize,
            None => elements[..count].iter().position(|&element| element == 0).unwrap_or(count),
        };
        Self { elements, length }
    }

    fn valid(&self) -> &[i32] {
        &self.elements[..self.length]
    }
}

/// IntRes1, before polarity: bit `j` for element `j` of `b`.
fn aggregate(a: &Text, b: &Text, mode: Mode) -> u32 {
    let count = mode.elements();
    let bit = |j: usize| match mode.aggregation() {
        // Equal any: a set of elements.
        0 => j < b.length && a.valid().contains(&b.elements[j]),
        // Ranges: pairs of bounds.
        1 => {
            j < b.length
                && a.valid()
                    .chunks_exact(2)
                    .any(|range| (range[0]..=range[1]).contains(&b.elements[j]))
        }
        // Equal each: the strings side by side; both ended counts as equal.
        2 => match (j < a.length, j < b.length) {
            (true, true) => a.elements[j] == b.elements[j],
            (a_valid, b_valid) => a_valid == b_valid,
        },
        // Equal ordered: `a` begins here, as far as the register reaches.
        _ => (0..a.length.min(count - j))
            .all(|i| i + j < b.length && a.elements[i] == b.elements[i + j]),
    };
    (0..count).fold(0, |bits, j| bits | u32::from(bit(j)) << j)
}

/// IntRes2.
fn with_polarity(bits: u32, b: &Text, mode: Mode) -> u32 {
    let all = (1_u32 << mode.elements()) - 1;
    match (mode.negative(), mode.only_valid_negated()) {
        (false, _) => bits,
        (true, false) => bits ^ all,
        (true, true) => bits ^ ((1_u32 << b.length) - 1),
    }
}

/// The magnitude of a length register.
fn explicit_length<C: VectorContext>(
    cpu: &C,
    lengths: Lengths,
    short: Register,
    long: Register,
) -> Option<u64> {
    match lengths {
        Lengths::Implicit => None,
        Lengths::Explicit32 => Some(u64::from((cpu.general(short) as i32).unsigned_abs())),
        Lengths::Explicit64 => Some((cpu.general(long) as i64).unsigned_abs()),
    }
}

/// A string comparison. Its memory operand needs no alignment.
pub(super) fn compare<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    lengths: Lengths,
    result: Target,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let mode = Mode(instruction.immediate8());
    let second = source_unaligned(cpu, instruction)?;
    let first = destination(cpu, instruction);
    let a = Text::new(first, mode, explicit_length(cpu, lengths, Register::EAX, Register::RAX));
    let b = Text::new(second, mode, explicit_length(cpu, lengths, Register::EDX, Register::RDX));
    let count = mode.elements();
    let bits = with_polarity(aggregate(&a, &b, mode), &b, mode);
    match result {
        Target::Index => {
            let index = match (bits, mode.last_or_expanded()) {
                (0, _) => count as u32,
                (bits, false) => bits.trailing_zeros(),
                (bits, true) => bits.ilog2(),
            };
            cpu.set_general(Register::ECX, u64::from(index));
        }
        Target::Mask => cpu.sse().registers[0] = mask(bits, mode),
    }
    let flag = |set, bit| if set { bit } else { 0 };
    cpu.set_arithmetic_flags(
        flag(bits != 0, CARRY)
            | flag(b.length < count, ZERO)
            | flag(a.length < count, SIGN)
            | flag(bits & 1 != 0, OVERFLOW),
    );
    Ok(())
}

/// XMM0 for a mask result.
fn mask(bits: u32, mode: Mode) -> u128 {
    match (mode.last_or_expanded(), mode.words()) {
        (false, _) => u128::from(bits),
        (true, false) => u128::from_bytes(|i| if bits >> i & 1 != 0 { u8::MAX } else { 0 }),
        (true, true) => u128::from_words(|i| if bits >> i & 1 != 0 { u16::MAX } else { 0 }),
    }
}

/// CRC-32C of every byte value: the polynomial 0x11EDC6F41, reflected.
const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82F6_3B78 } else { 0 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// `CRC32` of a source of `BYTES` bytes; it uses no vector state and needs no SSE.
pub(super) fn crc32<const BYTES: usize, C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    let data = source_general::<BYTES, C>(cpu, instruction)?.to_le_bytes();
    let start = cpu.general(instruction.op0_register()) as u32;
    let crc = data[..BYTES]
        .iter()
        .fold(start, |crc, &byte| crc >> 8 ^ CRC_TABLE[usize::from(crc as u8 ^ byte)]);
    cpu.set_general(instruction.op0_register(), u64::from(crc));
    Ok(())
}
