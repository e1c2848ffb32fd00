//! The exit stream: what the guest left the CPU for, one record an exit.
//!
//! Where points are exits, two sides that agree have the same records; the first that differs is
//! the first moment at which anything could be seen of a difference. How records travel and are
//! compared is the inputs' affair.

use super::{Bus, PortWidth};
use vmft_log::point::{Branches, ExecutionPoint};

/// What an exit was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExitReason {
    /// `HLT`.
    #[default]
    Halt,
    /// A model-specific register, whose number and value are in the general registers.
    Register,
    /// `IN`, or the string instruction.
    PortRead,
    /// `OUT`, or the string instruction.
    PortWrite,
    /// A load from a device's memory.
    DeviceRead,
    /// A store to a device's memory.
    DeviceWrite,
}

/// RFLAGS.RF, which says how an instruction was entered and not what it does.
const RESUME_FLAG: u64 = 1 << 16;

/// The records of an engine's exits.
pub trait ExitStream {
    /// From now on records are kept for [`Self::take_exits`], or not; what was kept is forgotten.
    fn watch_exits(&mut self, wanted: bool);

    /// Moves the records of the exits since the last call to `into`.
    fn take_exits(&mut self, into: &mut Vec<ExitRecord>);
}

/// One deterministic exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExitRecord {
    /// Why.
    pub reason: ExitReason,
    /// Bytes of one access; 0 if there was none.
    pub width: u8,
    /// The port, or the physical address; 0 if there is none. The first of several.
    pub address: u64,
    /// What was read or written; of several items, a mixture of all.
    pub data: u64,
    /// Branches retired since the exit before, where they are counted.
    pub branches: Branches,
    /// The general registers RAX to R15 in hardware order, RIP and RFLAGS, when the guest left:
    /// what the instruction reads is not in them yet.
    pub registers: [u64; 18],
}

impl ExitRecord {
    /// A record of what the bus saw.
    pub fn new(reason: ExitReason, access: Access, mut registers: [u64; 18]) -> Self {
        registers[17] &= !RESUME_FLAG;
        // KVM comes back for a store behind the instruction, or in front of it, as it likes.
        if matches!(reason, ExitReason::DeviceWrite | ExitReason::DeviceRead) {
            registers[16] = 0;
        }
        Self {
            reason,
            width: access.width,
            address: access.address,
            data: access.data,
            branches: Branches::default(),
            registers,
        }
    }
}

/// What one instruction did at the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Access {
    /// What it was; the first of several. `None` if it did nothing there.
    pub reason: Option<ExitReason>,
    width: u8,
    address: u64,
    data: u64,
}

/// A bus that is watched.
pub struct WatchedBus<'a> {
    bus: &'a mut dyn Bus,
    access: Access,
}

impl std::fmt::Debug for WatchedBus<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatchedBus").field("access", &self.access).finish_non_exhaustive()
    }
}

impl<'a> WatchedBus<'a> {
    /// Watches `bus`, at which nothing has been done yet.
    pub fn new(bus: &'a mut dyn Bus) -> Self {
        Self { bus, access: Access::default() }
    }

    /// What was done at the bus since.
    pub fn access(&self) -> Access {
        self.access
    }

    fn see(&mut self, reason: ExitReason, address: u64, width: usize, data: u64) {
        let access = &mut self.access;
        if access.reason.is_none() {
            access.reason = Some(reason);
            access.address = address;
            access.width = width as u8;
            access.data = data;
        } else {
            // Any mixture that depends on the order will do.
            access.data = access.data.rotate_left(7).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ data;
        }
    }
}

fn word(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..data.len().min(8)].copy_from_slice(&data[..data.len().min(8)]);
    u64::from_le_bytes(bytes)
}

impl Bus for WatchedBus<'_> {
    fn port_read(&mut self, at: ExecutionPoint, port: u16, width: PortWidth) -> u32 {
        let value = self.bus.port_read(at, port, width);
        self.see(ExitReason::PortRead, port.into(), width.bytes(), value.into());
        value
    }

    fn port_write(&mut self, at: ExecutionPoint, port: u16, width: PortWidth, value: u32) {
        self.bus.port_write(at, port, width, value);
        let value = u64::from(value) & (u64::MAX >> (64 - 8 * width.bytes()));
        self.see(ExitReason::PortWrite, port.into(), width.bytes(), value);
    }

    fn memory_read(&mut self, at: ExecutionPoint, address: u64, data: &mut [u8]) {
        self.bus.memory_read(at, address, data);
        self.see(ExitReason::DeviceRead, address, data.len(), word(data));
    }

    fn memory_write(&mut self, at: ExecutionPoint, address: u64, data: &[u8]) {
        self.bus.memory_write(at, address, data);
        self.see(ExitReason::DeviceWrite, address, data.len(), word(data));
    }

    fn time_stamp(&mut self, at: ExecutionPoint) -> u64 {
        self.bus.time_stamp(at)
    }
}

/// The records of exits that nobody has taken yet; none are kept unless somebody wants them.
#[derive(Debug, Default)]
pub struct ExitLog {
    records: Vec<ExitRecord>,
    wanted: bool,
}

impl ExitLog {
    /// Whether records are wanted.
    pub fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// From now on records are wanted, or not.
    pub fn want(&mut self, wanted: bool) {
        self.wanted = wanted;
        self.records.clear();
    }

    /// Keeps a record, if records are wanted.
    pub fn push(&mut self, record: ExitRecord) {
        if self.wanted {
            self.records.push(record);
        }
    }

    /// Moves the records to `into`.
    pub fn take(&mut self, into: &mut Vec<ExitRecord>) {
        into.append(&mut self.records);
    }
}
