//! Whether the thread that runs a side's guest still comes by: what a watchdog is answered from.
//!
//! A guest may be idle for minutes, and a thread that hangs looks like that from outside. So it is
//! not looked at what the guest does. A live side's thread comes by whenever it is asked to
//! ([`Asked::Pause`](vmft_vmm::inputs::Asked)), whatever the guest does meanwhile; one that follows
//! does so at every entry, and again and again while there is none. What a thread does before and
//! behind that (joining, waiting for the arbiter, letting the last outputs out) may take as long as
//! others take, and is not watched.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Where the thread leaves its mark. Nothing else hangs on these values, so none orders anything.
#[derive(Debug, Default)]
pub struct Liveness {
    is_watched: AtomicBool,
    passes: AtomicU64,
}

impl Liveness {
    /// From now on the calling thread comes by, until the result is dropped.
    pub(crate) fn begin(&self) -> Watched<'_> {
        self.pass();
        self.is_watched.store(true, Ordering::Relaxed);
        Watched(self)
    }

    /// The thread is here.
    pub(crate) fn pass(&self) {
        self.passes.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it has come by, while it is to; `None` while nothing is to be expected of it.
    pub fn passes(&self) -> Option<u64> {
        let is_watched = self.is_watched.load(Ordering::Relaxed);
        is_watched.then(|| self.passes.load(Ordering::Relaxed))
    }
}

/// The time in which a thread comes by.
#[derive(Debug)]
pub(crate) struct Watched<'a>(&'a Liveness);

impl Watched<'_> {
    /// Does what an operator or a peer has ordered, for as long as it takes: a snapshot is gigabytes.
    pub(crate) fn aside<T>(&self, work: impl FnOnce() -> T) -> T {
        self.0.is_watched.store(false, Ordering::Relaxed);
        let done = work();
        self.0.pass();
        self.0.is_watched.store(true, Ordering::Relaxed);
        done
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.0.is_watched.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_watched_while_it_runs_a_guest_and_not_while_it_works_to_order() {
        let liveness = Liveness::default();
        assert_eq!(liveness.passes(), None);
        let watched = liveness.begin();
        let before = liveness.passes().expect("it runs");
        liveness.pass();
        assert_eq!(liveness.passes(), Some(before + 1));
        watched.aside(|| assert_eq!(liveness.passes(), None));
        assert!(liveness.passes() > Some(before + 1), "it has come by after that");
        drop(watched);
        assert_eq!(liveness.passes(), None);
    }
}
