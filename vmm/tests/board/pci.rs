//! Finding devices as Linux does.

use crate::driver::{Driver, ENTROPY, FIRST_DISK, NETWORK, SECOND_DISK};
use crate::machine::{DISK_BYTES, Machine};
use vmft_cpu::PortWidth::{Byte, Long, Word};

#[test]
fn configuration_mechanism_one_is_recognised() {
    let mut machine = Machine::new();
    machine.out8(0xCFB, 0x01);
    let before = machine.in32(0xCF8);
    machine.out32(0xCF8, 0x8000_0000);
    assert_eq!(machine.in32(0xCF8), 0x8000_0000);
    machine.out32(0xCF8, before);
    assert_eq!(machine.config_read(0, 0x0A, Word), 0x0600, "a host bridge");
    assert!(!machine.board.reset_requested(), "0xCF9 is not part of the address register");
}

#[test]
fn a_scan_finds_the_bridge_and_every_device() {
    let mut machine = Machine::new();
    let found: Vec<(u8, u32)> = (0..32)
        .map(|slot| (slot, machine.config_read(slot, 0, Long)))
        .filter(|(_, id)| *id != 0xFFFF_FFFF)
        .collect();
    let disks = [1, 2].map(|slot| (slot, 0x1042_1AF4));
    let [bridge, network, entropy] = [(0, 0x0D57_8086), (30, 0x1041_1AF4), (31, 0x1044_1AF4)];
    assert_eq!(found, [bridge, disks[0], disks[1], network, entropy]);
}

#[test]
fn absent_functions_and_buses_read_as_all_ones() {
    let mut machine = Machine::new();
    for address in [0x8000_0900, 0x8001_0800, 0x0000_0800, 0x8000_E800] {
        machine.out32(0xCF8, address);
        assert_eq!(machine.in32(0xCFC), 0xFFFF_FFFF, "{address:#x}");
        machine.out32(0xCFC, 0);
    }
}

#[test]
fn configuration_can_be_read_in_every_width() {
    let mut machine = Machine::new();
    assert_eq!(machine.config_read(FIRST_DISK, 0x02, Word), 0x1042);
    assert_eq!(machine.config_read(FIRST_DISK, 0x03, Byte), 0x10);
    assert_eq!(machine.config_read(FIRST_DISK, 0x0A, Word), 0x0180);
    let port = 0xCFF;
    assert_eq!(
        machine.board.port_read(machine.now, port, Word),
        0xFFFF,
        "an access that leaves the double word reaches nothing"
    );
}

#[test]
fn windows_are_sized_and_moved_as_linux_does() {
    let mut machine = Machine::new();
    let first = machine.config_read(FIRST_DISK, 0x10, Long);
    let second = machine.config_read(SECOND_DISK, 0x10, Long);
    assert_ne!(first, second);
    assert!((0xC000_0000..0xFEC0_0000).contains(&first));
    machine.config_write(FIRST_DISK, 0x10, Long, 0xFFFF_FFFF);
    let size = !(machine.config_read(FIRST_DISK, 0x10, Long) & !0xF) + 1;
    assert_eq!(size, 0x4000);
    let moved = 0xC800_0000;
    machine.config_write(FIRST_DISK, 0x10, Long, moved);
    assert_eq!(machine.load(moved.into()), [0xFF; 4], "not enabled yet");
    let driver = Driver::probe(&mut machine, FIRST_DISK);
    assert_eq!(driver.common, u64::from(moved));
    assert_eq!(u16::from_le_bytes(machine.load(driver.common + 0x12)), 1, "one queue");
    assert_eq!(machine.load(first.into()), [0xFF; 4], "nothing is left behind");
    assert_eq!(machine.load(driver.device), (DISK_BYTES / 512).to_le_bytes());
}

#[test]
fn interrupt_lines_are_noted_and_level_triggered() {
    let mut machine = Machine::new();
    let level = u16::from_le_bytes([machine.in8(0x4D0), machine.in8(0x4D1)]);
    for (slot, line) in [(FIRST_DISK, 11), (SECOND_DISK, 9), (NETWORK, 9), (ENTROPY, 5)] {
        assert_eq!(machine.config_read(slot, 0x3C, Word), 0x0100 | line, "pin A");
        assert_ne!(level & 1 << line, 0);
    }
}

#[test]
fn the_window_can_be_reached_through_configuration_space() {
    let mut machine = Machine::new();
    let driver = Driver::probe(&mut machine, FIRST_DISK);
    let mut capability = machine.config_read(FIRST_DISK, 0x34, Byte) as u8;
    while machine.config_read(FIRST_DISK, capability + 3, Byte) != 5 {
        capability = machine.config_read(FIRST_DISK, capability + 1, Byte) as u8;
    }
    let access = |machine: &mut Machine, offset: u32, len: u32| {
        machine.config_write(FIRST_DISK, capability + 8, Long, offset);
        machine.config_write(FIRST_DISK, capability + 12, Long, len);
        capability + 16
    };
    let data = access(&mut machine, 0x2000, 4);
    assert_eq!(machine.config_read(FIRST_DISK, data, Long), (DISK_BYTES / 512) as u32);
    let data = access(&mut machine, 0x14, 1);
    machine.config_write(FIRST_DISK, data, Byte, 0x01);
    assert_eq!(driver.status(&mut machine), 0x01);
    let data = access(&mut machine, 0x3FFF, 4);
    machine.config_write(FIRST_DISK, data, Long, 0);
    machine.config_read(FIRST_DISK, data, Long);
    assert_eq!(driver.status(&mut machine), 0x01, "an access beyond the window does nothing");
}

#[test]
fn features_must_be_offered_and_modern() {
    let mut machine = Machine::new();
    let driver = Driver::probe(&mut machine, FIRST_DISK);
    for features in [0, 1 << 28, 1 << 32 | 1 << 5, 1 << 32 | 1 << 34] {
        driver.set_status(&mut machine, 0);
        driver.set_status(&mut machine, 0x03);
        driver.accept(&mut machine, features);
        driver.set_status(&mut machine, 0x0B);
        assert_eq!(driver.status(&mut machine), 0x03, "features {features:#x}");
    }
    let second = Driver::probe(&mut machine, SECOND_DISK);
    assert_ne!(second.offered(&mut machine) & 1 << 5, 0, "read-only");
    assert_ne!(driver.offered(&mut machine) & 1 << 9, 0, "flush");
}

#[test]
fn queue_registers_show_the_selected_queue_only() {
    let mut machine = Machine::new();
    let driver = Driver::probe(&mut machine, FIRST_DISK);
    let size = |machine: &mut Machine, queue: u16| {
        machine.store(driver.common + 0x16, &queue.to_le_bytes());
        u16::from_le_bytes(machine.load(driver.common + 0x18))
    };
    assert_eq!(size(&mut machine, 1), 0, "there is no second queue");
    assert_eq!(size(&mut machine, 0), 256);
    machine.store(driver.common + 0x18, &100u16.to_le_bytes());
    assert_eq!(size(&mut machine, 0), 256, "no power of two");
    assert_eq!(machine.load(driver.common + 0x1A), [0xFF; 2], "no vectors");
}

#[test]
fn absent_addresses_and_ports_read_as_all_ones() {
    let mut machine = Machine::new();
    assert_eq!(machine.load(0xFEC0_0000), [0xFF; 8]);
    machine.store(0xFEE0_0000, &[0; 4]);
    for port in [0x00, 0x60, 0x80, 0x92, 0x1F7, 0x2F8, 0x3D5, 0xFFFF] {
        machine.out8(port, 0);
        assert_eq!(machine.in8(port), 0xFF, "{port:#x}");
    }
    assert_eq!(machine.in32(0xFFFE), 0xFFFF_FFFF);
    assert!(machine.effects().is_empty());
}
