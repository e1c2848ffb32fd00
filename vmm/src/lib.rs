//! The machine: board, devices and the run loop, the same code on both sides.

pub mod board;
pub mod boot;
pub mod devices;
pub mod doctor;
pub mod engine;
pub mod evidence;
pub mod inputs;
pub mod machine;
pub mod outputs;
pub mod snapshot;
pub mod world;
