//! A reader of the console of a pair: attaches to both sides' sockets and merges them by offset.

use super::socket::{ConsoleRecord, read_record};
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// One side's console socket.
#[derive(Debug)]
pub struct ConsoleClient {
    stream: UnixStream,
}

/// What a console client sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleEvent {
    /// Bytes.
    Record(ConsoleRecord),
    /// The side is gone, or its guest is over.
    Closed,
}

impl ConsoleClient {
    /// Attaches to the socket at `path`, to read from offset `from`.
    ///
    /// # Errors
    /// The host's error.
    pub fn attach(path: &Path, from: u64) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        stream.write_all(&from.to_le_bytes())?;
        Ok(Self { stream })
    }

    /// A second handle, to type while another thread reads.
    ///
    /// # Errors
    /// The host's error.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { stream: self.stream.try_clone()? })
    }

    /// The next bytes; waits for them.
    pub fn next_event(&mut self) -> ConsoleEvent {
        match read_record(&mut self.stream) {
            Ok(Some(record)) => ConsoleEvent::Record(record),
            // A side killed in the middle of a record leaves the rest to the survivor.
            Ok(None) | Err(_) => ConsoleEvent::Closed,
        }
    }

    /// Types bytes at the console. A side that is not live drops them.
    ///
    /// # Errors
    /// The host's error.
    pub fn type_in(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }
}

/// Merges records of several sides into one stream.
#[derive(Debug, Default)]
pub struct Merger {
    end: u64,
    repeated: u64,
    missing: u64,
}

/// What a record adds to the stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Merged {
    /// Bytes lost before these: no side had them any more.
    pub missing: u64,
    /// The new bytes.
    pub bytes: Vec<u8>,
}

impl Merger {
    /// A stream read from offset `from` on.
    pub fn new(from: u64) -> Self {
        Self { end: from, repeated: 0, missing: 0 }
    }

    /// Adds a record.
    pub fn add(&mut self, record: ConsoleRecord) -> Merged {
        let missing = record.offset.saturating_sub(self.end);
        let known = usize::try_from(self.end.saturating_sub(record.offset)).unwrap_or(usize::MAX);
        let known = known.min(record.bytes.len());
        self.repeated += known as u64;
        self.missing += missing;
        let bytes = record.bytes[known..].to_vec();
        self.end = self.end.max(record.offset + record.bytes.len() as u64);
        Merged { missing, bytes }
    }

    /// Offset after the last byte of the stream.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Bytes that came more than once, and were dropped.
    pub fn repeated(&self) -> u64 {
        self.repeated
    }

    /// Bytes that never came.
    pub fn missing(&self) -> u64 {
        self.missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::Mailbox;
    use crate::world::console::{ConsoleHub, ConsoleTarget, EarlyInput, Typed};
    use std::sync::Arc;
    use vmft_log::entry::OutputSequence;

    fn read_to(client: &mut ConsoleClient, merger: &mut Merger, end: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while merger.end() < end {
            match client.next_event() {
                ConsoleEvent::Record(record) => bytes.extend(merger.add(record).bytes),
                ConsoleEvent::Closed => break,
            }
        }
        bytes
    }

    #[test]
    fn a_reader_attached_to_the_pair_sees_each_byte_once() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let sides = ["a", "b"].map(|name| dir.path().join(name));
        let hubs = sides.each_ref().map(|path| {
            ConsoleHub::open(&ConsoleTarget::Socket(path.clone()), EarlyInput::Dropped)
                .expect("bound")
        });
        let mut clients =
            sides.each_ref().map(|path| ConsoleClient::attach(path, 0).expect("listening"));
        let mut merger = Merger::default();

        hubs[0].write(OutputSequence(1), 0, b"before ");
        hubs[1].remember(0, b"before the crash");
        assert_eq!(read_to(&mut clients[0], &mut merger, 7), b"before ");
        hubs[1].reveal(16);
        hubs[1].write(OutputSequence(3), 16, b", after it");
        assert_eq!(read_to(&mut clients[1], &mut merger, 26), b"the crash, after it");
        assert_eq!((merger.repeated(), merger.missing()), (7, 0));
    }

    #[test]
    fn only_the_live_side_takes_input() {
        let hub = ConsoleHub::open(&ConsoleTarget::Null, EarlyInput::Dropped).expect("no target");
        assert_eq!(hub.type_in(b"lost"), Typed::NotLive);
        hub.go_live(Arc::new(Mailbox::default()), None);
        assert_eq!(hub.type_in(b"kept"), Typed::All);
        hub.close();
        assert_eq!(hub.type_in(b"late"), Typed::Over);
    }
}
