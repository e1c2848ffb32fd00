//! Virtio devices (Virtual I/O Device specification 1.2) on PCI, without MSI-X.
//!
//! [`transport`] is what every device has: configuration, feature negotiation, queues,
//! interrupt. A device is a [`VirtioDevice`]; it reaches its queues and guest memory through a
//! [`QueueAccess`], which it has only while the guest has exited or an arrival is delivered. So
//! a request is copied out at the exit that starts it and its result is copied in when its
//! completion arrives; no other moment touches guest memory.
//!
//! A queue that breaks the rules is a [`QueueFault`]: the device stops, asks the driver for a
//! reset, and the fault is reported. Requests already sent out stay known as *abandoned* until
//! their completions come.

pub mod block;
pub mod entropy;
pub mod net;
pub mod queue;
pub mod transport;

mod common_config;

use super::InvalidState;
use crate::board::EffectQueue;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use vmft_cpu::memory::GuestMemoryMmap;

pub use queue::{Chain, QueueAccess, QueueFault, Segment};
pub use transport::{VirtioPci, VirtioPciState};

/// A kind of device, as the guest's drivers know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceKind {
    /// Virtio device type (specification §5).
    pub virtio_type: u16,
    /// PCI class, subclass and programming interface.
    pub pci_class: u32,
}

/// Which device of the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceName {
    /// A disk, by its place on the command line.
    Disk(u8),
    /// The entropy source.
    Entropy,
    /// The network device.
    Network,
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(disk) => write!(f, "disk {disk}"),
            Self::Entropy => f.write_str("entropy device"),
            Self::Network => f.write_str("network device"),
        }
    }
}

/// A device that stopped because its driver broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{device} stopped until its driver resets it")]
pub struct DeviceFault {
    /// Which device.
    pub device: DeviceName,
    /// What the driver did.
    #[source]
    pub fault: QueueFault,
}

/// What an access to a device may reach beyond the device.
#[derive(Debug)]
pub struct DeviceContext<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemoryMmap,
    /// Where requests to the outside world go.
    pub effects: &'a mut EffectQueue,
    /// Where broken queues are reported.
    pub faults: &'a mut Vec<DeviceFault>,
}

/// What differs from one virtio device to the next.
pub trait VirtioDevice: fmt::Debug {
    /// What [`Self::save`] returns.
    type State: fmt::Debug + Clone + PartialEq + Eq + Serialize + DeserializeOwned;

    /// Type and class.
    fn kind(&self) -> DeviceKind;

    /// Which device of the board it is.
    fn name(&self) -> DeviceName;

    /// Device-specific feature bits it offers.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device-specific configuration, read-only to the guest.
    fn config_space(&self) -> &[u8];

    /// The driver has put buffers into `queue`, which is ready.
    ///
    /// # Errors
    /// What is wrong with the queue; the device is stopped.
    fn notify(&mut self, queue: usize, access: &mut QueueAccess<'_>) -> Result<(), QueueFault>;

    /// Forgets every request, except that those sent out are remembered as abandoned. Called
    /// when the driver resets the device and when the device is stopped.
    fn abandon(&mut self);

    /// Everything a restored device needs beyond its configuration.
    fn save(&self) -> Self::State;

    /// Takes over a saved state. `queue_sizes` are the sizes in force; `stopped` says that no
    /// request may be live.
    ///
    /// # Errors
    /// [`InvalidState`] if it cannot be; the device is then not to be used.
    fn restore(
        &mut self,
        state: &Self::State,
        queue_sizes: &[u16],
        stopped: bool,
        memory: &GuestMemoryMmap,
    ) -> Result<(), InvalidState>;
}
