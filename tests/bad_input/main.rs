//! Bad input and the command line, through the program itself: each bad input is refused in one
//! line that says what and what to do, nothing changes on disk, and the other side is unharmed.
#![allow(clippy::unwrap_used, missing_docs)]

mod harness;
mod life;
mod logs;
mod peers;
mod probe;
mod starts;
