//! The one door out.
//!
//! Everything the outside world can see leaves through an [`OutputGate`]. A live side has
//! [`HeldOutputs`]: open, it lets outputs out at once; protecting, it holds each until the log
//! entry that marks it is acknowledged. A replaying side has [`KeptOutputs`]: it keeps outputs
//! until the primary is known to have released them, so that none is lost at a failover.

mod held;
mod kept;
mod queue;
mod recent;

pub use held::{
    Assurance, DelayStatistics, HeldOutputs, MarkBegun, Outside, WaitingBytes, WaitsFor,
};
pub use kept::KeptOutputs;
pub use recent::RecentOutputs;

use crate::board::DiskOperation;
use crate::devices::virtio::net::is_good;
use serde::{Deserialize, Serialize};
use vmft_log::entry::{OutputSequence, Packet, RequestId};
use vmft_log::wire::MAX_COUNT;

/// Memory that console bytes and disk requests may take that wait, at the gate and outside, in bytes; beyond
/// it the guest is stopped until some have left. So a backup never keeps more either: what it keeps is what
/// its primary has not said to be out. Far more than is on its way within a round trip, or while somebody
/// looks at a terminal that is stopped. Packets have bounds of their own, and are lost beyond them.
pub const OUTPUT_BYTES_LIMIT: usize = 16 << 20;

/// Memory that an output takes beside its bytes.
const OVERHEAD: usize = 128;

/// Something the outside world will see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Its place in the guest's history of outputs.
    pub sequence: OutputSequence,
    /// What it is.
    pub kind: OutputKind,
}

/// The kinds of outputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputKind {
    /// Console bytes.
    Console {
        /// How many bytes the guest wrote before these.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A packet to the network.
    Packet(Packet),
    /// A disk write or flush.
    Disk {
        /// Which disk.
        disk: u8,
        /// The device's name for the request.
        request: RequestId,
        /// What to do.
        operation: DiskOperation,
    },
}

/// True if these can be what a guest has put out, but for disk requests, up to `last`: they come from whoever
/// has run it before.
pub fn are_a_guests(outputs: &[Output], last: OutputSequence) -> bool {
    let can_be = |output: &Output| match &output.kind {
        OutputKind::Console { offset, bytes } => {
            let end = offset.checked_add(bytes.len() as u64);
            end.is_some_and(|end| end <= MAX_COUNT)
        }
        OutputKind::Packet(packet) => is_good(packet),
        OutputKind::Disk { .. } => false,
    };
    outputs.is_sorted_by(|one, next| one.sequence < next.sequence)
        && outputs.last().is_none_or(|output| output.sequence <= last)
        && outputs.iter().all(can_be)
}

/// Where the machine puts its outputs.
pub trait OutputGate {
    /// Takes an output. Sequences are consecutive.
    fn emit(&self, output: Output);
}
