//! `scripts/stock-kvm`: runs a command on a host with upstream, unmodified KVM.
//!
//! The host is Debian's cloud kernel in QEMU, which emulates an AMD CPU with SVM instruction by
//! instruction: a few times to a few hundred times slower than hardware, and real for behaviour.
//!
//! ```text
//!  options, cargo   what is to run, building it
//!  contents         its files with their libraries, as an initramfs
//!  qemu             starting the box, its output, its end        inside   the same program again, in the
//!      └──────────────── channel: frames on a virtio serial port ────┘    box: runs the commands
//! ```
//!
//! What a command prints comes out as it was printed, and its exit status is this program's.

#![forbid(unsafe_code)]

mod cargo;
mod channel;
mod contents;
mod inside;
mod job;
mod options;
mod qemu;

use clap::Parser;
use options::Options;
use std::process::ExitCode;

/// Exit status when the time is up, as `timeout` has it.
const TIMED_OUT: u8 = 124;
/// Exit status when the box failed, not the command.
const BOX_FAILED: u8 = 125;
/// Exit status when the command could not be started.
const NOT_STARTED: u8 = 127;
/// Added to the number of the signal that ended a command.
const SIGNALLED: u8 = 128;

fn main() -> ExitCode {
    let ended = match std::env::args_os().nth(1) {
        Some(word) if word == inside::WORD => inside::run(),
        _ => qemu::run(&Options::parse()),
    };
    ended.unwrap_or_else(|error| {
        eprintln!("stock-kvm: {error:#}");
        ExitCode::from(BOX_FAILED)
    })
}
