//! Fencing of disk writes by generation.

use super::{Arbiter, ArbiterError, Candidate};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use vmft_log::entry::Generation;
use vmft_threads::{Condvar, Mutex, MutexGuard};
use vmft_vmm::evidence::time_with_suspension;
use vmft_vmm::world::{Fence, FenceError, Permit};

/// How long to wait before an unreachable arbiter is asked again.
pub const RETRY: Duration = Duration::from_millis(20);

type OnFenced = Box<dyn FnOnce(Generation, Candidate) + Send>;

/// How long a look at the storage itself counts, by a clock that counts suspension too. A look costs a round trip
/// on network file systems, as much as a small write; so there is one look for all writes of this time.
pub const LOOK_COUNTS: Duration = Duration::from_millis(10);

/// The generation a side writes in, and whether it may write: what the judge of the side decides, and each
/// of its fences goes by.
#[derive(Debug)]
pub struct FenceState {
    generation: AtomicU64,
    fenced: AtomicBool,
    look: Mutex<Look>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Look {
    /// When the last look at the storage began, and for which generation.
    last: Option<(Duration, Generation)>,
    in_doubt: bool,
}

impl FenceState {
    /// Of a side that has `generation`.
    pub fn new(generation: Generation) -> Self {
        Self {
            generation: AtomicU64::new(generation.0),
            fenced: AtomicBool::new(false),
            look: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn look(&self) -> MutexGuard<'_, Look> {
        self.look.lock()
    }

    /// A backup is lost and may be going live: until [`Self::advance`] or [`Self::shut`], writes wait.
    pub fn doubt(&self) {
        self.look().in_doubt = true;
    }

    /// This side has won a later generation.
    pub fn advance(&self, generation: Generation) {
        self.generation.fetch_max(generation.0, Ordering::AcqRel);
        self.look().in_doubt = false;
        self.changed.notify_all();
    }

    /// The generation this side has.
    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    /// This side has lost, and knows it: every later write is refused.
    pub fn shut(&self) {
        self.fenced.store(true, Ordering::Release);
        drop(self.look());
        self.changed.notify_all();
    }

    fn is_shut(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// Waits while it is being decided who goes on.
    fn wait_decided(&self) {
        let open = |look: &mut Look| look.in_doubt && !self.is_shut();
        drop(self.changed.wait_while(self.look(), open));
    }
}

/// Before each disk write: has anyone won a generation after ours? A side that was only stopped,
/// and is continued after its peer went live, must not write what it had in hand.
///
/// What this host knows of the directory is asked every time, and the storage itself when the last look at
/// it is older than [`LOOK_COUNTS`]. While this side is in doubt, because a backup is lost and may be going
/// live, nothing is written before it is known who goes on.
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
        self.on_fenced.lock().take()
    }

    /// Who has won `next`, by evidence that is fresh enough.
    fn winner(&self, next: Generation) -> Result<Option<Candidate>, ArbiterError> {
        let now = time_with_suspension();
        let fresh = |(at, generation): (Duration, Generation)| {
            generation == next && now.saturating_sub(at) < LOOK_COUNTS
        };
        if self.state.look().last.is_some_and(fresh) {
            return self.arbiter.known_winner(next);
        }
        let winner = self.arbiter.winner(next)?;
        self.state.look().last = Some((now, next));
        Ok(winner)
    }
}

impl Fence for GenerationFence {
    fn check(&self) -> Result<Permit, FenceError> {
        loop {
            self.state.wait_decided();
            if self.state.is_shut() {
                return Err(FenceError);
            }
            let ours = self.state.generation();
            let next = Generation(ours.0 + 1);
            match self.winner(next) {
                // Where it has come into doubt meanwhile, the answer is worth nothing.
                Ok(None) if self.state.look().in_doubt => {}
                Ok(None) => return Ok(Permit(Some(ours.0))),
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

    fn refused(&self) {
        // What the last look at it has shown is over.
        self.state.look().last = None;
        std::thread::sleep(RETRY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::{DirectoryArbiter, Verdict};
    use std::sync::mpsc::channel;
    use vmft_log::entry::EntrySequence;

    fn first() -> Arc<FenceState> {
        Arc::new(FenceState::new(Generation(1)))
    }

    fn candidate(id: &str) -> Candidate {
        Candidate { id: id.into(), host: "here".into(), pid: 1, role: "primary".into() }
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
        assert!(fence.check().is_ok());
        arbiter.try_win(Generation(2), &candidate("b")).expect("reachable");
        assert_eq!(fence.check(), Err(FenceError));
        assert_eq!(fence.check(), Err(FenceError));
        assert_eq!(lost_to.iter().collect::<Vec<_>>(), [(Generation(2), "b".into())]);
    }

    /// The directory as a client sees it that remembers what was not there.
    #[derive(Debug)]
    struct Remembered {
        storage: DirectoryArbiter,
        looks: AtomicU64,
    }

    impl Arbiter for Remembered {
        fn place(&self) -> String {
            self.storage.place()
        }
        fn pair_name(&self) -> Result<String, ArbiterError> {
            self.storage.pair_name()
        }
        fn pair(&self, fresh: &str) -> Result<String, ArbiterError> {
            self.storage.pair(fresh)
        }
        fn share(&self, who: &Candidate) -> Result<(), ArbiterError> {
            self.storage.share(who)
        }
        fn leave(&self) {
            self.storage.leave();
        }
        fn leave_token(&self, who: &Candidate) -> Result<String, ArbiterError> {
            self.storage.leave_token(who)
        }
        fn take_token(&self, token: &str) {
            self.storage.take_token(token);
        }
        fn finds(&self, token: &str) -> Result<bool, ArbiterError> {
            self.storage.finds(token)
        }
        fn try_win(&self, next: Generation, who: &Candidate) -> Result<Verdict, ArbiterError> {
            self.storage.try_win(next, who)
        }
        fn announce(
            &self,
            _: Generation,
            _: &Candidate,
            _: EntrySequence,
        ) -> Result<Vec<EntrySequence>, ArbiterError> {
            Ok(vec![])
        }
        fn latest(&self) -> Result<Generation, ArbiterError> {
            self.storage.latest()
        }
        fn winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError> {
            self.looks.fetch_add(1, Ordering::Relaxed);
            self.storage.winner(generation)
        }
        fn known_winner(&self, _: Generation) -> Result<Option<Candidate>, ArbiterError> {
            Ok(None)
        }
    }

    #[test]
    fn a_host_that_remembers_absence_is_fenced_by_the_storage_when_its_look_is_old() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let storage = DirectoryArbiter::create(dir.path()).expect("made");
        let arbiter = Arc::new(Remembered { storage, looks: AtomicU64::new(0) });
        let seen = Arc::clone(&arbiter);
        let state = first();
        let fence = GenerationFence::new(arbiter, candidate("a"), Arc::clone(&state), |_, _| {});
        assert!(fence.check().is_ok());
        seen.try_win(Generation(2), &candidate("b")).expect("reachable");
        // As after a sleep of a minute.
        let aged = |look: (Duration, Generation)| (look.0.saturating_sub(LOOK_COUNTS), look.1);
        let last = state.look().last.map(aged);
        state.look().last = last;
        assert_eq!(fence.check(), Err(FenceError));
        assert_eq!(seen.looks.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn while_it_is_in_doubt_who_goes_on_nothing_is_written() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let arbiter: Arc<dyn Arbiter> =
            Arc::new(DirectoryArbiter::create(dir.path()).expect("made"));
        let state = first();
        let fence = GenerationFence::new(arbiter, candidate("a"), Arc::clone(&state), |_, _| {});
        let fence = Arc::new(fence);
        state.doubt();
        let waiting = Arc::clone(&fence);
        let (answer, answered) = channel();
        let thread = std::thread::spawn(move || answer.send(waiting.check()).expect("awaited"));
        assert!(answered.try_recv().is_err());
        state.advance(Generation(2));
        assert_eq!(answered.recv(), Ok(Ok(Permit(Some(2)))));
        thread.join().expect("it has answered");
        state.doubt();
        state.shut();
        assert_eq!(fence.check(), Err(FenceError));
    }

    #[test]
    fn a_fence_shut_by_a_side_that_knows_why_tells_it_nothing_more() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let arbiter: Arc<dyn Arbiter> =
            Arc::new(DirectoryArbiter::create(dir.path()).expect("made"));
        let unwanted = |_, _| panic!("told");
        let state = first();
        let mine = Arc::clone(&state);
        let fence = GenerationFence::new(Arc::clone(&arbiter), candidate("a"), mine, unwanted);
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
        let mine = Arc::clone(&state);
        let unwanted = |_, _| panic!("not fenced");
        let fence = GenerationFence::new(Arc::clone(&arbiter), me.clone(), mine, unwanted);
        arbiter.try_win(Generation(2), &me).expect("reachable");
        assert_eq!(fence.check(), Ok(Permit(Some(2))), "even before the winner has told its fence");
        assert_eq!(state.generation(), Generation(2));
    }
}
