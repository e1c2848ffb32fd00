//! What a board is made of.

use super::MAX_DISKS;
use crate::devices::InvalidState;
use crate::devices::virtio::block::{SECTOR_SIZE, SERIAL_LEN};
use crate::devices::virtio::net::addresses::MacAddress;
use serde::{Deserialize, Serialize};
use vmft_cpu::CpuCount;

/// Seconds since 1970-01-01 00:00 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct UnixSeconds(pub i64);

/// A length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Bytes(pub u64);

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Its size: a whole number of 512-byte sectors, at least one.
    pub capacity: Bytes,
    /// The guest may not write to it.
    pub read_only: bool,
    /// What the guest reads as its serial number: at most 20 bytes of ASCII.
    pub serial: String,
}

/// The network device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// The guest may leave checksums and the cutting of large packets to the outside world, and takes
    /// packets that are left so.
    pub offloads: bool,
}

/// Everything about a board that both sides of a pair must agree on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardConfig {
    /// Size of the guest's memory.
    pub memory: Bytes,
    /// What the clock shows at power-on.
    pub clock_base: UnixSeconds,
    /// The disks, in command-line order.
    pub disks: Vec<DiskConfig>,
    /// Whether there is an entropy device.
    pub entropy: bool,
    /// The network device, if there is one.
    pub net: Option<NetConfig>,
    /// CPUs the board carries.
    pub cpus: CpuCount,
}

/// Why a board cannot be built or restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BoardError {
    /// There are more disks than slots for them.
    #[error("{count} disks are more than the {} a machine can have", MAX_DISKS)]
    TooManyDisks {
        /// Disks asked for.
        count: usize,
    },
    /// A disk's size is no number of sectors.
    #[error("disk {disk} has {} bytes, which is not a positive multiple of {SECTOR_SIZE}", capacity.0)]
    DiskCapacity {
        /// Which disk.
        disk: usize,
        /// Its size.
        capacity: Bytes,
    },
    /// A disk's serial number does not fit.
    #[error("disk {disk} has a serial number that is not ASCII of at most {SERIAL_LEN} bytes")]
    DiskSerial {
        /// Which disk.
        disk: usize,
    },
    /// The network device's address is no station's.
    #[error("{mac} is no Ethernet address of one station")]
    NetAddress {
        /// The address.
        mac: MacAddress,
    },
    /// The memory given is not the memory configured.
    #[error("the board is configured for {} bytes of memory, but is given {}", configured.0, given.0)]
    Memory {
        /// Bytes in the configuration.
        configured: Bytes,
        /// Bytes of the memory.
        given: Bytes,
    },
    /// A saved state is not one of this board.
    #[error("the saved board cannot be restored")]
    State(#[from] InvalidState),
}

impl BoardConfig {
    /// Checks the limits that can be checked without memory.
    ///
    /// # Errors
    /// The first limit broken.
    pub fn validate(&self) -> Result<(), BoardError> {
        let count = self.disks.len();
        if count > MAX_DISKS {
            return Err(BoardError::TooManyDisks { count });
        }
        for (disk, config) in self.disks.iter().enumerate() {
            let DiskConfig { capacity, read_only: _, serial } = config;
            if capacity.0 == 0 || !capacity.0.is_multiple_of(SECTOR_SIZE) {
                return Err(BoardError::DiskCapacity { disk, capacity: *capacity });
            }
            if serial.len() > SERIAL_LEN || !serial.is_ascii() {
                return Err(BoardError::DiskSerial { disk });
            }
        }
        match self.net {
            Some(NetConfig { mac, .. }) if !mac.is_station() => Err(BoardError::NetAddress { mac }),
            _ => Ok(()),
        }
    }
}
