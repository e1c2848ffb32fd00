//! Several CPUs at a time: rest, states, and being off. The second CPU is put where it runs by its state, because
//! starting one takes it through modes that not every KVM has; Linux does that in `tests/kvm/linux_cpus.rs`.

use crate::guest::{
    TestBus, assemble, copy_memory, has_kvm, initial_state, prepared_ram, read_word,
};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::group::Activity;
use vmft_cpu::memory::GuestRam;
use vmft_cpu::{Bus, CpuCount, Cpus, Engine, Exit, KvmCpu};
use vmft_kvm::FreeEngine;
use vmft_kvm::GroupEngine;
use vmft_log::point::ExecutionPoint;

/// Where each CPU counts, and the second finds its program: beside each other's, in memory nobody else uses.
const COUNTERS: [u64; 2] = [0x7_0000, 0x7_1000];
const SECOND_CODE: u64 = 0x7_2000;

fn open(ram: GuestRam) -> GroupEngine {
    let two = CpuCount::try_from(2u8).unwrap();
    GroupEngine::open(ram, two).expect("/dev/kvm opens (VMFT_NO_KVM=1 says that there is none)")
}

/// Counts at `counter` for ever, and says so at a port now and then.
fn counting(counter: u64, port: u32) -> Vec<u8> {
    assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(qword_ptr(counter)).unwrap();
        a.test(word_ptr(counter), 0xFFF).unwrap();
        a.jne(again).unwrap();
        a.out(port, al).unwrap();
        a.jmp(again).unwrap();
    })
}

/// Two CPUs that count, the second started by its state.
fn two_that_count() -> GroupEngine {
    let ram = prepared_ram(&counting(COUNTERS[0], 0x80));
    ram.memory().write_slice(&counting(COUNTERS[1], 0x81), GuestAddress(SECOND_CODE)).unwrap();
    let mut engine = open(ram);
    let state = initial_state();
    engine.restore(&state, ExecutionPoint::START).unwrap();
    let mut cpus = saved(&mut engine);
    assert_eq!(cpus[1].activity, Activity::Unstarted, "as after power-on");
    let mut second = initial_state();
    second.rip = SECOND_CODE;
    second.general[4] -= 0x800;
    cpus[1] = cpus[1].with_registers(&second).unwrap();
    cpus[1].activity = Activity::Running;
    engine.restore_cpus(&Cpus::Kvm(cpus), ExecutionPoint::START).unwrap();
    engine
}

/// The CPUs, but for how far their counters of time have come meanwhile.
fn saved(engine: &mut GroupEngine) -> Vec<KvmCpu> {
    let Cpus::Kvm(mut cpus) = engine.save_cpus() else { panic!("they are KVM's") };
    cpus.iter_mut().for_each(|cpu| cpu.time_stamp = 0);
    cpus
}

fn counts(engine: &GroupEngine) -> [u64; 2] {
    COUNTERS.map(|counter| read_word(engine.ram(), counter))
}

/// Runs until each CPU has counted beyond `least`.
fn run_beyond(engine: &mut GroupEngine, bus: &mut dyn Bus, least: [u64; 2]) {
    while counts(engine).iter().zip(least).any(|(count, least)| *count <= least) {
        let exit = engine.run(ExecutionPoint::NEVER, false, bus);
        assert!(matches!(exit, Exit::Bound | Exit::BusAccess), "{exit:?}");
    }
}

#[test]
fn two_cpus_run_at_a_time_and_at_rest_neither_does() {
    if !has_kvm() {
        return;
    }
    let (mut engine, mut bus) = (two_that_count(), TestBus::default());
    for _ in 0..20 {
        let before = counts(&engine);
        run_beyond(&mut engine, &mut bus, before);
        engine.rest(&mut bus);
        let (cpus, counted) = (saved(&mut engine), counts(&engine));
        engine.collect_written();
        let written = engine.ram().tracker().take_written();
        for counter in COUNTERS {
            assert!(written.iter().any(|page| page.address() == GuestAddress(counter)));
        }
        assert!(!engine.rest(&mut bus), "nothing is left to be done");
        assert_eq!(saved(&mut engine), cpus);
        assert_eq!(counts(&engine), counted);
        engine.collect_written();
        assert!(engine.ram().tracker().take_written().is_empty(), "nobody writes at rest");
    }
}

#[test]
fn two_cpus_go_on_elsewhere_from_where_they_were_saved() {
    if !has_kvm() {
        return;
    }
    let (mut engine, mut bus) = (two_that_count(), TestBus::default());
    run_beyond(&mut engine, &mut bus, [10_000; 2]);
    engine.rest(&mut bus);
    let (cpus, point) = (saved(&mut engine), engine.point());
    let Cpus::Kvm(exact) = engine.save_cpus() else { panic!("it is KVM's") };
    let ram = GuestRam::new(engine.ram().size()).unwrap();
    copy_memory(engine.ram(), &ram);
    drop(engine);
    let mut other = open(ram);
    // Twice: what comes soon after another state is taken as it is, too.
    for _ in 0..2 {
        other.restore_cpus(&Cpus::Kvm(exact.clone()), point).unwrap();
        let Cpus::Kvm(there) = other.save_cpus() else { panic!("it is KVM's") };
        let counters = there.iter().map(|cpu| cpu.time_stamp);
        let last = exact.iter().map(|cpu| cpu.time_stamp).max();
        assert!(counters.min() >= last, "{there:?} after {exact:?}");
    }
    assert_eq!((saved(&mut other), other.point()), (cpus, point));
    let before = counts(&other);
    run_beyond(&mut other, &mut bus, before.map(|count| count + 10_000));
}

#[test]
fn a_state_of_more_or_fewer_cpus_or_of_none_that_can_be_is_refused() {
    if !has_kvm() {
        return;
    }
    let mut engine = two_that_count();
    let cpus = saved(&mut engine);
    let refused = |engine: &mut GroupEngine, cpus: Cpus, says: &str| {
        let error = engine.restore_cpus(&cpus, ExecutionPoint::START).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    let one = Cpus::Model(Box::new(initial_state()));
    refused(&mut engine, one, "it has 1 CPUs, this machine 2");
    let three = [&cpus[..], &cpus[1..]].concat();
    refused(&mut engine, Cpus::Kvm(three), "it has 3 CPUs, this machine 2");
    let mut alone = FreeEngine::open(prepared_ram(&[])).unwrap();
    alone.restore(&initial_state(), ExecutionPoint::START).unwrap();
    let Cpus::Kvm(without) = alone.save_cpus() else { panic!("it is KVM's") };
    let mixed = Cpus::Kvm(vec![cpus[0].clone(), without[0].clone()]);
    refused(&mut engine, mixed, "it has no local APIC, this machine one");
    let error = alone.restore_cpus(&Cpus::Kvm(cpus[..1].to_vec()), ExecutionPoint::START);
    assert!(error.unwrap_err().to_string().contains("it has a local APIC, this machine none"));
}

#[test]
fn cpus_are_off_when_none_is_left_to_wake_another() {
    if !has_kvm() {
        return;
    }
    let ram = prepared_ram(&assemble(|a| {
        a.out(0x80, al).unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    }));
    let (mut engine, mut bus) = (open(ram), TestBus::default());
    engine.restore(&initial_state(), ExecutionPoint::START).unwrap();
    // A period may end before the guest is there.
    loop {
        match engine.run(ExecutionPoint::NEVER, false, &mut bus) {
            Exit::Bound => {}
            exit => break assert_eq!(exit, Exit::BusAccess),
        }
    }
    assert!(!engine.is_off());
    while !engine.is_off() {
        assert_eq!(engine.run(ExecutionPoint::NEVER, false, &mut bus), Exit::Bound);
        assert!(engine.point().get() < 100_000, "it is never found to be off");
    }
}
