//! The serial console's way out: a stream of bytes with absolute offsets.
//!
//! The guest's console is one stream; both sides of a pair count the same bytes. A sink writes
//! each byte at its offset or after the one before it, so a reader who attaches to the pair, or
//! a file written at absolute offsets, has each byte exactly once, whichever side wrote it.

mod client;
mod hub;
mod sink;
mod socket;

pub use client::{ConsoleClient, ConsoleEvent, Merged, Merger};
pub use socket::{ConsoleRecord, MAX_RECORD, read_record};

use super::Mailbox;
use crate::outputs::Output;
use hub::{Hub, Input, OnOut};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vmft_log::entry::OutputSequence;
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// Bytes handed to a sink at a time.
const CHUNK: usize = 64 << 10;

/// How long a side that ends waits for readers of its console's socket that take nothing, and for those
/// that do.
const LAST_WORDS: Duration = Duration::from_secs(2);
const LAST_WORDS_ROUNDS: u32 = 5;
/// How long one wait of somebody who types takes before the guest is looked at again.
const INPUT_STEP: Duration = Duration::from_millis(100);

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
    /// Standard output.
    #[error("using standard output as the console")]
    Output(#[source] io::Error),
    /// The host has no threads left.
    #[error("starting the console's thread")]
    Thread(#[source] io::Error),
}

/// What becomes of bytes that are typed before this side runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EarlyInput {
    /// They wait for it: the guest is this side's own.
    Waits,
    /// They are dropped, and whoever types is told: another side runs the guest, and takes what is typed.
    Dropped,
}

/// What became of bytes that were typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Typed {
    /// They are on their way to the guest.
    All,
    /// This side does not run the guest, and drops what is typed here.
    NotLive,
    /// The guest is over.
    Over,
}

/// The console of one side.
pub struct ConsoleHub {
    hub: Mutex<Hub>,
    changed: Condvar,
}

impl fmt::Debug for ConsoleHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConsoleHub").field(&*self.lock()).finish()
    }
}

impl ConsoleHub {
    /// Opens the console's target and starts its thread. `early` says what becomes of input before
    /// [`Self::go_live`].
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open(target: &ConsoleTarget, early: EarlyInput) -> Result<Arc<Self>, ConsoleError> {
        let sink = match target {
            ConsoleTarget::Null | ConsoleTarget::Socket(_) => None,
            ConsoleTarget::Tty => Some(sink::standard_output()?),
            ConsoleTarget::File(path) => Some(sink::file(path)?),
        };
        let hub = Arc::new(Self::new(sink.is_some(), early));
        if let Some(sink) = sink {
            sink::start(&hub, sink)?;
        }
        if let ConsoleTarget::Socket(path) = target {
            socket::listen(path, &hub)?;
        }
        Ok(hub)
    }

    fn new(has_sink: bool, early: EarlyInput) -> Self {
        Self { hub: Mutex::new(Hub::new(has_sink, early)), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock()
    }

    /// This side is live: input goes to `mailbox` from now on, and `on_out` is told which
    /// outputs have been written.
    pub fn go_live(&self, mailbox: Arc<Mailbox>, on_out: Option<OnOut>) {
        let mut hub = self.lock();
        hub.input = Input::Guest(mailbox);
        hub.on_out = on_out;
        drop(hub);
        self.changed.notify_all();
    }

    /// Bytes the guest wrote on a replaying side: kept for readers that attach after a go-live,
    /// seen by nobody yet.
    pub fn remember(&self, offset: u64, bytes: &[u8]) {
        self.lock().remember(offset, bytes);
    }

    /// Released bytes: they may be seen. What has been seen before is skipped.
    pub fn write(&self, sequence: OutputSequence, offset: u64, bytes: &[u8]) {
        let mut hub = self.lock();
        let out = match hub.write(sequence, offset, bytes) {
            true => None,
            false => hub.on_out.clone(),
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
        self.lock().reveal(offset);
        self.changed.notify_all();
    }

    /// Waits until the main sink has written everything released, and has said so, for at most
    /// `limit`; says whether it has.
    pub fn drain(&self, limit: Duration) -> bool {
        let waits = |hub: &mut Hub| !hub.is_drained();
        let (_, waits_on) = self.changed.wait_timeout_while(self.lock(), limit, waits);
        !waits_on
    }

    /// Ends all sinks, with what they have not written, and gives readers of the socket
    /// [`LAST_WORDS`] to take what they have not been sent yet; more, if they take something.
    pub fn close(&self) {
        let mut hub = self.lock();
        hub.is_closed = true;
        self.changed.notify_all();
        for _ in 0..LAST_WORDS_ROUNDS {
            let sent = hub.sent;
            let waits = |hub: &mut Hub| hub.readers > 0;
            (hub, _) = self.changed.wait_timeout_while(hub, LAST_WORDS, waits);
            if hub.readers == 0 || hub.sent == sent {
                break;
            }
        }
        if hub.readers > 0 {
            let readers = hub.readers;
            tracing::warn!(readers, "the console's last bytes were not taken by all its readers");
        }
    }

    /// Released bytes that the main sink has not written, or never took; zero for a console without.
    pub fn undelivered(&self) -> u64 {
        self.lock().undelivered()
    }

    /// Bytes written by the main sink so far: whoever waits sees that it gets on.
    pub fn written(&self) -> u64 {
        self.lock().written
    }

    /// What released bytes that wait for the main sink take of the host's memory.
    pub fn backlog(&self) -> usize {
        self.lock().backlog()
    }

    /// Why the main sink does not take bytes, if it says that it cannot.
    pub fn trouble(&self) -> Option<String> {
        self.lock().trouble.clone()
    }

    /// Released outputs that are not known to be written, in order: whoever is to go on after this
    /// side must have them.
    pub fn unwritten(&self) -> Vec<Output> {
        self.lock().unwritten()
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

    /// Input from a reader. Waits until the guest is there ([`EarlyInput::Waits`]) and has taken enough of
    /// what was typed before: whoever types reads no more of it meanwhile, so nothing is lost.
    pub fn type_in(&self, bytes: &[u8]) -> Typed {
        let mut left = bytes;
        loop {
            let too_early = |hub: &mut Hub| !hub.is_closed && matches!(hub.input, Input::Later);
            let hub = self.changed.wait_while(self.lock(), too_early);
            if hub.is_closed {
                return Typed::Over;
            }
            let Input::Guest(mailbox) = &hub.input else { return Typed::NotLive };
            let mailbox = Arc::clone(mailbox);
            drop(hub);
            left = &left[mailbox.push_console_input(left)..];
            if left.is_empty() {
                return Typed::All;
            }
            mailbox.wait_console_room(INPUT_STEP);
        }
    }

    /// Waits for visible bytes from `from` on; `None` once the console is closed and all is read.
    fn next_chunk(&self, from: u64) -> Option<(u64, Vec<u8>)> {
        let mut hub = self.lock();
        loop {
            let (offset, bytes) = hub.chunk(from);
            if !bytes.is_empty() {
                hub.sent += bytes.len() as u64;
                return Some((offset, bytes));
            }
            if hub.is_closed {
                return None;
            }
            hub = self.changed.wait(hub);
        }
    }

    /// Waits for what the main sink must write next; `None` once the console is closed.
    fn next_for_sink(&self) -> Option<(u64, Vec<u8>)> {
        let mut hub = self.lock();
        loop {
            if hub.is_closed {
                return None;
            }
            if let Some(next) = hub.next_for_sink() {
                return Some(next);
            }
            hub = self.changed.wait(hub);
        }
    }

    /// The main sink has everything before `end`. True if it had failed before.
    fn sink_wrote(&self, end: u64) -> bool {
        let mut hub = self.lock();
        let (out, had_failed) = (hub.sink_wrote(end), hub.trouble.take().is_some());
        self.report(hub, out);
        had_failed
    }

    /// Nobody will ever take what the main sink writes.
    fn sink_is_gone(&self) {
        let mut hub = self.lock();
        let out = hub.sink_is_gone();
        self.report(hub, out);
    }

    /// Says which outputs are out.
    fn report(&self, mut hub: MutexGuard<'_, Hub>, out: Option<OutputSequence>) {
        if let (Some(sequence), Some(on_out)) = (out, hub.on_out.clone()) {
            hub.is_reporting = true;
            drop(hub);
            on_out(sequence);
            self.lock().is_reporting = false;
        } else {
            drop(hub);
        }
        self.changed.notify_all();
    }

    fn sink_failed(&self, why: String) {
        self.lock().trouble = Some(why);
    }

    /// Leaves the sink alone for `time`, unless the console is closed meanwhile.
    fn wait_retry(&self, time: Duration) {
        let waits = |hub: &mut Hub| !hub.is_closed;
        drop(self.changed.wait_timeout_while(self.lock(), time, waits));
    }
}

#[cfg(test)]
mod tests;
