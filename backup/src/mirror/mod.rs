//! Disks that are not shared: each side of a pair has a copy of its own.
//!
//! ```text
//!   primary                                    backup
//!   guest ─▶ its copy                          replay ─▶ its copy
//!              │  read, what differs, and        ▲  what the log says is completed, in that order;
//!              └─ what is written meanwhile ─────┘  in checkpoint mode with each whole epoch
//!                    (a join)
//! ```
//! A backup's copy has every write that the guest knows to be done, up to where the replay is; what is
//! completed and not flushed is written again at a go-live, and what was on its way is asked for again, as
//! with a shared disk. So a copy is its disk at that point of the guest, and the judge of who goes live, the
//! log and the outputs know nothing of copies.
//!
//! What a copy is worth is in a [`record`] beside it, which is changed before it could become untrue.
//! [`standing`] says on which copies a guest may begin.

mod feed;
mod fill;
pub mod record;
pub mod report;
pub mod standing;
mod take;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use feed::{Feed, Feeding};
pub(crate) use fill::DiskFill;
pub(crate) use take::Taker;

use crate::arbiter::Candidate;
use crate::identity::nonce;
use crate::status::StatusBoard;
use record::{CopyState, RecordError, RecordFile};
use report::{CopyReport, CopyRole};
use standing::{Unfit, may_begin};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmft_log::disk_copy::CopyId;
use vmft_log::entry::Generation;
use vmft_threads::{Mutex, MutexGuard};
use vmft_vmm::board::{DiskOperation, Effect};
use vmft_vmm::devices::virtio::block::completed::CompletedWrite;
use vmft_vmm::world::OwnCopy;
use writer::{Change, Writer};

/// What is wrong with a copy.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// Its record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its storage.
    #[error("this side's copy {} of a disk: {what}", path.display())]
    Failed {
        /// The copy.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No guest begins on it.
    #[error("the guest does not begin on {}: {why}", path.display())]
    Unfit {
        /// The copy.
        path: PathBuf,
        /// Why not.
        why: Unfit,
    },
    /// The host has no random numbers, or no threads left.
    #[error("preparing a disk's copy")]
    Host(#[source] io::Error),
    /// Told already, elsewhere.
    #[error("{0}")]
    Before(Arc<MirrorError>),
}

/// One disk of which this side has a copy.
#[derive(Debug)]
pub struct Mirror {
    disk: u8,
    copy: OwnCopy,
    record: RecordFile,
    id: CopyId,
    /// It was made at the start, of zeroes.
    is_new: bool,
    /// Its operator begins on it, whatever it is worth.
    is_forced: bool,
}

impl Mirror {
    /// The copy of disk number `disk`, with its record. `is_new`: it was just made, of zeroes.
    ///
    /// # Errors
    /// [`MirrorError::Record`], [`MirrorError::Host`].
    pub fn new(
        disk: u8,
        copy: OwnCopy,
        is_new: bool,
        is_forced: bool,
    ) -> Result<Self, MirrorError> {
        let record = RecordFile::open(copy.path())?;
        let known = record.get().map(|record| record.copy);
        let fresh = || nonce().map(|nonce| CopyId(nonce.0)).map_err(MirrorError::Host);
        let id = known.map_or_else(fresh, Ok)?;
        Ok(Self { disk, copy, record, id, is_new, is_forced })
    }

    fn say(
        &self,
        state: CopyState,
        generation: Generation,
        pair: &str,
        side: &str,
    ) -> Result<(), MirrorError> {
        let (pair, side, copy) = (pair.to_owned(), side.to_owned(), self.id);
        Ok(self.record.put(record::Record { state, generation, pair, side, copy })?)
    }
}

/// What is done with the copies now.
#[derive(Debug, Default)]
struct State {
    pair: String,
    side: String,
    /// Of a backup.
    writer: Option<Arc<Writer>>,
}

/// The copies of one side, in the order of their disks.
#[derive(Debug, Default)]
pub struct Mirrors {
    mirrors: Vec<Arc<Mirror>>,
    state: Mutex<State>,
}

impl Mirrors {
    /// These.
    pub fn new(mirrors: Vec<Mirror>) -> Self {
        let mirrors = mirrors.into_iter().map(Arc::new).collect();
        Self { mirrors, state: Mutex::default() }
    }

    /// True on a side whose disks are all shared.
    pub fn is_empty(&self) -> bool {
        self.mirrors.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn index(&self, disk: u8) -> Option<usize> {
        self.mirrors.iter().position(|mirror| mirror.disk == disk)
    }

    fn has(&self, disk: u8) -> bool {
        self.index(disk).is_some()
    }

    /// The guest may begin here, in a pair whose last generation is `latest`.
    ///
    /// # Errors
    /// [`MirrorError::Unfit`], unless the operator has said that it begins all the same.
    pub fn check(
        &self,
        pair: &str,
        latest: Generation,
        winner: Option<&Candidate>,
    ) -> Result<(), MirrorError> {
        for mirror in self.mirrors.iter().filter(|mirror| !mirror.is_forced) {
            may_begin(mirror.record.get().as_ref(), pair, latest, winner)
                .map_err(|why| MirrorError::Unfit { path: mirror.copy.path().to_owned(), why })?;
        }
        Ok(())
    }

    /// This side, of a pair whose last generation is `latest`, is about to win the next one with its copies.
    ///
    /// # Errors
    /// [`MirrorError::Record`].
    pub fn begin_live(
        &self,
        pair: &str,
        latest: Generation,
        who: &Candidate,
    ) -> Result<(), MirrorError> {
        self.say_all(CopyState::Live, latest, pair, &who.id)?;
        let mut state = self.lock();
        (state.pair, state.side) = (pair.to_owned(), who.id.clone());
        Ok(())
    }

    fn say_all(
        &self,
        state: CopyState,
        generation: Generation,
        pair: &str,
        side: &str,
    ) -> Result<(), MirrorError> {
        self.mirrors.iter().try_for_each(|mirror| mirror.say(state, generation, pair, side))
    }

    /// Takes what a join has brought, of a primary of `generation`: from here on this side follows.
    pub(crate) fn follow(&self, taker: &Taker, generation: Generation, status: &StatusBoard) {
        let Some((writer, pair, side)) = taker.parts() else { return };
        for index in 0..self.mirrors.len() {
            let (pair, side) = (pair.clone(), side.clone());
            let state = CopyState::Following;
            writer.change(index, Change::Say { state, generation, pair, side });
        }
        *self.lock() = State { pair, side, writer: Some(writer) };
        self.show(status, CopyRole::Following);
    }

    /// Shows what becomes of the copies.
    pub fn show(&self, status: &StatusBoard, role: CopyRole) {
        let report = |mirror: &Arc<Mirror>| CopyReport {
            disk: mirror.disk,
            path: mirror.copy.path().display().to_string().into(),
            role,
            percent: None,
        };
        let reports: Vec<_> = self.mirrors.iter().map(report).collect();
        status.update(|status| status.disk_copies = reports);
    }

    fn writer(&self) -> Option<Arc<Writer>> {
        self.lock().writer.clone()
    }

    /// The guest knows this to be done. Waits while too much is still to be written.
    fn completed(&self, disk: u8, operation: DiskOperation) {
        let (Some(index), Some(writer)) = (self.index(disk), self.writer()) else { return };
        match operation {
            DiskOperation::Write { offset, data } => {
                writer.change(index, Change::Write { offset, data });
            }
            DiskOperation::Flush => writer.change(index, Change::Settle),
            DiskOperation::Read { .. } => {}
        }
    }

    /// The same, of writes that came with an epoch; `is_flushed`: a flush has covered some.
    pub(crate) fn completed_by_epoch(&self, disk: u8, writes: &[CompletedWrite], is_flushed: bool) {
        for CompletedWrite { offset, data } in writes {
            let data = Vec::clone(data);
            self.completed(disk, DiskOperation::Write { offset: *offset, data });
        }
        if is_flushed {
            self.completed(disk, DiskOperation::Flush);
        }
    }

    /// Why this side can follow nobody any more.
    pub(crate) fn failure(&self) -> Option<MirrorError> {
        self.writer()?.is_done().err().map(MirrorError::Before)
    }

    /// Calls `leave` once when a copy fails.
    pub(crate) fn on_failure(&self, leave: impl FnOnce(&MirrorError) + Send + 'static) {
        if let Some(writer) = self.writer() {
            writer.on_failure(Box::new(leave));
        }
    }

    /// This side has won `generation`, and has replayed what there is: its copies are the guest's disks from
    /// here on.
    ///
    /// # Errors
    /// They are not what they should be.
    pub(crate) fn take_over(&self, generation: Generation) -> Result<(), MirrorError> {
        self.end_with(CopyState::Live, generation)
    }

    /// The guest has ended, in `generation`, and its primary has let out everything: with what was on its way
    /// to the disks, the copies have it too.
    ///
    /// # Errors
    /// They have not.
    pub(crate) fn stop_following(
        &self,
        outstanding: Vec<Effect>,
        generation: Generation,
    ) -> Result<(), MirrorError> {
        for effect in outstanding {
            if let Effect::Disk { disk, operation, .. } = effect {
                self.completed(disk, operation);
            }
        }
        self.end_with(CopyState::Stopped, generation)
    }

    /// Ends the writing of a backup.
    fn end_with(&self, state: CopyState, generation: Generation) -> Result<(), MirrorError> {
        let (writer, pair, side) = {
            let state = self.lock();
            (state.writer.clone(), state.pair.clone(), state.side.clone())
        };
        let Some(writer) = writer else { return Ok(()) };
        for index in 0..self.mirrors.len() {
            let (pair, side) = (pair.clone(), side.clone());
            writer.change(index, Change::Say { state, generation, pair, side });
        }
        writer.wait_done().map_err(MirrorError::Before)?;
        self.lock().writer = None;
        Ok(())
    }

    /// The guest of this live side has ended, in `generation`, and everything is out.
    ///
    /// # Errors
    /// [`MirrorError::Record`].
    pub(crate) fn stopped(&self, generation: Generation) -> Result<(), MirrorError> {
        let (pair, side) = {
            let state = self.lock();
            (state.pair.clone(), state.side.clone())
        };
        self.say_all(CopyState::Stopped, generation, &pair, &side)
    }

    /// The writing of an earlier session is over.
    fn forget(&self) {
        let writer = self.lock().writer.take();
        drop(writer);
    }
}

/// Whether the guest of a pair may begin on the copy at `image`: looked at by whoever decides to begin. `None`
/// for a copy of which nothing is known.
///
/// # Errors
/// The record cannot be read.
pub fn look(image: &Path) -> Result<Option<record::Record>, RecordError> {
    RecordFile::look(image)
}
