//! `LDMXCSR`, `STMXCSR`, `FXSAVE` and `FXRSTOR`.
//!
//! The images are those of current Intel CPUs: `FXSAVE` writes 416 bytes of the 512, the code
//! and data selectors are zero (CPUID.7.EBX bit 13), the mask of MXCSR bits is 0xFFFF.

use super::operands::{CR0_EM, CR0_TS, aligned_address, memory, require_sse, set_memory};
use super::{VectorContext, x87};
use crate::soft::exception::Exception;
use crate::state::{SseState, X87State};
use iced_x86::{CodeSize, Instruction};

/// The bits of MXCSR that exist.
const MXCSR_MASK: u32 = 0xFFFF;
/// Bytes that `FXSAVE` writes.
const SAVED: usize = 416;
/// Bytes of the whole area.
const AREA: usize = 512;
const MXCSR_OFFSET: usize = 24;
const X87_OFFSET: usize = 32;
const XMM_OFFSET: usize = 160;

/// How wide the instruction and data pointers of an image are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pointers {
    /// 32 bits, each with a selector (`FXSAVE`).
    Narrow,
    /// 64 bits (`FXSAVE64`).
    Wide,
}

/// `LDMXCSR`; `#GP(0)` for a reserved bit.
pub(super) fn load_mxcsr<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = memory::<4, C>(cpu, instruction)? as u32;
    if value & !MXCSR_MASK != 0 {
        return Err(Exception::GeneralProtection(0));
    }
    cpu.sse().mxcsr = value;
    Ok(())
}

/// `STMXCSR`.
pub(super) fn store_mxcsr<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
) -> Result<(), Exception> {
    require_sse(cpu)?;
    let value = cpu.sse().mxcsr;
    set_memory::<4, C>(cpu, instruction, u128::from(value))
}

/// `#NM` if CR0.EM or CR0.TS is set.
fn require_available<C: VectorContext>(cpu: &C) -> Result<(), Exception> {
    if cpu.cr0() & (CR0_EM | CR0_TS) != 0 { Err(Exception::DeviceNotAvailable) } else { Ok(()) }
}

/// The address of the area. Unlike other operands it must be canonical first (which shows in
/// `#SS` for one on the stack), and a multiple of 16 second.
fn area<C: VectorContext>(cpu: &mut C, instruction: &Instruction) -> Result<u64, Exception> {
    let address = cpu.effective_address(instruction);
    let canonical = ((address << 16) as i64 >> 16) as u64 == address;
    if !canonical {
        cpu.load(address, &mut [0])?;
    }
    aligned_address(cpu, instruction)
}

/// `FXSAVE`, `FXSAVE64`.
pub(super) fn save<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    pointers: Pointers,
) -> Result<(), Exception> {
    require_available(cpu)?;
    let address = area(cpu, instruction)?;
    let x87 = *cpu.x87();
    let image = image(&x87, cpu.sse(), pointers);
    // The whole area must be writable, the part that is left alone too.
    cpu.probe_store(address, AREA)?;
    cpu.store(address, &image[..XMM_OFFSET + 16 * known_registers(instruction)])
}

/// How many XMM registers code of this size has; the others are neither saved nor restored.
fn known_registers(instruction: &Instruction) -> usize {
    if instruction.code_size() == CodeSize::Code64 { 16 } else { 8 }
}

/// `FXRSTOR`, `FXRSTOR64`; `#GP(0)` for a reserved bit of MXCSR.
pub(super) fn restore<C: VectorContext>(
    cpu: &mut C,
    instruction: &Instruction,
    pointers: Pointers,
) -> Result<(), Exception> {
    require_available(cpu)?;
    let address = area(cpu, instruction)?;
    let mut image = [0; AREA];
    cpu.load(address, &mut image)?;
    let (x87, sse) = parse(&image, pointers).ok_or(Exception::GeneralProtection(0))?;
    let known = known_registers(instruction);
    *cpu.x87() = x87;
    cpu.sse().mxcsr = sse.mxcsr;
    cpu.sse().registers[..known].copy_from_slice(&sse.registers[..known]);
    Ok(())
}

/// What `FXSAVE` writes.
pub(crate) fn image(x87: &X87State, sse: &SseState, pointers: Pointers) -> [u8; SAVED] {
    let mut image = [0; SAVED];
    let mut put =
        |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &x87.control.to_le_bytes());
    put(2, &x87.status.to_le_bytes());
    put(4, &[abridged(x87.tags)]);
    put(6, &x87.opcode.to_le_bytes());
    let pointer_bytes = if pointers == Pointers::Wide { 8 } else { 4 };
    put(8, &x87.instruction.to_le_bytes()[..pointer_bytes]);
    put(16, &x87.data.to_le_bytes()[..pointer_bytes]);
    put(MXCSR_OFFSET, &sse.mxcsr.to_le_bytes());
    put(MXCSR_OFFSET + 4, &MXCSR_MASK.to_le_bytes());
    for (i, register) in x87.registers.iter().enumerate() {
        put(X87_OFFSET + 16 * i, register);
    }
    for (i, register) in sse.registers.iter().enumerate() {
        put(XMM_OFFSET + 16 * i, &register.to_le_bytes());
    }
    image
}

/// What `FXRSTOR` loads; nothing if a reserved bit of MXCSR is set.
pub(crate) fn parse(image: &[u8; AREA], pointers: Pointers) -> Option<(X87State, SseState)> {
    let number = |offset: usize, length: usize| {
        let mut bytes = [0; 16];
        bytes[..length].copy_from_slice(&image[offset..offset + length]);
        u128::from_le_bytes(bytes)
    };
    let pointer_bytes = if pointers == Pointers::Wide { 8 } else { 4 };
    let mxcsr = number(MXCSR_OFFSET, 4) as u32;
    if mxcsr & !MXCSR_MASK != 0 {
        return None;
    }
    let mut x87 = X87State {
        control: number(0, 2) as u16,
        status: number(2, 2) as u16,
        tags: 0,
        opcode: number(6, 2) as u16 & 0x7FF,
        instruction: number(8, pointer_bytes) as u64,
        data: number(16, pointer_bytes) as u64,
        registers: [[0; 10]; 8],
    };
    for (i, register) in x87.registers.iter_mut().enumerate() {
        register.copy_from_slice(&image[X87_OFFSET + 16 * i..][..10]);
    }
    let present = image[4];
    x87::settle_loaded(&mut x87, |physical| present >> physical & 1 == 0);
    let sse =
        SseState { registers: std::array::from_fn(|i| number(XMM_OFFSET + 16 * i, 16)), mxcsr };
    Some((x87, sse))
}

/// The abridged tag byte: a bit for each physical register that is not empty.
fn abridged(tags: u16) -> u8 {
    (0..8).fold(0, |byte, i| byte | if tags >> (2 * i) & 3 == 3 { 0 } else { 1 << i })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::arch::asm;

    #[repr(align(16))]
    struct Area([u8; AREA]);

    /// Loads an image into the host's units, saves it again, and puts the host's state back.
    fn through_host(image: &[u8; AREA]) -> [u8; AREA] {
        let (mut host, mut area) = (Area([0; AREA]), Area(*image));
        // SAFETY: the areas are 512 bytes, aligned to 16, and outlive the block; the image comes
        // from `image`, so loading it cannot fault, and an exception that is pending in it is
        // raised by no instruction here; every register is restored before the block ends.
        unsafe {
            asm!(
                "fxsave64 [{host}]",
                "fxrstor64 [{area}]",
                "fxsave64 [{area}]",
                "fxrstor64 [{host}]",
                host = in(reg) &raw mut host,
                area = in(reg) &raw mut area,
            );
        }
        area.0
    }

    fn padded(image: [u8; SAVED]) -> [u8; AREA] {
        let mut area = [0; AREA];
        area[..SAVED].copy_from_slice(&image);
        area
    }

    /// With an exception pending (IE, unmasked): AMD's CPUs save the pointers of no other state.
    fn sample() -> (X87State, SseState) {
        let mut x87 = X87State {
            control: X87State::default().control & !1,
            status: 5 << 11 | 0x8081,
            instruction: 0x7FFF_1234_5678,
            ..X87State::default()
        };
        for (i, register) in x87.registers.iter_mut().enumerate() {
            *register = [i as u8, 1, 2, 3, 4, 5, 6, 0x80 | i as u8, 0xFF, 0x3F];
        }
        x87::settle_loaded(&mut x87, |physical| physical < 2);
        let sse = SseState {
            registers: std::array::from_fn(|i| (i as u128 + 1) << 64 | 7),
            mxcsr: 0x9FC1,
        };
        (x87, sse)
    }

    #[test]
    fn the_saved_image_is_the_one_the_host_saves() {
        let (x87, sse) = sample();
        let mut image = padded(image(&x87, &sse, Pointers::Wide));
        let saved = through_host(&image);
        // A CPU may know more modes than the one modelled (on AMD's, misaligned operands).
        let mask = |image: &[u8; AREA]| u32::from_le_bytes(image[28..32].try_into().expect("4"));
        assert_eq!(mask(&saved) & mask(&image), mask(&image));
        image[28..32].copy_from_slice(&saved[28..32]);
        assert_eq!(saved, image);
    }

    #[test]
    fn what_was_saved_is_restored() {
        let (mut x87, sse) = sample();
        assert_eq!(
            parse(&padded(image(&x87, &sse, Pointers::Wide)), Pointers::Wide),
            Some((x87, sse))
        );
        x87.instruction &= 0xFFFF_FFFF;
        assert_eq!(
            parse(&padded(image(&x87, &sse, Pointers::Narrow)), Pointers::Narrow),
            Some((x87, sse))
        );
    }

    #[test]
    fn a_reserved_bit_of_mxcsr_is_refused() {
        let (x87, mut sse) = sample();
        sse.mxcsr |= 0x1_0000;
        assert_eq!(parse(&padded(image(&x87, &sse, Pointers::Wide)), Pointers::Wide), None);
    }
}
