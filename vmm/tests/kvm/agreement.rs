//! The two engines agree, exit by exit and instruction by instruction.

use crate::guest::{DATA, Guest, assemble, has_kvm};
use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, Instruction, RflagsBits};
use vmft_cpu::Exit;
use vmft_cpu::state::CpuState;
use vmft_kvm::PointKind;
use vmft_vmm::doctor::Examination;
use vmft_vmm::doctor::facts::KvmKind;

/// Computes, and tells the bus now and then.
pub fn busy_program() -> Vec<u8> {
    assemble(|a| {
        let (mut outer, mut inner) = (a.create_label(), a.create_label());
        a.mov(rbx, DATA).unwrap();
        a.mov(r12d, 12).unwrap();
        a.mov(rax, 0x1234_5678_9ABCu64).unwrap();
        a.set_label(&mut outer).unwrap();
        a.mov(r13d, 40).unwrap();
        a.set_label(&mut inner).unwrap();
        a.imul_3(rax, rax, 0x343FD).unwrap();
        a.add(rax, 0x269EC3).unwrap();
        a.mov(qword_ptr(rbx + r13 * 8), rax).unwrap();
        a.xor(r14, qword_ptr(rbx + r13 * 8)).unwrap();
        a.rol(r14, 1).unwrap();
        a.dec(r13d).unwrap();
        a.jnz(inner).unwrap();
        a.out(0x80, eax).unwrap();
        a.in_(eax, 0x60).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(outer).unwrap();
        a.hlt().unwrap();
    })
}

/// Calls, the stack, flags, strings, and the instructions that stepping must be careful with.
pub fn careful_program() -> Vec<u8> {
    assemble(|a| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.jmp(over).unwrap();
        a.set_label(&mut function).unwrap();
        a.push(rbp).unwrap();
        a.lea(rbp, qword_ptr(rsp + 8)).unwrap();
        a.pop(rbp).unwrap();
        a.ret().unwrap();
        a.set_label(&mut over).unwrap();
        a.call(function).unwrap();
        a.pushfq().unwrap();
        a.pop(rax).unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.pushfq().unwrap();
        a.popfq().unwrap();
        a.cli().unwrap();
        a.int(0x55).unwrap();
        a.mov(eax, 0x10).unwrap();
        a.mov(ss, eax).unwrap();
        a.nop().unwrap();
        a.mov(rdi, DATA + 0x1000).unwrap();
        a.mov(ecx, 9).unwrap();
        a.rep().stosb().unwrap();
        a.mov(eax, 100).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(ecx, 7).unwrap();
        a.div(ecx).unwrap();
        a.out(0x80, al).unwrap();
        a.hlt().unwrap();
    })
}

/// What must agree; hidden parts of segment registers are each engine's own.
pub fn essence(state: &CpuState) -> ([u64; 16], u64, u64, [u64; 4], bool, bool) {
    let control = [state.cr0, state.cr2, state.cr3, state.cr4];
    (state.general, state.rip, state.rflags, control, state.interrupt_shadow, state.halted)
}

#[test]
fn two_runs_pass_the_same_states_at_the_same_points() {
    if !has_kvm() {
        return;
    }
    for points in [PointKind::Exit, PointKind::Step] {
        let code = busy_program();
        let (mut one, mut other) = (Guest::kvm(points, &code), Guest::kvm(points, &code));
        assert_eq!(one.states_at_exits(), other.states_at_exits());
        assert_eq!(one.bus.seen, other.bus.seen);
        assert_eq!(one.point(), other.point());
    }
}

#[test]
fn the_engines_agree_at_every_exit() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    let (mut kvm, mut soft) = (Guest::kvm(PointKind::Exit, &code), Guest::soft(&code));
    let (states, expected) = (kvm.states_at_exits(), soft.states_at_exits());
    assert_eq!(states.len(), 25);
    assert_eq!(kvm.point(), 25);
    for ((exit, state), (expected_exit, expected)) in states.iter().zip(&expected) {
        assert_eq!(exit, expected_exit);
        assert_eq!(essence(state), essence(expected));
    }
    assert_eq!(kvm.bus.accesses(), soft.bus.accesses());
    for word in 0..48 {
        assert_eq!(kvm.word(DATA + 8 * word), soft.word(DATA + 8 * word));
    }
}

/// The CPU that QEMU 7.2 emulates, in the box, loads first, and leaves RF out: a program's page that is written
/// so is faulted in twice there. So engines on it are compared up to the first program only.
#[test]
fn an_instruction_that_reads_and_writes_an_absent_page_faults_as_a_write() {
    if !has_kvm() {
        return;
    }
    const WRITE: u64 = 2;
    const RESUME_FLAG: u64 = 1 << 16;
    let is_box = std::path::Path::new("/box/job.json").exists();
    for locked in [false, true] {
        let code = assemble(|a| {
            a.mov(rbx, 0x7000_0000_0000u64).unwrap();
            let prefixed = if locked { a.lock() } else { &mut *a };
            prefixed.add(qword_ptr(rbx), rax).unwrap();
            a.hlt().unwrap();
        });
        let frame = |mut guest: Guest| {
            let states = guest.states_at_exits();
            let (exit, state) = states.last().expect("its handler halts");
            assert_eq!(exit, &Exit::Halted { interruptible: false });
            (0..6).map(|word| guest.word(state.general[4] + 8 * word)).collect::<Vec<_>>()
        };
        let mut expected = frame(Guest::soft(&code));
        assert_eq!((expected[0], expected[3] & RESUME_FLAG), (WRITE, RESUME_FLAG));
        if is_box {
            (expected[0], expected[3]) = (0, expected[3] & !RESUME_FLAG);
        }
        assert_eq!(frame(Guest::kvm(PointKind::Exit, &code)), expected, "locked: {locked}");
    }
}

/// Asks for a leaf at every exit.
fn cpuid_program(leaves: &[u32]) -> Vec<u8> {
    assemble(|a| {
        for leaf in leaves {
            a.mov(eax, *leaf).unwrap();
            a.xor(ecx, ecx).unwrap();
            a.cpuid().unwrap();
            a.out(0x80, al).unwrap();
        }
        a.hlt().unwrap();
    })
}

/// True where guests are shown the CPU they are given.
fn obeys_cpuid() -> bool {
    let report = Examination::of_this_host().examine(|_| {});
    let facts = report.facts.probes.expect("KVM runs the doctor's probes").cpuid;
    let odd: Vec<_> = facts.iter().filter(|fact| !fact.is_obeyed()).collect();
    assert!(
        odd.is_empty() || report.facts.device.kind == KvmKind::Pvm,
        "this KVM should show the CPU it is given: {odd:?}"
    );
    odd.iter().for_each(|fact| println!("not compared: the doctor finds {fact:?}"));
    odd.is_empty()
}

/// KVM sets some bits as it sees fit: the APIC's says whether IA32_APIC_BASE enables one.
#[test]
fn the_engines_show_the_same_cpu() {
    if !has_kvm() || !obeys_cpuid() {
        return;
    }
    let leaves: Vec<u32> =
        (0..0x10).chain(0x4000_0000..0x4000_0004).chain(0x8000_0000..0x8000_000A).collect();
    let code = cpuid_program(&leaves);
    let (mut kvm, mut soft) = (Guest::kvm(PointKind::Exit, &code), Guest::soft_as_kvm(&code));
    let (states, expected) = (kvm.states_at_exits(), soft.states_at_exits());
    assert_eq!(states.len(), leaves.len() + 1);
    for ((leaf, (_, state)), (_, expected)) in leaves.iter().zip(&states).zip(&expected) {
        assert_eq!(essence(state), essence(expected), "behind leaf {leaf:#x}");
    }
}

/// What is about to be executed; the guest's addresses are physical ones.
fn next_instruction(guest: &mut Guest) -> Instruction {
    let rip = guest.engine.save().rip;
    let bytes: Vec<u8> =
        [rip, rip + 8].iter().flat_map(|&at| guest.word(at).to_le_bytes()).collect();
    Decoder::with_ip(64, &bytes, rip, DecoderOptions::NONE).decode()
}

/// The arithmetic flags that are undefined behind `instruction`, if `before` were so in front of it: CPUs
/// leave different things in them.
fn undefined_flags(before: u64, instruction: &Instruction) -> u64 {
    use RflagsBits as Bits;
    let places =
        [(Bits::CF, 0), (Bits::PF, 2), (Bits::AF, 4), (Bits::ZF, 6), (Bits::SF, 7), (Bits::OF, 11)];
    let rflags = |bits: u32| {
        let here = places.iter().filter(|(bit, _)| bits & bit != 0);
        here.fold(0, |flags, (_, place)| flags | 1 << place)
    };
    before & !rflags(instruction.rflags_modified()) | rflags(instruction.rflags_undefined())
}

#[test]
fn the_engines_agree_after_every_instruction() {
    if !has_kvm() {
        return;
    }
    for code in [busy_program(), careful_program()] {
        let (mut kvm, mut soft) = (Guest::kvm(PointKind::Step, &code), Guest::soft(&code));
        let mut undefined = 0;
        for point in 1..4000 {
            undefined = undefined_flags(undefined, &next_instruction(&mut soft));
            let (exit, expected) = (kvm.run_to(point, false), soft.run_to(point, false));
            assert_eq!(exit, expected, "at {point}");
            let [found, expected] = [kvm.engine.save(), soft.engine.save()].map(|mut state| {
                state.rflags &= !undefined;
                essence(&state)
            });
            assert_eq!(found, expected, "after instruction {point}");
            if matches!(exit, Exit::Halted { .. }) {
                break;
            }
        }
        assert!(kvm.engine.is_halted());
        assert_eq!(kvm.bus.seen, soft.bus.seen);
        assert_eq!(kvm.word(crate::guest::STACK - 8), soft.word(crate::guest::STACK - 8));
    }
}
