//! Guests that boot from their own disks: made of the default guest's kernel, by the tools that
//! distributions use.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod boots;
mod image;
mod pairs;
mod reboot;
mod seed;
