//! What one connection to the server may do.

use super::ServedDisk;
use std::fs;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vmft_backup::arbiter::{
    Answer, Arbiter, ArbiterError, Call, Candidate, DirectoryArbiter, PairCall,
};
use vmft_backup::storage;
use vmft_log::entry::{EntrySequence, Generation};
use vmft_nbd::server::{CallRefusal, Opened, Visitor};
use vmft_nbd::wire::{EINVAL, EIO, ENOMEM, ENOSPC, EPERM};
use vmft_vmm::world::{HostCache, Image, Storage};

/// Where the host says which of its lives this is: what its kernel has taken is lost between two.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What a connection has been given, and loses with its end.
#[derive(Debug, Default)]
struct Held {
    arbiter: Option<(Arc<ServedDisk>, DirectoryArbiter)>,
    /// Images opened once more, for the lock on each.
    shares: Vec<Image>,
    /// The export and generation in which it writes.
    writes: Option<(String, u64)>,
}

/// An export that a connection has chosen, and the generation in which it writes.
type Chosen = (Arc<ServedDisk>, Option<u64>);

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    disks: Arc<[Arc<ServedDisk>]>,
    held: Mutex<Held>,
    chosen: OnceLock<Chosen>,
}

fn refused(why: impl ToString) -> CallRefusal {
    CallRefusal::Refused(why.to_string())
}

/// The number by which a client knows the host's error.
fn number(error: &io::Error) -> u32 {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ENOSPC,
        io::ErrorKind::OutOfMemory => ENOMEM,
        _ => EIO,
    }
}

/// Which of its host's lives the server is in.
fn life() -> Result<Answer, CallRefusal> {
    let life = fs::read_to_string(BOOT_ID).map_err(refused)?;
    Ok(Answer::Text(life.trim().to_owned()))
}

impl Connection {
    pub(super) fn new(disks: Arc<[Arc<ServedDisk>]>) -> Self {
        Self { disks, held: Mutex::default(), chosen: OnceLock::new() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Option<&Arc<ServedDisk>> {
        self.disks.iter().find(|disk| disk.config.name == name)
    }

    /// The generation in which this connection writes to the export.
    fn generation(&self, name: &str) -> Option<u64> {
        let held = self.held();
        held.writes.as_ref().filter(|(export, _)| export == name).map(|(_, number)| *number)
    }

    fn writable(&self, name: &str) -> Result<&Arc<ServedDisk>, CallRefusal> {
        let disk = self.find(name).ok_or_else(|| refused("there is no such export"))?;
        if disk.config.read_only {
            return Err(refused("the export is served readonly=on"));
        }
        Ok(disk)
    }

    /// Begins to speak of the pair of an export.
    fn begin(
        &self,
        name: &str,
        open: impl FnOnce(&ServedDisk) -> Result<DirectoryArbiter, ArbiterError>,
    ) -> Result<Answer, CallRefusal> {
        let disk = self.writable(name)?;
        Ok(match open(disk) {
            Ok(arbiter) => {
                self.held().arbiter = Some((Arc::clone(disk), arbiter));
                Answer::Done
            }
            Err(error) => error.into(),
        })
    }

    fn resume(&self, name: &str, pair: &str) -> Result<Answer, CallRefusal> {
        let disk = self.writable(name)?;
        let found = DirectoryArbiter::open(&disk.config.arbiter)
            .and_then(|arbiter| Ok((arbiter.pair_name()?, arbiter)));
        match found {
            Ok((found, arbiter)) if found == pair => {
                self.held().arbiter = Some((Arc::clone(disk), arbiter));
                Ok(Answer::Done)
            }
            Ok(_) | Err(ArbiterError::Absent { .. }) => {
                Err(refused("another pair has the export now"))
            }
            Err(error) => Ok(error.into()),
        }
    }

    fn join(&self, name: &str, first: bool) -> Result<Answer, CallRefusal> {
        let disk = self.find(name).ok_or_else(|| refused("there is no such export"))?;
        // A lock is its own descriptor's. Nothing is read or written by this one.
        let opened = Image::open(&disk.config.path, disk.config.read_only, HostCache::WriteBack);
        let (image, _) = opened.map_err(refused)?;
        let joined = image.join(first).map_err(refused)?;
        if joined {
            self.held().shares.push(image);
        }
        Ok(Answer::Flag(joined))
    }

    /// What tells the export from a copy of it.
    fn identity(&self, name: &str) -> Result<Answer, CallRefusal> {
        let disk = self.find(name).ok_or_else(|| refused("there is no such export"))?;
        // Whether the arbiter is beside it may change.
        let image = storage::image(&disk.config.path, None);
        Ok(Answer::Text(format!("export {name}, {image}")))
    }

    /// From now on the connection writes in this generation.
    fn write_in(&self, name: &str, generation: u64) -> Result<Answer, CallRefusal> {
        let disk = self.writable(name)?;
        let latest = disk.gate.latest();
        if generation != latest || generation == 0 {
            return Err(refused(format!("generation {generation} is over: the last is {latest}")));
        }
        self.held().writes = Some((name.to_owned(), generation));
        life()
    }

    fn of_pair(&self, call: PairCall) -> Result<Answer, CallRefusal> {
        let held = self.held();
        let Some((disk, arbiter)) = &held.arbiter else {
            return Err(refused("it was not said of which pair"));
        };
        let text = |result: Result<String, ArbiterError>| result.map(Answer::Text);
        let answered = match call {
            PairCall::Name => text(arbiter.pair_name()),
            PairCall::Take(fresh) => text(arbiter.pair(&fresh)),
            PairCall::Share(who) => {
                known(&who).and_then(|()| arbiter.share(&who)).map(|()| Answer::Done)
            }
            PairCall::LeaveToken(who) => text(arbiter.leave_token(&who)),
            PairCall::TakeToken(token) => {
                arbiter.take_token(&token);
                Ok(Answer::Done)
            }
            PairCall::Finds(token) => arbiter.finds(&token).map(Answer::Flag),
            PairCall::TryWin(generation, who) => disk.gate.advance(generation, || {
                let win = || arbiter.try_win(Generation(generation), &who);
                let verdict = known(&who).and_then(|()| win());
                (verdict.is_ok(), verdict.map(Answer::from))
            }),
            PairCall::Announce(generation, who, last) => known(&who).and_then(|()| {
                let others = arbiter.announce(Generation(generation), &who, EntrySequence(last))?;
                Ok(Answer::Entries(others.into_iter().map(|entry| entry.0).collect()))
            }),
            PairCall::Latest => arbiter.latest().map(|latest| Answer::Generation(latest.0)),
            PairCall::Winner(generation) => {
                arbiter.winner(Generation(generation)).map(Answer::Winner)
            }
        };
        Ok(answered.unwrap_or_else(Answer::from))
    }

    fn chosen(&self) -> Result<&Chosen, u32> {
        self.chosen.get().ok_or(EINVAL)
    }

    /// Changes what the export holds, if this connection may.
    fn change(
        &self,
        durable: bool,
        change: impl FnOnce(&ServedDisk) -> io::Result<()>,
    ) -> Result<(), u32> {
        let (disk, generation) = self.chosen()?;
        let changed = disk.gate.write(*generation, || {
            change(disk)?;
            if durable { disk.image.flush() } else { Ok(()) }
        });
        changed.map_err(|_| EPERM)?.map_err(|error| number(&error))
    }
}

/// A candidate whose id can be part of a file's name, as it becomes one in the arbiter's directory.
fn known(who: &Candidate) -> Result<(), ArbiterError> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if !who.id.is_empty() && who.id.len() <= 64 && who.id.bytes().all(is_plain) {
        return Ok(());
    }
    let source = io::Error::new(io::ErrorKind::InvalidInput, "a side with an impossible name");
    Err(ArbiterError::Unreachable { place: String::new(), source })
}

impl Visitor for Connection {
    fn names(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.config.name.clone()).collect()
    }

    fn look(&self, name: &str) -> Option<Opened> {
        let disk = self.find(name)?;
        let is_late = self.generation(name).is_none() && disk.gate.latest() > 0;
        let block = u32::try_from(disk.image.unit()).ok()?;
        Some(Opened { size: disk.size, read_only: disk.config.read_only || is_late, block })
    }

    fn open(&self, name: &str) -> Option<Opened> {
        let chosen = (Arc::clone(self.find(name)?), self.generation(name));
        self.chosen.set(chosen).ok()?;
        self.look(name)
    }

    fn call(&self, call: &[u8]) -> Result<Vec<u8>, CallRefusal> {
        let answer = match Call::decode(call).map_err(refused)? {
            Call::Create { export } => {
                self.begin(&export, |disk| DirectoryArbiter::create(&disk.config.arbiter))
            }
            Call::Open { export } => {
                self.begin(&export, |disk| DirectoryArbiter::open(&disk.config.arbiter))
            }
            Call::Resume { export, pair } => self.resume(&export, &pair),
            Call::JoinDisk { export, first } => self.join(&export, first),
            Call::DiskIdentity { export } => self.identity(&export),
            Call::Write { export, generation } => self.write_in(&export, generation),
            Call::Life => life(),
            Call::OfPair(call) => self.of_pair(call),
        };
        answer.map(|answer| answer.encode())
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), u32> {
        let (disk, _) = self.chosen()?;
        disk.image.read(offset, data).map_err(|error| number(&error))
    }

    fn write(&self, offset: u64, data: &[u8], durable: bool) -> Result<(), u32> {
        self.change(durable, |disk| {
            let unit = disk.image.unit();
            let is_whole = (offset | data.len() as u64).is_multiple_of(unit);
            let _alone =
                (!is_whole).then(|| disk.partial.lock().unwrap_or_else(PoisonError::into_inner));
            disk.image.put(offset, data)
        })
    }

    fn flush(&self) -> Result<(), u32> {
        let (disk, _) = self.chosen()?;
        disk.image.flush().map_err(|error| number(&error))
    }

    fn trim(&self, offset: u64, len: u32) -> Result<(), u32> {
        self.write_zeroes(offset, len, false, false)
    }

    fn write_zeroes(&self, offset: u64, len: u32, durable: bool, keep: bool) -> Result<(), u32> {
        self.change(durable, |disk| {
            let _alone = disk.partial.lock().unwrap_or_else(PoisonError::into_inner);
            disk.image.zero(offset, u64::from(len), keep)
        })
    }
}
