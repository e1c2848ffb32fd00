//! The two engines agree: a whole run, or a whole boot, exit by exit.
//!
//! Each engine has a board of its own. Guest time is a function of the number of exits, requests are served at
//! the exit that makes them, and an interrupt is taken at an exit or not at all: so both engines are given the same
//! answers and the same arrivals at the same exits. After every exit, what the guest did at the bus, the
//! general registers, RIP and the flags that no instruction leaves undefined are compared; at the end, all memory.
//! From there, copies of both are compared after every instruction (`VMFT_AGREEMENT_STEPS` says for how many).
//!
//! The guests are the probe and, where Linux runs, the lockstep kernel: both look at nothing that differs
//! from host to host. A string instruction at a port or a device is one exit here, however many it takes.

use crate::engines::{kvm_is_here, probe, take_turn};
use std::sync::Arc;
use vm_memory::{Bytes as _, GuestAddress};
use vmft_cpu::memory::GuestRam;
use vmft_cpu::soft::SoftEngine;
use vmft_cpu::{Bus, CpuCount, CpuState, Engine, Exit, PortWidth};
use vmft_guest_images::{Cache, cmdline, lockstep_guest};
use vmft_kvm::{KvmEngine, PointKind};
use vmft_log::entry::Arrival;
use vmft_log::point::{ExecutionPoint, VirtualTime};
use vmft_vmm::board::{Board, BoardConfig, Bytes, DiskOperation, Effect, UnixSeconds};
use vmft_vmm::boot;
use vmft_vmm::machine::BootSource;

/// Guest time of an exit.
const EXIT_NS: u64 = 20_000;
/// CF, PF, AF, ZF, SF, OF: undefined after some instructions.
const STATUS_FLAGS: u64 = 0x8D5;
const INTERRUPT_FLAG: u64 = 1 << 9;
/// Exits after which a guest is taken to be lost.
const PATIENCE: u64 = 50_000_000;
/// Instructions of the kernel and its first program that are compared, if nothing else is said: the program
/// begins at about the 60,000th.
const PROGRAM_STEPS: u64 = 90_000;
/// At most so many: then the kernel waits for an interrupt.
const MOST_PROGRAM_STEPS: u64 = 400_000;

/// What the guest did at the bus, and what it was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    PortRead(u16, usize, u32),
    PortWrite(u16, usize, u32),
    DeviceRead(u64, Vec<u8>),
    DeviceWrite(u64, Vec<u8>),
}

/// The board, at a moment that the harness sets.
struct Wiring<'a> {
    board: &'a mut Board,
    now: VirtualTime,
    seen: &'a mut Vec<Seen>,
}

impl Bus for Wiring<'_> {
    fn port_read(&mut self, _: ExecutionPoint, port: u16, width: PortWidth) -> u32 {
        let value = self.board.port_read(self.now, port, width);
        self.seen.push(Seen::PortRead(port, width.bytes(), value));
        value
    }
    fn port_write(&mut self, _: ExecutionPoint, port: u16, width: PortWidth, value: u32) {
        let value = value & (u32::MAX >> (32 - 8 * width.bytes()));
        self.board.port_write(self.now, port, width, value);
        self.seen.push(Seen::PortWrite(port, width.bytes(), value));
    }
    fn memory_read(&mut self, _: ExecutionPoint, address: u64, data: &mut [u8]) {
        self.board.memory_read(self.now, address, data);
        self.seen.push(Seen::DeviceRead(address, data.to_vec()));
    }
    fn memory_write(&mut self, _: ExecutionPoint, address: u64, data: &[u8]) {
        self.board.memory_write(self.now, address, data);
        self.seen.push(Seen::DeviceWrite(address, data.to_vec()));
    }
    fn time_stamp(&mut self, _: ExecutionPoint) -> u64 {
        self.now.as_ns()
    }
}

/// One exit.
#[derive(Debug, PartialEq, Eq)]
struct Stop {
    exit: Exit,
    seen: Vec<Seen>,
    general: [u64; 16],
    rip: u64,
    flags: u64,
    user: bool,
}

struct Side {
    engine: Box<dyn Engine>,
    board: Board,
    console: Vec<u8>,
    now: VirtualTime,
}

impl Side {
    fn new(
        open: impl FnOnce(GuestRam) -> Box<dyn Engine>,
        memory: u64,
        source: &BootSource,
    ) -> Self {
        let config = BoardConfig {
            memory: Bytes(memory),
            clock_base: UnixSeconds(1_288_000_000),
            disks: Vec::new(),
            entropy: true,
            net: None,
            cpus: CpuCount::ONE,
        };
        let ram = GuestRam::new(memory).unwrap();
        let board = Board::new(&config, &ram).unwrap();
        let initramfs = source.initramfs.as_deref();
        let start = boot::load(&ram, &source.kernel, initramfs, &source.cmdline).unwrap();
        let mut engine = open(ram);
        engine.restore(&start, ExecutionPoint::START).unwrap();
        Self { engine, board, console: Vec::new(), now: VirtualTime::ZERO }
    }

    /// Runs to the next exit; what came of it.
    fn next_exit(&mut self) -> Stop {
        let mut seen = Vec::new();
        let mut string_at = None;
        loop {
            let before = seen.len();
            let mut bus = Wiring { board: &mut self.board, now: self.now, seen: &mut seen };
            let exit = self.engine.run(ExecutionPoint::NEVER, false, &mut bus);
            if exit == Exit::Kicked {
                continue;
            }
            let state = self.engine.save();
            // In the middle of a string instruction: the same access, again.
            let repeats = exit == Exit::BusAccess && self.is_in_string(&state);
            if repeats && (string_at.is_none() || string_at == Some(state.rip)) {
                assert!(seen.len() > before, "a string instruction moves something");
                string_at = Some(state.rip);
                continue;
            }
            return Stop {
                exit,
                seen,
                general: state.general,
                rip: state.rip,
                flags: state.rflags & !STATUS_FLAGS,
                user: state.segments.cs.selector & 3 == 3,
            };
        }
    }

    /// True in front of a string instruction at a port with something left to do, which follows an access
    /// only if that was part of it: code does not do the same twice without setting RCX.
    fn is_in_string(&self, state: &CpuState) -> bool {
        let mut bytes = [0; 3];
        let physical = state.rip & 0x3FFF_FFFF;
        let read = self.engine.ram().memory().read_slice(&mut bytes, GuestAddress(physical));
        let string = |byte: u8| matches!(byte, 0x6C..=0x6F);
        read.is_ok()
            && bytes[0] == 0xF3
            && (string(bytes[1]) || string(bytes[2]))
            && state.general[1] != 0
    }

    /// Brings what is due at this exit; true if the guest goes on.
    fn serve(&mut self, exits: u64, stop: &Stop) -> bool {
        self.now = self.now.max(VirtualTime::from_ns(exits * EXIT_NS));
        self.board.advance(self.now);
        let effects: Vec<_> = self.board.effects().collect();
        for effect in effects {
            let arrival = match effect {
                Effect::Console(bytes) => {
                    self.console.extend(bytes);
                    continue;
                }
                Effect::Packet(_) => unreachable!("this board has no network"),
                Effect::Entropy { request, len } => {
                    Arrival::Entropy { request, data: vec![0x5A; len as usize] }
                }
                Effect::Disk { disk, request, operation } => {
                    let data = match operation {
                        DiskOperation::Read { len, .. } => vec![0; len as usize],
                        _ => Vec::new(),
                    };
                    Arrival::DiskCompletion { disk, request, status: 0, data }
                }
            };
            self.board.deliver(self.now, &arrival).unwrap();
        }
        match stop.exit {
            Exit::Halted { interruptible: false } => return false,
            Exit::Halted { interruptible: true } => {
                while !self.board.interrupt_pending() {
                    let Some(timer) = self.board.next_timer() else { return false };
                    self.now = self.now.max(timer);
                    self.board.advance(self.now);
                }
                let vector = self.board.acknowledge_interrupt();
                self.engine.inject(vector);
            }
            _ if self.board.reset_requested() => return false,
            _ if stop.flags & INTERRUPT_FLAG != 0 && self.board.interrupt_pending() => {
                let mut seen = Vec::new();
                let mut bus = Wiring { board: &mut self.board, now: self.now, seen: &mut seen };
                let exit = loop {
                    let exit = self.engine.run(ExecutionPoint::NEVER, true, &mut bus);
                    if exit != Exit::Kicked {
                        break exit;
                    }
                };
                assert_eq!(exit, Exit::InterruptWindow, "nothing shadows it behind an access");
                let vector = self.board.acknowledge_interrupt();
                self.engine.inject(vector);
            }
            _ => {}
        }
        true
    }
}

fn kvm(ram: GuestRam) -> Box<dyn Engine> {
    let engine = KvmEngine::open(ram, PointKind::Exit);
    Box::new(engine.expect("/dev/kvm opens (VMFT_NO_KVM=1 says that there is none)"))
}

/// What a run came to.
struct Run {
    exits: u64,
    console: String,
    soft: Side,
    kvm: Side,
}

/// Runs a guest with so many bytes of memory on both engines, to its end, or until it has printed `last`.
fn compare(source: &BootSource, memory: u64, last: Option<&str>) -> Run {
    let soft = |ram| -> Box<dyn Engine> { Box::new(SoftEngine::with_cpu_model_of_kvm(ram)) };
    let mut soft = Side::new(soft, memory, source);
    let mut kvm = Side::new(kvm, memory, source);
    let mut exits = 0;
    loop {
        exits += 1;
        let (expected, stop) = (soft.next_exit(), kvm.next_exit());
        assert_eq!(stop, expected, "exit {exits}");
        let (on, also) = (soft.serve(exits, &expected), kvm.serve(exits, &stop));
        assert_eq!((on, &soft.console), (also, &kvm.console), "exit {exits}");
        let printed = |last: &str| String::from_utf8_lossy(&soft.console).contains(last);
        if !on || matches!(soft.console.last(), Some(b'\n')) && last.is_some_and(printed) {
            break;
        }
        assert!(exits < PATIENCE, "the guest does not end");
    }
    let (mut here, mut there) = ([0; 4096], [0; 4096]);
    for address in (0..memory).step_by(4096).map(GuestAddress) {
        soft.engine.ram().memory().read_slice(&mut here, address).unwrap();
        kvm.engine.ram().memory().read_slice(&mut there, address).unwrap();
        assert!(here == there, "memory at {:#x}", address.0);
    }
    let console = String::from_utf8_lossy(&soft.console).into_owned();
    println!("{exits} exits agree; {} bytes on the console", console.len());
    Run { exits, console, soft, kvm }
}

/// A copy of a side's guest, on the engine that `open` opens.
fn copy<E: Engine>(side: &mut Side, open: impl FnOnce(GuestRam) -> E) -> E {
    let (from, mut page) = (side.engine.ram(), vec![0; 4096]);
    let to = GuestRam::new(from.size()).unwrap();
    for address in (0..from.size()).step_by(page.len()).map(GuestAddress) {
        from.memory().read_slice(&mut page, address).unwrap();
        to.memory().write_slice(&page, address).unwrap();
    }
    let mut engine = open(to);
    engine.restore(&side.engine.save(), ExecutionPoint::START).unwrap();
    engine
}

/// One instruction, what it did at the bus, and where it led.
fn step(engine: &mut impl Engine, side: &mut Side) -> (Exit, Vec<Seen>, CpuState) {
    let next = engine.point().after(1);
    let mut seen = Vec::new();
    let mut bus = Wiring { board: &mut side.board, now: side.now, seen: &mut seen };
    let exit = loop {
        let exit = engine.run(next, false, &mut bus);
        if exit != Exit::Kicked {
            break exit;
        }
    };
    (exit, seen, engine.save())
}

/// Both go on for so many instructions, with their boards, on which no time passes, and without
/// interrupts. How often a program raised a page fault meanwhile.
fn step_on(run: Run, steps: u64) -> u64 {
    let Run { mut soft, mut kvm, .. } = run;
    let mut on_soft = copy(&mut soft, SoftEngine::with_cpu_model_of_kvm);
    let mut on_kvm = copy(&mut kvm, |ram| KvmEngine::open(ram, PointKind::Step).unwrap());
    let essence = |state: &CpuState| {
        let (flags, cs) = (state.rflags & !STATUS_FLAGS, state.segments.cs.selector);
        (state.general, state.rip, flags, cs, state.cr2, state.cr3)
    };
    let (mut faults, mut last) = (0, on_soft.save());
    for number in 1..=steps {
        let (expected, exit) = (step(&mut on_soft, &mut soft), step(&mut on_kvm, &mut kvm));
        assert_eq!((&exit.0, &exit.1), (&expected.0, &expected.1), "instruction {number}");
        assert_eq!(essence(&exit.2), essence(&expected.2), "instruction {number}");
        let by_program = last.segments.cs.selector & 3 == 3;
        faults += u64::from(by_program && last.cr2 != expected.2.cr2);
        last = expected.2;
    }
    faults
}

#[test]
fn the_engines_agree_at_every_exit_of_a_whole_run() {
    if !kvm_is_here() {
        return;
    }
    let _turn = take_turn();
    let kernel = Arc::from(probe(12, 200).image());
    let run = compare(&BootSource { kernel, ..BootSource::default() }, 64 << 20, None);
    assert!(run.exits > 200, "{} exits", run.exits);
    assert!(!run.console.is_empty());
}

/// From the kernel's first instruction to its first program's, and on by single steps. Not further exit by exit: to the box's CPU, which is
/// emulated, a fault of an instruction that reads and writes memory is one of a read, and another of a write
/// follows (`vmm/tests/kvm/agreement.rs`).
#[test]
#[ignore = "needs a KVM that runs Linux, and the lockstep kernel: scripts/stock-kvm"]
fn the_engines_agree_at_every_exit_of_a_whole_boot_of_the_lockstep_kernel() {
    const LAST: &str = "Run /init as init process\r\n";
    let _turn = take_turn();
    let guest = lockstep_guest(&Cache::from_environment().unwrap()).unwrap();
    let source = BootSource {
        kernel: Arc::from(std::fs::read(guest.kernel).unwrap()),
        initramfs: Some(Arc::from(std::fs::read(guest.initramfs).unwrap())),
        cmdline: cmdline::LOCKSTEP.to_owned(),
        disk: None,
    };
    let run = compare(&source, 64 << 20, Some(LAST));
    assert!(run.console.ends_with(LAST), "{}", run.console);
    assert!(run.exits > 5_000, "{} exits", run.exits);
    let steps = std::env::var("VMFT_AGREEMENT_STEPS")
        .map_or(PROGRAM_STEPS, |steps| steps.parse().expect("VMFT_AGREEMENT_STEPS is a number"));
    let steps = steps.min(MOST_PROGRAM_STEPS);
    let faults = step_on(run, steps);
    println!("{steps} instructions agree, with {faults} page faults of a program");
    assert!(faults > 0, "{steps} instructions without a page fault of a program");
}
