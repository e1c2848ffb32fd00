//! Writing a log file.

use super::LogHeader;
use crate::frame::{Frame, FrameKind, HEADER_LEN, UnsealedFrame};
use crate::session::{GoodbyeReason, SessionId};
use std::io::{self, Write};
use vmft_log::checkpoint::{CheckpointSource, WholeCheckpoint};
use vmft_log::codec::{BATCH_COST, BatchEncoder, EncodeError, MAX_BATCH_ENTRIES};
use vmft_log::entry::{Entry, EntrySequence};
use vmft_log::point::ExecutionPoint;

/// Why a log could not be written.
#[derive(Debug, thiserror::Error)]
pub enum LogWriteError {
    /// Something does not fit the format; nothing of it was written.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The file would not take it.
    #[error("writing the log")]
    Io(#[from] io::Error),
}

/// Writes a log, entry by entry. Entries are collected into batches, so `out` need not be buffered.
#[derive(Debug)]
pub struct LogWriter<W> {
    out: W,
    session: SessionId,
    batch: Option<BatchEncoder>,
    next: EntrySequence,
    last_point: ExecutionPoint,
    written: u64,
}

impl<W: Write> LogWriter<W> {
    /// Begins a log with its header and the checkpoint it starts from.
    ///
    /// # Errors
    /// [`LogWriteError`].
    pub fn create(
        out: W,
        header: LogHeader,
        source: impl CheckpointSource,
    ) -> Result<Self, LogWriteError> {
        let position = source.position();
        let (last_point, next) = (position.point, EntrySequence(position.entry.0 + 1));
        let session = header.session();
        let mut writer = Self { out, session, batch: None, next, last_point, written: 0 };
        writer.write(Frame::LogHeader(header).encode(SessionId::HANDSHAKE)?)?;
        for piece in WholeCheckpoint::new(source)? {
            writer.write(Frame::Checkpoint(piece).encode(session)?)?;
        }
        Ok(writer)
    }

    fn write(&mut self, frame: UnsealedFrame) -> io::Result<()> {
        let bytes = frame.seal();
        self.out.write_all(&bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Appends an entry and returns its place. It is in the file after [`Self::flush`] at the latest.
    ///
    /// # Errors
    /// [`LogWriteError`]; after [`LogWriteError::Encode`] the log is as before and can go on.
    pub fn push(&mut self, entry: &Entry) -> Result<EntrySequence, LogWriteError> {
        let (next, last_point) = (self.next, self.last_point);
        let batch = self
            .batch
            .get_or_insert_with(|| BatchEncoder::new(vec![0; HEADER_LEN], next, last_point));
        let sequence = batch.push(entry)?;
        let full = batch.cost() >= BATCH_COST || batch.count() == MAX_BATCH_ENTRIES;
        self.last_point = entry.point().unwrap_or(self.last_point);
        self.next.0 += 1;
        if full {
            self.write_batch()?;
        }
        Ok(sequence)
    }

    fn write_batch(&mut self) -> Result<(), LogWriteError> {
        if let Some(batch) = self.batch.take().filter(|batch| batch.count() > 0) {
            let frame = UnsealedFrame::new(FrameKind::Entries, self.session, batch.finish())?;
            self.write(frame)?;
        }
        Ok(())
    }

    /// Writes everything pushed so far.
    ///
    /// # Errors
    /// [`LogWriteError::Io`].
    pub fn flush(&mut self) -> Result<(), LogWriteError> {
        self.write_batch()?;
        Ok(self.out.flush()?)
    }

    /// Bytes in the file so far, without entries still collected.
    pub const fn bytes_written(&self) -> u64 {
        self.written
    }

    /// Ends the log: a reader will know it whole.
    ///
    /// # Errors
    /// [`LogWriteError`].
    pub fn finish(mut self, reason: GoodbyeReason) -> Result<W, LogWriteError> {
        self.write_batch()?;
        let goodbye = Frame::Goodbye(reason.clipped()).encode(self.session)?;
        self.write(goodbye)?;
        self.out.flush()?;
        Ok(self.out)
    }
}
