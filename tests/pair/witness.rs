//! Reads one side's console alone, and remembers every byte with its offset.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmft_vmm::world::console::{ConsoleClient, ConsoleEvent};

#[derive(Debug, Default)]
struct Seen {
    /// Offset of the first byte.
    start: u64,
    bytes: Vec<u8>,
    /// What was wrong with the records, if anything was.
    broken: Option<String>,
}

/// What one side has shown.
#[derive(Debug)]
pub struct Witness {
    seen: Arc<Mutex<Seen>>,
    reader: Option<JoinHandle<()>>,
}

/// How long a side may take to open its console.
const ATTACH_LIMIT: Duration = Duration::from_secs(60);

impl Witness {
    /// Reads the console at `socket` from its beginning until it is closed.
    pub fn attach(socket: &Path) -> Self {
        let deadline = Instant::now() + ATTACH_LIMIT;
        let mut client = loop {
            match ConsoleClient::attach(socket, 0) {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", socket.display()),
            }
            std::thread::yield_now();
        };
        let seen = Arc::new(Mutex::new(Seen::default()));
        let mine = Arc::clone(&seen);
        let read = move || {
            while let ConsoleEvent::Record(record) = client.next_event() {
                let mut seen = mine.lock().unwrap();
                if seen.bytes.is_empty() {
                    seen.start = record.offset;
                }
                let end = seen.start + seen.bytes.len() as u64;
                if record.offset != end {
                    let offset = record.offset;
                    seen.broken = Some(format!("a record at {offset} came after {end}"));
                    return;
                }
                seen.bytes.extend(record.bytes);
            }
        };
        Self { seen, reader: Some(std::thread::spawn(read)) }
    }

    /// Offset after the last byte seen so far.
    pub fn end(&self) -> u64 {
        let seen = self.seen.lock().unwrap();
        seen.start + seen.bytes.len() as u64
    }

    /// Waits until the side has closed its console; then every byte it has shown must be the one
    /// that `whole`, which begins at offset `start`, has there. The offset after its last byte, if
    /// it showed any.
    pub fn agrees_with(&mut self, whole: &[u8], start: u64, side: &str) -> Option<u64> {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        let seen = self.seen.lock().unwrap();
        assert_eq!(seen.broken, None, "the {side}'s console has gaps");
        if seen.bytes.is_empty() {
            return None;
        }
        assert!(seen.start >= start, "the {side} shows bytes from before the pair");
        let from = usize::try_from(seen.start - start).unwrap();
        let expected = whole.get(from..).unwrap_or_default();
        let shared = expected.len().min(seen.bytes.len());
        if let Some(at) = (0..shared).find(|&at| expected[at] != seen.bytes[at]) {
            panic!(
                "the {side} shows {:?} at offset {}, the pair {:?}",
                String::from_utf8_lossy(&seen.bytes[at..seen.bytes.len().min(at + 80)]),
                seen.start + at as u64,
                String::from_utf8_lossy(&expected[at..expected.len().min(at + 80)]),
            );
        }
        assert!(
            seen.bytes.len() <= expected.len(),
            "the {side} shows bytes that are not the pair's: {:?}",
            String::from_utf8_lossy(&seen.bytes[shared..]),
        );
        Some(seen.start + seen.bytes.len() as u64)
    }
}
