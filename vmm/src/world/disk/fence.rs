//! Whether this side may still write.

use std::fmt;

/// This side's generation is over: it may not write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this side's generation is over")]
pub struct FenceError;

/// In which generation something is written: what a storage that knows generations is told, to refuse it if a
/// later one has been won meanwhile. `None` for a machine that is nobody's pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permit(pub Option<u64>);

/// Asked before each write: is this side's generation still the last?
pub trait Fence: fmt::Debug + Send + Sync {
    /// The permit to write now.
    ///
    /// # Errors
    /// [`FenceError`] if another side has won a later generation. The fence itself makes sure
    /// that this side halts.
    fn check(&self) -> Result<Permit, FenceError>;

    /// The storage has refused a permit that this has given, so it knows of a later generation:
    /// another side's, or one that this side has just won. Returns when it is worth asking again;
    /// blocks.
    fn refused(&self);
}

/// The fence of a machine that is nobody's pair.
#[derive(Debug, Clone, Copy)]
pub struct NoFence;

impl Fence for NoFence {
    fn check(&self) -> Result<Permit, FenceError> {
        Ok(Permit(None))
    }

    fn refused(&self) {}
}
