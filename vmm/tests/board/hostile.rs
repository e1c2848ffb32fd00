//! Guests that break the rules: the device stops and says so, nothing else happens.

use crate::block::{self, IN, Place};
use crate::driver::{
    DRIVER_OK, Driver, ENTROPY, EVENT_INDEX, FIRST_DISK, INDIRECT, INDIRECT_TABLE, NEEDS_RESET,
    NEXT, WRITE, write_descriptor,
};
use crate::machine::{Machine, completion};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::MIN_MEMORY;
use vmft_log::entry::Arrival;
use vmft_vmm::board::{DiskOperation, Effect};
use vmft_vmm::devices::virtio::{DeviceFault, DeviceName, QueueFault};

fn started() -> (Machine, Driver) {
    let mut machine = Machine::new();
    let driver = Driver::start(&mut machine, FIRST_DISK, INDIRECT);
    (machine, driver)
}

/// The device has stopped with this fault, tells its driver, and works again after a reset.
fn assert_stopped(machine: &mut Machine, driver: &mut Driver, fault: QueueFault) {
    let device = DeviceName::Disk(0);
    assert_eq!(machine.board.take_faults(), [DeviceFault { device, fault }]);
    assert_ne!(driver.status(machine) & NEEDS_RESET, 0);
    assert_eq!(machine.take_interrupt(), Some(0x30 + 11));
    assert_eq!(driver.interrupt_status(machine) & 2, 2, "configuration change");
    driver.kick(machine);
    machine.effects();
    machine.save_and_restore();
    driver.set_up(machine, 0);
    block::flush(machine, driver, Place::new(9));
    assert_eq!(machine.effects().len(), 1);
    assert!(machine.board.take_faults().is_empty());
}

#[test]
fn a_buffer_outside_memory_stops_the_device() {
    for address in [MIN_MEMORY, MIN_MEMORY - 511, 0xE000_4000, u64::MAX - 100] {
        let (mut machine, mut driver) = started();
        let place = Place::new(0);
        place.prepare(&machine, IN, 0);
        driver.submit(&mut machine, &[place.header()], &[(address, 512), place.status()]);
        assert!(machine.effects().is_empty());
        let fault = QueueFault::Buffer { queue: 0, head: 0, address };
        assert_stopped(&mut machine, &mut driver, fault);
    }
}

#[test]
fn a_chain_that_never_ends_stops_the_device() {
    let (mut machine, mut driver) = started();
    driver.write_descriptor(&machine, 0, (0x20_0000, 16), NEXT, 1);
    driver.write_descriptor(&machine, 1, (0x20_0000, 16), NEXT, 0);
    driver.make_available(&machine, 0);
    driver.kick(&mut machine);
    let fault = QueueFault::BrokenChain { queue: 0, head: 0 };
    assert_stopped(&mut machine, &mut driver, fault);
}

#[test]
fn a_chain_that_leaves_its_table_stops_the_device() {
    let (mut machine, mut driver) = started();
    driver.write_descriptor(&machine, 3, (0x20_0000, 16), NEXT, 16);
    driver.make_available(&machine, 3);
    driver.kick(&mut machine);
    let fault = QueueFault::BrokenChain { queue: 0, head: 3 };
    assert_stopped(&mut machine, &mut driver, fault);
    driver.set_up(&mut machine, 0);
    machine.effects();
    driver.make_available(&machine, 999);
    driver.kick(&mut machine);
    machine.effects();
    let fault = QueueFault::BrokenChain { queue: 0, head: 999 };
    assert_stopped(&mut machine, &mut driver, fault);
}

#[test]
fn readable_after_writable_stops_the_device() {
    let (mut machine, mut driver) = started();
    driver.write_descriptor(&machine, 0, (0x20_0000, 16), WRITE | NEXT, 1);
    driver.write_descriptor(&machine, 1, (0x20_0000, 16), 0, 0);
    driver.make_available(&machine, 0);
    driver.kick(&mut machine);
    let fault = QueueFault::BrokenChain { queue: 0, head: 0 };
    assert_stopped(&mut machine, &mut driver, fault);
}

#[test]
fn a_request_without_room_for_header_or_status_stops_the_device() {
    for (readable, writable) in
        [(&[(0x20_0000, 15)][..], &[(0x21_0000, 1)][..]), (&[(0x20_0000, 16)], &[])]
    {
        let (mut machine, mut driver) = started();
        driver.submit(&mut machine, readable, writable);
        let fault = QueueFault::ShortChain { queue: 0, head: 0 };
        assert_stopped(&mut machine, &mut driver, fault);
    }
}

#[test]
fn an_available_index_beyond_the_queue_stops_the_device() {
    let (mut machine, mut driver) = started();
    machine.poke(driver.available + 2, 17u16);
    driver.kick(&mut machine);
    assert_stopped(&mut machine, &mut driver, QueueFault::AvailableIndex { queue: 0 });
}

#[test]
fn rings_that_feed_themselves_do_not_go_on_forever() {
    let mut machine = Machine::new();
    let mut driver = Driver::probe(&mut machine, FIRST_DISK);
    // The length in used element 8 is the available index.
    driver.available = driver.used + 4 + 8 * 8 + 2;
    driver.set_up(&mut machine, INDIRECT);
    let (plain, serial) = (Place::new(0), Place::new(1));
    plain.prepare(&machine, 99, 0);
    serial.prepare(&machine, 8, 0);
    for head in 0..driver.size {
        let place = if head == 8 { serial } else { plain };
        let table = 0x30_0000 + u64::from(head) * 64;
        write_descriptor(&machine, table, 0, place.header(), NEXT, 1);
        write_descriptor(&machine, table, 1, place.data(20), NEXT | WRITE, 2);
        write_descriptor(&machine, table, 2, place.status(), WRITE, 0);
        driver.write_descriptor(&machine, head, (table, 48), INDIRECT_TABLE, 0);
    }
    for head in 0..driver.size {
        driver.make_available(&machine, head);
    }
    driver.kick(&mut machine);
    let fault = QueueFault::Endless { queue: 0 };
    let device = DeviceName::Disk(0);
    assert_eq!(machine.board.take_faults(), [DeviceFault { device, fault }]);
}

#[test]
fn rings_outside_memory_stop_the_device() {
    for address in [0, MIN_MEMORY - 16, 0xFFFF_FFFF_FFFF_F000] {
        let mut machine = Machine::new();
        let mut driver = Driver::probe(&mut machine, FIRST_DISK);
        driver.set_status(&mut machine, 0x03);
        driver.accept(&mut machine, 1 << 32);
        driver.set_status(&mut machine, 0x0B);
        driver.available = address;
        driver.enable_queue(&mut machine);
        let fault = QueueFault::Rings { queue: 0 };
        let device = DeviceName::Disk(0);
        assert_eq!(machine.board.take_faults(), [DeviceFault { device, fault }]);
        assert_ne!(driver.status(&mut machine) & NEEDS_RESET, 0);
    }
}

#[test]
fn a_queue_in_use_cannot_be_moved() {
    let (mut machine, mut driver) = started();
    let real = driver.available;
    driver.available = MIN_MEMORY * 2;
    driver.enable_queue(&mut machine);
    driver.available = real;
    block::flush(&mut machine, &mut driver, Place::new(0));
    assert_eq!(machine.effects().len(), 1);
}

#[test]
fn faults_reported_to_nobody_do_not_pile_up() {
    let (mut machine, mut driver) = started();
    for _ in 0..200 {
        driver.set_up(&mut machine, 0);
        machine.poke(driver.available + 2, 17u16);
        driver.kick(&mut machine);
    }
    assert!(machine.board.take_faults().len() <= 64);
}

/// A descriptor whose fields are often nearly right.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let near_memory = prop_oneof![
        8 => 0x10_0000u64..0x12_0000,
        8 => 0x20_0000u64..0x24_0000,
        1 => MIN_MEMORY - 64..MIN_MEMORY + 64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => Just(16u32), 4 => Just(1), 6 => 0u32..2048, 1 => any::<u32>()];
    let flags = prop_oneof![10 => 0u16..4, 2 => 4u16..8, 1 => any::<u16>()];
    let next = prop_oneof![10 => 0u16..16, 1 => any::<u16>()];
    (near_memory, len, flags, next)
}

/// What a guest, or a damaged log, does next.
#[derive(Debug, Clone)]
enum Step {
    Describe(u16, (u64, u32, u16, u16)),
    Head(u16, u16),
    Available(u16),
    Kick,
    Reset,
    Header(u64, u32, u64),
    Complete(u8),
    SaveAndRestore,
}

fn step() -> impl Strategy<Value = Step> {
    let header = (0x20_0000u64..0x20_0400, 0u32..10, 0u64..40_000);
    prop_oneof![
        8 => (0u16..16, descriptor()).prop_map(|(index, fields)| Step::Describe(index, fields)),
        4 => (0u16..16, 0u16..17).prop_map(|(slot, head)| Step::Head(slot, head)),
        4 => (0u16..20).prop_map(Step::Available),
        6 => Just(Step::Kick),
        1 => Just(Step::Reset),
        4 => header.prop_map(|(at, kind, sector)| Step::Header(at & !15, kind, sector)),
        3 => (0u8..3).prop_map(Step::Complete),
        1 => Just(Step::SaveAndRestore),
    ]
}

/// Ends the first outstanding request of the machine, if any, as the outside world would.
fn end_one(machine: &mut Machine, status: u8) {
    let Some(effect) = machine.board.outstanding().into_iter().next() else { return };
    let arrival = match effect {
        Effect::Disk { disk, request, operation: DiskOperation::Read { len, .. } } => {
            let len = if status == 0 { len as usize } else { 0 };
            completion(disk, request.0, status, &vec![0x5A; len])
        }
        Effect::Disk { disk, request, .. } => completion(disk, request.0, status, &[]),
        Effect::Entropy { request, len } => {
            Arrival::Entropy { request, data: vec![0x5A; len as usize] }
        }
        Effect::Console(_) | Effect::Packet(_) => unreachable!("never outstanding"),
    };
    machine.board.deliver(machine.now, &arrival).unwrap();
}

fn run(machine: &mut Machine, driver: &mut Driver, steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Describe(index, (address, len, flags, next)) => {
                driver.write_descriptor(machine, index, (address, len), flags, next);
            }
            Step::Head(slot, head) => {
                machine.poke(driver.available + 4 + 2 * u64::from(slot), head);
            }
            Step::Available(ahead) => {
                let index: u16 = machine.peek(driver.available + 2);
                machine.poke(driver.available + 2, index.wrapping_add(ahead));
            }
            Step::Kick => driver.kick(machine),
            Step::Reset => {
                driver.set_up(machine, EVENT_INDEX | INDIRECT);
            }
            Step::Header(at, kind, sector) => {
                machine.poke(at, kind);
                machine.poke(at + 8, sector);
            }
            Step::Complete(status) => end_one(machine, status),
            Step::SaveAndRestore => machine.save_and_restore(),
        }
        machine.effects();
        assert!(machine.board.outstanding().len() <= 256 + 16);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 192,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(0x76_6D66_7421),
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_ring_contents_break_the_board(
        entropy in any::<bool>(),
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let mut machine = Machine::new();
        let slot = if entropy { ENTROPY } else { FIRST_DISK };
        let mut driver = Driver::start(&mut machine, slot, EVENT_INDEX | INDIRECT);
        run(&mut machine, &mut driver, &steps);
        machine.save_and_restore();
        // Whatever happened, the device serves a driver that starts over.
        driver.set_up(&mut machine, 0);
        for _ in 0..machine.board.outstanding().len() {
            end_one(&mut machine, 0);
        }
        prop_assert_eq!(driver.status(&mut machine), DRIVER_OK);
        machine.effects();
        driver.submit(&mut machine, &[(0x20_0000, 16)], &[(0x30_0000, 513)]);
        let answered = machine.board.outstanding().len() == 1 || driver.next_used(&machine).is_some();
        prop_assert!(answered || machine.board.take_faults().len() == 1);
    }

    #[test]
    fn equal_boards_stay_equal_whether_or_not_one_is_restored(
        steps in prop::collection::vec(step(), 1..100),
    ) {
        let run = |restored: bool| {
            let mut machine = Machine::new();
            let mut driver = Driver::start(&mut machine, FIRST_DISK, EVENT_INDEX | INDIRECT);
            for step in &steps {
                if restored {
                    machine.save_and_restore();
                }
                run(&mut machine, &mut driver, std::slice::from_ref(step));
            }
            let mut memory = vec![0; 0x40_0000];
            machine.ram.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
            (machine.board.save(), memory)
        };
        prop_assert!(run(false) == run(true));
    }
}
