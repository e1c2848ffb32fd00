//! The devices of the board, one idea a file.
//!
//! A device here is a state machine over plain values. What it may see is in its arguments:
//! register accesses, the moment of guest time, guest memory. What it wants from the outside
//! it pushes to an [`EffectQueue`](crate::board::EffectQueue). How devices are joined (ports,
//! interrupt lines, PCI slots) is [`crate::board`]'s business.
//!
//! Each device keeps everything a guest can ever notice in one serialisable `…State` struct, so
//! saving is a copy and a new register cannot be forgotten. Restoring checks every bound first.

pub mod cmos_clock;
pub mod guest_clock;
pub mod interrupt_controller;
pub mod interval_timer;
pub mod pci;
pub mod power_management;
pub mod reset;
pub mod serial;
pub mod virtio;

mod calendar;

/// A saved state that no machine of this configuration can be in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("saved state of {device}: {reason}")]
pub struct InvalidState {
    /// Which device refused it.
    pub device: &'static str,
    /// What cannot be.
    pub reason: &'static str,
}

/// Returns [`InvalidState`] unless `holds`.
pub(crate) fn require(
    device: &'static str,
    holds: bool,
    reason: &'static str,
) -> Result<(), InvalidState> {
    if holds { Ok(()) } else { Err(InvalidState { device, reason }) }
}

/// An interrupt request line of the two 8259s: 0 to 7 on the first, 8 to 15 on the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct IrqLine(u8);

impl IrqLine {
    /// The line's number.
    ///
    /// # Panics
    /// If there is no such line, or for line 2, which joins the two controllers.
    pub const fn new(number: u8) -> Self {
        assert!(number < 16 && number != 2);
        Self(number)
    }

    /// The line's number.
    pub const fn number(self) -> u8 {
        self.0
    }
}
