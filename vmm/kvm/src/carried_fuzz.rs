//! States that a user's program can bring its CPU into, at random: each is set, saved, carried to another virtual machine
//! of this host's KVM, saved there and compared. The seed is fixed; `VMFT_CPU_STATES` says how many there are.

use super::*;
use crate::FreeEngine;
use crate::tests::has_kvm;
use vmft_cpu::group::Cpus;
use vmft_cpu::kvm_state::in_the_model;
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
use vmft_cpu::state::{DescriptorTable, Segment, Segments};
use vmft_cpu::{CpuState, Engine};
use vmft_log::point::ExecutionPoint;

const SEED: u64 = 0x5EED_0017;
const STATES: u32 = 400;
/// Word of the XSAVE area that says which bits of MXCSR the host's CPU has.
const MXCSR_MASK: usize = 7;
/// Bits of RFLAGS that a user's program can set: status, TF, DF, AC, ID.
const USER_FLAGS: u64 = 0x24_0DD5;

/// Numbers of a seed, as values of a CPU.
struct Random(vmft_fuzzing::Random);

impl Random {
    fn next(&mut self) -> u64 {
        self.0.next()
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.next().is_multiple_of(count)
    }

    /// A canonical address of the lower half, which a user's segment may have for its base.
    fn address(&mut self) -> u64 {
        self.next() >> 17
    }
}

/// A segment of privilege level 3, with a base if it is `based`.
fn segment(random: &mut Random, kind: u16, selector: u16, based: bool) -> Segment {
    let base = if based { random.address() } else { 0 };
    Segment { selector, base, limit: u32::MAX, attributes: kind | 0x60 }
}

/// The registers of a user's program in 64-bit or 32-bit code.
fn registers(random: &mut Random) -> CpuState {
    let is_64_bit = random.one_in(2);
    let code = if is_64_bit { 0xA9B } else { 0xC9B };
    let general = std::array::from_fn(|_| random.next());
    let mut state = CpuState { general, ..CpuState::default() };
    state.rip = if is_64_bit { random.address() } else { random.next() >> 32 };
    state.rflags = 0x202 | random.next() & USER_FLAGS;
    state.segments = Segments {
        cs: segment(random, code, 0x3B, false),
        ss: segment(random, 0xC93, 0x33, false),
        ds: segment(random, 0xC93, 0x33, false),
        es: segment(random, 0xC93, 0x33, false),
        fs: segment(random, 0xC93, 0x33, true),
        gs: segment(random, 0xC93, 0x33, true),
        ldtr: Segment { selector: 0, base: 0, limit: 0xFFFF, attributes: 0x82 },
        tr: Segment { selector: 0x18, base: 0x8000, limit: 0x67, attributes: 0x8B },
    };
    state.gdtr = DescriptorTable { base: 0x6000, limit: 0x47 };
    state.idtr = DescriptorTable { base: 0x7000, limit: 0xFFF };
    (state.cr0, state.cr3, state.cr4) = (0x8005_0033, 0x1000, 0x6A0);
    state.cr2 = random.next();
    state.debug =
        [random.address(), random.address(), random.address(), random.address(), 0, 0, 0, 0];
    state.debug[6] = 0xFFFF_0FF0 | random.next() & 0xF;
    // Breakpoints for data and code, of any length, in any of the four; DR7 bit 10 is always set.
    state.debug[7] = 0x400 | random.next() & 0xFFFF_00FF;
    state.msrs.efer = 0xD01;
    state.msrs.kernel_gs_base = random.address();
    (state.msrs.star, state.msrs.lstar) = (0x0028_0008 << 32, random.address());
    state.msrs.sfmask = 0x4_7700;
    state.msrs.pat = 0x0007_0406_0007_0406;
    state.msrs.tsc_aux = random.next() >> 32;
    state.msrs.tsc_adjust = random.next();
    state
}

/// What KVM is given: those registers, vector units in any state, perhaps an event on its way.
fn state(random: &mut Random, before: &KvmState) -> (KvmState, OwnRegisters) {
    let registers = registers(random);
    let mut state = before.with(&registers);
    // x87 and SSE: control and status words as a program can load them, registers with anything in them.
    // No x87 exception waits, for then it would depend on the CPU what it keeps of the instruction's addresses.
    state.xsave[0] = random.next() as u32 & 0x7F00_1F3F | 0x40;
    state.xsave[1] = random.next() as u32 & 0xFF;
    for word in &mut state.xsave[8..104] {
        *word = random.next() as u32;
    }
    // The upper parts of 80-bit registers are padding.
    for register in 0..8 {
        let at = 8 + 4 * register;
        state.xsave[at + 2] &= 0xFFFF;
        state.xsave[at + 3] = 0;
    }
    let mxcsr_mask = Some(before.xsave[MXCSR_MASK]).filter(|mask| *mask != 0);
    state.xsave[6] = random.next() as u32 & mxcsr_mask.unwrap_or(0xFFFF);
    if random.one_in(4) {
        state.events.interrupt.injected = 1;
        state.events.interrupt.nr = 0x20 | random.next() as u8 & 0x1F;
    } else if random.one_in(4) {
        state.events.exception.injected = 1;
        state.events.exception.nr = 14;
        state.events.exception.has_error_code = 1;
        state.events.exception.error_code = 4 | random.next() as u32 & 3;
    } else if random.one_in(4) {
        state.events.interrupt.shadow = 1 + random.next() as u8 % 2;
    }
    (state, OwnRegisters::of(&registers))
}

fn open() -> FreeEngine {
    let ram = GuestRam::new(MIN_MEMORY).expect("memory");
    FreeEngine::open(ram).expect("/dev/kvm opens (VMFT_NO_KVM=1 says that there is none)")
}

/// What was saved, but for how far the counter of time has come.
fn saved(engine: &mut FreeEngine) -> KvmCpu {
    let Cpus::Kvm(cpus) = engine.save_cpus() else { panic!("it is KVM's") };
    KvmCpu { time_stamp: 0, ..cpus[0].clone() }
}

fn restore(engine: &mut FreeEngine, cpu: &KvmCpu) {
    let cpus = Cpus::Kvm(vec![cpu.clone()]);
    engine.restore_cpus(&cpus, ExecutionPoint::START).expect("this KVM has been in it");
}

#[test]
fn whatever_a_user_can_do_to_a_cpu_is_carried_from_one_machine_to_another() {
    if !has_kvm() {
        return;
    }
    let count = std::env::var("VMFT_CPU_STATES")
        .map_or(STATES, |count| count.parse().expect("VMFT_CPU_STATES is a number"));
    let (mut here, mut there) = (open(), open());
    let power_on = saved(&mut here);
    let first = KvmState::of_carried(&power_on).expect("a CPU of KVM's");
    let mut random = Random(vmft_fuzzing::Random::new(SEED));
    let mut taken = 0;
    for number in 0..count {
        let (wanted, own) = state(&mut random, &first);
        let cpu = wanted.to_carried(&own, Activity::Running, &power_on.cpuid, 0);
        // Whether the host's CPU can be in it, its KVM knows; if not, nothing has changed.
        let before = saved(&mut here);
        if here.restore_cpus(&Cpus::Kvm(vec![cpu.clone()]), ExecutionPoint::START).is_err() {
            assert_eq!(saved(&mut here), before, "state {number} of seed {SEED:#x} was refused");
            continue;
        }
        taken += 1;
        let set = saved(&mut here);
        let found = KvmState::of_carried(&set).expect("a CPU of KVM's");
        let named = |state: &KvmState| {
            let (regs, sregs, debug) = (state.regs, state.sregs, state.debug);
            let segments = [sregs.cs, sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs];
            // But for the mask, which is the host's.
            let units = [&state.xsave[..MXCSR_MASK], &state.xsave[MXCSR_MASK + 1..104]].concat();
            (regs, segments, sregs.cr2, debug.db, state.msrs, units)
        };
        let what = format!("state {number} of seed {SEED:#x} was not set");
        assert_eq!(named(&found), named(&wanted), "{what}");
        let bytes = postcard::to_stdvec(&set).expect("plain values always encode");
        let carried: KvmCpu = postcard::from_bytes(&bytes).expect("it was encoded");
        restore(&mut there, &carried);
        assert_eq!(saved(&mut there), set, "state {number} of seed {SEED:#x} came out changed");
        // Nobody has to know it to show it, or to say that it does not fit.
        there.save();
        let _ = in_the_model(&[set]);
    }
    assert!(taken > count / 2, "KVM took {taken} of {count}");
}
