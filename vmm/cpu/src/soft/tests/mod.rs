//! Tests of the engine as a whole, on a small machine: identity-mapped memory, a GDT, an IDT
//! whose handlers halt, and a bus that remembers.

mod checked;
mod compat;
mod compiled;
mod debug;
mod faults;
mod fuzz;
mod instructions;
mod interrupts;
mod limits;
mod memory;
mod random;
mod tame;

use super::{CacheLimits, SoftEngine};
use crate::cpu_model::{TimeStamp, offers};
use crate::memory::{GuestRam, MIN_MEMORY};
use crate::state::{DescriptorTable, Segment};
use crate::{Bus, CpuState, Engine, Exit, PortWidth};
use iced_x86::code_asm::CodeAssembler;
use vm_memory::{Bytes, GuestAddress};
use vmft_log::point::ExecutionPoint;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
/// Tables of the pages of 4 KiB from [`SMALL`] on.
const SMALL_PD: u64 = 0x4000;
const SMALL_PT: u64 = 0x5000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
const TSS: u64 = 0x8000;
/// Sixteen bytes a vector, the first a `HLT`.
const HANDLERS: u64 = 0x9000;
const KERNEL_STACK: u64 = 0xE000;
const IST_STACK: u64 = 0xF000;
/// Where test programs are put.
const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
/// Linear addresses mapped by 512 pages of 4 KiB, to [`SMALL_FRAMES`].
const SMALL: u64 = 0x4000_0000;
const SMALL_FRAMES: u64 = 0x40_0000;
/// A linear address that is mapped to a device.
const DEVICE: u64 = 0x8000_0000;
const DEVICE_FRAME: u64 = 0xD000_0000;

const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_CODE_32: u16 = 0x18;
const USER_DATA: u16 = 0x20;
const USER_CODE: u16 = 0x28;
const TASK: u16 = 0x30;

/// What the bus saw, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    PortRead(u64, u16),
    PortWrite(u64, u16, u32),
    MemoryRead(u64, u64, usize),
    MemoryWrite(u64, u64, Vec<u8>),
    TimeStamp(u64),
}

#[derive(Debug, Default)]
struct TestBus {
    seen: Vec<Seen>,
}

impl Bus for TestBus {
    fn port_read(&mut self, at: ExecutionPoint, port: u16, width: PortWidth) -> u32 {
        self.seen.push(Seen::PortRead(at.get(), port));
        0x8765_4321 & (u32::MAX >> (32 - 8 * width.bytes()))
    }

    fn port_write(&mut self, at: ExecutionPoint, port: u16, _: PortWidth, value: u32) {
        self.seen.push(Seen::PortWrite(at.get(), port, value));
    }

    fn memory_read(&mut self, at: ExecutionPoint, address: u64, data: &mut [u8]) {
        self.seen.push(Seen::MemoryRead(at.get(), address, data.len()));
        data.fill(0x5A);
    }

    fn memory_write(&mut self, at: ExecutionPoint, address: u64, data: &[u8]) {
        self.seen.push(Seen::MemoryWrite(at.get(), address, data.to_vec()));
    }

    fn time_stamp(&mut self, at: ExecutionPoint) -> u64 {
        self.seen.push(Seen::TimeStamp(at.get()));
        at.get() * 10
    }
}

fn write_words(ram: &GuestRam, address: u64, words: &[u64]) {
    for (index, word) in (0..).zip(words) {
        ram.memory().write_obj(*word, GuestAddress(address + 8 * index)).expect("in memory");
    }
}

fn read_word(ram: &GuestRam, address: u64) -> u64 {
    ram.memory().read_obj(GuestAddress(address)).expect("in memory")
}

/// Memory with tables for everything the tests need.
fn prepared_ram() -> GuestRam {
    let ram = GuestRam::new(MIN_MEMORY).expect("allowed size");
    write_words(&ram, PML4, &[PDPT | 7]);
    write_words(&ram, PDPT, &[PD | 7, SMALL_PD | 7, (DEVICE_FRAME & !0x3FFF_FFFF) | 0x87]);
    let large: Vec<u64> = (0..512).map(|index| (index << 21) | 0x87).collect();
    write_words(&ram, PD, &large);
    write_words(&ram, SMALL_PD, &[SMALL_PT | 7]);
    let small: Vec<u64> = (0..512).map(|index| (SMALL_FRAMES + (index << 12)) | 7).collect();
    write_words(&ram, SMALL_PT, &small);
    let tss_low = 0x67 | ((TSS & 0xFF_FFFF) << 16) | (0x89 << 40);
    write_words(
        &ram,
        GDT,
        &[
            0,
            0x00AF_9B00_0000_FFFF,
            0x00CF_9300_0000_FFFF,
            0x00CF_FB00_0000_FFFF,
            0x00CF_F300_0000_FFFF,
            0x00AF_FB00_0000_FFFF,
            tss_low,
            0,
        ],
    );
    write_words(&ram, TSS, &[0; 13]);
    ram.memory().write_obj(KERNEL_STACK, GuestAddress(TSS + 4)).expect("in memory");
    ram.memory().write_obj(0x68u16, GuestAddress(TSS + 102)).expect("in memory");
    ram.memory().write_obj(IST_STACK, GuestAddress(TSS + 36)).expect("in memory");
    for vector in 0..256 {
        let handler = HANDLERS + 16 * vector;
        // Gates of vectors 3 and 0x80 are open to programs; vector 8 has a stack of its own.
        let privilege = if vector == 3 || vector == 0x80 { 3 } else { 0 };
        let ist = u64::from(vector == 8);
        let low = (handler & 0xFFFF)
            | (u64::from(KERNEL_CODE) << 16)
            | (ist << 32)
            | ((0x8E | (privilege << 5)) << 40)
            | ((handler >> 16) << 48);
        write_words(&ram, IDT + 16 * vector, &[low, 0]);
        ram.memory().write_obj(0xF4u8, GuestAddress(handler)).expect("in memory");
    }
    ram
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

/// A CPU about to execute at [`CODE`], at privilege level 0 or 3.
fn initial_state(user: bool) -> CpuState {
    let mut state = CpuState { rip: CODE, rflags: 2, ..CpuState::default() };
    state.general[4] = STACK;
    state.cr0 = 0x8005_0033;
    state.cr3 = PML4;
    state.cr4 = 0x6A0;
    state.msrs.efer = 0xD01;
    state.msrs.pat = 0x0007_0406_0007_0406;
    state.gdtr = DescriptorTable { base: GDT, limit: 0x3F };
    state.idtr = DescriptorTable { base: IDT, limit: 0xFFF };
    state.segments.tr = Segment { selector: TASK, base: TSS, limit: 0x67, attributes: 0x8B };
    if user {
        state.segments.cs = segment(USER_CODE | 3, 0xAFB);
        state.segments.ss = segment(USER_DATA | 3, 0xCF3);
    } else {
        state.segments.cs = segment(KERNEL_CODE, 0xA9B);
        state.segments.ss = segment(KERNEL_DATA, 0xC93);
    }
    state
}

/// A machine with a program.
struct Machine {
    engine: SoftEngine,
    bus: TestBus,
}

impl Machine {
    fn with_bytes(code: &[u8], state: &CpuState) -> Self {
        Self::with_limits(code, state, CacheLimits::default())
    }

    fn with_limits(code: &[u8], state: &CpuState, limits: CacheLimits) -> Self {
        let ram = prepared_ram();
        ram.memory().write_slice(code, GuestAddress(CODE)).expect("in memory");
        let mut engine = SoftEngine::with_limits(ram, limits);
        engine.restore(state, ExecutionPoint::START).expect("a valid state");
        Self { engine, bus: TestBus::default() }
    }

    /// A program at privilege level 0.
    fn new(program: impl FnOnce(&mut CodeAssembler)) -> Self {
        Self::with_bytes(&assemble(program), &initial_state(false))
    }

    /// A program at privilege level 3.
    fn user(program: impl FnOnce(&mut CodeAssembler)) -> Self {
        Self::with_bytes(&assemble(program), &initial_state(true))
    }

    fn run_to(&mut self, bound: u64) -> Exit {
        self.engine.run(ExecutionPoint::new(bound), false, &mut self.bus)
    }

    fn run(&mut self) -> Exit {
        self.run_to(1_000_000)
    }

    /// Runs until an exit other than a bus access.
    fn run_through(&mut self) -> Exit {
        loop {
            let exit = self.run();
            if exit != Exit::BusAccess {
                return exit;
            }
        }
    }

    fn point(&self) -> u64 {
        self.engine.point().get()
    }

    fn state(&mut self) -> CpuState {
        self.engine.save()
    }

    fn ram(&self) -> &GuestRam {
        self.engine.ram()
    }

    /// Runs until a handler of the IDT halts; its vector and the words it was given, the
    /// lowest first.
    fn run_into_handler(&mut self) -> (u64, Vec<u64>) {
        assert_eq!(self.run_through(), Exit::Halted { interruptible: false });
        let state = self.state();
        let rip = state.rip - 1;
        assert!((HANDLERS..HANDLERS + 0x1000).contains(&rip), "halted at {rip:#x}");
        let words = (0..6).map(|n| read_word(self.ram(), state.general[4] + 8 * n)).collect();
        ((rip - HANDLERS) / 16, words)
    }
}

fn assemble(program: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).expect("64 bits are supported");
    program(&mut assembler);
    assembler.assemble(CODE).expect("the program assembles")
}

fn is_of_some_mode(code: iced_x86::Code) -> bool {
    let op_code = code.op_code();
    op_code.mode64() || op_code.mode32() || op_code.mode16()
}

#[test]
fn the_engine_has_every_instruction_that_cpuid_offers() {
    let missing: Vec<String> = iced_x86::Code::values()
        .filter(|code| code.op_code().is_instruction() && is_of_some_mode(*code))
        .filter(|code| offers(*code, TimeStamp::Shown) && !super::supports(*code))
        .map(|code| format!("{code:?}"))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_engine_has_no_instruction_that_cpuid_does_not_offer() {
    let extra: Vec<iced_x86::Code> = iced_x86::Code::values()
        .filter(|code| code.op_code().is_instruction() && is_of_some_mode(*code))
        .filter(|code| !offers(*code, TimeStamp::Shown) && super::supports(*code))
        .collect();
    assert!(extra.is_empty(), "{extra:?}");
}
