//! Which kernels may be followed on an engine that runs guests on the host's CPU.
//!
//! Stock KVM cannot trap everything a kernel could execute whose result differs from host to host:
//! the time stamp counter it never traps, random numbers it cannot trap on every CPU. So a kernel is
//! followed there only if its image says that it was made to do without (an ELF note), and if none
//! of these instructions is found in its code. [`vouch`] is what a recipe does to a kernel it has
//! built; [`examine`] is what the machine does before it lets a kernel be followed, again.
//!
//! **How the code is read.** Every executable section is decoded from its start and from every
//! symbol in it up to the next one, so that bytes between functions cannot put the decoder out of
//! step; the replacements that a kernel copies over its own code at boot are such a section too. An
//! image without sections is read segment by segment. What is found is an instruction the decoder
//! sees, so the check is against oversight, not against a kernel that hides its code: a kernel that
//! loads modules or rewrites itself is not what the note promises.
//!
//! What user space executes cannot be examined: of that, the kernel answers the time stamp counter,
//! and the CPU model hides the rest.

#![forbid(unsafe_code)]

mod note;
mod scan;

use std::fmt;

pub use note::{VOUCHER_LEVEL_ZERO, VOUCHER_LOCKSTEP, VOUCHER_NAME, VOUCHER_NONE};

/// What was read of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Examination {
    /// Bytes of code.
    pub bytes: u64,
    /// Instructions in them.
    pub instructions: u64,
}

impl fmt::Display for Examination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} instructions in {} KiB of code", self.instructions, self.bytes >> 10)
    }
}

/// An instruction that must not be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Its name, `RDTSC`.
    pub instruction: String,
    /// Its address in the kernel.
    pub address: u64,
    /// The function it is in, or the nearest before it, where the image has names.
    pub function: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}", self.instruction, self.address)?;
        match &self.function {
            Some(function) => write!(f, " in {function}"),
            None => Ok(()),
        }
    }
}

/// Why a kernel is not vouched for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// The image is no ELF file for x86-64, or damaged.
    #[error("the kernel image cannot be examined: {0}")]
    Image(String),
    /// It was not made to be followed.
    #[error("the kernel has no note that it was made to be followed")]
    NoNote,
    /// It holds what differs from host to host.
    #[error(
        "the kernel's code has {count} instruction(s) whose results differ from host to host, the first is {first}"
    )]
    Forbidden {
        /// How many.
        count: usize,
        /// The first, by address in the image.
        first: Finding,
    },
}

/// Examines the ELF image of a kernel that has the note [`VOUCHER_LOCKSTEP`].
///
/// # Errors
/// [`GateError`] if it has no such note, or if its code has what the note denies.
pub fn examine(vmlinux: &[u8]) -> Result<Examination, GateError> {
    if !is_vouched_for(vmlinux) {
        return Err(GateError::NoNote);
    }
    scan::scan(vmlinux)
}

/// True if the ELF image of a kernel says that it was made to be followed. What it says is not
/// examined.
pub fn is_vouched_for(vmlinux: &[u8]) -> bool {
    note::find(vmlinux, VOUCHER_LOCKSTEP).is_some()
}

/// True if the ELF image of a kernel says that it never leaves privilege level 0.
pub fn stays_at_level_zero(vmlinux: &[u8]) -> bool {
    note::find(vmlinux, VOUCHER_LEVEL_ZERO).is_some()
}

/// Examines the ELF image of a kernel that was built with a note of type [`VOUCHER_NONE`] to make
/// [`VOUCHER_LOCKSTEP`] of, and does so if there is nothing in its code that the note denies.
///
/// # Errors
/// [`GateError`]; the image is then unchanged.
pub fn vouch(vmlinux: &mut [u8]) -> Result<Examination, GateError> {
    let examination = scan::scan(vmlinux)?;
    let at = note::find(vmlinux, VOUCHER_NONE).ok_or(GateError::NoNote)?;
    vmlinux[at..at + 4].copy_from_slice(&VOUCHER_LOCKSTEP.to_le_bytes());
    Ok(examination)
}

#[cfg(test)]
mod tests;
