//! What a guest boots from.

use super::StateError;
use crate::boot::{self, BootError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use vmft_cpu::memory::GuestRam;
use vmft_cpu::{CpuCount, CpuState};

/// What the guest boots from; kept, because a reset boots from it again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BootSource {
    /// The kernel file.
    pub kernel: Arc<[u8]>,
    /// The initramfs file.
    pub initramfs: Option<Arc<[u8]>>,
    /// The kernel command line.
    pub cmdline: String,
    /// All this came from a disk, and a reset boots what the disks have then.
    pub disk: Option<DiskBoot>,
}

/// How a guest boots from its disks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskBoot {
    /// The entry of the menu, by name or number; else the menu's default.
    pub entry: Option<String>,
    /// What comes in front of the entry's own command line.
    pub before: String,
    /// What comes behind it.
    pub after: String,
}

/// Reads a value that takes up all of `bytes`.
pub(super) fn decode_all<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, StateError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(StateError::Encoding(postcard::Error::DeserializeBadEncoding)),
        Err(error) => Err(StateError::Encoding(error)),
    }
}

impl BootSource {
    /// The encoded form.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain state always encodes")
    }

    /// Reads the encoded form.
    ///
    /// # Errors
    /// [`StateError::Encoding`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        decode_all(bytes)
    }

    /// Loads the kernel into the memory of a machine with so many CPUs.
    ///
    /// # Errors
    /// See [`BootError`].
    pub(super) fn load(&self, ram: &GuestRam, cpus: CpuCount) -> Result<CpuState, BootError> {
        let cpu = boot::load(ram, &self.kernel, self.initramfs.as_deref(), &self.cmdline)?;
        boot::publish_acpi(ram, cpus);
        Ok(cpu)
    }
}
