//! Whether a pair is alive, as its arbiter knows.

use crate::arbiter_option::ArbiterPlace;
use crate::nbd_disk;
use anyhow::Result;
use std::sync::Arc;
use std::time::Duration;
use vmft_backup::arbiter::{
    Arbiter, ArbiterError, Candidate, DirectoryArbiter, EtcdArbiter, RemoteError,
};
use vmft_log::entry::Generation;

/// How often one that seems to be in use is looked at: another side may be looking, too.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(150);

/// What an arbiter knows of its pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PairState {
    /// No side of it has begun here.
    New,
    /// No side of it is alive.
    Over {
        /// The last generation.
        generation: u64,
        /// Whose it was.
        winner: Option<Candidate>,
    },
    /// Some side of it is.
    Alive,
}

impl PairState {
    /// True if some side is alive.
    pub fn is_alive(&self) -> bool {
        *self == Self::Alive
    }
}

/// True for an arbiter that some side has.
fn is_in_use(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ArbiterError::InUse { .. }))
        || matches!(error.downcast_ref(), Some(RemoteError::Arbiter(ArbiterError::InUse { .. })))
}

fn try_take(place: &ArbiterPlace) -> Result<Arc<dyn Arbiter>> {
    Ok(match place {
        ArbiterPlace::Directory(path) => Arc::new(DirectoryArbiter::create(path)?),
        ArbiterPlace::Export(export) => Arc::new(nbd_disk::create_arbiter(export)?),
        ArbiterPlace::Etcd(etcd) => {
            // Before anything is sent.
            etcd.check()?;
            Arc::new(EtcdArbiter::create(etcd)?)
        }
    })
}

/// Takes the arbiter as a new pair does, which is possible where nobody has it. One that is in use is asked
/// again for a moment: it may be another side that looks.
///
/// # Errors
/// The arbiter is in use, or cannot be asked.
pub fn take(place: &ArbiterPlace) -> Result<Arc<dyn Arbiter>> {
    let mut looks = 1;
    loop {
        match try_take(place) {
            Err(error) if is_in_use(&error) && looks < LOOKS => {
                looks += 1;
                std::thread::sleep(BETWEEN_LOOKS);
            }
            other => return other,
        }
    }
}

/// What is found at an arbiter.
enum Found {
    New,
    Alive,
    /// Nobody else has it, and this is its pair's last generation.
    Over(Arc<dyn Arbiter>, Generation),
}

fn find(place: &ArbiterPlace) -> Result<Found> {
    let is_absent = match place {
        ArbiterPlace::Directory(path) => {
            matches!(DirectoryArbiter::open(path), Err(ArbiterError::Absent { .. }))
        }
        ArbiterPlace::Etcd(etcd) => {
            etcd.check()?;
            matches!(EtcdArbiter::open(etcd), Err(ArbiterError::Absent { .. }))
        }
        ArbiterPlace::Export(_) => false,
    };
    if is_absent {
        return Ok(Found::New);
    }
    let arbiter = match take(place) {
        Ok(arbiter) => arbiter,
        Err(error) if is_in_use(&error) => return Ok(Found::Alive),
        Err(error) => return Err(error),
    };
    let generation = arbiter.latest()?;
    Ok(if generation.0 == 0 { Found::New } else { Found::Over(arbiter, generation) })
}

/// The pair's name, and its last generation with its winner. `None` for a pair that has not begun, or some side
/// of which is alive.
///
/// # Errors
/// The arbiter cannot be asked.
pub fn last_reign(place: &ArbiterPlace) -> Result<Option<(String, Generation, Option<Candidate>)>> {
    let Found::Over(arbiter, latest) = find(place)? else { return Ok(None) };
    Ok(Some((arbiter.pair_name()?, latest, arbiter.winner(latest)?)))
}

/// Looks. What it says may be old at once: who begins is decided by the arbiter's own test-and-set.
///
/// # Errors
/// The arbiter cannot be asked.
pub fn look(place: &ArbiterPlace) -> Result<PairState> {
    Ok(match find(place)? {
        Found::New => PairState::New,
        Found::Alive => PairState::Alive,
        Found::Over(arbiter, generation) => {
            PairState::Over { generation: generation.0, winner: arbiter.winner(generation)? }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_backup::arbiter::Verdict;

    #[test]
    fn a_pair_is_new_then_alive_then_over() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("arbiter");
        let place = ArbiterPlace::Directory(path.clone());
        assert_eq!(look(&place).expect("it can be asked"), PairState::New);
        assert!(!path.exists(), "looking makes nothing");
        let who = Candidate { id: "i".into(), host: "h".into(), pid: 1, role: "primary".into() };
        let arbiter = DirectoryArbiter::create(&path).expect("a new pair");
        arbiter.pair("name").expect("a name");
        assert!(look(&place).expect("it can be asked").is_alive());
        arbiter.share(&who).expect("its own");
        let won = arbiter.try_win(Generation(1), &who).expect("it answers");
        assert_eq!(won, Verdict::Won);
        assert!(look(&place).expect("it can be asked").is_alive());
        drop(arbiter);
        let over = PairState::Over { generation: 1, winner: Some(who) };
        assert_eq!(look(&place).expect("it can be asked"), over);
        // Looking again changes nothing, and keeps nobody from beginning.
        assert_eq!(look(&place).expect("it can be asked"), over);
        assert!(DirectoryArbiter::create(&path).is_ok());
    }

    #[test]
    fn where_there_is_no_storage_nothing_is_said_of_the_pair() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        std::fs::write(&file, "").expect("a file");
        assert!(look(&ArbiterPlace::Directory(file.join("arbiter"))).is_err());
    }
}
