//! What a disk boots, found as its own boot loader would find it: the kernel, what comes with it, and its
//! command line.
//!
//! ```text
//! disk ── partitions ── volumes (file systems) ── menu: systemd-boot's entries, GRUB's, or /vmlinuz ── files
//! ```
//!
//! Only reading is done here; no boot loader's code runs. What is read is the guest's, which may be
//! hostile: sizes are looked at before memory is taken, all reading of one disk has a bound
//! ([`Source`] is asked for no more than that), and so has all that a menu can make of itself.
//!
//! Which disk boots, and what else stands on the command line, is decided elsewhere.

#![forbid(unsafe_code)]

pub mod cmdline;
mod entries;
mod error;
mod fat;
mod grub;
mod links;
mod menu;
mod partitions;
mod reader;
mod script;
mod version;
mod volume;

pub use error::BootDiskError;
pub use menu::{Loader, Menu, MenuEntry, OsFiles};
pub use reader::Source;
