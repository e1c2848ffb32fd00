//! A CPU for tests: registers and one stretch of memory.

use super::super::VectorContext;
use super::values::Random;
use crate::soft::exception::Exception;
use crate::state::{SseState, X87State};
use iced_x86::{Instruction, Register};

/// Where the test's memory begins for the mock CPU.
pub(super) const BASE: u64 = 0x10_0000;
pub(super) const MEMORY: usize = 640;
/// Where the instruction is.
pub(super) const CODE: u64 = 0x20_0000;
/// CR0.PE, NE, PG and CR4.OSFXSR, OSXMMEXCPT.
const CR0: u64 = 0x8000_0021;
const CR4: u64 = 0x600;

/// The machine: RSI and RDI point into the memory.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Machine {
    pub(super) sse: SseState,
    pub(super) x87: X87State,
    pub(super) cr0: u64,
    pub(super) cr4: u64,
    pub(super) general: [u64; 16],
    pub(super) flags: u64,
    pub(super) memory: [u8; MEMORY],
    pub(super) code: Vec<u8>,
}

impl Default for Machine {
    fn default() -> Self {
        let mut general = [0; 16];
        general[6] = BASE;
        general[7] = BASE + 32;
        Self {
            sse: SseState::default(),
            x87: X87State::default(),
            cr0: CR0,
            cr4: CR4,
            general,
            flags: 2,
            memory: [0; MEMORY],
            code: Vec::new(),
        }
    }
}

impl Machine {
    /// A machine of seeded contents, every floating-point exception masked.
    pub(super) fn random(random: &mut Random) -> Self {
        let mut machine = Self::default();
        for register in &mut machine.sse.registers {
            *register = random.whole();
        }
        let mxcsr = random.next() as u32;
        machine.sse.mxcsr = mxcsr & 0xE07F | 0x1F80;
        if random.below(2) == 0 {
            machine.sse.mxcsr &= !0x8040;
        }
        for register in &mut machine.general[..4] {
            *register = if random.below(2) == 0 {
                random.quad()
            } else {
                random.below(40).wrapping_sub(20)
            };
        }
        for chunk in machine.memory.chunks_exact_mut(16) {
            let value = if random.below(3) == 0 {
                u128::from_le_bytes(padded(random.extended()))
            } else {
                random.whole()
            };
            chunk.copy_from_slice(&value.to_le_bytes());
        }
        machine.flags = 2 | random.next() & 0x8D5;
        randomise_x87(&mut machine.x87, random);
        machine
    }
}

fn padded(register: [u8; 10]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..10].copy_from_slice(&register);
    bytes
}

fn randomise_x87(x87: &mut X87State, random: &mut Random) {
    for register in &mut x87.registers {
        *register = random.extended();
    }
    x87.control = 0x37F;
    if random.below(3) == 0 {
        const PRECISIONS: [u16; 3] = [0, 0x200, 0x300];
        x87.control = 0x7F | PRECISIONS[random.below(3) as usize] | (random.next() as u16 & 0xC00);
    }
    x87.status = random.next() as u16 & 0x7F7F;
    if random.below(4) == 0 {
        // Some exceptions unmasked, none pending.
        x87.control &= !(random.next() as u16 & 0x3F);
        x87.status &= !0x7F;
    }
    // Mostly full: empty registers are a corner of their own.
    let empty = if random.below(4) == 0 {
        random.next()
    } else {
        random.next() & random.next() & random.next()
    };
    super::super::x87::settle_loaded(x87, |physical| empty >> physical & 1 != 0);
}

fn slot(register: Register) -> usize {
    use Register as R;
    match register {
        R::AL | R::AX | R::EAX | R::RAX => 0,
        R::CL | R::CX | R::ECX | R::RCX => 1,
        R::DL | R::DX | R::EDX | R::RDX => 2,
        R::BL | R::BX | R::EBX | R::RBX => 3,
        R::ESI | R::RSI => 6,
        R::EDI | R::RDI => 7,
        other => panic!("the tests use no {other:?}"),
    }
}

impl VectorContext for Machine {
    fn sse(&mut self) -> &mut SseState {
        &mut self.sse
    }
    fn x87(&mut self) -> &mut X87State {
        &mut self.x87
    }
    fn cr0(&self) -> u64 {
        self.cr0
    }
    fn cr4(&self) -> u64 {
        self.cr4
    }
    fn instruction_address(&self) -> u64 {
        CODE
    }
    fn general(&self, register: Register) -> u64 {
        self.general[slot(register)] & (u64::MAX >> (64 - 8 * register.size()))
    }
    fn set_general(&mut self, register: Register, value: u64) {
        let old = self.general[slot(register)];
        self.general[slot(register)] = match register.size() {
            8 => value,
            4 => value & 0xFFFF_FFFF,
            2 => old & !0xFFFF | value & 0xFFFF,
            _ => old & !0xFF | value & 0xFF,
        };
    }
    fn flags(&self) -> u64 {
        self.flags
    }
    fn set_arithmetic_flags(&mut self, flags: u64) {
        self.flags = self.flags & !0x8D5 | flags & 0x8D5;
    }
    fn effective_address(&self, instruction: &Instruction) -> u64 {
        self.general(instruction.memory_base()).wrapping_add(instruction.memory_displacement64())
    }
    fn string_destination(&self, _instruction: &Instruction) -> u64 {
        self.general[7]
    }
    fn load(&mut self, address: u64, into: &mut [u8]) -> Result<(), Exception> {
        let length = into.len();
        if address == CODE {
            into.copy_from_slice(&self.code[..length]);
            return Ok(());
        }
        into.copy_from_slice(self.bytes(address, length, 0)?);
        Ok(())
    }
    fn store(&mut self, address: u64, bytes: &[u8]) -> Result<(), Exception> {
        self.bytes(address, bytes.len(), 2)?.copy_from_slice(bytes);
        Ok(())
    }
    fn probe_store(&mut self, address: u64, len: usize) -> Result<(), Exception> {
        self.bytes(address, len, 2).map(|_| ())
    }
}

impl Machine {
    fn bytes(&mut self, address: u64, length: usize, error: u16) -> Result<&mut [u8], Exception> {
        let fault = Exception::PageFault { address, error };
        let start = usize::try_from(address.wrapping_sub(BASE)).expect("addresses are 64 bits");
        let end = start.checked_add(length).ok_or(fault)?;
        self.memory.get_mut(start..end).ok_or(fault)
    }
}
