//! The two engines agree: the start of a distribution's kernel, instruction by instruction.
//!
//! Both engines execute the default guest's kernel from its first instruction, on memories of their
//! own, with the same answers at the bus, and are compared after every instruction: general
//! registers, RIP, flags and control registers, and at the end all memory.
//!
//! `VMFT_AGREEMENT_STEPS` says how many instructions (default: enough for a quick run).
//! What `CPUID` says differs: to `soft` a guest has a time stamp counter, and some KVMs show the host's bits whatever
//! they are told. Both sides go on with what `soft` says.
//!
//! An instruction that this host's KVM cannot execute at all (a gap of its emulator) is executed by `soft`
//! on both sides; how many those were is printed, and they may be few only.

use crate::engines::{kvm_is_here, take_turn};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, RflagsBits};
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
use vmft_cpu::soft::SoftEngine;
use vmft_cpu::{Bus, CpuState, Engine, Exit, PortWidth};
use vmft_guest_images::{Cache, NoProgress, default_guest};
use vmft_kvm::{KvmEngine, PointKind};
use vmft_log::point::ExecutionPoint;
use vmft_vmm::boot;

const DEFAULT_STEPS: u64 = 20_000;
/// One instruction in so many may be a gap.
const GAPS: u64 = 100;
/// What the kernel's own mapping begins at.
const KERNEL_MAP: u64 = 0xFFFF_FFFF_8000_0000;

/// Nothing is connected; what was done is remembered, with the number of the instruction.
#[derive(Debug, Default, PartialEq, Eq)]
struct Nothing {
    now: u64,
    seen: Vec<(u64, u64, u64)>,
}

impl Nothing {
    fn see(&mut self, address: u64, value: u64) {
        self.seen.push((self.now, address, value));
    }
}

impl Bus for Nothing {
    fn port_read(&mut self, _: ExecutionPoint, port: u16, width: PortWidth) -> u32 {
        self.see(port.into(), 0);
        u32::MAX >> (32 - 8 * width.bytes())
    }
    fn port_write(&mut self, _: ExecutionPoint, port: u16, _: PortWidth, value: u32) {
        self.see(port.into(), value.into());
    }
    fn memory_read(&mut self, _: ExecutionPoint, address: u64, data: &mut [u8]) {
        self.see(address, 0);
        data.fill(0xFF);
    }
    fn memory_write(&mut self, _: ExecutionPoint, address: u64, data: &[u8]) {
        self.see(address, data.len() as u64);
    }
    fn time_stamp(&mut self, _: ExecutionPoint) -> u64 {
        self.now
    }
}

struct Side<E> {
    engine: E,
    bus: Nothing,
}

impl<E: Engine> Side<E> {
    /// Instruction `number`. A string instruction is one, however many points it takes.
    fn step(&mut self, number: u64, string_at: Option<u64>) -> Exit {
        self.bus.now = number;
        loop {
            let next = self.engine.point().after(1);
            let exit = self.engine.run(next, false, &mut self.bus);
            let state = self.engine.save();
            let again = Some(state.rip) == string_at && state.general[1] != 0;
            if exit != Exit::Kicked && !(exit == Exit::Bound && again) {
                return exit;
            }
        }
    }
}

/// Flags that the manuals leave undefined, at their places in RFLAGS.
fn places(bits: u32) -> u64 {
    let places = [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ];
    let set = places.into_iter().filter(|(bit, _)| bits & bit != 0);
    set.fold(0, |flags, (_, place)| flags | 1 << place)
}

/// The instruction about to be executed. The kernel's pages are where its first tables map them: the
/// lowest memory, or the kernel's own mapping of it.
fn next_instruction(ram: &GuestRam, state: &CpuState) -> Option<Instruction> {
    let physical = translate(ram, state.cr3, state.rip)?;
    let mut bytes = [0; 15];
    ram.memory().read_slice(&mut bytes, GuestAddress(physical)).ok()?;
    Some(Decoder::with_ip(64, &bytes, state.rip, DecoderOptions::NONE).decode())
}

fn translate(ram: &GuestRam, cr3: u64, address: u64) -> Option<u64> {
    const FRAME: u64 = 0x000F_FFFF_FFFF_F000;
    let mut table = cr3 & FRAME;
    for level in (0..4).rev() {
        let shift = 12 + 9 * level;
        let slot = GuestAddress(table + ((address >> shift) & 0x1FF) * 8);
        let entry: u64 = ram.memory().read_obj(slot).ok()?;
        if entry & 1 == 0 {
            return None;
        }
        let within = (1 << shift) - 1;
        if level == 0 || (level < 3 && entry & 0x80 != 0) {
            return Some((entry & FRAME & !within) | (address & within));
        }
        table = entry & FRAME;
    }
    None
}

fn essence(state: &CpuState, undefined: u64) -> ([u64; 16], u64, u64, [u64; 5]) {
    let control = [state.cr0, state.cr2, state.cr3, state.cr4, state.msrs.efer];
    (state.general, state.rip, state.rflags & !undefined, control)
}

/// What `kvm` cannot do, `soft` does on its memory.
fn fill_gap(kvm: &mut Side<KvmEngine>) {
    let mut soft = SoftEngine::new(kvm.engine.ram().clone());
    let state = kvm.engine.save();
    soft.restore(&state, kvm.engine.point()).unwrap();
    let exit = soft.run(soft.point().after(1), false, &mut kvm.bus);
    assert!(!matches!(exit, Exit::Fatal(_)), "{exit:?}");
    let state = soft.save();
    kvm.engine.restore(&state, soft.point()).unwrap();
}

fn steps() -> u64 {
    std::env::var("VMFT_AGREEMENT_STEPS")
        .map_or(DEFAULT_STEPS, |value| value.parse().expect("VMFT_AGREEMENT_STEPS is a number"))
}

#[test]
fn the_engines_agree_after_every_instruction_of_a_kernels_start() {
    if !kvm_is_here() {
        return;
    }
    let _turn = take_turn();
    let guest = default_guest(&Cache::from_environment().unwrap(), &mut NoProgress).unwrap();
    let kernel = std::fs::read(guest.kernel).unwrap();
    let memory = || GuestRam::new(4 * MIN_MEMORY).unwrap();
    let (ram, other) = (memory(), memory());
    let start = boot::load(&ram, &kernel, None, "nokaslr console=ttyS0").unwrap();
    assert_eq!(start, boot::load(&other, &kernel, None, "nokaslr console=ttyS0").unwrap());
    let engine = KvmEngine::open(other, PointKind::Step)
        .expect("/dev/kvm opens (VMFT_NO_KVM=1 says that there is none)");
    let mut soft = Side { engine: SoftEngine::new(ram), bus: Nothing::default() };
    let mut kvm = Side { engine, bus: Nothing::default() };
    soft.engine.restore(&start, ExecutionPoint::START).unwrap();
    kvm.engine.restore(&start, ExecutionPoint::START).unwrap();

    let (steps, mut gaps, mut undefined, mut state) = (steps(), 0, 0, start);
    let mut mapped_high = false;
    for number in 1..=steps {
        let next = next_instruction(soft.engine.ram(), &state);
        let repeats = |next: &Instruction| next.has_rep_prefix() || next.has_repne_prefix();
        let string = next.filter(|next| next.is_string_instruction() && repeats(next));
        let string_at = string.map(|_| state.rip);
        let expected = soft.step(number, string_at);
        let mut exit = kvm.step(number, string_at);
        if let Exit::Fatal(fault) = &exit {
            assert!(fault.what.contains("cannot emulate"), "instruction {number}: {fault}");
            gaps += 1;
            fill_gap(&mut kvm);
            exit = expected.clone();
        }
        assert_eq!(exit, expected, "instruction {number} at {:#x}", state.rip);
        if let Some(next) = next {
            let set = next.rflags_written() | next.rflags_cleared() | next.rflags_set();
            undefined = undefined & !places(set) | places(next.rflags_undefined());
        }
        let (here, mut there) = (soft.engine.save(), kvm.engine.save());
        if next.is_some_and(|next| next.mnemonic() == Mnemonic::Cpuid) {
            there.general[..4].copy_from_slice(&here.general[..4]);
            kvm.engine.restore(&there, kvm.engine.point()).unwrap();
        }
        assert_eq!(
            essence(&there, undefined),
            essence(&here, undefined),
            "after instruction {number}, {next:?} at {:#x}",
            state.rip
        );
        mapped_high |= here.rip >= KERNEL_MAP;
        state = here;
        if matches!(exit, Exit::Halted { .. } | Exit::Shutdown) {
            panic!("the kernel stopped after {number} instructions: {exit:?}");
        }
    }
    assert_eq!(kvm.bus, soft.bus);
    assert!(mapped_high, "the kernel never came to its own mapping");
    let page = |ram: &GuestRam, address| {
        let mut bytes = [0; 4096];
        ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    };
    for address in (0..4 * MIN_MEMORY).step_by(4096) {
        let same = page(soft.engine.ram(), address) == page(kvm.engine.ram(), address);
        assert!(same, "memory at {address:#x}");
    }
    println!("{steps} instructions agree; {gaps} of them this host's KVM does not know");
    assert!(gaps <= steps / GAPS, "{gaps} gaps in {steps} instructions");
}
