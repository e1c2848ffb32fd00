//! An arbiter on a shared directory: the exclusive creation of a generation's file.

use super::{Arbiter, ArbiterError, Candidate, Verdict};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use vmft_logging_channel::entry::{EntrySequence, Generation};
use vmft_vmm::world::try_join_file;

const PREFIX: &str = "generation-";
const CANDIDATE: &str = "candidate-";

/// A directory on storage that both sides share. The file of a generation names its winner; it is
/// linked into place whole, so it exists with its content or not at all (`link(2)` is atomic on
/// local file systems and on NFS).
#[derive(Debug)]
pub struct DirectoryArbiter {
    path: PathBuf,
    /// Holds the directory's lock, from the moment this side belongs to the pair to its end.
    lock: OnceLock<File>,
}

impl DirectoryArbiter {
    /// Opens the directory for a new pair, making it if need be, and makes sure that no other pair
    /// lives there.
    ///
    /// # Errors
    /// [`ArbiterError::InUse`] for another pair's directory, [`ArbiterError::Unreachable`] if it
    /// cannot be used.
    pub fn create(path: &Path) -> Result<Self, ArbiterError> {
        let arbiter = Self { path: path.to_owned(), lock: OnceLock::new() };
        // The directory above is the shared storage: where it is missing, it is not mounted.
        match fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(arbiter.unreachable(error));
            }
            _ => arbiter.join(true)?,
        }
        Ok(arbiter)
    }

    /// Opens the directory of a pair there is. Nothing changes in it, and [`Arbiter::share`] is
    /// still to be done: a backup that waits must not keep its primary from starting.
    ///
    /// # Errors
    /// [`ArbiterError::Absent`] if there is no pair, [`ArbiterError::Unreachable`].
    pub fn open(path: &Path) -> Result<Self, ArbiterError> {
        let arbiter = Self { path: path.to_owned(), lock: OnceLock::new() };
        match fs::metadata(path.join("pair")) {
            Ok(_) => Ok(arbiter),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(ArbiterError::Absent { path: path.to_owned() })
            }
            Err(error) => Err(arbiter.unreachable(error)),
        }
    }

    fn join(&self, new_pair: bool) -> Result<(), ArbiterError> {
        let take = || {
            let path = self.path.join("lock");
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(path)?;
            Ok(try_join_file(&file, new_pair)?.then_some(file))
        };
        match take().map_err(|source| self.unreachable(source))? {
            Some(lock) => {
                self.lock.get_or_init(|| lock);
                Ok(())
            }
            None => Err(ArbiterError::InUse { path: self.path.clone() }),
        }
    }

    /// The name of the pair there is.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    pub fn pair_name(&self) -> Result<String, ArbiterError> {
        fs::read_to_string(self.path.join("pair")).map_err(|source| self.unreachable(source))
    }

    /// The pair's name, the same for every side that shares the directory. A directory without one
    /// is given `fresh`. That both sides read the same name shows that they ask the same arbiter.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`].
    pub fn pair(&self, fresh: &str) -> Result<String, ArbiterError> {
        let name = || -> io::Result<String> {
            let target = self.path.join("pair");
            let mine = self.path.join(format!("pair-{}", std::process::id()));
            fs::write(&mine, fresh)?;
            let linked = fs::hard_link(&mine, &target);
            fs::remove_file(&mine)?;
            match linked {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                _ => fs::read_to_string(&target),
            }
        };
        name().map_err(|source| self.unreachable(source))
    }

    fn file(&self, generation: Generation) -> PathBuf {
        self.path.join(format!("{PREFIX}{:010}", generation.0))
    }

    fn unreachable(&self, source: io::Error) -> ArbiterError {
        ArbiterError::Unreachable { path: self.path.clone(), source }
    }

    fn claim(&self, generation: Generation, who: &Candidate) -> io::Result<Verdict> {
        let target = self.file(generation);
        let mine = self.path.join(format!("claim-{}-{}", generation.0, who.id));
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(&mine)?;
        file.write_all(&serde_json::to_vec_pretty(who)?)?;
        file.sync_all()?;
        let linked = fs::hard_link(&mine, &target);
        // Over NFS the answer to a link can be lost; the count of links tells the truth.
        let won = linked.is_ok() || fs::metadata(&mine)?.nlink() == 2;
        fs::remove_file(&mine)?;
        if won {
            File::open(&self.path)?.sync_all()?;
            return Ok(Verdict::Won);
        }
        match linked {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => {
                let winner: Candidate = serde_json::from_slice(&fs::read(&target)?)?;
                let won = winner.id == who.id;
                Ok(if won { Verdict::Won } else { Verdict::Lost { winner } })
            }
        }
    }
}

impl Arbiter for DirectoryArbiter {
    fn share(&self) -> Result<(), ArbiterError> {
        if self.lock.get().is_some() { Ok(()) } else { self.join(false) }
    }

    fn try_win(&self, generation: Generation, who: &Candidate) -> Result<Verdict, ArbiterError> {
        self.claim(generation, who).map_err(|source| self.unreachable(source))
    }

    fn announce(
        &self,
        generation: Generation,
        who: &Candidate,
        last: EntrySequence,
    ) -> Result<Vec<EntrySequence>, ArbiterError> {
        let prefix = format!("{CANDIDATE}{}-", generation.0);
        let announce = || -> io::Result<Vec<EntrySequence>> {
            let mine = format!("{prefix}{}", who.id);
            let partial = self.path.join(format!("partial-{}", who.id));
            fs::write(&partial, last.0.to_string())?;
            fs::rename(&partial, self.path.join(&mine))?;
            let mut others = Vec::new();
            for entry in fs::read_dir(&self.path)? {
                let entry = entry?;
                let name = entry.file_name();
                let is_other =
                    name.to_str().is_some_and(|name| name.starts_with(&prefix) && name != mine);
                // One that is no number is none of ours.
                if is_other && let Ok(number) = fs::read_to_string(entry.path())?.parse() {
                    others.push(EntrySequence(number));
                }
            }
            Ok(others)
        };
        announce().map_err(|source| self.unreachable(source))
    }

    fn latest(&self) -> Result<Generation, ArbiterError> {
        let mut latest = 0;
        for entry in fs::read_dir(&self.path).map_err(|source| self.unreachable(source))? {
            let name = entry.map_err(|source| self.unreachable(source))?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX))
                .and_then(|number| number.parse().ok());
            latest = latest.max(number.unwrap_or(0));
        }
        Ok(Generation(latest))
    }

    fn winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError> {
        let unreachable = |source| self.unreachable(source);
        match fs::read(self.file(generation)) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).map_err(|error| unreachable(error.into()))
            }
            // An unmounted share looks like an empty directory: ours has the lock file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::metadata(self.path.join("lock")).map(|_| None).map_err(unreachable)
            }
            Err(error) => Err(unreachable(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Barrier};

    fn candidate(id: usize) -> Candidate {
        Candidate { id: format!("id{id}"), host: "here".into(), pid: 1, role: "backup".into() }
    }

    #[test]
    fn of_many_that_ask_at_once_exactly_one_wins() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let pair = DirectoryArbiter::create(dir.path()).expect("made");
        pair.pair("name").expect("reachable");
        for generation in (1..=20).map(Generation) {
            let barrier = Arc::new(Barrier::new(4));
            let threads: Vec<_> = (0..4)
                .map(|id| {
                    let arbiter = DirectoryArbiter::open(dir.path()).expect("made");
                    let barrier = Arc::clone(&barrier);
                    std::thread::spawn(move || {
                        barrier.wait();
                        arbiter.try_win(generation, &candidate(id)).expect("reachable")
                    })
                })
                .collect();
            let verdicts: Vec<_> =
                threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
            let winners = verdicts.iter().filter(|verdict| **verdict == Verdict::Won).count();
            assert_eq!(winners, 1, "{verdicts:?}");
        }
    }

    #[test]
    fn a_winner_who_asks_again_has_still_won() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let arbiter = DirectoryArbiter::create(dir.path()).expect("made");
        assert_eq!(arbiter.latest().expect("reachable"), Generation(0));
        let won = |id| arbiter.try_win(Generation(3), &candidate(id)).expect("reachable");
        assert_eq!(won(1), Verdict::Won);
        assert_eq!(won(1), Verdict::Won);
        assert_eq!(won(2), Verdict::Lost { winner: candidate(1) });
        assert_eq!(arbiter.latest().expect("reachable"), Generation(3));
        assert_eq!(arbiter.winner(Generation(3)).expect("reachable"), Some(candidate(1)));
        assert_eq!(arbiter.winner(Generation(4)).expect("reachable"), None);
    }

    #[test]
    fn candidates_learn_how_far_the_others_are_for_the_same_generation() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let arbiter = DirectoryArbiter::create(dir.path()).expect("made");
        let announce = |generation, id, last| {
            let last = EntrySequence(last);
            arbiter.announce(Generation(generation), &candidate(id), last).expect("reachable")
        };
        assert_eq!(announce(2, 1, 70), []);
        assert_eq!(announce(2, 2, 65), [EntrySequence(70)]);
        assert_eq!(announce(2, 1, 71), [EntrySequence(65)]);
        assert_eq!(announce(3, 2, 65), []);
    }

    #[test]
    fn an_unreachable_arbiter_decides_nothing_until_it_returns() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("arbiter");
        let away = dir.path().join("away");
        let arbiter = DirectoryArbiter::create(&path).expect("made");
        fs::rename(&path, &away).expect("renamed");
        assert!(arbiter.winner(Generation(1)).is_err());
        let ask = || arbiter.try_win(Generation(1), &candidate(1));
        assert!(ask().is_err() && ask().is_err());
        fs::rename(&away, &path).expect("renamed");
        assert_eq!(ask().expect("it came back"), Verdict::Won);
    }

    #[test]
    fn a_directory_of_a_living_pair_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let primary = DirectoryArbiter::create(dir.path()).expect("made");
        primary.pair("name").expect("reachable");
        let backup = DirectoryArbiter::open(dir.path()).expect("made");
        backup.share().expect("shared");
        let other = DirectoryArbiter::create(dir.path());
        assert!(matches!(other, Err(ArbiterError::InUse { .. })));
        drop((primary, backup));
        DirectoryArbiter::create(dir.path()).expect("free again");
    }

    #[test]
    fn a_backup_that_looks_for_its_pair_changes_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("arbiter");
        let absent = DirectoryArbiter::open(&path);
        assert!(matches!(absent, Err(ArbiterError::Absent { .. })));
        assert!(!path.exists());
        DirectoryArbiter::create(&path).expect("made").pair("name").expect("reachable");
        let waiting = DirectoryArbiter::open(&path).expect("made");
        assert_eq!(waiting.pair_name().expect("reachable"), "name");
        DirectoryArbiter::create(&path).expect("a backup that waits is in nobody's way");
    }
}
