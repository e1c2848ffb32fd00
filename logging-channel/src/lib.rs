//! The logging channel: the sessions that carry the log's entries from the primary to the backup and
//! acknowledgements back, and the files that keep them. What an entry is, `vmft-log` says.
//!
//! The core is pure: it takes `now` and bytes and returns values. Sockets and clocks
//! live in `transport`, files in `log_file`, and nowhere else. `docs/protocol.md` is the
//! normative description of what this crate speaks.

#![forbid(unsafe_code)]

pub mod backups;
pub mod detector;
pub mod fingerprint;
pub mod frame;
mod generation_news;
pub mod handshake;
pub mod latency;
pub mod log_file;
pub mod receiver;
pub mod sender;
pub mod session;
pub mod time;
pub mod transport;
mod waiting_checkpoints;
