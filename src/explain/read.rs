//! Event logs, read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use vmft_backup::events::{Event, MAX_LINE, Record, RecordError};
use vmft_log::foreign::ForeignText;

/// Most records of one file: those of years, or of a file that is no event log.
const MAX_RECORDS: usize = 2_000_000;

/// Why an event log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The host's reason.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line is no record.
    #[error("{}, line {line}: {source}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Why.
        #[source]
        source: RecordError,
    },
    /// There is nothing.
    #[error("{}: an empty file; --event-log of a side names one", .0.display())]
    Empty(PathBuf),
    /// There is too much.
    #[error("{}: more than {MAX_RECORDS} records; give a part of it", .0.display())]
    TooMany(PathBuf),
}

/// One process's records.
#[derive(Debug, Default)]
pub struct Life {
    /// The side's name.
    pub side: ForeignText,
    /// Its host's name; nothing where the file's beginning is gone.
    pub host: ForeignText,
    /// Its host's boot.
    pub boot_id: String,
    /// Its process there.
    pub pid: u32,
    /// Its records, each with its line.
    pub records: Vec<(usize, Record)>,
    /// Its last line is cut: it died while it wrote.
    pub is_cut: bool,
}

impl Life {
    /// True if it says which boot it is of.
    pub fn has_boot(&self) -> bool {
        !self.boot_id.is_empty()
    }

    fn begin(record: &Record) -> Self {
        let side = record.side.clone();
        match &record.event {
            Event::Begin { host, boot_id, pid, .. } => {
                let boot_id = boot_id.to_string();
                Self { side, host: host.clone(), boot_id, pid: *pid, ..Self::default() }
            }
            _ => Self { side, ..Self::default() },
        }
    }
}

/// Reads an event log.
///
/// # Errors
/// [`ReadError`]
pub fn read(path: &Path) -> Result<Vec<Life>, ReadError> {
    let file =
        File::open(path).map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
    read_from(BufReader::new(file), path)
}

/// Reads what `file` gives, which messages call `path`.
pub(super) fn read_from(mut file: impl BufRead, path: &Path) -> Result<Vec<Life>, ReadError> {
    let io_error = |source| ReadError::Io { path: path.to_owned(), source };
    let mut lives: Vec<Life> = Vec::new();
    for number in 1.. {
        let mut line = Vec::new();
        let most = MAX_LINE as u64 + 2;
        if file.by_ref().take(most).read_until(b'\n', &mut line).map_err(io_error)? == 0 {
            break;
        }
        if number > MAX_RECORDS {
            return Err(ReadError::TooMany(path.to_owned()));
        }
        let is_whole = line.last() == Some(&b'\n');
        if is_whole {
            line.pop();
        }
        match Record::from_line(&line) {
            Ok(record) => {
                if lives.is_empty() || matches!(record.event, Event::Begin { .. }) {
                    lives.push(Life::begin(&record));
                }
                let life = lives.last_mut().expect("one was just there");
                life.records.push((number, record));
            }
            // The last line of a process that died while it wrote it.
            Err(RecordError::Format(_)) if !is_whole && line.len() <= MAX_LINE => {
                if let Some(life) = lives.last_mut() {
                    life.is_cut = true;
                }
            }
            Err(source) => {
                return Err(ReadError::Line { path: path.to_owned(), line: number, source });
            }
        }
    }
    if lives.is_empty() { Err(ReadError::Empty(path.to_owned())) } else { Ok(lives) }
}
