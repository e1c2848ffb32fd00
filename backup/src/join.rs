//! How a backup joins a guest that runs: its memory is sent in rounds while it runs, and only what
//! is left at the end is copied while it rests.
//!
//! ```text
//!  join thread                               the machine's thread
//!  ───────────                               ────────────────────
//!  Watch ──────────────────────────────────▶ a view of what is written from here on
//!  packs and sends all of memory             (runs)
//!  Round ──────────────────────────────────▶ what was written since
//!  packs and sends that                      (runs)
//!   ⋮  until little is left, or no less than before and not too much
//!  Round ──────────────────────────────────▶ copies what is left, and the state: the log begins
//!  packs and sends that                      (runs on, outputs wait)
//! ```
//! The machine rests for as long as it takes to copy the last round, which is bounded, never for a
//! connection. A guest that writes faster than it is sent is slowed until the last round is small
//! enough ([`Rounds`]). A backup that is lost on the way costs it nothing more.

use crate::checkpoint::{RamPages, page_limit};
use crate::copied::CopiedPages;
use crate::mirror::DiskFill;
use crate::requests::{Requests, SideGone};
use crate::rounds::{Brake, Rounds};
use crate::status::{JoinReport, StatusBoard, ms};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_cpu::memory::{self, GuestRam, PAGE_SIZE, WriteView};
use vmft_log::checkpoint::{
    CheckpointPiece, CheckpointWriter, JoinPiece, MemoryBase, Page, PageEncoder, PageNumber,
    PageSource,
};
use vmft_log::entry::LogPosition;
use vmft_logging_channel::transport::{CheckpointStream, JoinTicket, TakesDigests};
use vmft_vmm::machine::Machine;
use vmft_vmm::world::Mailbox;

/// So many written pages may be left for the last round without another try: 8 MiB, which a host
/// copies in a few milliseconds.
const LAST_ROUND_PAGES: usize = 2048;
/// Most rounds before more than that may be left.
const MAX_ROUNDS: u32 = 12;
/// After so many batches the machine is asked to prepare a part of its first digest, until that is
/// done: it must look at all the memory it has written, as long as nobody followed.
const PREPARE_EVERY: u32 = 8;
/// How long a machine that is between two points runs before it is asked again.
const NEXT_POINT_WAIT: Duration = Duration::from_millis(5);
/// So many pages may be left to look at when the log begins.
const UNPREPARED_PAGES: usize = 2048;
/// Pages of later rounds that are remembered, so that only their changes are sent again: 64 MiB.
const REMEMBERED_PAGES: usize = 16 << 10;

/// A machine whose writes are watched for a backup that joins.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    pub(crate) ram: GuestRam,
    pub(crate) fixed: Arc<[u8]>,
    pub(crate) view: Arc<WriteView>,
}

impl Watched {
    /// Begins to watch.
    pub(crate) fn begin(machine: &mut Machine) -> Self {
        let view = Arc::new(machine.watch_writes());
        let fixed = machine.boot_source().encode().into();
        Self { ram: machine.ram().clone(), fixed, view }
    }
}

/// What is left when the log begins.
#[derive(Debug)]
pub(crate) struct Rest {
    pub(crate) position: LogPosition,
    pub(crate) state: Vec<u8>,
    pub(crate) pages: CopiedPages,
    /// How long the machine rested.
    pub(crate) pause: Duration,
}

/// What a round brings.
#[derive(Debug)]
pub(crate) enum RoundEnd {
    /// The pages written since the last one.
    Written(Vec<memory::PageNumber>),
    /// Few enough: the log has begun.
    Begun(Rest),
    /// Few enough, but the machine must reach its next point first.
    Later,
}

/// The pages of the round under way.
#[derive(Debug)]
enum Round {
    Running(RamPages),
    Copied(CopiedPages),
}

impl PageSource for Round {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        match self {
            Self::Running(pages) => pages.next_page(page),
            Self::Copied(pages) => pages.next_page(page),
        }
    }
}

/// The stream under way.
#[derive(Debug)]
struct Stream {
    watched: Watched,
    writer: CheckpointWriter,
    round: Round,
    rounds: Rounds,
    brake: Option<Brake>,
    rest: Option<(LogPosition, Vec<u8>)>,
    /// Pages the machine has still to look at before a log can begin; not known at first.
    unprepared: usize,
    since_prepared: u32,
}

/// The checkpoint for a backup that joins, made while the machine runs.
#[derive(Debug)]
pub(crate) struct JoinStream {
    requests: Arc<Requests>,
    mailbox: Arc<Mailbox>,
    status: Arc<StatusBoard>,
    ticket: JoinTicket,
    pieces: VecDeque<CheckpointPiece>,
    stream: Option<Stream>,
    begun: Instant,
    report: JoinReport,
    ended: bool,
    /// The log that begins has digests.
    digests: bool,
    /// The disks of which the backup has copies: they come before memory, which changes sooner.
    disks: DiskFill,
}

impl JoinStream {
    pub(crate) fn new(
        requests: Arc<Requests>,
        mailbox: Arc<Mailbox>,
        status: Arc<StatusBoard>,
        ticket: JoinTicket,
        digests: bool,
        disks: DiskFill,
    ) -> Self {
        Self {
            requests,
            mailbox,
            status,
            ticket,
            pieces: VecDeque::new(),
            stream: None,
            begun: Instant::now(),
            report: JoinReport::default(),
            ended: false,
            digests,
            disks,
        }
    }

    fn begin(&mut self) -> Result<Stream, String> {
        let watched = self.requests.watch(&self.mailbox).map_err(|gone| gone.to_string())?;
        let encoder = PageEncoder::for_zeroes(REMEMBERED_PAGES);
        let limit = page_limit(&watched.ram);
        let (writer, pieces) =
            CheckpointWriter::begin(MemoryBase::Zeroes, limit, &watched.fixed, encoder)
                .map_err(|error| error.to_string())?;
        self.pieces.extend(pieces);
        self.report.memory_bytes = watched.ram.size();
        let round = Round::Running(RamPages::all(&watched.ram));
        let mut rounds = Rounds::new(LAST_ROUND_PAGES, MAX_ROUNDS);
        rounds.next(usize::try_from(watched.ram.size() / PAGE_SIZE).unwrap_or(usize::MAX));
        Ok(Stream {
            unprepared: if self.digests { usize::MAX } else { 0 },
            since_prepared: 0,
            watched,
            writer,
            round,
            rounds,
            brake: None,
            rest: None,
        })
    }

    /// The round is sent: the next one, or the end.
    fn go_on(&mut self, mut stream: Stream) -> Result<(), String> {
        if let Some((position, state)) = stream.rest.take() {
            self.report.rounds = stream.rounds.count() + 1;
            self.report.pages = stream.writer.pages();
            let (pieces, _) =
                stream.writer.finish(position, &state).map_err(|error| error.to_string())?;
            self.pieces.extend(pieces);
            self.ended = true;
            return Ok(());
        }
        while stream.unprepared > UNPREPARED_PAGES {
            let left = self.requests.prepare(&self.mailbox);
            stream.unprepared = left.map_err(|gone| gone.to_string())?;
        }
        let (view, limit) = (Arc::clone(&stream.watched.view), stream.rounds.limit());
        let ending = (self.ticket.clone(), self.disks.ends());
        let end = self.requests.round(view, limit, ending, &self.mailbox);
        match end.map_err(|gone: SideGone| gone.to_string())? {
            RoundEnd::Written(pages) => {
                let slowing = stream.rounds.next(pages.len());
                Brake::apply(&mut stream.brake, slowing, &self.requests, &self.mailbox);
                stream.round = Round::Running(RamPages::some(&stream.watched.ram, pages));
            }
            RoundEnd::Later => {
                std::thread::sleep(NEXT_POINT_WAIT);
                self.stream = Some(stream);
                return Ok(());
            }
            RoundEnd::Begun(Rest { position, state, pages, pause }) => {
                self.report.pause_ms = ms(pause);
                self.report.last_pages = pages.len() as u64;
                self.report.slowed_ms = stream.brake.take().map_or(0.0, |brake| ms(brake.slowed()));
                stream.rest = Some((position, state));
                stream.round = Round::Copied(pages);
            }
        }
        self.stream = Some(stream);
        Ok(())
    }
}

impl CheckpointStream for JoinStream {
    fn digests(&self) -> Option<Arc<dyn TakesDigests>> {
        self.disks.digests()
    }

    fn next_piece(&mut self) -> Result<Option<JoinPiece>, String> {
        loop {
            if let Some(piece) = self.pieces.pop_front() {
                return Ok(Some(piece.into()));
            }
            // What was written meanwhile comes as soon as it is known, so that little of it waits.
            if let Some(piece) = self.disks.next_piece()? {
                return Ok(Some(JoinPiece::Disk(piece)));
            }
            if self.ended {
                self.report.total_ms = ms(self.begun.elapsed());
                self.report.disk_bytes = self.disks.sent();
                let report = self.report.clone();
                self.status.update(|status| status.join = Some(report));
                return Ok(None);
            }
            let mut stream = match self.stream.take() {
                Some(stream) => stream,
                None => self.begin()?,
            };
            if stream.unprepared > 0 && stream.since_prepared >= PREPARE_EVERY {
                stream.since_prepared = 0;
                let left = self.requests.prepare(&self.mailbox);
                stream.unprepared = left.map_err(|gone| gone.to_string())?;
            }
            // The first pass over memory is not worth remembering; what is sent again is.
            match stream.writer.next_pages(&mut stream.round, stream.rounds.count() > 1) {
                Some(CheckpointPiece::Pages(batch)) => {
                    self.report.packed_bytes += batch.packed_bytes() as u64;
                    self.pieces.push_back(CheckpointPiece::Pages(batch));
                    stream.since_prepared += 1;
                    self.stream = Some(stream);
                }
                Some(piece) => unreachable!("pages are a piece of pages, not {piece:?}"),
                None if self.pieces.is_empty() => self.go_on(stream)?,
                // The first pieces come before any page.
                None => self.stream = Some(stream),
            }
        }
    }
}
