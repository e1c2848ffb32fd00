//! The counter of the guest's branches, as the engine needs it: a port with one implementation over the
//! host's performance counters. Tests bring others, among them counters that are wrong.

use crate::trust::counter::{Trusted, perf};
use std::fmt;
use vmft_log::point::Branches;

/// The counter has stopped counting: somebody else has it, or the host lost it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the counter of branches is lost: {0}")]
pub struct CounterLost(pub String);

/// Counts the conditional branches that the guest retires, at every privilege level, and nothing else.
///
/// The engine calls it on the thread that runs the guest, and only while the guest is stopped.
pub trait BranchCounter: fmt::Debug + Send {
    /// Branches retired so far. It starts anywhere and never runs backwards.
    ///
    /// # Errors
    /// [`CounterLost`]
    fn count(&mut self) -> Result<Branches, CounterLost>;

    /// Has the guest come back when it has retired `after` branches from now, or at most
    /// [`Self::margin`] later; once. It replaces what was asked for before. Coming back earlier is
    /// allowed, and so is not coming back at all: either is noticed.
    ///
    /// # Errors
    /// [`CounterLost`]
    fn arm(&mut self, after: Branches) -> Result<(), CounterLost>;

    /// Nothing is asked for any more.
    ///
    /// # Errors
    /// [`CounterLost`]
    fn disarm(&mut self) -> Result<(), CounterLost>;

    /// Branches by which the guest may come back late.
    fn margin(&self) -> Branches;

    /// For a counter without hardware: the guest is stepped everywhere, and [`Self::stepped`] hears of
    /// every instruction.
    fn needs_steps(&self) -> bool;

    /// The guest retired an instruction, `branched` if that was a conditional branch. True if
    /// the guest is to come back here, as asked for by [`Self::arm`]. Only heard by a counter that
    /// [needs](Self::needs_steps) it.
    fn stepped(&mut self, branched: bool) -> bool;
}

/// The host's performance counter, which the doctor has found to be exact.
#[derive(Debug)]
pub(crate) struct HardwareCounter {
    trusted: Trusted,
    open: Option<Open>,
    /// Counted on threads that ran the guest before.
    before: u64,
}

/// Counters belong to a thread.
#[derive(Debug)]
struct Open {
    thread: libc::pid_t,
    clock: perf::Counter,
    /// Apart from the clock, because the kernel may stop one that signals too often.
    timer: perf::Counter,
}

impl HardwareCounter {
    pub(crate) fn new(trusted: Trusted) -> Self {
        Self { trusted, open: None, before: 0 }
    }

    /// The counters of this thread.
    fn open(&mut self) -> Result<&mut Open, CounterLost> {
        let thread = perf::this_thread();
        if self.open.as_ref().is_none_or(|open| open.thread != thread) {
            if let Some(mut left) = self.open.take() {
                self.before += read(&mut left.clock)?;
            }
            let event = self.trusted.event;
            let clock = perf::Counter::clock(event).map_err(lost)?;
            let timer = perf::Counter::timer(event, super::kick::signal_number()).map_err(lost)?;
            self.open = Some(Open { thread, clock, timer });
        }
        Ok(self.open.as_mut().expect("it was opened above"))
    }
}

fn lost(error: std::io::Error) -> CounterLost {
    CounterLost(perf::reason(&error))
}

fn read(clock: &mut perf::Counter) -> Result<u64, CounterLost> {
    let reading = clock.read().map_err(lost)?;
    if !reading.always_ran {
        return Err(CounterLost("it did not run all the time".to_owned()));
    }
    Ok(reading.count)
}

impl BranchCounter for HardwareCounter {
    fn count(&mut self) -> Result<Branches, CounterLost> {
        let here = read(&mut self.open()?.clock)?;
        Ok(Branches(self.before + here))
    }

    fn arm(&mut self, after: Branches) -> Result<(), CounterLost> {
        self.open()?.timer.arm_once(after.0).map_err(lost)
    }

    fn disarm(&mut self) -> Result<(), CounterLost> {
        self.open()?.timer.disarm().map_err(lost)
    }

    fn margin(&self) -> Branches {
        Branches(self.trusted.margin)
    }

    fn needs_steps(&self) -> bool {
        false
    }

    fn stepped(&mut self, _: bool) -> bool {
        false
    }
}
