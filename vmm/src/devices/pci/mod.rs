//! PCI: configuration mechanism #1, configuration space, and the host bridge.
//!
//! Which device sits in which slot, and which interrupt line it has, is the board's business.

pub mod config_space;
pub mod host_bridge;

use super::virtio::DeviceContext;
use vmft_cpu::PortWidth;

pub use config_space::{BarWindow, ConfigSpace, ConfigSpaceState};
pub use host_bridge::HostBridge;

/// A device number on bus 0; every device has one function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(pub u8);

/// Slots on a bus.
pub const SLOTS: u8 = 32;

/// What the configuration ports and the memory window reach of a device.
pub trait PciFunction {
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;

    /// Reads configuration bytes; `offset + data.len()` is within one aligned double word.
    fn config_read(&mut self, offset: u8, data: &mut [u8], around: &mut DeviceContext<'_>);

    /// Writes configuration bytes; `offset + data.len()` is within one aligned double word.
    fn config_write(&mut self, offset: u8, data: &[u8], around: &mut DeviceContext<'_>);

    /// Reads at an offset in the memory window.
    fn window_read(&mut self, offset: u64, data: &mut [u8], around: &mut DeviceContext<'_>);

    /// Writes at an offset in the memory window.
    fn window_write(&mut self, offset: u64, data: &[u8], around: &mut DeviceContext<'_>);

    /// The level of its INTA# pin.
    fn interrupt(&self) -> bool;
}

/// Port 0xCF8: the configuration address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConfigAddress(u32);

impl ConfigAddress {
    /// Bits 24–30 and 0–1 are reserved and read as zero.
    const WRITABLE: u32 = 0x80FF_FFFC;

    /// The register holding `value`.
    pub const fn new(value: u32) -> Self {
        Self(value & Self::WRITABLE)
    }

    /// The register's value.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// What an access to port 0xCFC + `byte` reaches: a slot and an offset in its
    /// configuration space. None when disabled, on another bus, of another function, or if the
    /// access leaves the double word.
    pub fn target(self, byte: u8, width: PortWidth) -> Option<(Slot, u8)> {
        let [register, function, bus, enable] = self.0.to_le_bytes();
        let reachable = enable & 0x80 != 0 && bus == 0 && function & 7 == 0;
        let within = usize::from(byte) + width.bytes() <= 4;
        (reachable && within).then_some((Slot(function >> 3), register | byte))
    }
}
