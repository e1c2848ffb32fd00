//! What devices ask of the world outside the machine.

use serde::{Deserialize, Serialize};
use vmft_log::entry::{Packet, RequestId};

/// One thing a device asks of the world outside the machine, in the order asked.
///
/// Outputs (console bytes, packets, disk writes and flushes) wait at the output gate; a disk read or a
/// request for entropy is no output, since nobody outside can see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// A packet for the network.
    Packet(Packet),
    /// So many random bytes are wanted.
    Entropy {
        /// The device's name for the request.
        request: RequestId,
        /// Bytes wanted, at most 4096.
        len: u32,
    },
}

/// What a disk request does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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

/// Effects in the order asked, until the run loop takes them.
///
/// Its length is bounded by what a guest can do between two exits, which is one access.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EffectQueue(Vec<Effect>);

impl EffectQueue {
    /// Adds an effect.
    pub fn push(&mut self, effect: Effect) {
        self.0.push(effect);
    }

    /// Adds a byte to the console, to the last effect if that is console output too.
    pub fn console(&mut self, byte: u8) {
        if let Some(Effect::Console(bytes)) = self.0.last_mut() {
            bytes.push(byte);
        } else {
            self.0.push(Effect::Console(vec![byte]));
        }
    }

    /// True if there is nothing to take.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes every effect, in order.
    pub fn drain(&mut self) -> std::vec::Drain<'_, Effect> {
        self.0.drain(..)
    }

    pub(crate) fn as_slice(&self) -> &[Effect] {
        &self.0
    }
}

impl From<Vec<Effect>> for EffectQueue {
    fn from(effects: Vec<Effect>) -> Self {
        Self(effects)
    }
}
