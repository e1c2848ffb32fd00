//! A type 0 configuration space of 256 bytes: fixed values and a mask of writable bits.
//!
//! Source: PCI Local Bus Specification 3.0, chapter 6. A base address register needs no code of
//! its own: its low bits are not writable, so writing all ones reads back the window's size.

use crate::devices::{InvalidState, require};
use serde::{Deserialize, Serialize};

const SIZE: usize = 256;
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BAR_0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2C;
const SUBSYSTEM: usize = 0x2E;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
const INTERRUPT_PIN: usize = 0x3D;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 0x0002;
const COMMAND_INTX_DISABLE: u16 = 0x0400;
/// Memory space, bus master, and INTx disable can be set; there are no I/O ports.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 0x0004 | COMMAND_INTX_DISABLE;
const STATUS_CAPABILITIES: u8 = 0x10;
const STATUS_INTERRUPT: u8 = 0x08;

/// What identifies a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Where a function's memory window is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarWindow {
    /// First guest-physical address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Saved configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpaceState {
    /// All 256 bytes.
    pub registers: Vec<u8>,
}

/// A configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSpace {
    registers: [u8; SIZE],
    writable: [u8; SIZE],
    bar_size: u32,
    /// Where the last capability's link to the next one is.
    last_link: usize,
    /// Where the next capability goes.
    next_capability: usize,
}

impl ConfigSpace {
    /// A space with an identity and nothing else.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            registers: [0; SIZE],
            writable: [0; SIZE],
            bar_size: 0,
            last_link: CAPABILITIES,
            next_capability: FIRST_CAPABILITY,
        };
        space.put(VENDOR, &identity.vendor.to_le_bytes());
        space.put(DEVICE, &identity.device.to_le_bytes());
        space.put(REVISION, &[identity.revision]);
        space.put(CLASS, &identity.class.to_le_bytes()[..3]);
        space.put(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        space
    }

    /// Gives the function a 32-bit memory window in its first base address register, as
    /// firmware would have placed it.
    ///
    /// # Panics
    /// If `size` is no power of two of at least 16, or `base` not a multiple of it.
    pub fn set_window(&mut self, base: u32, size: u32) {
        assert!(size.is_power_of_two() && size >= 16 && base.is_multiple_of(size));
        self.bar_size = size;
        self.put(BAR_0, &base.to_le_bytes());
        self.allow(BAR_0, &(!(size - 1)).to_le_bytes());
        self.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
    }

    /// Gives the function an INTA# pin that is wired to interrupt line `line`, which firmware
    /// would have noted in the interrupt line register.
    pub fn set_interrupt(&mut self, line: u8) {
        self.put(INTERRUPT_LINE, &[line]);
        self.allow(INTERRUPT_LINE, &[0xFF]);
        self.put(INTERRUPT_PIN, &[1]);
    }

    /// Adds a capability; `body` follows the two bytes of header, and the bits set in
    /// `writable` (as long as `body`) can be written. Returns the offset of the header.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let offset = self.next_capability;
        let here = u8::try_from(offset).expect("capabilities lie in the first 256 bytes");
        self.put(self.last_link, &[here]);
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.allow(offset + 2, writable);
        self.registers[STATUS] |= STATUS_CAPABILITIES;
        self.last_link = offset + 1;
        self.next_capability = (offset + 2 + body.len()).next_multiple_of(4);
        here
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.registers[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// The guest reads bytes from `offset` on.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        for (index, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.registers.get(index).copied().unwrap_or(0xFF);
        }
    }

    /// The guest writes bytes from `offset` on.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        for (index, value) in (usize::from(offset)..SIZE).zip(data) {
            let mask = self.writable[index];
            self.registers[index] = self.registers[index] & !mask | value & mask;
        }
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes([self.registers[COMMAND], self.registers[COMMAND + 1]])
    }

    /// The memory window, if there is one and the guest has enabled it.
    #[inline]
    pub fn window(&self) -> Option<BarWindow> {
        if self.bar_size == 0 || self.command() & COMMAND_MEMORY == 0 {
            return None;
        }
        let mut bar = [0; 4];
        bar.copy_from_slice(&self.registers[BAR_0..BAR_0 + 4]);
        Some(BarWindow { base: u32::from_le_bytes(bar).into(), len: self.bar_size.into() })
    }

    /// Shows the function's interrupt condition in the status register, and returns what
    /// that makes of the pin.
    pub fn set_interrupt_condition(&mut self, active: bool) -> bool {
        self.registers[STATUS] &= !STATUS_INTERRUPT;
        self.registers[STATUS] |= if active { STATUS_INTERRUPT } else { 0 };
        self.interrupt_pin()
    }

    /// The level of the pin.
    pub fn interrupt_pin(&self) -> bool {
        self.registers[STATUS] & STATUS_INTERRUPT != 0 && self.command() & COMMAND_INTX_DISABLE == 0
    }

    /// Everything a restored space needs.
    pub fn save(&self) -> ConfigSpaceState {
        let Self { registers, writable: _, bar_size: _, last_link: _, next_capability: _ } = self;
        ConfigSpaceState { registers: registers.to_vec() }
    }

    /// Takes over a saved space, which must have been this function's.
    ///
    /// # Errors
    /// [`InvalidState`] if a fixed bit differs; nothing is changed.
    pub fn restore(&mut self, state: &ConfigSpaceState) -> Result<(), InvalidState> {
        let check = |holds, reason| require("PCI configuration", holds, reason);
        check(state.registers.len() == SIZE, "not 256 bytes")?;
        let mut fixed = self.writable.map(|mask| !mask);
        fixed[STATUS] &= !STATUS_INTERRUPT;
        let differs =
            |index: &usize| (state.registers[*index] ^ self.registers[*index]) & fixed[*index] != 0;
        check(!(0..SIZE).any(|index| differs(&index)), "a fixed bit differs")?;
        self.registers.copy_from_slice(&state.registers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1AF4,
            device: 0x1042,
            revision: 1,
            class: 0x01_8000,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1042,
        });
        space.set_window(0xE000_0000, 0x4000);
        space.set_interrupt(11);
        space.add_capability(0x09, &[4, 1], &[0, 0]);
        space.add_capability(0x09, &[6, 2, 3], &[0, 0xFF, 0]);
        space
    }

    fn read_long(space: &ConfigSpace, offset: u8) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = function();
        space.write(0, &[0; 16]);
        assert_eq!(read_long(&space, 0x00), 0x1042_1AF4);
        assert_eq!(read_long(&space, 0x08), 0x0180_0001);
        assert_eq!(read_long(&space, 0x2C), 0x1042_1AF4);
    }

    #[test]
    fn writing_ones_to_a_base_address_reads_back_its_size() {
        let mut space = function();
        space.write(0x10, &[0xFF; 4]);
        assert_eq!(read_long(&space, 0x10), 0xFFFF_C000);
        space.write(0x10, &0xC123_4567_u32.to_le_bytes());
        assert_eq!(read_long(&space, 0x10), 0xC123_4000);
        for offset in [0x14, 0x18, 0x1C, 0x20, 0x24, 0x30] {
            space.write(offset, &[0xFF; 4]);
            assert_eq!(read_long(&space, offset), 0, "no other windows");
        }
    }

    #[test]
    fn the_window_decodes_only_when_enabled() {
        let mut space = function();
        assert_eq!(space.window(), None);
        space.write(0x04, &[0x02]);
        assert_eq!(space.window(), Some(BarWindow { base: 0xE000_0000, len: 0x4000 }));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = function();
        let mut link = [0];
        space.read(0x34, &mut link);
        let mut ids = Vec::new();
        while link[0] != 0 {
            let mut capability = [0; 3];
            space.read(link[0], &mut capability);
            ids.push((capability[0], capability[2]));
            link[0] = capability[1];
        }
        assert_eq!(ids, [(9, 4), (9, 6)]);
        space.write(0x44, &[0xFF; 5]);
        assert_eq!(read_long(&space, 0x44), 0xFF06_0009);
    }

    #[test]
    fn the_pin_can_be_disabled() {
        let mut space = function();
        assert!(space.set_interrupt_condition(true));
        space.write(0x05, &[0x04]);
        assert!(!space.interrupt_pin());
        assert_eq!(read_long(&space, 0x04) >> 16 & 0x18, 0x18, "condition and capabilities");
    }

    #[test]
    fn a_state_of_another_function_is_refused() {
        let mut space = function();
        space.write(0x04, &[0x06]);
        let state = space.save();
        let mut fresh = function();
        fresh.restore(&state).expect("same function");
        assert_eq!(fresh, space);
        let mut other = state.clone();
        other.registers[2] ^= 1;
        assert!(fresh.restore(&other).is_err());
        other.registers.pop();
        assert!(fresh.restore(&other).is_err());
    }
}
