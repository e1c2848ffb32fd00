//! The checkpoint stream: a machine's state and memory at one point, from which a backup (or a
//! replay) starts.
//!
//! ```text
//! CheckpointHeader · CheckpointState × n · CheckpointPages × n · CheckpointEnd
//! ```
//! The state is opaque here. Pages come in ascending order; pages of zeroes are left out, because
//! the receiving memory starts as zeroes. The end carries a digest of everything before it, and
//! only when that agrees is the checkpoint complete: until then the receiver has handed pages to
//! its sink and nothing else. Reading guest memory and restoring a machine are the caller's.

use crate::codec::EncodeError;
use crate::frame::{Frame, FrameKind};
use crate::point::ExecutionPoint;
use crate::session::Control;
use crate::wire::{Cursor, DecodeError, put_varint};
use serde::{Deserialize, Serialize};
use std::fmt;
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;
/// Most pages in one frame: 256 KiB of memory.
pub const MAX_BATCH_PAGES: usize = 64;
/// Most bytes of state in one frame.
pub const MAX_STATE_CHUNK: usize = 256 << 10;
/// Most bytes of machine state: the CPU and devices of a machine take some kilobytes, outstanding
/// disk requests at most some megabytes; the rest is for the kernel and the initramfs, which a
/// reset boots from again.
pub const MAX_STATE: u64 = 256 << 20;

/// One page of guest memory.
pub type Page = [u8; PAGE_BYTES];

/// A guest page number: physical address divided by [`PAGE_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageNumber(pub u64);

/// What a checkpoint stream begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointHeader {
    /// Where the guest was.
    pub point: ExecutionPoint,
    /// Bytes of machine state.
    pub state_len: u64,
    /// The first page number that the machine's memory lies wholly below.
    pub page_limit: PageNumber,
}

/// What a checkpoint stream ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointEnd {
    /// How many pages were sent.
    pub pages: u64,
    /// XXH3-64 of the header's three numbers, the state, and each page's number and bytes
    /// (numbers as 64-bit little-endian words).
    pub digest: u64,
}

impl Control for CheckpointHeader {
    fn validate(&self) -> Result<(), DecodeError> {
        if self.state_len > MAX_STATE {
            return Err(DecodeError::Limit {
                what: "machine state",
                found: self.state_len,
                limit: MAX_STATE,
            });
        }
        Ok(())
    }
}

impl Control for CheckpointEnd {}

/// Neighbouring pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The first page.
    pub first: PageNumber,
    /// How many.
    pub count: u8,
}

/// The payload of a `CheckpointPages` frame: which pages, and their bytes, compressed.
///
/// ```text
/// runs varint · (gap varint · count u8) × runs · compressed u8 · bytes …
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBatch {
    runs: Vec<PageRun>,
    compressed: bool,
    bytes: Vec<u8>,
}

impl PageBatch {
    fn new(runs: Vec<PageRun>, raw: &[u8]) -> Self {
        let packed = lz4_flex::block::compress(raw);
        if packed.len() < raw.len() {
            Self { runs, compressed: true, bytes: packed }
        } else {
            Self { runs, compressed: false, bytes: raw.to_vec() }
        }
    }

    /// The pages it carries.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    fn pages(&self) -> usize {
        self.runs.iter().map(|run| usize::from(run.count)).sum()
    }

    pub(crate) fn encode(&self, mut out: Vec<u8>) -> Vec<u8> {
        put_varint(&mut out, self.runs.len() as u64);
        let mut end = 0;
        for run in &self.runs {
            put_varint(&mut out, run.first.0 - end);
            out.push(run.count);
            end = run.first.0 + u64::from(run.count);
        }
        out.push(u8::from(self.compressed));
        out.extend_from_slice(&self.bytes);
        out
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(payload);
        let count = cursor.bounded("page runs", MAX_BATCH_PAGES as u64)?;
        let mut runs = Vec::new();
        let (mut end, mut pages) = (0u64, 0);
        for _ in 0..count {
            let gap = cursor.varint("page number")?;
            let count = cursor.byte("page count")?;
            let out_of_range = DecodeError::Rule("page number is out of range");
            let first = end.checked_add(gap).ok_or(out_of_range.clone())?;
            end = first.checked_add(u64::from(count)).ok_or(out_of_range)?;
            pages += usize::from(count);
            if count == 0 || pages > MAX_BATCH_PAGES {
                return Err(DecodeError::Rule("page run is empty or too long"));
            }
            runs.push(PageRun { first: PageNumber(first), count });
        }
        let compressed = match cursor.byte("compression")? {
            0 => false,
            1 => true,
            tag => return Err(DecodeError::Tag { what: "compression", tag }),
        };
        let bytes = cursor.take_rest().to_vec();
        if pages == 0 || (!compressed && bytes.len() != pages * PAGE_BYTES) {
            return Err(DecodeError::Rule("page data does not fit the page numbers"));
        }
        Ok(Self { runs, compressed, bytes })
    }

    fn unpack(&self) -> Result<Vec<u8>, DecodeError> {
        let len = self.pages() * PAGE_BYTES;
        if !self.compressed {
            return Ok(self.bytes.clone());
        }
        match lz4_flex::block::decompress(&self.bytes, len) {
            Ok(raw) if raw.len() == len => Ok(raw),
            _ => Err(DecodeError::Compression),
        }
    }
}

/// Where a checkpoint is taken from.
pub trait CheckpointSource {
    /// Where the guest is.
    fn point(&self) -> ExecutionPoint;
    /// The machine's state without its memory, at most [`MAX_STATE`] bytes.
    fn state(&self) -> &[u8];
    /// The first page number that the memory lies wholly below.
    fn page_limit(&self) -> PageNumber;
    /// Copies the next page, in ascending order, and returns its number; `None` after the last.
    /// Pages of zeroes may be left out.
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber>;
}

impl<S: CheckpointSource + ?Sized> CheckpointSource for Box<S> {
    fn point(&self) -> ExecutionPoint {
        (**self).point()
    }

    fn state(&self) -> &[u8] {
        (**self).state()
    }

    fn page_limit(&self) -> PageNumber {
        (**self).page_limit()
    }

    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        (**self).next_page(page)
    }
}

/// The sink would not take a page.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SinkRefusal(pub String);

/// Where a checkpoint's memory goes. What it has taken counts only once the checkpoint is
/// complete; it starts as zeroes.
pub trait CheckpointSink {
    /// A checkpoint begins.
    ///
    /// # Errors
    /// [`SinkRefusal`] if it does not fit, for instance a memory of another size.
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal>;
    /// One page, each at most once.
    ///
    /// # Errors
    /// [`SinkRefusal`] if there is no such page.
    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal>;
}

/// Why a checkpoint stream is refused. The receiver stays without a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// A frame that has no place here.
    #[error("{found} frame inside a checkpoint, {expected} was due")]
    Unexpected {
        /// What came.
        found: FrameKind,
        /// What was due.
        expected: FrameKind,
    },
    /// There is more state than the header said.
    #[error("checkpoint carries more state than the {expected} bytes announced")]
    StateOverrun {
        /// Bytes announced.
        expected: u64,
    },
    /// A page outside memory, or not after the one before it.
    #[error("page {:#x} of the checkpoint is out of range or order", page.0)]
    Page {
        /// Its number.
        page: PageNumber,
    },
    /// The compressed pages are damaged.
    #[error("pages of the checkpoint cannot be unpacked")]
    Pages(#[source] DecodeError),
    /// The number of pages or the digest does not agree.
    #[error("checkpoint is damaged: {pages} pages with digest {digest:#x}, announced {} with {:#x}", announced.pages, announced.digest)]
    Digest {
        /// Pages received.
        pages: u64,
        /// Digest of what was received.
        digest: u64,
        /// What the sender says.
        announced: CheckpointEnd,
    },
    /// The receiving memory would not take it.
    #[error("the machine does not take the checkpoint: {0}")]
    Sink(SinkRefusal),
}

/// The running digest of a checkpoint.
struct Digester {
    hash: Xxh3,
    pages: u64,
}

impl fmt::Debug for Digester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Digester").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl Digester {
    fn new(header: &CheckpointHeader) -> Self {
        let mut hash = Xxh3::new();
        for number in [header.point.get(), header.state_len, header.page_limit.0] {
            hash.update(&number.to_le_bytes());
        }
        Self { hash, pages: 0 }
    }

    fn state(&mut self, chunk: &[u8]) {
        self.hash.update(chunk);
    }

    fn page(&mut self, number: PageNumber, data: &[u8]) {
        self.hash.update(&number.0.to_le_bytes());
        self.hash.update(data);
        self.pages += 1;
    }

    fn end(&self) -> CheckpointEnd {
        CheckpointEnd { pages: self.pages, digest: self.hash.digest() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriterStage {
    Header,
    State { sent: usize },
    Pages,
    Done,
}

/// Turns a source into frames, one at a time.
#[derive(Debug)]
pub struct CheckpointWriter<S> {
    source: S,
    header: CheckpointHeader,
    stage: WriterStage,
    digester: Digester,
    last_page: Option<PageNumber>,
}

impl<S: CheckpointSource> CheckpointWriter<S> {
    /// A writer at the start of the stream.
    ///
    /// # Errors
    /// [`EncodeError::TooLarge`] if the state is larger than [`MAX_STATE`].
    pub fn new(source: S) -> Result<Self, EncodeError> {
        let (len, limit) = (source.state().len(), MAX_STATE as usize);
        if len > limit {
            return Err(EncodeError::TooLarge { what: "machine state", len, limit });
        }
        let header = CheckpointHeader {
            point: source.point(),
            state_len: len as u64,
            page_limit: source.page_limit(),
        };
        let digester = Digester::new(&header);
        Ok(Self { source, header, stage: WriterStage::Header, digester, last_page: None })
    }

    /// The next frame; `None` after the last.
    ///
    /// # Panics
    /// If the source's pages are out of order or beyond its limit.
    pub fn next_frame(&mut self) -> Option<Frame> {
        match self.stage {
            WriterStage::Header => {
                self.stage = WriterStage::State { sent: 0 };
                Some(Frame::CheckpointHeader(self.header))
            }
            WriterStage::State { sent } => {
                let rest = &self.source.state()[sent..];
                if rest.is_empty() {
                    self.stage = WriterStage::Pages;
                    return self.next_frame();
                }
                let chunk = rest[..rest.len().min(MAX_STATE_CHUNK)].to_vec();
                self.digester.state(&chunk);
                self.stage = WriterStage::State { sent: sent + chunk.len() };
                Some(Frame::CheckpointState(chunk))
            }
            WriterStage::Pages => Some(match self.next_pages() {
                Some(batch) => Frame::CheckpointPages(batch),
                None => {
                    self.stage = WriterStage::Done;
                    Frame::CheckpointEnd(self.digester.end())
                }
            }),
            WriterStage::Done => None,
        }
    }

    fn next_pages(&mut self) -> Option<PageBatch> {
        let mut runs: Vec<PageRun> = Vec::new();
        let mut raw = Vec::with_capacity(MAX_BATCH_PAGES * PAGE_BYTES);
        let mut page = [0; PAGE_BYTES];
        while raw.len() < MAX_BATCH_PAGES * PAGE_BYTES {
            let Some(number) = self.source.next_page(&mut page) else { break };
            assert!(self.last_page < Some(number), "checkpoint pages come in ascending order");
            assert!(number < self.header.page_limit, "checkpoint pages lie in memory");
            self.last_page = Some(number);
            if page == [0; PAGE_BYTES] {
                continue;
            }
            self.digester.page(number, &page);
            raw.extend_from_slice(&page);
            match runs.last_mut() {
                Some(run) if run.first.0 + u64::from(run.count) == number.0 => run.count += 1,
                _ => runs.push(PageRun { first: number, count: 1 }),
            }
        }
        (!runs.is_empty()).then(|| PageBatch::new(runs, &raw))
    }
}

/// A checkpoint that arrived whole. Its memory is in the sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompleteCheckpoint {
    /// Where the guest was.
    pub point: ExecutionPoint,
    /// The machine's state, as the source gave it.
    pub state: Vec<u8>,
    /// How many pages were not zero.
    pub pages: u64,
}

/// Puts a checkpoint together from its frames.
#[derive(Debug, Default)]
pub struct CheckpointReader {
    progress: Option<Progress>,
}

#[derive(Debug)]
struct Progress {
    header: CheckpointHeader,
    state: Vec<u8>,
    digester: Digester,
    next_page: u64,
}

impl CheckpointReader {
    /// A reader that waits for the header.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next frame. Returns the checkpoint when it is complete; the reader is then as new.
    ///
    /// # Errors
    /// [`CheckpointError`]; the reader is then as new, and what the sink holds is worthless.
    pub fn handle_frame(
        &mut self,
        frame: Frame,
        sink: &mut dyn CheckpointSink,
    ) -> Result<Option<CompleteCheckpoint>, CheckpointError> {
        let Some(mut progress) = self.progress.take() else {
            let Frame::CheckpointHeader(header) = frame else {
                let expected = FrameKind::CheckpointHeader;
                return Err(CheckpointError::Unexpected { found: frame.kind(), expected });
            };
            sink.begin(&header).map_err(CheckpointError::Sink)?;
            let digester = Digester::new(&header);
            self.progress = Some(Progress { header, state: Vec::new(), digester, next_page: 0 });
            return Ok(None);
        };
        match frame {
            Frame::CheckpointEnd(announced) => return progress.finish(announced).map(Some),
            Frame::CheckpointState(chunk) if progress.next_page == 0 => {
                progress.add_state(&chunk)?
            }
            Frame::CheckpointPages(batch) if progress.state_is_whole() => {
                progress.add_pages(&batch, sink)?;
            }
            other => {
                let expected = progress.expected();
                return Err(CheckpointError::Unexpected { found: other.kind(), expected });
            }
        }
        self.progress = Some(progress);
        Ok(None)
    }
}

impl Progress {
    fn state_is_whole(&self) -> bool {
        self.state.len() as u64 == self.header.state_len
    }

    fn expected(&self) -> FrameKind {
        if self.state_is_whole() { FrameKind::CheckpointPages } else { FrameKind::CheckpointState }
    }

    fn add_state(&mut self, chunk: &[u8]) -> Result<(), CheckpointError> {
        if (self.state.len() + chunk.len()) as u64 > self.header.state_len {
            return Err(CheckpointError::StateOverrun { expected: self.header.state_len });
        }
        self.digester.state(chunk);
        self.state.extend_from_slice(chunk);
        Ok(())
    }

    fn add_pages(
        &mut self,
        batch: &PageBatch,
        sink: &mut dyn CheckpointSink,
    ) -> Result<(), CheckpointError> {
        let raw = batch.unpack().map_err(CheckpointError::Pages)?;
        let (pages, _) = raw.as_chunks::<PAGE_BYTES>();
        let numbers = batch
            .runs
            .iter()
            .flat_map(|run| (run.first.0..run.first.0 + u64::from(run.count)).map(PageNumber));
        for (page, data) in numbers.zip(pages) {
            if page.0 < self.next_page || page >= self.header.page_limit {
                return Err(CheckpointError::Page { page });
            }
            self.next_page = page.0 + 1;
            self.digester.page(page, data);
            sink.page(page, data).map_err(CheckpointError::Sink)?;
        }
        Ok(())
    }

    fn finish(self, announced: CheckpointEnd) -> Result<CompleteCheckpoint, CheckpointError> {
        let found = self.digester.end();
        if found != announced || !self.state_is_whole() {
            let CheckpointEnd { pages, digest } = found;
            return Err(CheckpointError::Digest { pages, digest, announced });
        }
        Ok(CompleteCheckpoint { point: self.header.point, state: self.state, pages: found.pages })
    }
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
pub(crate) mod tests;
