//! The serial console's way out: a stream of bytes with absolute offsets.
//!
//! The guest's console is one stream; both sides of a pair count the same bytes. A sink writes
//! each byte at its offset or after the one before it, so a reader who attaches to the pair, or
//! a file written at absolute offsets, has each byte exactly once, whichever side wrote it.

mod client;
mod socket;

pub use client::{ConsoleClient, ConsoleEvent, Merged, Merger};
pub use socket::{ConsoleRecord, MAX_RECORD, read_record};

use super::Mailbox;
use std::collections::VecDeque;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use vmft_logging_channel::entry::OutputSequence;

/// Console bytes kept for readers that attach later.
const HISTORY: usize = 1 << 20;
/// Console bytes kept for a sink that does not take them. Beyond it the oldest are dropped, and
/// the sink is told how many: a stuck terminal must not take the host's memory.
const BACKLOG: usize = 64 << 20;
/// Bytes handed to a sink at a time.
const CHUNK: usize = 64 << 10;

/// How long a side that ends waits for the readers of its console's socket.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Where the console goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// This process's terminal.
    Tty,
    /// Nowhere; the history is still kept.
    Null,
    /// A file, written at absolute offsets.
    File(PathBuf),
    /// A Unix socket that readers attach to.
    Socket(PathBuf),
}

/// Why a console cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file.
    #[error("opening console file {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The socket.
    #[error("listening on console socket {}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// A process listens there already.
    #[error("console socket {} is in use by another process; stop that one, or name another", path.display())]
    InUse {
        /// Its path.
        path: PathBuf,
    },
    /// The host has no threads left.
    #[error("starting the console's thread")]
    Thread(#[source] io::Error),
}

struct Hub {
    history: VecDeque<u8>,
    /// Offset of the first byte of `history`.
    start: u64,
    /// Everything before this offset may be seen.
    visible: u64,
    /// The main sink has everything before this offset.
    written: u64,
    /// End offsets of outputs not yet written by the main sink.
    unwritten: VecDeque<(u64, OutputSequence)>,
    /// `on_out` is being told of what was written.
    reporting: bool,
    has_sink: bool,
    /// Readers of the socket that are still being sent to.
    readers: usize,
    closed: bool,
    input: Option<Arc<Mailbox>>,
    on_out: Option<Arc<dyn Fn(OutputSequence) + Send + Sync>>,
}

impl Hub {
    fn end(&self) -> u64 {
        self.start + self.history.len() as u64
    }

    /// Adds the part of `bytes` that is new.
    fn append(&mut self, offset: u64, bytes: &[u8]) {
        if offset > self.end() {
            // The stream begins in the middle: this side joined a running guest.
            self.history.clear();
            self.start = offset;
        }
        let known = usize::try_from(self.end() - offset).unwrap_or(usize::MAX);
        if let Some(new) = bytes.get(known..) {
            self.history.extend(new);
        }
        let keep_from = if self.has_sink { self.written.min(self.visible) } else { self.visible };
        let wanted = usize::try_from(self.end().saturating_sub(keep_from)).unwrap_or(usize::MAX);
        let limit = wanted.clamp(HISTORY, BACKLOG);
        if self.history.len() > limit {
            let excess = self.history.len() - limit;
            self.history.drain(..excess);
            self.start += excess as u64;
        }
    }

    /// Visible bytes from `from` on, at most [`CHUNK`], with the offset they really begin at.
    fn chunk(&self, from: u64) -> (u64, Vec<u8>) {
        let from = from.max(self.start);
        let end = self.visible.min(self.end());
        if from >= end {
            return (from, Vec::new());
        }
        let skip = usize::try_from(from - self.start).expect("within the history");
        let take = usize::try_from(end - from).expect("within the history").min(CHUNK);
        (from, self.history.iter().skip(skip).take(take).copied().collect())
    }
}

/// The console of one side.
pub struct ConsoleHub {
    hub: Mutex<Hub>,
    changed: Condvar,
}

impl fmt::Debug for ConsoleHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hub = self.lock();
        f.debug_struct("ConsoleHub")
            .field("start", &hub.start)
            .field("visible", &hub.visible)
            .field("end", &hub.end())
            .finish_non_exhaustive()
    }
}

impl ConsoleHub {
    /// Opens the console's target and starts its thread.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open(target: &ConsoleTarget) -> Result<Arc<Self>, ConsoleError> {
        let hub = Arc::new(Self {
            hub: Mutex::new(Hub {
                history: VecDeque::new(),
                start: 0,
                visible: 0,
                written: 0,
                unwritten: VecDeque::new(),
                reporting: false,
                has_sink: matches!(target, ConsoleTarget::Tty | ConsoleTarget::File(_)),
                readers: 0,
                closed: false,
                input: None,
                on_out: None,
            }),
            changed: Condvar::new(),
        });
        match target {
            ConsoleTarget::Null => {}
            ConsoleTarget::Tty => hub.start_sink(Sink::Tty(io::stdout()))?,
            ConsoleTarget::File(path) => hub.start_sink(Sink::File(open_file(path)?))?,
            ConsoleTarget::Socket(path) => socket::listen(path, &hub)?,
        }
        Ok(hub)
    }

    fn lock(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().expect("no holder of the console's lock panics")
    }

    /// This side is live: input goes to `mailbox` from now on, and `on_out` is told which
    /// outputs have been written.
    pub fn go_live(
        &self,
        mailbox: Arc<Mailbox>,
        on_out: Option<Arc<dyn Fn(OutputSequence) + Send + Sync>>,
    ) {
        let mut hub = self.lock();
        hub.input = Some(mailbox);
        hub.on_out = on_out;
    }

    /// Bytes the guest wrote on a replaying side: kept for readers that attach after a go-live,
    /// seen by nobody yet.
    pub fn remember(&self, offset: u64, bytes: &[u8]) {
        let mut hub = self.lock();
        // What was replayed long ago is out already, for all this side knows; so the history
        // may forget it.
        hub.append(offset, bytes);
        if hub.history.len() > HISTORY {
            let excess = hub.history.len() - HISTORY;
            hub.history.drain(..excess);
            hub.start += excess as u64;
        }
    }

    /// Released bytes: they may be seen. What has been seen before is skipped.
    pub fn write(&self, sequence: OutputSequence, offset: u64, bytes: Vec<u8>) {
        let mut hub = self.lock();
        let end = offset + bytes.len() as u64;
        if hub.written < offset && hub.unwritten.is_empty() {
            // The other side has written everything before.
            hub.written = offset;
        }
        hub.append(offset, &bytes);
        hub.visible = hub.visible.max(end);
        let out = if hub.has_sink {
            hub.unwritten.push_back((end, sequence));
            None
        } else {
            hub.written = end;
            hub.on_out.clone()
        };
        drop(hub);
        self.changed.notify_all();
        if let Some(on_out) = out {
            on_out(sequence);
        }
    }

    /// Everything replayed up to `offset` may be seen by readers of the socket: this side is live
    /// and the guest's history is its own.
    pub fn reveal(&self, offset: u64) {
        let mut hub = self.lock();
        hub.visible = hub.visible.max(offset.min(hub.end()));
        drop(hub);
        self.changed.notify_all();
    }

    /// Waits until the main sink has written everything released, and has said so.
    pub fn drain(&self) {
        let mut hub = self.lock();
        while !hub.unwritten.is_empty() || hub.reporting {
            hub = self.changed.wait(hub).expect("no holder of the console's lock panics");
        }
    }

    /// Waits as [`Self::drain`] does, then ends all sinks, and gives readers of the socket
    /// [`LAST_WORDS`] to take what they have not been sent yet.
    pub fn close(&self) {
        self.drain();
        let mut hub = self.lock();
        hub.closed = true;
        self.changed.notify_all();
        // Whether a reader was too slow changes nothing: this side ends either way.
        let _ = self.changed.wait_timeout_while(hub, LAST_WORDS, |hub| hub.readers > 0);
    }

    fn reader_came(&self) {
        self.lock().readers += 1;
    }

    fn reader_went(&self) {
        self.lock().readers -= 1;
        self.changed.notify_all();
    }

    /// Offset after the last byte that may be seen.
    pub fn visible(&self) -> u64 {
        self.lock().visible
    }

    /// Input from a reader: taken if this side is live. Returns how many bytes were.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let input = self.lock().input.clone();
        input.map_or(0, |mailbox| mailbox.push_console_input(bytes))
    }

    /// Waits for visible bytes from `from` on; `None` once the console is closed and all is read.
    fn next_chunk(&self, from: u64) -> Option<(u64, Vec<u8>)> {
        let mut hub = self.lock();
        loop {
            let (offset, bytes) = hub.chunk(from);
            if !bytes.is_empty() {
                return Some((offset, bytes));
            }
            if hub.closed {
                return None;
            }
            hub = self.changed.wait(hub).expect("no holder of the console's lock panics");
        }
    }

    /// Waits for what the main sink must write next.
    fn next_for_sink(&self) -> Option<(u64, u64, Vec<u8>)> {
        let mut hub = self.lock();
        loop {
            let from = hub.written;
            let (offset, bytes) = hub.chunk(from);
            if !hub.unwritten.is_empty() && !bytes.is_empty() {
                return Some((from, offset, bytes));
            }
            if hub.closed {
                return None;
            }
            hub = self.changed.wait(hub).expect("no holder of the console's lock panics");
        }
    }

    /// The main sink has everything before `end`.
    fn sink_wrote(&self, end: u64) {
        let mut hub = self.lock();
        hub.written = hub.written.max(end);
        let mut last = None;
        while hub.unwritten.front().is_some_and(|(output_end, _)| *output_end <= end) {
            last = hub.unwritten.pop_front().map(|(_, sequence)| sequence);
        }
        if let (Some(sequence), Some(on_out)) = (last, hub.on_out.clone()) {
            hub.reporting = true;
            drop(hub);
            on_out(sequence);
            self.lock().reporting = false;
        } else {
            drop(hub);
        }
        self.changed.notify_all();
    }

    fn start_sink(self: &Arc<Self>, mut sink: Sink) -> Result<(), ConsoleError> {
        let hub = Arc::clone(self);
        let run = move || {
            while let Some((wanted, offset, bytes)) = hub.next_for_sink() {
                let end = offset + bytes.len() as u64;
                let result = sink.write(offset, &bytes, offset - wanted);
                if let Err(error) = result {
                    tracing::error!(%error, "the console cannot be written; its output is dropped");
                }
                hub.sink_wrote(end);
            }
        };
        std::thread::Builder::new()
            .name("console".to_owned())
            .spawn(run)
            .map(|_| ())
            .map_err(ConsoleError::Thread)
    }
}

fn open_file(path: &Path) -> Result<File, ConsoleError> {
    let error = |source| ConsoleError::File { path: path.to_owned(), source };
    // What a guest prints is for whoever may see the guest.
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o600);
    options.open(path).map_err(error)
}

#[derive(Debug)]
enum Sink {
    Tty(io::Stdout),
    File(File),
}

impl Sink {
    /// Writes bytes that belong at `offset`; `dropped` bytes before them are lost.
    fn write(&mut self, offset: u64, bytes: &[u8], dropped: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.write_all_at(bytes, offset),
            Self::Tty(stdout) => {
                let mut stdout = stdout.lock();
                if dropped > 0 {
                    write!(stdout, "\r\n[{dropped} console bytes not shown]\r\n")?;
                }
                stdout.write_all(bytes)?;
                stdout.flush()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_written_by_both_sides_has_each_byte_once() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let target = ConsoleTarget::File(dir.path().join("console"));
        let primary = ConsoleHub::open(&target).expect("writable");
        let backup = ConsoleHub::open(&target).expect("writable");
        primary.write(OutputSequence(1), 0, b"one ".to_vec());
        primary.write(OutputSequence(2), 4, b"two ".to_vec());
        primary.close();
        backup.remember(0, b"one two three ");
        // The backup does not know that output 2 is out: it repeats it.
        backup.write(OutputSequence(2), 4, b"two ".to_vec());
        backup.write(OutputSequence(3), 8, b"three ".to_vec());
        backup.close();
        let bytes = std::fs::read(dir.path().join("console")).expect("written");
        assert_eq!(bytes, b"one two three ");
    }

    #[test]
    fn a_closing_console_waits_for_its_readers_to_take_the_last_bytes() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("console");
        let hub = ConsoleHub::open(&ConsoleTarget::Socket(path.clone())).expect("bound");
        let mut client = ConsoleClient::attach(&path, 0).expect("listening");
        hub.write(OutputSequence(1), 0, b"hello".to_vec());
        assert!(matches!(client.next_event(), ConsoleEvent::Record(_)));
        // More than a socket holds: the reader must read for the side to end.
        let len = 8 << 20;
        hub.write(OutputSequence(2), 5, vec![b'x'; len]);
        let read = std::thread::spawn(move || {
            let mut got = 0;
            while let ConsoleEvent::Record(record) = client.next_event() {
                got += record.bytes.len();
            }
            got
        });
        hub.close();
        assert_eq!(hub.lock().readers, 0, "everything is sent when the console is closed");
        assert_eq!(read.join().expect("no panic"), len);
    }

    #[test]
    fn outputs_are_reported_out_only_after_they_are_written() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("console");
        let hub = ConsoleHub::open(&ConsoleTarget::File(path.clone())).expect("writable");
        let out = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&out);
        let report = move |sequence: OutputSequence| {
            let len = std::fs::metadata(&path).expect("exists").len();
            seen.lock().expect("not poisoned").push((sequence.0, len));
        };
        hub.go_live(Arc::new(Mailbox::default()), Some(Arc::new(report)));
        hub.write(OutputSequence(1), 0, b"abc".to_vec());
        hub.write(OutputSequence(2), 3, b"def".to_vec());
        hub.close();
        let out = out.lock().expect("not poisoned");
        let (last, len) = *out.last().expect("reported");
        assert_eq!((last, len), (2, 6));
        assert!(out.iter().all(|(sequence, len)| *len >= sequence * 3));
    }
}
