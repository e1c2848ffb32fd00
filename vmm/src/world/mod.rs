//! The world outside a live machine: the host's clock, disks, random numbers, console, network.
//!
//! Everything here is nondeterministic, and none of it touches guest memory. What it has for
//! the guest goes into a [`Mailbox`]; the run loop takes it from there at a point of its choosing.

pub mod console;
mod disk;
mod disk_boot;
mod file_lock;
pub mod image_format;
mod mailbox;
pub mod net;
mod outside;
mod repeats;
mod source;
mod watermark;

pub use disk::{
    DiskDesk, DiskFile, DiskFileError, DiskNews, DiskPolicy, DiskReader, DiskTrouble, Fence,
    FenceError, HostCache, Image, NoFence, OWN_COPY, OnError, Overrun, OwnCopy, Permit, Storage,
    Tap, TapEnd, TappedWrite, WriteError, file_system,
};
pub use disk_boot::{DiskBootError, FromDisk, boot_from_disks, guests_name};
pub use file_lock::{FileLock, try_join_file, try_lock_file};
pub use mailbox::Mailbox;
pub use outside::{DisksDone, HostOutside};
pub use repeats::{Repeats, Times};
pub use source::HostSource;

/// An error with its causes, in one line.
pub fn error_text(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
