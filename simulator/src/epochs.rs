//! Checkpoint mode: a live side that sends its guest epoch by epoch, and a backup that is kept by them.
//!
//! What is real: the checkpoint streams with their encoders and readers, the gates, the log that carries
//! them. What is a model: memory, which holds nothing but the guest, and the rests.

use crate::guest::Guest;
use crate::plan::MS;
use crate::side::{Following, Live};
use crate::world::{Event, Plant, World};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use vmft_log::checkpoint::{
    CheckpointPiece, CheckpointReader, CheckpointWriter, MemoryBase, PAGE_BYTES, Page, PageBase,
    PageEncoder, PageNumber, PageSource, PieceKind, SinkRefusal, StagedPages,
};
use vmft_log::entry::{Entry, EntrySequence, LogPosition, OutputSequence, StopReason};
use vmft_vmm::outputs::{Output, OutputGate, OutputKind};

/// Pages of a guest's memory: more than the longest schedule's guest fills.
const PAGES: usize = 16;
/// Pages that an encoder remembers: fewer than there are, so that it forgets.
const REMEMBERED: usize = 2;

/// A guest as it lies in its memory.
fn memory_of(guest: &Guest) -> Vec<Page> {
    let bytes = guest.encode();
    assert!(bytes.len() <= PAGES * PAGE_BYTES, "a guest of {} bytes", bytes.len());
    let mut pages = vec![[0; PAGE_BYTES]; PAGES];
    for (page, bytes) in pages.iter_mut().zip(bytes.chunks(PAGE_BYTES)) {
        page[..bytes.len()].copy_from_slice(bytes);
    }
    pages
}

/// Pages that were written.
struct Written(VecDeque<(PageNumber, Page)>);

impl PageSource for Written {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        let (number, data) = self.0.pop_front()?;
        *page = data;
        Some(number)
    }
}

/// The state part of an epoch.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    /// Made since the epoch before, without disk requests.
    outputs: Vec<Output>,
}

/// The end of an epoch, on its way into the log.
#[derive(Debug)]
struct Taken {
    pieces: VecDeque<CheckpointPiece>,
    /// Outputs made up to here.
    outputs: OutputSequence,
    /// What the backups have, once they have all of it.
    encoder: PageEncoder,
    /// The log's number of the first piece, for a planted fault.
    first: Option<EntrySequence>,
}

/// The epochs of a live side, from the first backup's log to the loss of the last.
#[derive(Debug)]
pub struct Epochs {
    under_way: Option<Taken>,
    /// Another backup has joined since the last epoch was taken.
    joined: bool,
    /// Outputs that the epochs so far have told of.
    told: OutputSequence,
    last: u64,
    memory: Vec<Page>,
    encoder: Option<PageEncoder>,
}

impl Epochs {
    /// Begins with the guest as it is: a backup is being given it.
    pub fn new(guest: &Guest) -> Self {
        Self {
            under_way: None,
            joined: false,
            told: guest.outputs(),
            last: 0,
            memory: memory_of(guest),
            encoder: None,
        }
    }

    /// Another backup wants the guest as it is here: true if that is between two epochs.
    pub fn make_room(&mut self, live_marks: usize) -> bool {
        let clear = self.under_way.is_none() && live_marks == 0;
        self.joined |= clear;
        clear
    }

    /// The guest rests: its epoch ends here.
    fn take(&mut self, guest: &Guest, waiting: Vec<Output>, keeps_encoder: bool) {
        let memory = memory_of(guest);
        let pages = (0..).map(PageNumber).zip(memory.iter().copied()).zip(&self.memory);
        let written = pages.filter(|((_, new), old)| new != *old).map(|(page, _)| page).collect();
        let known = self.encoder.take().filter(|_| !self.joined || keeps_encoder);
        self.joined = false;
        let encoder = known.unwrap_or_else(|| PageEncoder::for_earlier(REMEMBERED));
        let limit = PageNumber(PAGES as u64);
        let (mut writer, first) = CheckpointWriter::begin(MemoryBase::Earlier, limit, &[], encoder)
            .expect("an epoch has no fixed part");
        let (mut pieces, mut written) = (VecDeque::from(first), Written(written));
        while let Some(piece) = writer.next_pages(&mut written, true) {
            pieces.push_back(piece);
        }
        self.last += 1;
        let outputs = waiting.into_iter().filter(|o| !matches!(o.kind, OutputKind::Disk { .. }));
        let content = Content { outputs: outputs.collect() };
        let content = postcard::to_stdvec(&content).expect("plain outputs always encode");
        let position = LogPosition { entry: EntrySequence(self.last), point: guest.point() };
        let (last, encoder) = writer.finish(position, &content).expect("a short state");
        pieces.extend(last);
        self.memory = memory;
        self.under_way = Some(Taken { pieces, outputs: guest.outputs(), encoder, first: None });
    }
}

/// Memory as a backup has it.
#[derive(Debug, Clone)]
struct Base(Rc<RefCell<Vec<Page>>>);

impl PageBase for Base {
    fn page_limit(&self) -> PageNumber {
        PageNumber(PAGES as u64)
    }

    fn has(&self, number: PageNumber) -> bool {
        number < self.page_limit()
    }

    fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal> {
        let index = usize::try_from(number.0).unwrap_or(usize::MAX);
        let memory = self.0.borrow();
        *data = *memory.get(index).ok_or_else(|| SinkRefusal("no such page".to_owned()))?;
        Ok(())
    }
}

/// A backup's copy of the guest, brought up to each whole epoch.
#[derive(Debug)]
pub struct Copy {
    memory: Base,
    reader: CheckpointReader,
    staged: StagedPages<Base>,
    last: Option<u64>,
}

impl Copy {
    /// The guest as a join has brought it.
    pub fn new(guest: &Guest) -> Self {
        let memory = Base(Rc::new(RefCell::new(memory_of(guest))));
        let staged = StagedPages::new(memory.clone());
        Self { memory, reader: CheckpointReader::new(), staged, last: None }
    }

    /// Takes a piece; the guest and its outputs, if that makes an epoch whole.
    fn handle_piece(
        &mut self,
        kind: PieceKind,
        bytes: &[u8],
    ) -> Result<Option<(Guest, Vec<Output>)>, String> {
        let piece = CheckpointPiece::decode(kind, bytes).map_err(|error| error.to_string())?;
        let whole = self.reader.handle_piece(piece, &mut self.staged);
        let Some(whole) = whole.map_err(|error| error.to_string())? else { return Ok(None) };
        let found = whole.position.entry.0;
        if self.last.is_some_and(|last| found != last + 1) {
            return Err(format!("epoch {found} came after {:?}", self.last));
        }
        let content: Content =
            postcard::from_bytes(&whole.state).map_err(|error| error.to_string())?;
        for (number, page) in self.staged.pages() {
            self.memory.0.borrow_mut()[number.0 as usize] = *page;
        }
        self.staged.clear();
        self.last = Some(found);
        let guest =
            Guest::decode(&self.memory.0.borrow().concat()).map_err(|error| error.to_string())?;
        if guest.point() != whole.position.point {
            return Err(format!(
                "the guest is at {:?}, its epoch at {:?}",
                guest.point(),
                whole.position.point
            ));
        }
        Ok(Some((guest, content.outputs)))
    }
}

impl World {
    /// The epochs of a live side do their next step: one is taken, or a piece of one goes into the log.
    pub(crate) fn step_epochs(&mut self, side: usize) {
        self.with_running(side, |world, live| world.step_epoch(side, live));
    }

    fn step_epoch(&mut self, side: usize, live: &mut Live) {
        let Some(epochs) = &mut live.epochs else { return };
        if live.backups.followers() == 0 {
            live.epochs = None;
            return;
        }
        if epochs.under_way.is_none() {
            let waiting = live.gate.waiting_after(epochs.told);
            epochs.take(&live.guest, waiting, self.plant == Some(Plant::EncoderKept));
            return;
        }
        for _ in 0..self.random.between(1, 4) {
            self.push_piece(side, live);
        }
    }

    /// The next piece of the epoch under way goes into the log; with the last one, its outputs are marked.
    fn push_piece(&mut self, side: usize, live: &mut Live) {
        let now = self.local(side);
        let Some(epochs) = &mut live.epochs else { return };
        let Some(taken) = &mut epochs.under_way else { return };
        let Some(piece) = taken.pieces.pop_front() else { return };
        let begun = live.gate.begin_mark();
        let entry = Entry::CheckpointPart { piece: piece.kind(), bytes: piece.encode(Vec::new()) };
        let Ok(sequence) = live.backups.push(now, &entry) else {
            live.epochs = None;
            return;
        };
        let first = *taken.first.get_or_insert(sequence);
        if !taken.pieces.is_empty() {
            return;
        }
        let taken = epochs.under_way.take().expect("just looked at");
        epochs.encoder = Some(taken.encoder);
        if taken.outputs > epochs.told {
            let early = self.plant == Some(Plant::EpochMarkedEarly);
            let entry = if early { first } else { sequence };
            live.marks.insert(taken.outputs, sequence);
            live.gate.mark(begun, entry, taken.outputs);
        }
        epochs.told = taken.outputs;
    }

    /// The machine has stopped for good: its last epoch goes into the log, and the stop.
    pub(crate) fn finish_epochs(&mut self, side: usize, live: &mut Live, reason: StopReason) {
        let now = self.local(side);
        while live.epochs.as_ref().is_some_and(|epochs| epochs.under_way.is_some()) {
            self.push_piece(side, live);
        }
        if let Some(epochs) = &mut live.epochs {
            epochs.take(&live.guest, live.gate.waiting_after(epochs.told), false);
        }
        while live.epochs.as_ref().is_some_and(|epochs| epochs.under_way.is_some()) {
            self.push_piece(side, live);
        }
        let stop = Entry::Stop { point: live.guest.point(), reason };
        // Without a backup there is nobody who must know.
        let _ = live.backups.push(now, &stop);
        live.epochs = None;
    }

    /// A piece of an epoch has come to a side that is kept by them.
    pub(crate) fn apply_piece(
        &mut self,
        side: usize,
        following: &mut Following,
        kind: PieceKind,
        bytes: &[u8],
    ) {
        let Some(copy) = &mut following.copy else {
            self.oracle.fail(format!("side {side} replays, and was sent a piece of an epoch"));
            return;
        };
        match copy.handle_piece(kind, bytes) {
            Ok(None) => {}
            Ok(Some((guest, outputs))) => {
                self.note(|| format!("side {side} has an epoch whole, at {:?}", guest.point()));
                following.guest = guest;
                for output in outputs {
                    following.kept.emit(output);
                }
            }
            Err(why) => self.oracle.fail(format!("side {side} refuses an epoch: {why}")),
        }
    }

    /// How long until the epochs of a side do their next step.
    pub(crate) fn schedule_epochs(&mut self, side: usize, incarnation: u32) {
        let pause = self.random.between(1, 9) * MS;
        self.schedule(self.now + pause, Event::Epoch(side, incarnation));
    }
}
