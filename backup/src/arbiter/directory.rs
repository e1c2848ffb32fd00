//! An arbiter on a shared directory: the exclusive creation of a generation's file.
//!
//! | name | what |
//! |---|---|
//! | `pair` | the pair's name |
//! | `lock` | held shared by every side |
//! | `generation-NNNNNNNNNN` | who won it: a link to the winner's claim |
//! | `claim-ID` | who that side is, written and synced when it belongs to the pair, long before it asks |
//! | `spare-ID-N` | names that are given up where there is no room for another |
//! | `join-TOKEN` | left by a side that joins, for the other to find |
//! | `candidate-N-ID` | how far that side's log goes |

use super::{Arbiter, ArbiterError, Candidate, Verdict};
use nix::fcntl::OFlag;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use vmft_log::entry::{EntrySequence, Generation};
use vmft_log::wire::MAX_COUNT;
use vmft_threads::Mutex;
use vmft_vmm::world::try_join_file;

const PREFIX: &str = "generation-";
const CANDIDATE: &str = "candidate-";
/// Most bytes of a file there.
const MAX_FILE: u64 = 64 << 10;
/// Names that each side keeps in reserve: one is enough to win a generation, the other stays if that has to
/// be done again.
const SPARES: usize = 2;
/// Bytes of a token, in hexadecimal digits.
const TOKEN_DIGITS: usize = 32;

/// A directory on storage that both sides share. The file of a generation names its winner; it is
/// linked into place whole, so it exists with its content or not at all (`link(2)` is atomic on
/// local file systems and on NFS). What is linked is there beforehand, and so is the room for its name: a
/// full file system does not keep a side from winning.
#[derive(Debug)]
pub struct DirectoryArbiter {
    path: PathBuf,
    /// Holds the directory's lock, from the moment this side belongs to the pair to its end.
    lock: OnceLock<File>,
    /// The pair's name, once it is known.
    pair: OnceLock<String>,
    /// The file by which the directory was last known to be the pair's.
    known: Mutex<Option<FileId>>,
}

/// What tells a file from every other on this host, and from one that has its number after it.
type FileId = (u64, u64, i64, i64);

fn file_id(data: &fs::Metadata) -> FileId {
    (data.dev(), data.ino(), data.ctime(), data.ctime_nsec())
}

fn generation_name(generation: Generation) -> String {
    format!("{PREFIX}{:010}", generation.0)
}

/// How far a candidate says that its log goes. One that says no number is none of ours.
pub(super) fn announced_number(text: &str) -> Option<EntrySequence> {
    text.parse().ok().filter(|number| *number <= MAX_COUNT).map(EntrySequence)
}

/// The same of a candidate's file.
fn announced(path: &Path) -> io::Result<Option<EntrySequence>> {
    match read_text(path) {
        Ok(text) => Ok(announced_number(&text)),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(error),
    }
}

/// No room, of whatever kind, for what was to be made.
fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull, TooManyLinks};
    matches!(error.kind(), StorageFull | QuotaExceeded | TooManyLinks)
}

fn exists_already(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AlreadyExists
}

impl DirectoryArbiter {
    /// Where the arbiter of the pair with this image is, unless its operator says otherwise.
    pub fn beside(image: &Path) -> PathBuf {
        let mut path = image.as_os_str().to_owned();
        path.push(".vmft");
        path.into()
    }

    fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            lock: OnceLock::new(),
            pair: OnceLock::new(),
            known: Mutex::default(),
        }
    }

    /// Opens the directory for a new pair, making it if need be, and makes sure that no other pair
    /// lives there.
    ///
    /// # Errors
    /// [`ArbiterError::InUse`] for another pair's directory, [`ArbiterError::Unreachable`] if it
    /// cannot be used.
    pub fn create(path: &Path) -> Result<Self, ArbiterError> {
        let arbiter = Self::at(path);
        // The directory above is the shared storage: where it is missing, it is not mounted. The pair's
        // name is in this one, by which a backup is known where there is no TLS.
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if !exists_already(&error) => {
                return Err(arbiter.unreachable(error));
            }
            _ => arbiter.join(true)?,
        }
        arbiter.clean();
        Ok(arbiter)
    }

    /// Opens the directory of a pair there is. Nothing changes in it, and [`Arbiter::share`] is
    /// still to be done: a backup that waits must not keep its primary from starting.
    ///
    /// # Errors
    /// [`ArbiterError::Absent`] if there is no pair, [`ArbiterError::Unreachable`].
    pub fn open(path: &Path) -> Result<Self, ArbiterError> {
        let arbiter = Self::at(path);
        match fs::metadata(path.join("pair")) {
            Ok(_) => Ok(arbiter),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(ArbiterError::Absent { place: arbiter.place() })
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
            None => Err(ArbiterError::InUse { place: self.place() }),
        }
    }

    /// Takes away what sides have left that belong to the pair no longer: nobody does but a new one. A side
    /// that waits leaves its token again.
    fn clean(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let is_left = name.to_str().is_some_and(|name| {
                ["claim-", "spare-", "join-", CANDIDATE].iter().any(|left| name.starts_with(left))
            });
            if is_left {
                // What stays is in nobody's way.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn file(&self, generation: Generation) -> PathBuf {
        self.path.join(generation_name(generation))
    }

    fn claim(&self, who: &Candidate) -> PathBuf {
        self.path.join(format!("claim-{}", who.id))
    }

    fn spare(&self, who: &Candidate, number: usize) -> PathBuf {
        // Longer than the name that is made in its place.
        self.path.join(format!("spare-{}-{number}", who.id))
    }

    fn unreachable(&self, source: io::Error) -> ArbiterError {
        ArbiterError::Unreachable { place: self.place(), source }
    }

    /// Has ready what it takes to win a generation: the claim, on the storage, and names to give up.
    fn prepare(&self, who: &Candidate) -> io::Result<()> {
        let claim = self.claim(who);
        let text = serde_json::to_vec_pretty(who)?;
        if read_small(&claim).ok().as_ref() != Some(&text) {
            write_synced(&claim, &text)?;
        }
        for number in 0..SPARES {
            match fs::hard_link(&claim, self.spare(who, number)) {
                Err(error) if !exists_already(&error) => return Err(error),
                _ => {}
            }
        }
        File::open(&self.path)?.sync_all()
    }

    /// Links the claim into the place of a generation; where there is no room, in the place of a spare name.
    fn link_claim(&self, generation: Generation, who: &Candidate) -> io::Result<()> {
        let (claim, target) = (self.claim(who), self.file(generation));
        let mut linked = fs::hard_link(&claim, &target);
        for number in 0..SPARES {
            if !matches!(&linked, Err(error) if is_full(error)) {
                break;
            }
            if fs::remove_file(self.spare(who, number)).is_ok() {
                linked = fs::hard_link(&claim, &target);
            }
        }
        linked
    }

    fn decide(&self, generation: Generation, who: &Candidate) -> io::Result<Verdict> {
        if !self.is_ours()? {
            return Ok(Verdict::Lost { winner: Candidate::another_pair(&self.place()) });
        }
        if !fs::exists(self.claim(who))? {
            self.prepare(who)?;
        }
        match self.link_claim(generation, who) {
            // Over NFS the answer to a link can be lost: what is there tells the truth.
            Err(error) if !exists_already(&error) => return Err(error),
            _ => {}
        }
        let winner: Candidate = match read_small(&self.file(generation)) {
            Ok(bytes) => serde_json::from_slice(&bytes)?,
            // The storage has just said that there is one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Candidate::unnamed(),
            Err(error) => return Err(error),
        };
        if winner.id != who.id {
            return Ok(Verdict::Lost { winner });
        }
        File::open(&self.path)?.sync_all()?;
        // Won in this pair's directory, and not in one that has taken its place meanwhile.
        if !self.is_ours()? {
            return Ok(Verdict::Lost { winner: Candidate::another_pair(&self.place()) });
        }
        // For the next time. Where there is no room now, there may be then.
        if let Err(error) = self.prepare(who) {
            tracing::debug!(%error, "no names in reserve for the next generation");
        }
        Ok(Verdict::Won)
    }

    /// True if the directory is still the one of this side's pair, and no other that was made in its place.
    /// An unmounted share looks like an empty directory: ours has the lock file.
    fn is_ours(&self) -> io::Result<bool> {
        let Some(name) = self.pair.get() else {
            return fs::metadata(self.path.join("lock")).map(|_| true);
        };
        let found = file_id(&fs::metadata(self.path.join("lock"))?);
        let mut known = self.known.lock();
        if *known == Some(found) {
            return Ok(true);
        }
        // Another file, or the same by another mount: the name decides.
        let is_ours = read_text(&self.path.join("pair"))? == *name;
        if is_ours {
            *known = Some(found);
        }
        Ok(is_ours)
    }

    /// What a token is called, if it is one.
    fn token(&self, token: &str) -> Option<PathBuf> {
        is_token(token).then(|| self.path.join(format!("join-{token}")))
    }
}

/// Reads a file of the arbiter, none of which is large: whoever else can write there cannot have this side
/// take memory without end.
fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // Opening a pipe would wait for whoever writes to it.
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no file"));
    }
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a file too large for an arbiter's",
        ));
    }
    Ok(bytes)
}

fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read_small(path)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a file that is no text"))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// True for what can be the digits of a token.
pub(super) fn is_token(text: &str) -> bool {
    text.len() == TOKEN_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Digits that nobody else has.
pub(super) fn fresh_digits() -> io::Result<String> {
    let mut bytes = [0; TOKEN_DIGITS / 2];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Arbiter for DirectoryArbiter {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn pair_name(&self) -> Result<String, ArbiterError> {
        let name = read_text(&self.path.join("pair")).map_err(|source| self.unreachable(source))?;
        Ok(self.pair.get_or_init(|| name).clone())
    }

    fn pair(&self, fresh: &str) -> Result<String, ArbiterError> {
        let make = || -> io::Result<()> {
            let mine = self.path.join(format!("pair-{}", std::process::id()));
            write_synced(&mine, fresh.as_bytes())?;
            let linked = fs::hard_link(&mine, self.path.join("pair"));
            fs::remove_file(&mine)?;
            match linked {
                Err(error) if !exists_already(&error) => Err(error),
                _ => Ok(()),
            }
        };
        make().map_err(|source| self.unreachable(source))?;
        self.pair_name()
    }

    fn share(&self, who: &Candidate) -> Result<(), ArbiterError> {
        if self.lock.get().is_none() {
            self.join(false)?;
        }
        self.prepare(who).map_err(|source| self.unreachable(source))
    }

    fn leave(&self) {
        // What is held goes with the process.
    }

    fn leave_token(&self, _: &Candidate) -> Result<String, ArbiterError> {
        let leave = || -> io::Result<String> {
            let digits = fresh_digits()?;
            let token = self.token(&digits).expect("digits are a token");
            // A link needs no room but for its name.
            fs::hard_link(self.path.join("pair"), token)?;
            Ok(digits)
        };
        leave().map_err(|source| self.unreachable(source))
    }

    fn take_token(&self, token: &str) {
        if let Some(path) = self.token(token) {
            // One that stays says nothing to anybody.
            let _ = fs::remove_file(path);
        }
    }

    fn finds(&self, token: &str) -> Result<bool, ArbiterError> {
        let Some(path) = self.token(token) else { return Ok(false) };
        fs::exists(path).map_err(|source| self.unreachable(source))
    }

    fn try_win(&self, generation: Generation, who: &Candidate) -> Result<Verdict, ArbiterError> {
        self.decide(generation, who).map_err(|source| self.unreachable(source))
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
                if is_other && let Some(number) = announced(&entry.path())? {
                    others.push(number);
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
            let number = name.to_str().and_then(|name| {
                let number = name.strip_prefix(PREFIX)?.parse().ok()?;
                // What is called otherwise, or is beyond all counting, is no generation of a pair's.
                let is_ours = number <= MAX_COUNT && name == generation_name(Generation(number));
                is_ours.then_some(number)
            });
            latest = latest.max(number.unwrap_or(0));
        }
        Ok(Generation(latest))
    }

    /// Reads the directory itself. Absence of a name is what clients of network file systems remember, for a
    /// minute and longer; but opening a directory makes an NFS client ask its server whether it has changed
    /// (close-to-open consistency), and reading it reaches the server of a FUSE file system as well.
    fn winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError> {
        let unreachable = |source| self.unreachable(source);
        let wanted = self.file(generation);
        let mut is_won = false;
        for entry in fs::read_dir(&self.path).map_err(unreachable)? {
            let name = entry.map_err(unreachable)?.file_name();
            is_won |= Some(name.as_os_str()) == wanted.file_name();
        }
        if is_won {
            return Ok(Some(self.known_winner(generation)?.unwrap_or_else(Candidate::unnamed)));
        }
        let is_ours = self.is_ours().map_err(unreachable)?;
        Ok((!is_ours).then(|| Candidate::another_pair(&self.place())))
    }

    fn known_winner(&self, generation: Generation) -> Result<Option<Candidate>, ArbiterError> {
        let unreachable = |source| self.unreachable(source);
        match read_small(&self.file(generation)) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).map_err(|error| unreachable(error.into()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreachable(error)),
        }
    }
}

#[cfg(test)]
#[path = "directory_fuzz.rs"]
mod fuzz;
#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
