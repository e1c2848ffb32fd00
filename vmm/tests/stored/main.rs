//! What a machine is made of when it comes from a file or from a peer, gone bad: it is refused with
//! a typed error, or it makes a machine that runs. Each target is described in its file;
//! CONTRIBUTING.md says how to run one longer.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod console;
mod image;
mod inputs;
mod kernel;
mod machine;
mod snapshot;

use vmft_fuzzing::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
