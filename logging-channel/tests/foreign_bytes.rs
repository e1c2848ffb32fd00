//! Every parser of bytes that a peer or a file may have, fed with good bytes gone bad: from one seed, with
//! checksums made good again, so that it is the parsers that refuse. They give typed errors, do not
//! panic, and take no more memory than the bytes they were given are worth.

mod common;

use common::{ToyMachine, disk_read, identity, mark};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use vmft_logging_channel::checkpoint::{
    CheckpointHeader, CheckpointPiece, CheckpointReader, CheckpointSink, Page, PageNumber,
    PieceKind, SinkRefusal, WholeCheckpoint,
};
use vmft_logging_channel::codec::EntryBatch;
use vmft_logging_channel::entry::{
    Arrival, Entry, EntrySequence, Generation, OutputSequence, Packet, RequestId, StateDigest,
    StopReason,
};
use vmft_logging_channel::fingerprint::Fingerprint;
use vmft_logging_channel::frame::{Frame, FrameDecoder, HEADER_LEN};
use vmft_logging_channel::handshake::{Hello, HelloConfirm, HelloReply, Nonce, Refusal, Role};
use vmft_logging_channel::log_file::{LogHeader, LogReader, LogWriter};
use vmft_logging_channel::point::ExecutionPoint;
use vmft_logging_channel::session::{
    Acknowledge, DivergenceNotice, GoodbyeReason, Heartbeat, Progress, Reign, SessionId,
};
use vmft_logging_channel::time::MonotonicTime;

/// Counts what each thread has allocated.
struct Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    // A thread that ends has nothing more to count.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now.get())));
    });
}

// SAFETY: all memory is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most memory that was taken at a time by `f`.
fn peak_of<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.get();
    PEAK.set(before);
    let result = f();
    (result, usize::try_from(PEAK.get() - before).expect("a peak is no valley"))
}

/// SplitMix64.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// Something is wrong with these bytes afterwards, most likely.
    fn damage(&mut self, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(7) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 if !bytes.is_empty() => bytes[at] = *self.pick(&[0, 1, 0x7F, 0x80, 0xFF]),
                2 => bytes.truncate(at),
                // The largest integers there are, of all lengths.
                3 => {
                    drop(bytes.splice(at..at, [0xFF].repeat(self.below(10)).into_iter().chain([1])))
                }
                4 => {
                    let end = at + self.below(bytes.len() - at.min(bytes.len()) + 1);
                    let again = bytes[at..end.min(bytes.len())].to_vec();
                    drop(bytes.splice(at..at, again));
                }
                5 => {
                    let other = self.pick(others);
                    let from = self.below(other.len() + 1);
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[from..]);
                }
                _ => bytes.extend((0..self.below(20)).map(|n| (n * 37) as u8)),
            }
        }
    }
}

fn nonce(byte: u8) -> Nonce {
    Nonce([byte; 16])
}

fn entries() -> Vec<Entry> {
    let point = ExecutionPoint::new(700);
    let digest = StateDigest {
        registers: [u64::MAX; 18],
        cpu: 1,
        devices: 2,
        memory: 3,
        places: 4,
        pages: 5,
    };
    let packets = vec![Packet { frame: vec![7; 60], ..Packet::default() }; 3];
    let entropy = Arrival::Entropy { request: RequestId(3), data: vec![9; 16] };
    vec![
        mark(60, 1),
        disk_read(61, 300),
        Entry::Arrival { point, arrival: entropy },
        Entry::Arrival { point, arrival: Arrival::ConsoleInput(b"ls\n".to_vec()) },
        Entry::Arrival { point, arrival: Arrival::Packets(packets) },
        Entry::Released { output: OutputSequence(1) },
        Entry::Progress { point },
        Entry::Digest { point, digest },
        Entry::Exits { point, exits: vec![1; 40] },
        Entry::Flush { point },
        Entry::CheckpointPart { piece: PieceKind::State, bytes: vec![3; 90] },
        Entry::Stop { point, reason: StopReason::Operator },
    ]
}

fn pieces() -> Vec<CheckpointPiece> {
    WholeCheckpoint::new(ToyMachine { next: 0 }).expect("small").collect()
}

/// A log file, whole.
fn log_file() -> Vec<u8> {
    let header = LogHeader { identity: identity(), metadata: BTreeMap::new(), nonce: nonce(5) };
    let mut writer =
        LogWriter::create(Vec::new(), header, ToyMachine { next: 0 }).expect("to memory");
    for entry in entries() {
        writer.push(&entry).expect("to memory");
    }
    writer.finish(GoodbyeReason::Stopped).expect("to memory")
}

/// Good frames of every kind, with the session a reader must expect.
fn golden() -> Vec<(SessionId, Vec<u8>)> {
    let point = ExecutionPoint::new(50);
    let (role, echo) = (Role::Primary, nonce(1));
    let hello = Hello { role: Role::Backup, identity: identity(), nonce: nonce(1) };
    let reply = HelloReply { role, identity: identity(), nonce: nonce(2), echo };
    let mismatch = identity().fingerprint.mismatch(&Fingerprint::new()).expect("a field less");
    let notice = DivergenceNotice {
        window: Some((point, ExecutionPoint::new(60))),
        page: Some(4096),
        text: "divergence".into(),
    };
    let entry = EntrySequence(3);
    let opening = [
        Frame::Hello(hello),
        Frame::HelloReply(reply),
        Frame::Refusal(Refusal::Fingerprint(mismatch)),
        Frame::Refusal(Refusal::NotAccepting("stopped".into())),
    ];
    let session = SessionId::derive(b"a session");
    let heartbeat =
        Heartbeat { number: 1, sent_at: MonotonicTime::from_ns(7), echo: None, last: entry };
    let acknowledge =
        Acknowledge { received: entry, applied: entry, applied_point: point, window: 1 << 20 };
    let later = [
        Frame::HelloConfirm(HelloConfirm { echo: nonce(2) }),
        Frame::Goodbye(GoodbyeReason::Fault("why".into())),
        Frame::Goodbye(GoodbyeReason::Diverged(notice)),
        Frame::Heartbeat(heartbeat),
        Frame::Acknowledge(acknowledge),
        Frame::Reign(Reign { generation: Generation(2) }),
        Frame::Progress(Progress { pieces: 9 }),
    ];
    let seal = |session: SessionId| {
        move |frame: Frame| (session, frame.encode(session).expect("small").seal())
    };
    let opening = opening.into_iter().map(seal(SessionId::HANDSHAKE));
    let later = later.into_iter().chain(pieces().into_iter().map(Frame::Checkpoint));
    opening.chain(later.map(seal(session))).collect()
}

/// The frames of a stream.
fn split(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while let Some(header) = bytes.first_chunk::<HEADER_LEN>() {
        let len = u32::from_le_bytes([header[5], header[6], header[7], 0]) as usize;
        let (frame, rest) = bytes.split_at(HEADER_LEN + len);
        frames.push(frame.to_vec());
        bytes = rest;
    }
    frames
}

/// A frame with this header's kind and session, or another kind, and good checksums.
fn reseal(header: &[u8], kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = header[..HEADER_LEN].to_vec();
    frame[4] = kind;
    frame[5..8].copy_from_slice(&(payload.len() as u32).to_le_bytes()[..3]);
    let check = crc32c::crc32c(&frame[..12]).to_le_bytes();
    frame[12..16].copy_from_slice(&check);
    frame[16..20].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    [&frame, payload].concat()
}

/// Most memory that reading so many bytes may take: the largest thing made of few bytes is an entry.
fn worth(bytes: usize) -> usize {
    (64 << 10) + bytes * 256
}

/// A memory of 200 pages, none of which is kept.
struct NoMemory;

impl CheckpointSink for NoMemory {
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        match header.page_limit.0 {
            0..=200 => Ok(()),
            _ => Err(SinkRefusal("too large".to_owned())),
        }
    }

    fn page(&mut self, number: PageNumber, _: &Page) -> Result<(), SinkRefusal> {
        assert!(number.0 < 200, "checked by the reader");
        Ok(())
    }

    fn read(&self, _: PageNumber, _: &mut Page) -> Result<(), SinkRefusal> {
        Ok(())
    }
}

#[test]
fn damaged_frames_of_every_kind_are_refused_within_their_worth() {
    let mut seeded = Seeded(0xF0E1);
    let log: Vec<_> = split(&log_file());
    let in_log = SessionId::HANDSHAKE;
    let mut golden = golden();
    // The frames of a file bear a session that only its reader can tell: its entries are taken over into
    // the session of the others.
    let (session, like) = golden.last().expect("there are some").clone();
    let entries: Vec<_> = log.iter().filter(|frame| frame[4] == 8).collect();
    assert!(!entries.is_empty());
    golden.extend(entries.iter().map(|frame| (session, reseal(&like, 8, &frame[HEADER_LEN..]))));
    golden.push((in_log, log[0].clone()));
    let payloads: Vec<Vec<u8>> =
        golden.iter().map(|(_, frame)| frame[HEADER_LEN..].to_vec()).collect();
    for (session, frame) in &golden {
        let mut decoder = FrameDecoder::new(*session);
        decoder.feed(frame);
        decoder.next_frame().expect("good").expect("whole");
    }
    let (mut good, mut refused) = (0u32, 0u32);
    for round in 0..40_000 {
        let (session, frame) = seeded.pick(&golden);
        let mut payload = frame[HEADER_LEN..].to_vec();
        seeded.damage(&mut payload, &payloads);
        let kind = if seeded.below(8) == 0 { seeded.below(16) as u8 } else { frame[4] };
        let bytes = reseal(frame, kind, &payload);
        let (result, peak) = peak_of(|| {
            let mut decoder = FrameDecoder::new(*session);
            decoder.feed(&bytes);
            decoder.next_frame().map(|frame| frame.map(|frame| frame.kind()))
        });
        assert!(peak <= worth(bytes.len()), "round {round}: {peak} bytes for {}", bytes.len());
        match result {
            Ok(_) => good += 1,
            Err(error) => {
                refused += 1;
                assert!(error.to_string().len() < 4096);
            }
        }
    }
    assert!(refused > 10_000 && good > 1_000, "{refused} refused, {good} taken");
}

#[test]
fn damaged_streams_of_checkpoints_are_refused_within_their_worth() {
    let mut seeded = Seeded(0xC0DE);
    let pieces = pieces();
    let encoded: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.encode(Vec::new())).collect();
    let total: usize = encoded.iter().map(Vec::len).sum();
    let mut complete = 0;
    for round in 0..3_000 {
        let damaged = seeded.below(pieces.len());
        let (done, peak) = peak_of(|| {
            let mut reader = CheckpointReader::new();
            for (index, (piece, bytes)) in pieces.iter().zip(&encoded).enumerate() {
                let mut bytes = bytes.clone();
                if index == damaged {
                    seeded.damage(&mut bytes, &encoded);
                }
                let Ok(piece) = CheckpointPiece::decode(piece.kind(), &bytes) else { return false };
                match reader.handle_piece(piece, &mut NoMemory) {
                    Ok(None) => {}
                    Ok(Some(_)) => return true,
                    Err(error) => {
                        assert!(!error.to_string().is_empty());
                        return false;
                    }
                }
            }
            false
        });
        assert!(peak <= worth(4 * total), "round {round}: {peak} bytes");
        complete += u32::from(done);
    }
    // Damage may undo itself; that is all there may be.
    assert!(complete < 300, "{complete} complete");
}

#[test]
fn damaged_log_files_are_read_as_far_as_they_are_good_within_their_worth() {
    let mut seeded = Seeded(0x1065);
    let file = log_file();
    let frames = split(&file);
    let payloads: Vec<Vec<u8>> = frames.iter().map(|frame| frame[HEADER_LEN..].to_vec()).collect();
    for round in 0..3_000 {
        let damaged = seeded.below(frames.len());
        let mut bytes = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            let mut payload = payloads[index].clone();
            if index == damaged {
                seeded.damage(&mut payload, &payloads);
            }
            bytes.extend(reseal(frame, frame[4], &payload));
        }
        let (read, peak) = peak_of(|| {
            let mut read = 0;
            let reader = LogReader::open(&bytes[..]).ok()?;
            let (_, mut entries) = reader.read_checkpoint(&mut NoMemory).ok()?;
            while let Ok(Some(_)) = entries.next_entry() {
                read += 1;
            }
            Some(read)
        });
        // A reader has a buffer of its own.
        assert!(peak <= (1 << 20) + worth(bytes.len()), "round {round}: {peak} bytes");
        assert!(read.unwrap_or(0) < 70_000);
    }
}

#[test]
fn an_entry_counted_beyond_all_numbers_is_refused() {
    let costed = |entry| vmft_logging_channel::codec::CostedEntry { entry, cost: 0 };
    let landing = Entry::Landing {
        point: ExecutionPoint::new(9),
        branch: 0x1000.try_into().expect("canonical"),
    };
    for (first, good) in [(1, true), (1 << 62, true), ((1 << 62) + 1, false), (u64::MAX, false)] {
        let batch = EntryBatch {
            first: EntrySequence(first),
            base: ExecutionPoint::new(8),
            entries: vec![costed(landing.clone())],
        };
        let session = SessionId::derive(b"a session");
        let mut decoder = FrameDecoder::new(session);
        decoder.feed(&Frame::Entries(batch).encode(session).expect("small").seal());
        assert_eq!(decoder.next_frame().is_ok(), good, "{first}");
    }
}
