//! A primary's end of a join that brings its disks: it reads its own copies while the guest writes to them.
//!
//! A chunk that the backup has already, by its digest, is not sent. What the guest writes to a place that was
//! read is noted by a tap and sent behind it, all by the one thread that reads: so of any two versions of a
//! sector the later one is sent later.

use super::take::percent;
use super::{Mirror, Mirrors};
use crate::mirror::report::{CopyReport, CopyRole};
use crate::status::StatusBoard;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_log::disk_copy::{DiskCopyHeader, DiskDigest, DiskDigests, DiskPiece, MAX_DISK_PIECE};
use vmft_log::entry::Generation;
use vmft_logging_channel::sender::SendError;
use vmft_logging_channel::transport::TakesDigests;
use vmft_threads::{Condvar, Mutex};
use vmft_vmm::world::{OwnCopy, Tap, TapEnd, TappedWrite};

/// How long a digest is waited for before it is looked what the guest has written meanwhile.
const DIGEST_WAIT: Duration = Duration::from_millis(2);
/// Bytes read at a time: most storage gives them as fast as a few.
pub(super) const READ_AT_ONCE: u64 = 1 << 20;
/// A guest that uses the disk meanwhile gets as much time of it as reading a chunk took, up to this.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// What the backup has said of one of its copies.
#[derive(Debug)]
struct SaidOf {
    disk: u8,
    chunks: u64,
    digests: Vec<DiskDigest>,
}

#[derive(Debug, Default)]
struct SaidState {
    disks: Vec<SaidOf>,
    seed: Option<u64>,
    is_over: bool,
}

/// What the backup has said of its copies.
#[derive(Debug, Default)]
pub(super) struct Said {
    state: Mutex<SaidState>,
    changed: Condvar,
}

impl Said {
    /// From now on it may say what it has of this disk.
    pub(super) fn expect(&self, header: DiskCopyHeader) {
        let chunks = header.size.div_ceil(header.chunk);
        self.state.lock().disks.push(SaidOf { disk: header.disk, chunks, digests: Vec::new() });
    }

    /// The digest of a chunk and its seed, if they come within [`DIGEST_WAIT`].
    fn digest(&self, disk: u8, chunk: u64) -> Result<Option<(DiskDigest, u64)>, String> {
        let find = |state: &SaidState| {
            let said = state.disks.iter().find(|said| said.disk == disk)?;
            let digest = said.digests.get(usize::try_from(chunk).ok()?)?;
            Some((*digest, state.seed?))
        };
        let waits = |state: &mut SaidState| !state.is_over && find(state).is_none();
        let (state, _) = self.changed.wait_timeout_while(self.state.lock(), DIGEST_WAIT, waits);
        match find(&state) {
            None if state.is_over => Err("the backup is gone".to_owned()),
            found => Ok(found),
        }
    }

    fn is_over(&self) -> bool {
        self.state.lock().is_over
    }
}

impl TakesDigests for Said {
    fn take(&self, digests: DiskDigests) -> Result<(), SendError> {
        let mut state = self.state.lock();
        if *state.seed.get_or_insert(digests.seed) != digests.seed {
            return Err(SendError::Digests("have two seeds"));
        }
        let said = state.disks.iter_mut().find(|said| said.disk == digests.disk);
        let said = said.ok_or(SendError::Digests("are of a disk that was not begun"))?;
        if digests.first != said.digests.len() as u64 {
            return Err(SendError::Digests("do not follow each other"));
        }
        if digests.first + digests.digests.len() as u64 > said.chunks {
            return Err(SendError::Digests("are more than the disk has"));
        }
        said.digests.extend(digests.digests);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn end(&self) {
        self.state.lock().is_over = true;
        self.changed.notify_all();
    }
}

/// One disk on its way.
#[derive(Debug)]
struct Sending {
    mirror: Arc<Mirror>,
    header: DiskCopyHeader,
    tap: Tap,
    /// Whether it was begun.
    begun: bool,
    at: u64,
    /// What the backup was told to have, in percent.
    told: u8,
    /// The guest's requests when the last chunk was read.
    requests: u64,
}

/// The disks for a backup that joins.
#[derive(Debug)]
pub(crate) struct DiskFill {
    disks: Vec<Sending>,
    pieces: VecDeque<DiskPiece>,
    said: Arc<Said>,
    status: Arc<StatusBoard>,
    /// Bytes sent.
    sent: u64,
}

impl DiskFill {
    /// Of a live side of `generation`.
    pub(crate) fn begin(
        mirrors: &Mirrors,
        generation: Generation,
        status: &Arc<StatusBoard>,
    ) -> Self {
        let sending = |mirror: &Arc<Mirror>| {
            let (disk, size, copy) = (mirror.disk, mirror.copy.size(), mirror.id);
            let chunk = DiskCopyHeader::chunk_for(size);
            Sending {
                mirror: Arc::clone(mirror),
                header: DiskCopyHeader { disk, size, chunk, generation, copy },
                tap: mirror.copy.tap(),
                begun: false,
                at: 0,
                told: 0,
                requests: mirror.copy.requests(),
            }
        };
        let disks = mirrors.mirrors.iter().map(sending).collect();
        let (pieces, said, status) = (VecDeque::new(), Arc::default(), Arc::clone(status));
        Self { disks, pieces, said, status, sent: 0 }
    }

    /// Who is told what the backup has; nobody where there are no copies.
    pub(crate) fn digests(&self) -> Option<Arc<dyn TakesDigests>> {
        (!self.disks.is_empty()).then(|| Arc::clone(&self.said) as Arc<dyn TakesDigests>)
    }

    /// What ends the noting of writes: to be closed with the machine at rest where the log begins, from where
    /// the backup knows of writes by itself.
    pub(crate) fn ends(&self) -> Vec<TapEnd> {
        self.disks.iter().map(|sending| sending.tap.ending()).collect()
    }

    /// What is said of the first disk.
    #[cfg(test)]
    pub(super) fn header(&self) -> DiskCopyHeader {
        self.disks[0].header
    }

    /// Bytes of disks sent so far.
    pub(crate) const fn sent(&self) -> u64 {
        self.sent
    }

    /// The next piece; `None` if everything was sent that there is now. May wait for the backup, and for the
    /// storage.
    ///
    /// # Errors
    /// Why the join does not go on.
    pub(crate) fn next_piece(&mut self) -> Result<Option<DiskPiece>, String> {
        loop {
            if let Some(piece) = self.pieces.pop_front() {
                if let DiskPiece::Data { data, .. } = &piece {
                    self.sent += data.len() as u64;
                }
                return Ok(Some(piece));
            }
            if self.take_written()? {
                continue;
            }
            let Some(index) = self.disks.iter().position(Sending::is_under_way) else {
                return Ok(None);
            };
            if self.said.is_over() {
                return Err("the backup is gone".to_owned());
            }
            let Self { disks, pieces, said, .. } = self;
            let sending = &mut disks[index];
            let told = sending.told;
            sending.go_on(said, pieces)?;
            if sending.told != told || !sending.is_under_way() {
                self.show();
            }
        }
    }

    /// What the guest has written to places that were read. True if there is some.
    fn take_written(&mut self) -> Result<bool, String> {
        let Self { disks, pieces, .. } = self;
        for sending in disks {
            let written = sending.tap.take().map_err(|overrun| overrun.to_string())?;
            if let Some(TappedWrite { offset, data }) = written {
                put_data(pieces, sending.header.disk, offset, &data);
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn show(&self) {
        if self.disks.is_empty() {
            return;
        }
        let report = |sending: &Sending| CopyReport {
            disk: sending.header.disk,
            path: sending.mirror.copy.path().display().to_string().into(),
            role: if sending.is_under_way() { CopyRole::Sending } else { CopyRole::Live },
            percent: sending.is_under_way().then_some(sending.told),
        };
        let reports: Vec<_> = self.disks.iter().map(report).collect();
        self.status.update(|status| status.disk_copies = reports);
    }
}

impl Drop for DiskFill {
    fn drop(&mut self) {
        for sending in &mut self.disks {
            sending.at = sending.header.size;
        }
        self.show();
    }
}

fn put_data(pieces: &mut VecDeque<DiskPiece>, disk: u8, mut offset: u64, data: &[u8]) {
    for part in data.chunks(MAX_DISK_PIECE) {
        pieces.push_back(DiskPiece::Data { disk, offset, data: part.to_vec() });
        offset += part.len() as u64;
    }
}

impl Sending {
    fn is_under_way(&self) -> bool {
        !self.begun || self.at < self.header.size
    }

    fn copy(&self) -> &OwnCopy {
        &self.mirror.copy
    }

    /// Begins, or does the next chunks, if their digests are known.
    fn go_on(&mut self, said: &Said, pieces: &mut VecDeque<DiskPiece>) -> Result<(), String> {
        if !std::mem::replace(&mut self.begun, true) {
            said.expect(self.header);
            pieces.push_back(DiskPiece::Begin(self.header));
            return Ok(());
        }
        let DiskCopyHeader { disk, size, chunk, .. } = self.header;
        let (at, end) = (self.at, self.at.saturating_add(chunk.max(READ_AT_ONCE)).min(size));
        // The last one is said last.
        if said.digest(disk, (end - 1) / chunk)?.is_none() {
            return Ok(());
        }
        let began = Instant::now();
        // Before it is read: what is written from here on is sent behind all of it.
        self.tap.reach(end);
        let data = self
            .read(at, end)
            .map_err(|error| format!("reading disk {}: {error}", self.copy().path().display()))?;
        let mut start = at;
        while start < end {
            let stop = (start + chunk).min(end);
            let (digest, seed) = said.digest(disk, start / chunk)?.expect("said before the last");
            let data = data.as_ref().map(|data| {
                let place = |offset: u64| usize::try_from(offset - at).expect("in memory");
                &data[place(start)..place(stop)]
            });
            let ours = data.map_or(DiskDigest::ZEROES, |data| DiskDigest::of(data, seed));
            match data {
                _ if ours == digest => {}
                Some(data) if ours != DiskDigest::ZEROES => put_data(pieces, disk, start, data),
                _ => {
                    let (offset, len) = (start, stop - start);
                    pieces.push_back(DiskPiece::Zeroes { disk, offset, len });
                }
            }
            start = stop;
        }
        self.at = end;
        let done = percent(end, size);
        if done > self.told || end == size {
            self.told = done;
            pieces.push_back(DiskPiece::Reached { disk, offset: end });
        }
        self.make_way(began.elapsed());
        Ok(())
    }

    /// What is there; `None` for a hole.
    fn read(&self, at: u64, end: u64) -> io::Result<Option<Vec<u8>>> {
        // Asked each time: the guest may write into a hole at any moment.
        if self.copy().data_from(at)?.is_none_or(|data| data >= end) {
            return Ok(None);
        }
        let mut data = vec![0; usize::try_from(end - at).expect("a few chunks")];
        self.copy().get(at, &mut data)?;
        Ok(Some(data))
    }

    /// A guest that uses the disk has its share of it.
    fn make_way(&mut self, took: Duration) {
        let requests = self.copy().requests();
        if requests != std::mem::replace(&mut self.requests, requests) {
            std::thread::sleep(took.min(LONGEST_PAUSE));
        }
    }
}
