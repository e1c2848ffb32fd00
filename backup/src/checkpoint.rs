//! A machine as a checkpoint stream, and back.

use crate::join_content::JoinContent;
use crate::mirror::Taker;
use std::sync::Arc;
use vm_memory::{Address, Bytes, GuestAddress};
use vmft_cpu::memory::{self, DEVICE_HOLE_END, DEVICE_HOLE_START, GuestRam, PAGE_SIZE};
use vmft_log::checkpoint::{
    CheckpointHeader, CheckpointSink, CheckpointSource, CompleteCheckpoint, JoinSink, MemoryBase,
    PAGE_BYTES, Page, PageNumber, PageSource, SinkRefusal,
};
use vmft_log::disk_copy::{DiskPiece, DisksProgress};
use vmft_log::entry::LogPosition;
use vmft_log::point::ExecutionPoint;
use vmft_threads::Mutex;
use vmft_vmm::machine::{BootSource, Machine, MachineState, StateError};

const ZERO_PAGE: Page = [0; PAGE_BYTES];
const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE, "both sides speak of the same pages");

/// A machine at rest, as the start of a log.
#[derive(Debug)]
pub struct MachineCheckpoint {
    point: ExecutionPoint,
    fixed: Vec<u8>,
    state: Vec<u8>,
    pages: RamPages,
}

impl MachineCheckpoint {
    /// Takes the checkpoint. The machine must not run until the stream has been read to its end.
    pub fn take(machine: &mut Machine) -> Self {
        let state = machine.checkpoint();
        Self {
            point: state.point(),
            fixed: machine.boot_source().encode(),
            state: state.encode(),
            pages: RamPages::all(machine.ram()),
        }
    }
}

impl PageSource for MachineCheckpoint {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        self.pages.next_page(page)
    }
}

impl CheckpointSource for MachineCheckpoint {
    fn position(&self) -> LogPosition {
        LogPosition::start_of_log(self.point)
    }

    fn fixed(&self) -> &[u8] {
        &self.fixed
    }

    fn state(&self) -> &[u8] {
        &self.state
    }

    fn page_limit(&self) -> PageNumber {
        page_limit(&self.pages.ram)
    }
}

/// The first page number that memory lies wholly below.
pub fn page_limit(ram: &GuestRam) -> PageNumber {
    let end = ram.ranges().last().map_or(0, |(start, len)| start.raw_value() + len);
    PageNumber(end / PAGE_SIZE)
}

/// Pages of a machine's memory, read as they are asked for. The machine may run meanwhile; then
/// what is read of a page that it writes is worth nothing, and the page counts as written.
#[derive(Debug)]
pub struct RamPages {
    ram: GuestRam,
    numbers: std::vec::IntoIter<memory::PageNumber>,
}

impl RamPages {
    /// The pages `numbers`, which are memory, in ascending order.
    pub fn some(ram: &GuestRam, numbers: Vec<memory::PageNumber>) -> Self {
        Self { ram: ram.clone(), numbers: numbers.into_iter() }
    }

    /// How many are left.
    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// All pages.
    pub fn all(ram: &GuestRam) -> Self {
        let numbers = ram.ranges().into_iter().flat_map(|(start, len)| {
            let first = start.raw_value() / PAGE_SIZE;
            (first..first + len / PAGE_SIZE).map(memory::PageNumber)
        });
        Self::some(ram, numbers.collect())
    }
}

impl PageSource for RamPages {
    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        let number = self.numbers.next()?;
        self.ram
            .memory()
            .read_slice(&mut page[..], number.address())
            .expect("the machine's pages are memory");
        Some(PageNumber(number.0))
    }
}

/// Why a side could not be made ready for what it was to join.
pub(crate) type NotReady = Arc<Mutex<Option<StateError>>>;

/// A machine that is being received, within what its receiver allows. Its memory is taken as it is
/// filled: what the sender announces costs nothing, nor do pages of zeroes.
#[derive(Debug)]
pub struct MachineSink {
    /// Most bytes of memory.
    limit: u64,
    ram: Option<GuestRam>,
    /// Of a backup that stands by: its engine is open, and has taken the state.
    machine: Option<Box<Machine>>,
    /// Of such a backup: where the reason is left behind if it is not ready.
    stands_by: Option<NotReady>,
    /// Of a side that has copies of disks.
    taker: Option<Taker>,
}

impl MachineSink {
    /// For a machine with at most `limit` bytes of memory.
    pub const fn within(limit: u64) -> Self {
        Self { limit, ram: None, machine: None, stands_by: None, taker: None }
    }

    /// The same, for a backup that is kept by its primary's state, and runs nothing until it is
    /// needed. It must be ready to before it joins; if it is not, the reason is left behind.
    pub(crate) fn standing_by(limit: u64, not_ready: &NotReady) -> Self {
        Self { stands_by: Some(Arc::clone(not_ready)), ..Self::within(limit) }
    }

    /// The same, and the disks that come with it go there.
    #[must_use]
    pub(crate) fn with_disks(self, taker: Option<Taker>) -> Self {
        Self { taker, ..self }
    }

    /// Where they went.
    pub(crate) fn take_disks(&mut self) -> Option<Taker> {
        self.taker.take()
    }

    /// The machine of a complete checkpoint, whose state is this.
    fn restore(&self, fixed: &[u8], state: &[u8]) -> Result<Machine, StateError> {
        let source = BootSource::decode(fixed)?;
        let state = MachineState::decode(state)?.with_source(source);
        let ram = self.ram.clone().expect("a complete checkpoint has begun");
        Machine::restore_at_once(state, ram)
    }

    /// The machine, once the checkpoint is complete. What is in its memory was not looked at.
    ///
    /// # Errors
    /// See [`StateError`].
    pub(crate) fn into_machine_at_once(
        mut self,
        checkpoint: &CompleteCheckpoint,
    ) -> Result<Machine, StateError> {
        match self.machine.take() {
            Some(machine) => Ok(*machine),
            None => self.restore(&checkpoint.fixed, &checkpoint.state),
        }
    }

    /// The machine, once the checkpoint is complete.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn into_machine(self, checkpoint: &CompleteCheckpoint) -> Result<Machine, StateError> {
        let mut machine = self.into_machine_at_once(checkpoint)?;
        machine.prepare_digest(usize::MAX);
        Ok(machine)
    }
}

impl CheckpointSink for MachineSink {
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        if header.base != MemoryBase::Zeroes {
            return Err(SinkRefusal("it is no whole machine".to_owned()));
        }
        let end = header.page_limit.0.saturating_mul(PAGE_SIZE);
        let hole = if end > DEVICE_HOLE_START { DEVICE_HOLE_END - DEVICE_HOLE_START } else { 0 };
        let size = end.saturating_sub(hole);
        if size > self.limit {
            return Err(SinkRefusal(format!(
                "it has {size} bytes of memory, and --memory allows {} here",
                self.limit
            )));
        }
        // What a reset boots from comes in the guest's memory.
        if header.fixed_len > size {
            return Err(SinkRefusal("its kernel is larger than its memory".to_owned()));
        }
        let ram = GuestRam::new(size).map_err(|error| SinkRefusal(error.to_string()))?;
        self.ram = Some(ram);
        Ok(())
    }

    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
        let refusal = || SinkRefusal(format!("there is no page {}", number.0));
        let ram = self.ram.as_ref().ok_or_else(refusal)?;
        let address = GuestAddress(number.0.checked_mul(PAGE_SIZE).ok_or_else(refusal)?);
        if *data == ZERO_PAGE {
            let mut there = ZERO_PAGE;
            ram.memory().read_slice(&mut there, address).map_err(|_| refusal())?;
            // Reading takes no memory of the host; writing zeroes would.
            if there == ZERO_PAGE {
                return Ok(());
            }
        }
        ram.memory().write_slice(&data[..], address).map_err(|_| refusal())
    }

    fn read(&self, number: PageNumber, data: &mut Page) -> Result<(), SinkRefusal> {
        let refusal = || SinkRefusal(format!("there is no page {}", number.0));
        let ram = self.ram.as_ref().ok_or_else(refusal)?;
        let address = number.0.checked_mul(PAGE_SIZE).ok_or_else(refusal)?;
        ram.memory().read_slice(&mut data[..], GuestAddress(address)).map_err(|_| refusal())
    }
}

impl JoinSink for MachineSink {
    /// What a failover takes must be there before anybody counts on it: the engine, and that it
    /// takes the state.
    fn ready(&mut self, checkpoint: &CompleteCheckpoint) -> Result<(), SinkRefusal> {
        self.taker.as_ref().map_or(Ok(()), Taker::check_whole)?;
        let Some(not_ready) = &self.stands_by else { return Ok(()) };
        let content = JoinContent::decode(&checkpoint.state).map_err(StateError::Encoding);
        match content.and_then(|content| self.restore(&checkpoint.fixed, &content.machine)) {
            Ok(machine) => {
                self.machine = Some(Box::new(machine));
                Ok(())
            }
            Err(error) => {
                let refusal = SinkRefusal(error.to_string());
                *not_ready.lock() = Some(error);
                Err(refusal)
            }
        }
    }

    fn disk(&mut self, piece: DiskPiece) -> Result<(), SinkRefusal> {
        let none = || SinkRefusal("this side has no copies of disks".to_owned());
        self.taker.as_mut().ok_or_else(none)?.take(piece)
    }

    fn poll_disks(&mut self) -> Result<DisksProgress, SinkRefusal> {
        self.taker.as_ref().map_or_else(|| Ok(DisksProgress::none()), Taker::poll)
    }
}

#[cfg(test)]
#[path = "checkpoint_fuzz.rs"]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_cpu::memory::MIN_MEMORY;

    fn header(memory: u64) -> CheckpointHeader {
        let page_limit = PageNumber(memory / PAGE_SIZE);
        CheckpointHeader { base: MemoryBase::Zeroes, fixed_len: 1000, page_limit }
    }

    #[test]
    fn a_machine_larger_than_its_receiver_allows_is_refused() {
        let begin = |header| MachineSink::within(MIN_MEMORY).begin(&header);
        assert_eq!(begin(header(MIN_MEMORY)), Ok(()));
        for pages in [MIN_MEMORY / PAGE_SIZE + 1, 1 << 20, 1 << 52, u64::MAX] {
            let header = CheckpointHeader { page_limit: PageNumber(pages), ..header(0) };
            let refused = begin(header).expect_err("too large");
            assert!(refused.0.contains("--memory"), "{refused}");
        }
        let large = CheckpointHeader { fixed_len: MIN_MEMORY + 1, ..header(MIN_MEMORY) };
        begin(large).expect_err("a kernel that no such machine has booted");
    }

    #[test]
    fn pages_of_zeroes_take_no_memory_and_still_replace_what_was_there() {
        let mut sink = MachineSink::within(MIN_MEMORY);
        sink.begin(&header(MIN_MEMORY)).expect("allowed");
        let pages = MIN_MEMORY / PAGE_SIZE;
        for number in (0..pages).map(PageNumber) {
            sink.page(number, &ZERO_PAGE).expect("there");
        }
        let ram = sink.ram.as_ref().expect("begun");
        assert!(ram.tracker().take_written().is_empty(), "nothing was written");
        sink.page(PageNumber(7), &[1; PAGE_BYTES]).expect("there");
        sink.page(PageNumber(7), &ZERO_PAGE).expect("there");
        let mut there = [1; PAGE_BYTES];
        sink.read(PageNumber(7), &mut there).expect("there");
        assert!(there == ZERO_PAGE);
        sink.page(PageNumber(pages), &ZERO_PAGE).expect_err("no such page");
    }
}
