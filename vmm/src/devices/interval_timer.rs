//! The 8254 interval timer, and port 0x61, which holds channel 2's gate and shows its output.
//!
//! Source: Intel 8254 data sheet (231164). A channel stores when it was loaded, not how far it
//! has counted, so nothing has to happen while time passes: the count, the output and the next
//! rising edge are functions of the clock tick. A count written at tick t is loaded at t + 1.
//!
//! Only channel 0's rising edges matter outside (interrupt line 0). [`IntervalTimer::advance`]
//! changes nothing until such an edge is due, and several edges passed at once are one.

mod channel;

use super::{InvalidState, require};
use channel::{Channel, Tick};
use serde::{Deserialize, Serialize};
use vmft_log::point::VirtualTime;

pub use channel::{Access, ChannelState, Counting, Reload};

/// Input clock in Hz.
pub const FREQUENCY_HZ: u64 = 1_193_182;
const NS_PER_SECOND: u64 = 1_000_000_000;
/// Ticks that a saved state may name at most: far beyond any guest time.
const MAX_TICK: Tick = 1 << 60;
/// Bits of port 0x61 that the guest sets: gate 2, speaker, two parity-check enables.
const PORT_B_WRITABLE: u8 = 0x0F;
/// Ticks between two memory refreshes of the original PC, seen as bit 4 of port 0x61.
const REFRESH_TICKS: Tick = 18;

/// The tick in progress at `now`.
fn tick_at(now: VirtualTime) -> Tick {
    let (seconds, ns) = (now.as_ns() / NS_PER_SECOND, now.as_ns() % NS_PER_SECOND);
    // At most 2.2e16 for any 64-bit time.
    (seconds * FREQUENCY_HZ + ns * FREQUENCY_HZ / NS_PER_SECOND) as Tick
}

/// The first moment at which `tick` has begun.
fn time_of(tick: Tick) -> VirtualTime {
    let tick = tick.max(0) as u64;
    let (seconds, ticks) = (tick / FREQUENCY_HZ, tick % FREQUENCY_HZ);
    let ns = (ticks * NS_PER_SECOND).div_ceil(FREQUENCY_HZ);
    VirtualTime::from_ns(seconds.saturating_mul(NS_PER_SECOND).saturating_add(ns))
}

/// The timer's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimerState {
    /// The three counters.
    pub channels: [ChannelState; 3],
    /// The tick of channel 0's next rising edge that has not been reported.
    pub next_edge: Option<i64>,
    /// What was written to port 0x61, bits 0 to 3.
    pub port_b: u8,
}

/// A register of the timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// Ports 0x40 to 0x42: the counter of channel 0 to 2.
    Counter(Selected),
    /// Port 0x43.
    Control,
    /// Port 0x61.
    PortB,
}

/// A channel of the timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selected {
    /// Drives interrupt line 0.
    Zero,
    /// Drives nothing; once the memory refresh.
    One,
    /// Gated by port 0x61.
    Two,
}

/// The timer.
///
/// ```
/// use vmft_log::point::VirtualTime;
/// use vmft_vmm::devices::interval_timer::{IntervalTimer, Register, Selected};
///
/// let mut pit = IntervalTimer::new();
/// pit.write(VirtualTime::ZERO, Register::Control, 0x34); // channel 0, both bytes, mode 2
/// for byte in 4773_u16.to_le_bytes() {
///     pit.write(VirtualTime::ZERO, Register::Counter(Selected::Zero), byte); // 250 Hz
/// }
/// let tick = pit.next_timer().expect("a periodic channel always has a next edge");
/// assert!(tick.as_ns().abs_diff(4_000_000) < 2_000);
/// assert!(pit.advance(tick));
/// assert!(!pit.advance(tick));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntervalTimer {
    state: IntervalTimerState,
}

impl Default for IntervalTimer {
    fn default() -> Self {
        Self::new()
    }
}

impl IntervalTimer {
    /// The timer as PC firmware leaves it: channel 0 counts its longest period, but no edge of it
    /// is reported before the guest has set it; the others have no count; channel 2's gate is low.
    pub fn new() -> Self {
        let channels = [Channel::free_running(), Channel::new(true), Channel::new(false)];
        Self { state: IntervalTimerState { channels, next_edge: None, port_b: 0 } }
    }

    /// When [`Self::advance`] has something to report next.
    pub fn next_timer(&self) -> Option<VirtualTime> {
        self.state.next_edge.map(time_of)
    }

    /// True if channel 0's output has risen since it was last reported.
    pub fn advance(&mut self, now: VirtualTime) -> bool {
        let tick = tick_at(now);
        let due = self.state.next_edge.is_some_and(|edge| edge <= tick);
        if due {
            self.state.next_edge = self.state.channels[0].next_edge(tick);
        }
        due
    }

    /// The guest reads a register.
    pub fn read(&mut self, now: VirtualTime, register: Register) -> u8 {
        let tick = tick_at(now);
        match register {
            Register::Counter(channel) => self.state.channels[channel as usize].read(tick),
            Register::Control => 0xFF,
            Register::PortB => {
                let refresh = ((tick / REFRESH_TICKS) & 1) as u8;
                let output = u8::from(self.state.channels[2].output(tick));
                self.state.port_b | refresh << 4 | output << 5
            }
        }
    }

    /// The guest writes a register. True if that made channel 0's output rise.
    pub fn write(&mut self, now: VirtualTime, register: Register, value: u8) -> bool {
        let tick = tick_at(now);
        let before = self.state.channels[0].output(tick);
        let first_touched = match register {
            Register::Counter(channel) => {
                self.state.channels[channel as usize].write(tick, value);
                channel == Selected::Zero
            }
            Register::Control => self.write_control(tick, value),
            Register::PortB => {
                self.state.port_b = value & PORT_B_WRITABLE;
                self.state.channels[2].set_gate(tick, value & 1 != 0);
                false
            }
        };
        if first_touched {
            self.state.next_edge = self.state.channels[0].next_edge(tick);
        }
        first_touched && !before && self.state.channels[0].output(tick)
    }

    /// True if channel 0 was given a new mode.
    fn write_control(&mut self, tick: Tick, value: u8) -> bool {
        let selected = value >> 6;
        if selected == 3 {
            for (number, channel) in self.state.channels.iter_mut().enumerate() {
                if value >> (number + 1) & 1 != 0 {
                    channel.read_back(tick, value & 0x20 == 0, value & 0x10 == 0);
                }
            }
            return false;
        }
        self.state.channels[usize::from(selected)].control(tick, value);
        selected == 0 && value & 0x30 != 0
    }

    /// Everything a restored timer needs.
    pub fn save(&self) -> IntervalTimerState {
        self.state.clone()
    }

    /// A timer in the saved state.
    ///
    /// # Errors
    /// [`InvalidState`] if a register holds what it cannot hold.
    pub fn restore(state: &IntervalTimerState) -> Result<Self, InvalidState> {
        for channel in &state.channels {
            channel.validate()?;
        }
        let [first, second, third] = &state.channels;
        let check = |holds, reason| require("interval timer", holds, reason);
        check(first.gate && second.gate, "the gates of channels 0 and 1 are tied high")?;
        check(third.gate == (state.port_b & 1 != 0), "channel 2's gate is not port 0x61's")?;
        check(state.port_b & !PORT_B_WRITABLE == 0, "port 0x61 holds a read-only bit")?;
        let edge = state.next_edge.unwrap_or(0);
        check((0..=MAX_TICK).contains(&edge), "the next edge is out of range")?;
        Ok(Self { state: state.clone() })
    }
}

#[cfg(test)]
#[path = "interval_timer_tests.rs"]
mod tests;
