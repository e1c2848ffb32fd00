//! The fixed hardware of ACPI, as far as a kernel that finds ACPI's tables insists on it: the PM1 event and
//! control blocks and the timer (ACPI 6.4, §4.8.3). Nothing ever happens there but switching off.
//!
//! | offset | bytes | register |
//! |---|---|---|
//! | 0 | 2 | PM1 status: nothing has happened |
//! | 2 | 2 | PM1 enable: kept, of no effect |
//! | 4 | 2 | PM1 control: ACPI mode is on; the sleep type; sleep enable, which is write-only |
//! | 6 | 2 | none |
//! | 8 | 4 | the timer: guest time in ticks of 3.579545 MHz, 32 bits, which wrap after 20 minutes |
//!
//! With several CPUs and no time stamp counter, the timer is a kernel's only clock that does not
//! lose the time for which the guest rests. With one CPU the tables do not name it. It is a
//! function of guest time and has no state.

use super::{InvalidState, require};
use serde::{Deserialize, Serialize};
use vmft_log::point::VirtualTime;

/// Bytes of the registers.
pub const LENGTH: u16 = TIMER_OFFSET + 4;
/// Offset of the control block.
pub const CONTROL_OFFSET: u16 = 4;
/// Offset of the timer.
pub const TIMER_OFFSET: u16 = 8;
/// The sleep type that switches the machine off, as its tables say.
pub const OFF: u8 = 5;

const ENABLE_OFFSET: u16 = 2;
const TIMER_HZ: u128 = 3_579_545;
/// ACPI mode; there is no other to change to.
const SCI_ENABLE: u16 = 1;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;
/// What of the control register is kept: the sleep type and the bus master bit.
const CONTROL_KEPT: u16 = SLEEP_TYPE | 1 << 1;

/// The registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PowerManagementState {
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control, without the bit that is always set.
    pub control: u16,
    /// The guest has switched itself off.
    pub off: bool,
}

impl PowerManagementState {
    /// A byte is read at `now`.
    pub fn read(self, now: VirtualTime, offset: u16) -> u8 {
        if let Some(byte) = offset.checked_sub(TIMER_OFFSET) {
            return timer(now).to_le_bytes().get(usize::from(byte)).copied().unwrap_or(0);
        }
        let word = match offset & !1 {
            ENABLE_OFFSET => self.enable,
            CONTROL_OFFSET => self.control | SCI_ENABLE,
            _ => 0,
        };
        word.to_le_bytes()[usize::from(offset & 1)]
    }

    /// A byte is written.
    pub fn write(&mut self, offset: u16, value: u8) {
        let put = |word: u16| {
            let mut bytes = word.to_le_bytes();
            bytes[usize::from(offset & 1)] = value;
            u16::from_le_bytes(bytes)
        };
        match offset & !1 {
            ENABLE_OFFSET => self.enable = put(self.enable),
            CONTROL_OFFSET => {
                let word = put(self.control);
                self.control = word & CONTROL_KEPT;
                let kind = (word & SLEEP_TYPE) >> SLEEP_TYPE_SHIFT;
                self.off |= word & SLEEP_ENABLE != 0 && kind == u16::from(OFF);
            }
            _ => {}
        }
    }

    /// Checks that this is a state a guest can bring about.
    ///
    /// # Errors
    /// [`InvalidState`] if it is not.
    pub fn validate(self) -> Result<(), InvalidState> {
        let kept = self.control & !CONTROL_KEPT == 0;
        require("power management", kept, "holds a bit that is not kept")
    }
}

/// The timer's count, which wraps.
fn timer(now: VirtualTime) -> u32 {
    (u128::from(now.as_ns()) * TIMER_HZ / 1_000_000_000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sleep_type_of_the_tables_switches_off() {
        let mut power = PowerManagementState::default();
        power.write(5, 0x20 | 4 << 2);
        assert!(!power.off, "another sleep type");
        power.write(5, OFF << 2);
        assert!(!power.off, "sleep is not enabled");
        power.write(5, 0x20 | OFF << 2);
        assert!(power.off);
        assert_eq!(power.validate(), Ok(()));
    }

    #[test]
    fn acpi_mode_is_on_nothing_has_happened_and_enables_are_kept() {
        let mut power = PowerManagementState::default();
        power.write(0, 0xFF);
        power.write(2, 0x20);
        power.write(3, 0x01);
        let read = |offset| power.read(VirtualTime::ZERO, offset);
        let bytes: Vec<u8> = (0..LENGTH).map(read).collect();
        assert_eq!(bytes, [0, 0, 0x20, 0x01, 1, 0, 0, 0, 0, 0, 0, 0]);
        let wrong = PowerManagementState { control: 1, ..power };
        assert!(wrong.validate().is_err());
    }

    #[test]
    fn the_timer_counts_guest_time_and_wraps() {
        let count = |ns| {
            let read =
                |offset| PowerManagementState::default().read(VirtualTime::from_ns(ns), offset);
            u32::from_le_bytes([8, 9, 10, 11].map(read))
        };
        let (second, hz) = (1_000_000_000, 3_579_545u64);
        assert_eq!((count(0), count(279), count(280)), (0, 0, 1));
        assert_eq!(count(second), 3_579_545);
        // A year: more ticks than 32 bits, more nanoseconds times ticks than 64.
        let year = 365 * 86_400;
        assert_eq!(u64::from(count(year * second)), year * hz % (1 << 32));
    }
}
