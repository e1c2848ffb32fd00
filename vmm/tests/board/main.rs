//! The board through its public face: what a kernel's drivers do to it, and what a hostile
//! guest can.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod block;
mod driver;
mod entropy;
mod fuzz;
mod hostile;
mod machine;
mod net;
mod net_fuzz;
mod pci;
mod saving;
mod state_fuzz;
mod time;
