//! Single steps at both privilege levels, and arrivals at every instruction: across `SYSCALL`, exceptions,
//! strings, the shadows of `STI` and `MOV SS`, images of RFLAGS, and pending I/O. `soft` says what must
//! come of it.
//!
//! Privilege level 3 needs a KVM that steps there; where the doctor finds that this one does not, its verdict
//! is printed, and only kvm-pvm may be one of those.

use crate::agreement::{careful_program, essence};
use crate::guest::{CODE, DATA, Guest, STACK, USER_STACK, assemble, has_kvm};
use iced_x86::code_asm::*;
use std::sync::OnceLock;
use vmft_cpu::{CpuState, Exit, Vector};
use vmft_kvm::PointKind;
use vmft_vmm::doctor::Examination;
use vmft_vmm::doctor::facts::{KvmKind, Stepping, Syscall};
use vmft_vmm::engine::EngineKind;

const STEPS: EngineKind = EngineKind::Kvm { points: PointKind::Step };
/// Where `SYSCALL` leads.
const ENTRY: u64 = CODE + 0x800;
/// The handlers of #UD and #PF, which go on behind the instruction.
const SKIP_UD: u64 = 0x9000 + 16 * 6;
const SKIP_PF: u64 = 0x9000 + 16 * 14;

/// Instructions executed behind an interrupt: its handler, and some more.
const AFTERMATH: u64 = 12;

/// True if guests can be stepped at privilege level 3 here.
fn steps_users() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let report = Examination::of_this_host().examine(|_| {});
        let probes = report.facts.probes.expect("KVM runs the doctor's probes");
        let syscall = probes.syscall.is(|syscall| *syscall == Syscall::Works);
        let stepping = probes.step.user.is(|stepping| *stepping == Stepping::Exact);
        if syscall && stepping {
            return true;
        }
        assert_eq!(
            report.facts.device.kind,
            KvmKind::Pvm,
            "this KVM should step at CPL 3: {:?}, {:?}",
            probes.syscall,
            probes.step.user
        );
        println!(
            "not run at CPL 3: the doctor finds SYSCALL {:?}, stepping {:?}",
            probes.syscall, probes.step.user
        );
        false
    })
}

/// The entry of system calls, and handlers of faults that skip the instruction.
fn kernel_parts() -> Vec<(u64, Vec<u8>)> {
    let at = |address, program: fn(&mut CodeAssembler)| {
        let mut assembler = CodeAssembler::new(64).unwrap();
        program(&mut assembler);
        (address, assembler.assemble(address).unwrap())
    };
    vec![
        at(ENTRY, |a| {
            let mut end = a.create_label();
            a.add(r9, r11).unwrap();
            a.inc(qword_ptr(DATA + 0xA00)).unwrap();
            a.cmp(eax, 0x77).unwrap();
            a.je(end).unwrap();
            a.sysretq().unwrap();
            a.set_label(&mut end).unwrap();
            a.cli().unwrap();
            a.hlt().unwrap();
        }),
        // Two bytes, behind `UD2`.
        at(SKIP_UD, |a| {
            a.add(qword_ptr(rsp), 2).unwrap();
            a.iretq().unwrap();
        }),
        // An error code, and three bytes behind the load.
        at(SKIP_PF, |a| {
            a.pop(r10).unwrap();
            a.add(qword_ptr(rsp), 3).unwrap();
            a.iretq().unwrap();
        }),
    ]
}

/// What an ordinary program does, and more.
fn user_program(turns: u32) -> Vec<u8> {
    assemble(|a| {
        let (mut again, mut call, mut over) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(r12d, turns).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(eax, 1).unwrap();
        a.syscall().unwrap();
        a.pushfq().unwrap();
        a.pop(r14).unwrap();
        a.add(r15, r14).unwrap();
        a.pushfq().unwrap();
        a.popfq().unwrap();
        a.ud2().unwrap();
        // Nothing is mapped there.
        a.mov(rbx, 0x7000_0000_0000u64).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, DATA + 0x4000).unwrap();
        a.mov(ecx, 7).unwrap();
        a.rep().movsb().unwrap();
        a.mov(ecx, 3).unwrap();
        a.repne().scasb().unwrap();
        a.cli().unwrap();
        a.mov(eax, 0x33).unwrap();
        a.sti().unwrap();
        a.inc(rbp).unwrap();
        a.mov(ss, eax).unwrap();
        a.inc(rbp).unwrap();
        a.int(0x55).unwrap();
        a.int3().unwrap();
        a.out(0x80, al).unwrap();
        a.in_(eax, 0x60).unwrap();
        a.add(r15, rax).unwrap();
        a.call(call).unwrap();
        a.jmp(over).unwrap();
        a.set_label(&mut call).unwrap();
        a.push(rbp).unwrap();
        a.pop(rdx).unwrap();
        a.ret().unwrap();
        a.set_label(&mut over).unwrap();
        a.movq(xmm0, r15).unwrap();
        a.paddq(xmm0, xmm0).unwrap();
        a.movq(r13, xmm0).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.mov(eax, 0x77).unwrap();
        a.syscall().unwrap();
    })
}

fn user(engine: EngineKind, turns: u32) -> Guest {
    Guest::user(engine, &user_program(turns), ENTRY, &kernel_parts())
}

/// The memory that the guests write.
fn written(guest: &Guest) -> Vec<u64> {
    let around = |top: u64| (1..64).map(move |word| top - 8 * word);
    let data = (0..0x200).map(|word| DATA + 8 * word);
    let copied = (0..8).map(|word| DATA + 0x4000 + 8 * word);
    let words = data.chain(copied).chain(around(STACK)).chain(around(USER_STACK));
    words.map(|address| guest.word(address)).collect()
}

fn agree_after_every_instruction(mut kvm: Guest, mut soft: Guest) -> u64 {
    for point in 1..4000 {
        let (exit, expected) = (kvm.run_to(point, false), soft.run_to(point, false));
        assert_eq!(exit, expected, "at {point}");
        let (here, there) = (kvm.engine.save(), soft.engine.save());
        assert_eq!(essence(&here), essence(&there), "after instruction {point}");
        assert_eq!(here.segments.cs.selector, there.segments.cs.selector, "at {point}");
        assert_eq!(here.sse.registers, there.sse.registers, "at {point}");
        if matches!(exit, Exit::Halted { .. }) {
            assert_eq!(kvm.bus.seen, soft.bus.seen);
            assert_eq!(written(&kvm), written(&soft));
            return point;
        }
    }
    panic!("the guest does not end");
}

#[test]
fn a_user_program_is_stepped_as_soft_executes_it() {
    if !has_kvm() || !steps_users() {
        return;
    }
    let instructions = agree_after_every_instruction(user(STEPS, 2), user(EngineKind::Soft, 2));
    assert!(instructions > 100, "{instructions}");
}

/// An interrupt that arrives here: where it is taken, and what it has come to some instructions later.
/// `None` if the guest takes none any more.
fn interrupted(guest: &mut Guest) -> Option<(u64, u64, CpuState, Vec<u64>)> {
    let taken = loop {
        match guest.run_to(u64::MAX, true) {
            Exit::InterruptWindow => break guest.engine.save(),
            Exit::BusAccess => {}
            Exit::Halted { .. } => return None,
            other => panic!("{other:?}"),
        }
    };
    let at = guest.point();
    guest.engine.inject(Vector(0x40));
    while guest.point() < at + AFTERMATH {
        if let Exit::Halted { .. } = guest.run_to(at + AFTERMATH, false) {
            break;
        }
    }
    assert_eq!(guest.word(DATA + 8 * 0x40), 1, "taken once");
    Some((at, taken.rip, guest.engine.save(), written(guest)))
}

/// Interrupts `soft`, as `fresh` makes it, at every instruction, and `kvm` in the same state.
fn interrupts_land_alike(mut kvm: Guest, fresh: impl Fn() -> Guest) -> u32 {
    for point in 0.. {
        let mut soft = fresh();
        while soft.point() < point {
            if let Exit::Halted { .. } = soft.run_to(point, false) {
                return point as u32;
            }
        }
        kvm.take_over(&mut soft);
        let (Some(expected), Some(found)) = (interrupted(&mut soft), interrupted(&mut kvm)) else {
            assert_eq!(soft.engine.save().rip, kvm.engine.save().rip, "an arrival at {point}");
            return point as u32;
        };
        let (at, rip, state, words) = &found;
        assert_eq!((*at, *rip), (expected.0, expected.1), "an arrival at {point}");
        assert_eq!(essence(state), essence(&expected.2), "an arrival at {point}");
        assert_eq!(*words, expected.3, "an arrival at {point}");
    }
    unreachable!("every guest ends")
}

#[test]
fn an_arrival_lands_on_every_instruction_of_a_user_program_and_its_kernel() {
    if !has_kvm() || !steps_users() {
        return;
    }
    let taken = interrupts_land_alike(user(STEPS, 1), || user(EngineKind::Soft, 1));
    assert!(taken > 40, "{taken}");
}

#[test]
fn an_arrival_lands_on_every_instruction_of_a_kernel() {
    if !has_kvm() {
        return;
    }
    let code = careful_program();
    let kvm = Guest::kvm(PointKind::Step, &code);
    let taken = interrupts_land_alike(kvm, || Guest::soft(&code));
    assert!((10..100).contains(&taken), "{taken}");
}
