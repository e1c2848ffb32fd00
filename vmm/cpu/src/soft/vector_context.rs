//! The CPU as SSE and x87 instructions see it.

use super::cpu::Cpu;
use super::event::{Event, Flow, Trap};
use super::exception::Exception;
use super::flags::ARITHMETIC;
use super::ops::string::implicit_target;
use super::vector::{self, VectorContext};
use crate::state::{SseState, X87State};
use iced_x86::{Instruction, Register};

/// The CPU while one instruction executes.
struct Context<'a> {
    cpu: &'a mut Cpu,
    address: u64,
    /// A memory access trapped for a reason that is no exception: the CPU has it.
    trapped: bool,
}

/// Executes an SSE or x87 instruction.
pub(super) fn run(cpu: &mut Cpu, i: &Instruction) -> Flow {
    let address = cpu.own_address(i);
    let mut context = Context { cpu, address, trapped: false };
    match vector::execute(&mut context, i) {
        Ok(()) => Ok(()),
        Err(_) if context.trapped => Err(Trap),
        Err(exception) => Err(context.cpu.raise(exception)),
    }
}

impl Context<'_> {
    /// What the vector unit is told of a trap; unless it is an exception, the CPU remembers the
    /// real reason and the answer only has to end the instruction.
    fn translate_trap(&mut self) -> Exception {
        match self.cpu.event {
            Event::Exception(exception) => exception,
            _ => {
                self.trapped = true;
                Exception::GeneralProtection(0)
            }
        }
    }
}

impl VectorContext for Context<'_> {
    fn sse(&mut self) -> &mut SseState {
        &mut self.cpu.sse
    }

    fn x87(&mut self) -> &mut X87State {
        &mut self.cpu.x87
    }

    fn cr0(&self) -> u64 {
        self.cpu.cr0
    }

    fn cr4(&self) -> u64 {
        self.cpu.cr4
    }

    fn instruction_address(&self) -> u64 {
        self.address
    }

    fn general(&self, register: Register) -> u64 {
        self.cpu.register(register)
    }

    fn set_general(&mut self, register: Register, value: u64) {
        self.cpu.set_register(register, value);
    }

    fn flags(&self) -> u64 {
        self.cpu.rflags()
    }

    fn set_arithmetic_flags(&mut self, flags: u64) {
        self.cpu.flags.set(flags & ARITHMETIC);
    }

    fn effective_address(&self, instruction: &Instruction) -> u64 {
        self.cpu.address_of(instruction)
    }

    fn string_destination(&self, instruction: &Instruction) -> u64 {
        implicit_target(self.cpu, instruction)
    }

    fn load(&mut self, address: u64, into: &mut [u8]) -> Result<(), Exception> {
        self.cpu.load_bytes(address, into).map_err(|Trap| self.translate_trap())
    }

    fn store(&mut self, address: u64, bytes: &[u8]) -> Result<(), Exception> {
        self.cpu.store_bytes(address, bytes).map_err(|Trap| self.translate_trap())
    }

    fn probe_store(&mut self, address: u64, len: usize) -> Result<(), Exception> {
        self.cpu.probe_store(address, len).map_err(|Trap| self.translate_trap())
    }
}
