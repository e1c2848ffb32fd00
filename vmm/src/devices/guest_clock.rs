//! A clock and a timer for guests that know they are guests: two registers, one access each.
//!
//! A PC's clocks cost many accesses: three to set the 8254, five to read it, and it cannot wait for
//! longer than 55 ms. Where an access leaves the guest, as on the `kvm` engine, a kernel that is
//! replayed (`guest-images/linux`) uses this instead.
//!
//! | register | read | written |
//! |---|---|---|
//! | clock, 32 bits | guest time in units of [`UNIT_NS`], wrapping (after 275 s) | one interrupt after so many units; 0 cancels it |
//! | identity, 32 bits | [`IDENTITY`] | ignored |
//!
//! Accesses of other widths find no device. The timer has the interrupt line of the 8254: a kernel
//! uses one or the other.

use super::{InvalidState, require};
use serde::{Deserialize, Serialize};
use vmft_log::point::VirtualTime;

/// Nanoseconds of guest time in a unit.
pub const UNIT_NS: u64 = 64;
/// What the identity register holds: `vmft` in memory order.
pub const IDENTITY: u32 = u32::from_le_bytes(*b"vmft");
/// The furthest a timer can be set, in nanoseconds.
const FURTHEST_NS: u64 = u32::MAX as u64 * UNIT_NS;

/// A register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// The clock, and the timer when written.
    Clock,
    /// Says that the device is there.
    Identity,
}

/// The timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuestClockState {
    /// When it interrupts next.
    pub due: Option<VirtualTime>,
}

/// The device.
///
/// ```
/// use vmft_log::point::VirtualTime;
/// use vmft_vmm::devices::guest_clock::{GuestClock, Register, UNIT_NS};
///
/// let mut clock = GuestClock::default();
/// let now = VirtualTime::from_ns(1_000 * UNIT_NS);
/// assert_eq!(clock.read(now, Register::Clock), 1_000);
/// clock.write(now, Register::Clock, 50);
/// let due = clock.next_timer().expect("it was set");
/// assert_eq!(due, VirtualTime::from_ns(1_050 * UNIT_NS));
/// assert!(clock.advance(due));
/// assert!(!clock.advance(due), "it interrupts once");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestClock {
    state: GuestClockState,
}

impl GuestClock {
    /// When [`Self::advance`] has something to report next.
    pub fn next_timer(&self) -> Option<VirtualTime> {
        self.state.due
    }

    /// True if the timer's interrupt has come due; it is then no longer set.
    pub fn advance(&mut self, now: VirtualTime) -> bool {
        let due = self.state.due.is_some_and(|due| due <= now);
        if due {
            self.state.due = None;
        }
        due
    }

    /// The guest reads a register.
    pub fn read(&self, now: VirtualTime, register: Register) -> u32 {
        match register {
            // Wraps, as the table says.
            Register::Clock => (now.as_ns() / UNIT_NS) as u32,
            Register::Identity => IDENTITY,
        }
    }

    /// The guest writes a register.
    pub fn write(&mut self, now: VirtualTime, register: Register, value: u32) {
        if register == Register::Clock {
            let due = now.after_ns(u64::from(value) * UNIT_NS);
            self.state.due = (value != 0).then_some(due);
        }
    }

    /// Everything a restored device needs.
    pub fn save(&self) -> GuestClockState {
        self.state
    }

    /// A device in the saved state, at `now` at the latest.
    ///
    /// # Errors
    /// [`InvalidState`] if the timer was set before guest time began.
    pub fn restore(state: GuestClockState) -> Result<Self, InvalidState> {
        let latest = VirtualTime::from_ns(u64::MAX - FURTHEST_NS);
        let holds = state.due.is_none_or(|due| due > VirtualTime::ZERO && due < latest);
        require("guest clock", holds, "its timer is due at a time that cannot be")?;
        Ok(Self { state })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(units: u64) -> VirtualTime {
        VirtualTime::from_ns(units * UNIT_NS)
    }

    #[test]
    fn the_clock_counts_units_and_wraps() {
        let clock = GuestClock::default();
        assert_eq!(clock.read(VirtualTime::from_ns(UNIT_NS - 1), Register::Clock), 0);
        assert_eq!(clock.read(at(0xFFFF_FFFF), Register::Clock), 0xFFFF_FFFF);
        assert_eq!(clock.read(at(0x1_0000_0003), Register::Clock), 3);
        assert_eq!(clock.read(at(7), Register::Identity).to_le_bytes(), *b"vmft");
    }

    #[test]
    fn setting_the_timer_again_replaces_it_and_zero_cancels_it() {
        let mut clock = GuestClock::default();
        clock.write(at(10), Register::Clock, 100);
        clock.write(at(20), Register::Clock, 5);
        assert_eq!(clock.next_timer(), Some(at(25)));
        assert!(!clock.advance(at(24)));
        clock.write(at(24), Register::Clock, 0);
        assert_eq!(clock.next_timer(), None);
        assert!(!clock.advance(at(1_000)));
    }

    #[test]
    fn the_identity_cannot_be_written() {
        let mut clock = GuestClock::default();
        clock.write(at(1), Register::Identity, 9);
        assert_eq!(clock, GuestClock::default());
    }

    #[test]
    fn a_restored_timer_fires_when_the_saved_one_would() {
        let mut clock = GuestClock::default();
        clock.write(at(3), Register::Clock, u32::MAX);
        let mut restored = GuestClock::restore(clock.save()).unwrap();
        assert_eq!(restored, clock);
        assert!(!restored.advance(at(2 + u64::from(u32::MAX))));
        assert!(restored.advance(at(3 + u64::from(u32::MAX))));
    }

    #[test]
    fn a_timer_that_no_guest_could_have_set_is_refused() {
        for due in [VirtualTime::ZERO, VirtualTime::NEVER] {
            assert!(GuestClock::restore(GuestClockState { due: Some(due) }).is_err());
        }
    }
}
