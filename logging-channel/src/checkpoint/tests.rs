use super::*;
use crate::frame::FrameDecoder;
use crate::session::SessionId;
use std::collections::BTreeMap;

/// A machine of 64 pages, some of them zero, some random, some repetitive.
#[derive(Debug, Clone)]
pub(crate) struct ToySource {
    state: Vec<u8>,
    pages: BTreeMap<u64, Page>,
    next: u64,
}

impl ToySource {
    pub(crate) fn new(seed: u64, state_len: usize) -> Self {
        let mut word = seed | 1;
        let mut random = move || {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            word
        };
        let mut pages = BTreeMap::new();
        for number in [0, 1, 2, 9, 10, 40, 63].into_iter().chain(100..300) {
            let mut page = [0; PAGE_BYTES];
            match number % 3 {
                0 => page.fill(number as u8 | 1),
                1 => page.iter_mut().for_each(|byte| *byte = random() as u8),
                _ => {}
            }
            pages.insert(number, page);
        }
        Self { state: (0..state_len).map(|_| random() as u8).collect(), pages, next: 0 }
    }

    /// What a sink must hold in the end.
    pub(crate) fn memory(&self) -> BTreeMap<u64, Page> {
        let nonzero = |(_, page): &(&u64, &Page)| **page != [0; PAGE_BYTES];
        self.pages.iter().filter(nonzero).map(|(number, page)| (*number, *page)).collect()
    }
}

impl CheckpointSource for ToySource {
    fn point(&self) -> ExecutionPoint {
        ExecutionPoint::new(12)
    }

    fn state(&self) -> &[u8] {
        &self.state
    }

    fn page_limit(&self) -> PageNumber {
        PageNumber(512)
    }

    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        let (number, data) = self.pages.range(self.next..).next()?;
        *page = *data;
        self.next = number + 1;
        Some(PageNumber(*number))
    }
}

#[derive(Debug, Default)]
pub(crate) struct ToySink {
    pub(crate) memory: BTreeMap<u64, Page>,
}

impl CheckpointSink for ToySink {
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        if header.page_limit != PageNumber(512) {
            return Err(SinkRefusal("memory of another size".to_owned()));
        }
        Ok(())
    }

    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
        self.memory.insert(number.0, *data);
        Ok(())
    }
}

fn frames(source: ToySource) -> Vec<Frame> {
    let mut writer = CheckpointWriter::new(source).expect("a small state");
    std::iter::from_fn(|| writer.next_frame()).collect()
}

fn read(
    frames: impl IntoIterator<Item = Frame>,
    sink: &mut ToySink,
) -> Result<Option<CompleteCheckpoint>, CheckpointError> {
    let mut reader = CheckpointReader::new();
    let mut complete = None;
    for frame in frames {
        complete = reader.handle_frame(frame, sink)?;
    }
    Ok(complete)
}

#[test]
fn state_and_memory_arrive_as_they_were() {
    for state_len in [0, 1, MAX_STATE_CHUNK, MAX_STATE_CHUNK + 1] {
        let source = ToySource::new(7, state_len);
        let mut sink = ToySink::default();
        let complete = read(frames(source.clone()), &mut sink).expect("whole").expect("complete");
        assert_eq!(complete.point, source.point());
        assert_eq!(complete.state, source.state);
        assert_eq!(complete.pages, source.memory().len() as u64);
        assert_eq!(sink.memory, source.memory());
    }
}

#[test]
fn only_the_end_completes_a_checkpoint() {
    let mut cut = frames(ToySource::new(7, 1000));
    cut.pop();
    assert_eq!(read(cut, &mut ToySink::default()), Ok(None));
}

#[test]
fn a_missing_repeated_or_swapped_frame_is_found() {
    let whole = frames(ToySource::new(7, MAX_STATE_CHUNK + 10));
    assert!(whole.len() >= 6, "header, two states, pages, end");
    for at in 0..whole.len() {
        let mut missing = whole.clone();
        missing.remove(at);
        let mut repeated = whole.clone();
        repeated.insert(at, whole[at].clone());
        let mut swapped = whole.clone();
        let other = (at + 1) % whole.len();
        swapped.swap(at, other);
        for frames in [missing, repeated, swapped] {
            let result = read(frames, &mut ToySink::default());
            assert!(!matches!(result, Ok(Some(_))), "at {at}: {result:?}");
        }
    }
}

#[test]
fn damaged_pages_behind_a_good_checksum_are_found_by_the_digest() {
    let mut whole = frames(ToySource::new(7, 10));
    for frame in &mut whole {
        if let Frame::CheckpointPages(batch) = frame {
            let raw = batch.unpack().expect("whole");
            let mut damaged = raw;
            damaged[5] ^= 1;
            *batch = PageBatch::new(batch.runs.clone(), &damaged);
            break;
        }
    }
    let result = read(whole, &mut ToySink::default());
    assert!(matches!(result, Err(CheckpointError::Digest { .. })), "{result:?}");
}

#[test]
fn pages_outside_memory_are_refused() {
    let mut whole = frames(ToySource::new(7, 0));
    let Frame::CheckpointHeader(header) = &mut whole[0] else { panic!("the header is first") };
    header.page_limit = PageNumber(512);
    let outside = PageBatch::new(vec![PageRun { first: PageNumber(512), count: 1 }], &[1; 4096]);
    whole[1] = Frame::CheckpointPages(outside);
    let result = read(whole, &mut ToySink::default());
    assert_eq!(result, Err(CheckpointError::Page { page: PageNumber(512) }));
}

#[test]
fn a_sink_of_another_size_refuses() {
    let mut whole = frames(ToySource::new(7, 0));
    let Frame::CheckpointHeader(header) = &mut whole[0] else { panic!("the header is first") };
    header.page_limit = PageNumber(1024);
    let result = read(whole, &mut ToySink::default());
    assert!(matches!(result, Err(CheckpointError::Sink(_))), "{result:?}");
}

#[test]
fn after_a_failure_the_reader_takes_a_fresh_checkpoint() {
    let whole = frames(ToySource::new(7, 100));
    let mut reader = CheckpointReader::new();
    let mut sink = ToySink::default();
    reader.handle_frame(whole[0].clone(), &mut sink).expect("the header");
    reader.handle_frame(whole[0].clone(), &mut sink).expect_err("two headers");
    let mut complete = None;
    for frame in whole {
        complete = reader.handle_frame(frame, &mut sink).expect("whole");
    }
    assert!(complete.is_some());
}

#[test]
fn a_zeroed_memory_costs_next_to_nothing() {
    let mut source = ToySource::new(7, 0);
    source.pages.values_mut().for_each(|page| *page = [0; PAGE_BYTES]);
    let bytes: usize = frames(source)
        .iter()
        .map(|frame| frame.encode(SessionId::HANDSHAKE).expect("small").len())
        .sum();
    assert!(bytes < 100, "{bytes}");
}

#[test]
fn every_frame_of_a_checkpoint_comes_back_from_its_bytes() {
    let session = SessionId::derive(b"test");
    let mut decoder = FrameDecoder::new(session);
    for frame in frames(ToySource::new(3, MAX_STATE_CHUNK + 1)) {
        decoder.feed(&frame.encode(session).expect("within the limits").seal());
        assert_eq!(decoder.next_frame(), Ok(Some(frame)));
    }
}
