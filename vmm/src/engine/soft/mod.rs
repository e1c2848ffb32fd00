//! The `soft` engine: an x86-64 system CPU in user space.

mod exception;
mod vector;
