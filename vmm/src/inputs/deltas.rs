//! Checkpoints in the log: packed by who records, put together by who replays.

use crate::machine::{Delta, DeltaBase, MachineState};
use crate::outputs::Output;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vmft_cpu::memory::PAGE_SIZE;
use vmft_log::checkpoint::{
    CheckpointHeader, CheckpointPiece, CheckpointReader, CheckpointSink, CheckpointWriter,
    MemoryBase, Page, PageEncoder, PageNumber, PieceKind, SinkRefusal,
};
use vmft_log::entry::{Entry, EntrySequence, LogPosition};

/// The state part of a checkpoint in the log.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    /// The machine, encoded, without its memory and what it boots from.
    machine: Vec<u8>,
    outputs: Vec<Output>,
}

/// The base that the fixed part of a checkpoint names.
pub(super) fn base_of(fixed: &[u8]) -> Option<DeltaBase> {
    match postcard::take_from_bytes(fixed) {
        Ok((base, [])) => Some(base),
        _ => None,
    }
}

/// The entries that carry `delta`.
pub(super) fn pack(mut delta: Delta) -> Vec<Entry> {
    // The receiver has replayed since the last one, so nothing is known of its pages.
    let encoder = match delta.is_whole {
        true => PageEncoder::for_zeroes(0),
        false => PageEncoder::for_earlier(0),
    };
    let memory = if delta.is_whole { MemoryBase::Zeroes } else { MemoryBase::Earlier };
    // Without outputs it is for its own place alone, and has no fixed part.
    let base = postcard::to_stdvec(&delta.base).expect("plain state always encodes");
    let fixed = if delta.outputs.is_some() { &base[..] } else { &[] };
    let (mut writer, mut pieces) =
        CheckpointWriter::begin(memory, delta.page_limit, fixed, encoder)
            .expect("the fixed part is small");
    while let Some(piece) = writer.next_pages(&mut delta, false) {
        pieces.push(piece);
    }
    let position = LogPosition { entry: EntrySequence(0), point: delta.state.point() };
    let outputs = delta.outputs.unwrap_or_default();
    let content = Content { machine: delta.state.encode(), outputs };
    let content = postcard::to_stdvec(&content).expect("plain state always encodes");
    let (last, _) = writer
        .finish(position, &content)
        .expect("devices and outputs are bounded far below a checkpoint's limit");
    pieces.extend(last);
    let entry = |piece: CheckpointPiece| Entry::CheckpointPart {
        piece: piece.kind(),
        bytes: piece.encode(Vec::new()),
    };
    pieces.into_iter().map(entry).collect()
}

/// Puts pages aside.
#[derive(Debug)]
struct Aside {
    /// So many pages the memory has that they change, and so many are put aside.
    most: usize,
    page_limit: Option<PageNumber>,
    is_whole: bool,
    pages: VecDeque<(PageNumber, Box<Page>)>,
}

impl CheckpointSink for Aside {
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        self.is_whole = header.base == MemoryBase::Zeroes;
        self.page_limit = Some(header.page_limit);
        self.pages = VecDeque::new();
        Ok(())
    }

    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
        if self.pages.back().is_some_and(|(last, _)| *last >= number) {
            return Err(SinkRefusal("its pages are out of order".to_owned()));
        }
        if self.pages.len() >= self.most {
            return Err(SinkRefusal("it has more pages than the machine".to_owned()));
        }
        self.pages.push_back((number, Box::new(*data)));
        Ok(())
    }

    fn read(&self, _: PageNumber, _: &mut Page) -> Result<(), SinkRefusal> {
        Err(SinkRefusal("it changes what is not known here".to_owned()))
    }
}

/// A checkpoint in the log, on its way in.
#[derive(Debug)]
pub(super) struct Assembly {
    reader: CheckpointReader,
    aside: Aside,
}

impl Assembly {
    /// For a machine with so many bytes of memory.
    pub(super) fn new(memory: u64) -> Self {
        let most = usize::try_from(memory / PAGE_SIZE).unwrap_or(usize::MAX);
        let aside = Aside { most, page_limit: None, is_whole: false, pages: VecDeque::new() };
        Self { reader: CheckpointReader::new(), aside }
    }

    /// Takes the next piece; what it makes whole. The text of an error is for the report.
    pub(super) fn add(&mut self, piece: PieceKind, bytes: &[u8]) -> Result<Option<Delta>, String> {
        let piece = CheckpointPiece::decode(piece, bytes).map_err(|error| error.to_string())?;
        let whole = self.reader.handle_piece(piece, &mut self.aside);
        let Some(whole) = whole.map_err(|error| error.to_string())? else { return Ok(None) };
        let content: Content = match postcard::take_from_bytes(&whole.state) {
            Ok((content, [])) => content,
            Ok(_) => return Err("its state goes on after its end".to_owned()),
            Err(error) => return Err(error.to_string()),
        };
        let state = MachineState::decode(&content.machine).map_err(|error| error.to_string())?;
        let here = DeltaBase { point: state.point(), is_checkpoint: false };
        let (base, outputs) = match whole.fixed.is_empty() {
            true => (here, None),
            false => {
                let base = base_of(&whole.fixed).ok_or("its base is none")?;
                (base, Some(content.outputs))
            }
        };
        let pages = std::mem::take(&mut self.aside.pages);
        let page_limit = self.aside.page_limit.take().expect("a whole checkpoint has begun");
        let is_whole = self.aside.is_whole;
        if is_whole && outputs.is_some() {
            return Err("a whole machine is for its own place alone".to_owned());
        }
        Ok(Some(Delta { state, page_limit, pages, base, outputs, is_whole }))
    }
}

#[cfg(test)]
#[path = "deltas_fuzz.rs"]
mod fuzz;
