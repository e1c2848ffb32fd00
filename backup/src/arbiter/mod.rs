//! Who may go live: one test-and-set a generation.
//!
//! Either side that loses its peer must win the next generation before it runs on; whoever finds
//! it taken halts; if the arbiter cannot be reached, it waits (§2.3 of the paper). Every go-live
//! takes the next generation, so the flag re-arms itself.

mod directory;
mod fence;

pub use directory::DirectoryArbiter;
pub use fence::{FenceState, GenerationFence, RETRY};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use vmft_logging_channel::entry::{EntrySequence, Generation};

/// Who asks for a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Names this process's life; no two processes have the same.
    pub id: String,
    /// For people: where it runs.
    pub host: String,
    /// For people: its process id there.
    pub pid: u32,
    /// What it was before it asked.
    pub role: String,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the {} on {} (process {})", self.role, self.host, self.pid)
    }
}

/// The arbiter's decision. It is final, and the same whoever asks.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    #[error("the arbiter {} cannot be reached", path.display())]
    Unreachable {
        /// The arbiter's directory.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// There is none: no primary has been started with it.
    #[error("there is no arbiter {}; start the primary first, and name the same --disk or --arbiter here", path.display())]
    Absent {
        /// Where it would be.
        path: PathBuf,
    },
    /// Another pair lives there.
    #[error("the arbiter {} is used by another pair; give each pair a directory of its own", path.display())]
    InUse {
        /// The arbiter's directory.
        path: PathBuf,
    },
}

/// Decides generations by an atomic test-and-set.
pub trait Arbiter: fmt::Debug + Send + Sync {
    /// Takes this side's share of the arbiter: from now on no new pair begins with it. Done at once
    /// by a new pair; by a backup when it has joined.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`], or [`ArbiterError::InUse`] if a new pair is just taking it.
    fn share(&self) -> Result<(), ArbiterError> {
        Ok(())
    }

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

    /// Who won `generation`, if anyone has. Cheap while nobody has: asked before each disk write.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    fn winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError>;
}

/// How long candidates wait for each other to say how far they are: they lose their primary within
/// this time of each other, if it is the primary that is lost.
pub(crate) const ANNOUNCE: Duration = Duration::from_millis(10);
/// How long one that is behind lets another go first.
pub(crate) const HEAD_START: Duration = Duration::from_millis(60);
