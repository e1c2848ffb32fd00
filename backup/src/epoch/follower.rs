//! A backup's copy of the machine, brought up to each whole epoch.

use super::content::{EpochContent, EpochNumber};
use crate::mirror::Mirrors;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmft_cpu::memory::{GuestRam, PAGE_SIZE};
use vmft_log::checkpoint::{
    CheckpointError, CheckpointPiece, CheckpointReader, CompleteCheckpoint, Page, PageBase,
    PageNumber, PieceKind, SinkRefusal, StagedPages,
};
use vmft_log::point::{ExecutionPoint, VirtualTime};
use vmft_log::wire::DecodeError;
use vmft_vmm::devices::virtio::block::completed::CompletedWrites;
use vmft_vmm::machine::{Machine, MachineState, StateError};
use vmft_vmm::outputs::{Output, are_a_guests};

/// Why an epoch is refused. The copy is as it was after the one before.
#[derive(Debug, thiserror::Error)]
pub(super) enum EpochError {
    /// A piece cannot be read.
    #[error("a piece of an epoch cannot be read")]
    Piece(#[source] DecodeError),
    /// The pieces do not make a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An epoch is missing, or came twice.
    #[error("epoch {} came after {}", found.0, last.0)]
    Number { last: EpochNumber, found: EpochNumber },
    /// Its state cannot be read.
    #[error("the state of an epoch cannot be decoded")]
    Content(#[source] postcard::Error),
    /// Its state is no machine's.
    #[error(transparent)]
    State(#[from] StateError),
    /// The guest's past would change.
    #[error("an epoch at point {found} came after one at {last}")]
    Point { last: ExecutionPoint, found: ExecutionPoint },
    /// Writes are missing of which a copy of a disk has not heard.
    #[error("an epoch does not tell of all writes to disk {disk}")]
    Gap { disk: usize },
    /// It is another machine's.
    #[error("an epoch is of a machine made otherwise")]
    Config,
}

/// Memory, as pages of a checkpoint change it.
#[derive(Debug, Clone)]
struct RamBase(GuestRam);

impl PageBase for RamBase {
    fn page_limit(&self) -> PageNumber {
        crate::checkpoint::page_limit(&self.0)
    }

    fn has(&self, number: PageNumber) -> bool {
        number.0.checked_mul(PAGE_SIZE).is_some_and(|address| {
            let memory = self.0.memory();
            memory.check_range(GuestAddress(address), PAGE_SIZE as usize)
        })
    }

    fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal> {
        let refusal = || SinkRefusal(format!("there is no page {}", number.0));
        let address = number.0.checked_mul(PAGE_SIZE).ok_or_else(refusal)?;
        self.0.memory().read_slice(&mut data[..], GuestAddress(address)).map_err(|_| refusal())
    }
}

/// A failover is rehearsed at the first epoch and at each so many: what an engine cannot go on from is found out while
/// there is a primary to join again, and the engine stays warm.
const REHEARSE_EVERY: u64 = 16;

/// The machine as it was at the last whole epoch, and what has come of the next.
#[derive(Debug)]
pub(super) struct EpochFollower {
    /// Open, with the memory; the rest of it is that of some earlier epoch.
    machine: Machine,
    ram: GuestRam,
    state: MachineState,
    reader: CheckpointReader,
    staged: StagedPages<RamBase>,
    /// The last epoch applied; none since this side joined, if none.
    last: Option<EpochNumber>,
    epochs: u64,
    /// This side's copies of disks, which are brought up to each epoch as well.
    mirrors: Arc<Mirrors>,
}

impl EpochFollower {
    /// The machine as a join has brought it, from this checkpoint.
    pub(super) fn new(
        machine: Machine,
        checkpoint: &CompleteCheckpoint,
    ) -> Result<Self, StateError> {
        let ram = machine.ram().clone();
        let state = MachineState::decode(&checkpoint.state)?;
        let staged = StagedPages::new(RamBase(ram.clone()));
        let reader = CheckpointReader::new();
        let mirrors = Arc::default();
        Ok(Self { machine, ram, state, reader, staged, last: None, epochs: 0, mirrors })
    }

    /// The same, of a side that has copies of disks.
    pub(super) fn with_mirrors(self, mirrors: Arc<Mirrors>) -> Self {
        Self { mirrors, ..self }
    }

    pub(super) const fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Console bytes written by the guest so far.
    pub(super) fn console_offset(&self) -> u64 {
        self.state.console_offset()
    }

    pub(super) fn point(&self) -> ExecutionPoint {
        self.state.point()
    }

    /// Guest time there.
    pub(super) fn time(&self) -> VirtualTime {
        self.state.time()
    }

    /// Epochs applied.
    pub(super) const fn epochs(&self) -> u64 {
        self.epochs
    }

    /// Takes a piece. If it makes an epoch whole, that is applied, and its outputs are given: all of it,
    /// or nothing.
    pub(super) fn handle_piece(
        &mut self,
        piece: PieceKind,
        bytes: &[u8],
    ) -> Result<Option<Vec<Output>>, EpochError> {
        let piece = CheckpointPiece::decode(piece, bytes).map_err(EpochError::Piece)?;
        match self.reader.handle_piece(piece, &mut self.staged)? {
            None => Ok(None),
            Some(checkpoint) => self.apply(&checkpoint).map(Some),
        }
    }

    fn apply(&mut self, checkpoint: &CompleteCheckpoint) -> Result<Vec<Output>, EpochError> {
        let found = EpochNumber::of(checkpoint.position);
        if let Some(last) = self.last.filter(|last| found != last.next()) {
            return Err(EpochError::Number { last, found });
        }
        let content = EpochContent::decode(&checkpoint.state).map_err(EpochError::Content)?;
        let state = MachineState::decode(&content.machine)?;
        if state.config() != self.state.config() {
            return Err(EpochError::Config);
        }
        let (last, found_point) = (self.state.point(), state.point());
        if found_point < last || checkpoint.position.point != found_point {
            return Err(EpochError::Point { last, found: found_point });
        }
        if !are_a_guests(&content.outputs, state.outputs()) {
            return Err(StateError::OtherMachine.into());
        }
        let told = state.completed_writes().to_vec();
        self.check_gap(&told)?;
        let state = state.with_earlier_writes(self.state.completed_writes())?;
        if self.epochs.is_multiple_of(REHEARSE_EVERY) {
            // Memory does not matter to it, and is still that of the epoch before.
            self.machine.become_state(&state)?;
        }
        // Everything is checked: from here on nothing can fail.
        for (number, page) in self.staged.pages() {
            self.ram
                .memory()
                .write_slice(&page[..], GuestAddress(number.0 * PAGE_SIZE))
                .expect("a page that could be staged is memory");
        }
        self.staged.clear();
        self.complete_writes(&told, &state);
        self.state = state;
        self.last = Some(found);
        self.epochs += 1;
        Ok(content.outputs)
    }

    /// A side with copies needs every write that was completed, also of those that a flush has covered since.
    fn check_gap(&self, told: &[CompletedWrites]) -> Result<(), EpochError> {
        let had = self.state.completed_writes();
        let is_gap = told.iter().zip(had).position(|(told, had)| told.before > had.end());
        match is_gap.filter(|_| !self.mirrors.is_empty()) {
            Some(disk) => Err(EpochError::Gap { disk }),
            None => Ok(()),
        }
    }

    /// Has this side's copies brought up to the epoch, whose end is `state` and which told of these writes.
    fn complete_writes(&self, told: &[CompletedWrites], state: &MachineState) {
        let had = self.state.completed_writes();
        let disks = (0u8..).zip(told.iter().zip(had).zip(state.completed_writes()));
        for (disk, ((told, had), now)) in disks {
            // Of one that has joined meanwhile, some may have come with the join.
            let known =
                usize::try_from(had.end().0.saturating_sub(told.before.0)).unwrap_or(usize::MAX);
            let new: Vec<_> = told.writes.iter().skip(known).cloned().collect();
            self.mirrors.completed_by_epoch(disk, &new, now.before > had.before);
        }
    }

    /// The machine at the last whole epoch; what has come of another is dropped. The time this takes does not depend on
    /// its memory.
    pub(super) fn into_machine(self) -> Result<Machine, StateError> {
        let Self { mut machine, state, .. } = self;
        machine.become_state(&state)?;
        Ok(machine)
    }
}

#[cfg(test)]
#[path = "follower_tests.rs"]
mod tests;
