//! The disks, through a driver.

use crate::driver::{
    self, Buffer, DRIVER_OK, Driver, EVENT_INDEX, FIRST_DISK, INDIRECT, INDIRECT_TABLE, NEXT,
    SECOND_DISK, WRITE,
};
use crate::machine::{DISK_BYTES, Machine, completion, config, disk_effect};
use vmft_cpu::PortWidth;
use vmft_log::entry::RequestId;
use vmft_vmm::board::{Board, DeliveryError, DiskOperation, Effect};
use vmft_vmm::devices::virtio::DeviceName;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// What tests put where a status is to come.
const UNANSWERED: u8 = 0xEE;

/// Guest memory of one request: header, status, data.
#[derive(Clone, Copy)]
pub struct Place(u64);

impl Place {
    pub fn new(number: u64) -> Self {
        Self(0x20_0000 + number * 0x2_0000)
    }

    pub fn header(self) -> Buffer {
        (self.0, 16)
    }

    pub fn status(self) -> Buffer {
        (self.0 + 16, 1)
    }

    pub fn data(self, len: u32) -> Buffer {
        (self.0 + 0x1000, len)
    }

    pub fn prepare(self, machine: &Machine, kind: u32, sector: u64) {
        machine.poke(self.0, kind);
        machine.poke(self.0 + 4, 0u32);
        machine.poke(self.0 + 8, sector);
        machine.poke(self.0 + 16, UNANSWERED);
    }

    pub fn answer(self, machine: &Machine) -> u8 {
        machine.peek(self.0 + 16)
    }
}

pub fn read(
    machine: &mut Machine,
    driver: &mut Driver,
    place: Place,
    sector: u64,
    len: u32,
) -> u16 {
    place.prepare(machine, IN, sector);
    driver.submit(machine, &[place.header()], &[place.data(len), place.status()])
}

pub fn write(
    machine: &mut Machine,
    driver: &mut Driver,
    place: Place,
    sector: u64,
    data: &[u8],
) -> u16 {
    place.prepare(machine, OUT, sector);
    let buffer = place.data(data.len() as u32);
    machine.poke_bytes(buffer.0, data);
    driver.submit(machine, &[place.header(), buffer], &[place.status()])
}

pub fn flush(machine: &mut Machine, driver: &mut Driver, place: Place) -> u16 {
    place.prepare(machine, FLUSH, 0);
    driver.submit(machine, &[place.header()], &[place.status()])
}

fn started() -> (Machine, Driver) {
    let mut machine = Machine::new();
    let driver = Driver::start(&mut machine, FIRST_DISK, 0);
    (machine, driver)
}

fn request_numbers(effects: &[Effect]) -> Vec<u64> {
    let number = |effect: &Effect| match effect {
        Effect::Disk { request, .. } => request.0,
        other => panic!("{other:?} is no disk request"),
    };
    effects.iter().map(number).collect()
}

#[test]
fn a_read_goes_out_and_its_data_comes_in_with_an_interrupt() {
    let (mut machine, mut driver) = started();
    let place = Place::new(0);
    let head = read(&mut machine, &mut driver, place, 8, 1024);
    let operation = DiskOperation::Read { offset: 4096, len: 1024 };
    assert_eq!(machine.effects(), [disk_effect(0, 1, operation.clone())]);
    assert_eq!(machine.board.outstanding(), [disk_effect(0, 1, operation)]);
    assert_eq!(driver.next_used(&machine), None);
    assert_eq!(machine.take_interrupt(), None);

    machine.complete(0, 1, OK, &[0xAB; 1024]);
    assert_eq!(machine.peek_bytes(place.data(0).0, 1025), [&[0xAB; 1024][..], &[0]].concat());
    assert_eq!(place.answer(&machine), OK);
    assert_eq!(driver.next_used(&machine), Some((head, 1025)));
    assert_eq!(machine.take_interrupt(), Some(0x30 + 11));
    assert_eq!(machine.take_interrupt(), Some(0x30 + 11), "a level stays until it is cleared");
    assert_eq!(driver.interrupt_status(&mut machine), 1);
    assert_eq!(driver.interrupt_status(&mut machine), 0);
    assert_eq!(machine.take_interrupt(), None);
    assert!(machine.board.outstanding().is_empty());
}

#[test]
fn a_write_is_copied_at_the_exit_that_starts_it() {
    let (mut machine, mut driver) = started();
    let place = Place::new(0);
    let data: Vec<u8> = (0..512).map(|index| index as u8).collect();
    let head = write(&mut machine, &mut driver, place, 3, &data);
    machine.poke_bytes(place.data(0).0, &[0; 512]);
    let outstanding = machine.board.outstanding();
    assert_eq!(outstanding, [disk_effect(0, 1, DiskOperation::Write { offset: 1536, data })]);
    assert_eq!(machine.effects(), outstanding, "kept to be repeated");
    machine.complete(0, 1, OK, &[]);
    assert_eq!(driver.next_used(&machine), Some((head, 1)));
    assert_eq!(place.answer(&machine), OK);
}

#[test]
fn failures_outside_are_passed_on() {
    let (mut machine, mut driver) = started();
    let place = Place::new(0);
    let head = read(&mut machine, &mut driver, place, 0, 512);
    machine.complete(0, 1, IO_ERROR, &[]);
    assert_eq!(driver.next_used(&machine), Some((head, 1)));
    assert_eq!(place.answer(&machine), IO_ERROR);
}

#[test]
fn the_serial_number_is_answered_at_once() {
    let (mut machine, mut driver) = started();
    let place = Place::new(0);
    place.prepare(&machine, GET_ID, 0);
    let head = driver.submit(&mut machine, &[place.header()], &[place.data(20), place.status()]);
    assert!(machine.effects().is_empty());
    assert_eq!(driver.next_used(&machine), Some((head, 21)));
    assert_eq!(machine.peek_bytes(place.data(0).0, 20), b"first\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(place.answer(&machine), OK);
}

#[test]
fn bad_requests_are_answered_with_their_status() {
    let (mut machine, mut driver) = started();
    let end = DISK_BYTES / 512;
    let place = Place::new(0);
    for (sector, len) in [(end, 512), (end - 1, 1024), (u64::MAX, 512), (0, 100), (1 << 60, 512)] {
        for kind in [IN, OUT] {
            place.prepare(&machine, kind, sector);
            let (header, data, status) = (place.header(), place.data(len), place.status());
            let head = if kind == IN {
                driver.submit(&mut machine, &[header], &[data, status])
            } else {
                driver.submit(&mut machine, &[header, data], &[status])
            };
            assert_eq!(driver.next_used(&machine), Some((head, 1)));
            assert_eq!(place.answer(&machine), IO_ERROR, "sector {sector}, {len} bytes");
        }
    }
    for kind in [2, 11, 13, 0xFFFF_FFFF] {
        place.prepare(&machine, kind, 0);
        driver.submit(&mut machine, &[place.header()], &[place.status()]);
        assert_eq!(place.answer(&machine), UNSUPPORTED, "kind {kind}");
    }
    assert!(machine.effects().is_empty());
    assert!(machine.board.take_faults().is_empty());
}

#[test]
fn a_request_of_more_than_the_announced_size_is_refused() {
    let (mut machine, mut driver) = started();
    let size_max = u32::from_le_bytes(machine.load(driver.device + 8));
    let segments = u32::from_le_bytes(machine.load(driver.device + 12));
    let limit = size_max * segments;
    assert!(limit < 1 << 20);
    let place = Place::new(0);
    for (len, answer) in [(limit, UNANSWERED), (limit + 512, IO_ERROR)] {
        place.prepare(&machine, IN, 0);
        let status = (place.0 + 16, 1);
        driver.submit(&mut machine, &[place.header()], &[(0x40_0000, len), status]);
        assert_eq!(place.answer(&machine), answer, "{len} bytes");
    }
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let mut machine = Machine::new();
    let mut driver = Driver::start(&mut machine, SECOND_DISK, 0);
    let place = Place::new(0);
    write(&mut machine, &mut driver, place, 0, &[1; 512]);
    assert_eq!(place.answer(&machine), IO_ERROR);
    assert!(machine.effects().is_empty());
    read(&mut machine, &mut driver, place, 0, 512);
    assert_eq!(machine.effects().len(), 1);
    machine.complete(1, 1, OK, &[0; 512]);
    assert_eq!(machine.take_interrupt(), Some(0x30 + 9));
}

#[test]
fn overlapping_requests_and_flushes_go_out_in_order() {
    let (mut machine, mut driver) = started();
    write(&mut machine, &mut driver, Place::new(0), 0, &[1; 1024]);
    read(&mut machine, &mut driver, Place::new(1), 1, 512);
    flush(&mut machine, &mut driver, Place::new(2));
    write(&mut machine, &mut driver, Place::new(3), 100, &[2; 512]);
    assert_eq!(request_numbers(&machine.effects()), [1, 4]);
    machine.save_and_restore();
    machine.complete(0, 4, OK, &[]);
    assert!(machine.effects().is_empty());
    machine.complete(0, 1, OK, &[]);
    assert_eq!(request_numbers(&machine.effects()), [2, 3]);
}

#[test]
fn chains_may_be_cut_anywhere() {
    let (mut machine, mut driver) = started();
    let place = Place::new(0);
    place.prepare(&machine, OUT, 1);
    machine.poke_bytes(place.data(0).0, &[7; 512]);
    let ((header, _), (data, _)) = (place.header(), place.data(512));
    let pieces = [(header, 3), (header + 3, 13), (data, 1), (data + 1, 511)];
    driver.submit(&mut machine, &pieces, &[place.status()]);
    let operation = DiskOperation::Write { offset: 512, data: vec![7; 512] };
    assert_eq!(machine.effects(), [disk_effect(0, 1, operation)]);
    place.prepare(&machine, IN, 2);
    // The status byte is the last writable byte, wherever that is.
    driver.submit(&mut machine, &[(header, 16)], &[(data, 100), (data + 100, 413)]);
    let bytes: Vec<u8> = (0..512).map(|index| (index % 251) as u8).collect();
    machine.complete(0, 2, OK, &bytes);
    assert_eq!(machine.peek_bytes(data, 512), bytes);
    assert_eq!(machine.peek::<u8>(data + 512), OK);
}

#[test]
fn indirect_tables_are_followed() {
    let mut machine = Machine::new();
    let mut driver = Driver::start(&mut machine, FIRST_DISK, INDIRECT);
    let place = Place::new(0);
    place.prepare(&machine, IN, 0);
    let table = 0x30_0000;
    driver::write_descriptor(&machine, table, 0, place.header(), NEXT, 1);
    driver::write_descriptor(&machine, table, 1, place.data(512), NEXT | WRITE, 2);
    driver::write_descriptor(&machine, table, 2, place.status(), WRITE, 0);
    driver.write_descriptor(&machine, 5, (table, 48), INDIRECT_TABLE, 0);
    driver.make_available(&machine, 5);
    driver.kick(&mut machine);
    machine.complete(0, 1, OK, &[9; 512]);
    assert_eq!(driver.next_used(&machine), Some((5, 513)));
    assert_eq!(machine.peek_bytes(place.data(0).0, 512), [9; 512]);
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let (mut machine, mut driver) = started();
    machine.poke(driver.available, 1u16);
    flush(&mut machine, &mut driver, Place::new(0));
    machine.complete(0, 1, OK, &[]);
    assert_eq!(machine.take_interrupt(), None);
    assert!(driver.next_used(&machine).is_some());
}

#[test]
fn event_indexes_suppress_interrupts_until_the_wanted_one() {
    let mut machine = Machine::new();
    let mut driver = Driver::start(&mut machine, FIRST_DISK, EVENT_INDEX);
    let used_event = driver.available + 4 + 2 * u64::from(driver.size);
    let available_event = driver.used + 4 + 8 * u64::from(driver.size);
    machine.poke(used_event, 1u16);
    flush(&mut machine, &mut driver, Place::new(0));
    assert_eq!(machine.peek::<u16>(available_event), 1, "the next one is to be announced");
    flush(&mut machine, &mut driver, Place::new(1));
    machine.complete(0, 1, OK, &[]);
    assert_eq!(machine.take_interrupt(), None);
    machine.complete(0, 2, OK, &[]);
    assert_eq!(machine.take_interrupt(), Some(0x30 + 11));
}

#[test]
fn a_disabled_pin_raises_no_line() {
    let (mut machine, mut driver) = started();
    machine.config_write(FIRST_DISK, 0x04, PortWidth::Word, 0x0406);
    flush(&mut machine, &mut driver, Place::new(0));
    machine.complete(0, 1, OK, &[]);
    assert_eq!(machine.take_interrupt(), None);
    machine.config_write(FIRST_DISK, 0x04, PortWidth::Word, 0x0006);
    assert_eq!(machine.take_interrupt(), Some(0x30 + 11));
}

#[test]
fn completions_that_fit_no_request_change_nothing() {
    let (mut machine, mut driver) = started();
    read(&mut machine, &mut driver, Place::new(0), 0, 512);
    write(&mut machine, &mut driver, Place::new(1), 0, &[1; 512]);
    let before = machine.board.save();
    let (device, request) = (DeviceName::Disk(0), RequestId(1));
    let wrong_length =
        |given, wanted| DeliveryError::WrongLength { device, request, wanted, given };
    for (arrival, error) in [
        (completion(7, 1, OK, &[]), DeliveryError::NoDevice(DeviceName::Disk(7))),
        (
            completion(1, 1, OK, &[]),
            DeliveryError::NoRequest { device: DeviceName::Disk(1), request },
        ),
        (completion(0, 2, OK, &[]), DeliveryError::NoRequest { device, request: RequestId(2) }),
        (completion(0, 1, OK, &[0; 511]), wrong_length(511, 512)),
        (completion(0, 1, OK, &[0; 513]), wrong_length(513, 512)),
        (completion(0, 1, IO_ERROR, &[0; 512]), wrong_length(512, 0)),
        (completion(0, 1, 3, &[]), DeliveryError::UnknownStatus { device, request, status: 3 }),
    ] {
        assert_eq!(machine.board.deliver(machine.now, &arrival), Err(error));
        assert_eq!(machine.board.save(), before);
    }
}

#[test]
fn after_a_device_reset_old_completions_touch_nothing() {
    let (mut machine, mut driver) = started();
    let place = Place::new(0);
    read(&mut machine, &mut driver, place, 0, 512);
    write(&mut machine, &mut driver, Place::new(1), 4, &[1; 512]);
    driver.set_up(&mut machine, 0);
    assert_eq!(machine.board.outstanding().len(), 2, "they may still reach the disk");
    machine.save_and_restore();
    write(&mut machine, &mut driver, Place::new(2), 4, &[2; 512]);
    assert_eq!(request_numbers(&machine.effects()), [1, 2]);
    machine.complete(0, 1, OK, &[0xFF; 512]);
    assert_eq!(machine.peek_bytes(place.data(0).0, 512), [0; 512]);
    assert_eq!(place.answer(&machine), UNANSWERED);
    machine.complete(0, 2, OK, &[]);
    assert_eq!(request_numbers(&machine.effects()), [3], "it waited for the abandoned write");
    assert_eq!(driver.next_used(&machine), None);
    machine.complete(0, 3, OK, &[]);
    assert!(driver.next_used(&machine).is_some());
}

#[test]
fn a_completion_for_a_device_that_is_not_set_up_touches_no_ring() {
    let (mut machine, mut driver) = started();
    flush(&mut machine, &mut driver, Place::new(0));
    driver.set_status(&mut machine, 0);
    driver.set_status(&mut machine, 0x03);
    driver.accept(&mut machine, 1 << 32 | EVENT_INDEX);
    driver.set_status(&mut machine, 0x0B);
    driver.enable_queue(&mut machine);
    let rings = machine.peek_bytes(driver.descriptors, 0x3000);
    machine.complete(0, 1, OK, &[]);
    assert_eq!(machine.peek_bytes(driver.descriptors, 0x3000), rings);
    assert_eq!(machine.take_interrupt(), None);
}

#[test]
fn after_a_machine_reset_requests_go_on_counting() {
    let (mut machine, mut driver) = started();
    read(&mut machine, &mut driver, Place::new(0), 0, 512);
    machine.out8(0x64, 0xFE);
    assert!(machine.board.reset_requested());
    machine.board.reset();
    assert!(!machine.board.reset_requested());
    machine.save_and_restore();
    assert_eq!(machine.load(driver.common), [0xFF; 4], "the window is closed again");
    let mut driver = Driver::start(&mut machine, FIRST_DISK, 0);
    flush(&mut machine, &mut driver, Place::new(1));
    assert_eq!(request_numbers(&machine.effects()), [1, 2]);
    machine.complete(0, 1, OK, &[0; 512]);
    machine.complete(0, 2, OK, &[]);
    assert_eq!(Place::new(0).answer(&machine), UNANSWERED);
    assert_eq!(Place::new(1).answer(&machine), OK);
}

#[test]
fn a_full_house_takes_no_more_until_a_completion_makes_room() {
    let (mut machine, mut driver) = started();
    let big = 1008 << 10;
    let status = |number: u64| (0x20_0000 + number * 32 + 16, 1);
    for number in 0..5 {
        machine.poke(0x20_0000 + number * 32, IN);
        machine.poke(0x20_0000 + number * 32 + 8, 0u64);
        let header = (0x20_0000 + number * 32, 16);
        driver.submit(&mut machine, &[header], &[(0x40_0000, big), status(number)]);
    }
    assert_eq!(request_numbers(&machine.effects()), [1, 2, 3, 4, 5]);
    driver.set_up(&mut machine, 0);
    for number in 0..5 {
        let header = (0x20_0000 + number * 32, 16);
        driver.submit(&mut machine, &[header], &[(0x40_0000, big), status(number)]);
    }
    assert_eq!(request_numbers(&machine.effects()), [6, 7, 8, 9], "nine megabytes are enough");
    machine.complete(0, 1, OK, &vec![0; big as usize]);
    assert_eq!(request_numbers(&machine.effects()), [10]);
}

#[test]
fn nothing_happens_before_the_driver_is_ready() {
    let mut machine = Machine::new();
    let mut driver = Driver::probe(&mut machine, FIRST_DISK);
    driver.set_up(&mut machine, 0);
    driver.set_status(&mut machine, 0);
    driver.set_status(&mut machine, 0x03);
    flush(&mut machine, &mut driver, Place::new(0));
    assert!(machine.effects().is_empty());
    assert_eq!(machine.take_interrupt(), None);
    driver.set_up(&mut machine, 0);
    assert_eq!(driver.status(&mut machine), DRIVER_OK);
}

#[test]
fn completed_writes_are_kept_until_a_flush_and_come_along_with_the_state() {
    let (mut machine, mut driver) = started();
    write(&mut machine, &mut driver, Place::new(0), 8, &[7; 512]);
    machine.complete(0, 1, OK, &[]);
    assert!(machine.board.completed_writes(&[])[0].writes.is_empty(), "nobody's pair");
    machine.board.keep_completed_writes();
    write(&mut machine, &mut driver, Place::new(0), 9, &[8; 512]);
    machine.complete(0, 2, OK, &[]);
    let kept = machine.board.completed_writes(&[]);
    assert_eq!(kept[0].writes.len(), 1);
    assert_eq!((kept[0].writes[0].offset, &kept[0].writes[0].data[..]), (9 * 512, &[8; 512][..]));
    machine.effects();
    let state = machine.board.save();
    assert!(Board::restore(&config(), &machine.ram, &state).is_err(), "without what it keeps");
    machine.board = Board::restore_with(&config(), &machine.ram, &state, &kept).unwrap();
    assert_eq!(machine.board.completed_writes(&[]), kept);
    driver.set_up(&mut machine, 0);
    assert_eq!(machine.board.completed_writes(&[]), kept, "a reset is no flush");
    flush(&mut machine, &mut driver, Place::new(1));
    machine.complete(0, 3, OK, &[]);
    assert!(machine.board.completed_writes(&[])[0].writes.is_empty());
}

#[test]
fn a_guest_that_never_flushes_has_it_done_by_the_device() {
    let (mut machine, mut driver) = started();
    machine.board.keep_completed_writes();
    machine.effects();
    let data = vec![1; 120 << 10];
    let mut requests = 1..;
    let own = loop {
        write(&mut machine, &mut driver, Place::new(0), 0, &data);
        let request = requests.next().expect("endless");
        assert!(request < 300, "it keeps everything for ever");
        machine.effects();
        machine.complete(0, request, OK, &[]);
        driver.next_used(&machine).expect("answered");
        if let Some(effect) = machine.effects().pop() {
            assert_eq!(effect, disk_effect(0, request + 1, DiskOperation::Flush));
            break request + 1;
        }
    };
    assert_eq!(machine.board.outstanding().len(), 1);
    machine.complete(0, own, OK, &[]);
    assert_eq!(driver.next_used(&machine), None, "nobody in the guest has asked");
    assert!(machine.board.completed_writes(&[])[0].writes.is_empty());
}
