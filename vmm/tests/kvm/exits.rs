//! Ports, devices, registers, and what KVM cannot do.

use crate::guest::{CODE, DEVICE, DEVICE_FRAME, Guest, Seen, assemble, has_kvm};
use iced_x86::code_asm::*;
use vmft_cpu::Exit;
use vmft_kvm::PointKind;

const BOTH: [PointKind; 2] = [PointKind::Exit, PointKind::Step];

#[test]
fn every_port_access_is_one_point() {
    if !has_kvm() {
        return;
    }
    let code = assemble(|a| {
        a.mov(edx, 0x3F8).unwrap();
        a.mov(eax, 0x41).unwrap();
        a.out(dx, al).unwrap();
        a.in_(eax, dx).unwrap();
        a.mov(ebx, eax).unwrap();
        a.out(dx, ax).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::kvm(PointKind::Exit, &code);
    for point in 1..=3 {
        assert_eq!(guest.run(), Exit::BusAccess);
        assert_eq!(guest.point(), point);
    }
    assert_eq!(guest.run(), Exit::Halted { interruptible: false });
    assert_eq!(guest.point(), 4);
    assert!(guest.engine.is_off());
    let expected = [
        (0, Seen::PortWrite(0x3F8, 1, 0x41)),
        (1, Seen::PortRead(0x3F8, 4)),
        (2, Seen::PortWrite(0x3F8, 2, 0x4323)),
    ];
    assert_eq!(guest.bus.seen, expected);
    assert_eq!(guest.general(3), 0x8765_4323);
}

#[test]
fn string_port_accesses_move_every_item() {
    if !has_kvm() {
        return;
    }
    let code = assemble(|a| {
        a.mov(edx, 0x1F0).unwrap();
        a.mov(rdi, 0x30_1000u64).unwrap();
        a.mov(ecx, 5).unwrap();
        a.rep().insw().unwrap();
        a.mov(rsi, 0x30_1000u64).unwrap();
        a.mov(ecx, 5).unwrap();
        a.rep().outsw().unwrap();
        a.hlt().unwrap();
    });
    for points in BOTH {
        let mut guest = Guest::kvm(points, &code);
        guest.states_at_exits();
        let mut soft = Guest::soft(&code);
        soft.states_at_exits();
        assert_eq!(guest.bus.accesses(), soft.bus.accesses());
        assert_eq!(guest.engine.save().general, soft.engine.save().general);
    }
}

#[test]
fn an_input_into_a_device_is_one_point_whether_or_not_anybody_looks() {
    if !has_kvm() {
        return;
    }
    let code = assemble(|a| {
        a.mov(edx, 0x1F0).unwrap();
        a.mov(rdi, DEVICE).unwrap();
        a.insb().unwrap();
        a.in_(al, dx).unwrap();
        a.mov(byte_ptr(rdi), al).unwrap();
        a.hlt().unwrap();
    });
    let mut soft = Guest::soft(&code);
    soft.states_at_exits();
    for look in [false, true] {
        let mut guest = Guest::kvm(PointKind::Exit, &code);
        for point in 1..=3 {
            assert_eq!(guest.run(), Exit::BusAccess);
            assert_eq!(guest.point(), point);
            if look {
                guest.engine.save();
            }
        }
        assert_eq!(guest.run(), Exit::Halted { interruptible: false });
        assert_eq!(guest.bus.accesses(), soft.bus.accesses());
        assert_eq!(guest.engine.save().general, soft.engine.save().general);
    }
}

#[test]
fn exits_at_which_nobody_looks_lead_to_the_same_end() {
    if !has_kvm() {
        return;
    }
    let code = crate::agreement::busy_program();
    let mut watched = Guest::kvm(PointKind::Exit, &code);
    let states = watched.states_at_exits();
    let mut guest = Guest::kvm(PointKind::Exit, &code);
    let mut exits = Vec::new();
    while exits.last().is_none_or(|exit| *exit == Exit::BusAccess) {
        exits.push(guest.run());
    }
    let expected: Vec<Exit> = states.iter().map(|(exit, _)| exit.clone()).collect();
    assert_eq!(exits, expected);
    assert_eq!(Some(guest.engine.save()), states.last().map(|(_, state)| state.clone()));
    assert_eq!(guest.bus.seen, watched.bus.seen);
    // A look in the middle only.
    let mut guest = Guest::kvm(PointKind::Exit, &code);
    let middle = states.len() / 2;
    for _ in 0..=middle {
        guest.run();
    }
    assert_eq!(guest.engine.save(), states[middle].1);
}

#[test]
fn device_memory_goes_to_the_bus() {
    if !has_kvm() {
        return;
    }
    let code = assemble(|a| {
        a.mov(rbx, DEVICE + 0x10).unwrap();
        a.mov(eax, 0x1234_5678).unwrap();
        a.mov(dword_ptr(rbx), eax).unwrap();
        a.mov(rcx, qword_ptr(rbx + 8)).unwrap();
        a.hlt().unwrap();
    });
    for points in BOTH {
        let mut guest = Guest::kvm(points, &code);
        guest.states_at_exits();
        let expected = [
            Seen::MemoryWrite(DEVICE_FRAME + 0x10, vec![0x78, 0x56, 0x34, 0x12]),
            Seen::MemoryRead(DEVICE_FRAME + 0x18, 8),
        ];
        assert_eq!(guest.bus.accesses(), expected, "{points}");
        assert_eq!(guest.general(1), 0x5A5A_5A5A_5A5A_5A5A);
    }
}

#[test]
fn registers_of_the_time_stamp_counter_are_answered_and_unknown_ones_fault() {
    if !has_kvm() {
        return;
    }
    let code = assemble(|a| {
        a.mov(ecx, 0x10).unwrap();
        a.rdmsr().unwrap();
        a.mov(esi, eax).unwrap();
        a.mov(ecx, 0x3B).unwrap();
        a.mov(eax, 5).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(ecx, 0x10).unwrap();
        a.rdmsr().unwrap();
        a.mov(edi, eax).unwrap();
        // STAR is KVM's own.
        a.mov(ecx, 0xC000_0081u32).unwrap();
        a.mov(eax, 0x77).unwrap();
        a.wrmsr().unwrap();
        a.hlt().unwrap();
    });
    for points in BOTH {
        let mut guest = Guest::kvm(points, &code);
        assert_eq!(guest.run(), Exit::Halted { interruptible: false }, "{points}");
        assert_eq!((guest.general(6), guest.general(7)), (777, 782), "{points}");
        assert_eq!(guest.engine.save().msrs.star, 0x77);
        assert_eq!(guest.engine.save().msrs.tsc_adjust, 5);
        let points_passed = if points == PointKind::Exit { 4 } else { 14 };
        assert_eq!(guest.point(), points_passed);
    }
    // An unknown one: the handler of #GP is entered, with the address of the instruction.
    let code = assemble(|a| {
        a.mov(ecx, 0x1B).unwrap();
        a.rdmsr().unwrap();
    });
    for points in BOTH {
        let mut guest = Guest::kvm(points, &code);
        assert_eq!(guest.run(), Exit::Halted { interruptible: false }, "{points}");
        assert_eq!(guest.word(crate::guest::DATA + 8 * 13), 1, "{points}");
        assert_eq!(guest.word(crate::guest::STACK - 40), CODE + 5, "{points}");
    }
}

#[test]
fn an_instruction_kvm_cannot_emulate_ends_the_run_with_its_bytes() {
    if !has_kvm() {
        return;
    }
    // A counter of set bits, which the kernel's emulator lacks. A CPU that executes it itself
    // goes on to the HLT.
    let code = assemble(|a| {
        a.mov(eax, 7).unwrap();
        a.popcnt(ebx, eax).unwrap();
        a.hlt().unwrap();
    });
    let mut guest = Guest::kvm(PointKind::Exit, &code);
    match guest.run() {
        Exit::Fatal(fault) => {
            assert_eq!(fault.rip, CODE + 5);
            assert_eq!(fault.bytes[..4], code[5..9]);
            assert!(fault.what.contains("internal error 1"), "{fault}");
            assert_eq!(guest.engine.save().rip, CODE + 5);
        }
        exit => {
            assert_eq!(exit, Exit::Halted { interruptible: false });
            assert_eq!(guest.general(3), 3);
        }
    }
}
