use super::*;

/// 2023-11-14 22:13:20, a Tuesday.
const BASE: i64 = 1_700_000_000;

fn seconds(count: u64) -> VirtualTime {
    VirtualTime::from_ns(count * NS_PER_SECOND)
}

fn read(rtc: &mut CmosClock, now: VirtualTime, register: usize) -> u8 {
    rtc.write_index(register as u8);
    rtc.read_data(now)
}

fn write(rtc: &mut CmosClock, now: VirtualTime, register: usize, value: u8) {
    rtc.write_index(register as u8);
    rtc.write_data(now, value);
}

fn shown(rtc: &mut CmosClock, now: VirtualTime) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY_OF_MONTH, HOURS, MINUTES, SECONDS, DAY_OF_WEEK]
        .map(|register| read(rtc, now, register))
}

#[test]
fn the_time_is_the_base_plus_virtual_time_in_decimal_digits() {
    let mut rtc = CmosClock::new(BASE);
    let now = VirtualTime::ZERO;
    assert_eq!(shown(&mut rtc, now), [0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x20, 0x03]);
    let now = seconds(2 * 3600);
    assert_eq!(shown(&mut rtc, now), [0x20, 0x23, 0x11, 0x15, 0x00, 0x13, 0x20, 0x04]);
    assert_eq!(read(&mut rtc, now, REGISTER_D), 0x80);
}

#[test]
fn binary_and_twelve_hour_modes_are_honoured() {
    let mut rtc = CmosClock::new(BASE);
    let now = VirtualTime::ZERO;
    write(&mut rtc, now, REGISTER_B, B_BINARY | B_24_HOURS);
    assert_eq!(shown(&mut rtc, now), [20, 23, 11, 14, 22, 13, 20, 3]);
    write(&mut rtc, now, REGISTER_B, 0);
    assert_eq!(read(&mut rtc, now, HOURS), 0x80 | 0x10);
    assert_eq!(read(&mut rtc, seconds(2 * 3600), HOURS), 0x12);
}

#[test]
fn update_in_progress_announces_the_next_second() {
    let mut rtc = CmosClock::new(BASE);
    let before = VirtualTime::from_ns(NS_PER_SECOND - UPDATE_NS - 1);
    assert_eq!(read(&mut rtc, before, REGISTER_A), 0x26);
    assert_eq!(read(&mut rtc, before.after_ns(1), REGISTER_A), 0xA6);
    assert_eq!(read(&mut rtc, seconds(1), REGISTER_A), 0x26);
    write(&mut rtc, before, REGISTER_B, B_SET | B_24_HOURS);
    assert_eq!(read(&mut rtc, before.after_ns(1), REGISTER_A), 0x26);
}

#[test]
fn the_clock_can_be_set_as_linux_does() {
    let mut rtc = CmosClock::new(BASE);
    let now = seconds(100);
    write(&mut rtc, now, REGISTER_B, B_SET | B_24_HOURS);
    for (register, value) in [
        (YEAR, 0x31),
        (MONTH, 0x12),
        (DAY_OF_MONTH, 0x31),
        (HOURS, 0x23),
        (MINUTES, 0x59),
        (SECONDS, 0x58),
    ] {
        write(&mut rtc, now, register, value);
    }
    assert_eq!(read(&mut rtc, seconds(200), SECONDS), 0x58, "held");
    write(&mut rtc, now, REGISTER_B, B_24_HOURS);
    assert_eq!(shown(&mut rtc, now)[..7], [0x20, 0x31, 0x12, 0x31, 0x23, 0x59, 0x58]);
    assert_eq!(shown(&mut rtc, seconds(102))[..7], [0x20, 0x32, 1, 1, 0, 0, 0]);
}

#[test]
fn one_field_can_be_written_while_the_clock_runs() {
    let mut rtc = CmosClock::new(BASE);
    write(&mut rtc, seconds(10), MINUTES, 0x45);
    assert_eq!(shown(&mut rtc, seconds(11))[4..7], [0x22, 0x45, 0x31]);
}

#[test]
fn the_periodic_interrupt_comes_at_its_rate() {
    let mut rtc = CmosClock::new(BASE);
    write(&mut rtc, VirtualTime::ZERO, REGISTER_B, B_24_HOURS | FLAG_PERIODIC);
    let mut times = Vec::new();
    for _ in 0..1024 {
        let time = rtc.next_timer().expect("periodic");
        rtc.advance(time);
        assert!(rtc.line());
        assert_eq!(rtc.next_timer(), None, "nothing more until the flags are read");
        assert_eq!(read(&mut rtc, time, REGISTER_C) & 0xC0, 0xC0);
        assert!(!rtc.line());
        times.push(time);
    }
    assert_eq!(times[0].as_ns(), 976_563, "1,024 Hz");
    assert_eq!(times[1023], seconds(1));
}

#[test]
fn the_alarm_comes_at_its_time_of_day_and_wildcards_match() {
    let mut rtc = CmosClock::new(BASE);
    let now = VirtualTime::ZERO;
    for (register, value) in [(HOURS_ALARM, 0x06), (MINUTES_ALARM, 0x30), (SECONDS_ALARM, 0)] {
        write(&mut rtc, now, register, value);
    }
    write(&mut rtc, now, REGISTER_B, B_24_HOURS | FLAG_ALARM);
    let due = seconds(8 * 3600 + 16 * 60 + 40);
    assert_eq!(rtc.next_timer(), Some(due));
    rtc.advance(due);
    assert_eq!(read(&mut rtc, due, REGISTER_C) & 0xA0, 0xA0);
    assert_eq!(rtc.next_timer(), Some(due.after_ns(86_400 * NS_PER_SECOND)));
    for register in [HOURS_ALARM, MINUTES_ALARM] {
        write(&mut rtc, now, register, 0xFF);
    }
    assert_eq!(rtc.next_timer(), Some(due.after_ns(60 * NS_PER_SECOND)));
    for register in [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM] {
        write(&mut rtc, due, register, 0x77);
        assert_eq!(rtc.next_timer(), None, "an alarm that never matches");
        write(&mut rtc, due, register, 0xFF);
    }
}

#[test]
fn the_update_interrupt_comes_every_second() {
    let mut rtc = CmosClock::new(BASE);
    let now = VirtualTime::from_ns(1_500_000_000);
    read(&mut rtc, now, REGISTER_C);
    write(&mut rtc, now, REGISTER_B, B_24_HOURS | FLAG_UPDATE);
    assert_eq!(rtc.next_timer(), Some(seconds(2)));
    rtc.advance(VirtualTime::from_ns(1_999_999_999));
    assert!(!rtc.line());
    rtc.advance(seconds(2));
    assert!(rtc.line());
    write(&mut rtc, seconds(2), REGISTER_B, B_24_HOURS);
    assert!(!rtc.line(), "disabling lowers the line");
}

#[test]
fn flags_accumulate_without_interrupts() {
    let mut rtc = CmosClock::new(BASE);
    assert_eq!(read(&mut rtc, seconds(5), REGISTER_C), FLAG_PERIODIC | FLAG_UPDATE);
    assert_eq!(read(&mut rtc, seconds(5), REGISTER_C), 0);
    assert_eq!(rtc.next_timer(), None);
}

#[test]
fn advancing_changes_nothing_until_an_interrupt_is_due() {
    let mut rtc = CmosClock::new(BASE);
    write(&mut rtc, VirtualTime::ZERO, REGISTER_B, B_24_HOURS | FLAG_UPDATE);
    read(&mut rtc, VirtualTime::ZERO, REGISTER_C);
    let before = rtc.save();
    rtc.advance(VirtualTime::from_ns(NS_PER_SECOND - 1));
    assert_eq!(rtc.save(), before);
}

#[test]
fn other_cells_are_memory() {
    let mut rtc = CmosClock::new(BASE);
    write(&mut rtc, VirtualTime::ZERO, 0x8F, 0x0A);
    assert_eq!(read(&mut rtc, seconds(1), 0x0F), 0x0A, "bit 7 of the index is the NMI mask");
}

#[test]
fn impossible_registers_are_refused() {
    let good = CmosClock::new(BASE).save();
    assert!(CmosClock::restore(&good).is_ok());
    let breakages: [fn(&mut CmosClockState); 5] = [
        |state| state.memory.truncate(64),
        |state| state.index = 128,
        |state| state.memory[REGISTER_D] = 0,
        |state| state.base = i64::MAX,
        |state| state.flags = 0xFF,
    ];
    for broken in breakages {
        let mut state = good.clone();
        broken(&mut state);
        assert!(CmosClock::restore(&state).is_err());
    }
}

fn world(unix_seconds: i64) -> WallTime {
    WallTime::from_unix_ns(u64::try_from(unix_seconds).expect("after 1970") * NS_PER_SECOND)
}

#[test]
fn a_clock_that_is_told_the_worlds_time_tells_it_whatever_guest_time_is() {
    let mut rtc = CmosClock::new(BASE);
    // Ten seconds of guest time, two hours of the world's.
    let now = seconds(10);
    rtc.tell(now, world(BASE + 7_200));
    assert_eq!(shown(&mut rtc, now), [0x20, 0x23, 0x11, 0x15, 0x00, 0x13, 0x20, 0x04]);
    assert_eq!(read(&mut rtc, seconds(11), SECONDS), 0x21);
    // Back again, and by less than a second: that is no news.
    rtc.tell(now, world(BASE + 10));
    assert_eq!(shown(&mut rtc, now), [0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x30, 0x03]);
    let before = rtc.clone();
    rtc.tell(now, WallTime::from_unix_ns(world(BASE + 10).as_unix_ns() + NS_PER_SECOND / 3));
    assert_eq!(rtc, before);
}

#[test]
fn a_clock_that_the_guest_keeps_in_local_time_stays_so() {
    let mut rtc = CmosClock::new(BASE);
    let now = VirtualTime::ZERO;
    write(&mut rtc, now, HOURS, 0x20);
    rtc.tell(seconds(5), world(BASE + 5 + 60));
    assert_eq!(shown(&mut rtc, seconds(5)), [0x20, 0x23, 0x11, 0x14, 0x20, 0x14, 0x25, 0x03]);
}

#[test]
fn an_alarm_that_was_due_before_the_time_was_told_is_not_lost() {
    let mut rtc = CmosClock::new(BASE);
    let now = VirtualTime::ZERO;
    for (register, value) in [(HOURS_ALARM, 0x22), (MINUTES_ALARM, 0x13), (SECONDS_ALARM, 0x22)] {
        write(&mut rtc, now, register, value);
    }
    write(&mut rtc, now, REGISTER_B, B_24_HOURS | FLAG_ALARM);
    assert_eq!(rtc.next_timer(), Some(seconds(2)));
    // Not due yet by the old time, and by the new one in a second.
    let mut early = rtc.clone();
    early.tell(seconds(1), world(BASE + 1 - 86_400));
    assert_eq!((early.line(), early.next_timer()), (false, Some(seconds(2))));
    rtc.tell(seconds(3), world(BASE + 86_400));
    assert!(rtc.line());
    let told = C_INTERRUPT | FLAG_ALARM | FLAG_UPDATE;
    assert_eq!(read(&mut rtc, seconds(3), REGISTER_C) & told, told);
}

#[test]
fn a_told_time_is_saved_and_one_that_cannot_be_is_refused() {
    let mut rtc = CmosClock::new(BASE);
    for ns in [0, u64::MAX] {
        rtc.tell(seconds(3), WallTime::from_unix_ns(ns));
        rtc.tell(VirtualTime::NEVER, WallTime::from_unix_ns(ns));
        assert_eq!(CmosClock::restore(&rtc.save()), Ok(rtc.clone()));
    }
    let wrong = CmosClockState { told: i64::MAX, ..rtc.save() };
    assert!(CmosClock::restore(&wrong).is_err());
}
