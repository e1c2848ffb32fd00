//! The logging channel: entries, their encoding, and the sessions that carry them
//! from the primary to the backup and acknowledgements back.
//!
//! The core is pure: it takes `now` and bytes and returns values. Sockets and clocks
//! live in `transport`, files in `log_file`, and nowhere else.

pub mod entry;
pub mod point;
