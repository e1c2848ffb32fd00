//! The host's own breakpoints, under the guest's own code. How many branches it has retired, its registers
//! say, so no counter is needed. Where the host's KVM has no breakpoints that can be relied upon, the same
//! places are come to by steps.

use super::*;
use crate::landing::{Approached, approach};
use crate::tests::has_kvm;
use crate::trust::breakpoint;
use crate::{BranchCounter, CounterLost};
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
use vmft_cpu::soft::SoftEngine;
use vmft_cpu::state::{CpuState, DescriptorTable, Segment};
use vmft_cpu::{Bus, Engine, Exit, PortWidth};
use vmft_log::point::{Branches, ExecutionPoint};

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
/// Of #DB, which is the only exception there is.
const HANDLER: u64 = 0x9000;
const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
/// How often the handler has run.
const HANDLED: u64 = 0x30_0000;
const USED: usize = 4 << 20;
const TURNS: u64 = 200;
const TRAP_AND_RESUME: u64 = (1 << 8) | (1 << 16);

/// `mov ecx, 200`, and again and again `inc eax`, `pushfq`, `pop rdx`, `or rbx, rdx`, `dec ecx`, `jnz`;
/// `hlt`.
const LOOP: [u8; 17] =
    [0xB9, 200, 0, 0, 0, 0xFF, 0xC0, 0x9C, 0x5A, 0x48, 0x09, 0xD3, 0xFF, 0xC9, 0x75, 0xF5, 0xF4];
const FIRST: u64 = CODE + 5;
const BRANCH: u64 = CODE + 14;
const END: u64 = CODE + 17;

#[derive(Debug)]
struct NoBus;

impl Bus for NoBus {
    fn port_read(&mut self, _: ExecutionPoint, _: u16, _: PortWidth) -> u32 {
        0
    }
    fn port_write(&mut self, _: ExecutionPoint, _: u16, _: PortWidth, _: u32) {}
    fn memory_read(&mut self, _: ExecutionPoint, _: u64, _: &mut [u8]) {}
    fn memory_write(&mut self, _: ExecutionPoint, _: u64, _: &[u8]) {}
    fn time_stamp(&mut self, _: ExecutionPoint) -> u64 {
        0
    }
}

/// Counts nothing, and does not need the guest to be stepped.
#[derive(Debug)]
struct Silent;

impl BranchCounter for Silent {
    fn count(&mut self) -> Result<Branches, CounterLost> {
        Ok(Branches(0))
    }
    fn arm(&mut self, _: Branches) -> Result<(), CounterLost> {
        Ok(())
    }
    fn disarm(&mut self) -> Result<(), CounterLost> {
        Ok(())
    }
    fn margin(&self) -> Branches {
        Branches(0)
    }

    fn needs_steps(&self) -> bool {
        false
    }

    fn stepped(&mut self, _: bool) -> bool {
        false
    }
}

fn ram() -> GuestRam {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    let write = |address, words: &[u64]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        ram.memory().write_slice(&bytes, GuestAddress(address)).unwrap();
    };
    write(PML4, &[PDPT | 0x23]);
    write(PDPT, &[PD | 0x23]);
    write(PD, &(0..512).map(|index| (index << 21) | 0xE3).collect::<Vec<u64>>());
    write(GDT, &[0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF]);
    write(IDT + 16, &[(HANDLER & 0xFFFF) | (0x08 << 16) | (0x8E << 40), 0]);
    // `inc qword [HANDLED]`, `iretq`
    let mut handler = vec![0x48, 0xFF, 0x04, 0x25];
    handler.extend((HANDLED as u32).to_le_bytes());
    handler.extend([0x48, 0xCF]);
    ram.memory().write_slice(&handler, GuestAddress(HANDLER)).unwrap();
    ram.memory().write_slice(&LOOP, GuestAddress(CODE)).unwrap();
    ram
}

/// About to execute the loop, at privilege level 0.
fn start() -> CpuState {
    let segment = |selector, attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
    let mut state = CpuState { rip: CODE, rflags: 2, ..CpuState::default() };
    state.general[4] = STACK;
    (state.cr0, state.cr3, state.cr4) = (0x8005_0033, PML4, 0x6A0);
    state.msrs.efer = 0xD00;
    state.msrs.pat = 0x0007_0406_0007_0406;
    (state.debug[6], state.debug[7]) = (0xFFFF_0FF0, 0x400);
    state.gdtr = DescriptorTable { base: GDT, limit: 0x17 };
    state.idtr = DescriptorTable { base: IDT, limit: 0xFFF };
    let (data, s) = (segment(0x10, 0xC93), &mut state.segments);
    (s.cs, s.ss, s.ds, s.es, s.fs, s.gs) = (segment(0x08, 0xA9B), data, data, data, data, data);
    s.tr = Segment { selector: 0x18, base: 0x8000, limit: 0x67, attributes: 0x8B };
    s.ldtr = Segment { selector: 0, base: 0, limit: 0xFFFF, attributes: 0x82 };
    state
}

fn engine(state: &CpuState) -> KvmEngine {
    let mut engine = KvmEngine::open_counting(ram(), Box::new(Silent))
        .expect("/dev/kvm opens (VMFT_NO_KVM=1 says that there is none)");
    engine.restore(state, ExecutionPoint::START).unwrap();
    engine
}

/// The engine on its way, with a count that the registers give.
struct ByRegisters<'a>(Approach<'a>);

impl Ground for ByRegisters<'_> {
    type Exit = Ended;

    fn since_exit(&mut self) -> Result<Branches, CounterLost> {
        let engine = &mut *self.0.engine;
        let regs = engine.vcpu.stop().regs().unwrap();
        let mut rip = regs.rip;
        if (HANDLER..HANDLER + 0x10).contains(&rip) {
            // Where it returns to.
            rip = engine.ram().memory().read_obj(GuestAddress(regs.rsp)).unwrap();
        }
        Ok(Branches(match rip {
            CODE => 0,
            BRANCH => TURNS - regs.rcx - 1,
            _ => TURNS - regs.rcx,
        }))
    }
    fn arm(&mut self, _: Option<Branches>) -> Result<(), CounterLost> {
        Ok(())
    }
    fn run(&mut self) -> Option<Ended> {
        self.0.run()
    }
    fn run_to(&mut self, branch: CodeAddress) -> Result<Reached, Ended> {
        self.0.run_to(branch)
    }
    fn step(&mut self) -> Option<Ended> {
        self.0.step()
    }
    fn misled(&mut self) {
        self.0.misled();
    }
}

const MARGIN: Branches = Branches(40);

fn go(engine: &mut KvmEngine, target: Option<u64>, hint: Option<u64>) -> Approached<Ended> {
    let mut bus = NoBus;
    let way = Approach { engine, bus: &mut bus, want: false, kicked: false, overflowed: false };
    let hint = hint.map(|hint| CodeAddress::try_from(hint).unwrap());
    approach(&mut ByRegisters(way), target.map(Branches), MARGIN, hint).unwrap()
}

fn memory(ram: &GuestRam) -> Vec<u8> {
    let mut memory = vec![0; USED];
    ram.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
    memory
}

/// What the guest comes to without anybody looking.
fn undisturbed(state: &CpuState) -> (CpuState, Vec<u8>) {
    let mut soft = SoftEngine::new(ram());
    soft.restore(state, ExecutionPoint::START).unwrap();
    let exit = soft.run(ExecutionPoint::NEVER, false, &mut NoBus);
    assert_eq!(exit, Exit::Halted { interruptible: false });
    (soft.save(), memory(soft.ram()))
}

/// Lands on `target`, then lets the guest run to its end: nothing of that is to be seen in it.
fn land_unseen(state: &CpuState, target: u64, hint: Option<u64>) -> KvmEngine {
    let mut engine = engine(state);
    let landed = Approached::Landed { at: Branches(target), overshot_by: None };
    assert_eq!(go(&mut engine, Some(target), hint), landed, "{target}");
    let here = engine.save();
    assert_eq!((here.general[1], here.general[0]), (TURNS - target, target));
    while engine.halted == super::super::Halted::No {
        assert_eq!(go(&mut engine, None, None), Approached::Ended(None), "{target}");
    }
    let (end, written) = undisturbed(state);
    assert_eq!((end.rip, engine.save()), (END, end), "{target}");
    assert!(memory(engine.ram()) == written, "{target}: memory differs");
    engine
}

#[test]
fn a_breakpoint_stops_the_guest_in_front_of_the_branch_and_leaves_no_trace() {
    if !has_kvm() {
        return;
    }
    let trusted = breakpoint::trusted();
    println!("{trusted:?}");
    for target in [1, 2, 3, 50, 128, 150] {
        let engine = land_unseen(&start(), target, Some(BRANCH));
        let stats = engine.landing_stats().unwrap();
        if trusted.kernel {
            assert_eq!((stats.breakpoint_hits, stats.steps), (target, target));
        } else {
            assert_eq!(stats.breakpoint_hits, 0);
        }
        let stepped = land_unseen(&start(), target, None).landing_stats().unwrap();
        assert_eq!((stepped.breakpoint_hits, stepped.steps), (0, 6 * target + 1));
        let mut engine = engine;
        assert_eq!(engine.save().general[3] & TRAP_AND_RESUME, 0, "the guest sees no flag");
    }
}

#[test]
fn a_guest_that_steps_itself_is_stepped() {
    if !has_kvm() {
        return;
    }
    let mut engine = engine(&CpuState { rflags: 0x102, ..start() });
    let landed = Approached::Landed { at: Branches(20), overshot_by: None };
    assert_eq!(go(&mut engine, Some(20), Some(BRANCH)), landed);
    assert_eq!(engine.landing_stats().unwrap().breakpoint_hits, 0);
    // One for every instruction; that for the last is not handled yet.
    let handled: u64 = engine.ram().memory().read_obj(GuestAddress(HANDLED)).unwrap();
    assert_eq!(handled, 6 * 20);
}

#[test]
fn a_debug_exception_of_the_guests_own_reaches_its_handler() {
    if !has_kvm() {
        return;
    }
    // Delivered by KVM, and by the engine.
    for target in [None, Some(20)] {
        let mut engine = engine(&start());
        engine.vcpu.stop().raise_debug_exception(1 << 14).unwrap();
        go(&mut engine, target, None);
        let handled: u64 = engine.ram().memory().read_obj(GuestAddress(HANDLED)).unwrap();
        assert_eq!((handled, engine.save().debug[6]), (1, 0xFFFF_4FF0), "{target:?}");
    }
}

#[test]
fn a_trap_is_the_breakpoints_if_it_is_there_and_the_guest_has_no_part_in_it() {
    let trap = |pc, dr6| kvm_debug_exit_arch { pc, dr6, ..Default::default() };
    let address = CodeAddress::try_from(BRANCH).unwrap();
    assert!(is_for(&trap(BRANCH, 0xFFFF_0FF1), address));
    // As if others were met too, which are not enabled.
    assert!(is_for(&trap(BRANCH, 0xFFFF_0FF7), address));
    assert!(!is_for(&trap(BRANCH, 0xFFFF_4FF1), address), "a step of the guest's own led there");
    assert!(!is_for(&trap(BRANCH, 0xFFFF_2FF0), address), "the guest watches its registers");
    assert!(!is_for(&trap(BRANCH, 0xFFFF_0FF0), address), "an exception of the guest's own");
    assert!(!is_for(&trap(FIRST, 0xFFFF_0FF1), address), "another place");
}

#[test]
fn a_guest_with_breakpoints_of_its_own_is_stepped() {
    if !has_kvm() {
        return;
    }
    let mut state = start();
    // For writes to an address that it never writes to.
    state.debug[0] = HANDLED + 0x100;
    state.debug[7] = 0x400 | 1 | (0b01 << 16);
    let engine = land_unseen(&state, 30, Some(BRANCH));
    assert_eq!(engine.landing_stats().unwrap().breakpoint_hits, 0);
}

#[test]
fn where_there_is_no_branch_no_breakpoint_is_set() {
    if !has_kvm() {
        return;
    }
    // Another instruction, and no memory.
    for hint in [FIRST, BRANCH + 1, 1 << 40, u64::MAX] {
        let engine = land_unseen(&start(), 30, Some(hint));
        assert_eq!(engine.landing_stats().unwrap().breakpoint_hits, 0, "{hint:#x}");
    }
}
