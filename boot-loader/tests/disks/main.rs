//! Disks that the usual tools make, and what a boot loader finds on them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod entries;
mod fuzz;
mod grub;
mod hostile;
mod image;
mod partitions;

use vmft_fuzzing::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
