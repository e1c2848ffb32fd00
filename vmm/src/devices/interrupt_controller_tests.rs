use super::*;

const FIRST: Register = Register::Command(Which::First);
const FIRST_DATA: Register = Register::Data(Which::First);
const SECOND: Register = Register::Command(Which::Second);
const SECOND_DATA: Register = Register::Data(Which::Second);

/// Initialised as Linux's `init_8259A` does, with every line unmasked.
fn linux(level_triggered: u16) -> InterruptController {
    let mut pic = InterruptController::new(level_triggered);
    for data in [FIRST_DATA, SECOND_DATA] {
        pic.write(data, 0xFF);
    }
    pic.write(FIRST, 0x11);
    for word in [0x30, 0x04, 0x01] {
        pic.write(FIRST_DATA, word);
    }
    pic.write(SECOND, 0x11);
    for word in [0x38, 0x02, 0x01] {
        pic.write(SECOND_DATA, word);
    }
    pic
}

fn raise(pic: &mut InterruptController, line: u8) {
    pic.set_line(IrqLine::new(line), true);
}

fn lower(pic: &mut InterruptController, line: u8) {
    pic.set_line(IrqLine::new(line), false);
}

#[test]
fn a_masked_pair_is_silent_whatever_its_lines_do() {
    let mut pic = linux(1 << 5 | 1 << 11);
    pic.write(SECOND_DATA, 0xFF);
    pic.write(FIRST_DATA, 0xFE);
    assert!(!pic.is_masked());
    pic.write(FIRST_DATA, 0xFF);
    // What comes from the second comes through the first.
    pic.write(SECOND_DATA, 0);
    assert!(pic.is_masked());
    for line in (0..16).filter(|line| *line != CASCADE) {
        raise(&mut pic, line);
        assert!(!pic.interrupt_pending(), "line {line}");
    }
    pic.write(FIRST_DATA, 0);
    assert!(!pic.is_masked() && pic.interrupt_pending());
}

#[test]
fn the_mask_reads_back_as_linux_probes_it() {
    let mut pic = linux(0);
    pic.write(FIRST_DATA, 0xFB);
    assert_eq!(pic.read(FIRST_DATA), 0xFB);
    pic.write(SECOND_DATA, 0xFF);
    assert_eq!(pic.read(SECOND_DATA), 0xFF);
}

#[test]
fn an_edge_is_delivered_once_and_only_after_it_falls_again() {
    let mut pic = linux(0);
    raise(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x34);
    pic.write(FIRST, 0x64);
    assert!(!pic.interrupt_pending(), "the line is still high, but there was no new edge");
    lower(&mut pic, 4);
    raise(&mut pic, 4);
    assert!(pic.interrupt_pending());
}

#[test]
fn several_edges_before_the_acknowledgement_are_one_interrupt() {
    let mut pic = linux(0);
    for _ in 0..3 {
        pic.pulse(IrqLine::new(0));
    }
    assert_eq!(pic.acknowledge(), 0x30);
    pic.write(FIRST, 0x60);
    assert!(!pic.interrupt_pending());
}

#[test]
fn a_level_interrupt_comes_again_until_the_line_falls() {
    let mut pic = linux(1 << 11);
    raise(&mut pic, 11);
    assert_eq!(pic.acknowledge(), 0x3B);
    assert!(!pic.interrupt_pending(), "in service");
    pic.write(SECOND, 0x63);
    pic.write(FIRST, 0x62);
    assert!(pic.interrupt_pending(), "the line is still high");
    lower(&mut pic, 11);
    assert!(!pic.interrupt_pending());
}

#[test]
fn lower_lines_wait_and_higher_lines_nest() {
    let mut pic = linux(0);
    raise(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x34);
    raise(&mut pic, 5);
    assert!(!pic.interrupt_pending());
    raise(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x31);
    pic.write(FIRST, 0x20);
    assert!(!pic.interrupt_pending(), "4 is still in service");
    pic.write(FIRST, 0x20);
    assert_eq!(pic.acknowledge(), 0x35);
}

#[test]
fn the_second_controller_ranks_between_lines_one_and_three() {
    let mut pic = linux(0);
    raise(&mut pic, 3);
    raise(&mut pic, 15);
    raise(&mut pic, 8);
    assert_eq!(pic.acknowledge(), 0x38);
    assert!(!pic.interrupt_pending(), "line 2 in service holds back 15 and 3");
    pic.write(SECOND, 0x60);
    pic.write(FIRST, 0x62);
    assert_eq!(pic.acknowledge(), 0x3F);
    pic.write(SECOND, 0x67);
    pic.write(FIRST, 0x62);
    assert_eq!(pic.acknowledge(), 0x33);
}

#[test]
fn masked_lines_are_remembered() {
    let mut pic = linux(0);
    pic.write(FIRST_DATA, 0x01);
    pic.pulse(IrqLine::new(0));
    assert!(!pic.interrupt_pending());
    assert_eq!(pic.read(FIRST), 0x01, "IRR");
    pic.write(FIRST_DATA, 0x00);
    assert_eq!(pic.acknowledge(), 0x30);
    pic.write(FIRST, 0x0B);
    assert_eq!(pic.read(FIRST), 0x01, "ISR");
}

#[test]
fn a_request_that_went_away_is_reported_as_input_seven() {
    let mut pic = linux(1 << 5);
    raise(&mut pic, 5);
    assert!(pic.interrupt_pending());
    lower(&mut pic, 5);
    assert!(!pic.interrupt_pending());
    assert_eq!(pic.acknowledge(), 0x37);
    pic.write(FIRST, 0x0B);
    assert_eq!(pic.read(FIRST), 0, "a spurious interrupt is not in service");
}

#[test]
fn automatic_end_of_interrupt_leaves_nothing_in_service() {
    let mut pic = linux(0);
    pic.write(FIRST, 0x11);
    for word in [0x30, 0x04, 0x03] {
        pic.write(FIRST_DATA, word);
    }
    pic.write(FIRST, 0x80);
    raise(&mut pic, 3);
    assert_eq!(pic.acknowledge(), 0x33);
    pic.write(FIRST, 0x0B);
    assert_eq!(pic.read(FIRST), 0);
    assert_eq!(pic.save()[0].lowest, 3, "rotation on automatic end");
}

#[test]
fn rotation_makes_the_served_line_the_least_urgent() {
    let mut pic = linux(0);
    raise(&mut pic, 4);
    pic.acknowledge();
    pic.write(FIRST, 0xA0);
    lower(&mut pic, 4);
    raise(&mut pic, 4);
    raise(&mut pic, 6);
    assert_eq!(pic.acknowledge(), 0x36);
}

#[test]
fn special_mask_mode_lets_less_urgent_lines_through() {
    let mut pic = linux(0);
    raise(&mut pic, 1);
    pic.acknowledge();
    raise(&mut pic, 6);
    assert!(!pic.interrupt_pending());
    pic.write(FIRST_DATA, 0x02);
    pic.write(FIRST, 0x68);
    assert_eq!(pic.acknowledge(), 0x36);
    pic.write(FIRST, 0x20);
    assert_eq!(pic.save()[0].in_service, 0x02, "the masked line needs a specific end");
}

#[test]
fn a_poll_acknowledges_and_names_the_line() {
    let mut pic = linux(0);
    raise(&mut pic, 6);
    pic.write(FIRST, 0x0C);
    assert_eq!(pic.read(FIRST), 0x86);
    assert!(!pic.interrupt_pending());
    pic.write(FIRST, 0x0C);
    assert_eq!(pic.read(FIRST), 0);
}

#[test]
fn fixed_lines_stay_edge_triggered() {
    let mut pic = linux(0);
    pic.write(Register::Elcr(Which::First), 0xFF);
    pic.write(Register::Elcr(Which::Second), 0xFF);
    assert_eq!(pic.read(Register::Elcr(Which::First)), 0xF8);
    assert_eq!(pic.read(Register::Elcr(Which::Second)), 0xDE);
}

#[test]
fn a_restored_pair_goes_on_identically() {
    let mut pic = linux(1 << 11);
    raise(&mut pic, 11);
    raise(&mut pic, 4);
    pic.acknowledge();
    let mut copy = InterruptController::restore(&pic.save()).expect("just saved");
    assert_eq!(copy, pic);
    for pic in [&mut pic, &mut copy] {
        pic.write(SECOND, 0x63);
        pic.write(FIRST, 0x62);
    }
    assert_eq!(copy.acknowledge(), pic.acknowledge());
    assert_eq!(copy, pic);
}

#[test]
fn impossible_registers_are_refused() {
    let mut state = linux(0).save();
    state[0].lowest = 8;
    assert!(InterruptController::restore(&state).is_err());
    let mut state = linux(0).save();
    state[1].level_triggered = 1;
    assert!(InterruptController::restore(&state).is_err());
}
