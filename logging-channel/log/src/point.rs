//! Names for places in the guest's instruction stream, and for moments of guest time.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A place in the guest's instruction stream: the number of instructions retired since
/// the machine was switched on; on an engine that cannot count those, the number of its
/// deterministic exits; on an engine that counts branches, a number of two parts
/// ([`Self::next_exit`], [`Self::plus_branches`]).
///
/// One iteration-bounded chunk of a `REP` string instruction counts as one, exactly as the
/// engine executes it (see `docs/determinism.md`). Two runs with the same inputs are in the
/// same state at the same point.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct ExecutionPoint(u64);

/// Conditional branches that the guest has retired since its last deterministic exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Branches(pub u64);

impl fmt::Display for Branches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The linear address of an instruction, in the canonical form of 48-bit addresses: bits 47 to 63 are
/// alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct CodeAddress(u64);

/// No instruction can be at this address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("address {0:#x} is not canonical")]
pub struct NotCanonical(pub u64);

impl CodeAddress {
    /// As a number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for CodeAddress {
    type Error = NotCanonical;

    fn try_from(address: u64) -> Result<Self, NotCanonical> {
        let extended = (address << 16) as i64 >> 16;
        if extended as u64 == address { Ok(Self(address)) } else { Err(NotCanonical(address)) }
    }
}

impl From<CodeAddress> for u64 {
    fn from(address: CodeAddress) -> Self {
        address.0
    }
}

impl fmt::Display for CodeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl ExecutionPoint {
    /// Where branches are counted, the point of a deterministic exit is a multiple of this. An exit
    /// takes about as long as so many branches, so that guest time passes evenly; and a count that
    /// is wrong by a few hardly ever moves a later point.
    pub const EXIT_STRIDE: u64 = 1 << 10;
    /// The point before the first instruction.
    pub const START: Self = Self(0);
    /// A point no guest reaches (at a thousand million instructions a second: 584 years).
    pub const NEVER: Self = Self(u64::MAX);

    /// The point after `retired` instructions.
    pub const fn new(retired: u64) -> Self {
        Self(retired)
    }

    /// Instructions retired at this point.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The point `instructions` later, saturating at [`Self::NEVER`].
    pub const fn after(self, instructions: u64) -> Self {
        Self(self.0.saturating_add(instructions))
    }

    /// Where branches are counted: the place behind the `branches`-th branch since the deterministic
    /// exit at this point. `None` if there is no number left for it: the bound is
    /// [`Self::NEVER`], five hundred years of computing away.
    pub const fn plus_branches(self, branches: Branches) -> Option<Self> {
        match self.0.checked_add(branches.0) {
            Some(u64::MAX) | None => None,
            Some(number) => Some(Self(number)),
        }
    }

    /// Where branches are counted: the next deterministic exit, `branches` after the one at this
    /// point. It is the next multiple of [`Self::EXIT_STRIDE`] behind all of them, so both parts
    /// keep their order in one number. `None` if there is no number left for it.
    pub const fn next_exit(self, branches: Branches) -> Option<Self> {
        let Some(Self(last)) = self.plus_branches(branches) else { return None };
        match (last / Self::EXIT_STRIDE + 1).checked_mul(Self::EXIT_STRIDE) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// Instructions from `earlier` to this point; zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for ExecutionPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A moment of guest time, in nanoseconds since the machine was switched on.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct VirtualTime(u64);

impl VirtualTime {
    /// Power-on.
    pub const ZERO: Self = Self(0);
    /// A moment no guest reaches.
    pub const NEVER: Self = Self(u64::MAX);

    /// `ns` nanoseconds after power-on.
    pub const fn from_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since power-on.
    pub const fn as_ns(self) -> u64 {
        self.0
    }

    /// The moment `ns` nanoseconds later, saturating.
    pub const fn after_ns(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }

    /// Nanoseconds from `earlier` to this moment; zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A moment of the world's time, in nanoseconds since 1970-01-01 00:00 UTC; good until 2554.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct WallTime(u64);

impl WallTime {
    /// `ns` nanoseconds after 1970-01-01 00:00 UTC.
    pub const fn from_unix_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since 1970-01-01 00:00 UTC.
    pub const fn as_unix_ns(self) -> u64 {
        self.0
    }
}

/// How much guest time passes from one point to the next: nanoseconds as a fixed-point
/// number with 24 fractional bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClockRate(u64);

impl ClockRate {
    /// Fractional bits of the representation.
    pub const FRACTION_BITS: u32 = 24;

    /// A rate of `raw / 2^24` nanoseconds a point.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The rate in units of 2^-24 nanoseconds a point.
    pub const fn raw(self) -> u64 {
        self.0
    }
}

/// Guest time as a function of the execution point:
/// `time = sync_time + (point − sync_point) · rate`.
///
/// The primary corrects it with clock-sync arrivals; between two of them, clock reads and
/// timer interrupts need no entries, because both sides compute the same function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualClock {
    /// The point of the last correction.
    pub sync_point: ExecutionPoint,
    /// Guest time at that point.
    pub sync_time: VirtualTime,
    /// Guest time per point from there on.
    pub rate: ClockRate,
}

impl VirtualClock {
    /// Guest time at `point`, which must not lie before the last correction.
    pub fn time_at(&self, point: ExecutionPoint) -> VirtualTime {
        let elapsed = u128::from(point.since(self.sync_point)) * u128::from(self.rate.raw());
        let ns = elapsed >> ClockRate::FRACTION_BITS;
        self.sync_time.after_ns(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// The first point at which guest time has reached `time`;
    /// [`ExecutionPoint::NEVER`] if it is out of range.
    pub fn point_at(&self, time: VirtualTime) -> ExecutionPoint {
        if time == VirtualTime::NEVER || self.rate.raw() == 0 {
            return ExecutionPoint::NEVER;
        }
        let elapsed = u128::from(time.since(self.sync_time)) << ClockRate::FRACTION_BITS;
        let instructions = elapsed.div_ceil(u128::from(self.rate.raw()));
        u64::try_from(instructions).map_or(ExecutionPoint::NEVER, |n| self.sync_point.after(n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_and_the_branches_between_them_keep_their_order_in_one_number() {
        let start = ExecutionPoint::START;
        let mut last = start;
        let mut exit = start;
        for branches in [0, 1, 2, 1023, 1024, 1025, 5_000_000, 0] {
            let seen = (1..=branches).filter(|n| *n < 3 || branches - n < 3);
            for point in seen.map(|n| exit.plus_branches(Branches(n)).expect("far from the bound"))
            {
                assert!(point > last, "{point} after {last}");
                last = point;
            }
            exit = exit.next_exit(Branches(branches)).expect("far from the bound");
            assert!(exit > last && exit.get().is_multiple_of(ExecutionPoint::EXIT_STRIDE));
            last = exit;
        }
    }

    #[test]
    fn a_number_that_does_not_exist_is_refused() {
        let late = ExecutionPoint::new(u64::MAX - 5);
        assert_eq!(late.plus_branches(Branches(4)), Some(ExecutionPoint::new(u64::MAX - 1)));
        assert_eq!(late.plus_branches(Branches(5)), None);
        assert_eq!(late.plus_branches(Branches(u64::MAX)), None);
        assert_eq!(late.next_exit(Branches(0)), None);
    }

    #[test]
    fn an_address_is_canonical_or_none() {
        for address in [0, 1, (1 << 47) - 1, u64::MAX << 47, u64::MAX] {
            assert_eq!(CodeAddress::try_from(address).map(CodeAddress::get), Ok(address));
        }
        for address in [1 << 47, (u64::MAX << 47) - 1, 1 << 63, (1 << 48) - 1] {
            assert_eq!(CodeAddress::try_from(address), Err(NotCanonical(address)));
        }
    }

    #[test]
    fn point_at_is_the_first_point_whose_time_has_come() {
        let clock = VirtualClock {
            sync_point: ExecutionPoint::new(1_000),
            sync_time: VirtualTime::from_ns(77),
            rate: ClockRate::from_raw((12 << ClockRate::FRACTION_BITS) + 12_345),
        };
        for ns in [77, 78, 88, 89, 90, 1_000, 123_456_789, 1 << 50] {
            let time = VirtualTime::from_ns(ns);
            let point = clock.point_at(time);
            assert!(clock.time_at(point) >= time);
            if point > clock.sync_point {
                assert!(clock.time_at(ExecutionPoint::new(point.get() - 1)) < time);
            }
        }
    }
}
