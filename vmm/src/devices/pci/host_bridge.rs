//! The host bridge at slot 0. Linux takes its presence as the proof that configuration
//! mechanism #1 works (`pci_sanity_check`); it does nothing else.

use super::config_space::{ConfigSpace, Identity};
use super::{ConfigSpaceState, PciFunction};
use crate::devices::InvalidState;
use crate::devices::virtio::DeviceContext;

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    // A virtual host bridge's ID, which no driver or quirk of Linux matches.
    device: 0x0D57,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// The bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBridge {
    config: ConfigSpace,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl HostBridge {
    /// A bridge after power-on.
    pub fn new() -> Self {
        Self { config: ConfigSpace::new(&IDENTITY) }
    }

    /// Everything a restored bridge needs.
    pub fn save(&self) -> ConfigSpaceState {
        self.config.save()
    }

    /// A bridge in the saved state.
    ///
    /// # Errors
    /// [`InvalidState`] if it is not a bridge's.
    pub fn restore(state: &ConfigSpaceState) -> Result<Self, InvalidState> {
        let mut bridge = Self::new();
        bridge.config.restore(state)?;
        Ok(bridge)
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_read(&mut self, offset: u8, data: &mut [u8], _: &mut DeviceContext<'_>) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u8, data: &[u8], _: &mut DeviceContext<'_>) {
        self.config.write(offset, data);
    }

    fn window_read(&mut self, _: u64, data: &mut [u8], _: &mut DeviceContext<'_>) {
        data.fill(0xFF);
    }

    fn window_write(&mut self, _: u64, _: &[u8], _: &mut DeviceContext<'_>) {}

    fn interrupt(&self) -> bool {
        false
    }
}
