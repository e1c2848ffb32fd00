//! Fencing of disk writes by generation.

use super::{Arbiter, Candidate};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmft_logging_channel::entry::Generation;
use vmft_vmm::world::{Fence, FenceError};

/// How long to wait before an unreachable arbiter is asked again.
pub const RETRY: Duration = Duration::from_millis(20);

type OnFenced = Box<dyn FnOnce(Generation, Candidate) + Send>;

/// The generation a side writes in, and whether it may still write.
#[derive(Debug)]
pub struct FenceState {
    generation: AtomicU64,
    fenced: AtomicBool,
}

impl FenceState {
    /// Of a side that has `generation`.
    pub const fn new(generation: Generation) -> Self {
        Self { generation: AtomicU64::new(generation.0), fenced: AtomicBool::new(false) }
    }

    /// This side has won a later generation.
    pub fn advance(&self, generation: Generation) {
        self.generation.fetch_max(generation.0, Ordering::AcqRel);
    }

    /// The generation this side has.
    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    /// This side has lost, and knows it: every later write is refused.
    pub fn shut(&self) {
        self.fenced.store(true, Ordering::Release);
    }
}

/// Before each disk write: has anyone won a generation after ours? A side that was only stopped,
/// and is continued after its peer went live, must not write what it had in hand.
pub struct GenerationFence {
    arbiter: Arc<dyn Arbiter>,
    who: Candidate,
    state: Arc<FenceState>,
    on_fenced: Mutex<Option<OnFenced>>,
}

impl fmt::Debug for GenerationFence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GenerationFence").field("state", &self.state).finish_non_exhaustive()
    }
}

impl GenerationFence {
    /// A fence of the side `who`, which is where `state` says. `on_fenced` is called at most once, when
    /// the next generation is found to be another's; it makes the side halt.
    pub fn new(
        arbiter: Arc<dyn Arbiter>,
        who: Candidate,
        state: Arc<FenceState>,
        on_fenced: impl FnOnce(Generation, Candidate) + Send + 'static,
    ) -> Self {
        Self { arbiter, who, state, on_fenced: Mutex::new(Some(Box::new(on_fenced))) }
    }

    fn take_on_fenced(&self) -> Option<OnFenced> {
        self.on_fenced.lock().expect("no holder of this lock panics").take()
    }
}

impl Fence for GenerationFence {
    fn check(&self) -> Result<(), FenceError> {
        loop {
            if self.state.fenced.load(Ordering::Acquire) {
                return Err(FenceError);
            }
            let next = Generation(self.state.generation().0 + 1);
            match self.arbiter.winner(next) {
                Ok(None) => return Ok(()),
                // This side has won it: `advance` has been called, or will be.
                Ok(Some(winner)) if winner.id == self.who.id => self.state.advance(next),
                Ok(Some(winner)) => {
                    self.state.shut();
                    if let Some(on_fenced) = self.take_on_fenced() {
                        on_fenced(next, winner);
                    }
                }
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::DirectoryArbiter;
    use std::sync::mpsc::channel;

    fn candidate(id: &str) -> Candidate {
        Candidate { id: id.into(), host: "here".into(), pid: 1, role: "primary".into() }
    }

    fn first() -> Arc<FenceState> {
        Arc::new(FenceState::new(Generation(1)))
    }

    #[test]
    fn a_side_whose_generation_is_over_writes_no_more() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let arbiter: Arc<dyn Arbiter> =
            Arc::new(DirectoryArbiter::create(dir.path()).expect("made"));
        let (told, lost_to) = channel();
        let on_fenced = move |generation, winner: Candidate| {
            told.send((generation, winner.id)).expect("the test is there");
        };
        let fence = GenerationFence::new(Arc::clone(&arbiter), candidate("a"), first(), on_fenced);
        assert_eq!(fence.check(), Ok(()));
        arbiter.try_win(Generation(2), &candidate("b")).expect("reachable");
        assert_eq!(fence.check(), Err(FenceError));
        assert_eq!(fence.check(), Err(FenceError));
        assert_eq!(lost_to.iter().collect::<Vec<_>>(), [(Generation(2), "b".into())]);
    }

    #[test]
    fn a_fence_shut_by_a_side_that_knows_why_tells_it_nothing_more() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let arbiter: Arc<dyn Arbiter> =
            Arc::new(DirectoryArbiter::create(dir.path()).expect("made"));
        let unwanted = |_, _| panic!("told");
        let state = first();
        let fence = GenerationFence::new(
            Arc::clone(&arbiter),
            candidate("a"),
            Arc::clone(&state),
            unwanted,
        );
        arbiter.try_win(Generation(2), &candidate("b")).expect("reachable");
        state.shut();
        assert_eq!(fence.check(), Err(FenceError));
    }

    #[test]
    fn a_side_that_won_the_next_generation_writes_on() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let arbiter: Arc<dyn Arbiter> =
            Arc::new(DirectoryArbiter::create(dir.path()).expect("made"));
        let (me, state) = (candidate("a"), first());
        let fence =
            GenerationFence::new(Arc::clone(&arbiter), me.clone(), Arc::clone(&state), |_, _| {
                panic!("not fenced")
            });
        arbiter.try_win(Generation(2), &me).expect("reachable");
        assert_eq!(fence.check(), Ok(()), "even before the winner has told its fence");
        assert_eq!(state.generation(), Generation(2));
    }
}
