//! The records of the exits: the same on two sides, different from the first difference on.

use crate::agreement::busy_program;
use crate::guest::{Guest, assemble, has_kvm};
use iced_x86::code_asm::*;
use vmft_cpu::{Exit, ExitReason, ExitRecord};
use vmft_kvm::PointKind;

const BOTH: [PointKind; 2] = [PointKind::Exit, PointKind::Step];

/// Runs to the end, with `plant` before exit number `at`.
fn exits(guest: &mut Guest, at: usize, plant: impl Fn(&mut Guest)) -> Vec<ExitRecord> {
    guest.exits().watch_exits(true);
    let mut exits = Vec::new();
    loop {
        if exits.len() == at {
            plant(guest);
        }
        let exit = guest.run();
        guest.exits().take_exits(&mut exits);
        if exit != Exit::BusAccess {
            return exits;
        }
    }
}

#[test]
fn two_runs_exit_alike_and_a_planted_difference_shows_at_the_very_next_exit() {
    if !has_kvm() {
        return;
    }
    let code = busy_program();
    for points in BOTH {
        let good = exits(&mut Guest::kvm(points, &code), 0, |_| {});
        // Twelve times OUT and IN, and HLT.
        assert_eq!(good.len(), 25, "{points}");
        assert_eq!(good, exits(&mut Guest::kvm(points, &code), 0, |_| {}), "{points}");
        for at in [1, 6, 23] {
            let flip = |guest: &mut Guest| {
                let mut state = guest.engine.save();
                state.general[5] ^= 1 << 40;
                guest.engine.restore(&state, guest.engine.point()).unwrap();
            };
            let bad = exits(&mut Guest::kvm(points, &code), at, flip);
            let first = good.iter().zip(&bad).position(|(good, bad)| good != bad);
            assert_eq!(first, Some(at), "{points}");
            assert_eq!(bad[at].registers[5] ^ good[at].registers[5], 1 << 40, "{points}");
        }
    }
}

#[test]
fn a_record_says_what_the_guest_did() {
    if !has_kvm() {
        return;
    }
    let code = assemble(|a| {
        a.mov(eax, 0x1234_5678).unwrap();
        a.mov(edx, 0x3F8).unwrap();
        a.out(dx, al).unwrap();
        a.in_(ax, dx).unwrap();
        a.mov(rbx, crate::guest::DEVICE + 0x20).unwrap();
        a.mov(dword_ptr(rbx), ecx).unwrap();
        a.mov(ecx, 0x10).unwrap();
        a.rdmsr().unwrap();
        a.hlt().unwrap();
    });
    let told = |record: &ExitRecord| (record.reason, record.width, record.address);
    let records = exits(&mut Guest::kvm(PointKind::Exit, &code), 0, |_| {});
    let device = crate::guest::DEVICE_FRAME + 0x20;
    let expected = [
        (ExitReason::PortWrite, 1, 0x3F8),
        (ExitReason::PortRead, 2, 0x3F8),
        (ExitReason::DeviceWrite, 4, device),
        (ExitReason::Register, 0, 0),
        (ExitReason::Halt, 0, 0),
    ];
    assert_eq!(records.iter().map(told).collect::<Vec<_>>(), expected);
    assert_eq!(records[0].data, 0x78);
    // What is read is in the record, and not yet in the registers.
    assert_eq!((records[1].data, records[1].registers[0]), (0x4323, 0x1234_5678));
    assert_eq!(records[3].registers[1], 0x10);
}

#[test]
fn nothing_is_kept_for_nobody() {
    if !has_kvm() {
        return;
    }
    let mut guest = Guest::kvm(PointKind::Exit, &busy_program());
    guest.states_at_exits();
    let mut exits = Vec::new();
    guest.exits().take_exits(&mut exits);
    assert_eq!(exits, []);
}
