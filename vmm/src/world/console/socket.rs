//! The console socket: readers attach, each from an offset of its own.
//!
//! A reader first sends the offset it wants to read from (8 bytes, little-endian); what it sends
//! after that is console input. It receives records: offset (8 bytes), length (4 bytes), bytes.
//! Only the live side sends records and takes input. A reader that is slow is not waited for: what it misses
//! it can tell by the offsets. One that types more than the guest takes is made to wait, as its socket is not
//! read meanwhile.

use super::{CHUNK, ConsoleError, ConsoleHub, Typed};
use crate::world::Repeats;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vmft_sandbox::{Task, bind_private_socket};

/// How long a host that cannot take a reader is left alone before the next one is tried.
const AFTER_ERROR: Duration = Duration::from_millis(100);

/// Most bytes in one record.
pub const MAX_RECORD: usize = CHUNK;

/// Console bytes and where they belong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleRecord {
    /// Offset of the first byte.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Reads one record; `None` at the end of the stream.
///
/// # Errors
/// The stream's error, or `InvalidData` for a record longer than [`MAX_RECORD`], or beyond all offsets.
pub fn read_record(stream: &mut impl Read) -> io::Result<Option<ConsoleRecord>> {
    let mut header = [0; 12];
    match stream.read_exact(&mut header) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let (offset, len) = header.split_at(8);
    let offset = u64::from_le_bytes(offset.try_into().expect("8 bytes"));
    let len = u32::from_le_bytes(len.try_into().expect("4 bytes"));
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > MAX_RECORD || offset.checked_add(len as u64).is_none() {
        let message = format!("console record of {len} bytes at offset {offset}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok(Some(ConsoleRecord { offset, bytes }))
}

fn write_record(stream: &mut impl Write, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let len = u32::try_from(bytes.len()).expect("at most a chunk");
    let mut record = Vec::with_capacity(12 + bytes.len());
    record.extend_from_slice(&offset.to_le_bytes());
    record.extend_from_slice(&len.to_le_bytes());
    record.extend_from_slice(bytes);
    stream.write_all(&record)
}

/// Listens on `path` and serves readers, each on two threads of its own.
pub(super) fn listen(path: &Path, hub: &Arc<ConsoleHub>) -> Result<(), ConsoleError> {
    let listener = bind_private_socket(path).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ConsoleError::InUse { path: path.to_owned() },
        _ => ConsoleError::Socket { path: path.to_owned(), source },
    })?;
    let hub = Arc::clone(hub);
    let accept = move || {
        let repeats = Repeats::new();
        for stream in listener.incoming() {
            let served = stream.and_then(|stream| serve(stream, &hub));
            if let Err(error) = served {
                if let Some(times) = repeats.note(&error.to_string()) {
                    tracing::warn!("a console reader could not be served: {error}{times}");
                }
                hub.wait_retry(AFTER_ERROR);
            }
        }
    };
    let thread = vmft_sandbox::spawn(Task::Console, "console-socket", accept);
    thread.map(drop).map_err(ConsoleError::Thread)
}

fn serve(stream: UnixStream, hub: &Arc<ConsoleHub>) -> io::Result<()> {
    let mut input = stream.try_clone()?;
    let hub = Arc::clone(hub);
    let run = move || {
        let mut from = [0; 8];
        if input.read_exact(&mut from).is_err() {
            return;
        }
        let output_hub = Arc::clone(&hub);
        let mut output = stream;
        let from = u64::from_le_bytes(from);
        let send = move || {
            let mut next = from;
            while let Some((offset, bytes)) = output_hub.next_chunk(next) {
                if write_record(&mut output, offset, &bytes).is_err() {
                    break;
                }
                next = offset + bytes.len() as u64;
            }
            // The guest is over: the reader sees the end of the stream.
            let _ = output.shutdown(std::net::Shutdown::Both);
            output_hub.reader_went();
        };
        hub.reader_came();
        if let Err(error) = vmft_sandbox::spawn(Task::Console, "console-reader", send) {
            tracing::warn!(%error, "a console reader could not be served");
            hub.reader_went();
            return;
        }
        let mut bytes = [0; 1024];
        while let Ok(len @ 1..) = input.read(&mut bytes) {
            // A side that is not live drops it: whoever types, types at both.
            if hub.type_in(&bytes[..len]) == Typed::Over {
                break;
            }
        }
    };
    vmft_sandbox::spawn(Task::Console, "console-writer", run).map(drop)
}
