//! The console's socket: what readers send to a side, and what a side sends to readers.

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vmft_fuzzing::{cases, damage, peak_of};
use vmft_log::entry::OutputSequence;
use vmft_vmm::world::Mailbox;
use vmft_vmm::world::console::{
    ConsoleHub, ConsoleRecord, ConsoleTarget, EarlyInput, MAX_RECORD, Merger, read_record,
};

/// Cases of a quick run.
const CASES: u64 = 200;
/// How many streams of records there are in a case.
const EACH: usize = 600;
/// Panics of the console's threads: in a test nobody else sees them.
static PANICS: AtomicU64 = AtomicU64::new(0);
/// Readers in a case.
const READERS: usize = 4;

/// A stream of records, as a side sends it.
fn records(lens: &[usize]) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut offset = 0u64;
    for len in lens {
        stream.extend(offset.to_le_bytes());
        stream.extend(u32::try_from(*len).unwrap().to_le_bytes());
        stream.extend(vec![b'x'; *len]);
        offset += *len as u64;
    }
    stream
}

#[test]
fn records_gone_bad_are_read_within_their_limit_and_merged() {
    cases(CASES, |mut random| {
        let good = records(&[3, 0, 70, 1]);
        for _ in 0..EACH {
            let mut bytes = good.clone();
            damage(&mut random, &mut bytes, &[]);
            let mut merger = Merger::new(random.below(80));
            let mut stream = &bytes[..];
            let (_, peak) = peak_of(|| {
                while let Ok(Some(record)) = read_record(&mut stream) {
                    let (end, len) = (merger.end(), record.bytes.len());
                    let merged = merger.add(record);
                    assert!(merged.bytes.len() <= len);
                    assert!(merger.end() >= end, "the stream goes back");
                    let gained = u128::from(merger.end() - end);
                    let added = u128::from(merged.missing) + merged.bytes.len() as u128;
                    assert_eq!(gained, added, "bytes that are neither there nor missing");
                }
            });
            assert!(peak <= 2 * MAX_RECORD + (64 << 10), "{peak} bytes");
        }
    });
}

#[test]
fn a_record_that_ends_beyond_all_offsets_is_refused() {
    let mut bytes = records(&[3]);
    let read = |bytes: &[u8]| read_record(&mut &*bytes).map(|record| record.unwrap().offset);
    assert_eq!(read(&bytes).unwrap(), 0);
    bytes[..8].copy_from_slice(&(u64::MAX - 3).to_le_bytes());
    assert_eq!(read(&bytes).unwrap(), u64::MAX - 3);
    bytes[..8].copy_from_slice(&(u64::MAX - 2).to_le_bytes());
    assert_eq!(read(&bytes).unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn whatever_readers_send_the_console_goes_on_and_gives_each_what_he_asked_for() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let name = std::thread::current().name().map(str::to_owned);
        let is_its = name.is_some_and(|name| name.starts_with("console-"));
        PANICS.fetch_add(u64::from(is_its), Ordering::Relaxed);
        tell(panic);
    }));
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("console");
    let hub = ConsoleHub::open(&ConsoleTarget::Socket(path.clone()), EarlyInput::Dropped).unwrap();
    hub.go_live(Arc::new(Mailbox::default()), None);
    let (mut sequence, mut offset) = (0, 0u64);
    let mut say = |text: &[u8]| {
        sequence += 1;
        hub.write(OutputSequence(sequence), offset, text);
        offset += text.len() as u64;
        offset
    };
    cases(CASES, |mut random| {
        let end = say(b"a line of the guest\n");
        for _ in 0..READERS {
            let mut stream = UnixStream::connect(&path).unwrap();
            let mut hello =
                random.pick(&[0, end - 1, end, end + 1, u64::MAX]).to_le_bytes().to_vec();
            hello.extend(random.bytes(300));
            damage(&mut random, &mut hello, &[]);
            stream.write_all(&hello).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        }
        // One that asks for all that is said from here on gets it, whatever the others have sent.
        let mut reader = UnixStream::connect(&path).unwrap();
        reader.write_all(&end.to_le_bytes()).unwrap();
        say(b"and another\n");
        let record = read_record(&mut reader).unwrap();
        assert_eq!(PANICS.load(Ordering::Relaxed), 0, "a thread of the console has failed");
        assert_eq!(record, Some(ConsoleRecord { offset: end, bytes: b"and another\n".to_vec() }));
    });
}
