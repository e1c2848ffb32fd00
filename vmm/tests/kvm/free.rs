//! Guests that run freely do what their host's CPU lets them do, and are carried elsewhere in the middle of it; guests
//! whose points are named are stopped with a report where the CPU model ends.

use crate::guest::{
    CODE, DATA, TestBus, USER_CODE, USER_CODE_32, USER_DATA, USER_STACK, WHOLE_GDT, assemble,
    copy_memory, has_kvm, initial_state, open, open_to_users, prepared_ram, read_word,
};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::GuestRam;
use vmft_cpu::soft::SoftEngine;
use vmft_cpu::{Bus, CpuState, Cpus, Engine, Exit, KvmCpu, Vector};
use vmft_kvm::PointKind;
use vmft_log::point::ExecutionPoint;
use vmft_vmm::doctor::facts::KvmKind;
use vmft_vmm::doctor::kvm_of_this_host;
use vmft_vmm::engine::EngineKind;

const FREE: EngineKind = EngineKind::Kvm { points: PointKind::Free };
const EXITS: EngineKind = EngineKind::Kvm { points: PointKind::Exit };
const STEPS: EngineKind = EngineKind::Kvm { points: PointKind::Step };
/// Where the user's program is, and what it counts.
const USER: u64 = CODE + 0x1000;
const COUNTER: u64 = DATA + 0xA00;
const VECTOR: u8 = 0x40;
/// `OUT 0x80, AL`.
const SAY: [u8; 2] = [0xE6, 0x80];

/// Says something once, then counts for ever, in 32-bit code: `mov eax, USER_DATA; mov ds, eax`, because
/// `IRETQ` has left no segment of the kernel's there; `inc dword [COUNTER]; jmp -8`.
fn counting_32() -> Vec<u8> {
    let (data, counter) = (USER_DATA.to_le_bytes(), (COUNTER as u32).to_le_bytes());
    [&[0xB8][..], &data, &[0x8E, 0xD8], &SAY, &[0xFF, 0x05], &counter, &[0xEB, 0xF8]].concat()
}

/// The same in 64-bit code, where the address needs another form; before it, `before`.
fn counting_64(before: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    assemble(|a| {
        before(a);
        a.out(0x80, al).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(dword_ptr(COUNTER)).unwrap();
        a.jmp(again).unwrap();
    })
}

/// A kernel that goes to `program` at privilege level 3, with interrupts on, before its first instruction.
fn kernel_of(kind: EngineKind, selector: i32, program: &[u8]) -> Box<dyn Engine> {
    let ram = prepared_ram(&assemble(|a| {
        a.push(USER_DATA).unwrap();
        a.push(USER_STACK as i32).unwrap();
        a.push(0x3202).unwrap();
        a.push(selector).unwrap();
        a.push(USER as i32).unwrap();
        a.iretq().unwrap();
    }));
    open_to_users(&ram);
    ram.memory().write_slice(program, GuestAddress(USER)).unwrap();
    let mut engine = open(kind, ram);
    let mut state = initial_state();
    state.gdtr.limit = WHOLE_GDT;
    engine.restore(&state, ExecutionPoint::START).unwrap();
    engine
}

/// The same, where the program has said something.
fn user_guest(kind: EngineKind, selector: i32, program: &[u8]) -> Box<dyn Engine> {
    let mut engine = kernel_of(kind, selector, program);
    let mut bus = TestBus::default();
    loop {
        match engine.run(ExecutionPoint::NEVER, false, &mut bus) {
            Exit::BusAccess => return engine,
            Exit::Bound | Exit::Kicked => {}
            exit => panic!("{exit:?} at {:?}", engine.save()),
        }
    }
}

fn count(engine: &dyn Engine) -> u64 {
    read_word(engine.ram(), COUNTER) & u64::from(u32::MAX)
}

/// The one CPU, but for how far its counter of time has come meanwhile.
fn saved(engine: &mut dyn Engine) -> KvmCpu {
    let Cpus::Kvm(cpus) = engine.save_cpus() else { panic!("it is KVM's") };
    let [mut cpu] = <[KvmCpu; 1]>::try_from(cpus).unwrap();
    cpu.time_stamp = 0;
    cpu
}

/// Another virtual machine that goes on with the guest.
fn elsewhere(engine: &mut dyn Engine) -> Box<dyn Engine> {
    let ram = GuestRam::new(engine.ram().size()).unwrap();
    copy_memory(engine.ram(), &ram);
    let mut other = open(FREE, ram);
    other.restore_cpus(&engine.save_cpus(), engine.point()).unwrap();
    assert_eq!((saved(&mut *other), other.point()), (saved(engine), engine.point()));
    other
}

/// Runs to the next kick, and has an interrupt taken where one can be. How many were.
fn run_on(engine: &mut dyn Engine, bus: &mut dyn Bus) -> u64 {
    let bound = engine.point().after(1);
    let mut taken = 0;
    loop {
        match engine.run(bound, taken == 0, bus) {
            Exit::InterruptWindow => {
                engine.inject(Vector(VECTOR));
                taken += 1;
            }
            Exit::Bound => return taken,
            exit => panic!("{exit:?}"),
        }
    }
}

/// Carries a guest that counts from machine to machine, interrupting it.
fn goes_on_wherever_it_is_carried(selector: i32, program: &[u8]) {
    if !has_kvm() {
        return;
    }
    let mut bus = TestBus::default();
    let mut engine = user_guest(FREE, selector, program);
    let mut interrupts = 0;
    for _ in 0..12 {
        let before = count(&*engine);
        while count(&*engine) == before {
            interrupts += run_on(&mut *engine, &mut bus);
        }
        engine = elsewhere(&mut *engine);
    }
    let last = count(&*engine);
    while count(&*engine) == last {
        let bound = engine.point().after(1);
        assert_eq!(engine.run(bound, false, &mut bus), Exit::Bound);
    }
    assert!(interrupts > 0, "it was never interrupted");
    assert_eq!(read_word(engine.ram(), DATA + 8 * u64::from(VECTOR)), interrupts);
}

#[test]
fn code_of_a_32_bit_segment_is_interrupted_and_carried_elsewhere() {
    goes_on_wherever_it_is_carried(USER_CODE_32, &counting_32());
}

#[test]
fn code_of_a_64_bit_segment_is_interrupted_and_carried_elsewhere() {
    goes_on_wherever_it_is_carried(USER_CODE, &counting_64(|_| {}));
}

/// Sets bit 17 of MXCSR, which AMD's CPUs have, whatever `CPUID` says to the guest.
fn misaligned_sse(a: &mut CodeAssembler) {
    a.mov(eax, 0x2_1F80).unwrap();
    a.push(rax).unwrap();
    a.ldmxcsr(dword_ptr(rsp)).unwrap();
    a.pop(rax).unwrap();
}

/// False, with a word to the reader, where the CPU faults at it.
fn has_misaligned_sse() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let has = text.split_whitespace().any(|word| word == "misalignsse");
    if !has {
        println!("not run: this host's CPU has no such bit in MXCSR");
    }
    has
}

/// The kernel's part, with SSE on.
fn user_guest_with_sse(kind: EngineKind) -> Box<dyn Engine> {
    user_guest(kind, USER_CODE, &counting_64(misaligned_sse))
}

#[test]
fn a_bit_of_mxcsr_that_no_cpuid_shows_is_carried_elsewhere() {
    if !has_kvm() || !has_misaligned_sse() {
        return;
    }
    let mut engine = user_guest_with_sse(FREE);
    assert_eq!(engine.save().sse.mxcsr, 0x2_1F80);
    let mut other = elsewhere(&mut *engine);
    assert_eq!(other.save().sse.mxcsr, 0x2_1F80);
    goes_on_wherever_it_is_carried(USER_CODE, &counting_64(misaligned_sse));
}

/// Whoever wants to look at this guest where it has no name is told why he cannot.
fn stops_with_a_report(engine: &mut dyn Engine, says: &str) {
    let exit = engine.run(ExecutionPoint::NEVER, false, &mut TestBus::default());
    let Exit::Fatal(fault) = exit else { panic!("{exit:?}") };
    let fault = fault.to_string();
    assert!(fault.contains(says) && fault.contains("--protect checkpoint"), "{fault}");
}

#[test]
fn where_points_are_named_what_the_model_has_not_stops_the_guest_with_a_report() {
    if !has_kvm() {
        return;
    }
    let mut engine = kernel_of(STEPS, USER_CODE_32, &counting_32());
    stops_with_a_report(&mut *engine, "code that is not 64-bit code");
    if has_misaligned_sse() {
        let mut engine = user_guest_with_sse(EXITS);
        engine.kicker().unwrap().kick();
        stops_with_a_report(&mut *engine, "MXCSR 0x21f80");
    }
}

#[test]
fn code_of_a_32_bit_segment_is_interrupted_where_points_are_exits() {
    if !has_kvm() {
        return;
    }
    let mut engine = user_guest(EXITS, USER_CODE_32, &counting_32());
    let mut bus = TestBus::default();
    assert_eq!(engine.run(ExecutionPoint::NEVER, true, &mut bus), Exit::InterruptWindow);
    engine.inject(Vector(VECTOR));
    engine.kicker().unwrap().kick();
    assert_eq!(engine.run(ExecutionPoint::NEVER, false, &mut bus), Exit::Kicked);
    // Its handler runs, or has run.
    let (state, handled) = (engine.save(), read_word(engine.ram(), DATA + 8 * u64::from(VECTOR)));
    assert!(state.segments.cs.selector == 8 || handled == 1, "{state:?}");
}

/// Has `soft` go on counting. How many interrupts have been handled then.
fn goes_on_on_soft(engine: &mut dyn Engine) -> u64 {
    let ram = GuestRam::new(engine.ram().size()).unwrap();
    copy_memory(engine.ram(), &ram);
    let mut soft = SoftEngine::new(ram);
    soft.restore_cpus(&engine.save_cpus(), engine.point()).unwrap();
    let (before, bound) = (count(&soft), soft.point().after(100));
    let exit = soft.run(bound, false, &mut TestBus::default());
    assert_eq!(exit, Exit::Bound, "{:?}", soft.save());
    assert!(count(&soft) > before, "{:?}", soft.save());
    read_word(soft.ram(), DATA + 8 * u64::from(VECTOR))
}

#[test]
fn a_guest_that_ran_freely_goes_on_on_soft_if_it_fits_and_an_event_on_its_way_is_delivered() {
    if !has_kvm() {
        return;
    }
    let mut engine = user_guest(FREE, USER_CODE, &counting_64(|_| {}));
    let mut bus = TestBus::default();
    while engine.run(ExecutionPoint::NEVER, true, &mut bus) != Exit::InterruptWindow {}
    engine.inject(Vector(VECTOR));
    for kind in [EngineKind::Soft, EXITS] {
        let ram = GuestRam::new(engine.ram().size()).unwrap();
        copy_memory(engine.ram(), &ram);
        let mut other = open(kind, ram);
        other.restore_cpus(&engine.save_cpus(), engine.point()).unwrap();
        let state = other.save();
        assert_eq!((state.rip, state.segments.cs.selector), (0x9000 + 16 * 0x40, 8), "{kind}");
    }
    assert_eq!(goes_on_on_soft(&mut *engine), 1);
    let mut in_32_bit_code = user_guest(FREE, USER_CODE_32, &counting_32());
    assert_eq!(goes_on_on_soft(&mut *in_32_bit_code), 0);
}

#[test]
fn a_guest_that_does_not_fit_is_refused_by_the_other_engines_with_what_does_not() {
    if !has_kvm() {
        return;
    }
    let mut engine = user_guest(FREE, USER_CODE_32, &counting_32());
    let without_paging = CpuState { cr0: 0x33, ..engine.save() };
    let cpus = Cpus::Kvm(vec![saved(&mut *engine).with_registers(&without_paging).unwrap()]);
    for kind in [EngineKind::Soft, EXITS] {
        let mut other = open(kind, prepared_ram(&[]));
        let error = other.restore_cpus(&cpus, ExecutionPoint::START).unwrap_err().to_string();
        assert!(error.contains("is not that of long mode"), "{error}");
    }
}

/// False, with a word to the reader, where the guest's counter is the host's, whatever is set.
fn sets_the_counter() -> bool {
    let sets = kvm_of_this_host() != KvmKind::Pvm;
    if !sets {
        println!("not run: on kvm-pvm the counter is the host's");
    }
    sets
}

#[test]
fn the_counter_of_time_does_not_go_back_where_a_state_follows_another_at_once() {
    if !has_kvm() || !sets_the_counter() {
        return;
    }
    // Some hundredths of a second: as between a rehearsal and what comes after it.
    const STEP: u64 = 1 << 26;
    let mut engine = user_guest(FREE, USER_CODE, &counting_64(|_| {}));
    let Cpus::Kvm(mut cpus) = engine.save_cpus() else { panic!("it is KVM's") };
    for _ in 0..4 {
        engine.restore_cpus(&Cpus::Kvm(cpus.clone()), ExecutionPoint::START).unwrap();
        let Cpus::Kvm(now) = engine.save_cpus() else { panic!("it is KVM's") };
        let (set, found) = (cpus[0].time_stamp, now[0].time_stamp);
        assert!(found >= set, "set to {set:#x}, found at {found:#x}");
        cpus[0].time_stamp += STEP;
    }
}

#[test]
fn the_counter_of_time_goes_on_where_the_guest_goes_on() {
    if !has_kvm() || !sets_the_counter() {
        return;
    }
    // Later than any host's.
    const LATER: u64 = 1 << 60;
    let program = counting_64(|a| {
        a.rdtsc().unwrap();
        a.mov(dword_ptr(DATA + 0xB00), eax).unwrap();
        a.mov(dword_ptr(DATA + 0xB04), edx).unwrap();
    });
    let mut engine = user_guest(FREE, USER_CODE, &program);
    let Cpus::Kvm(cpus) = engine.save_cpus() else { panic!("it is KVM's") };
    let Cpus::Kvm(again) = engine.save_cpus() else { panic!("it is KVM's") };
    assert!(again[0].time_stamp >= cpus[0].time_stamp);
    let ram = GuestRam::new(engine.ram().size()).unwrap();
    copy_memory(engine.ram(), &ram);
    let mut other = open(FREE, ram);
    let mut state = initial_state();
    state.gdtr.limit = WHOLE_GDT;
    let mut cpu = cpus[0].with_registers(&state).unwrap();
    cpu.time_stamp = LATER;
    other.restore_cpus(&Cpus::Kvm(vec![cpu]), ExecutionPoint::START).unwrap();
    let Cpus::Kvm(there) = other.save_cpus() else { panic!("it is KVM's") };
    assert!(there[0].time_stamp >= LATER, "{:#x}", there[0].time_stamp);
    while other.run(ExecutionPoint::NEVER, false, &mut TestBus::default()) != Exit::BusAccess {}
    let read = read_word(other.ram(), DATA + 0xB00);
    assert!(read >= LATER, "{read:#x}");
}

/// What `/proc/cpuinfo` says of the host's first CPU.
fn host_says(name: &str) -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(found, _)| found.trim() == name).unwrap().1.trim().to_owned()
}

/// Vendor, family and model, as `CPUID` says them to a guest.
fn cpu_seen_on(kind: EngineKind) -> (String, u32, u32) {
    let ram = prepared_ram(&assemble(|a| {
        a.xor(eax, eax).unwrap();
        a.cpuid().unwrap();
        a.mov(dword_ptr(DATA + 0xB00), ebx).unwrap();
        a.mov(dword_ptr(DATA + 0xB04), edx).unwrap();
        a.mov(dword_ptr(DATA + 0xB08), ecx).unwrap();
        a.mov(eax, 1).unwrap();
        a.cpuid().unwrap();
        a.mov(dword_ptr(DATA + 0xB0C), eax).unwrap();
        a.out(0x80, al).unwrap();
    }));
    let mut engine = open(kind, ram);
    engine.restore(&initial_state(), ExecutionPoint::START).unwrap();
    while engine.run(ExecutionPoint::NEVER, false, &mut TestBus::default()) != Exit::BusAccess {
        assert!(!engine.is_halted(), "it has faulted: {:?}", engine.save());
    }
    let words = [DATA + 0xB00, DATA + 0xB08].map(|address| read_word(engine.ram(), address));
    let signature = (words[1] >> 32) as u32;
    let bytes = [words[0].to_le_bytes(), words[1].to_le_bytes()].concat();
    let family = (signature >> 8 & 0xF) + (signature >> 20 & 0xFF);
    let model = signature >> 4 & 0xF | signature >> 12 & 0xF0;
    (String::from_utf8_lossy(&bytes[..12]).into_owned(), family, model)
}

#[test]
fn a_guest_that_runs_freely_knows_its_hosts_cpu_and_one_that_is_replayed_does_not() {
    if !has_kvm() {
        return;
    }
    let number = |name| host_says(name).parse().unwrap();
    let hosts = (host_says("vendor_id"), number("cpu family"), number("model"));
    assert_eq!(cpu_seen_on(FREE), hosts);
    assert_eq!(cpu_seen_on(EXITS), ("AuthenticAMD".to_owned(), 15, 5));
}
