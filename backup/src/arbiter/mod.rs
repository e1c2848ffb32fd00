//! Who may go live: one test-and-set a generation.
//!
//! Either side that loses its peer must win the next generation before it runs on; whoever finds
//! it taken halts; if the arbiter cannot be reached, it waits (§2.3 of the paper). Every go-live
//! takes the next generation, so the flag re-arms itself.

mod calls;
mod directory;
mod etcd;
mod fence;
mod remote;

pub use calls::{Answer, Call, CallFormatError, Failure, PairCall};
pub use directory::DirectoryArbiter;
pub use etcd::{EtcdArbiter, EtcdPlace, ExposedMember, LEASE_SECONDS, MAX_MEMBERS};
pub use fence::{FenceState, GenerationFence, RETRY};
pub use remote::{RemoteArbiter, RemoteError};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::time::Duration;
use vmft_log::entry::{EntrySequence, Generation};
use vmft_log::foreign::ForeignText;

/// Who asks for a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Names this process's life; no two processes have the same.
    pub id: String,
    /// For people: where it runs.
    pub host: ForeignText,
    /// For people: its process id there.
    pub pid: u32,
    /// What it was before it asked.
    pub role: ForeignText,
}

impl Candidate {
    /// Stands for whoever has made the arbiter anew in the place of the one that was asked before: what
    /// that one knew of generations is gone, so nobody who asked it may go on.
    pub(crate) fn another_pair(place: &str) -> Self {
        Self {
            id: String::new(),
            host: ForeignText::default(),
            pid: 0,
            role: format!("another pair, which has the place of this one at {place}").into(),
        }
    }

    /// Whoever has a generation whose file is there, and that this host will not read yet because it
    /// remembers that there was none. It is not this side, which would have made the file itself.
    pub(crate) fn unnamed() -> Self {
        Self {
            id: String::new(),
            host: ForeignText::default(),
            pid: 0,
            role: "a side of another host".into(),
        }
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.id.is_empty() {
            return self.role.fmt(f);
        }
        write!(f, "the {} on {} (process {})", self.role, self.host, self.pid)
    }
}

/// The arbiter's decision. It is final, and the same whoever asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The candidate has the generation.
    Won,
    /// Someone else has it.
    Lost {
        /// Who.
        winner: Candidate,
    },
}

/// Why there is no decision, or none that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// The shared storage cannot be reached now; ask again.
    #[error("the arbiter {place} cannot be reached")]
    Unreachable {
        /// Where the arbiter is.
        place: String,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// There is none: no primary has been started with it.
    #[error(
        "there is no arbiter {place}; start the primary first, and name the same --disk or --arbiter here"
    )]
    Absent {
        /// Where it would be.
        place: String,
    },
    /// Another pair lives there.
    #[error("the arbiter {place} is used by another pair; give each pair an arbiter of its own")]
    InUse {
        /// Where the arbiter is.
        place: String,
    },
}

/// Decides generations by an atomic test-and-set.
pub trait Arbiter: fmt::Debug + Send + Sync {
    /// Where it is, for people.
    fn place(&self) -> String;

    /// The name of the pair there is.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    fn pair_name(&self) -> Result<String, ArbiterError>;

    /// The pair's name, the same for every side that asks. An arbiter without one is given `fresh`.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    fn pair(&self, fresh: &str) -> Result<String, ArbiterError>;

    /// Takes this side's share of the arbiter: from now on no new pair begins with it, and `who` has there
    /// what it takes to win a generation, however full the storage is by then. Done at once by a new pair;
    /// by a backup when it has joined.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`], or [`ArbiterError::InUse`] if a new pair is just taking it.
    fn share(&self, who: &Candidate) -> Result<(), ArbiterError>;

    /// This side has ended, and asks nothing any more: its share is free at once, where the end of its
    /// process does not do that.
    fn leave(&self);

    /// Leaves something there that only who asks the same arbiter can find, and returns what it is called:
    /// the same as long as it is there. See [`Self::finds`].
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    fn leave_token(&self, who: &Candidate) -> Result<String, ArbiterError>;

    /// Takes away what [`Self::leave_token`] has left. What cannot be taken away does no harm.
    fn take_token(&self, token: &str);

    /// True if another side has left `token` with this arbiter.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    fn finds(&self, token: &str) -> Result<bool, ArbiterError>;

    /// Asks for `generation`. Asking again for one already won answers [`Verdict::Won`] again.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`]: nothing is known, and the candidate must not go live.
    fn try_win(&self, generation: Generation, who: &Candidate) -> Result<Verdict, ArbiterError>;

    /// Says how far the candidate's log for `generation` goes, and returns how far those of the others
    /// go that have said so: the most advanced goes first where there are several. Only a courtesy;
    /// the test-and-set decides.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    fn announce(
        &self,
        generation: Generation,
        who: &Candidate,
        last: EntrySequence,
    ) -> Result<Vec<EntrySequence>, ArbiterError>;

    /// The last generation anyone has won; zero if none.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    fn latest(&self) -> Result<Generation, ArbiterError>;

    /// Who won `generation`, if anyone has, according to the storage itself.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    fn winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError>;

    /// The same, as far as this host knows: it may not have noticed yet, nor that the storage is away. Cheap;
    /// asked before each disk write.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    fn known_winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError>;
}

/// How long candidates wait for each other to say how far they are: they lose their primary within
/// this time of each other, if it is the primary that is lost.
pub(crate) const ANNOUNCE: Duration = Duration::from_millis(10);
/// How long one that is behind lets another go first.
pub(crate) const HEAD_START: Duration = Duration::from_millis(60);
