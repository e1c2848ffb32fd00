//! The sender's end of a checkpoint stream.

use super::{
    CheckpointHeader, CheckpointPiece, Digester, MAX_STATE, MAX_STATE_CHUNK, MemoryBase, Page,
    PageBatch, PageEncoder, PageNumber, ZERO_PAGE,
};
use crate::codec::EncodeError;
use crate::entry::LogPosition;
use std::collections::VecDeque;

/// Pages of memory, in ascending order.
pub trait PageSource {
    /// Copies the next page and returns its number; `None` after the last. Pages that cannot have
    /// changed may be left out.
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber>;
}

/// A machine at rest, to be written whole.
pub trait CheckpointSource: PageSource {
    /// Where the guest is, and where the log goes on.
    fn position(&self) -> LogPosition;
    /// The part of the state that never changes.
    fn fixed(&self) -> &[u8];
    /// The rest of the state, without memory.
    fn state(&self) -> &[u8];
    /// The first page number that the memory lies wholly below.
    fn page_limit(&self) -> PageNumber;
}

/// Turns a machine's state into pieces of a stream. It is told of pages as often as they change,
/// and of the state at the end.
#[derive(Debug)]
pub struct CheckpointWriter {
    header: CheckpointHeader,
    digester: Digester,
    encoder: PageEncoder,
}

impl CheckpointWriter {
    /// Begins a stream: the pieces are to be sent first. `encoder` is fresh for a stream over
    /// [`MemoryBase::Zeroes`], and for one over [`MemoryBase::Earlier`] the one that sent what was
    /// earlier, or fresh.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`] if the fixed part is larger than [`MAX_STATE`].
    pub fn begin(
        base: MemoryBase,
        page_limit: PageNumber,
        fixed: &[u8],
        encoder: PageEncoder,
    ) -> Result<(Self, Vec<CheckpointPiece>), EncodeError> {
        check_state(fixed.len())?;
        let header = CheckpointHeader { base, fixed_len: fixed.len() as u64, page_limit };
        let mut digester = Digester::new(&header);
        let mut pieces = vec![CheckpointPiece::Header(header)];
        pieces.extend(chunks(fixed, &mut digester));
        Ok((Self { header, digester, encoder }, pieces))
    }

    /// The next piece with pages of `source`; `None` when all were sent. With `remember`, the
    /// encoder keeps them, so that they cost less when they change again.
    ///
    /// # Panics
    /// If the source's pages are out of order or beyond the limit.
    pub fn next_pages(
        &mut self,
        source: &mut (impl PageSource + ?Sized),
        remember: bool,
    ) -> Option<CheckpointPiece> {
        let mut batch = PageBatch::default();
        let mut page = ZERO_PAGE;
        let mut last = None;
        while !batch.is_full() {
            let Some(number) = source.next_page(&mut page) else { break };
            assert!(last < Some(number), "checkpoint pages come in ascending order");
            assert!(number < self.header.page_limit, "checkpoint pages lie in memory");
            last = Some(number);
            if self.encoder.add(&mut batch, number, &page, remember) {
                self.digester.page(number, &page);
            }
        }
        (batch.len() > 0).then_some(CheckpointPiece::Pages(batch))
    }

    /// Pages sent so far.
    pub const fn pages(&self) -> u64 {
        self.digester.pages
    }

    /// The last pieces: the state and the end. The encoder comes back, for the next stream over what
    /// this one has sent.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`] if the state is larger than [`MAX_STATE`].
    pub fn finish(
        mut self,
        position: LogPosition,
        state: &[u8],
    ) -> Result<(Vec<CheckpointPiece>, PageEncoder), EncodeError> {
        check_state(state.len())?;
        let mut pieces: Vec<_> = chunks(state, &mut self.digester).collect();
        let end = self.digester.end(position, state.len() as u64);
        pieces.push(CheckpointPiece::End(end));
        Ok((pieces, self.encoder))
    }
}

fn check_state(len: usize) -> Result<(), EncodeError> {
    let limit = MAX_STATE as usize;
    if len > limit {
        return Err(EncodeError::TooLarge { what: "machine state", len, limit });
    }
    Ok(())
}

fn chunks<'a>(
    state: &'a [u8],
    digester: &'a mut Digester,
) -> impl Iterator<Item = CheckpointPiece> + 'a {
    state.chunks(MAX_STATE_CHUNK).map(|chunk| {
        digester.state(chunk);
        CheckpointPiece::State(chunk.to_vec())
    })
}

/// The whole stream of a machine at rest, piece by piece.
#[derive(Debug)]
pub struct WholeCheckpoint<S> {
    source: S,
    writer: Option<CheckpointWriter>,
    pieces: VecDeque<CheckpointPiece>,
}

impl<S: CheckpointSource> WholeCheckpoint<S> {
    /// The stream from its beginning.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`] for a state beyond the limit.
    pub fn new(source: S) -> Result<Self, EncodeError> {
        check_state(source.state().len())?;
        let (limit, encoder) = (source.page_limit(), PageEncoder::for_zeroes(0));
        let (writer, first) =
            CheckpointWriter::begin(MemoryBase::Zeroes, limit, source.fixed(), encoder)?;
        Ok(Self { source, writer: Some(writer), pieces: first.into() })
    }
}

impl<S: CheckpointSource> Iterator for WholeCheckpoint<S> {
    type Item = CheckpointPiece;

    fn next(&mut self) -> Option<CheckpointPiece> {
        if let Some(piece) = self.pieces.pop_front() {
            return Some(piece);
        }
        let mut writer = self.writer.take()?;
        if let Some(piece) = writer.next_pages(&mut self.source, false) {
            self.writer = Some(writer);
            return Some(piece);
        }
        let last = writer.finish(self.source.position(), self.source.state());
        self.pieces = last.expect("the length of the state was checked").0.into();
        self.pieces.pop_front()
    }
}

impl<S: PageSource + ?Sized> PageSource for Box<S> {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        (**self).next_page(page)
    }
}

impl<S: CheckpointSource + ?Sized> CheckpointSource for Box<S> {
    fn position(&self) -> LogPosition {
        (**self).position()
    }

    fn fixed(&self) -> &[u8] {
        (**self).fixed()
    }

    fn state(&self) -> &[u8] {
        (**self).state()
    }

    fn page_limit(&self) -> PageNumber {
        (**self).page_limit()
    }
}
