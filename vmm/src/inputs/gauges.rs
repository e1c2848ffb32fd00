//! Where a guest is, live or replayed, for whoever looks from another thread.

use super::Boundary;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vmft_log::point::{ExecutionPoint, VirtualTime};

/// Where the guest is, and what was compared on the way. Whoever drives it sets them.
#[derive(Debug, Default)]
pub struct Gauges {
    point: AtomicU64,
    guest_time_ns: AtomicU64,
    idle: AtomicBool,
    digests_agreed: AtomicU64,
    exits_agreed: AtomicU64,
    skips: AtomicU64,
    points_skipped: AtomicU64,
}

impl Gauges {
    /// The guest is here. `idle`: it waits for an interrupt, as far as that is known.
    pub fn set(&self, point: ExecutionPoint, time: VirtualTime, idle: bool) {
        self.point.store(point.get(), Ordering::Relaxed);
        self.guest_time_ns.store(time.as_ns(), Ordering::Relaxed);
        self.idle.store(idle, Ordering::Relaxed);
    }

    pub(crate) fn set_to(&self, boundary: &Boundary) {
        self.set(boundary.point, boundary.time, boundary.is_idle());
    }

    /// So many more digests and exits were compared with the log's, and agreed.
    pub(crate) fn add_agreed(&self, digests: u64, exits: u64) {
        self.digests_agreed.fetch_add(digests, Ordering::Relaxed);
        self.exits_agreed.fetch_add(exits, Ordering::Relaxed);
    }

    /// A replaying side has gone on from a checkpoint, so many points ahead.
    pub(crate) fn add_skipped(&self, points: u64) {
        self.skips.fetch_add(1, Ordering::Relaxed);
        self.points_skipped.fetch_add(points, Ordering::Relaxed);
    }

    /// How often that was.
    pub fn skips(&self) -> u64 {
        self.skips.load(Ordering::Relaxed)
    }

    /// The points it has not replayed.
    pub fn points_skipped(&self) -> u64 {
        self.points_skipped.load(Ordering::Relaxed)
    }

    /// Digests that agreed with the log's.
    pub fn digests_agreed(&self) -> u64 {
        self.digests_agreed.load(Ordering::Relaxed)
    }

    /// Exits that agreed with the log's.
    pub fn exits_agreed(&self) -> u64 {
        self.exits_agreed.load(Ordering::Relaxed)
    }

    /// The last point reached: on `soft`, instructions retired.
    pub fn point(&self) -> u64 {
        self.point.load(Ordering::Relaxed)
    }

    /// Guest time in nanoseconds.
    pub fn guest_time_ns(&self) -> u64 {
        self.guest_time_ns.load(Ordering::Relaxed)
    }

    /// True if the guest waits for an interrupt.
    pub fn is_idle(&self) -> bool {
        self.idle.load(Ordering::Relaxed)
    }
}
