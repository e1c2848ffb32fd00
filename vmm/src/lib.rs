//! The machine: engines, board, devices and the run loop, the same code on both sides.

pub mod board;
pub mod devices;
pub mod engine;
pub mod memory;
