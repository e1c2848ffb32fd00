use super::*;
use crate::board::Effect;

fn port() -> (Serial, EffectQueue) {
    (Serial::new(), EffectQueue::default())
}

/// Set up as Linux's 8250 driver leaves it: FIFOs on, trigger 8, OUT2, receive interrupts.
fn opened() -> (Serial, EffectQueue) {
    let (mut port, mut effects) = self::port();
    port.write(2, 0x87, &mut effects);
    port.write(4, 0x0B, &mut effects);
    port.write(1, 0x05, &mut effects);
    (port, effects)
}

fn read_all(port: &mut Serial) -> Vec<u8> {
    let mut bytes = Vec::new();
    while port.read(5) & LSR_DATA_READY != 0 {
        bytes.push(port.read(0));
    }
    bytes
}

#[test]
fn linux_finds_a_16550a() {
    let (mut port, mut effects) = port();
    port.write(1, 0x00, &mut effects);
    assert_eq!(port.read(1) & 0x0F, 0);
    port.write(1, 0x0F, &mut effects);
    assert_eq!(port.read(1) & 0x0F, 0x0F);
    port.write(1, 0x40, &mut effects);
    assert_eq!(port.read(1), 0, "no sleep mode, no XScale UART unit bit");
    port.write(4, 0x1A, &mut effects);
    assert_eq!(port.read(6) & 0xF0, 0x90, "loop-back test");
    port.write(4, 0x00, &mut effects);
    assert_eq!(port.read(2) >> 6, 0);
    port.write(2, 0x01, &mut effects);
    assert_eq!(port.read(2) >> 6, 3);
    port.write(3, 0x80, &mut effects);
    assert_ne!(port.read(2), 0, "no EFR");
    port.write(0, 0x01, &mut effects);
    port.write(1, 0x02, &mut effects);
    assert_eq!((port.read(0), port.read(1)), (0x01, 0x02));
    port.write(2, 0x21, &mut effects);
    assert_ne!(port.read(2) >> 5, 7, "no 64-byte FIFO");
    assert_eq!(effects.drain().count(), 0);
}

#[test]
fn bytes_written_are_console_output_in_order() {
    let (mut port, mut effects) = opened();
    for byte in *b"line\n" {
        assert_eq!(port.read(5) & 0x60, 0x60);
        port.write(0, byte, &mut effects);
    }
    assert_eq!(effects.drain().collect::<Vec<_>>(), [Effect::Console(b"line\n".to_vec())]);
}

#[test]
fn the_transmitter_interrupts_when_enabled_and_after_each_byte() {
    let (mut port, mut effects) = opened();
    assert!(!port.line());
    port.write(1, 0x07, &mut effects);
    assert!(port.line());
    assert_eq!(port.read(2), 0xC2);
    assert!(!port.line());
    assert_eq!(port.read(2), 0xC1);
    port.write(0, b'x', &mut effects);
    assert!(port.line());
    port.write(1, 0x05, &mut effects);
    assert!(!port.line());
    port.write(1, 0x07, &mut effects);
    assert_eq!(port.read(2), 0xC2, "Linux's THRE test: it comes again");
}

#[test]
fn input_interrupts_until_it_is_read() {
    let (mut port, _) = opened();
    port.receive(b"ls\n");
    assert!(port.line());
    assert_eq!(port.read(2), 0xCC, "below the trigger level");
    assert!(port.line(), "reading IIR does not take it back");
    assert_eq!(read_all(&mut port), b"ls\n");
    assert!(!port.line());
}

#[test]
fn input_beyond_the_fifo_waits_and_nothing_is_lost() {
    let (mut port, _) = opened();
    let input: Vec<u8> = (0..CONSOLE_INPUT_LIMIT).map(|index| index as u8).collect();
    port.receive(&input);
    assert_eq!(port.input_room(), FIFO_DEPTH);
    assert_eq!(port.read(2), 0xC4);
    port.receive(&[7; FIFO_DEPTH]);
    assert_eq!(port.input_room(), 0);
    let read = read_all(&mut port);
    assert_eq!(read[..CONSOLE_INPUT_LIMIT], input);
    assert_eq!(read[CONSOLE_INPUT_LIMIT..], [7; FIFO_DEPTH]);
    assert_eq!(port.input_room(), CONSOLE_INPUT_LIMIT);
}

#[test]
fn without_fifos_bytes_come_one_by_one() {
    let (mut port, mut effects) = port();
    port.write(4, 0x08, &mut effects);
    port.write(1, 0x01, &mut effects);
    port.receive(b"ab");
    assert_eq!(port.read(2), 0x04);
    assert_eq!(port.read(0), b'a');
    assert_eq!(port.read(2), 0x04);
    assert_eq!(port.read(0), b'b');
    assert_eq!(port.read(2), 0x01);
}

#[test]
fn loop_back_returns_bytes_and_keeps_them_from_the_console() {
    let (mut port, mut effects) = opened();
    port.write(4, 0x1B, &mut effects);
    port.receive(b"outside");
    for byte in 0..17 {
        port.write(0, byte, &mut effects);
    }
    assert_eq!(port.read(5) & LSR_OVERRUN, LSR_OVERRUN, "the seventeenth was lost");
    assert_eq!(read_all(&mut port), (0..16).collect::<Vec<u8>>());
    assert_eq!(effects.drain().count(), 0);
    port.write(4, 0x0B, &mut effects);
    assert_eq!(read_all(&mut port), b"outside");
}

#[test]
fn without_out2_the_line_is_disconnected() {
    let (mut port, mut effects) = opened();
    port.receive(b"x");
    port.write(4, 0x03, &mut effects);
    assert!(!port.line());
    port.write(4, 0x0B, &mut effects);
    assert!(port.line());
}

#[test]
fn changes_of_modem_lines_interrupt_and_are_read_once() {
    let (mut port, mut effects) = opened();
    port.write(1, 0x08, &mut effects);
    port.write(4, 0x1F, &mut effects);
    port.write(4, 0x08, &mut effects);
    assert!(port.line());
    assert_eq!(port.read(2), 0xC0);
    assert_eq!(port.read(6), MODEM_LINES | 0x04, "only the ring's trailing edge");
    assert_eq!(port.read(6), MODEM_LINES);
    assert!(!port.line());
}

#[test]
fn clearing_the_receiver_drops_what_the_fifo_holds() {
    let (mut port, mut effects) = opened();
    port.receive(b"0123456789abcdefXY");
    port.write(2, 0x83, &mut effects);
    assert_eq!(read_all(&mut port), b"XY");
}

#[test]
fn a_restored_port_goes_on_identically_and_impossible_ones_are_refused() {
    let (mut port, _) = opened();
    port.receive(&[1; 40]);
    let good = port.save();
    let restored = Serial::restore(&good).expect("just saved");
    assert_eq!(restored.save(), good);
    assert_eq!(restored.line(), port.line());
    let breakages: [fn(&mut SerialState); 4] = [
        |state| state.interrupt_enable = 0x10,
        |state| state.receiver.push_back(0),
        |state| state.input.extend([0; CONSOLE_INPUT_LIMIT]),
        |state| state.receiver.clear(),
    ];
    for broken in breakages {
        let mut state = good.clone();
        broken(&mut state);
        assert!(Serial::restore(&state).is_err());
    }
}
