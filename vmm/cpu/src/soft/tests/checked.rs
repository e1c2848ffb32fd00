//! Compiled code checked against the interpreter: what is right passes, and what is wrong is found.

use super::compiled::{agree_after, compiled, dense, interpreted, retired_in_code, seen};
use super::random::{outcome, prepared};
use super::*;
use crate::soft::{Difference, Miscompiled};
use iced_x86::{Code, Instruction, Mnemonic, Register};
use proptest::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

fn checked(hot: u16) -> CacheLimits {
    compiled(hot, 1 << 20).checked()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn checking_finds_nothing_and_does_not_show(
        seeds in proptest::collection::vec(any::<[u8; 12]>(), 10..500),
        user: bool,
        tame: bool,
        hot in 0u16..3,
        block in 1usize..64,
        steps in proptest::collection::vec(1u64..200, 20),
    ) {
        let code = if tame { super::tame::program(&seeds) } else { dense(&seeds) };
        let mut reference = prepared(&code, user, interpreted());
        let mut other = prepared(&code, user, CacheLimits { block, ..checked(hot) });
        agree_after(&mut reference, &mut other, steps)?;
        prop_assert!(hot > 0 || retired_in_code(&other) > 0);
        prop_assert_eq!(outcome(&mut reference), outcome(&mut other));
    }
}

/// Adds, stores, calls, computes flags and vectors, over and over.
fn busy(a: &mut CodeAssembler) {
    use iced_x86::code_asm::*;
    let (mut again, mut function) = (a.create_label(), a.create_label());
    a.mov(ecx, 50).unwrap();
    a.mov(rbx, DATA).unwrap();
    a.set_label(&mut again).unwrap();
    a.add(rax, rcx).unwrap();
    a.mov(qword_ptr(rbx + 8), rax).unwrap();
    a.mov(rdx, qword_ptr(rbx + 8)).unwrap();
    a.paddd(xmm1, xmm1).unwrap();
    a.cmp(rdx, 7).unwrap();
    a.sete(sil).unwrap();
    a.call(function).unwrap();
    a.dec(ecx).unwrap();
    a.jnz(again).unwrap();
    a.hlt().unwrap();
    a.set_label(&mut function).unwrap();
    a.or(edi, 0x11).unwrap();
    a.ret().unwrap();
}

/// Runs [`busy`] with a compiler that has this fault, until that is found.
fn found(fault: fn(&mut Instruction)) -> (Miscompiled, Machine) {
    let ram = prepared_ram();
    ram.memory().write_slice(&assemble(busy), GuestAddress(CODE)).expect("in memory");
    let mut engine = SoftEngine::with_fault(ram, fault);
    let mut state = initial_state(false);
    state.sse.registers[1] = 0x0101_0101;
    engine.restore(&state, ExecutionPoint::START).expect("a valid state");
    let mut machine = Machine { engine, bus: TestBus::default() };
    let payload = catch_unwind(AssertUnwindSafe(|| machine.run())).expect_err("it is found");
    let report = payload.downcast::<Box<Miscompiled>>().expect("a report is thrown");
    (**report, machine)
}

fn into(code: Code) -> impl Fn(&mut Instruction) {
    move |i| i.set_code(code)
}

#[test]
fn a_wrong_result_is_found_with_its_block_and_all_three_states() {
    let (report, mut machine) = found(|i| {
        if i.mnemonic() == Mnemonic::Add {
            into(Code::Sub_rm64_r64)(i);
        }
    });
    let Difference::General { register: Register::RAX, interpreted, compiled } = report.difference
    else {
        panic!("{report}")
    };
    // The first block: 0 and 50.
    assert_eq!((interpreted, compiled), (50, 50u64.wrapping_neg()));
    assert_eq!(report.interpreted.general[0], interpreted);
    assert_eq!(report.compiled.general[0], compiled);
    assert_eq!(report.address, report.before.rip);
    assert_eq!(report.address, report.physical, "the tests' addresses are physical ones");
    let add = [0x48, 0x01, 0xC8];
    assert!(report.bytes.windows(3).any(|bytes| bytes == add), "{report}");
    // The engine is as before the block, so that a dump shows what both began with.
    assert_eq!(machine.state(), report.before);
}

#[test]
fn every_kind_of_fault_is_found() {
    let is = |fault: fn(&mut Instruction), expected: fn(Difference) -> bool| {
        let (report, _) = found(fault);
        assert!(expected(report.difference), "{report}");
    };
    // A store to another byte, of another value, to another page; a load of another.
    is(
        |i| {
            if i.mnemonic() == Mnemonic::Mov && i.memory_displacement64() == 8 {
                i.set_memory_displacement64(if i.op0_register() == Register::RDX { 8 } else { 16 });
            }
        },
        |found| {
            matches!(found, Difference::General { register: Register::RDX, .. })
                || matches!(found, Difference::Memory { .. })
        },
    );
    is(
        |i| {
            if i.code() == Code::Mov_rm64_r64 && i.op1_register() == Register::RAX {
                i.set_op1_register(Register::RCX);
            }
        },
        |found| {
            matches!(
                found,
                Difference::General { register: Register::RDX, .. } | Difference::Memory { .. }
            )
        },
    );
    is(
        |i| {
            if i.mnemonic() == Mnemonic::Mov && i.memory_displacement64() == 8 {
                i.set_memory_displacement64(0x2008);
                i.set_memory_displ_size(4);
            }
        },
        |found| matches!(found, Difference::Missed { .. }),
    );
    // Flags alone, that nobody reads.
    is(
        |i| {
            if i.mnemonic() == Mnemonic::Or {
                into(Code::Add_rm32_imm8)(i);
            }
        },
        |found| matches!(found, Difference::General { .. } | Difference::Flags { .. }),
    );
    is(
        |i| {
            if i.mnemonic() == Mnemonic::Cmp {
                i.set_immediate8to64(8);
            }
        },
        |found| matches!(found, Difference::Flags { .. }),
    );
    // A vector register.
    is(
        |i| {
            if i.mnemonic() == Mnemonic::Paddd {
                into(Code::Psubd_xmm_xmmm128)(i);
            }
        },
        |found| matches!(found, Difference::Vector { register: Register::XMM1, .. }),
    );
    // The other way of a branch.
    is(
        |i| {
            if i.mnemonic() == Mnemonic::Jne {
                into(Code::Je_rel8_64)(i);
            }
        },
        |found| matches!(found, Difference::Next { .. }),
    );
    // A return address.
    is(
        |i| {
            if i.mnemonic() == Mnemonic::Call {
                i.set_next_ip(i.next_ip() + 1);
            }
        },
        |found| matches!(found, Difference::Memory { .. }),
    );
}

#[test]
fn checking_counts_what_code_executes() {
    let run = |limits| {
        let mut machine = Machine::with_limits(&assemble(busy), &initial_state(false), limits);
        assert_eq!(machine.run(), Exit::Halted { interruptible: false });
        machine
    };
    let (mut checked, mut unchecked) = (run(checked(0)), run(compiled(0, 1 << 20)));
    assert_eq!(seen(&mut checked), seen(&mut unchecked));
    let compiled = retired_in_code(&checked);
    assert!(compiled > checked.point() / 2, "{compiled} of {}", checked.point());
    let gauge = checked.engine.compiler().expect("it compiles");
    assert_eq!((gauge.compiled(), gauge.retired()), (compiled, checked.point()));
    assert_eq!(gauge.mode(), crate::soft::CompilerMode::Check);
}
