//! What keeps an instruction from simply completing.
//!
//! A handler that meets one of these leaves the state as before the instruction (or, for a
//! string instruction, as before its next iteration), records the event in the CPU and
//! returns [`Trap`]; the run loop decides. An access to the bus is such an event too: the run
//! loop performs it, keeps the answer, and executes the instruction again, which now finds the
//! answer waiting. So nothing below the run loop needs to know the bus.

use super::exception::Exception;
use crate::PortWidth;

/// The instruction did not complete; the reason is in the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trap;

/// What a handler returns.
pub(super) type Flow = Result<(), Trap>;

/// The reason for a [`Trap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Event {
    /// Nothing happened.
    #[default]
    None,
    /// A fault.
    Exception(Exception),
    /// A non-canonical address: `#SS(0)` or `#GP(0)`, by the kind of operand.
    NonCanonical,
    /// `INT n`, `INT3`, `INT1`: to be delivered after the instruction.
    Interrupt {
        /// The vector.
        vector: u8,
        /// The gate's privilege does not matter (`INT1`).
        privileged: bool,
    },
    /// A debug register was to be accessed while DR7.GD forbids it.
    GeneralDetect,
    /// The bus is needed.
    Bus(BusRequest),
    /// A store hits decoded instructions.
    CodeWrite,
    /// The engine lacks something the CPU model promises.
    Missing(&'static str),
}

/// One access to what lies outside CPU and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BusRequest {
    /// `IN`, `INS`.
    PortRead {
        /// Port number.
        port: u16,
        /// Width.
        width: PortWidth,
    },
    /// `OUT`, `OUTS`.
    PortWrite {
        /// Port number.
        port: u16,
        /// Width.
        width: PortWidth,
        /// Value, zero-extended.
        value: u32,
    },
    /// A load from a device.
    MemoryRead {
        /// Physical address.
        address: u64,
        /// Bytes, at most 8.
        len: u8,
    },
    /// A store to a device.
    MemoryWrite {
        /// Physical address.
        address: u64,
        /// Bytes, at most 8.
        len: u8,
        /// The bytes, little endian.
        value: u64,
    },
    /// The time-stamp counter.
    TimeStamp,
}

/// What is remembered while one instruction is executed again.
#[derive(Debug, Clone, Default)]
pub(super) struct Restart {
    /// What the bus answered to this instruction's requests, in order.
    answers: Vec<u64>,
    /// How many of them the current attempt has used.
    used: usize,
    /// Stores may change decoded instructions.
    pub(super) code_writes: bool,
    /// Iterations of a string instruction completed by earlier attempts.
    pub(super) iterations: u64,
    /// Requests are answered as if nothing were there (event delivery).
    pub(super) detached: bool,
}

impl Restart {
    /// Begins another attempt of the same instruction.
    pub(super) fn again(&mut self) {
        self.used = 0;
    }

    /// Keeps the answer to the request that ended the last attempt.
    pub(super) fn answer(&mut self, value: u64) {
        self.answers.push(value);
    }

    /// The next answer, if it is there.
    pub(super) fn take(&mut self) -> Option<u64> {
        let answer = self.answers.get(self.used).copied();
        self.used += usize::from(answer.is_some());
        answer
    }

    /// True if the instruction has been answered by the bus.
    pub(super) fn used_bus(&self) -> bool {
        !self.answers.is_empty()
    }

    /// The instruction is over.
    pub(super) fn finish(&mut self) {
        self.answers.clear();
        *self = Self { answers: std::mem::take(&mut self.answers), ..Self::default() };
    }
}
