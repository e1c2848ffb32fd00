//! The two ways the guest asks for a reset: the keyboard controller's 0xFE command, and the
//! reset control register at port 0xCF9 (Intel 82371SB data sheet, §2.5.4).
//!
//! There is no keyboard. The controller's status says that its output buffer is full, always:
//! Linux's probe (`i8042_flush`) gives up after sixteen reads, and its restart code
//! (`kb_wait`), which waits for the input buffer to be empty, does not wait at all.

use super::{InvalidState, require};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Output buffer full, input buffer empty, system flag, keyboard not locked.
const KEYBOARD_STATUS: u8 = 0x15;
/// Pulse output line 0, which is the CPU's reset.
const COMMAND_PULSE_RESET: u8 = 0xFE;
/// 0xCF9: a rising edge of this bit resets.
const RESET_CPU: u8 = 0x04;
/// 0xCF9: the bits that can be read back (bit 1 chooses a hard reset).
const RESET_WRITABLE: u8 = 0x0E;

/// What a restored machine needs to know of a reset in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ResetState {
    /// Port 0xCF9.
    pub control: u8,
    /// The guest has asked for a reset.
    pub requested: bool,
}

/// Why a guest starts again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResetCause {
    /// The keyboard controller's command: a kernel's `reboot=k`.
    KeyboardController,
    /// Port 0xCF9: a kernel's `reboot=p`, and ACPI's reset register.
    ControlPort,
    /// A fault while the CPU was on its way to the handler of a double fault: a kernel's `reboot=t`, or one
    /// that crashed.
    TripleFault,
    /// It was caught in its own fault handlers.
    FaultLoop,
}

impl fmt::Display for ResetCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KeyboardController => "the keyboard controller",
            Self::ControlPort => "the reset port 0xCF9",
            Self::TripleFault => "a triple fault",
            Self::FaultLoop => "being caught in its own fault handlers",
        })
    }
}

impl ResetState {
    /// By which of the two ways the guest has asked for a reset.
    pub fn cause(self) -> ResetCause {
        match self.control & RESET_CPU {
            0 => ResetCause::KeyboardController,
            _ => ResetCause::ControlPort,
        }
    }

    /// Port 0x64 is read.
    pub fn keyboard_status(self) -> u8 {
        KEYBOARD_STATUS
    }

    /// Port 0x64 is written.
    pub fn keyboard_command(&mut self, value: u8) {
        self.requested |= value == COMMAND_PULSE_RESET;
    }

    /// Port 0xCF9 is written.
    pub fn write_control(&mut self, value: u8) {
        self.requested |= value & !self.control & RESET_CPU != 0;
        self.control = value & RESET_WRITABLE;
    }

    /// Checks that this is a state a guest can bring about.
    ///
    /// # Errors
    /// [`InvalidState`] if it is not.
    pub fn validate(self) -> Result<(), InvalidState> {
        require("reset control", self.control & !RESET_WRITABLE == 0, "holds a reserved bit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keyboard_command_resets() {
        let mut reset = ResetState::default();
        reset.keyboard_command(0xD1);
        assert!(!reset.requested);
        reset.keyboard_command(0xFE);
        assert!(reset.requested);
    }

    #[test]
    fn the_control_register_resets_on_a_rising_edge() {
        let mut reset = ResetState::default();
        reset.write_control(0x02);
        assert!(!reset.requested);
        reset.write_control(0x06);
        assert!(reset.requested);
        assert_eq!(reset.control, 0x06);
    }

    #[test]
    fn a_probing_driver_finds_a_full_output_buffer_and_an_empty_input_buffer() {
        assert_eq!(ResetState::default().keyboard_status() & 0x03, 0x01);
    }
}
