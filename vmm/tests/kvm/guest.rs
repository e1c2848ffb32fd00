//! Guests of a few dozen bytes, and what they run in.

use iced_x86::code_asm::CodeAssembler;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
use vmft_cpu::soft::SoftEngine;
use vmft_cpu::state::{CpuState, DescriptorTable, Segment};
use vmft_cpu::{BranchPoints, Bus, CpuCount, Engine, Exit, ExitStream, PortWidth};
use vmft_kvm::BranchCounter;
use vmft_kvm::{KvmEngine, PointKind};
use vmft_log::point::ExecutionPoint;
use vmft_vmm::engine::EngineKind;

pub const CODE: u64 = 0x10_0000;
pub const STACK: u64 = 0x20_0000;
pub const DATA: u64 = 0x30_0000;
pub const USER_STACK: u64 = 0x28_0000;
/// A linear address that is mapped to a device.
pub const DEVICE: u64 = 0x8000_0000;
pub const DEVICE_FRAME: u64 = 0xC000_0000;
/// Sixteen bytes a vector.
pub const HANDLERS: u64 = 0x9000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const DEVICE_PD: u64 = 0x4000;
const GDT: u64 = 0x6000;
/// The limit of the table with the segments of privilege level 3: data, 64-bit code, 32-bit code.
pub const WHOLE_GDT: u16 = 0x47;
/// Their selectors.
pub const USER_DATA: i32 = 0x33;
pub const USER_CODE: i32 = 0x3B;
pub const USER_CODE_32: i32 = 0x43;
const IDT: u64 = 0x7000;
const TSS: u64 = 0x8000;
/// All that the guests use of their memory.
pub const USED: usize = 4 << 20;
/// Exits after which a guest is taken to be lost.
const PATIENCE: usize = 100_000;

/// False, with a word to the reader, where the environment says that there is no `/dev/kvm`.
pub fn has_kvm() -> bool {
    let without = std::env::var("VMFT_NO_KVM").is_ok_and(|value| value == "1");
    if without {
        println!("VMFT_NO_KVM=1: this host has no /dev/kvm, nothing is tested");
    }
    !without
}

/// What the bus saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    PortRead(u16, usize),
    PortWrite(u16, usize, u32),
    MemoryRead(u64, usize),
    MemoryWrite(u64, Vec<u8>),
    TimeStamp,
}

/// A bus that answers by rote, and remembers where it was asked.
#[derive(Debug, Default)]
pub struct TestBus {
    pub seen: Vec<(u64, Seen)>,
}

impl TestBus {
    /// What was seen, without the points.
    pub fn accesses(&self) -> Vec<Seen> {
        self.seen.iter().map(|(_, seen)| seen.clone()).collect()
    }
}

impl Bus for TestBus {
    fn port_read(&mut self, at: ExecutionPoint, port: u16, width: PortWidth) -> u32 {
        self.seen.push((at.get(), Seen::PortRead(port, width.bytes())));
        (0x8765_4321u32.wrapping_add(self.seen.len() as u32))
            & (u32::MAX >> (32 - 8 * width.bytes()))
    }
    fn port_write(&mut self, at: ExecutionPoint, port: u16, width: PortWidth, value: u32) {
        self.seen.push((at.get(), Seen::PortWrite(port, width.bytes(), value)));
    }
    fn memory_read(&mut self, at: ExecutionPoint, address: u64, data: &mut [u8]) {
        self.seen.push((at.get(), Seen::MemoryRead(address, data.len())));
        data.fill(0x5A);
    }
    fn memory_write(&mut self, at: ExecutionPoint, address: u64, data: &[u8]) {
        self.seen.push((at.get(), Seen::MemoryWrite(address, data.to_vec())));
    }
    fn time_stamp(&mut self, at: ExecutionPoint) -> u64 {
        self.seen.push((at.get(), Seen::TimeStamp));
        777
    }
}

fn write_words(ram: &GuestRam, address: u64, words: &[u64]) {
    for (index, word) in (0..).zip(words) {
        ram.memory().write_obj(*word, GuestAddress(address + 8 * index)).unwrap();
    }
}

pub fn read_word(ram: &GuestRam, address: u64) -> u64 {
    ram.memory().read_obj(GuestAddress(address)).unwrap()
}

/// Memory with tables, a program, and handlers that count themselves and return:
/// `inc qword [DATA + 8 * vector]; iretq`, or `hlt` where there is an error code on the stack.
pub fn prepared_ram(code: &[u8]) -> GuestRam {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    write_words(&ram, PML4, &[PDPT | 0x23]);
    write_words(&ram, PDPT, &[PD | 0x23, 0, DEVICE_PD | 0x23]);
    write_words(&ram, DEVICE_PD, &[DEVICE_FRAME | 0xE3]);
    let large: Vec<u64> = (0..512).map(|index| (index << 21) | 0xE3).collect();
    write_words(&ram, PD, &large);
    let tss_low = 0x67 | (TSS << 16) | (0x8B << 40);
    write_words(&ram, GDT, &[0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, tss_low, 0]);
    for vector in 0..256 {
        let handler = HANDLERS + 16 * vector;
        let low = (handler & 0xFFFF) | (0x08 << 16) | (0x8E << 40) | ((handler >> 16) << 48);
        write_words(&ram, IDT + 16 * vector, &[low, 0]);
        let counter = (DATA + 8 * vector) as u32;
        let mut bytes = vec![0x48, 0xFF, 0x04, 0x25];
        bytes.extend(counter.to_le_bytes());
        let has_error_code = matches!(vector, 8 | 10..=14 | 17);
        bytes.extend(if has_error_code { &[0xF4][..] } else { &[0x48, 0xCF] });
        ram.memory().write_slice(&bytes, GuestAddress(handler)).unwrap();
    }
    ram.memory().write_slice(code, GuestAddress(CODE)).unwrap();
    ram
}

/// An engine of one CPU.
pub fn open(engine: EngineKind, ram: GuestRam) -> Box<dyn Engine> {
    engine.open(ram, CpuCount::ONE).expect("/dev/kvm opens (VMFT_NO_KVM=1 says that there is none)")
}

/// Copies what guests use of their memory.
pub fn copy_memory(from: &GuestRam, to: &GuestRam) {
    let mut memory = vec![0; USED];
    from.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
    to.memory().write_slice(&memory, GuestAddress(0)).unwrap();
}

/// Gives privilege level 3 the memory, every gate, its segments, and a stack for its exceptions.
pub fn open_to_users(ram: &GuestRam) {
    const USER: u64 = 4;
    let add = |address, bits| {
        let word = read_word(ram, address);
        write_words(ram, address, &[word | bits]);
    };
    add(PML4, USER);
    add(PDPT, USER);
    (0..512).for_each(|index| add(PD + 8 * index, USER));
    (0..256).for_each(|vector| add(IDT + 16 * vector, 0x60 << 40));
    let code = [0x00AF_FB00_0000_FFFF, 0x00CF_FB00_0000_FFFF];
    write_words(ram, GDT + 0x28, &[0, 0x00CF_F300_0000_FFFF, code[0], code[1]]);
    ram.memory().write_obj(STACK, GuestAddress(TSS + 4)).unwrap();
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

/// A CPU about to execute at [`CODE`], at privilege level 0, with interrupts masked.
pub fn initial_state() -> CpuState {
    let mut state = CpuState { rip: CODE, rflags: 2, ..CpuState::default() };
    state.general[4] = STACK;
    state.cr0 = 0x8005_0033;
    state.cr3 = PML4;
    state.cr4 = 0x6A0;
    state.msrs.efer = 0xD00;
    state.msrs.pat = 0x0007_0406_0007_0406;
    state.debug[6] = 0xFFFF_0FF0;
    state.debug[7] = 0x400;
    state.gdtr = DescriptorTable { base: GDT, limit: 0x27 };
    state.idtr = DescriptorTable { base: IDT, limit: 0xFFF };
    state.segments.cs = segment(0x08, 0xA9B);
    for data in [&mut state.segments.ss, &mut state.segments.ds, &mut state.segments.es] {
        *data = segment(0x10, 0xC93);
    }
    state.segments.fs = segment(0x10, 0xC93);
    state.segments.gs = segment(0x10, 0xC93);
    state.segments.tr = Segment { selector: 0x18, base: TSS, limit: 0x67, attributes: 0x8B };
    state.segments.ldtr = Segment { selector: 0, base: 0, limit: 0xFFFF, attributes: 0x82 };
    state
}

/// The CPU at [`CODE`] at privilege level 3 with IOPL 3, whose `SYSCALL` leads to `entry`.
pub fn user_state(entry: u64) -> CpuState {
    let mut state = initial_state();
    state.rflags = 0x3202;
    state.general[4] = USER_STACK;
    state.segments.cs = segment(0x3B, 0xAFB);
    for data in [&mut state.segments.ss, &mut state.segments.ds, &mut state.segments.es] {
        *data = segment(0x33, 0xCF3);
    }
    state.msrs.star = 0x0028_0008 << 32;
    state.msrs.lstar = entry;
    state.msrs.sfmask = 0x700;
    state.gdtr.limit = WHOLE_GDT;
    state
}

pub fn assemble(program: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    program(&mut assembler);
    assembler.assemble(CODE).unwrap()
}

/// A guest on one of the engines.
pub struct Guest {
    pub engine: Box<dyn Engine>,
    pub bus: TestBus,
}

impl Guest {
    /// The records of its engine's exits.
    pub fn exits(&mut self) -> &mut dyn ExitStream {
        self.engine.exit_stream().expect("an engine whose points are exits")
    }

    /// How its engine's points lie behind branches.
    pub fn branches(&mut self) -> &mut dyn BranchPoints {
        self.engine.branch_points().expect("branches are counted")
    }

    pub fn kvm(points: PointKind, code: &[u8]) -> Self {
        Self::on(open(EngineKind::Kvm { points }, prepared_ram(code)))
    }

    /// The same program at privilege level 3; `extras` are bytes at addresses.
    pub fn user(engine: EngineKind, code: &[u8], entry: u64, extras: &[(u64, Vec<u8>)]) -> Self {
        let ram = prepared_ram(code);
        open_to_users(&ram);
        for (address, bytes) in extras {
            ram.memory().write_slice(bytes, GuestAddress(*address)).unwrap();
        }
        let mut engine = open(engine, ram);
        engine.restore(&user_state(entry), ExecutionPoint::START).unwrap();
        Self { engine, bus: TestBus::default() }
    }

    /// With points at branches, which `counter` counts.
    pub fn counting(counter: impl BranchCounter + 'static, code: &[u8]) -> Self {
        let engine = KvmEngine::open_counting(prepared_ram(code), Box::new(counter))
            .expect("/dev/kvm opens (VMFT_NO_KVM=1 says that there is none)");
        Self::on(Box::new(engine))
    }

    pub fn soft(code: &[u8]) -> Self {
        Self::on(Box::new(SoftEngine::new(prepared_ram(code))))
    }

    /// On `soft`, as the CPU that `kvm` shows.
    pub fn soft_as_kvm(code: &[u8]) -> Self {
        Self::on(Box::new(SoftEngine::with_cpu_model_of_kvm(prepared_ram(code))))
    }

    fn on(mut engine: Box<dyn Engine>) -> Self {
        engine.restore(&initial_state(), ExecutionPoint::START).unwrap();
        Self { engine, bus: TestBus::default() }
    }

    /// Puts this guest where another one is, memory, CPU and what the bus has seen.
    pub fn take_over(&mut self, other: &mut Self) {
        copy_memory(other.engine.ram(), self.engine.ram());
        self.engine.restore(&other.engine.save(), other.engine.point()).unwrap();
        self.bus.seen.clone_from(&other.bus.seen);
    }

    pub fn run_to(&mut self, bound: u64, want: bool) -> Exit {
        self.engine.run(ExecutionPoint::new(bound), want, &mut self.bus)
    }

    pub fn run(&mut self) -> Exit {
        self.run_to(u64::MAX, false)
    }

    /// Runs to the end, collecting the state at every exit.
    pub fn states_at_exits(&mut self) -> Vec<(Exit, CpuState)> {
        let mut states = Vec::new();
        for _ in 0..PATIENCE {
            let exit = self.run();
            states.push((exit.clone(), self.engine.save()));
            if exit != Exit::BusAccess {
                return states;
            }
        }
        panic!("the guest does not end");
    }

    pub fn point(&self) -> u64 {
        self.engine.point().get()
    }

    pub fn general(&mut self, register: usize) -> u64 {
        self.engine.save().general[register]
    }

    pub fn word(&self, address: u64) -> u64 {
        read_word(self.engine.ram(), address)
    }
}
