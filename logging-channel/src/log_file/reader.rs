//! Reading a log file, as far as it is good.

use super::LogHeader;
use crate::frame::{Frame, FrameDecoder, FrameError, FrameKind};
use crate::session::{GoodbyeReason, SessionId};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;
use vmft_log::checkpoint::{CheckpointError, CheckpointReader, CheckpointSink, CompleteCheckpoint};
use vmft_log::codec::{CostedEntry, EntryBatch};
use vmft_log::entry::{Entry, EntrySequence};
use vmft_log::point::ExecutionPoint;

/// Bytes read from the file at a time.
const READ_BYTES: usize = 256 << 10;

/// Where and why a log stops being good. Everything before has been delivered.
#[derive(Debug, Clone)]
pub struct LogDamage {
    /// The first byte of the file that is no good.
    pub offset: u64,
    /// The last good entry; 0 if there is none.
    pub last_entry: EntrySequence,
    /// The last point known to be good: of the entries, or of the checkpoint.
    pub last_point: Option<ExecutionPoint>,
    /// What is wrong there.
    pub cause: LogDamageCause,
}

impl fmt::Display for LogDamage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the log is good up to byte {}", self.offset)?;
        match self.last_point {
            Some(point) => write!(f, " (entry {}, point {point})", self.last_entry.0),
            None => write!(f, " (before its checkpoint is complete)"),
        }
    }
}

impl std::error::Error for LogDamage {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// What is wrong with a log.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogDamageCause {
    /// The file ends, and its last frame is no goodbye or is incomplete.
    #[error("the file is cut")]
    Cut,
    /// The file does not begin as a log.
    #[error("the file is no log")]
    NoLog,
    /// A frame is damaged or of another log.
    #[error(transparent)]
    Frame(FrameError),
    /// The checkpoint is no good.
    #[error(transparent)]
    Checkpoint(CheckpointError),
    /// A frame that has no place there.
    #[error("{0} frame out of place")]
    Unexpected(FrameKind),
    /// Entries are missing, repeated or out of order.
    #[error("entry {} at point {point} follows", found.0)]
    Order {
        /// The entry that follows.
        found: EntrySequence,
        /// The point its batch begins at.
        point: ExecutionPoint,
    },
    /// There is more after the goodbye.
    #[error("the file goes on after its end")]
    Trailing,
    /// The file could not be read.
    #[error("reading the log")]
    Io(#[source] Arc<io::Error>),
}

#[derive(Debug)]
struct Frames<R> {
    input: R,
    decoder: FrameDecoder,
    chunk: Vec<u8>,
    /// Where the frame returned last begins.
    frame_offset: u64,
}

impl<R: Read> Frames<R> {
    /// The next frame; `None` where the file ends between two frames.
    fn next(&mut self) -> Result<Option<Frame>, LogDamageCause> {
        self.frame_offset = self.decoder.offset();
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(LogDamageCause::Frame)? {
                return Ok(Some(frame));
            }
            match self.input.read(&mut self.chunk) {
                Ok(0) if self.decoder.pending() == 0 => return Ok(None),
                Ok(0) => return Err(LogDamageCause::Cut),
                Ok(len) => self.decoder.feed(&self.chunk[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LogDamageCause::Io(Arc::new(error))),
            }
        }
    }

    fn next_or_cut(&mut self) -> Result<Frame, LogDamageCause> {
        self.next()?.ok_or(LogDamageCause::Cut)
    }

    const fn damage(&self, cause: LogDamageCause) -> LogDamage {
        let offset = self.frame_offset;
        LogDamage { offset, last_entry: EntrySequence(0), last_point: None, cause }
    }
}

/// A log whose header has been read.
#[derive(Debug)]
pub struct LogReader<R> {
    frames: Frames<R>,
    header: LogHeader,
}

impl<R: Read> LogReader<R> {
    /// Reads the header. `input` need not be buffered.
    ///
    /// # Errors
    /// [`LogDamage`] if there is none.
    pub fn open(input: R) -> Result<Self, LogDamage> {
        let mut frames = Frames {
            input,
            decoder: FrameDecoder::new(SessionId::HANDSHAKE),
            chunk: vec![0; READ_BYTES],
            frame_offset: 0,
        };
        match frames.next_or_cut() {
            Ok(Frame::LogHeader(header)) => {
                frames.decoder.set_session(header.session());
                Ok(Self { frames, header })
            }
            Ok(other) => Err(frames.damage(LogDamageCause::Unexpected(other.kind()))),
            Err(LogDamageCause::Frame(FrameError::Magic { .. })) => {
                Err(frames.damage(LogDamageCause::NoLog))
            }
            Err(cause) => Err(frames.damage(cause)),
        }
    }

    /// Whose log it is.
    pub const fn header(&self) -> &LogHeader {
        &self.header
    }

    /// Reads the checkpoint the log starts from; its memory goes to `sink`.
    ///
    /// # Errors
    /// [`LogDamage`]; what the sink holds is then worthless.
    pub fn read_checkpoint(
        mut self,
        sink: &mut dyn CheckpointSink,
    ) -> Result<(CompleteCheckpoint, LogEntries<R>), LogDamage> {
        let mut reader = CheckpointReader::new();
        loop {
            let frame = self.frames.next_or_cut();
            let step = frame.and_then(|frame| match frame {
                Frame::Checkpoint(piece) => {
                    reader.handle_piece(piece, sink).map_err(LogDamageCause::Checkpoint)
                }
                other => Err(LogDamageCause::Unexpected(other.kind())),
            });
            match step {
                Ok(None) => {}
                Ok(Some(checkpoint)) => {
                    let entries = LogEntries {
                        frames: self.frames,
                        queue: VecDeque::new(),
                        delivered: checkpoint.position.entry,
                        received: checkpoint.position.entry,
                        last_point: checkpoint.position.point,
                        end: None,
                    };
                    return Ok((checkpoint, entries));
                }
                Err(cause) => return Err(self.frames.damage(cause)),
            }
        }
    }
}

/// The entries of a log, in order.
#[derive(Debug)]
pub struct LogEntries<R> {
    frames: Frames<R>,
    queue: VecDeque<CostedEntry>,
    delivered: EntrySequence,
    received: EntrySequence,
    last_point: ExecutionPoint,
    end: Option<Result<GoodbyeReason, LogDamage>>,
}

impl<R: Read> LogEntries<R> {
    /// The next entry; `None` at the end of a whole log.
    ///
    /// # Errors
    /// [`LogDamage`] after the last good entry, from then on always the same.
    pub fn next_entry(&mut self) -> Result<Option<(EntrySequence, Entry)>, LogDamage> {
        loop {
            if let Some(costed) = self.queue.pop_front() {
                self.delivered.0 += 1;
                return Ok(Some((self.delivered, costed.entry)));
            }
            match &self.end {
                Some(Ok(_)) => return Ok(None),
                Some(Err(damage)) => return Err(damage.clone()),
                None => {
                    if let Err(cause) = self.read_frame() {
                        self.end = Some(Err(LogDamage {
                            last_entry: self.received,
                            last_point: Some(self.last_point),
                            ..self.frames.damage(cause)
                        }));
                    }
                }
            }
        }
    }

    /// How the log ended, once [`Self::next_entry`] has said that it has.
    pub const fn goodbye(&self) -> Option<&GoodbyeReason> {
        match &self.end {
            Some(Ok(reason)) => Some(reason),
            _ => None,
        }
    }

    fn read_frame(&mut self) -> Result<(), LogDamageCause> {
        match self.frames.next_or_cut()? {
            Frame::Entries(batch) => self.take_batch(batch),
            Frame::Goodbye(reason) => {
                if !matches!(self.frames.next(), Ok(None)) {
                    return Err(LogDamageCause::Trailing);
                }
                self.end = Some(Ok(reason));
                Ok(())
            }
            other => Err(LogDamageCause::Unexpected(other.kind())),
        }
    }

    fn take_batch(&mut self, batch: EntryBatch) -> Result<(), LogDamageCause> {
        if batch.first.0 != self.received.0 + 1 || batch.base != self.last_point {
            return Err(LogDamageCause::Order { found: batch.first, point: batch.base });
        }
        self.received = batch.last();
        self.last_point = batch.last_point();
        self.queue = batch.entries.into();
        Ok(())
    }
}
