//! Memory sent in rounds while its guest runs: when a round may be the last, for which the guest
//! rests, and how much a guest is slowed that writes faster than it is sent.

use crate::copied::MOST_COPIED;
use crate::requests::Requests;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use vmft_sandbox::Task;
use vmft_vmm::world::Mailbox;

/// A round that leaves more than this share of the one before, in percent, does not shrink.
const SHRINKING_PERCENT: usize = 80;
/// How long a guest that is slowed rests at a time.
const SLOWED_REST: Duration = Duration::from_millis(5);
/// Beyond this, a guest that is slowed does not run at all between its rests.
const FULL_STOP: u32 = 12;

/// How much a guest is slowed: not at all, or so that it runs 5 ms, 2.5 ms, 1.25 ms… between rests of
/// 5 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Slowing(u32);

impl Slowing {
    fn further(self) -> Self {
        Self(self.0.saturating_add(1).min(FULL_STOP))
    }

    /// How long the guest runs between two rests; `None` if it is not slowed.
    fn run(self) -> Option<Duration> {
        match self.0 {
            0 => None,
            FULL_STOP => Some(Duration::ZERO),
            level => Some(SLOWED_REST / (1 << (level - 1))),
        }
    }
}

/// The rounds of one checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rounds {
    /// So few pages are worth another round.
    goal: usize,
    /// After so many rounds, as many pages as may be are left for the last.
    most: u32,
    /// Rounds so far.
    count: u32,
    /// Pages of the last one.
    pages: usize,
    is_stuck: bool,
    slowing: Slowing,
}

impl Rounds {
    /// For a checkpoint whose guest should rest for no more than `goal` pages, if `most` rounds can
    /// bring that about.
    pub(crate) const fn new(goal: usize, most: u32) -> Self {
        Self { goal, most, count: 0, pages: usize::MAX, is_stuck: false, slowing: Slowing(0) }
    }

    /// Rounds sent so far.
    pub(crate) const fn count(&self) -> u32 {
        self.count
    }

    /// If no more pages than this are left, they are the last: the guest may rest for them.
    pub(crate) const fn limit(&self) -> usize {
        if self.is_stuck || self.count >= self.most { MOST_COPIED } else { self.goal }
    }

    /// A round of so many pages is sent, while the guest runs: how much it is slowed meanwhile.
    pub(crate) fn next(&mut self, pages: usize) -> Slowing {
        let shrinks = pages <= self.pages / 100 * SHRINKING_PERCENT;
        if !shrinks && self.limit() == MOST_COPIED {
            // It writes as fast as it is sent, and there is too much to copy in one rest.
            self.slowing = self.slowing.further();
        }
        // The first is all of memory, or whatever was written before anybody looked.
        self.is_stuck |= !shrinks && self.count > 1;
        self.count += 1;
        self.pages = pages;
        self.slowing
    }
}

/// Slows a guest until it is dropped.
#[derive(Debug)]
pub(crate) struct Brake {
    level: Arc<AtomicU32>,
    slowed_us: Arc<AtomicU64>,
    _stop: Sender<()>,
}

impl Brake {
    /// Begins with a machine that serves `requests`.
    fn begin(requests: &Arc<Requests>, mailbox: &Arc<Mailbox>) -> Self {
        let (level, slowed_us) = (Arc::<AtomicU32>::default(), Arc::<AtomicU64>::default());
        let (stop, stopped) = channel::<()>();
        let (requests, mailbox) = (Arc::clone(requests), Arc::clone(mailbox));
        let (now, slowed) = (Arc::clone(&level), Arc::clone(&slowed_us));
        let slow = move || {
            loop {
                let run = Slowing(now.load(Ordering::Relaxed)).run().unwrap_or(SLOWED_REST);
                if stopped.recv_timeout(run) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let rest = |_: &mut _| {
                    let began = Instant::now();
                    std::thread::sleep(SLOWED_REST);
                    began.elapsed()
                };
                let Ok(rested) = requests.at_rest(&mailbox, rest) else { return };
                let rested = u64::try_from(rested.as_micros()).unwrap_or(u64::MAX);
                slowed.fetch_add(rested, Ordering::Relaxed);
            }
        };
        let thread = vmft_sandbox::spawn(Task::Worker, "slowing", slow);
        // Nobody waits for its end: that would wait for the machine, whose thread may be the one to
        // drop this.
        drop(thread.expect("a host that cannot start a thread cannot run a machine"));
        Self { level, slowed_us, _stop: stop }
    }

    /// Slows the guest as much as this from now on; `brake` is there from the first time it is needed.
    pub(crate) fn apply(
        brake: &mut Option<Self>,
        slowing: Slowing,
        requests: &Arc<Requests>,
        mailbox: &Arc<Mailbox>,
    ) {
        if slowing != Slowing::default() {
            let brake = brake.get_or_insert_with(|| Self::begin(requests, mailbox));
            brake.level.store(slowing.0, Ordering::Relaxed);
        }
    }

    /// How long the guest has rested by this.
    pub(crate) fn slowed(&self) -> Duration {
        Duration::from_micros(self.slowed_us.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends a guest that writes `rate` pages in the time a page is sent, at full speed, from `first`
    /// pages on: rounds, pages left for the last, and the share of its speed at the end.
    fn send(mut rounds: Rounds, first: usize, rate: f64) -> (u32, usize, f64) {
        let mut left = first;
        let mut speed = 1.0;
        while left > rounds.limit() {
            let slowing = rounds.next(left);
            speed = slowing
                .run()
                .map_or(1.0, |run| run.as_secs_f64() / (run + SLOWED_REST).as_secs_f64());
            left = ((left as f64 * rate * speed) as usize).min(1 << 20);
            assert!(rounds.count() < 100, "it ends");
        }
        (rounds.count(), left, speed)
    }

    #[test]
    fn a_guest_that_writes_little_is_not_slowed() {
        let (rounds, left, speed) = send(Rounds::new(2048, 12), 1 << 20, 0.1);
        assert_eq!((rounds, speed), (3, 1.0));
        assert!(left <= 2048);
    }

    #[test]
    fn a_guest_that_writes_as_fast_as_it_is_sent_is_slowed_until_what_is_left_may_be_copied() {
        for rate in [0.95, 1.0, 3.0, 50.0, 10_000.0] {
            for (goal, most) in [(2048, 12), (MOST_COPIED, 1)] {
                let (rounds, left, speed) = send(Rounds::new(goal, most), 1 << 20, rate);
                assert!(left <= MOST_COPIED, "{rate}: {left}");
                assert!(speed < 1.0 && rounds <= 12 + FULL_STOP, "{rate}: {speed}, {rounds}");
            }
        }
    }

    #[test]
    fn a_small_hot_set_is_copied_at_rest_without_slowing() {
        // It writes the same 20,000 pages again and again.
        let mut rounds = Rounds::new(2048, 12);
        assert_eq!(rounds.next(1 << 18), Slowing(0));
        assert_eq!(rounds.next(20_000), Slowing(0));
        assert_eq!((rounds.next(20_000), rounds.limit()), (Slowing(0), MOST_COPIED));
        assert_eq!(Rounds::new(MOST_COPIED, 1).limit(), MOST_COPIED, "an epoch copies at once");
    }
}
