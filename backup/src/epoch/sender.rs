//! Taking epochs of a machine at rest, and putting them into the log.

use super::content::{EpochContent, EpochNumber};
use crate::checkpoint::{RamPages, page_limit};
use crate::copied::CopiedPages;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_cpu::memory::{self, GuestRam, WriteView};
use vmft_log::checkpoint::{
    CheckpointPiece, CheckpointWriter, MemoryBase, PAGE_BYTES, PageEncoder, PageSource,
};
use vmft_log::entry::{Entry, EntrySequence, OutputSequence, StopReason};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::sender::PushError;
use vmft_logging_channel::transport::{PrimaryChannel, PrimaryPushError, Room};
use vmft_vmm::devices::virtio::block::completed::WriteCount;
use vmft_vmm::machine::Machine;
use vmft_vmm::outputs::{HeldOutputs, Output, OutputKind};

/// Pages of which the sender keeps what the backup has, to send only what has changed: 128 MiB. The
/// pages a guest writes again and again are far fewer.
const REMEMBERED_PAGES: usize = 32 << 10;
/// How long one wait for room may take before the session is looked at again.
const ROOM_WAIT: Duration = Duration::from_millis(50);
/// How far a backup may be behind in taking over what it is sent, before it is waited for: a failover
/// has to take all of that over.
const MOST_BEHIND: Duration = Duration::from_millis(60);
/// How long it is waited for in one epoch. A backup that is as slow as that does not hold the guest's
/// outputs back for longer.
const MOST_WAITED: Duration = Duration::from_secs(1);

/// The end of an epoch, copied out of the machine.
#[derive(Debug)]
pub(super) struct Taken {
    point: ExecutionPoint,
    machine: Vec<u8>,
    /// What it has written and was not sent while it ran.
    pages: CopiedPages,
    /// Disk writes completed up to here.
    writes: Vec<WriteCount>,
    /// Outputs made up to here.
    outputs: OutputSequence,
    told: Vec<Output>,
}

/// What a rest has brought.
#[derive(Debug)]
pub(super) enum Round {
    /// The guest has written too much to be copied at once: these pages, to be sent while it runs.
    Written(Vec<memory::PageNumber>, CopiedPages),
    /// The epoch ends here.
    Taken(Taken),
}

/// What the epochs so far have told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SentSoFar {
    /// Outputs.
    pub(super) outputs: OutputSequence,
    /// Of each disk, completed writes.
    pub(super) writes: Vec<WriteCount>,
}

/// Takes an epoch of a machine at rest: what it has written according to `view`, and the outputs and
/// completed disk writes after those `told` of. If it has written more than `limit` pages, the epoch
/// does not end yet. `room` is where pages are copied to.
pub(super) fn take(
    machine: &mut Machine,
    view: &WriteView,
    gate: &HeldOutputs,
    told: &SentSoFar,
    limit: usize,
    mut room: CopiedPages,
) -> Round {
    let written = machine.take_written(view);
    if written.len() > limit {
        return Round::Written(written, room);
    }
    room.copy(machine.ram(), &written);
    Round::Taken(taken(machine, gate, told, room))
}

fn taken(machine: &mut Machine, gate: &HeldOutputs, told: &SentSoFar, pages: CopiedPages) -> Taken {
    let state = machine.state_after(&told.writes);
    let is_kept = |output: &Output| !matches!(output.kind, OutputKind::Disk { .. });
    Taken {
        point: state.point(),
        machine: state.encode(),
        pages,
        writes: state.write_counts(),
        outputs: machine.outputs(),
        told: gate.waiting_after(told.outputs).into_iter().filter(is_kept).collect(),
    }
}

/// What an epoch came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// How long packing and handing over took, from its beginning on.
    pub(super) sending: Duration,
    /// Pages sent.
    pub(super) pages: usize,
    /// Bytes of the pages written.
    pub(super) dirty_bytes: u64,
    /// Bytes put into the log.
    pub(super) sent_bytes: u64,
}

/// Nobody is there to take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoBackup;

/// Puts epochs into the log, one after the other.
#[derive(Debug)]
pub(super) struct EpochSender {
    channel: Arc<PrimaryChannel>,
    gate: Arc<HeldOutputs>,
    /// What the backups have of the pages sent last; nothing is known at first, and of an epoch that
    /// was not sent whole.
    encoder: Option<PageEncoder>,
    last: EpochNumber,
    told: SentSoFar,
}

impl EpochSender {
    /// For backups that have the machine as it is.
    pub(super) fn new(
        channel: Arc<PrimaryChannel>,
        gate: Arc<HeldOutputs>,
        machine: &Machine,
    ) -> Self {
        let told = SentSoFar { outputs: machine.outputs(), writes: machine.write_counts() };
        Self { channel, gate, encoder: None, last: EpochNumber(0), told }
    }

    pub(super) const fn told(&self) -> &SentSoFar {
        &self.told
    }

    /// Another backup has joined, with pages of its own: from here on, nothing is sent as a change of
    /// what was sent before.
    pub(super) fn forget(&mut self) {
        self.encoder = None;
    }

    /// Begins the next epoch of a machine with this memory.
    pub(super) fn begin(&mut self, ram: &GuestRam) -> Result<Epoch<'_>, NoBackup> {
        let began = Instant::now();
        let encoder = self.encoder.take();
        let encoder = encoder.unwrap_or_else(|| PageEncoder::for_earlier(REMEMBERED_PAGES));
        let limit = page_limit(ram);
        let (writer, first) = CheckpointWriter::begin(MemoryBase::Earlier, limit, &[], encoder)
            .expect("an epoch has no fixed part");
        let mut epoch =
            Epoch { sender: self, writer, began, pages: 0, sent_bytes: 0, waited: Duration::ZERO };
        for piece in first {
            epoch.push_piece(&piece)?;
        }
        Ok(epoch)
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

    /// An epoch that ends with the machine as it is, at rest until this returns. Where.
    pub(super) fn end_at_rest(
        &mut self,
        machine: &mut Machine,
        view: &WriteView,
    ) -> Result<ExecutionPoint, NoBackup> {
        let written = machine.take_written(view);
        let taken = taken(machine, &self.gate, &self.told, CopiedPages::default());
        let point = taken.point;
        let mut epoch = self.begin(machine.ram())?;
        // At rest, its memory is as good as a copy.
        epoch.send_running(RamPages::some(machine.ram(), written))?;
        epoch.finish(taken)?;
        Ok(point)
    }

    /// The machine has stopped for good: its last epoch, and the stop.
    pub(super) fn finish(
        &mut self,
        machine: &mut Machine,
        view: &WriteView,
        reason: StopReason,
    ) -> Result<(), NoBackup> {
        let point = self.end_at_rest(machine, view)?;
        self.push(&Entry::Stop { point, reason })?;
        self.channel.flush();
        Ok(())
    }
}

/// An epoch on its way into the log. If it does not get there whole, nothing is known of what the
/// backups have.
#[derive(Debug)]
pub(super) struct Epoch<'a> {
    sender: &'a mut EpochSender,
    writer: CheckpointWriter,
    began: Instant,
    /// Pages sent, each as often as it was.
    pages: usize,
    sent_bytes: u64,
    /// For a backup that was behind.
    waited: Duration,
}

impl Epoch<'_> {
    /// Sends pages of a machine that may be running: what it writes meanwhile is to be sent again.
    pub(super) fn send_running(&mut self, mut pages: RamPages) -> Result<(), NoBackup> {
        self.pages += pages.len();
        self.send_pages(&mut pages)
    }

    fn send_pages(&mut self, pages: &mut impl PageSource) -> Result<(), NoBackup> {
        while let Some(piece) = self.writer.next_pages(pages, true) {
            self.push_piece(&piece)?;
            self.wait_taken_over();
        }
        Ok(())
    }

    /// Waits while a backup is further behind than it should be.
    fn wait_taken_over(&mut self) {
        let channel = &self.sender.channel;
        while channel.execution_lag() > MOST_BEHIND && self.waited < MOST_WAITED {
            let began = Instant::now();
            channel.wait_lag(MOST_BEHIND, ROOM_WAIT);
            self.waited += began.elapsed();
        }
    }

    /// Sends the end. The outputs made in the epoch leave when that is acknowledged. The room for copied
    /// pages comes back.
    pub(super) fn finish(mut self, taken: Taken) -> Result<(Sent, CopiedPages), NoBackup> {
        let Taken { point, machine, mut pages, writes, outputs, told } = taken;
        self.pages += pages.len();
        self.send_pages(&mut pages)?;
        let Self { sender, writer, began, pages: count, mut sent_bytes, waited: _ } = self;
        sender.last = sender.last.next();
        let state = EpochContent { machine, outputs: told }.encode();
        let (pieces, encoder) = writer
            .finish(sender.last.position(point), &state)
            .expect("devices and held outputs are bounded far below a checkpoint's limit");
        sender.encoder = Some(encoder);
        let mut end = EntrySequence(0);
        let mut begun = sender.gate.begin_mark();
        for piece in pieces {
            if matches!(piece, CheckpointPiece::End(_)) {
                begun = sender.gate.begin_mark();
            }
            let bytes;
            (end, bytes) = sender.push_piece(&piece)?;
            sent_bytes += bytes;
        }
        sender.channel.flush();
        if outputs > sender.told.outputs {
            sender.gate.mark(begun, end, outputs);
        }
        sender.told = SentSoFar { outputs, writes };
        let sent = Sent {
            sending: began.elapsed(),
            pages: count,
            dirty_bytes: (count * PAGE_BYTES) as u64,
            sent_bytes,
        };
        Ok((sent, pages))
    }

    fn push_piece(&mut self, piece: &CheckpointPiece) -> Result<(), NoBackup> {
        self.sent_bytes += self.sender.push_piece(piece)?.1;
        Ok(())
    }
}
