//! The ports.
//!
//! | ports | device |
//! |---|---|
//! | 0x20 0x21, 0xA0 0xA1, 0x4D0 0x4D1 | interrupt controllers and their ELCR |
//! | 0x40–0x43, 0x61 | interval timer |
//! | 0x64 | keyboard controller: status and reset only |
//! | 0x70 0x71 | clock |
//! | 0x3F8–0x3FF | serial port |
//! | 0x5A0, 0x5A4, 32 bits wide | clock for guests that know they are guests |
//! | 0x600–0x60B | power management |
//! | 0xCF8, 0xCFC–0xCFF | PCI configuration |
//! | 0xCF9 | reset control |
//!
//! Everything else is absent: it reads as all ones and ignores writes. A kernel is known to
//! touch these absent ports while it probes or delays, and to take all ones for "not there":
//!
//! | ports | what a PC has there |
//! |---|---|
//! | 0x00–0x0F, 0xC0–0xDF, 0x80–0x8F | DMA controllers and page registers; 0x80 is the delay port |
//! | 0x60 | keyboard data |
//! | 0x92 | system control port A |
//! | 0xED, 0xEB | delay ports of other kernels |
//! | 0x170–0x177, 0x1F0–0x1F7 | IDE |
//! | 0x2E8, 0x2F8, 0x3E8 and the seven after each | serial ports 2 to 4 |
//! | 0x3B0–0x3DF | VGA |
//! | 0x3F0–0x3F7 | floppy |
//! | 0xB2, 0xB3 | system management |

use super::{Board, CLOCK_LINE, SERIAL_LINE, TIMER_LINE};
use crate::devices::guest_clock;
use crate::devices::interrupt_controller::{self as pic, Which};
use crate::devices::interval_timer::{self as pit, Selected};
use crate::devices::pci::ConfigAddress;
use crate::devices::power_management;
use crate::devices::virtio::DeviceContext;
use vmft_cpu::PortWidth;
use vmft_log::point::VirtualTime;

const ABSENT: u8 = 0xFF;
const SERIAL: u16 = 0x3F8;
const SERIAL_END: u16 = SERIAL + 7;
const GUEST_CLOCK: u16 = 0x5A0;
const GUEST_CLOCK_IDENTITY: u16 = 0x5A4;
/// Where the registers of power management are; ACPI's tables name it.
pub(crate) const POWER_MANAGEMENT_PORT: u16 = 0x600;
const POWER_MANAGEMENT_END: u16 = POWER_MANAGEMENT_PORT + power_management::LENGTH - 1;
const CONFIG_ADDRESS: u16 = 0xCF8;
const CONFIG_DATA: u16 = 0xCFC;
const CONFIG_DATA_END: u16 = CONFIG_DATA + 3;

/// What decodes a byte access to a port.
enum Port {
    Serial(u8),
    Interrupts(pic::Register),
    Timer(pit::Register),
    ClockIndex,
    ClockData,
    KeyboardCommand,
    ResetControl,
    Power(u16),
    Absent,
}

fn decode(port: u16) -> Port {
    match port {
        SERIAL..=SERIAL_END => Port::Serial((port - SERIAL) as u8),
        0x20 => Port::Interrupts(pic::Register::Command(Which::First)),
        0x21 => Port::Interrupts(pic::Register::Data(Which::First)),
        0xA0 => Port::Interrupts(pic::Register::Command(Which::Second)),
        0xA1 => Port::Interrupts(pic::Register::Data(Which::Second)),
        0x40 => Port::Timer(pit::Register::Counter(Selected::Zero)),
        0x41 => Port::Timer(pit::Register::Counter(Selected::One)),
        0x42 => Port::Timer(pit::Register::Counter(Selected::Two)),
        0x43 => Port::Timer(pit::Register::Control),
        0x61 => Port::Timer(pit::Register::PortB),
        0x64 => Port::KeyboardCommand,
        0x70 => Port::ClockIndex,
        0x71 => Port::ClockData,
        0x4D0 => Port::Interrupts(pic::Register::Elcr(Which::First)),
        0x4D1 => Port::Interrupts(pic::Register::Elcr(Which::Second)),
        0xCF9 => Port::ResetControl,
        POWER_MANAGEMENT_PORT..=POWER_MANAGEMENT_END => Port::Power(port - POWER_MANAGEMENT_PORT),
        _ => Port::Absent,
    }
}

impl Board {
    pub(super) fn read_port(&mut self, now: VirtualTime, port: u16, width: PortWidth) -> u32 {
        match (port, width) {
            (_, PortWidth::Byte) if !is_config_data(port) => self.read_byte(now, port).into(),
            (GUEST_CLOCK, PortWidth::Long) => {
                self.guest_clock.read(now, guest_clock::Register::Clock)
            }
            (GUEST_CLOCK_IDENTITY, PortWidth::Long) => {
                self.guest_clock.read(now, guest_clock::Register::Identity)
            }
            (CONFIG_ADDRESS, PortWidth::Long) => self.config_address.get(),
            (CONFIG_DATA..=CONFIG_DATA_END, _) => {
                self.read_config((port - CONFIG_DATA) as u8, width)
            }
            // A wide access to byte-wide devices is that many accesses, as on an ISA bus.
            _ => {
                let mut value = [0; 4];
                for (byte, port) in value.iter_mut().zip(consecutive(port, width)) {
                    *byte = self.read_byte(now, port);
                }
                u32::from_le_bytes(value)
            }
        }
    }

    pub(super) fn write_port(&mut self, now: VirtualTime, port: u16, width: PortWidth, value: u32) {
        match (port, width) {
            (_, PortWidth::Byte) if !is_config_data(port) => {
                self.write_byte(now, port, value as u8)
            }
            (GUEST_CLOCK, PortWidth::Long) => {
                self.guest_clock.write(now, guest_clock::Register::Clock, value);
                self.update_next_timer();
            }
            (CONFIG_ADDRESS, PortWidth::Long) => self.config_address = ConfigAddress::new(value),
            (CONFIG_DATA..=CONFIG_DATA_END, _) => {
                self.write_config((port - CONFIG_DATA) as u8, width, value);
            }
            _ => {
                for (byte, port) in value.to_le_bytes().into_iter().zip(consecutive(port, width)) {
                    self.write_byte(now, port, byte);
                }
            }
        }
    }

    fn read_byte(&mut self, now: VirtualTime, port: u16) -> u8 {
        match decode(port) {
            Port::Serial(register) => {
                let value = self.serial.read(register);
                self.interrupts.set_line(SERIAL_LINE, self.serial.line());
                value
            }
            Port::Interrupts(register) => self.interrupts.read(register),
            Port::Timer(register) => self.timer.read(now, register),
            Port::ClockData => {
                let value = self.clock.read_data(now);
                self.clock_changed();
                value
            }
            Port::KeyboardCommand => self.reset.keyboard_status(),
            Port::ResetControl => self.reset.control,
            Port::Power(offset) => self.power.read(now, offset),
            Port::ClockIndex | Port::Absent => ABSENT,
        }
    }

    fn write_byte(&mut self, now: VirtualTime, port: u16, value: u8) {
        match decode(port) {
            Port::Serial(register) => {
                self.serial.write(register, value, &mut self.effects);
                self.interrupts.set_line(SERIAL_LINE, self.serial.line());
            }
            Port::Interrupts(register) => self.interrupts.write(register, value),
            Port::Timer(register) => {
                if self.timer.write(now, register, value) {
                    self.interrupts.pulse(TIMER_LINE);
                }
                self.update_next_timer();
            }
            Port::ClockIndex => self.clock.write_index(value),
            Port::ClockData => {
                self.clock.write_data(now, value);
                self.clock_changed();
            }
            Port::KeyboardCommand => self.reset.keyboard_command(value),
            Port::ResetControl => self.reset.write_control(value),
            Port::Power(offset) => self.power.write(offset, value),
            Port::Absent => {}
        }
    }

    fn clock_changed(&mut self) {
        self.interrupts.set_line(CLOCK_LINE, self.clock.line());
        self.update_next_timer();
    }

    fn read_config(&mut self, byte: u8, width: PortWidth) -> u32 {
        let mut value = [ABSENT; 4];
        let Some((slot, offset)) = self.config_address.target(byte, width) else {
            return masked(u32::MAX, width);
        };
        let Self { ram, functions, effects, faults, .. } = self;
        let mut around = DeviceContext { memory: ram.memory(), effects, faults };
        if let Some(function) = functions.in_slot(slot) {
            function.config_read(offset, &mut value[..width.bytes()], &mut around);
            self.update_pci_lines();
        }
        masked(u32::from_le_bytes(value), width)
    }

    fn write_config(&mut self, byte: u8, width: PortWidth, value: u32) {
        let Some((slot, offset)) = self.config_address.target(byte, width) else { return };
        let Self { ram, functions, effects, faults, .. } = self;
        let mut around = DeviceContext { memory: ram.memory(), effects, faults };
        if let Some(function) = functions.in_slot(slot) {
            function.config_write(offset, &value.to_le_bytes()[..width.bytes()], &mut around);
            self.update_pci_lines();
        }
    }
}

fn is_config_data(port: u16) -> bool {
    (CONFIG_DATA..=CONFIG_DATA_END).contains(&port)
}

/// The ports of a wide access; those beyond the last port wrap, as addresses do.
fn consecutive(port: u16, width: PortWidth) -> impl Iterator<Item = u16> {
    (0..width.bytes() as u16).map(move |offset| port.wrapping_add(offset))
}

fn masked(value: u32, width: PortWidth) -> u32 {
    value & (u32::MAX >> (32 - 8 * width.bytes()))
}
