//! The state of a machine, as a snapshot, a join and an epoch carry it.

use crate::inputs::{Gate, World, is_over};
use std::error::Error;
use std::num::NonZeroU32;
use vm_memory::{Bytes as _, GuestAddress};
use vmft_cpu::CpuCount;
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};
use vmft_fuzzing::{Random, cases, change, damage, peak_of};
use vmft_guest_images::probe::ProbeGuest;
use vmft_vmm::board::{BoardConfig, Bytes, DiskConfig, NetConfig, UnixSeconds};
use vmft_vmm::devices::virtio::net::addresses::MacAddress;
use vmft_vmm::engine::EngineKind;
use vmft_vmm::machine::{
    BootSource, Machine, MachineConfig, MachineError, MachineState, RunEnd, StateError,
};

/// Cases of a quick run.
const CASES: u64 = 800;
/// How many bad states are made of each good one.
const EACH: usize = 10;
/// Steps of the good machine, at most, and of one with a bad state.
const BEFORE: u32 = 40;
const AFTER: u32 = 24;
/// What decoding a state of so many bytes may take of memory: lists of the largest things there are.
const fn worth(bytes: usize) -> usize {
    (1 << 20) + bytes * 64
}

/// Instructions that look at what a state has in it, beside the guest's own.
const CODE: &[&[u8]] = &[
    &[0x48, 0x89, 0xE3],                   // mov rbx, rsp
    &[0x48, 0x83, 0xE3, 0xC0],             // and rbx, -64
    &[0x0F, 0xAE, 0x03],                   // fxsave [rbx]
    &[0x0F, 0xAE, 0x0B],                   // fxrstor [rbx]
    &[0xD9, 0x33],                         // fnstenv [rbx]
    &[0xDD, 0x33],                         // fnsave [rbx]
    &[0xD9, 0xC0],                         // fld st(0)
    &[0xD9, 0xF8],                         // fprem
    &[0xD9, 0xFE],                         // fsin
    &[0xDF, 0x33],                         // fbstp [rbx]
    &[0xDB, 0x3B],                         // fstp tword [rbx]
    &[0xD9, 0xF6],                         // fdecstp
    &[0x0F, 0xFC, 0xC1],                   // paddb mm0, mm1
    &[0xF2, 0x0F, 0x58, 0xC1],             // addsd xmm0, xmm1
    &[0x66, 0x0F, 0x3A, 0x63, 0xC1, 0x1A], // pcmpistri xmm0, xmm1, 0x1a
    &[0x0F, 0x20, 0xC0],                   // mov rax, cr0
    &[0x44, 0x0F, 0x20, 0xC0],             // mov rax, cr8
    &[0x0F, 0x21, 0xF8],                   // mov rax, dr7
    &[0x0F, 0x01, 0xF8],                   // swapgs
    &[0x0F, 0x31],                         // rdtsc
    &[0xCC],                               // int3
    &[0x9C, 0x9D],                         // pushfq; popfq
    &[0xCD, 0x30],                         // int 0x30
    &[0xFB, 0xF4],                         // sti; hlt
    &[0xE4, 0x60],                         // in al, 0x60
];

/// A small board with a disk and a network, and a guest that computes, prints, and waits for the timer.
pub fn probe() -> Machine {
    let disk = DiskConfig { capacity: Bytes(1 << 20), read_only: false, serial: "disk".to_owned() };
    let config = MachineConfig {
        board: BoardConfig {
            memory: Bytes(MIN_MEMORY),
            clock_base: UnixSeconds(1_700_000_000),
            disks: vec![disk],
            entropy: true,
            net: Some(NetConfig { mac: MacAddress([2, 0, 0, 0, 0, 7]), offloads: true }),
            cpus: CpuCount::ONE,
        },
        engine: EngineKind::Soft,
    };
    let guest =
        ProbeGuest { rounds: NonZeroU32::new(20).unwrap(), ticks: 1, ..ProbeGuest::default() };
    let kernel = guest.image().into();
    Machine::new(config, BootSource { kernel, ..BootSource::default() }).unwrap()
}

/// The machine after a while.
pub fn used(random: &mut Random) -> Machine {
    let mut machine = probe();
    machine.keep_completed_writes();
    let steps = random.below(BEFORE.into()) as u32;
    let mut world = World::new(random.clone(), steps);
    machine.run(&mut world, &Gate::default()).unwrap();
    machine
}

/// What comes of a state, if it still can be read; by its values, or by its bytes.
fn gone_bad(random: &mut Random, state: &MachineState, others: &[Vec<u8>]) -> Option<MachineState> {
    if random.chance(80) {
        let mut value = serde_json::to_value(state).unwrap();
        if random.chance(3) {
            value["cpus"] = serde_json::json!({ "Kvm": [] });
        }
        change(random, &mut value);
        return serde_json::from_value(value).ok();
    }
    let mut bytes = state.encode();
    damage(random, &mut bytes, others);
    let (decoded, peak) = peak_of(|| MachineState::decode(&bytes));
    assert!(peak <= worth(bytes.len()), "{peak} bytes for {}", bytes.len());
    decoded.ok()
}

/// A machine with this state runs, or is refused. True if it ran.
pub fn taken(random: &mut Random, state: MachineState, ram: GuestRam) -> bool {
    let bytes = state.encode();
    let mut machine = match Machine::restore(state, ram) {
        Ok(machine) => machine,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return false;
        }
    };
    assert!(machine.state().encode() == bytes, "what was restored is not what was saved");
    run_on(random, &mut machine);
    true
}

/// Whatever the guest does now is the guest's doing, and may not be a fault of this program.
pub fn run_on(random: &mut Random, machine: &mut Machine) {
    let reports = tempfile::tempdir().unwrap();
    machine.report_faults_in(reports.path().to_owned());
    let mut world = World::new(random.clone(), AFTER);
    match machine.run(&mut world, &Gate::default()) {
        Ok(RunEnd::Paused) => {
            let bytes = machine.state().encode();
            MachineState::decode(&bytes).unwrap();
        }
        Ok(RunEnd::Stopped(reason)) => assert!(is_over(reason), "{reason:?}"),
        Ok(end) => panic!("{end:?}"),
        Err(MachineError::Broken(report)) => panic!("{report}"),
        // What this program cannot do it says; an arrival may not fit; a kernel that went bad does not boot.
        Err(MachineError::Engine(_) | MachineError::Delivery { .. } | MachineError::Reset(_)) => {}
        Err(error) => panic!("{error}"),
    }
    random.next();
}

#[test]
fn a_saved_machine_gone_bad_is_refused_or_runs() {
    let (mut decoded, mut ran) = (0u64, 0u64);
    cases(CASES, |mut random| {
        let mut machine = used(&mut random);
        let others = [used(&mut random).state().encode()];
        for _ in 0..EACH {
            let (state, source) = machine.state().into_parts();
            let Some(bad) = gone_bad(&mut random, &state, &others) else { continue };
            decoded += 1;
            if random.chance(50) {
                let value = serde_json::to_value(&bad).unwrap();
                let rip = value["cpus"]["Model"]["rip"].as_u64().unwrap_or_default();
                let code = (0..30).flat_map(|_| random.pick(CODE).iter().copied());
                let code = code.collect::<Vec<_>>();
                // Where it runs: what is mapped there is there. Elsewhere it gets a fault.
                let _ = machine.ram().memory().write_slice(&code, GuestAddress(rip));
            }
            let ram = machine.ram().clone();
            ran += u64::from(taken(&mut random, bad.with_source(source), ram));
        }
    });
    println!("{decoded} decoded, {ran} ran");
}

#[test]
fn what_a_reset_boots_from_gone_bad_is_refused_when_it_is_needed() {
    let good = probe().boot_source().encode();
    cases(CASES / 10, |mut random| {
        for _ in 0..EACH {
            let mut bytes = good.clone();
            damage(&mut random, &mut bytes, std::slice::from_ref(&good));
            let (decoded, peak) = peak_of(|| BootSource::decode(&bytes));
            assert!(peak <= worth(bytes.len()), "{peak} bytes for {}", bytes.len());
            let Ok(source) = decoded else { continue };
            let mut machine = probe();
            let (state, _) = machine.state().into_parts();
            let mut value = serde_json::to_value(&state).unwrap();
            // A triple fault at the next instruction: there are no handlers.
            value["cpus"]["Model"]["idtr"]["limit"] = 0.into();
            value["cpus"]["Model"]["rip"] = 0x3FF_FFFFu64.into();
            let state: MachineState = serde_json::from_value(value).unwrap();
            taken(&mut random, state.with_source(source), machine.ram().clone());
        }
    });
}

/// A state whose values were changed like this is refused, with words to that effect.
#[track_caller]
fn assert_refused(alter: impl FnOnce(&mut serde_json::Value), says: &str) -> StateError {
    let mut machine = probe();
    let (state, source) = machine.state().into_parts();
    let mut value = serde_json::to_value(&state).unwrap();
    alter(&mut value);
    let state: MachineState = serde_json::from_value(value).unwrap();
    let error = Machine::restore(state.with_source(source), machine.ram().clone())
        .expect_err("no machine can be in that state");
    let mut text = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push(error.to_string());
        cause = error.source();
    }
    assert!(text.concat().contains(says), "{text:?}");
    error
}

#[test]
fn a_state_of_another_version_is_refused_in_every_form() {
    let error = assert_refused(|state| state["version"] = 6.into(), "version 6");
    assert!(matches!(error, StateError::Version { found: 6 }), "{error:?}");
}

#[test]
fn completed_writes_of_a_disk_that_is_not_there_are_refused() {
    assert_refused(|state| state["completed"] = serde_json::json!([]), "another machine");
    let another = |state: &mut serde_json::Value| {
        let first = state["completed"][0].clone();
        state["completed"].as_array_mut().unwrap().push(first);
    };
    assert_refused(another, "another machine");
}

#[test]
fn counts_that_no_machine_gets_to_are_refused() {
    let most = 1u64 << 62;
    assert_refused(|state| state["point"] = (most + 1).into(), "a point of 4611686018427387905");
    assert_refused(|state| state["outputs"] = u64::MAX.into(), "number of outputs");
    assert_refused(|state| state["console_offset"] = u64::MAX.into(), "console bytes");
    let last = |device| {
        move |state: &mut serde_json::Value| {
            let function = match device {
                "disks" => &mut state["board"]["functions"][device][0],
                _ => &mut state["board"]["functions"][device],
            };
            function["device"]["last"] = (most + 1).into();
        }
    };
    assert_refused(last("disks"), "beyond all requests");
    assert_refused(last("entropy"), "beyond all requests");
}

#[test]
fn a_clock_that_stands_still_or_was_corrected_in_the_future_is_refused() {
    assert_refused(|state| state["clock"]["rate"] = 0.into(), "clock rate of 0");
    assert_refused(|state| state["clock"]["rate"] = u64::MAX.into(), "clock rate");
    assert_refused(|state| state["clock"]["sync_time"] = u64::MAX.into(), "guest time");
    assert_refused(|state| state["clock"]["sync_point"] = 9_000_000.into(), "clock correction");
}

#[test]
fn effects_that_no_device_has_asked_for_are_refused() {
    let effect = |effect: serde_json::Value| {
        move |state: &mut serde_json::Value| state["board"]["effects"] = serde_json::json!([effect])
    };
    let operation = serde_json::json!({ "Read": { "offset": 0, "len": 512 } });
    let disk = serde_json::json!({ "Disk": { "disk": 200, "request": 1, "operation": operation } });
    assert_refused(effect(disk), "no device has asked for");
    let entropy = serde_json::json!({ "Entropy": { "request": 1, "len": u32::MAX } });
    assert_refused(effect(entropy), "no device has asked for");
    assert_refused(effect(serde_json::json!({ "Console": [] })), "no device has asked for");
}

#[test]
fn registers_that_no_cpu_has_are_refused() {
    assert_refused(|state| state["cpus"]["Model"]["rflags"] = 0.into(), "RFLAGS 0x0");
    assert_refused(|state| state["cpus"]["Model"]["cr8"] = 16.into(), "CR8 0x10");
}

#[test]
fn addresses_that_no_guest_has_are_refused() {
    for addresses in [["224.0.0.1", "10.0.0.1"], ["10.0.0.2", "10.0.0.2"]] {
        let learned = |state: &mut serde_json::Value| {
            let network = &mut state["board"]["functions"]["net"]["device"];
            network["addresses"]["ipv4"] = serde_json::json!(addresses);
        };
        assert_refused(learned, "cannot have been learned");
    }
}
