//! How much the engine's caches may hold.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU8, Ordering};

/// Most instructions of a block.
pub(super) const MAX_BLOCK: usize = 64;

/// What an engine's compiler does. It does not show to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum CompilerMode {
    /// Everything is interpreted.
    Off,
    /// What is executed often is compiled.
    #[default]
    On,
    /// The same, and whatever code does the interpreter does as well: where they differ the guest
    /// is stopped. Many times slower than either.
    Check,
}

impl CompilerMode {
    /// Its name on the command line and in a status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Check => "check",
        }
    }
}

/// What [`set_compiler`] said.
static COMPILER: AtomicU8 = AtomicU8::new(CompilerMode::On as u8);

/// What compilers of engines do that this process makes from here on, where the host lets them.
pub fn set_compiler(mode: CompilerMode) {
    COMPILER.store(mode as u8, Ordering::Relaxed);
}

pub(super) fn compiler_wanted() -> CompilerMode {
    match COMPILER.load(Ordering::Relaxed) {
        0 => CompilerMode::Off,
        1 => CompilerMode::On,
        _ => CompilerMode::Check,
    }
}

/// How much the engine keeps of what it has decoded and translated. None of it shows to the guest:
/// tests make it tiny, and compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLimits {
    /// Blocks of decoded instructions, of 64 bytes each.
    pub(super) blocks: usize,
    /// Instructions in all blocks together, of 24 bytes each.
    pub(super) ops: usize,
    /// Those among them that have no specialised form, of 48 bytes more.
    pub(super) decoded: usize,
    /// Instructions of one block.
    pub(super) block: usize,
    /// Addresses whose blocks are found without a search; a power of two.
    pub(super) recent: usize,
    /// Translations that are flushed one by one; when there are more, all are looked at.
    pub(super) flushed_by_name: usize,
    /// Bytes of compiled code; none: nothing is compiled.
    pub(super) code: usize,
    /// Executions of a block that make it worth compiling.
    pub(super) hot: u16,
    /// What compiled code does is compared with what the interpreter does.
    pub(super) check: bool,
}

impl Default for CacheLimits {
    /// Less than 80 MiB, and 32 MiB of code where the compiler is on.
    fn default() -> Self {
        let compiler = compiler_wanted();
        Self {
            blocks: 1 << 18,
            ops: 1 << 20,
            decoded: 1 << 19,
            block: MAX_BLOCK,
            recent: 1 << 16,
            flushed_by_name: 1 << 10,
            code: if compiler == CompilerMode::Off { 0 } else { 1 << 25 },
            hot: 32,
            check: compiler == CompilerMode::Check,
        }
    }
}

impl CacheLimits {
    /// The least that works: one block of `block` instructions at a time, which any other pushes out.
    ///
    /// # Panics
    /// If `block` is not between 1 and 64.
    pub fn tiny(block: usize) -> Self {
        assert!((1..=MAX_BLOCK).contains(&block), "a block has 1 to 64 instructions");
        Self {
            blocks: 1,
            ops: block,
            decoded: block,
            block,
            recent: 1,
            flushed_by_name: 1,
            code: 0,
            hot: 0,
            check: false,
        }
    }

    /// With a compiler that has `code` bytes for what it makes of blocks executed `hot` times; with none if
    /// there are no bytes.
    #[must_use]
    pub fn compiled(self, code: usize, hot: u16) -> Self {
        Self { code, hot, ..self }
    }

    /// With what compiled code does compared with what the interpreter does.
    #[must_use]
    pub fn checked(self) -> Self {
        Self { check: true, ..self }
    }

    /// Room for so many times as many blocks, and as many addresses; `times` is rounded up to a power
    /// of two.
    #[must_use]
    pub fn times(self, times: usize) -> Self {
        let times = times.next_power_of_two();
        Self {
            blocks: self.blocks * times,
            ops: self.ops * times,
            decoded: self.decoded * times,
            recent: self.recent * times,
            ..self
        }
    }
}
