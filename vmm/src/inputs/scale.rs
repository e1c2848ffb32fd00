//! What a point is worth: the values that depend on what an engine counts.
//!
//! On `soft` a point is an instruction, of which a hundred million pass in a second; on `kvm` it is
//! an exit, of which some ten thousand do, or none at all while the guest computes.

use crate::engine::EngineKind;
use vmft_kvm::PointKind;
use vmft_log::point::{ClockRate, ExecutionPoint};

/// How the guest's speed is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Points pass evenly: a running mean follows the host.
    Even,
    /// Points pass as the guest happens to make them, and none while it computes. What counts is
    /// how fast they pass when they do: guest time that is behind jumps at the next correction,
    /// but guest time that is ahead would have to wait.
    Bursts,
}

/// Values in points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointScale {
    /// Guest time of a point before anything was measured.
    pub initial_rate: ClockRate,
    /// Most guest time of a point.
    pub max_rate: ClockRate,
    /// How it is measured.
    pub pace: Pace,
    /// Fewer points than these say nothing about the host's speed.
    pub sample_points: u64,
    /// The first unmarked output waits at most so many points for company, so that a line of
    /// console bytes shares one mark. With 0 it waits for none.
    pub mark_window: u64,
    /// A guest that goes idle so many points after the last entry says how far it came.
    pub progress_window: u64,
    /// Points between two digests.
    pub digest_interval: u64,
    /// Guest time is corrected also when a timer has come due on the host: where points are rare,
    /// guest time alone would be late by as much as the next correction is away.
    pub sync_for_timers: bool,
    /// A running guest is kicked when something has arrived, because the kick is a point.
    pub kick_for_arrivals: bool,
    /// Stopping at a number costs nothing, so bounds may be chosen freely. Where it does, the
    /// guest is stopped between two exits only for something that arrives, or for a timer that is due
    /// on the host, and only when no exit came for a while.
    pub stops_anywhere: bool,
}

/// A rate in whole nanoseconds.
const fn ns(ns: u64) -> ClockRate {
    ClockRate::from_raw(ns << ClockRate::FRACTION_BITS)
}

impl PointScale {
    /// Instructions of the `soft` engine: about 10 ns each. The mark window is about 50 µs, a
    /// digest comes about every third of a second of computing.
    pub const SOFT: Self = Self {
        initial_rate: ns(10),
        max_rate: ns(1_000),
        pace: Pace::Even,
        sample_points: 10_000,
        mark_window: 4_096,
        progress_window: 1_000,
        digest_interval: 1 << 25,
        sync_for_timers: false,
        kick_for_arrivals: false,
        stops_anywhere: true,
    };

    /// Exits: a few microseconds each. An output is marked at the boundary after the exit that made
    /// it, because nobody knows when the next one comes.
    pub const EXITS: Self = Self {
        initial_rate: ns(5_000),
        max_rate: ns(100_000),
        pace: Pace::Bursts,
        sample_points: 16,
        mark_window: 0,
        progress_window: 16,
        digest_interval: 1 << 12,
        sync_for_timers: true,
        kick_for_arrivals: false,
        stops_anywhere: true,
    };

    /// Exits and kicks, of a guest that nobody follows.
    pub const FREE: Self = Self { kick_for_arrivals: true, ..Self::EXITS };

    /// Single steps: about 10 µs each.
    pub const STEPS: Self = Self {
        initial_rate: ns(10_000),
        max_rate: ns(1_000_000),
        pace: Pace::Even,
        sample_points: 32,
        mark_window: 16,
        progress_window: 16,
        digest_interval: 1 << 14,
        sync_for_timers: true,
        kick_for_arrivals: false,
        stops_anywhere: true,
    };

    /// Branches, and exits that count as about a thousand of them: a nanosecond or some more each.
    pub const BRANCHES: Self = Self {
        initial_rate: ns(2),
        max_rate: ns(1_000),
        pace: Pace::Even,
        sample_points: 16 * ExecutionPoint::EXIT_STRIDE,
        mark_window: 0,
        progress_window: 16 * ExecutionPoint::EXIT_STRIDE,
        digest_interval: 1 << 28,
        sync_for_timers: true,
        kick_for_arrivals: true,
        stops_anywhere: false,
    };

    /// The scale of an engine.
    pub const fn of(engine: EngineKind) -> Self {
        match engine {
            EngineKind::Soft => Self::SOFT,
            EngineKind::Kvm { points: PointKind::Exit } => Self::EXITS,
            EngineKind::Kvm { points: PointKind::Free } => Self::FREE,
            EngineKind::Kvm { points: PointKind::Step } => Self::STEPS,
            EngineKind::Kvm { points: PointKind::Pmu } => Self::BRANCHES,
        }
    }
}
