//! Where interrupts are taken.

use crate::guest::{CODE, DATA, Guest, assemble, has_kvm};
use iced_x86::code_asm::*;
use vmft_cpu::{Exit, Vector};
use vmft_kvm::PointKind;

/// `STI`, three instructions, `HLT`, an output, `CLI`, `HLT`.
fn program() -> Vec<u8> {
    assemble(|a| {
        a.sti().unwrap();
        a.inc(rax).unwrap();
        a.inc(rax).unwrap();
        a.hlt().unwrap();
        a.out(0x80, al).unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    })
}

#[test]
fn an_interrupt_waits_for_the_shadow_of_sti_on_both_engines() {
    if !has_kvm() {
        return;
    }
    for mut guest in [Guest::kvm(PointKind::Step, &program()), Guest::soft(&program())] {
        assert_eq!(guest.run_to(u64::MAX, true), Exit::InterruptWindow);
        let state = guest.engine.save();
        // Behind STI (1 byte) and one INC (3 bytes).
        assert_eq!((state.rip, state.general[0]), (CODE + 4, 1));
        assert_ne!(state.rflags & 0x200, 0);
        guest.engine.inject(Vector(0x40));
        assert_eq!(guest.run(), Exit::Halted { interruptible: true });
        assert_eq!((guest.general(0), guest.word(DATA + 8 * 0x40)), (2, 1));
    }
}

#[test]
fn between_two_exits_no_interrupt_is_taken_whatever_the_host_offers() {
    if !has_kvm() {
        return;
    }
    let mut guest = Guest::kvm(PointKind::Exit, &program());
    assert_eq!(guest.run_to(u64::MAX, true), Exit::Halted { interruptible: true });
    assert_eq!((guest.point(), guest.general(0)), (1, 2));
    guest.engine.inject(Vector(0x40));
    let _ = guest.run();
    assert_eq!(guest.word(DATA + 8 * 0x40), 1);
}

#[test]
fn an_interrupt_wakes_a_halted_cpu() {
    if !has_kvm() {
        return;
    }
    for points in [PointKind::Exit, PointKind::Step, PointKind::Free] {
        let mut guest = Guest::kvm(points, &program());
        let mut exit = guest.run();
        while exit == Exit::Bound {
            exit = guest.run();
        }
        assert_eq!(exit, Exit::Halted { interruptible: true });
        assert!(guest.engine.is_halted() && !guest.engine.is_off());
        guest.engine.inject(Vector(0x21));
        assert!(!guest.engine.is_halted());
        let mut exit = guest.run();
        while matches!(exit, Exit::Bound) {
            exit = guest.run();
        }
        assert_eq!(exit, Exit::BusAccess, "{points}");
        assert_eq!(guest.word(DATA + 8 * 0x21), 1);
    }
}

#[test]
#[should_panic(expected = "where none can be taken")]
fn an_interrupt_where_none_can_be_taken_is_a_programming_error() {
    if !has_kvm() {
        panic!("interrupt 32 injected where none can be taken");
    }
    Guest::kvm(PointKind::Exit, &program()).engine.inject(Vector(32));
}
