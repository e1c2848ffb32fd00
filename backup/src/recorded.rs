//! Recording to a file, and replaying from one.

use crate::checkpoint::{MachineCheckpoint, MachineSink};
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use vmft_log::entry::{Entry, EntrySequence};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::log_file::{LogDamage, LogEntries, LogHeader, LogReader, LogWriter};
use vmft_logging_channel::session::GoodbyeReason;
use vmft_threads::{Mutex, MutexGuard};
use vmft_vmm::inputs::{LogEnd, LogSink, LogSource};
use vmft_vmm::machine::{Machine, StateError};

/// A log file being written.
#[derive(Debug, Clone)]
pub struct FileLog {
    writer: Arc<Mutex<Option<LogWriter<File>>>>,
}

impl FileLog {
    /// Begins a log with the machine's state.
    ///
    /// # Errors
    /// The file's error.
    pub fn create(file: File, header: LogHeader, machine: &mut Machine) -> io::Result<Self> {
        let writer = LogWriter::create(file, header, MachineCheckpoint::take(machine))
            .map_err(io::Error::other)?;
        Ok(Self { writer: Arc::new(Mutex::new(Some(writer))) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<LogWriter<File>>> {
        self.writer.lock()
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.lock().as_ref().map_or(0, LogWriter::bytes_written)
    }

    /// Ends the log: a reader will know it whole.
    ///
    /// # Errors
    /// The file's error.
    pub fn finish(&self) -> io::Result<()> {
        let writer = self.lock().take();
        if let Some(writer) = writer {
            let file = writer.finish(GoodbyeReason::Stopped).map_err(io::Error::other)?;
            file.sync_all()?;
        }
        Ok(())
    }
}

impl LogSink for FileLog {
    fn append(&mut self, entry: &Entry) -> io::Result<Option<EntrySequence>> {
        let mut writer = self.lock();
        let writer = writer.as_mut().ok_or_else(|| io::Error::other("the log is finished"))?;
        writer.push(entry).map(Some).map_err(io::Error::other)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.lock().as_mut() {
            Some(writer) => writer.flush().map_err(io::Error::other),
            None => Ok(()),
        }
    }

    fn hold_back(&mut self) -> bool {
        true
    }

    fn wants_checkpoint(&mut self) -> bool {
        false
    }

    fn is_far_behind(&self) -> bool {
        false
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// Why a log file cannot be replayed at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenLogError {
    /// Its header or its checkpoint is damaged.
    #[error(transparent)]
    Damage(#[from] LogDamage),
    /// Its checkpoint makes no machine of this program.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A log file being read.
#[derive(Debug)]
pub struct RecordedLog<R> {
    entries: LogEntries<R>,
    entries_read: u64,
    end: Option<Result<(), LogDamage>>,
    /// Entries beyond this point are left unread.
    until: ExecutionPoint,
}

impl<R: Read> RecordedLog<R> {
    /// Reads the header and the checkpoint: the machine to replay on, and the log that follows.
    ///
    /// # Errors
    /// See [`OpenLogError`].
    pub fn open(
        input: R,
        until: ExecutionPoint,
    ) -> Result<(LogHeader, Machine, Self), OpenLogError> {
        let reader = LogReader::open(input)?;
        let header = reader.header().clone();
        let mut sink = MachineSink::within(vmft_cpu::memory::MAX_MEMORY);
        let (checkpoint, entries) = reader.read_checkpoint(&mut sink)?;
        let machine = sink.into_machine(&checkpoint)?;
        Ok((header, machine, Self { entries, entries_read: 0, end: None, until }))
    }

    /// Entries read so far.
    pub fn entries_read(&self) -> u64 {
        self.entries_read
    }

    /// Reads on to the end, past what a machine that has stopped asks for: a log that is cut after
    /// its last entry is cut all the same.
    pub fn read_to_end(&mut self)
    where
        R: Send + std::fmt::Debug,
    {
        while self.next(ExecutionPoint::NEVER).is_ok() {}
    }

    /// Where the log stops being good, once that has been reached.
    pub fn damage(&self) -> Option<&LogDamage> {
        self.end.as_ref().and_then(|end| end.as_ref().err())
    }
}

impl<R: Read + Send + std::fmt::Debug> LogSource for RecordedLog<R> {
    fn next(&mut self, _: ExecutionPoint) -> Result<Entry, LogEnd> {
        if self.end.is_some() {
            return Err(LogEnd::Ended);
        }
        match self.entries.next_entry() {
            Ok(Some((_, entry))) if entry.point().is_some_and(|point| point > self.until) => {
                self.end = Some(Ok(()));
                Err(LogEnd::Ended)
            }
            Ok(Some((_, entry))) => {
                self.entries_read += 1;
                Ok(entry)
            }
            Ok(None) => {
                self.end = Some(Ok(()));
                Err(LogEnd::Ended)
            }
            Err(damage) => {
                self.end = Some(Err(damage));
                Err(LogEnd::Ended)
            }
        }
    }

    fn skip_to_checkpoint(&mut self, _: &dyn Fn(&[u8]) -> bool) -> Option<Vec<Entry>> {
        None
    }
}
