//! The MC146818 real-time clock with its CMOS memory, ports 0x70 and 0x71.
//!
//! Source: Motorola MC146818A data sheet. The time is a base given at power-on plus virtual
//! time, so nothing happens while it passes: flags are computed from the moment since which
//! they accumulate. The world's time can be told again ([`CmosClock::tell`]): a guest that has set its
//! clock to something else, such as local time, keeps the difference.
//! [`CmosClock::advance`] changes nothing until an enabled interrupt is due.
//!
//! Not modelled: daylight saving, and the divider chain's reset (register A bits 4–6 are kept,
//! but the clock runs on; it is stopped by register B's SET bit only).

use super::calendar::{DateTime, SECONDS_PER_DAY};
use super::{InvalidState, require};
use serde::{Deserialize, Serialize};
use vmft_log::point::{VirtualTime, WallTime};

const NS_PER_SECOND: u64 = 1_000_000_000;
/// How long before each second the update-in-progress bit is set (data sheet, t_BUC).
const UPDATE_NS: u64 = 244_000;
/// One cycle of the 32,768 Hz time base is 1,953,125 / 64 ns.
const BASE_CYCLE_NUMERATOR: u64 = 1_953_125;
const BASE_CYCLE_DENOMINATOR: u64 = 64;
/// Bytes of CMOS memory, registers included.
const CMOS_SIZE: usize = 128;
/// Farthest a set clock may be from 1970, in seconds: about thirty thousand years.
const MAX_UNIX_SECONDS: i64 = 1 << 40;

const SECONDS: usize = 0x00;
const SECONDS_ALARM: usize = 0x01;
const MINUTES: usize = 0x02;
const MINUTES_ALARM: usize = 0x03;
const HOURS: usize = 0x04;
const HOURS_ALARM: usize = 0x05;
const DAY_OF_WEEK: usize = 0x06;
const DAY_OF_MONTH: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const REGISTER_A: usize = 0x0A;
const REGISTER_B: usize = 0x0B;
const REGISTER_C: usize = 0x0C;
const REGISTER_D: usize = 0x0D;
/// Where PC firmware keeps the century.
const CENTURY: usize = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 0x80;
const A_RATE: u8 = 0x0F;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const FLAG_PERIODIC: u8 = 0x40;
const FLAG_ALARM: u8 = 0x20;
const FLAG_UPDATE: u8 = 0x10;
const C_INTERRUPT: u8 = 0x80;
const D_VALID: u8 = 0x80;
const HOUR_PM: u8 = 0x80;
/// Alarm values from here on match everything.
const ALARM_ANY: u8 = 0xC0;

/// The clock's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosClockState {
    /// The register selected through port 0x70.
    pub index: u8,
    /// CMOS memory. The time registers in it count only while SET holds the clock.
    pub memory: Vec<u8>,
    /// What the clock shows at virtual time 0, in seconds since 1970.
    pub base: i64,
    /// The world's time at virtual time 0, as it was told last, in seconds since 1970.
    pub told: i64,
    /// Flags of register C found set before `flags_since`.
    pub flags: u8,
    /// Events after this moment set further flags.
    pub flags_since: VirtualTime,
    /// The interrupt line is high.
    pub line: bool,
}

/// The clock.
///
/// ```
/// use vmft_log::point::VirtualTime;
/// use vmft_vmm::devices::cmos_clock::CmosClock;
///
/// let mut rtc = CmosClock::new(1_700_000_000); // 2023-11-14 22:13:20
/// let later = VirtualTime::from_ns(5_000_000_000);
/// rtc.write_index(0x00);
/// assert_eq!(rtc.read_data(later), 0x25); // decimal digits
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CmosClock {
    state: CmosClockState,
}

impl CmosClock {
    /// A clock that shows `unix_seconds` at power-on, in 24-hour decimal mode.
    pub fn new(unix_seconds: i64) -> Self {
        let mut memory = vec![0; CMOS_SIZE];
        memory[REGISTER_A] = 0x26;
        memory[REGISTER_B] = B_24_HOURS;
        memory[REGISTER_D] = D_VALID;
        Self {
            state: CmosClockState {
                index: 0,
                memory,
                base: unix_seconds.clamp(-MAX_UNIX_SECONDS, MAX_UNIX_SECONDS),
                told: unix_seconds.clamp(-MAX_UNIX_SECONDS, MAX_UNIX_SECONDS),
                flags: 0,
                flags_since: VirtualTime::ZERO,
                line: false,
            },
        }
    }

    /// The bus is reset: interrupts are disabled; time and memory are kept (data sheet, RESET).
    pub fn reset(&mut self) {
        self.state.memory[REGISTER_B] &= !(FLAG_PERIODIC | FLAG_ALARM | FLAG_UPDATE);
        self.state.flags = 0;
        self.state.line = false;
    }

    /// The level of interrupt line 8.
    pub fn line(&self) -> bool {
        self.state.line
    }

    /// When [`Self::advance`] will raise the line; none while it is high or nothing is enabled.
    pub fn next_timer(&self) -> Option<VirtualTime> {
        if self.state.line {
            return None;
        }
        let enabled = self.enabled();
        if self.state.flags & enabled != 0 {
            return Some(self.state.flags_since);
        }
        [FLAG_PERIODIC, FLAG_ALARM, FLAG_UPDATE]
            .into_iter()
            .filter(|flag| enabled & flag != 0)
            .filter_map(|flag| self.next_event(flag))
            .min()
    }

    /// Raises the line if an enabled interrupt is due.
    pub fn advance(&mut self, now: VirtualTime) {
        if self.next_timer().is_some_and(|due| due <= now) {
            self.state.line = true;
        }
    }

    /// The world's time is `time` at `now`: the clock goes forward or back by as much as that differs from
    /// what was told before. What came due by the old time stays due.
    pub fn tell(&mut self, now: VirtualTime, time: WallTime) {
        let half = i128::from(NS_PER_SECOND / 2);
        let zero = i128::from(time.as_unix_ns()) - i128::from(now.as_ns());
        // Whole seconds, the nearest: at most half of one wrong.
        let told = (zero + half).div_euclid(i128::from(NS_PER_SECOND));
        let told = i64::try_from(told).expect("2^64 nanoseconds are few seconds");
        let shift = told - self.state.told;
        if shift == 0 {
            return;
        }
        self.settle_flags(now);
        self.state.told = told;
        let limit = 2 * MAX_UNIX_SECONDS;
        self.state.base = (self.state.base + shift).clamp(-limit, limit);
        self.advance(now);
    }

    /// The guest selects a register; bit 7 is the NMI mask, which has nothing to mask here.
    pub fn write_index(&mut self, value: u8) {
        self.state.index = value & 0x7F;
    }

    /// The guest reads the selected register.
    pub fn read_data(&mut self, now: VirtualTime) -> u8 {
        let index = usize::from(self.state.index);
        match index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY if !self.held() => {
                self.time_register(index, self.date_time(now))
            }
            REGISTER_A => {
                let updating =
                    !self.held() && now.as_ns() % NS_PER_SECOND >= NS_PER_SECOND - UPDATE_NS;
                self.state.memory[REGISTER_A] | if updating { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            REGISTER_C => self.read_flags(now),
            index => self.state.memory[index],
        }
    }

    /// The guest writes the selected register.
    pub fn write_data(&mut self, now: VirtualTime, value: u8) {
        let index = usize::from(self.state.index);
        match index {
            REGISTER_C | REGISTER_D => {}
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK..=YEAR | CENTURY => {
                let running = !self.held();
                if running {
                    self.settle_flags(now);
                    self.show_time(now);
                }
                self.state.memory[index] = value;
                if running {
                    self.set_time(now);
                }
            }
            SECONDS_ALARM | MINUTES_ALARM | HOURS_ALARM => {
                self.settle_flags(now);
                self.state.memory[index] = value;
            }
            REGISTER_A => {
                self.settle_flags(now);
                self.state.memory[REGISTER_A] = value & !A_UPDATE_IN_PROGRESS;
            }
            REGISTER_B => self.write_register_b(now, value),
            index => self.state.memory[index] = value,
        }
        self.update_line();
        self.advance(now);
    }

    fn write_register_b(&mut self, now: VirtualTime, value: u8) {
        self.settle_flags(now);
        let was_held = self.held();
        if value & B_SET != 0 && !was_held {
            self.show_time(now);
        }
        // "A high on SET clears UIE."
        let value = if value & B_SET != 0 { value & !FLAG_UPDATE } else { value };
        // Fields are read in the mode in which they were written: the new one.
        self.state.memory[REGISTER_B] = value;
        if was_held && value & B_SET == 0 {
            self.set_time(now);
        }
    }

    /// Reading register C clears the flags and lowers the line.
    fn read_flags(&mut self, now: VirtualTime) -> u8 {
        self.settle_flags(now);
        let flags = self.state.flags;
        self.state.flags = 0;
        self.state.line = false;
        let interrupt = if flags & self.enabled() != 0 { C_INTERRUPT } else { 0 };
        flags | interrupt
    }

    /// Brings the stored flags up to `now`.
    fn settle_flags(&mut self, now: VirtualTime) {
        for flag in [FLAG_PERIODIC, FLAG_ALARM, FLAG_UPDATE] {
            if self.next_event(flag).is_some_and(|time| time <= now) {
                self.state.flags |= flag;
            }
        }
        self.state.flags_since = self.state.flags_since.max(now);
    }

    /// The line falls when no enabled flag is left.
    fn update_line(&mut self) {
        self.state.line &= self.state.flags & self.enabled() != 0;
    }

    fn enabled(&self) -> u8 {
        self.state.memory[REGISTER_B] & (FLAG_PERIODIC | FLAG_ALARM | FLAG_UPDATE)
    }

    fn held(&self) -> bool {
        self.state.memory[REGISTER_B] & B_SET != 0
    }

    /// The first moment after `flags_since` at which `flag` is set.
    fn next_event(&self, flag: u8) -> Option<VirtualTime> {
        let since = self.state.flags_since.as_ns();
        let ns = match flag {
            FLAG_PERIODIC => self.next_period(since)?,
            _ if self.held() => return None,
            FLAG_UPDATE => (since / NS_PER_SECOND + 1).checked_mul(NS_PER_SECOND)?,
            _ => self.next_alarm(since)?,
        };
        Some(VirtualTime::from_ns(ns))
    }

    fn next_period(&self, since: u64) -> Option<u64> {
        let cycles = match self.state.memory[REGISTER_A] & A_RATE {
            0 => return None,
            // Data sheet, table 5: the two fastest selections repeat slower ones.
            rate @ 1..=2 => 1 << (rate + 6),
            rate => 1u64 << (rate - 1),
        };
        let whole = since / BASE_CYCLE_NUMERATOR * BASE_CYCLE_DENOMINATOR;
        let part = since % BASE_CYCLE_NUMERATOR * BASE_CYCLE_DENOMINATOR / BASE_CYCLE_NUMERATOR;
        let next = ((whole + part) / cycles + 1) * cycles;
        let whole = (next / BASE_CYCLE_DENOMINATOR).checked_mul(BASE_CYCLE_NUMERATOR)?;
        let part = next % BASE_CYCLE_DENOMINATOR * BASE_CYCLE_NUMERATOR;
        whole.checked_add(part.div_ceil(BASE_CYCLE_DENOMINATOR))
    }

    /// Walks from the next second on, skipping whole hours and minutes that do not match.
    fn next_alarm(&self, since: u64) -> Option<u64> {
        let matches = |register: usize, shown: u8| {
            let wanted = self.state.memory[register];
            wanted >= ALARM_ANY || wanted == shown
        };
        let possible = (0..24).any(|hour| matches(HOURS_ALARM, self.encode_hour(hour)))
            && (0..60).any(|minute| matches(MINUTES_ALARM, self.encode(minute)))
            && (0..60).any(|second| matches(SECONDS_ALARM, self.encode(second)));
        if !possible {
            return None;
        }
        let first = (since / NS_PER_SECOND) as i64 + 1;
        let mut second = first + self.state.base;
        // At most a day away, and since every field can match, within 300 steps.
        let end = second + SECONDS_PER_DAY;
        while second < end {
            let date = DateTime::from_unix(second);
            if !matches(HOURS_ALARM, self.encode_hour(date.hour)) {
                second += 3_600 - second.rem_euclid(3_600);
            } else if !matches(MINUTES_ALARM, self.encode(date.minute)) {
                second += 60 - second.rem_euclid(60);
            } else if !matches(SECONDS_ALARM, self.encode(date.second)) {
                second += 1;
            } else {
                return u64::try_from(second - self.state.base).ok()?.checked_mul(NS_PER_SECOND);
            }
        }
        None
    }

    fn date_time(&self, now: VirtualTime) -> DateTime {
        DateTime::from_unix(self.state.base + (now.as_ns() / NS_PER_SECOND) as i64)
    }

    fn time_register(&self, index: usize, date: DateTime) -> u8 {
        match index {
            SECONDS => self.encode(date.second),
            MINUTES => self.encode(date.minute),
            HOURS => self.encode_hour(date.hour),
            DAY_OF_WEEK => self.encode(date.weekday()),
            DAY_OF_MONTH => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode(date.year.rem_euclid(100) as u8),
            _ => self.encode((date.year.div_euclid(100)).rem_euclid(100) as u8),
        }
    }

    /// Puts the running time into the registers.
    fn show_time(&mut self, now: VirtualTime) {
        let date = self.date_time(now);
        for index in [SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY] {
            self.state.memory[index] = self.time_register(index, date);
        }
    }

    /// Takes the running time from the registers. Fields out of range are brought into it.
    fn set_time(&mut self, now: VirtualTime) {
        let field = |index: usize| self.decode(self.state.memory[index]);
        let date = DateTime {
            year: i64::from(field(CENTURY)) * 100 + i64::from(field(YEAR)),
            month: field(MONTH).clamp(1, 12),
            day: field(DAY_OF_MONTH).clamp(1, 31),
            hour: self.decode_hour(self.state.memory[HOURS]).min(23),
            minute: field(MINUTES).min(59),
            second: field(SECONDS).min(59),
        };
        self.state.base = date.to_unix() - (now.as_ns() / NS_PER_SECOND) as i64;
    }

    fn encode(&self, value: u8) -> u8 {
        if self.state.memory[REGISTER_B] & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.state.memory[REGISTER_B] & B_BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0x0F)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.state.memory[REGISTER_B] & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.state.memory[REGISTER_B] & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & !HOUR_PM) % 12 + if value & HOUR_PM != 0 { 12 } else { 0 }
    }

    /// Everything a restored clock needs.
    pub fn save(&self) -> CmosClockState {
        self.state.clone()
    }

    /// A clock in the saved state.
    ///
    /// # Errors
    /// [`InvalidState`] if a register holds what it cannot hold.
    pub fn restore(state: &CmosClockState) -> Result<Self, InvalidState> {
        let check = |holds, reason| require("clock", holds, reason);
        check(state.memory.len() == CMOS_SIZE, "CMOS memory is not 128 bytes")?;
        check(usize::from(state.index) < CMOS_SIZE, "no such register")?;
        check(state.memory[REGISTER_D] == D_VALID, "register D is fixed")?;
        check(state.memory[REGISTER_A] & A_UPDATE_IN_PROGRESS == 0, "register A bit 7 is fixed")?;
        // Setting the clock subtracts up to 2^64 ns from a year below 25,600.
        let base = -2 * MAX_UNIX_SECONDS..=2 * MAX_UNIX_SECONDS;
        check(base.contains(&state.base), "time out of range")?;
        check(base.contains(&state.told), "the world's time out of range")?;
        let flags = FLAG_PERIODIC | FLAG_ALARM | FLAG_UPDATE;
        check(state.flags & !flags == 0, "no such flag")?;
        Ok(Self { state: state.clone() })
    }
}

#[cfg(test)]
#[path = "cmos_clock_tests.rs"]
mod tests;
