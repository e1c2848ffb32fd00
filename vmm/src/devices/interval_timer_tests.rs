use super::*;

const ZERO: Register = Register::Counter(Selected::Zero);
const TWO: Register = Register::Counter(Selected::Two);

fn at(tick: Tick) -> VirtualTime {
    time_of(tick)
}

/// Channel 0 in `mode` with `count`, written at tick 0 and therefore loaded at tick 1.
fn channel_zero(mode: u8, count: u16) -> IntervalTimer {
    let mut pit = IntervalTimer::new();
    pit.write(at(0), Register::Control, 0x30 | mode << 1);
    for byte in count.to_le_bytes() {
        pit.write(at(0), ZERO, byte);
    }
    pit
}

fn latched(pit: &mut IntervalTimer, tick: Tick) -> u16 {
    pit.write(at(tick), Register::Control, 0x00);
    let low = pit.read(at(tick), ZERO);
    let high = pit.read(at(tick), ZERO);
    u16::from_le_bytes([low, high])
}

/// Ticks at which channel 0 reports an edge up to `end`, found by jumping from timer to timer.
fn edges(pit: &mut IntervalTimer, end: Tick) -> Vec<Tick> {
    let mut edges = Vec::new();
    while let Some(time) = pit.next_timer().filter(|time| *time <= at(end)) {
        assert!(pit.advance(time));
        edges.push(tick_at(time));
    }
    edges
}

/// Ticks at which OUT rises, found by looking at every tick.
fn rises(pit: &IntervalTimer, end: Tick) -> Vec<Tick> {
    let output = |tick| pit.state.channels[0].output(tick);
    (1..=end).filter(|tick| output(*tick) && !output(tick - 1)).collect()
}

#[test]
fn times_and_ticks_convert_without_drift() {
    for tick in [0, 1, 2, 4773, 1_193_181, 1_193_182, 1_193_183, 1 << 40] {
        assert_eq!(tick_at(time_of(tick)), tick);
        let ns = time_of(tick).as_ns();
        assert!(ns == 0 || tick_at(VirtualTime::from_ns(ns - 1)) == tick - 1);
    }
    assert_eq!(tick_at(VirtualTime::from_ns(3_600_000_000_000)), 3600 * 1_193_182);
}

#[test]
fn edges_are_where_the_output_rises_in_every_mode() {
    for mode in [0, 2, 3, 4] {
        for count in [2, 3, 10, 11] {
            let mut pit = channel_zero(mode, count);
            let expected = rises(&pit, 60);
            assert_eq!(edges(&mut pit, 60), expected, "mode {mode}, count {count}");
            assert!(!expected.is_empty());
        }
    }
}

#[test]
fn mode_zero_interrupts_once_after_the_count() {
    let mut pit = channel_zero(0, 100);
    assert_eq!(edges(&mut pit, 1_000_000), [101]);
    assert_eq!(latched(&mut pit, 101), 0);
    assert_eq!(latched(&mut pit, 102), 0xFFFF, "the counter goes on");
}

#[test]
fn mode_zero_stops_at_the_first_byte_of_a_new_count() {
    let mut pit = channel_zero(0, 100);
    pit.write(at(50), ZERO, 10);
    assert_eq!(pit.next_timer(), None);
    pit.write(at(200), ZERO, 0);
    assert_eq!(edges(&mut pit, 1_000), [211]);
}

#[test]
fn mode_two_interrupts_every_period() {
    let mut pit = channel_zero(2, 100);
    assert_eq!(edges(&mut pit, 350), [101, 201, 301]);
    assert_eq!(latched(&mut pit, 351), 50);
}

#[test]
fn many_periods_at_once_are_one_edge() {
    let mut pit = channel_zero(2, 100);
    assert!(pit.advance(at(5_050)));
    assert!(!pit.advance(at(5_050)));
    assert_eq!(pit.next_timer(), Some(at(5_101)));
}

#[test]
fn a_new_count_in_mode_two_waits_for_the_period_to_end() {
    let mut pit = channel_zero(2, 100);
    for byte in 10u16.to_le_bytes() {
        pit.write(at(150), ZERO, byte);
    }
    assert_eq!(edges(&mut pit, 225), [201, 211, 221]);
    assert_eq!(latched(&mut pit, 225), 6);
    for byte in 50u16.to_le_bytes() {
        pit.write(at(226), ZERO, byte);
    }
    assert_eq!(edges(&mut pit, 300), [231, 281]);
}

#[test]
fn a_new_count_in_mode_three_waits_for_the_half_period() {
    let mut pit = channel_zero(3, 100);
    for byte in 20u16.to_le_bytes() {
        pit.write(at(10), ZERO, byte);
    }
    let expected = rises(&pit, 120);
    assert_eq!(expected, [61, 81, 101], "falls at 51, low for ten, then the new period");
    pit.state.next_edge = pit.state.channels[0].next_edge(10);
    assert_eq!(edges(&mut pit, 120)[..3], expected);
}

#[test]
fn mode_three_is_high_for_the_longer_half_and_counts_by_two() {
    let pit = channel_zero(3, 5);
    let wave: Vec<bool> = (1..11).map(|tick| pit.state.channels[0].output(tick)).collect();
    assert_eq!(wave, [true, true, true, false, false, true, true, true, false, false]);
    let mut pit = channel_zero(3, 100);
    assert_eq!(latched(&mut pit, 1), 100);
    assert_eq!(latched(&mut pit, 11), 80);
    assert_eq!(latched(&mut pit, 61), 80);
}

#[test]
fn mode_four_strobes_once_for_each_written_count() {
    let mut pit = channel_zero(4, 100);
    assert_eq!(edges(&mut pit, 1_000_000), [102], "low for one tick, then high");
    for byte in 7u16.to_le_bytes() {
        pit.write(at(1_000_000), ZERO, byte);
    }
    assert_eq!(edges(&mut pit, 2_000_000), [1_000_009]);
}

#[test]
fn a_count_of_zero_is_the_longest() {
    let mut pit = channel_zero(0, 0);
    assert_eq!(edges(&mut pit, 100_000), [65_537]);
    let mut pit = IntervalTimer::new();
    pit.write(at(0), Register::Control, 0x31);
    pit.write(at(0), ZERO, 0);
    pit.write(at(0), ZERO, 0);
    assert_eq!(edges(&mut pit, 100_000), [10_001]);
}

#[test]
fn a_decimal_counter_reads_in_decimal() {
    let mut pit = IntervalTimer::new();
    pit.write(at(0), Register::Control, 0x35);
    pit.write(at(0), ZERO, 0x00);
    pit.write(at(0), ZERO, 0x10);
    assert_eq!(latched(&mut pit, 1), 0x1000);
    assert_eq!(latched(&mut pit, 2), 0x0999);
}

#[test]
fn a_latched_count_stays_until_it_is_read() {
    let mut pit = channel_zero(2, 1000);
    pit.write(at(101), Register::Control, 0x00);
    pit.write(at(500), Register::Control, 0x00);
    let low = pit.read(at(600), ZERO);
    let high = pit.read(at(700), ZERO);
    assert_eq!(u16::from_le_bytes([low, high]), 900);
    assert_eq!(latched(&mut pit, 701), 300);
}

#[test]
fn read_back_gives_status_then_count() {
    let mut pit = channel_zero(2, 1000);
    pit.write(at(101), Register::Control, 0xC2);
    assert_eq!(pit.read(at(101), ZERO), 0x80 | 0x30 | 0x04);
    assert_eq!(pit.read(at(101), ZERO), 900u16.to_le_bytes()[0]);
    assert_eq!(pit.read(at(101), ZERO), 900u16.to_le_bytes()[1]);
    pit.write(at(200), Register::Control, 0x30);
    pit.write(at(200), Register::Control, 0xE2);
    assert_eq!(pit.read(at(200), ZERO), 0x40 | 0x30, "null count, output low");
}

#[test]
fn single_byte_access_moves_one_byte() {
    let mut pit = IntervalTimer::new();
    pit.write(at(0), Register::Control, 0x14);
    pit.write(at(0), ZERO, 50);
    assert_eq!(edges(&mut pit, 101), [51, 101]);
    assert_eq!(pit.read(at(102), ZERO), 49);
    assert_eq!(pit.read(at(103), ZERO), 48);
    pit.write(at(0), Register::Control, 0x24);
    pit.write(at(0), ZERO, 1);
    assert_eq!(pit.next_timer(), Some(at(257)));
}

#[test]
fn port_61_gates_channel_two_and_shows_its_output() {
    let mut pit = IntervalTimer::new();
    pit.write(at(0), Register::PortB, 0x01);
    pit.write(at(0), Register::Control, 0xB0);
    for byte in 1000u16.to_le_bytes() {
        pit.write(at(0), TWO, byte);
    }
    assert_eq!(pit.read(at(1000), Register::PortB) & 0x20, 0);
    assert_eq!(pit.read(at(1001), Register::PortB) & 0x2F, 0x21);
    for byte in 1000u16.to_le_bytes() {
        pit.write(at(2000), TWO, byte);
    }
    pit.write(at(2101), Register::PortB, 0x00);
    assert_eq!(pit.read(at(9000), Register::PortB) & 0x20, 0, "paused");
    pit.write(at(9000), Register::PortB, 0x01);
    assert_eq!(pit.read(at(9899), Register::PortB) & 0x20, 0);
    assert_eq!(pit.read(at(9900), Register::PortB) & 0x20, 0x20);
}

#[test]
fn a_low_gate_holds_a_periodic_channel_high_and_a_rising_gate_restarts_it() {
    let mut pit = IntervalTimer::new();
    pit.write(at(0), Register::Control, 0xB4);
    for byte in 10u16.to_le_bytes() {
        pit.write(at(0), TWO, byte);
    }
    assert!((0..50).all(|tick| pit.state.channels[2].output(tick)));
    pit.write(at(100), Register::PortB, 0x01);
    assert!(!pit.state.channels[2].output(110));
    assert!(pit.state.channels[2].output(111));
}

#[test]
fn a_trigger_starts_the_one_shot_of_mode_one() {
    let mut pit = IntervalTimer::new();
    pit.write(at(0), Register::Control, 0xB2);
    for byte in 10u16.to_le_bytes() {
        pit.write(at(0), TWO, byte);
    }
    assert!(pit.state.channels[2].output(50));
    pit.write(at(100), Register::PortB, 0x01);
    assert!(!pit.state.channels[2].output(110));
    assert!(pit.state.channels[2].output(111));
}

#[test]
fn a_mode_that_idles_high_is_an_edge_after_one_that_idles_low() {
    let mut pit = channel_zero(0, 1000);
    assert!(pit.write(at(10), Register::Control, 0x38));
    assert!(!pit.write(at(10), Register::Control, 0x38));
}

#[test]
fn advancing_in_steps_is_advancing_at_once() {
    for mode in [0, 2, 3, 4] {
        let mut stepped = channel_zero(mode, 37);
        let mut at_once = stepped.clone();
        let mut edges = false;
        for tick in 0..400 {
            edges |= stepped.advance(at(tick));
        }
        assert_eq!(at_once.advance(at(399)), edges);
        assert_eq!(stepped, at_once);
    }
}

#[test]
fn impossible_registers_are_refused() {
    let good = channel_zero(2, 100).save();
    assert!(IntervalTimer::restore(&good).is_ok());
    let breakages: [fn(&mut IntervalTimerState); 6] = [
        |state| state.channels[0].mode = 6,
        |state| state.channels[0].gate = false,
        |state| state.channels[0].counting = Counting::Running { loaded: 0, count: 0 },
        |state| state.channels[0].counting = Counting::Running { loaded: i64::MAX, count: 9 },
        |state| state.next_edge = Some(i64::MAX),
        |state| state.port_b = 1,
    ];
    for broken in breakages {
        let mut state = good.clone();
        broken(&mut state);
        assert!(IntervalTimer::restore(&state).is_err());
    }
}
