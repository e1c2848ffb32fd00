use super::*;
use crate::fingerprint::Fingerprint;
use crate::session::GoodbyeReason;
use std::collections::BTreeMap;
use vmft_log::checkpoint::{
    CheckpointHeader, CheckpointSink, CheckpointSource, PAGE_BYTES, Page, PageNumber, PageSource,
    SinkRefusal,
};
use vmft_log::entry::{Entry, EntrySequence, Generation, LogPosition, OutputSequence};
use vmft_log::point::ExecutionPoint;

/// A machine of 512 pages, a third of which hold a byte of their own.
#[derive(Debug, Default)]
struct Memory {
    pages: BTreeMap<PageNumber, Page>,
    sent: u64,
}

impl Memory {
    const LIMIT: PageNumber = PageNumber(512);

    fn of_a_machine() -> Self {
        let page = |number| (PageNumber(number), [number as u8 | 1; PAGE_BYTES]);
        Self { pages: (0..512).step_by(3).map(page).collect(), sent: 0 }
    }
}

impl PageSource for Memory {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        let (number, data) = self.pages.range(PageNumber(self.sent)..).next()?;
        *page = *data;
        self.sent = number.0 + 1;
        Some(*number)
    }
}

impl CheckpointSource for Memory {
    fn position(&self) -> LogPosition {
        LogPosition::start_of_log(ExecutionPoint::new(12))
    }

    fn fixed(&self) -> &[u8] {
        b"kernel"
    }

    fn state(&self) -> &[u8] {
        &[7; 300]
    }

    fn page_limit(&self) -> PageNumber {
        Self::LIMIT
    }
}

impl CheckpointSink for Memory {
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        assert_eq!(header.page_limit, Self::LIMIT);
        Ok(())
    }

    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
        self.pages.insert(number, *data);
        Ok(())
    }

    fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal> {
        *data = self.pages.get(&number).copied().unwrap_or([0; PAGE_BYTES]);
        Ok(())
    }
}

fn header(nonce: u8) -> LogHeader {
    LogHeader {
        identity: Identity {
            pair: "demo".parse().expect("a good name"),
            generation: Generation(1),
            fingerprint: Fingerprint::new().with("engine", "soft"),
        },
        metadata: [("guest".into(), "toy".into())].into(),
        nonce: Nonce([nonce; 16]),
    }
}

fn entry(n: u64) -> Entry {
    let point = ExecutionPoint::new(12 + n);
    match n % 2 {
        0 => Entry::Progress { point },
        _ => Entry::OutputMark { point, output: OutputSequence(n) },
    }
}

/// A log of ten frames of three entries each, and where each frame begins.
fn whole_log(nonce: u8) -> (Vec<u8>, Vec<u64>) {
    let mut offsets = Vec::new();
    let source = Memory::of_a_machine();
    let mut writer = LogWriter::create(Vec::new(), header(nonce), source).expect("to memory");
    for n in 1..=30 {
        assert_eq!(writer.push(&entry(n)).expect("to memory"), EntrySequence(n));
        if n % 3 == 0 {
            offsets.push(writer.bytes_written());
            writer.flush().expect("to memory");
        }
    }
    offsets.push(writer.bytes_written());
    (writer.finish(GoodbyeReason::Stopped).expect("to memory"), offsets)
}

/// Reads as far as it goes: entries, and how it ended.
fn read(bytes: &[u8]) -> (Vec<Entry>, Result<GoodbyeReason, LogDamage>) {
    let mut entries = Vec::new();
    let end = LogReader::open(bytes)
        .and_then(|reader| reader.read_checkpoint(&mut Memory::default()))
        .and_then(|(_, mut log)| {
            while let Some((sequence, entry)) = log.next_entry()? {
                entries.push(entry);
                assert_eq!(sequence, EntrySequence(entries.len() as u64));
            }
            Ok(log.goodbye().expect("it has ended").clone())
        });
    (entries, end)
}

fn entries(count: u64) -> Vec<Entry> {
    (1..=count).map(entry).collect()
}

#[test]
fn a_whole_log_is_read_back() {
    let (bytes, _) = whole_log(1);
    let reader = LogReader::open(&bytes[..]).expect("whole");
    assert_eq!(reader.header(), &header(1));
    let mut sink = Memory::default();
    let (checkpoint, _) = reader.read_checkpoint(&mut sink).expect("whole");
    assert_eq!(checkpoint.position.point, ExecutionPoint::new(12));
    assert_eq!(sink.pages, Memory::of_a_machine().pages);
    let (read, end) = read(&bytes);
    assert_eq!(read, entries(30));
    assert_eq!(end.expect("whole"), GoodbyeReason::Stopped);
}

#[test]
fn a_log_cut_anywhere_says_where_and_gives_everything_before() {
    let (bytes, offsets) = whole_log(1);
    let first = usize::try_from(offsets[0]).expect("small");
    for end in (0..bytes.len()).filter(|end| *end >= first - 40 || end % 4001 == 0) {
        let (read, result) = read(&bytes[..end]);
        let damage = result.expect_err("cut");
        let good = offsets.iter().rposition(|offset| *offset <= end as u64);
        match good {
            Some(frame) => {
                let count = frame as u64 * 3;
                assert_eq!(read, entries(count), "cut at {end}");
                assert_eq!(damage.offset, offsets[frame], "cut at {end}");
                assert_eq!(damage.last_entry, EntrySequence(count));
                assert_eq!(damage.last_point, Some(ExecutionPoint::new(12 + count)));
            }
            None => {
                assert!(damage.offset <= end as u64);
                assert_eq!((read.len(), damage.last_point), (0, None));
            }
        }
        assert!(matches!(damage.cause, LogDamageCause::Cut), "cut at {end}: {damage:?}");
    }
}

#[test]
fn a_damaged_byte_is_found_and_everything_before_is_given() {
    let (bytes, offsets) = whole_log(1);
    let first = usize::try_from(offsets[0]).expect("small");
    for at in first..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        let (read, result) = read(&damaged);
        let frame =
            offsets.iter().rposition(|offset| *offset <= at as u64).expect("after the first");
        assert_eq!(read, entries(frame as u64 * 3), "byte {at}");
        assert_eq!(result.expect_err("damaged").offset, offsets[frame], "byte {at}");
    }
}

#[test]
fn a_log_patched_together_from_two_is_refused() {
    let ((bytes, offsets), (other, _)) = (whole_log(1), whole_log(2));
    let middle = usize::try_from(offsets[5]).expect("small");
    let patched = [&bytes[..middle], &other[middle..]].concat();
    let (read, result) = read(&patched);
    assert_eq!(read, entries(15));
    let damage = result.expect_err("patched");
    assert_eq!(damage.offset, offsets[5]);
    let session =
        matches!(damage.cause, LogDamageCause::Frame(crate::frame::FrameError::Session { .. }));
    assert!(session, "{damage:?}");
}

#[test]
fn a_missing_or_repeated_frame_is_found() {
    let (bytes, offsets) = whole_log(1);
    let at = |frame: usize| usize::try_from(offsets[frame]).expect("small");
    let missing = [&bytes[..at(4)], &bytes[at(5)..]].concat();
    let repeated = [&bytes[..at(5)], &bytes[at(4)..]].concat();
    for (patched, good) in [(missing, 4), (repeated, 5)] {
        let (read, result) = read(&patched);
        assert_eq!(read, entries(good as u64 * 3));
        let damage = result.expect_err("out of order");
        assert_eq!(damage.offset, offsets[good]);
        assert!(matches!(damage.cause, LogDamageCause::Order { .. }), "{damage:?}");
    }
}

#[test]
fn a_log_that_goes_on_after_its_end_is_refused() {
    let (mut bytes, _) = whole_log(1);
    bytes.push(b'v');
    let (read, result) = read(&bytes);
    assert_eq!(read, entries(30));
    assert!(matches!(result.expect_err("longer").cause, LogDamageCause::Trailing));
}

#[test]
fn a_file_that_is_no_log_is_refused_by_name() {
    let damage = LogReader::open(&b"\x7FELF and so on"[..]).expect_err("no log");
    assert!(matches!(damage.cause, LogDamageCause::NoLog));
    let damage = LogReader::open(&b""[..]).expect_err("empty");
    assert!(matches!(damage.cause, LogDamageCause::Cut));
}

#[test]
fn damage_is_reported_with_byte_entry_and_point() {
    let (bytes, offsets) = whole_log(1);
    let middle = usize::try_from(offsets[5]).expect("small");
    let (_, result) = read(&bytes[..middle + 3]);
    let text = format!("the log is good up to byte {middle} (entry 15, point 27)");
    assert_eq!(result.expect_err("cut").to_string(), text);
}
