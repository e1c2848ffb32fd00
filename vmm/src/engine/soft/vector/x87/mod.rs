//! The x87 unit.

mod stack;

pub(super) use stack::settle_loaded;
