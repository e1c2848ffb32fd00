//! Waiting for what other threads do to the data of a [`Mutex`](crate::Mutex).

use crate::{MutexGuard, futex};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// As `std`'s. Whoever waits may wake without reason, except where a condition is given.
#[derive(Debug, Default)]
pub struct Condvar {
    /// Counts what was told, so that nothing told between looking and sleeping is missed.
    told: AtomicU32,
}

impl Condvar {
    /// Nobody waits.
    pub const fn new() -> Self {
        Self { told: AtomicU32::new(0) }
    }

    /// Wakes one of those who wait.
    pub fn notify_one(&self) {
        self.told.fetch_add(1, Ordering::Relaxed);
        futex::wake(&self.told, 1);
    }

    /// Wakes all who wait.
    pub fn notify_all(&self) {
        self.told.fetch_add(1, Ordering::Relaxed);
        // The kernel's number is signed.
        futex::wake(&self.told, i32::MAX.unsigned_abs());
    }

    fn sleep<T>(&self, guard: &mut MutexGuard<'_, T>, limit: Option<Duration>) {
        // With the lock: what is told after it is given back has another number.
        let seen = self.told.load(Ordering::Relaxed);
        MutexGuard::unlocked(guard, || futex::wait(&self.told, seen, limit));
    }

    /// Gives the lock back and waits.
    pub fn wait<'a, T>(&self, mut guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.sleep(&mut guard, None);
        guard
    }

    /// The same, for at most `limit`.
    pub fn wait_timeout<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        limit: Duration,
    ) -> MutexGuard<'a, T> {
        self.sleep(&mut guard, Some(limit));
        guard
    }

    /// Waits as long as `condition` holds.
    pub fn wait_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        while condition(&mut *guard) {
            self.sleep(&mut guard, None);
        }
        guard
    }

    /// Waits as long as `condition` holds, for at most `limit`; says whether it still holds.
    pub fn wait_timeout_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        limit: Duration,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> (MutexGuard<'a, T>, bool) {
        let begun = Instant::now();
        loop {
            if !condition(&mut *guard) {
                return (guard, false);
            }
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return (guard, true);
            }
            self.sleep(&mut guard, Some(left));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mutex;

    #[test]
    fn nothing_told_is_missed() {
        const ROUNDS: u32 = 20_000;
        let (turn, changed) = (Mutex::new(0_u32), Condvar::new());
        std::thread::scope(|scope| {
            for own in 0..2 {
                let (turn, changed) = (&turn, &changed);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let mut turn =
                            changed.wait_while(turn.lock(), |turn| *turn != 2 * round + own);
                        *turn += 1;
                        changed.notify_one();
                    }
                });
            }
        });
        assert_eq!(*turn.lock(), 2 * ROUNDS);
    }

    #[test]
    fn all_who_wait_are_woken_and_a_limit_ends_the_waiting() {
        let (open, changed) = (Mutex::new(false), Condvar::new());
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let (open, out_of_time) =
                        changed.wait_timeout_while(open.lock(), Duration::MAX, |open| !*open);
                    assert!(*open && !out_of_time);
                });
            }
            *open.lock() = true;
            changed.notify_all();
        });
        let waited = changed.wait_timeout_while(open.lock(), Duration::from_millis(1), |_| true);
        assert!(waited.1, "nobody tells");
        drop(waited);
        drop(changed.wait_timeout(open.lock(), Duration::from_millis(1)));
    }
}
