//! Taking epochs of a machine at rest, and putting them into the log.

use super::content::{EpochContent, EpochNumber};
use super::pace::Cost;
use crate::checkpoint::page_limit;
use crate::join::{CopiedPages, copy_pages, next_copied};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_logging_channel::checkpoint::{
    CheckpointPiece, CheckpointWriter, MemoryBase, PAGE_BYTES, Page, PageEncoder, PageNumber,
    PageSource,
};
use vmft_logging_channel::entry::{Entry, EntrySequence, OutputSequence, StopReason};
use vmft_logging_channel::point::ExecutionPoint;
use vmft_logging_channel::sender::PushError;
use vmft_logging_channel::transport::{PrimaryChannel, PrimaryPushError, Room};
use vmft_vmm::devices::virtio::block::completed::WriteCount;
use vmft_vmm::machine::Machine;
use vmft_vmm::memory::WriteView;
use vmft_vmm::outputs::{HeldOutputs, Output, OutputKind};

/// Pages of which the sender keeps what the backup has, to send only what has changed: 128 MiB. The
/// pages a guest writes again and again are far fewer.
const REMEMBERED_PAGES: usize = 32 << 10;
/// How long one wait for room may take before the session is looked at again.
const ROOM_WAIT: Duration = Duration::from_millis(50);

/// An epoch, copied out of the machine.
#[derive(Debug)]
pub(super) struct Taken {
    point: ExecutionPoint,
    machine: Vec<u8>,
    pages: CopiedPages,
    limit: PageNumber,
    /// Disk writes completed up to here.
    writes: Vec<WriteCount>,
    /// Outputs made up to here.
    outputs: OutputSequence,
    told: Vec<Output>,
    rest: Duration,
}

/// What the epochs so far have told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    /// Outputs.
    pub(super) outputs: OutputSequence,
    /// Of each disk, completed writes.
    pub(super) writes: Vec<WriteCount>,
}

/// Takes an epoch of a machine at rest: what it has written according to `view`, and the outputs and
/// completed disk writes after those `told` of.
pub(super) fn take(
    machine: &mut Machine,
    view: &WriteView,
    gate: &HeldOutputs,
    told: &Told,
) -> Taken {
    let began = Instant::now();
    let written = machine.take_written(view);
    let state = machine.state_after(&told.writes);
    let is_kept = |output: &Output| !matches!(output.kind, OutputKind::Disk { .. });
    Taken {
        point: state.point(),
        machine: state.encode(),
        pages: copy_pages(machine.ram(), &written),
        limit: page_limit(machine.ram()),
        writes: state.write_counts(),
        outputs: machine.outputs(),
        told: gate.waiting_after(told.outputs).into_iter().filter(is_kept).collect(),
        rest: began.elapsed(),
    }
}

/// The copied pages, as a source.
struct Copied(CopiedPages);

impl PageSource for Copied {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        next_copied(&mut self.0, page)
    }
}

/// What an epoch came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) cost: Cost,
    /// Bytes of the pages written.
    pub(super) dirty_bytes: u64,
    /// Bytes put into the log.
    pub(super) sent_bytes: u64,
}

/// Nobody is there to take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoBackup;

/// Puts epochs into the log, one after the other.
#[derive(Debug)]
pub(super) struct EpochSender {
    channel: Arc<PrimaryChannel>,
    gate: Arc<HeldOutputs>,
    /// What the backups have of the pages sent last; nothing is known at first, and of an epoch that
    /// was not sent whole.
    encoder: Option<PageEncoder>,
    last: EpochNumber,
    told: Told,
}

impl EpochSender {
    /// For backups that have the machine as it is.
    pub(super) fn new(
        channel: Arc<PrimaryChannel>,
        gate: Arc<HeldOutputs>,
        machine: &Machine,
    ) -> Self {
        let told = Told { outputs: machine.outputs(), writes: machine.write_counts() };
        Self { channel, gate, encoder: None, last: EpochNumber(0), told }
    }

    pub(super) const fn told(&self) -> &Told {
        &self.told
    }

    pub(super) fn gate(&self) -> &Arc<HeldOutputs> {
        &self.gate
    }

    /// Another backup has joined, with pages of its own: from here on, nothing is sent as a change of
    /// what was sent before.
    pub(super) fn forget(&mut self) {
        self.encoder = None;
    }

    /// Packs an epoch and puts it into the log. The outputs made in it leave when its end is
    /// acknowledged.
    pub(super) fn send(&mut self, taken: Taken) -> Result<Sent, NoBackup> {
        let Taken { point, machine, pages, limit, writes, outputs, told, rest } = taken;
        let began = Instant::now();
        let count = pages.len();
        let encoder = self.encoder.take();
        let encoder = encoder.unwrap_or_else(|| PageEncoder::for_earlier(REMEMBERED_PAGES));
        let (mut writer, first) = CheckpointWriter::begin(MemoryBase::Earlier, limit, &[], encoder)
            .expect("an epoch has no fixed part");
        let mut sent_bytes = 0;
        for piece in first {
            sent_bytes += self.push_piece(&piece)?.1;
        }
        let mut pages = Copied(pages);
        while let Some(piece) = writer.next_pages(&mut pages, true) {
            sent_bytes += self.push_piece(&piece)?.1;
        }
        self.last = self.last.next();
        let state = EpochContent { machine, outputs: told }.encode();
        let (pieces, encoder) = writer
            .finish(self.last.position(point), &state)
            .expect("devices and held outputs are bounded far below a checkpoint's limit");
        self.encoder = Some(encoder);
        let pieces: VecDeque<_> = pieces.into();
        let mut end = EntrySequence(0);
        let mut begun = self.gate.begin_mark();
        for piece in pieces {
            if matches!(piece, CheckpointPiece::End(_)) {
                begun = self.gate.begin_mark();
            }
            let (entry, bytes) = self.push_piece(&piece)?;
            (end, sent_bytes) = (entry, sent_bytes + bytes);
        }
        self.channel.flush();
        if outputs > self.told.outputs {
            self.gate.mark(begun, end, outputs);
        }
        self.told = Told { outputs, writes };
        Ok(Sent {
            cost: Cost { rest, sending: began.elapsed(), pages: count },
            dirty_bytes: (count * PAGE_BYTES) as u64,
            sent_bytes,
        })
    }

    fn push_piece(&self, piece: &CheckpointPiece) -> Result<(EntrySequence, u64), NoBackup> {
        let bytes = piece.encode(Vec::new());
        let len = bytes.len() as u64;
        let entry = Entry::CheckpointPart { piece: piece.kind(), bytes };
        self.push(&entry).map(|sequence| (sequence, len))
    }

    /// Waits for room where there is none; the guest runs meanwhile, and its outputs wait.
    fn push(&self, entry: &Entry) -> Result<EntrySequence, NoBackup> {
        loop {
            match self.channel.push(entry) {
                Ok(sequence) => return Ok(sequence),
                Err(PrimaryPushError::Push(PushError::Full { .. })) => {
                    if self.channel.wait_room(ROOM_WAIT) == Room::NoBackup {
                        return Err(NoBackup);
                    }
                }
                Err(PrimaryPushError::NoBackup | PrimaryPushError::Push(PushError::Ended)) => {
                    return Err(NoBackup);
                }
                Err(PrimaryPushError::Push(PushError::Encode(error))) => {
                    unreachable!("pieces are made to fit the log: {error}")
                }
            }
        }
    }

    /// The machine has stopped for good: its last epoch, and the stop.
    pub(super) fn finish(
        &mut self,
        machine: &mut Machine,
        view: &WriteView,
        reason: StopReason,
    ) -> Result<(), NoBackup> {
        let taken = take(machine, view, &self.gate, &self.told);
        let point = taken.point;
        self.send(taken)?;
        self.push(&Entry::Stop { point, reason })?;
        self.channel.flush();
        Ok(())
    }
}
