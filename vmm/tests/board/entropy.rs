//! The entropy device, through a driver.

use crate::driver::{Driver, ENTROPY};
use crate::machine::Machine;
use vmft_log::entry::{Arrival, RequestId};
use vmft_vmm::board::{DeliveryError, Effect};
use vmft_vmm::devices::virtio::DeviceName;

const BUFFER: u64 = 0x20_0000;

fn entropy(request: u64, len: u32) -> Effect {
    Effect::Entropy { request: RequestId(request), len }
}

fn answer(request: u64, data: &[u8]) -> Arrival {
    Arrival::Entropy { request: RequestId(request), data: data.to_vec() }
}

#[test]
fn a_buffer_is_filled_with_what_arrives() {
    let mut machine = Machine::new();
    let mut driver = Driver::start(&mut machine, ENTROPY, 0);
    let head = driver.submit(&mut machine, &[], &[(BUFFER, 40), (BUFFER + 0x100, 24)]);
    assert_eq!(machine.effects(), [entropy(1, 64)]);
    machine.save_and_restore();
    assert_eq!(machine.board.outstanding(), [entropy(1, 64)]);
    let data: Vec<u8> = (0..64).collect();
    machine.board.deliver(machine.now, &answer(1, &data)).unwrap();
    assert_eq!(machine.peek_bytes(BUFFER, 40), data[..40]);
    assert_eq!(machine.peek_bytes(BUFFER + 0x100, 24), data[40..]);
    assert_eq!(driver.next_used(&machine), Some((head, 64)));
    assert_eq!(machine.take_interrupt(), Some(0x30 + 5));
}

#[test]
fn a_large_buffer_is_filled_in_part() {
    let mut machine = Machine::new();
    let mut driver = Driver::start(&mut machine, ENTROPY, 0);
    driver.submit(&mut machine, &[], &[(BUFFER, 1 << 20)]);
    assert_eq!(machine.effects(), [entropy(1, 4096)]);
}

#[test]
fn answers_that_fit_no_wish_change_nothing() {
    let mut machine = Machine::new();
    let mut driver = Driver::start(&mut machine, ENTROPY, 0);
    driver.submit(&mut machine, &[], &[(BUFFER, 64)]);
    let before = machine.board.save();
    let device = DeviceName::Entropy;
    for (arrival, error) in [
        (answer(2, &[0; 64]), DeliveryError::NoRequest { device, request: RequestId(2) }),
        (
            answer(1, &[0; 63]),
            DeliveryError::WrongLength { device, request: RequestId(1), wanted: 64, given: 63 },
        ),
    ] {
        assert_eq!(machine.board.deliver(machine.now, &arrival), Err(error));
        assert_eq!(machine.board.save(), before);
    }
}

#[test]
fn abandoned_wishes_are_answered_into_nothing() {
    let mut machine = Machine::new();
    let mut driver = Driver::start(&mut machine, ENTROPY, 0);
    driver.submit(&mut machine, &[], &[(BUFFER, 64)]);
    driver.set_up(&mut machine, 0);
    machine.save_and_restore();
    machine.board.deliver(machine.now, &answer(1, &[0xFF; 64])).unwrap();
    assert_eq!(machine.peek_bytes(BUFFER, 64), [0; 64]);
    assert_eq!(machine.take_interrupt(), None);
}

#[test]
fn wishes_are_bounded_and_go_on_when_answered() {
    let mut machine = Machine::new();
    let mut driver = Driver::start(&mut machine, ENTROPY, 0);
    for round in 0..2 {
        driver.set_up(&mut machine, 0);
        for _ in 0..10 {
            driver.submit(&mut machine, &[], &[(BUFFER, 8)]);
        }
        assert_eq!(machine.effects().len(), [10, 6][round]);
    }
    machine.board.deliver(machine.now, &answer(1, &[0; 8])).unwrap();
    assert_eq!(machine.effects(), [entropy(17, 8)]);
}
