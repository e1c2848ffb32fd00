//! Random programs, compiled and interpreted: the same at every bound.

use super::random::{SLOT, instruction, outcome, prepared, run_whole};
use super::*;
use crate::soft::cpu::{CR0_EM, CR0_TS, CR4_OSFXSR};
use proptest::prelude::*;

/// Bytes of a program, in one page and a bit.
const PROGRAM: usize = 0x1400;

/// Instructions one behind the other, and a jump back to the first.
pub(super) fn dense(seeds: &[[u8; 12]]) -> Vec<u8> {
    let mut code: Vec<u8> = seeds.iter().flat_map(|seed| instruction(*seed)).collect();
    code.truncate(PROGRAM);
    while !code.len().is_multiple_of(SLOT) {
        code.push(0x90);
    }
    code.push(0xE9);
    let distance = -(code.len() as i32 + 4);
    code.extend(distance.to_le_bytes());
    code
}

/// Limits of an engine that compiles what it executes the second time, or at once.
pub(super) fn compiled(hot: u16, code: usize) -> CacheLimits {
    CacheLimits::default().compiled(code, hot)
}

pub(super) fn interpreted() -> CacheLimits {
    CacheLimits::default().compiled(0, 0)
}

/// Everything the guest, a backup or a replay can see.
pub(super) fn seen(machine: &mut Machine) -> impl PartialEq + std::fmt::Debug + use<> {
    let contents = machine.engine.cpu.tlb.contents();
    (machine.state(), machine.point(), machine.bus.seen.clone(), contents)
}

pub(super) fn retired_in_code(machine: &Machine) -> u64 {
    machine.engine.cache.compiler.as_ref().map_or(0, |compiler| compiler.executed)
}

#[test]
fn loops_are_executed_by_their_code() {
    use iced_x86::code_asm::*;
    let program = assemble(|a| {
        let (mut again, mut function) = (a.create_label(), a.create_label());
        a.mov(ecx, 10_000).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(function).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.add(rax, rcx).unwrap();
        a.ret().unwrap();
    });
    let mut machine = Machine::with_limits(&program, &initial_state(false), compiled(10, 1 << 20));
    assert_eq!(machine.run(), Exit::Halted { interruptible: false });
    assert_eq!(machine.point(), 2 + 10_000 * 5);
    assert_eq!(machine.state().general[0], 10_000 * 10_001 / 2);
    let retired = retired_in_code(&machine);
    assert!(retired > 49_000, "{retired}");
}

/// ADD R15, number; RET
fn adds(number: u8) -> [u8; 8] {
    [0x49, 0x81, 0xC7, number, 0, 0, 0, 0xC3]
}

#[test]
fn code_that_changes_is_compiled_again() {
    use iced_x86::code_asm::*;
    const FUNCTION: u64 = CODE + 0x2000;
    for by_device in [false, true] {
        let program = assemble(|a| {
            let mut again = a.create_label();
            a.mov(rsi, FUNCTION).unwrap();
            a.set_label(&mut again).unwrap();
            a.call(FUNCTION).unwrap();
            a.call(FUNCTION).unwrap();
            a.call(rsi).unwrap();
            if by_device {
                a.out(0x80, al).unwrap();
            } else {
                a.inc(byte_ptr(rsi + 3)).unwrap();
            }
            a.jmp(again).unwrap();
        });
        let mut machine =
            Machine::with_limits(&program, &initial_state(false), compiled(0, 1 << 20));
        machine.ram().memory().write_slice(&adds(0), GuestAddress(FUNCTION)).expect("in memory");
        let mut sum = 0;
        for round in 0..300u64 {
            if by_device {
                while machine.run() != Exit::BusAccess {}
                let number = (round + 1) as u8;
                machine.ram().memory().write_obj(number, GuestAddress(FUNCTION + 3)).unwrap();
            } else {
                machine.run_to(1 + 11 * (round + 1));
            }
            sum += 3 * u64::from(round as u8);
            assert_eq!(machine.state().general[15], sum, "round {round}");
        }
        assert!(retired_in_code(&machine) > 300);
    }
}

#[test]
fn a_page_that_is_mapped_elsewhere_leads_to_other_code() {
    use iced_x86::code_asm::*;
    for flush in [false, true] {
        let program = assemble(|a| {
            let (mut again, mut page) = (a.create_label(), a.create_label());
            a.mov(rbx, SMALL_PT).unwrap();
            a.mov(rdi, SMALL).unwrap();
            a.mov(ecx, 200).unwrap();
            a.set_label(&mut again).unwrap();
            a.call(SMALL).unwrap();
            a.call(rdi).unwrap();
            a.call(SMALL).unwrap();
            a.xor(dword_ptr(rbx), 0x1000).unwrap();
            if flush {
                a.invlpg(byte_ptr(rdi)).unwrap();
            }
            a.jmp(page).unwrap();
            a.set_label(&mut page).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
            a.hlt().unwrap();
        });
        let run = |limits| {
            let mut machine = Machine::with_limits(&program, &initial_state(false), limits);
            for (frame, number) in [(SMALL_FRAMES, 1), (SMALL_FRAMES + 0x1000, 16)] {
                let code = adds(number);
                machine.ram().memory().write_slice(&code, GuestAddress(frame)).expect("in memory");
            }
            assert_eq!(machine.run(), Exit::Halted { interruptible: false });
            machine
        };
        let (mut reference, mut other) = (run(interpreted()), run(compiled(0, 1 << 20)));
        assert_eq!(seen(&mut reference), seen(&mut other));
        let sum = if flush { 300 * 17 } else { 600 };
        assert_eq!(other.state().general[15], sum);
        assert!(retired_in_code(&other) > 1000);
    }
}

/// Runs both by so many instructions at a time: after each, all that can be seen is the same.
pub(super) fn agree_after(
    reference: &mut Machine,
    other: &mut Machine,
    steps: impl IntoIterator<Item = u64>,
) -> Result<(), TestCaseError> {
    let mut bound = 0;
    for step in steps {
        bound += step;
        run_whole(reference, bound);
        run_whole(other, bound);
        prop_assert_eq!(seen(reference), seen(other), "at {}", bound);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn compiling_does_not_show(
        seeds in proptest::collection::vec(any::<[u8; 12]>(), 40..900),
        user: bool,
        hot in 0u16..3,
        steps in proptest::collection::vec(1u64..200, 20),
    ) {
        let code = dense(&seeds);
        let mut reference = prepared(&code, user, interpreted());
        let mut other = prepared(&code, user, compiled(hot, 1 << 20));
        agree_after(&mut reference, &mut other, steps)?;
        prop_assert!(hot > 0 || retired_in_code(&other) > 0);
        prop_assert_eq!(outcome(&mut reference), outcome(&mut other));
    }

    #[test]
    fn compiling_what_seldom_faults_does_not_show(
        seeds in proptest::collection::vec(any::<[u8; 12]>(), 5..300),
        user: bool,
        hot in 0u16..3,
        block in 1usize..12,
        steps in proptest::collection::vec(1u64..100, 60),
    ) {
        let code = super::tame::program(&seeds);
        let mut reference = prepared(&code, user, interpreted());
        // Blocks are short, so that the end of one often is where the run is stopped.
        let mut other = prepared(&code, user, CacheLimits { block, ..compiled(hot, 1 << 20) });
        agree_after(&mut reference, &mut other, steps)?;
        prop_assert_eq!(outcome(&mut reference), outcome(&mut other));
    }

    #[test]
    fn where_compiled_code_is_stopped_does_not_show(
        seeds in proptest::collection::vec(any::<[u8; 12]>(), 10..100),
        user: bool,
        tame: bool,
        block in 1usize..12,
    ) {
        let code = if tame { super::tame::program(&seeds) } else { dense(&seeds) };
        let mut reference = prepared(&code, user, interpreted());
        let limits = CacheLimits { block, ..compiled(0, 1 << 20) };
        let mut other = prepared(&code, user, limits);
        agree_after(&mut reference, &mut other, std::iter::once(0).chain(vec![1; 1199]))?;
        prop_assert_eq!(outcome(&mut reference), outcome(&mut other));
    }

    #[test]
    fn vectors_that_may_not_be_used_do_not_show(
        seeds in proptest::collection::vec(any::<[u8; 12]>(), 10..300),
        user: bool,
        tame: bool,
        why in 0usize..4,
        hot in 0u16..3,
        steps in proptest::collection::vec(1u64..200, 20),
    ) {
        let code = if tame { super::tame::program(&seeds) } else { dense(&seeds) };
        let machine = |limits| {
            let mut machine = prepared(&code, user, limits);
            let mut state = machine.state();
            match why {
                0 => state.cr0 |= CR0_TS,
                1 => state.cr0 |= CR0_EM,
                2 => state.cr4 &= !CR4_OSFXSR,
                // An inexact result faults.
                _ => state.sse.mxcsr &= !(1 << 12),
            }
            machine.engine.restore(&state, ExecutionPoint::START).expect("a valid state");
            machine
        };
        for limits in [compiled(hot, 1 << 20), compiled(hot, 1 << 20).checked()] {
            let (mut reference, mut other) = (machine(interpreted()), machine(limits));
            agree_after(&mut reference, &mut other, steps.iter().copied())?;
            prop_assert!(hot > 0 || retired_in_code(&other) > 0);
            prop_assert_eq!(outcome(&mut reference), outcome(&mut other));
        }
    }

    #[test]
    fn room_for_little_code_does_not_show(
        seeds in proptest::collection::vec(any::<[u8; 12]>(), 40..400),
        user: bool,
        code_bytes in 0usize..4,
        steps in proptest::collection::vec(1u64..400, 20),
    ) {
        let code = dense(&seeds);
        let mut reference = prepared(&code, user, interpreted());
        let mut other = prepared(&code, user, compiled(0, 0x2000 + 0x1000 * code_bytes));
        agree_after(&mut reference, &mut other, steps)?;
        let (reference, other) = (outcome(&mut reference), outcome(&mut other));
        prop_assert_eq!((reference.0, reference.3), (other.0, other.3));
    }
}
