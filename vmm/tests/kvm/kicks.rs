//! Kicks from other threads.

use crate::guest::{Guest, assemble, has_kvm};
use iced_x86::code_asm::*;
use vmft_cpu::Exit;
use vmft_kvm::PointKind;

/// An output, then a loop without end.
fn endless() -> Vec<u8> {
    assemble(|a| {
        let mut again = a.create_label();
        a.out(0x80, al).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(rbx).unwrap();
        a.jmp(again).unwrap();
    })
}

#[test]
fn a_kick_ends_a_run_and_is_no_point() {
    if !has_kvm() {
        return;
    }
    let mut guest = Guest::kvm(PointKind::Exit, &endless());
    let kicker = guest.engine.kicker().unwrap();
    // Before the run: it ends at its start, and only once.
    kicker.kick();
    kicker.kick();
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(guest.point(), 0);
    assert_eq!(guest.run(), Exit::BusAccess);
    for _ in 0..50 {
        let kicker = kicker.clone();
        let kicking = std::thread::spawn(move || kicker.kick());
        assert_eq!(guest.run(), Exit::Kicked);
        kicking.join().unwrap();
        assert_eq!(guest.point(), 1);
    }
}

#[test]
fn a_guest_with_free_points_comes_back_though_it_only_computes() {
    if !has_kvm() {
        return;
    }
    let mut guest = Guest::kvm(PointKind::Free, &endless());
    while guest.point() < 20 {
        assert!(matches!(guest.run_to(20, false), Exit::Bound | Exit::BusAccess));
    }
    assert_ne!(guest.general(3), 0);
}

#[test]
fn kicked_runs_pass_the_same_states_as_others() {
    if !has_kvm() {
        return;
    }
    let code = crate::agreement::busy_program();
    let calm = Guest::kvm(PointKind::Exit, &code).states_at_exits();
    let mut guest = Guest::kvm(PointKind::Exit, &code);
    let kicker = guest.engine.kicker().unwrap();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let kicking = std::thread::spawn(move || {
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            kicker.kick();
            std::thread::yield_now();
        }
    });
    let mut states = Vec::new();
    while states.len() < calm.len() {
        let exit = guest.run();
        if exit != Exit::Kicked {
            states.push((exit, guest.engine.save()));
        }
    }
    drop(stop);
    kicking.join().unwrap();
    assert_eq!(states, calm);
}
