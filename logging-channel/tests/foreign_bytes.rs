//! Every parser of bytes that a peer or a file may have, fed with good bytes gone bad: from one seed, with
//! checksums made good again, so that it is the parsers that refuse. They give typed errors, do not
//! panic, and take no more memory than the bytes they were given are worth.

mod common;

use common::golden::{golden, log_file, pieces, reseal, split};
use vmft_fuzzing::{Counting, Random, cases, damage, peak_of};
use vmft_log::checkpoint::{
    CheckpointHeader, CheckpointPiece, CheckpointReader, CheckpointSink, Page, PageNumber,
    SinkRefusal,
};
use vmft_log::codec::EntryBatch;
use vmft_log::entry::{Entry, EntrySequence};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::frame::{Frame, FrameDecoder, HEADER_LEN};
use vmft_logging_channel::log_file::LogReader;
use vmft_logging_channel::session::SessionId;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Cases of a quick run; frames of a case, and streams or files.
const CASES: u64 = 200;
const FRAMES: u64 = 200;
const STREAMS: u64 = 15;

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
    let mut one = |random: &mut Random| {
        let (session, frame) = random.pick(&golden);
        let mut payload = frame[HEADER_LEN..].to_vec();
        damage(random, &mut payload, &payloads);
        let kind = if random.below(8) == 0 { random.below(16) as u8 } else { frame[4] };
        let bytes = reseal(frame, kind, &payload);
        let (result, peak) = peak_of(|| {
            let mut decoder = FrameDecoder::new(*session);
            decoder.feed(&bytes);
            decoder.next_frame().map(|frame| frame.map(|frame| frame.kind()))
        });
        assert!(peak <= worth(bytes.len()), "{peak} bytes for {}", bytes.len());
        match result {
            Ok(_) => good += 1,
            Err(error) => {
                refused += 1;
                assert!(error.to_string().len() < 4096);
            }
        }
    };
    cases(CASES, |mut random| (0..FRAMES).for_each(|_| one(&mut random)));
    // Damage does not always hurt.
    assert!(refused > 0 && good > 0, "{refused} refused, {good} taken");
}

#[test]
fn damaged_streams_of_checkpoints_are_refused_within_their_worth() {
    let pieces = pieces();
    let encoded: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.encode(Vec::new())).collect();
    let total: usize = encoded.iter().map(Vec::len).sum();
    let (mut complete, mut all) = (0u64, 0u64);
    let mut one = |random: &mut Random| {
        let damaged = random.index(pieces.len());
        let (done, peak) = peak_of(|| {
            let mut reader = CheckpointReader::new();
            for (index, (piece, bytes)) in pieces.iter().zip(&encoded).enumerate() {
                let mut bytes = bytes.clone();
                if index == damaged {
                    damage(random, &mut bytes, &encoded);
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
        assert!(peak <= worth(4 * total), "{peak} bytes");
        complete += u64::from(done);
        all += 1;
    };
    cases(CASES, |mut random| (0..STREAMS).for_each(|_| one(&mut random)));
    // Damage may undo itself; that is all there may be.
    assert!(complete <= all / 10 + 5, "{complete} of {all} complete");
}

#[test]
fn damaged_log_files_are_read_as_far_as_they_are_good_within_their_worth() {
    let file = log_file();
    let frames = split(&file);
    let payloads: Vec<Vec<u8>> = frames.iter().map(|frame| frame[HEADER_LEN..].to_vec()).collect();
    let one = |random: &mut Random| {
        let damaged = random.index(frames.len());
        let mut bytes = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            let mut payload = payloads[index].clone();
            if index == damaged {
                damage(random, &mut payload, &payloads);
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
        assert!(peak <= (1 << 20) + worth(bytes.len()), "{peak} bytes");
        assert!(read.unwrap_or(0) < 70_000);
    };
    cases(CASES, |mut random| (0..STREAMS).for_each(|_| one(&mut random)));
}

#[test]
fn an_entry_counted_beyond_all_numbers_is_refused() {
    let costed = |entry| vmft_log::codec::CostedEntry { entry, cost: 0 };
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
