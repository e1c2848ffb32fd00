//! What two sides compare before one may replay the other.

use std::fs::File;
use std::io::{self, Read};
use vmft_logging_channel::fingerprint::{Fingerprint, Mismatch};
use vmft_logging_channel::handshake::Nonce;
use vmft_vmm::board::DiskConfig;
use vmft_vmm::engine::soft;
use vmft_vmm::machine::STATE_VERSION;

const VERSION: &str = "vmft version";
const STATE: &str = "state version";
const ENGINE: &str = "engine";
const CPU: &str = "cpu model";

/// The part that a program has of itself, whatever machine it runs.
fn program() -> Fingerprint {
    Fingerprint::new()
        .with(VERSION, env!("CARGO_PKG_VERSION"))
        .with(STATE, STATE_VERSION)
        .with(ENGINE, "soft")
        .with(CPU, soft::cpu_model_digest())
}

/// The fingerprint of a machine with these disks: what a backup knows before it has the machine.
/// All else comes with the checkpoint.
pub fn fingerprint(disks: &[DiskConfig]) -> Fingerprint {
    let count = program().with("disks", disks.len());
    disks.iter().enumerate().fold(count, |fingerprint, (index, disk)| {
        let mode = if disk.read_only { "read-only" } else { "writable" };
        fingerprint.with(format!("disk {index}"), format!("{} bytes, {mode}", disk.capacity.0))
    })
}

/// The log was written by a program that executes as this one does.
///
/// # Errors
/// The field in which it differs.
pub fn check_version(log: &Fingerprint) -> Result<(), Mismatch> {
    let ours = program();
    let theirs =
        [VERSION, STATE, ENGINE, CPU].into_iter().fold(Fingerprint::new(), |known, name| match log
            .get(name)
        {
            Some(value) => known.with(name, value),
            None => known,
        });
    theirs.mismatch(&ours).map_or(Ok(()), Err)
}

/// A number nobody has used before.
///
/// # Errors
/// If the host has no random bytes.
pub fn nonce() -> io::Result<Nonce> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(Nonce(bytes))
}
