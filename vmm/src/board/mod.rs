//! The devices around the CPU: a small PC that a stock distribution kernel boots.
//!
//! A device is a deterministic function of what the guest does to it and of the arrivals it is
//! given. It sees guest memory, an interrupt line and the moment of guest time it is called at;
//! never a clock, a socket, a file or a thread. What it wants from the outside world it says
//! with an [`Effect`].

use vmft_logging_channel::entry::RequestId;

/// One thing a device asks of the world outside the machine, in the order asked.
///
/// Outputs (console bytes, disk writes and flushes) wait at the output gate; a disk read or a
/// wish for entropy is no output, since nobody outside can see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Bytes written to the serial console.
    Console(Vec<u8>),
    /// A disk request, copied out of guest memory.
    Disk {
        /// Which disk, in command-line order.
        disk: u8,
        /// The device's name for it.
        request: RequestId,
        /// What to do.
        operation: DiskOperation,
    },
    /// So many random bytes are wanted.
    Entropy {
        /// The device's name for the request.
        request: RequestId,
        /// Bytes wanted, at most 4096.
        len: u32,
    },
}

/// What a disk request does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskOperation {
    /// Read bytes.
    Read {
        /// Byte offset on the disk.
        offset: u64,
        /// Bytes to read.
        len: u32,
    },
    /// Write bytes.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// What to write.
        data: Vec<u8>,
    },
    /// Make every completed write durable.
    Flush,
}
