//! The world outside a live machine: the host's clock, disks, random numbers, console.
//!
//! Everything here is nondeterministic, and none of it touches guest memory. What it has for
//! the guest goes into a [`Mailbox`]; the run loop takes it from there at a point of its choosing.

pub mod console;
mod disk;
mod file_lock;
mod mailbox;
mod outside;
mod source;

pub use disk::{DiskFile, DiskFileError, Fence, FenceError, NoFence};
pub use file_lock::{FileLock, try_join_file, try_lock_file};
pub use mailbox::Mailbox;
pub use outside::HostOutside;
pub use source::{Gauges, HostSource};
