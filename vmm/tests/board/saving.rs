//! Saving and restoring with every device busy, and refusing what cannot be.

use crate::block::{self, Place};
use crate::driver::{Driver, ENTROPY, EVENT_INDEX, FIRST_DISK};
use crate::machine::{Machine, config};
use vmft_cpu::memory::MIN_MEMORY;
use vmft_log::entry::{Arrival, RequestId};
use vmft_vmm::board::{Board, BoardConfig, BoardError, BoardState, Bytes, DiskOperation};

/// A board with something on its way in every device.
fn busy() -> Machine {
    let mut machine = Machine::new();
    let mut disk = Driver::start(&mut machine, FIRST_DISK, EVENT_INDEX);
    let mut entropy = Driver::start(&mut machine, ENTROPY, 0);
    block::write(&mut machine, &mut disk, Place::new(0), 0, &[1; 512]);
    block::read(&mut machine, &mut disk, Place::new(1), 0, 512);
    block::read(&mut machine, &mut disk, Place::new(2), 8, 512);
    entropy.submit(&mut machine, &[], &[(0x30_0000, 64)]);
    machine.out8(0x43, 0x34);
    machine.out8(0x40, 0x10);
    machine.out8(0x3FC, 0x0B);
    machine.out8(0x3F9, 0x01);
    machine.out8(0x3F8, b'!');
    let input = Arrival::ConsoleInput(b"input that waits for its reader".to_vec());
    machine.board.deliver(machine.now, &input).unwrap();
    machine
}

#[test]
fn a_busy_board_survives_its_encoding() {
    let machine = busy();
    let state = machine.board.save();
    let bytes = postcard::to_stdvec(&state).unwrap();
    let decoded: BoardState = postcard::from_bytes(&bytes).unwrap();
    assert_eq!(decoded, state);
    let restored = Board::restore(&config(), &machine.ram, &decoded).unwrap();
    assert_eq!(restored.save(), state);
    assert_eq!(restored.outstanding(), machine.board.outstanding());
    assert_eq!(restored.interrupt_pending(), machine.board.interrupt_pending());
}

#[test]
fn a_board_of_one_cpu_keeps_its_power_management_and_is_off_wherever_it_is_restored() {
    let mut machine = Machine::new();
    machine.out8(0x602, 0x20);
    machine.out8(0x605, 5 << 2);
    machine.save_and_restore();
    assert_eq!([0x600, 0x602, 0x604, 0x605].map(|port| machine.in8(port)), [0, 0x20, 1, 5 << 2]);
    assert!(!machine.board.is_off());
    machine.out8(0x605, 5 << 2 | 0x20);
    assert!(machine.board.is_off());
    machine.save_and_restore();
    assert!(machine.board.is_off());
    machine.board.reset();
    assert!(!machine.board.is_off());
}

#[test]
fn requests_on_their_way_complete_on_the_restored_board() {
    let mut machine = busy();
    machine.save_and_restore();
    machine.complete(0, 1, 0, &[]);
    machine.complete(0, 3, 0, &[3; 512]);
    machine.complete(0, 2, 0, &[2; 512]);
    assert_eq!(machine.peek_bytes(Place::new(1).data(0).0, 512), [2; 512]);
    assert_eq!(machine.peek_bytes(Place::new(2).data(0).0, 512), [3; 512]);
    assert!(
        machine
            .board
            .outstanding()
            .iter()
            .all(|effect| matches!(effect, vmft_vmm::board::Effect::Entropy { .. }))
    );
}

#[test]
fn states_that_cannot_be_are_refused() {
    let machine = busy();
    let good = machine.board.save();
    type Breakage = fn(&mut BoardState);
    let breakages: [(&str, Breakage); 18] = [
        ("a line nobody drives", |state| state.interrupts[0].lines ^= 1 << 4),
        ("priority", |state| state.interrupts[1].lowest = 9),
        ("timer mode", |state| state.timer.channels[0].mode = 7),
        ("clock memory", |state| state.clock.memory.clear()),
        ("receiver", |state| state.serial.receiver.extend([0; 32])),
        ("reset control", |state| state.reset.control = 0xFF),
        ("power management", |state| state.power.control = 1),
        ("configuration address", |state| state.config_address = 1),
        ("fewer disks", |state| drop(state.functions.disks.pop())),
        ("no entropy device", |state| state.functions.entropy = None),
        ("identity", |state| state.functions.disks[0].config.registers[0] ^= 1),
        ("queue size", |state| state.functions.disks[0].queues[0].size = 3),
        ("ring address", |state| state.functions.disks[0].queues[0].used = MIN_MEMORY),
        ("features", |state| state.functions.disks[0].registers.driver_features |= 1 << 63),
        ("numbering", |state| state.functions.disks[0].device.last = RequestId(1)),
        ("disk bounds", |state| {
            state.functions.disks[0].device.requests[0].operation =
                DiskOperation::Write { offset: u64::MAX - 511, data: vec![0; 512] };
        }),
        ("order", |state| state.functions.disks[0].device.requests[1].issued = true),
        ("buffer", |state| {
            let entropy = state.functions.entropy.as_mut().unwrap();
            entropy.device.requests[0].buffers[0].address = u64::MAX;
        }),
    ];
    for (what, broken) in breakages {
        let mut state = good.clone();
        broken(&mut state);
        let result = Board::restore(&config(), &machine.ram, &state);
        assert!(matches!(result, Err(BoardError::State(_))), "{what}");
    }
}

#[test]
fn configurations_beyond_the_limits_are_refused() {
    let machine = Machine::new();
    let refused = |change: fn(&mut BoardConfig)| {
        let mut config = config();
        change(&mut config);
        Board::new(&config, &machine.ram).unwrap_err()
    };
    assert_eq!(
        refused(|config| config.disks = vec![config.disks[0].clone(); 17]),
        BoardError::TooManyDisks { count: 17 }
    );
    for capacity in [0, 100] {
        let error = match capacity {
            0 => refused(|config| config.disks[1].capacity = Bytes(0)),
            _ => refused(|config| config.disks[1].capacity = Bytes(100)),
        };
        assert_eq!(error, BoardError::DiskCapacity { disk: 1, capacity: Bytes(capacity) });
    }
    assert_eq!(
        refused(|config| config.disks[0].serial = "x".repeat(21)),
        BoardError::DiskSerial { disk: 0 }
    );
    assert_eq!(
        refused(|config| config.memory = Bytes(MIN_MEMORY * 2)),
        BoardError::Memory { configured: Bytes(MIN_MEMORY * 2), given: Bytes(MIN_MEMORY) }
    );
}
