//! One counter of the 8254.

use super::MAX_TICK;
use crate::devices::{InvalidState, require};
use serde::{Deserialize, Serialize};

/// Clock ticks since power-on; signed, because a square wave loaded in its second half counts
/// from a beginning that may lie before power-on.
pub(super) type Tick = i64;

/// The largest count.
const LONGEST: u32 = 0x1_0000;

/// Which bytes of the count the guest moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// The low byte only.
    Low,
    /// The high byte only.
    High,
    /// Low, then high.
    Both,
}

/// How the counting element moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Counting {
    /// No count was written, or (modes 1 and 5) no trigger came.
    Waiting,
    /// Counting down.
    Running {
        /// The tick at which the counting element held `count`.
        loaded: i64,
        /// What was loaded, 1 to 65536.
        count: u32,
    },
    /// Held by a low gate.
    Paused {
        /// Ticks counted since the load.
        elapsed: i64,
        /// What was loaded.
        count: u32,
    },
}

/// A count that takes effect at the end of the current (half-)period, in modes 2 and 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// From this tick on.
    pub at: i64,
    /// The count is as if loaded at this tick.
    pub loaded: i64,
    /// The new count.
    pub count: u32,
}

/// One counter's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// Mode 0 to 5.
    pub mode: u8,
    /// Counts in decimal.
    pub bcd: bool,
    /// Bytes the guest moves.
    pub access: Access,
    /// The count last written; none since the control word.
    pub written: Option<u32>,
    /// The low byte of a count whose high byte is still to come.
    pub low_byte: Option<u8>,
    /// The next read gives the high byte.
    pub high_next: bool,
    /// Count held by a latch command.
    pub latched_count: Option<u16>,
    /// Status held by a read-back command.
    pub latched_status: Option<u8>,
    /// The gate input.
    pub gate: bool,
    /// The counting element.
    pub counting: Counting,
    /// What it will be loaded with next.
    pub reload: Option<Reload>,
}

pub(super) type Channel = ChannelState;

impl ChannelState {
    /// A counter without a count, in mode 3, as PC firmware leaves it: OUT is high.
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: Access::Both,
            written: None,
            low_byte: None,
            high_next: false,
            latched_count: None,
            latched_status: None,
            gate,
            counting: Counting::Waiting,
            reload: None,
        }
    }

    /// The same counter, counting its longest period since power-on: what PC firmware leaves in
    /// channel 0. Kernels without a time-stamp counter read it before they set it.
    pub(super) fn free_running() -> Self {
        let counting = Counting::Running { loaded: 0, count: LONGEST };
        Self { written: Some(LONGEST), counting, ..Self::new(true) }
    }

    /// A control word for this channel: a counter latch command or a new mode.
    pub(super) fn control(&mut self, tick: Tick, word: u8) {
        let access = match word >> 4 & 3 {
            0 => return self.latch_count(tick),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        let mode = match word >> 1 & 7 {
            // The high bit is "don't care" for modes 2 and 3.
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        *self = Self { mode, bcd: word & 1 != 0, access, ..Self::new(self.gate) };
    }

    /// A read-back command.
    pub(super) fn read_back(&mut self, tick: Tick, count: bool, status: bool) {
        if count {
            self.latch_count(tick);
        }
        if status && self.latched_status.is_none() {
            self.latched_status = Some(self.status(tick));
        }
    }

    fn latch_count(&mut self, tick: Tick) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(tick));
        }
    }

    fn status(&self, tick: Tick) -> u8 {
        let null_count = match self.counting {
            Counting::Waiting => true,
            Counting::Running { loaded, .. } => {
                tick < loaded || self.reload.is_some_and(|reload| tick < reload.at)
            }
            Counting::Paused { .. } => false,
        };
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        u8::from(self.output(tick)) << 7
            | u8::from(null_count) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    pub(super) fn read(&mut self, tick: Tick) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.count(tick)).to_le_bytes();
        let (byte, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both => {
                self.high_next = !self.high_next;
                if self.high_next { (low, false) } else { (high, true) }
            }
        };
        if last {
            self.latched_count = None;
        }
        byte
    }

    pub(super) fn write(&mut self, tick: Tick, value: u8) {
        let count = match (self.access, self.low_byte.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Access::Both, None) => {
                self.low_byte = Some(value);
                if self.mode == 0 {
                    // "Writing the first byte disables counting; OUT is set low immediately."
                    self.counting = Counting::Waiting;
                }
                return;
            }
        };
        self.load(tick, self.decode(count));
    }

    /// The number of ticks a written count stands for; zero is the largest.
    fn decode(&self, raw: u16) -> u32 {
        let count = if self.bcd {
            (0..4).rev().fold(0, |sum, digit| sum * 10 + u32::from(raw >> (digit * 4) & 0xF))
        } else {
            u32::from(raw)
        };
        match (count, self.bcd) {
            (0, true) => 10_000,
            (0, false) => LONGEST,
            // "The minimum count is 2" for the periodic modes.
            (1, _) if self.is_periodic() => 2,
            (count, _) => count,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn load(&mut self, tick: Tick, count: u32) {
        self.written = Some(count);
        match (self.mode, self.settled(tick)) {
            (2 | 3, Counting::Running { loaded, count: current }) => {
                self.counting = Counting::Running { loaded, count: current };
                self.reload = Some(self.reload_after(tick, loaded, current, count));
            }
            // A triggered mode keeps its cycle; the count serves the next trigger.
            (1 | 5, counting) => self.counting = counting,
            _ if self.gate => self.counting = Counting::Running { loaded: tick + 1, count },
            _ => self.counting = Counting::Paused { elapsed: 0, count },
        }
    }

    /// When a count written in mid-cycle takes over: at the end of the period, or of the
    /// half-period of a square wave.
    fn reload_after(&self, tick: Tick, loaded: Tick, current: u32, count: u32) -> Reload {
        let period = Tick::from(current);
        let begin = loaded + (tick - loaded).max(0) / period * period;
        let falls = begin + period - period / 2;
        if self.mode == 3 && tick < falls {
            let high = Tick::from(count - count / 2);
            Reload { at: falls, loaded: falls - high, count }
        } else {
            Reload { at: begin + period, loaded: begin + period, count }
        }
    }

    /// The counting element with a reload that is due applied.
    fn settled(&self, tick: Tick) -> Counting {
        match self.reload {
            Some(Reload { at, loaded, count }) if tick >= at => Counting::Running { loaded, count },
            _ => self.counting,
        }
    }

    pub(super) fn set_gate(&mut self, tick: Tick, gate: bool) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        let restarted = self.written.map(|count| Counting::Running { loaded: tick + 1, count });
        self.counting = match (self.mode, gate, self.settled(tick)) {
            (0 | 2 | 3 | 4, false, Counting::Running { loaded, count }) => {
                Counting::Paused { elapsed: (tick - loaded).max(0), count }
            }
            (0 | 4, true, Counting::Paused { elapsed, count }) => {
                Counting::Running { loaded: tick - elapsed, count }
            }
            (2 | 3, true, Counting::Paused { .. }) | (1 | 5, true, _) => {
                restarted.unwrap_or(Counting::Waiting)
            }
            (_, _, counting) => counting,
        };
        self.reload = None;
    }

    /// Ticks counted, and from what; none while nothing was loaded.
    fn progress(&self, tick: Tick) -> Option<(Tick, Tick)> {
        match self.settled(tick) {
            Counting::Waiting => None,
            Counting::Running { loaded, count } => Some(((tick - loaded).max(0), count.into())),
            Counting::Paused { elapsed, count } => Some((elapsed, count.into())),
        }
    }

    /// The OUT pin.
    pub(super) fn output(&self, tick: Tick) -> bool {
        let Some((elapsed, count)) = self.progress(tick) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => elapsed >= count,
            _ if self.is_periodic() && !self.gate => true,
            2 => elapsed % count != count - 1,
            3 => elapsed % count < count - count / 2,
            _ => elapsed != count,
        }
    }

    /// The counting element as the guest reads it.
    fn count(&self, tick: Tick) -> u16 {
        let Some((elapsed, count)) = self.progress(tick) else { return 0 };
        let value = match self.mode {
            2 => count - elapsed % count,
            3 => {
                let (phase, high) = (elapsed % count, count - count / 2);
                let steps = if phase < high { phase } else { phase - high };
                (count & !1) - 2 * steps
            }
            // One-shot modes wrap and count on.
            _ if self.bcd => (count - elapsed).rem_euclid(10_000),
            _ => count - elapsed,
        };
        // In binary, 65536 reads as 0.
        let value = value as u16;
        if !self.bcd {
            return value;
        }
        let value = value % 10_000;
        (0..4).fold(0, |bcd, digit| bcd | (value / 10u16.pow(digit) % 10) << (digit * 4))
    }

    /// The first rising edge of OUT after `tick` if the guest does nothing.
    pub(super) fn next_edge(&self, tick: Tick) -> Option<Tick> {
        let Counting::Running { loaded, count } = self.counting else { return None };
        match self.reload {
            None => self.edge_after(tick, loaded, count),
            Some(reload) => {
                let before = self.edge_after(tick, loaded, count);
                before
                    .filter(|edge| *edge <= reload.at)
                    .or_else(|| self.edge_after(tick.max(reload.at), reload.loaded, reload.count))
            }
        }
    }

    fn edge_after(&self, tick: Tick, loaded: Tick, count: u32) -> Option<Tick> {
        let count = Tick::from(count);
        let edge = match self.mode {
            0 | 1 => loaded + count,
            2 | 3 => loaded + ((tick - loaded).max(0) / count + 1) * count,
            _ => loaded + count + 1,
        };
        (edge > tick).then_some(edge)
    }

    pub(super) fn validate(&self) -> Result<(), InvalidState> {
        let check = |holds, reason| require("interval timer", holds, reason);
        let ticks = -MAX_TICK..=MAX_TICK;
        let counts = if self.is_periodic() { 2..=0x1_0000 } else { 1..=0x1_0000 };
        check(self.mode <= 5, "no such mode")?;
        check(self.written.is_none_or(|count| counts.contains(&count)), "count out of range")?;
        let (time, count) = match self.counting {
            Counting::Waiting => (0, None),
            Counting::Running { loaded, count } => (loaded, Some(count)),
            Counting::Paused { elapsed, count } => {
                check(elapsed >= 0, "counted a negative time")?;
                (elapsed, Some(count))
            }
        };
        check(ticks.contains(&time), "counter time out of range")?;
        check(count.is_none_or(|count| counts.contains(&count)), "count out of range")?;
        let Some(reload) = self.reload else { return Ok(()) };
        check(self.is_periodic(), "a reload in a one-shot mode")?;
        check(matches!(self.counting, Counting::Running { .. }), "a reload while not counting")?;
        check(counts.contains(&reload.count), "count out of range")?;
        check(ticks.contains(&reload.at) && ticks.contains(&reload.loaded), "reload out of range")
    }
}
