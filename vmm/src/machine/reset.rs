//! Starting the guest again, as a reset button does. Guest time and the count of instructions go on; requests
//! still outside are forgotten by the board.
//!
//! A guest that boots from its disks boots what they have then, which is an input. The machine waits for it
//! without executing anything; on a side that records, the machine that has booted goes into the log as a
//! whole, so that whoever replays needs no disk.

use super::delta::DeltaBase;
use super::{BootSource, Delta, Machine, MachineError, SetupError};
use crate::boot::{self, BootError, GateError};
use crate::devices::reset::ResetCause;
use crate::inputs::Resets;
use std::collections::VecDeque;
use vmft_log::foreign::Printable;
use vmft_log::point::VirtualTime;

/// Why a machine does not start with what its disks have.
#[derive(Debug, thiserror::Error)]
pub(super) enum BootRefusal {
    /// It is no kernel, or too large.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The one before could be followed on this engine.
    #[error("the kernel before could be followed on this engine, and this one cannot: {0}")]
    Kernel(#[from] GateError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] vmft_cpu::InvalidState),
}

/// So long a reset counts, in nanoseconds of guest time.
const RECENT_NS: u64 = 60_000_000_000;
/// So much of the console is kept, in bytes.
const TAIL: usize = 8192;
/// So many lines of it are shown.
const TAIL_LINES: usize = 12;
/// What a kernel says that finds no root, and what that means.
const SAYINGS: [(&str, &str); 6] = [
    (
        "Unable to mount root fs",
        "no root: `root=` of its command line names no disk that its kernel can use",
    ),
    ("ALERT!", "no root: `root=` of its command line names no disk that is there"),
    ("No working init found", "its root has no init, or its initramfs is another kernel's"),
    ("Out of memory", "too little memory for it"),
    ("out of memory", "too little memory for it"),
    ("deadlocked on memory", "too little memory for it"),
];

/// What an operator is told of a guest that does not start: no part of the machine's state, and of
/// no effect on the guest.
#[derive(Debug, Default)]
pub(super) struct History {
    /// When the guest was reset since it last wrote to a disk.
    recent: VecDeque<VirtualTime>,
    total: u64,
    tail: VecDeque<u8>,
}

impl History {
    fn reset(&mut self, now: VirtualTime) {
        let is_old = |then: &VirtualTime| now.as_ns().saturating_sub(then.as_ns()) > RECENT_NS;
        while self.recent.front().is_some_and(is_old) {
            self.recent.pop_front();
        }
        self.recent.push_back(now);
        self.total += 1;
    }

    /// A disk was written: the guest gets somewhere.
    pub(super) fn disk_written(&mut self) {
        self.recent.clear();
    }

    /// The guest has put this on its console.
    pub(super) fn console(&mut self, bytes: &[u8]) {
        let from = bytes.len().saturating_sub(TAIL);
        self.tail.extend(&bytes[from..]);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL));
    }

    pub(super) fn resets(&self) -> Resets {
        let fruitless = u32::try_from(self.recent.len()).unwrap_or(u32::MAX);
        Resets { total: self.total, fruitless }
    }
}

impl Machine {
    /// Tells the operator why the guest probably cannot start: its last words, and what they mean.
    pub(super) fn tell_last_words(&self) {
        let bytes: Vec<u8> = self.history.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        // Behind what a kernel says there come its registers.
        let panics = lines.iter().rposition(|line| line.contains("Kernel panic"));
        let last = panics.map_or(lines.len(), |at| (at + 3).min(lines.len()));
        for line in &lines[last.saturating_sub(TAIL_LINES)..last] {
            tracing::error!("  its console: {}", Printable(line.trim_end()));
        }
        let memory = self.config.memory() >> 20;
        match SAYINGS.iter().find(|(saying, _)| text.contains(saying)) {
            Some((_, meaning)) => tracing::error!("the likely cause: {meaning}"),
            None => tracing::error!(
                "likely causes: no root device (`root=`), a kernel that is not made for x86-64, too little \
                 memory (it has {memory} MiB; Debian's own initramfs wants 256)"
            ),
        }
    }

    /// Starts the guest again: from the kernel that it had, or from what its disks have now.
    pub(super) fn reset(&mut self, cause: ResetCause) -> Result<(), MachineError> {
        let time = self.time();
        self.history.reset(time);
        if let Some(times) = super::GUESTS_DOING.note(&cause.to_string()) {
            let point = self.engine.point();
            tracing::warn!(%point, "the guest starts again, by {cause}{times}");
        }
        self.bring_to_rest();
        self.engine.ram().clear();
        self.board.reset();
        self.awaits_boot = self.source.disk.is_some();
        if self.awaits_boot {
            return Ok(());
        }
        let failed = |error: SetupError| MachineError::Reset(Box::new(error));
        let (ram, cpus) = (self.engine.ram(), self.config.cpus());
        let cpu = self.source.load(ram, cpus).map_err(|error| failed(error.into()))?;
        self.engine.restore(&cpu, self.engine.point()).map_err(|error| failed(error.into()))
    }

    /// Starts the guest that was reset with what its disks have.
    pub(super) fn boot(&mut self, source: BootSource) -> Result<(), BootRefusal> {
        assert!(self.awaits_boot, "the guest runs");
        // A log that nobody could replay is worse than a guest that stops.
        if self.config.engine.trusts_the_guest() && boot::examine(&self.source.kernel).is_ok() {
            boot::examine(&source.kernel)?;
        }
        let cpu = source.load(self.engine.ram(), self.config.cpus())?;
        self.engine.restore(&cpu, self.engine.point())?;
        self.source = source;
        self.awaits_boot = false;
        Ok(())
    }

    /// Gives the place a name by all of the machine: of what was before, nothing is left.
    pub(super) fn take_whole(&mut self) -> Delta {
        self.engine.flush_caches();
        let pages = self.used_pages();
        let base = DeltaBase { point: self.engine.point(), is_checkpoint: true };
        let delta = self.copy_delta(pages, base, &[]);
        self.begin_delta_at(true);
        Delta { is_whole: true, ..delta }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_count_for_a_minute_and_until_a_disk_is_written() {
        let mut history = History::default();
        let at = |second: u64| VirtualTime::from_ns(second * 1_000_000_000);
        let mut seen = Vec::new();
        for second in [0, 10, 20, 70, 80, 81] {
            history.reset(at(second));
            seen.push(history.resets().fruitless);
        }
        assert_eq!(seen, [1, 2, 3, 3, 3, 3]);
        history.disk_written();
        history.reset(at(82));
        assert_eq!(history.resets(), Resets { total: 7, fruitless: 1 });
    }

    #[test]
    fn the_last_of_the_console_is_kept() {
        let mut history = History::default();
        for number in 0..3000u32 {
            history.console(format!("line {number}\n").as_bytes());
        }
        history.console(&[b'x'; 3]);
        let tail: Vec<u8> = history.tail.into_iter().collect();
        assert!(tail.len() == TAIL && tail.ends_with(b"line 2999\nxxx"));
    }
}
