//! A machine as a checkpoint stream, and back.

use vm_memory::{Address, Bytes, GuestAddress};
use vmft_logging_channel::checkpoint::{
    CheckpointHeader, CheckpointSink, CheckpointSource, CompleteCheckpoint, PAGE_BYTES, Page,
    PageNumber, SinkRefusal,
};
use vmft_logging_channel::point::ExecutionPoint;
use vmft_vmm::machine::{Machine, MachineState, StateError};
use vmft_vmm::memory::{self, DEVICE_HOLE_END, DEVICE_HOLE_START, GuestRam, PAGE_SIZE};

const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE, "both sides speak of the same pages");

/// A machine at rest, as the start of a log.
#[derive(Debug)]
pub struct MachineCheckpoint {
    point: ExecutionPoint,
    state: Vec<u8>,
    ram: GuestRam,
    pages: std::vec::IntoIter<memory::PageNumber>,
}

impl MachineCheckpoint {
    /// Takes the checkpoint. The machine must not run until the stream has been read to its end.
    pub fn take(machine: &mut Machine) -> Self {
        let state = machine.checkpoint();
        Self {
            point: state.point(),
            state: state.encode(),
            ram: machine.ram().clone(),
            pages: machine.nonzero_pages().into_iter(),
        }
    }
}

impl CheckpointSource for MachineCheckpoint {
    fn point(&self) -> ExecutionPoint {
        self.point
    }

    fn state(&self) -> &[u8] {
        &self.state
    }

    fn page_limit(&self) -> PageNumber {
        let end = self.ram.ranges().last().map_or(0, |(start, len)| start.raw_value() + len);
        PageNumber(end / PAGE_SIZE)
    }

    fn next_page(&mut self, page: &mut Page) -> Option<PageNumber> {
        let number = self.pages.next()?;
        self.ram
            .memory()
            .read_slice(&mut page[..], number.address())
            .expect("the machine's pages are memory");
        Some(PageNumber(number.0))
    }
}

/// The memory of a machine that is being received.
#[derive(Debug, Default)]
pub struct MachineSink {
    ram: Option<GuestRam>,
}

impl MachineSink {
    /// The machine, once the checkpoint is complete.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn into_machine(self, checkpoint: &CompleteCheckpoint) -> Result<Machine, StateError> {
        let state = MachineState::decode(&checkpoint.state)?;
        let ram = self.ram.expect("a complete checkpoint has begun");
        Machine::restore(state, ram)
    }
}

impl CheckpointSink for MachineSink {
    fn begin(&mut self, header: &CheckpointHeader) -> Result<(), SinkRefusal> {
        let end = header.page_limit.0.saturating_mul(PAGE_SIZE);
        let hole = if end > DEVICE_HOLE_START { DEVICE_HOLE_END - DEVICE_HOLE_START } else { 0 };
        let size = end.saturating_sub(hole);
        let ram = GuestRam::new(size).map_err(|error| SinkRefusal(error.to_string()))?;
        self.ram = Some(ram);
        Ok(())
    }

    fn page(&mut self, number: PageNumber, data: &Page) -> Result<(), SinkRefusal> {
        let refusal = || SinkRefusal(format!("there is no page {}", number.0));
        let ram = self.ram.as_ref().ok_or_else(refusal)?;
        let address = number.0.checked_mul(PAGE_SIZE).ok_or_else(refusal)?;
        ram.memory().write_slice(&data[..], GuestAddress(address)).map_err(|_| refusal())
    }
}
