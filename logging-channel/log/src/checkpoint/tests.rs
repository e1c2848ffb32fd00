use super::*;
use crate::entry::EntrySequence;
use crate::point::ExecutionPoint;
use proptest::prelude::*;
use std::collections::BTreeMap;

const LIMIT: PageNumber = PageNumber(512);

/// Random words from a seed.
fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut word = seed | 1;
    move || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word
    }
}

type Memory = BTreeMap<u64, Page>;

/// A machine of 512 pages, some of them zero, some random, some repetitive.
#[derive(Debug, Clone)]
struct ToySource {
    fixed: Vec<u8>,
    state: Vec<u8>,
    pages: Memory,
    next: u64,
}

impl ToySource {
    fn new(seed: u64, state_len: usize) -> Self {
        let mut random = random(seed);
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
        let state = (0..state_len).map(|_| random() as u8).collect();
        Self { fixed: b"kernel".to_vec(), state, pages, next: 0 }
    }

    /// What a sink must hold in the end.
    fn memory(&self) -> Memory {
        nonzero(&self.pages)
    }
}

fn nonzero(pages: &Memory) -> Memory {
    let nonzero = |(_, page): &(&u64, &Page)| **page != [0; PAGE_BYTES];
    pages.iter().filter(nonzero).map(|(number, page)| (*number, *page)).collect()
}

impl PageSource for ToySource {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        let (number, data) = self.pages.range(self.next..).next()?;
        *page = *data;
        self.next = number + 1;
        Some(PageNumber(*number))
    }
}

impl CheckpointSource for ToySource {
    fn position(&self) -> LogPosition {
        LogPosition::start_of_log(ExecutionPoint::new(12))
    }

    fn fixed(&self) -> &[u8] {
        &self.fixed
    }

    fn state(&self) -> &[u8] {
        &self.state
    }

    fn page_limit(&self) -> PageNumber {
        LIMIT
    }
}

#[derive(Debug, Default, Clone)]
struct ToySink {
    memory: Memory,
}

impl CheckpointSink for ToySink {
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        if header.page_limit != LIMIT || header.base != MemoryBase::Zeroes {
            return Err(SinkRefusal("memory of another size".to_owned()));
        }
        Ok(())
    }

    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
        self.memory.insert(number.0, *data);
        Ok(())
    }

    fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal> {
        *data = self.memory.get(&number.0).copied().unwrap_or([0; PAGE_BYTES]);
        Ok(())
    }
}

impl PageBase for ToySink {
    fn page_limit(&self) -> PageNumber {
        LIMIT
    }

    fn has(&self, number: PageNumber) -> bool {
        CheckpointSink::read(self, number, &mut [0; PAGE_BYTES]).is_ok()
    }

    fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal> {
        CheckpointSink::read(self, number, data)
    }
}

/// Pages of one round.
struct Round(std::vec::IntoIter<(u64, Page)>);

impl Round {
    fn of(pages: &Memory) -> Self {
        let pages: Vec<_> = pages.iter().map(|(number, page)| (*number, *page)).collect();
        Self(pages.into_iter())
    }
}

impl PageSource for Round {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        let (number, data) = self.0.next()?;
        *page = data;
        Some(PageNumber(number))
    }
}

/// The pieces of a stream in which each round writes over the last.
fn stream(
    base: MemoryBase,
    encoder: PageEncoder,
    rounds: &[Memory],
) -> (Vec<CheckpointPiece>, PageEncoder) {
    let (mut writer, mut pieces) =
        CheckpointWriter::begin(base, LIMIT, b"kernel", encoder).expect("small");
    for pages in rounds {
        let mut round = Round::of(pages);
        while let Some(piece) = writer.next_pages(&mut round, true) {
            pieces.push(piece);
        }
    }
    let position = LogPosition { entry: EntrySequence(9), point: ExecutionPoint::new(44) };
    let (last, encoder) = writer.finish(position, b"devices").expect("small");
    pieces.extend(last);
    (pieces, encoder)
}

fn whole(source: ToySource) -> Vec<CheckpointPiece> {
    WholeCheckpoint::new(source).expect("a small state").collect()
}

fn read(
    pieces: impl IntoIterator<Item = CheckpointPiece>,
    sink: &mut dyn CheckpointSink,
) -> Result<Option<CompleteCheckpoint>, CheckpointError> {
    let mut reader = CheckpointReader::new();
    let mut complete = None;
    for piece in pieces {
        complete = reader.handle_piece(piece, sink)?;
    }
    Ok(complete)
}

fn packed_bytes(pieces: &[CheckpointPiece]) -> usize {
    pieces.iter().map(|piece| piece.encode(Vec::new()).len()).sum()
}

#[test]
fn state_and_memory_arrive_as_they_were() {
    for state_len in [0, 1, MAX_STATE_CHUNK, MAX_STATE_CHUNK + 1] {
        let source = ToySource::new(7, state_len);
        let mut sink = ToySink::default();
        let complete = read(whole(source.clone()), &mut sink).expect("whole").expect("complete");
        assert_eq!(complete.position, source.position());
        assert_eq!((complete.fixed, complete.state), (source.fixed.clone(), source.state.clone()));
        assert_eq!(complete.pages, source.memory().len() as u64);
        assert_eq!(sink.memory, source.memory());
    }
}

#[test]
fn a_page_sent_again_takes_the_place_of_the_first() {
    let first = ToySource::new(7, 0).pages;
    let mut second: Memory = first.range(..10).map(|(number, page)| (*number, *page)).collect();
    second.values_mut().for_each(|page| page[100] ^= 0x55);
    second.insert(1, [0; PAGE_BYTES]);
    let third: Memory = [(1, [3; PAGE_BYTES]), (2, [0; PAGE_BYTES])].into();
    let (pieces, _) = stream(
        MemoryBase::Zeroes,
        PageEncoder::for_zeroes(1000),
        &[first.clone(), second.clone(), third.clone()],
    );
    let mut sink = ToySink::default();
    read(pieces, &mut sink).expect("whole").expect("complete");
    let mut wanted = first;
    wanted.extend(second);
    wanted.extend(third);
    assert_eq!(nonzero(&sink.memory), nonzero(&wanted));
}

#[test]
fn every_page_is_sent_in_its_shortest_form() {
    let mut noise = [0; PAGE_BYTES];
    let mut random = random(5);
    noise.iter_mut().for_each(|byte| *byte = random() as u8);
    let mut touched = noise;
    touched[7] ^= 1;
    let first: Memory = [(1, noise), (2, [9; PAGE_BYTES]), (3, [0; PAGE_BYTES])].into();
    let second: Memory = [(1, touched), (2, [0; PAGE_BYTES]), (3, [0; PAGE_BYTES])].into();
    let forms = |remembered| {
        let encoder = PageEncoder::for_zeroes(remembered);
        let (pieces, _) = stream(MemoryBase::Zeroes, encoder, &[first.clone(), second.clone()]);
        let forms = pieces.iter().filter_map(|piece| match piece {
            CheckpointPiece::Pages(batch) => Some(batch.pages().map(|(_, form)| form).collect()),
            _ => None,
        });
        (forms.collect::<Vec<Vec<_>>>(), packed_bytes(&pieces))
    };
    use PageEncoding::{Changed, Lz4, Raw, Zero};
    let (with, bytes_with) = forms(10);
    assert_eq!(with, [vec![Raw, Lz4], vec![Changed, Zero]], "what was zero and is, is not sent");
    let (without, bytes_without) = forms(0);
    assert_eq!(without, [vec![Raw, Lz4], vec![Raw, Zero]]);
    assert!(bytes_with + 4000 < bytes_without, "{bytes_with} and {bytes_without}");
}

#[test]
fn a_change_of_a_known_memory_costs_little_and_touches_it_only_when_complete() {
    let first = ToySource::new(7, 0).pages;
    let (pieces, encoder) =
        stream(MemoryBase::Zeroes, PageEncoder::for_zeroes(1000), std::slice::from_ref(&first));
    let mut base = ToySink::default();
    read(pieces, &mut base).expect("whole");
    let before = base.clone();
    let mut changed = first.clone();
    changed.values_mut().for_each(|page| page[5] = page[5].wrapping_add(1));
    let (pieces, _) = stream(MemoryBase::Earlier, encoder, &[changed.clone()]);
    assert!(packed_bytes(&pieces) < changed.len() * 64, "{}", packed_bytes(&pieces));

    for cut in 0..pieces.len() {
        let mut staged = StagedPages::new(base.clone());
        assert_eq!(read(pieces[..cut].to_vec(), &mut staged), Ok(None), "cut after {cut}");
    }
    let mut staged = StagedPages::new(base.clone());
    read(pieces, &mut staged).expect("whole").expect("complete");
    assert_eq!(base.memory, before.memory);
    for (number, page) in staged.pages() {
        base.page(number, page).expect("there is such a page");
    }
    assert_eq!(nonzero(&base.memory), nonzero(&changed));
}

#[test]
fn a_change_over_another_memory_is_found_by_its_digest() {
    let first = ToySource::new(7, 0).pages;
    let (pieces, encoder) =
        stream(MemoryBase::Zeroes, PageEncoder::for_zeroes(1000), std::slice::from_ref(&first));
    let mut base = ToySink::default();
    read(pieces, &mut base).expect("whole");
    let mut changed = first;
    changed.values_mut().for_each(|page| page[5] ^= 1);
    let (pieces, _) = stream(MemoryBase::Earlier, encoder, &[changed]);
    base.memory.get_mut(&103).expect("sent")[9] ^= 1;
    let result = read(pieces, &mut StagedPages::new(base));
    assert!(matches!(result, Err(CheckpointError::Digest { .. })), "{result:?}");
}

#[test]
fn whole_machines_and_changes_are_not_taken_for_each_other() {
    let pages = ToySource::new(7, 0).pages;
    let (change, _) = stream(MemoryBase::Earlier, PageEncoder::for_earlier(0), &[pages]);
    let result = read(change, &mut ToySink::default());
    assert!(matches!(result, Err(CheckpointError::Sink(_))), "{result:?}");
    let result = read(whole(ToySource::new(7, 0)), &mut StagedPages::new(ToySink::default()));
    assert!(matches!(result, Err(CheckpointError::Sink(_))), "{result:?}");
}

#[test]
fn only_the_end_completes_a_checkpoint() {
    let mut cut = whole(ToySource::new(7, 1000));
    cut.pop();
    assert_eq!(read(cut, &mut ToySink::default()), Ok(None));
}

#[test]
fn a_missing_repeated_or_swapped_piece_is_found() {
    let whole = whole(ToySource::new(7, MAX_STATE_CHUNK + 10));
    assert!(whole.len() >= 7, "header, fixed part, pages, two states, end");
    for at in 0..whole.len() {
        let mut missing = whole.clone();
        missing.remove(at);
        let mut repeated = whole.clone();
        repeated.insert(at, whole[at].clone());
        let mut swapped = whole.clone();
        let other = (at + 1) % whole.len();
        swapped.swap(at, other);
        for pieces in [missing, repeated, swapped] {
            let result = read(pieces, &mut ToySink::default());
            assert!(!matches!(result, Ok(Some(_))), "at {at}: {result:?}");
        }
    }
}

#[test]
fn pages_outside_memory_and_pages_without_end_are_refused() {
    let outside = [(LIMIT.0 - 1, [1; PAGE_BYTES])].into();
    let (mut pieces, _) = stream(MemoryBase::Zeroes, PageEncoder::for_zeroes(0), &[outside]);
    let CheckpointPiece::Header(header) = &mut pieces[0] else { panic!("the header is first") };
    let narrow = CheckpointHeader { page_limit: PageNumber(LIMIT.0 - 1), ..*header };
    let mut reader = CheckpointReader::new();
    #[derive(Debug, Default)]
    struct Anything(ToySink);
    impl CheckpointSink for Anything {
        fn begin(&mut self, _: &CheckpointHeader) -> Result<(), SinkRefusal> {
            Ok(())
        }
        fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
            self.0.page(number, data)
        }
        fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal> {
            CheckpointSink::read(&self.0, number, data)
        }
    }
    let mut sink = Anything::default();
    reader.handle_piece(CheckpointPiece::Header(narrow), &mut sink).expect("the header");
    reader.handle_piece(pieces[1].clone(), &mut sink).expect("the fixed part");
    let result = reader.handle_piece(pieces[2].clone(), &mut sink);
    assert_eq!(result, Err(CheckpointError::Page { page: PageNumber(LIMIT.0 - 1) }));

    let one = CheckpointHeader { page_limit: PageNumber(1), fixed_len: 0, ..narrow };
    reader.handle_piece(CheckpointPiece::Header(one), &mut sink).expect("the header");
    let zero = PageBatch::decode(&[1, 0, 0]).expect("one page of zeroes");
    for _ in 0..MAX_PASSES {
        reader.handle_piece(CheckpointPiece::Pages(zero.clone()), &mut sink).expect("again");
    }
    let result = reader.handle_piece(CheckpointPiece::Pages(zero), &mut sink);
    assert!(matches!(result, Err(CheckpointError::Endless { .. })), "{result:?}");
}

#[test]
fn more_state_than_announced_or_allowed_is_refused() {
    let whole = whole(ToySource::new(7, 0));
    let mut sink = ToySink::default();
    let mut reader = CheckpointReader::new();
    reader.handle_piece(whole[0].clone(), &mut sink).expect("the header");
    let long = CheckpointPiece::State(vec![0; 7]);
    let result = reader.handle_piece(long, &mut sink);
    assert_eq!(result, Err(CheckpointError::StateOverrun { limit: 6 }));
    reader.handle_piece(whole[0].clone(), &mut sink).expect("as new");
    reader.handle_piece(whole[1].clone(), &mut sink).expect("the fixed part");
    let chunk = CheckpointPiece::State(vec![0; MAX_STATE_CHUNK]);
    for _ in 0..MAX_STATE / MAX_STATE_CHUNK as u64 {
        reader.handle_piece(chunk.clone(), &mut sink).expect("within the limit");
    }
    let result = reader.handle_piece(chunk, &mut sink);
    assert_eq!(result, Err(CheckpointError::StateOverrun { limit: MAX_STATE }));
}

#[test]
fn after_a_failure_the_reader_takes_a_fresh_checkpoint() {
    let whole = whole(ToySource::new(7, 100));
    let mut reader = CheckpointReader::new();
    let mut sink = ToySink::default();
    reader.handle_piece(whole[0].clone(), &mut sink).expect("the header");
    reader.handle_piece(whole[0].clone(), &mut sink).expect_err("two headers");
    let mut complete = None;
    for piece in whole {
        complete = reader.handle_piece(piece, &mut sink).expect("whole");
    }
    assert!(complete.is_some());
}

#[test]
fn a_zeroed_memory_costs_next_to_nothing() {
    let mut source = ToySource::new(7, 0);
    source.pages.values_mut().for_each(|page| *page = [0; PAGE_BYTES]);
    let bytes = packed_bytes(&whole(source));
    assert!(bytes < 100, "{bytes}");
}

#[test]
fn every_piece_of_a_checkpoint_comes_back_from_its_bytes() {
    for piece in whole(ToySource::new(3, MAX_STATE_CHUNK + 1)) {
        let bytes = piece.encode(Vec::new());
        assert_eq!(CheckpointPiece::decode(piece.kind(), &bytes), Ok(piece));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever bytes are fed as pages: an error or pages, never a panic; and what decodes encodes
    /// to the same bytes.
    #[test]
    fn hostile_pages_are_refused_or_harmless(mut bytes in prop::collection::vec(any::<u8>(), 0..200), count in 0u8..4) {
        if let Some(first) = bytes.first_mut() {
            *first = count;
        }
        if let Ok(piece) = CheckpointPiece::decode(PieceKind::Pages, &bytes) {
            prop_assert_eq!(&piece.encode(Vec::new()), &bytes);
            let mut sink = ToySink::default();
            let mut reader = CheckpointReader::new();
            let header = CheckpointHeader { base: MemoryBase::Zeroes, fixed_len: 0, page_limit: LIMIT };
            reader.handle_piece(CheckpointPiece::Header(header), &mut sink).expect("the header");
            let _ = reader.handle_piece(piece, &mut sink);
        }
    }

    /// A stream with one damaged byte behind good checksums never becomes another checkpoint.
    #[test]
    fn a_damaged_stream_is_never_another_checkpoint(piece in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let pages = ToySource::new(7, 300).pages;
        let (pieces, _) = stream(MemoryBase::Zeroes, PageEncoder::for_zeroes(9), &[pages.clone(), pages]);
        let mut wanted = ToySink::default();
        let complete = read(pieces.clone(), &mut wanted).expect("whole");
        let index = piece.index(pieces.len());
        let mut bytes = pieces[index].encode(Vec::new());
        prop_assume!(!bytes.is_empty());
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(damaged) = CheckpointPiece::decode(pieces[index].kind(), &bytes) {
            let mut sink = ToySink::default();
            let mut all = pieces;
            all[index] = damaged;
            if let Ok(Some(found)) = read(all, &mut sink) {
                // A page may be packed in several ways.
                prop_assert_eq!((Some(found), sink.memory), (complete, wanted.memory));
            }
        }
    }
}
