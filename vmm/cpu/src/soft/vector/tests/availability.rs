//! `#UD`, `#NM`, `#GP` and `#XM` by the control registers, alignment and MXCSR.

use super::super::execute;
use super::machine::{BASE, Machine};
use crate::soft::exception::Exception;
use iced_x86::{Decoder, DecoderOptions, Instruction};

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// `addps xmm0, [rsi + offset]`.
fn add_from_memory(offset: u8) -> Instruction {
    decode(&[0x0F, 0x58, 0x46, offset])
}

fn decode(bytes: &[u8]) -> Instruction {
    Decoder::new(64, bytes, DecoderOptions::NONE).decode()
}

#[test]
fn sse_needs_the_system_to_allow_it() {
    let mut machine = Machine::default();
    assert_eq!(execute(&mut machine, &add_from_memory(0)), Ok(()));
    machine.cr0 |= CR0_TS;
    assert_eq!(execute(&mut machine, &add_from_memory(0)), Err(Exception::DeviceNotAvailable));
    machine.cr0 |= CR0_EM;
    assert_eq!(execute(&mut machine, &add_from_memory(0)), Err(Exception::InvalidOpcode));
    machine = Machine::default();
    machine.cr4 &= !CR4_OSFXSR;
    assert_eq!(execute(&mut machine, &add_from_memory(0)), Err(Exception::InvalidOpcode));
}

#[test]
fn an_unaligned_operand_is_a_protection_fault_only_where_alignment_is_wanted() {
    let mut machine = Machine::default();
    assert_eq!(execute(&mut machine, &add_from_memory(8)), Err(Exception::GeneralProtection(0)));
    let movups_load = decode(&[0x0F, 0x10, 0x46, 0x08]);
    assert_eq!(execute(&mut machine, &movups_load), Ok(()));
    let movaps_store = decode(&[0x0F, 0x29, 0x46, 0x08]);
    assert_eq!(execute(&mut machine, &movaps_store), Err(Exception::GeneralProtection(0)));
}

#[test]
fn an_unmasked_exception_keeps_the_register_and_sets_the_flag() {
    let divide = decode(&[0x0F, 0x5E, 0xC1]);
    let mut machine = Machine::default();
    machine.sse.registers[0] = u128::from(1.0_f32.to_bits());
    machine.sse.mxcsr = 0x1F80 & !(1 << 9);
    let before = machine.sse.registers;
    assert_eq!(execute(&mut machine, &divide), Err(Exception::SimdFloatingPoint));
    assert_eq!(machine.sse.registers, before);
    // Invalid (0/0 in three lanes) and divide by zero, both known before computing.
    assert_eq!(machine.sse.mxcsr & 0x3F, 5);
    machine.cr4 &= !CR4_OSXMMEXCPT;
    assert_eq!(execute(&mut machine, &divide), Err(Exception::InvalidOpcode));
}

#[test]
fn flags_of_unmasked_underflow_and_overflow_are_those_of_silicon() {
    // (opcode, operands, cleared mask bits, flags) as observed on a current CPU.
    const CASES: [(u8, u32, u32, u32, u32); 10] = [
        (0x58, 0x0000_0001, 0x3F80_0000, 0x02, 0x02),
        (0x59, 0x0080_0001, 0x3F00_0001, 0x10, 0x30),
        (0x59, 0x0080_0000, 0x3F00_0000, 0x10, 0x10),
        (0x58, 0x0000_0001, 0x0000_0001, 0x10, 0x12),
        (0x58, 0x0080_0001, 0x8080_0000, 0x10, 0x10),
        (0x59, 0x0080_0001, 0x3F00_0000, 0x10, 0x10),
        (0x59, 0x0080_0001, 0x3F00_0001, 0x20, 0x30),
        (0x59, 0x7F7F_FFFF, 0x7F7F_FFFF, 0x08, 0x28),
        (0x59, 0x7F00_0000, 0x4000_0000, 0x08, 0x08),
        (0x59, 0x7F7F_FFFF, 0x7F7F_FFFF, 0x20, 0x28),
    ];
    for (opcode, a, b, unmasked, flags) in CASES {
        let mut machine = Machine::default();
        machine.sse.registers[0] = u128::from(a);
        machine.sse.registers[1] = u128::from(b);
        machine.sse.mxcsr = 0x1F80 & !(unmasked << 7);
        let scalar = decode(&[0xF3, 0x0F, opcode, 0xC1]);
        assert_eq!(
            execute(&mut machine, &scalar),
            Err(Exception::SimdFloatingPoint),
            "{a:#x} {b:#x}"
        );
        assert_eq!(
            machine.sse.mxcsr & 0x3F,
            flags,
            "{opcode:#x} {a:#x} {b:#x} unmasked {unmasked:#x}"
        );
        assert_eq!(machine.sse.registers[0], u128::from(a));
    }
}

#[test]
fn a_masked_store_across_a_page_that_faults_writes_nothing() {
    // MASKMOVDQU at the end of the memory, which the next bytes are outside of.
    let store = decode(&[0x66, 0x0F, 0xF7, 0xC1]);
    let mut machine = Machine::default();
    machine.sse.registers[0] = u128::MAX;
    machine.sse.registers[1] = u128::MAX;
    machine.general[7] = BASE + machine.memory.len() as u64 - 8;
    let before = machine.memory;
    assert!(matches!(execute(&mut machine, &store), Err(Exception::PageFault { .. })));
    assert_eq!(machine.memory, before);
    // Only bytes inside are selected: no fault.
    machine.sse.registers[1] = u128::from(u64::MAX);
    assert_eq!(execute(&mut machine, &store), Ok(()));
    assert_eq!(machine.memory[before.len() - 8..], [0xFF; 8]);
}

/// ST(0) = 1, divide by zero unmasked, then `FDIV ST(0), ST(1)` with ST(1) = 0.
fn divided_by_zero() -> Machine {
    let mut machine = Machine::default();
    machine.x87.control = 0x37B;
    for bytes in [[0xD9, 0xEE], [0xD9, 0xE8], [0xD8, 0xF1]] {
        machine.code = bytes.to_vec();
        assert_eq!(execute(&mut machine, &decode(&bytes)), Ok(()));
    }
    machine
}

#[test]
fn a_pending_x87_exception_is_delivered_at_the_next_waiting_instruction() {
    let mut machine = divided_by_zero();
    assert_eq!(machine.x87.status & 0x8084, 0x8084);
    let (fld1, wait, movq) = (decode(&[0xD9, 0xE8]), decode(&[0x9B]), decode(&[0x0F, 0x6F, 0xC1]));
    let before = machine.clone();
    for waiting in [fld1, wait, movq] {
        assert_eq!(execute(&mut machine, &waiting), Err(Exception::X87FloatingPoint));
    }
    assert_eq!(machine, before);
    let (fnstsw, fnclex) = (decode(&[0xDF, 0xE0]), decode(&[0xDB, 0xE2]));
    assert_eq!(execute(&mut machine, &fnstsw), Ok(()));
    assert_eq!(machine.general[0] as u16, machine.x87.status);
    assert_eq!(execute(&mut machine, &fnclex), Ok(()));
    assert_eq!(execute(&mut machine, &fld1), Ok(()));
}

#[test]
fn x87_and_mmx_need_the_system_to_allow_them() {
    let (fld1, wait, movq) = (decode(&[0xD9, 0xE8]), decode(&[0x9B]), decode(&[0x0F, 0x6F, 0xC1]));
    let mut machine = Machine { cr0: Machine::default().cr0 | CR0_TS, ..Machine::default() };
    assert_eq!(execute(&mut machine, &fld1), Err(Exception::DeviceNotAvailable));
    assert_eq!(execute(&mut machine, &movq), Err(Exception::DeviceNotAvailable));
    // WAIT asks for MP as well.
    assert_eq!(execute(&mut machine, &wait), Ok(()));
    machine.cr0 |= 2;
    assert_eq!(execute(&mut machine, &wait), Err(Exception::DeviceNotAvailable));
    machine = Machine { cr0: Machine::default().cr0 | CR0_EM, ..Machine::default() };
    assert_eq!(execute(&mut machine, &fld1), Err(Exception::DeviceNotAvailable));
    assert_eq!(execute(&mut machine, &movq), Err(Exception::InvalidOpcode));
}

#[test]
fn an_x87_store_that_faults_pops_nothing() {
    let mut machine = Machine::default();
    assert_eq!(execute(&mut machine, &decode(&[0xD9, 0xE8])), Ok(()));
    machine.general[6] = BASE + machine.memory.len() as u64;
    let before = machine.clone();
    let fstp = decode(&[0xDD, 0x1E]);
    assert!(matches!(execute(&mut machine, &fstp), Err(Exception::PageFault { .. })));
    assert_eq!(machine, before);
}

#[test]
fn approximations_are_within_the_architectures_error() {
    let mut random = super::values::Random::new(3);
    for (opcode, exact) in [(0x53, (|x| 1.0 / x) as fn(f64) -> f64), (0x52, |x| 1.0 / x.sqrt())] {
        let instruction = decode(&[0x0F, opcode, 0xC1]);
        for _ in 0..2000 {
            // Any normal number whose reciprocal is normal too.
            let bits = (random.next() as u32 & 0x7FFF_FFFF) % 0x7D00_0000 + 0x0080_0000;
            let mut machine = Machine::default();
            machine.sse.registers[1] = u128::from(bits);
            assert_eq!(execute(&mut machine, &instruction), Ok(()));
            let ours = f64::from(f32::from_bits(machine.sse.registers[0] as u32));
            let exact = exact(f64::from(f32::from_bits(bits)));
            assert!(((ours - exact) / exact).abs() <= 1.5 / 4096.0, "{bits:#x}");
        }
        // Denormals count as zeros; zeros give infinities of their sign; infinities give zeros.
        for (bits, result) in [
            (0x8000_0000_u32, 0xFF80_0000_u32),
            (1, 0x7F80_0000),
            (0x8000_0001, 0xFF80_0000),
            (0x7F80_0000, 0),
            (0x7F80_0001, 0x7FC0_0001),
        ] {
            let mut machine = Machine::default();
            machine.sse.registers[1] = u128::from(bits);
            assert_eq!(execute(&mut machine, &instruction), Ok(()));
            assert_eq!(machine.sse.registers[0] as u32, result, "{opcode:#x} {bits:#x}");
            assert_eq!(machine.sse.mxcsr, 0x1F80);
        }
    }
}
