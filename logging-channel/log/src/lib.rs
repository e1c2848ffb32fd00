//! The vocabulary of the log: points of a guest's execution, the entries that are captured at them, their
//! encoding, and the checkpoints from which a log begins.
//!
//! Everything here is a value or bytes. Sessions, sockets, clocks and files are of the logging channel,
//! which this crate does not know. `docs/protocol.md` is the normative description of the encodings.

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod codec;
pub mod control;
pub mod disk_copy;
pub mod entry;
pub mod foreign;
pub mod point;
pub mod wire;
