//! Saving, restoring, and the record of written memory.

use crate::guest::{DATA, Guest, assemble, has_kvm, initial_state};
use iced_x86::code_asm::*;
use vmft_cpu::Exit;
use vmft_cpu::memory::PageNumber;
use vmft_kvm::PointKind;
use vmft_log::point::ExecutionPoint;

#[test]
fn what_is_saved_is_restored() {
    if !has_kvm() {
        return;
    }
    for points in [PointKind::Exit, PointKind::Step] {
        let mut guest = Guest::kvm(points, &assemble(|a| a.hlt().unwrap()));
        let mut state = initial_state();
        for (register, value) in (0u64..).zip(&mut state.general) {
            *value = 0x1111_1111_1111_1111 * register;
        }
        state.msrs.star = 0x1234;
        state.msrs.lstar = 0xFFFF_8000_0000_1234;
        state.msrs.kernel_gs_base = 0x7000;
        state.msrs.tsc_adjust = 99;
        state.msrs.sysenter_eip = 0x55;
        state.debug[0] = 0x1000;
        state.x87.control = 0x27F;
        state.sse.mxcsr = 0x1FA0;
        for (register, value) in (0u128..).zip(&mut state.sse.registers) {
            *value = register << 100 | 0xABCD;
        }
        state.segments.fs.base = 0x1234_5000;
        state.interrupt_shadow = true;
        state.rflags = 0x202;
        state.cr8 = 3;
        guest.engine.restore(&state, ExecutionPoint::new(41)).unwrap();
        assert_eq!(guest.engine.save(), state, "{points}");
        assert_eq!(guest.point(), 41);
    }
}

#[test]
fn a_cpu_saved_in_the_middle_goes_on_identically_elsewhere() {
    if !has_kvm() {
        return;
    }
    let code = crate::agreement::busy_program();
    let mut first = Guest::kvm(PointKind::Exit, &code);
    for _ in 0..3 {
        assert_eq!(first.run(), Exit::BusAccess);
    }
    let (state, point) = (first.engine.save(), first.engine.point());
    // The program keeps nothing in memory but what it writes again.
    let mut second = Guest::kvm(PointKind::Exit, &code);
    second.engine.restore(&state, point).unwrap();
    second.bus.seen = first.bus.seen.clone();
    assert_eq!(first.states_at_exits(), second.states_at_exits());
    assert_eq!(first.bus.seen, second.bus.seen);
}

#[test]
fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
    if !has_kvm() {
        return;
    }
    let mut guest = Guest::kvm(PointKind::Exit, &assemble(|a| a.hlt().unwrap()));
    let before = guest.engine.save();
    let mut bad = initial_state();
    bad.cr0 = 0;
    assert!(guest.engine.restore(&bad, ExecutionPoint::new(7)).is_err());
    let mut bad = initial_state();
    bad.debug[7] = 1 << 40;
    let refused = guest.engine.restore(&bad, ExecutionPoint::new(7)).is_err();
    assert!(refused, "KVM takes no such DR7");
    assert_eq!(guest.engine.save(), before);
    assert_eq!(guest.point(), 0);
}

#[test]
fn pages_the_guest_wrote_are_recorded_when_they_are_collected() {
    if !has_kvm() {
        return;
    }
    let code = assemble(|a| {
        a.mov(rbx, DATA).unwrap();
        a.mov(dword_ptr(rbx), eax).unwrap();
        a.mov(dword_ptr(rbx + 0x5000), eax).unwrap();
        a.mov(ecx, dword_ptr(rbx + 0x7000)).unwrap();
        a.out(0x80, al).unwrap();
        a.mov(dword_ptr(rbx + 0x9000), eax).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::kvm(PointKind::Exit, &code);
    // KVM may report a page that was only read; never may it leave one out.
    let untouched = 0x304;
    let reported = |guest: &mut Guest, written: &[u64]| {
        guest.engine.collect_written();
        let pages = guest.engine.ram().tracker().take_written();
        guest.engine.renew_write_tracking();
        assert!(written.iter().all(|page| pages.contains(&PageNumber(*page))), "{pages:?}");
        assert!(!pages.contains(&PageNumber(untouched)), "{pages:?}");
    };
    reported(&mut guest, &[]);
    assert_eq!(guest.run(), Exit::BusAccess);
    reported(&mut guest, &[0x300, 0x305]);
    assert_eq!(guest.run(), Exit::Halted { interruptible: false });
    reported(&mut guest, &[0x309]);
}
