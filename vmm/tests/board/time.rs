//! Timers, and that it does not matter how often the board is told the time.

use crate::machine::{Machine, config};
use proptest::prelude::*;
use vmft_cpu::PortWidth;
use vmft_log::point::VirtualTime;
use vmft_vmm::board::Board;

/// A tick of 250 Hz, as Linux programs it (`PIT_LATCH` for HZ=250).
const LATCH: u16 = 4773;

#[test]
fn the_periodic_timer_interrupts_two_hundred_and_fifty_times_a_second() {
    let mut machine = Machine::new();
    machine.out8(0x43, 0x34);
    for byte in LATCH.to_le_bytes() {
        machine.out8(0x40, byte);
    }
    let mut ticks = 0;
    while let Some(due) = machine.board.next_timer() {
        if due >= VirtualTime::from_ns(1_000_000_000) {
            break;
        }
        machine.now = due;
        machine.board.advance(due);
        assert_eq!(machine.take_interrupt(), Some(0x30));
        assert_eq!(machine.take_interrupt(), None);
        ticks += 1;
    }
    assert_eq!(ticks, 249);
}

#[test]
fn a_one_shot_as_linux_programs_it_interrupts_once() {
    let mut machine = Machine::new();
    machine.out8(0x43, 0x38);
    for _ in 0..3 {
        for byte in 1000u16.to_le_bytes() {
            machine.out8(0x40, byte);
        }
        let due = machine.board.next_timer().unwrap();
        assert_eq!(due.since(machine.now) / 1_000, 839, "1002 ticks");
        machine.board.advance(VirtualTime::from_ns(due.as_ns() - 1));
        assert_eq!(machine.take_interrupt(), None);
        machine.now = due;
        machine.board.advance(due);
        assert_eq!(machine.take_interrupt(), Some(0x30));
        assert_eq!(machine.board.next_timer(), None);
    }
}

#[test]
fn the_guest_clock_tells_the_time_and_interrupts_once_on_the_timers_line() {
    let mut machine = Machine::new();
    assert_eq!(machine.in32(0x5A4).to_le_bytes(), *b"vmft");
    machine.now = VirtualTime::from_ns(6_400_063);
    assert_eq!(machine.in32(0x5A0), 100_000);
    machine.out32(0x5A0, 1_000);
    let due = machine.board.next_timer().unwrap();
    assert_eq!(due.since(machine.now), 64_000);
    machine.board.advance(VirtualTime::from_ns(due.as_ns() - 1));
    assert_eq!(machine.take_interrupt(), None);
    machine.now = due;
    machine.board.advance(due);
    assert_eq!(machine.take_interrupt(), Some(0x30));
    assert_eq!(machine.board.next_timer(), None);
}

#[test]
fn the_guest_clock_is_not_there_for_narrow_accesses() {
    let mut machine = Machine::new();
    machine.out8(0x5A0, 1);
    machine.board.port_write(machine.now, 0x5A0, PortWidth::Word, 1);
    assert_eq!(machine.board.next_timer(), None);
    assert_eq!(machine.in8(0x5A4), 0xFF);
}

#[test]
fn a_reset_forgets_the_guest_clocks_timer_and_a_save_keeps_it() {
    let mut machine = Machine::new();
    machine.out32(0x5A0, 500);
    let saved = machine.board.save();
    let restored = Board::restore(&config(), &machine.ram, &saved).unwrap();
    assert_eq!(restored.save(), saved);
    assert_eq!(restored.next_timer(), machine.board.next_timer());
    assert!(restored.next_timer().is_some());
    machine.board.reset();
    assert_eq!(machine.board.next_timer(), None);
}

#[test]
fn channel_two_calibrates_a_clock_as_linux_does() {
    let mut machine = Machine::new();
    let gate = machine.in8(0x61) & !0x02 | 0x01;
    machine.out8(0x61, gate);
    machine.out8(0x43, 0xB0);
    let latch = 1_193_182u32 / 100;
    machine.out8(0x42, latch as u8);
    machine.out8(0x42, (latch >> 8) as u8);
    let start = machine.now;
    while machine.in8(0x61) & 0x20 == 0 {
        machine.now = machine.now.after_ns(1_000);
    }
    assert!(machine.now.since(start).abs_diff(10_000_000) < 3_000, "ten milliseconds");
}

#[test]
fn the_fast_calibration_sees_the_high_byte_fall() {
    let mut machine = Machine::new();
    machine.out8(0x61, 0x01);
    machine.out8(0x43, 0xB0);
    machine.out8(0x42, 0xFF);
    machine.out8(0x42, 0xFF);
    let high_byte = |machine: &mut Machine| {
        machine.in8(0x42);
        machine.in8(0x42)
    };
    for expected in [0xFF, 0xFE, 0xFD] {
        let mut polls = 0;
        while high_byte(&mut machine) == expected {
            machine.now = machine.now.after_ns(2_000);
            polls += 1;
        }
        assert!((100..=108).contains(&polls), "{polls} polls of 2 µs in 256 ticks");
    }
}

#[test]
fn the_clock_interrupts_line_eight_until_its_flags_are_read() {
    let mut machine = Machine::new();
    machine.out8(0x70, 0x0B);
    machine.out8(0x71, 0x12);
    machine.now = machine.board.next_timer().unwrap();
    assert_eq!(machine.now, VirtualTime::from_ns(1_000_000_000));
    machine.board.advance(machine.now);
    assert_eq!(machine.take_interrupt(), Some(0x38));
    assert_eq!(machine.take_interrupt(), None, "line 8 is an edge");
    machine.out8(0x70, 0x0C);
    assert_eq!(machine.in8(0x71) & 0x90, 0x90);
    machine.now = machine.board.next_timer().unwrap();
    machine.board.advance(machine.now);
    assert_eq!(machine.take_interrupt(), Some(0x38));
}

#[test]
fn console_input_interrupts_and_is_bounded() {
    let mut machine = Machine::new();
    machine.out8(0x3FC, 0x0B);
    machine.out8(0x3F9, 0x01);
    let room = machine.board.console_input_room();
    let input = vec![b'x'; room + 1];
    let arrival = |len: usize| vmft_log::entry::Arrival::ConsoleInput(input[..len].to_vec());
    assert!(machine.board.deliver(machine.now, &arrival(room + 1)).is_err());
    assert_eq!(machine.board.console_input_room(), room);
    machine.board.deliver(machine.now, &arrival(room)).unwrap();
    assert_eq!(machine.take_interrupt(), Some(0x34));
    machine.save_and_restore();
    let mut read = 0;
    while machine.in8(0x3FD) & 1 != 0 {
        assert_eq!(machine.in8(0x3F8), b'x');
        read += 1;
    }
    assert_eq!(read, room);
}

/// Any access to a port that has a device, at any time after the last.
fn access() -> impl Strategy<Value = (u64, u16, bool, u8, u32)> {
    let ports = prop_oneof![
        4 => 0x40u16..0x44,
        2 => prop::sample::select(vec![0x20u16, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x61, 0x64]),
        4 => 0x70u16..0x72,
        3 => 0x3F8u16..0x400,
        3 => prop::sample::select(vec![0xCF8u16, 0xCF9, 0xCFC, 0xCFE]),
        1 => any::<u16>(),
    ];
    let value = prop_oneof![
        4 => any::<u8>().prop_map(u32::from),
        2 => (0u32..16).prop_map(|register| register),
        1 => (0u32..32, 0u32..64).prop_map(|(slot, at)| 0x8000_0000 | slot << 11 | at << 2),
        1 => any::<u32>(),
    ];
    let wait = prop_oneof![4 => 0u64..10_000, 2 => 0u64..10_000_000, 1 => 0u64..5_000_000_000];
    (wait, ports, any::<bool>(), 0u8..8, value)
}

fn width(selector: u8) -> PortWidth {
    match selector {
        6 => PortWidth::Word,
        7 => PortWidth::Long,
        _ => PortWidth::Byte,
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(0x7469_6D65),
        ..ProptestConfig::default()
    })]

    #[test]
    fn telling_the_time_more_often_changes_nothing(
        accesses in prop::collection::vec(access(), 1..120),
        parts in 1u64..5,
    ) {
        let mut seldom = Machine::new();
        let mut often = Machine::new();
        for (wait, port, write, selector, value) in accesses {
            let now = seldom.now.after_ns(wait);
            for part in 1..=parts {
                often.board.advance(often.now.after_ns(wait * part / parts));
            }
            (seldom.now, often.now) = (now, now);
            let mut values = [0, 0];
            for (machine, read) in [&mut seldom, &mut often].into_iter().zip(&mut values) {
                if write {
                    machine.board.port_write(now, port, width(selector), value);
                } else {
                    *read = machine.board.port_read(now, port, width(selector));
                }
            }
            prop_assert_eq!(values[0], values[1]);
            prop_assert_eq!(seldom.board.save(), often.board.save());
            prop_assert_eq!(seldom.board.next_timer(), often.board.next_timer());
            prop_assert_eq!(seldom.effects(), often.effects());
            if selector == 0 && seldom.board.interrupt_pending() {
                prop_assert_eq!(
                    seldom.board.acknowledge_interrupt(),
                    often.board.acknowledge_interrupt()
                );
            }
        }
    }

    #[test]
    fn a_board_restored_at_any_time_goes_on_identically(
        accesses in prop::collection::vec(access(), 1..120),
    ) {
        let mut running = Machine::new();
        let mut restored = Machine::new();
        for (wait, port, write, selector, value) in accesses {
            let now = running.now.after_ns(wait);
            restored.save_and_restore();
            for machine in [&mut running, &mut restored] {
                machine.now = now;
                if write {
                    machine.board.port_write(now, port, width(selector), value);
                }
            }
            let reads = [&mut running, &mut restored]
                .map(|machine| machine.board.port_read(now, port, width(selector)));
            prop_assert_eq!(reads[0], reads[1]);
            prop_assert_eq!(running.board.save(), restored.board.save());
            prop_assert_eq!(running.board.next_timer(), restored.board.next_timer());
            prop_assert_eq!(
                running.board.interrupt_pending(),
                restored.board.interrupt_pending()
            );
            running.effects();
            restored.effects();
        }
    }
}
