//! How much of what an engine executes is compiled, for whoever asks from another thread.

use super::limits::CompilerMode;
use std::sync::atomic::{AtomicU64, Ordering};

/// What an engine's compiler does, and how much it has done.
#[derive(Debug)]
pub struct CompilerGauge {
    mode: CompilerMode,
    retired: AtomicU64,
    compiled: AtomicU64,
}

impl CompilerGauge {
    pub(super) fn new(mode: CompilerMode) -> Self {
        Self { mode, retired: AtomicU64::new(0), compiled: AtomicU64::new(0) }
    }

    /// So many instructions more, and so many in compiled code since the engine is there.
    pub(super) fn add(&self, retired: u64, compiled: u64) {
        self.retired.fetch_add(retired, Ordering::Relaxed);
        self.compiled.store(compiled, Ordering::Relaxed);
    }

    /// What the compiler does here.
    pub fn mode(&self) -> CompilerMode {
        self.mode
    }

    /// Instructions that the engine has executed.
    pub fn retired(&self) -> u64 {
        self.retired.load(Ordering::Relaxed)
    }

    /// Those of them that were compiled code.
    pub fn compiled(&self) -> u64 {
        self.compiled.load(Ordering::Relaxed)
    }
}
