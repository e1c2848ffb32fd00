//! A backup's end of a join that brings its disks.

use super::fill::READ_AT_ONCE;
use super::writer::{Change, Writer};
use super::{Mirror, MirrorError, Mirrors};
use crate::identity::nonce;
use crate::mirror::record::CopyState;
use crate::mirror::report::{CopyReport, CopyRole};
use crate::status::StatusBoard;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use vmft_log::checkpoint::SinkRefusal;
use vmft_log::disk_copy::{
    DiskCopyHeader, DiskDigest, DiskDigests, DiskPiece, DisksProgress, MAX_DISK_DIGESTS, MIN_CHUNK,
};
use vmft_sandbox::Task;
use vmft_threads::Mutex;
use vmft_vmm::world::error_text;

/// Digests of one message: so many that few messages are sent, and so few that the primary has something to
/// do soon.
const DIGESTS_AT_ONCE: usize = 256;
const _: () = {
    let more = (READ_AT_ONCE / MIN_CHUNK) as usize;
    assert!(DIGESTS_AT_ONCE + more <= MAX_DISK_DIGESTS, "a message takes them");
};

/// What the threads that look at copies have found.
#[derive(Debug, Default)]
struct Found {
    digests: VecDeque<DiskDigests>,
    looking: usize,
    failure: Option<String>,
    is_over: bool,
}

/// One disk on its way.
#[derive(Debug, Default)]
struct Taking {
    header: Option<DiskCopyHeader>,
    reached: u64,
}

/// Takes the disks of a join.
#[derive(Debug)]
pub(crate) struct Taker {
    mirrors: Arc<Mirrors>,
    pair: String,
    side: String,
    seed: u64,
    /// From the first disk on that begins.
    writer: Option<Arc<Writer>>,
    disks: Vec<Taking>,
    found: Arc<Mutex<Found>>,
    status: Arc<StatusBoard>,
}

impl Taker {
    /// For a side that joins a pair of that name; `None` if it has no copies.
    ///
    /// # Errors
    /// [`MirrorError::Host`]: the host has no random numbers.
    pub(crate) fn begin(
        mirrors: &Arc<Mirrors>,
        pair: &str,
        side: &str,
        status: &Arc<StatusBoard>,
    ) -> Result<Option<Self>, MirrorError> {
        if mirrors.is_empty() {
            return Ok(None);
        }
        // Whatever an earlier session has left to be written is worth nothing now, and must not come later.
        mirrors.forget();
        let random = nonce().map_err(MirrorError::Host)?.0;
        let seed = u64::from_le_bytes(random[..8].try_into().expect("eight bytes"));
        let disks = mirrors.mirrors.iter().map(|_| Taking::default()).collect();
        let (pair, side) = (pair.to_owned(), side.to_owned());
        let (mirrors, status) = (Arc::clone(mirrors), Arc::clone(status));
        let (writer, found) = (None, Arc::default());
        Ok(Some(Self { mirrors, pair, side, seed, writer, disks, found, status }))
    }

    /// Takes a piece. What it changes is done later.
    pub(crate) fn take(&mut self, piece: DiskPiece) -> Result<(), SinkRefusal> {
        match piece {
            DiskPiece::Begin(header) => self.take_header(header),
            DiskPiece::Data { disk, offset, data } => {
                let index = self.place(disk, offset, data.len() as u64)?;
                self.change(index, Change::Write { offset, data });
                Ok(())
            }
            DiskPiece::Zeroes { disk, offset, len } => {
                let index = self.place(disk, offset, len)?;
                self.change(index, Change::Zero { offset, len });
                Ok(())
            }
            DiskPiece::Reached { disk, offset } => {
                let index = self.place(disk, offset, 0)?;
                let taking = &mut self.disks[index];
                if offset < taking.reached {
                    return Err(SinkRefusal(format!("disk {disk} goes back")));
                }
                taking.reached = offset;
                if taking.is_whole() {
                    // Most of it need not be made durable when the guest waits for this side.
                    self.change(index, Change::Settle);
                }
                self.show();
                Ok(())
            }
        }
    }

    /// The mirror whose disk has these bytes, and has begun.
    fn place(&self, disk: u8, offset: u64, len: u64) -> Result<usize, SinkRefusal> {
        let index = self.mirrors.index(disk).filter(|index| self.disks[*index].header.is_some());
        let index = index.ok_or_else(|| SinkRefusal(format!("disk {disk} was not begun")))?;
        let size = self.mirrors.mirrors[index].copy.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(SinkRefusal(format!("disk {disk} has {size} bytes and no more")));
        }
        Ok(index)
    }

    fn take_header(&mut self, header: DiskCopyHeader) -> Result<(), SinkRefusal> {
        let DiskCopyHeader { disk, size, generation, .. } = header;
        let other =
            || SinkRefusal(format!("disk {disk} has no copy here: say mirror=on on both sides"));
        let index = self.mirrors.index(disk).ok_or_else(other)?;
        let mirror = Arc::clone(&self.mirrors.mirrors[index]);
        if self.disks[index].header.is_some() {
            return Err(SinkRefusal(format!("disk {disk} begins twice")));
        }
        if mirror.copy.size() != size {
            let ours = mirror.copy.size();
            return Err(SinkRefusal(format!("disk {disk} has {size} bytes there and {ours} here")));
        }
        mirror.check_fill(&self.pair, header).map_err(SinkRefusal)?;
        let (state, pair, side) = (CopyState::Filling, self.pair.clone(), self.side.clone());
        if self.writer.is_none() {
            let writer = Writer::begin(&self.mirrors.mirrors);
            self.writer = Some(Arc::new(writer.map_err(|error| SinkRefusal(error.to_string()))?));
        }
        // Before anything of it is changed.
        self.change(index, Change::Say { state, generation, pair, side });
        self.disks[index].header = Some(header);
        self.show();
        self.look(mirror, header).map_err(|error| SinkRefusal(error.to_string()))
    }

    /// Begins to look at what a copy holds.
    fn look(&self, mirror: Arc<Mirror>, header: DiskCopyHeader) -> io::Result<()> {
        let (found, seed) = (Arc::clone(&self.found), self.seed);
        found.lock().looking += 1;
        let look = move || {
            let looked = look_at(&mirror, header, seed, &found);
            let mut found = found.lock();
            found.looking -= 1;
            if let Err(error) = looked {
                let path = mirror.copy.path().display();
                found.failure = Some(format!("reading this side's copy {path}: {error}"));
            }
        };
        vmft_sandbox::spawn(Task::Disk, "mirror-look", look).map(drop)
    }

    /// How it gets on.
    pub(crate) fn poll(&self) -> Result<DisksProgress, SinkRefusal> {
        let Some(writer) = &self.writer else { return Ok(DisksProgress::none()) };
        let done = writer.is_done().map_err(|error| SinkRefusal(error_text(&*error)))?;
        let mut found = self.found.lock();
        if let Some(why) = &found.failure {
            return Err(SinkRefusal(why.clone()));
        }
        let digests = found.digests.pop_front();
        let is_settled = done && digests.is_none() && found.looking == 0;
        Ok(DisksProgress { digests, has_room: writer.has_room(), is_settled })
    }

    /// All disks have come whole.
    pub(crate) fn check_whole(&self) -> Result<(), SinkRefusal> {
        match self.disks.iter().position(|taking| !taking.is_whole()) {
            None => Ok(()),
            Some(index) => {
                let disk = self.mirrors.mirrors[index].disk;
                Err(SinkRefusal(format!("disk {disk} did not come: say mirror=on on both sides")))
            }
        }
    }

    fn show(&self) {
        let reports = self.mirrors.mirrors.iter().zip(&self.disks).map(|(mirror, taking)| {
            let size = taking.header.map_or(u64::MAX, |header| header.size);
            CopyReport {
                disk: mirror.disk,
                path: mirror.copy.path().display().to_string().into(),
                role: CopyRole::Filling,
                percent: Some(percent(taking.reached, size)),
            }
        });
        let reports: Vec<_> = reports.collect();
        self.status.update(|status| status.disk_copies = reports);
    }

    /// What goes on writing, the pair and this side's name. Nothing goes on where no disk has come.
    pub(super) fn parts(&self) -> Option<(Arc<Writer>, String, String)> {
        Some((self.writer.clone()?, self.pair.clone(), self.side.clone()))
    }

    fn change(&self, index: usize, change: Change) {
        let writer = self.writer.as_ref().expect("a disk has begun");
        writer.change(index, change);
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        self.found.lock().is_over = true;
    }
}

impl Taking {
    fn is_whole(&self) -> bool {
        self.header.is_some_and(|header| header.size == self.reached)
    }
}

/// Of a hundred.
pub(super) fn percent(done: u64, all: u64) -> u8 {
    let percent = u128::from(done) * 100 / u128::from(all.max(1));
    u8::try_from(percent).expect("a part of it")
}

impl Mirror {
    /// A primary's disk may be copied over it.
    fn check_fill(&self, pair: &str, header: DiskCopyHeader) -> Result<(), String> {
        let path = self.copy.path().display();
        let Some(record) = self.record.get() else {
            let data = if self.is_new { None } else { self.copy.data_from(0).unwrap_or(Some(0)) };
            return match data {
                None => Ok(()),
                Some(_) => Err(format!(
                    "{path} is no copy of this pair, and something is in it, which would be overwritten; move \
                     it away, and say size= to have a new one made"
                )),
            };
        };
        if record.pair != pair {
            return Err(format!(
                "{path} is a copy of another pair ({}), which would be overwritten; name another file",
                record.pair
            ));
        }
        if record.copy == header.copy {
            return Err(format!(
                "{path} is the primary's own copy, or was copied with its record; each side has a file of its \
                 own, on storage of its own"
            ));
        }
        let counts = matches!(record.state, CopyState::Live | CopyState::Stopped);
        if counts && record.generation > header.generation {
            return Err(format!(
                "{path} is of generation {}, and the primary of {}: it may have what the primary has not; \
                 move it away if the primary is to go on",
                record.generation.0, header.generation.0
            ));
        }
        Ok(())
    }
}

/// Digests of all of a copy, as they are found.
fn look_at(
    mirror: &Mirror,
    header: DiskCopyHeader,
    seed: u64,
    found: &Mutex<Found>,
) -> io::Result<()> {
    let DiskCopyHeader { disk, size, chunk, .. } = header;
    let at_once = chunk.max(READ_AT_ONCE);
    let mut data = vec![0; usize::try_from(at_once).expect("a few chunks")];
    let (mut at, mut first, mut digests) = (0, 0, Vec::new());
    while at < size {
        let end = (at + at_once).min(size);
        let data = &mut data[..usize::try_from(end - at).expect("a few chunks")];
        let chunk = usize::try_from(chunk).expect("in memory");
        if mirror.copy.data_from(at)?.is_none_or(|there| there >= end) {
            digests.extend(data.chunks(chunk).map(|_| DiskDigest::ZEROES));
        } else {
            mirror.copy.get(at, data)?;
            digests.extend(data.chunks(chunk).map(|data| DiskDigest::of(data, seed)));
        }
        at = end;
        if digests.len() >= DIGESTS_AT_ONCE || at == size {
            let digests = std::mem::take(&mut digests);
            let count = digests.len() as u64;
            let mut found = found.lock();
            if found.is_over {
                return Ok(());
            }
            found.digests.push_back(DiskDigests { disk, seed, first, digests });
            first += count;
        }
    }
    Ok(())
}
