//! The self-test of the counter: everything that is known to make such counters wrong, done to
//! guests whose branches are known.

use super::facts::{BranchCounter, CounterChecks, Exactness, Landings, Overflows};
use super::perf::Counter;
use super::programs::{Branches, all};
use crate::trust::facts::{Level, Outcome};
use crate::trust::lab::{END_PORT, Lab, LabError, PATIENCE, Stop};
use crate::trust::layout::CODE;
use crate::trust::watchdog::{KICK, Limit, kick, this_thread};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use thiserror::Error;

/// Branches of the longest guest: a fraction of a second on hardware.
const LONG: u32 = 20_000_003;
/// Turns of the others.
const TURNS: u32 = 500_000;
/// How often each is run.
const ROUNDS: u32 = 3;
/// Overflows to wait for, and the branches between two of them.
const OVERFLOWS: u32 = 10_000;
const PERIOD: u64 = 100_000;
/// Landings to try.
const LANDINGS: u32 = 100;
/// Time for the overflows, and for the landings.
const LONG_PATIENCE: Duration = Duration::from_secs(2);
/// Between two kicks of a guest that is disturbed.
const KICK_EVERY: Duration = Duration::from_micros(100);

/// Why a check has no result.
#[derive(Debug, Error)]
enum Trouble {
    #[error(transparent)]
    Lab(#[from] LabError),
    #[error("reading the counter: {0}")]
    Counter(#[from] io::Error),
    #[error("{0}")]
    Stop(Stop),
}

/// Who disturbs the guest while it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disturbance {
    None,
    /// Signals that bring the guest back.
    Kicks,
    /// A busy thread on the same CPU.
    Neighbour,
}

/// Runs all checks. The calling thread must stay on one CPU.
///
/// # Errors
/// The counter does not open.
pub fn run(
    lab: &mut Lab,
    event: BranchCounter,
    freeze_on_smi: Option<bool>,
    hybrid: bool,
) -> io::Result<CounterChecks> {
    let clock = Counter::clock(event)?;
    let timer = Counter::timer(event, KICK as libc::c_int)?;
    let mut test = SelfTest { lab, clock, timer, always_running: true };
    let exact = test.exactness();
    let host_branches = outcome(test.host_branches());
    let overflows = outcome(test.overflows());
    let seen = overflows.measured().map_or(0, |overflows| overflows.worst_skid);
    // What was seen is enough for the test; experience's bound would take too long where it
    // knows none.
    let landings = outcome(test.landings(seen.saturating_mul(2).max(128)));
    let always_running = test.always_running;
    Ok(CounterChecks {
        exact,
        host_branches,
        always_running,
        overflows,
        landings,
        freeze_on_smi,
        hybrid,
    })
}

fn outcome<T>(result: Result<T, Trouble>) -> Outcome<T> {
    match result {
        Ok(value) => Outcome::Measured(value),
        Err(trouble) => Outcome::Odd(trouble.to_string()),
    }
}

struct SelfTest<'a> {
    lab: &'a mut Lab,
    clock: Counter,
    timer: Counter,
    always_running: bool,
}

impl SelfTest<'_> {
    fn count(&mut self) -> Result<u64, Trouble> {
        let reading = self.clock.read()?;
        self.always_running &= reading.always_ran;
        Ok(reading.count)
    }

    /// Every guest at both levels, undisturbed; then the plain one disturbed.
    fn exactness(&mut self) -> Vec<Exactness> {
        let mut runs = Vec::new();
        for level in [Level::Kernel, Level::User] {
            let mut add = |program: Branches, disturbance| {
                let what = match disturbance {
                    Disturbance::None => program.what,
                    Disturbance::Kicks => "signals from the host",
                    Disturbance::Neighbour => "a busy neighbour",
                };
                let counted = outcome(self.rounds(program, level, disturbance));
                runs.push(Exactness {
                    what: what.to_owned(),
                    level,
                    expected: program.expected(),
                    counted,
                });
            };
            add(Branches::plain(LONG), Disturbance::None);
            for program in all(TURNS) {
                add(program, Disturbance::None);
            }
            add(Branches::plain(LONG), Disturbance::Kicks);
            add(Branches::plain(LONG), Disturbance::Neighbour);
        }
        runs
    }

    /// Several runs; the first wrong count, or the right one.
    fn rounds(
        &mut self,
        program: Branches,
        level: Level,
        disturbance: Disturbance,
    ) -> Result<u64, Trouble> {
        for _ in 0..ROUNDS {
            let counted = disturbed(disturbance, || self.run_counted(program, level))?;
            if counted != program.expected() {
                return Ok(counted);
            }
        }
        Ok(program.expected())
    }

    fn run_counted(&mut self, program: Branches, level: Level) -> Result<u64, Trouble> {
        program.load(self.lab, level)?;
        let before = self.count()?;
        run_to_end(self.lab)?;
        Ok(self.count()?.wrapping_sub(before))
    }

    /// What is counted while the host computes.
    fn host_branches(&mut self) -> Result<u64, Trouble> {
        let before = self.count()?;
        let mut odd = 0_u32;
        for turn in 0..1_000_000_u32 {
            if std::hint::black_box(turn) & 1 == 1 {
                odd += 1;
            }
        }
        std::hint::black_box(odd);
        Ok(self.count()?.wrapping_sub(before))
    }

    /// Overflows in a loop, and how late each is.
    fn overflows(&mut self) -> Result<Overflows, Trouble> {
        Branches::plain(u32::MAX).load(self.lab, Level::Kernel)?;
        let limit = self.lab.limit(LONG_PATIENCE);
        self.clock.reset()?;
        self.timer.reset()?;
        self.timer.arm_repeatedly(PERIOD)?;
        let result = self.collect_overflows(&limit);
        self.timer.disarm()?;
        result
    }

    fn collect_overflows(&mut self, limit: &Limit) -> Result<Overflows, Trouble> {
        let mut seen = Overflows { wanted: OVERFLOWS, arrived: 0, worst_skid: 0 };
        while seen.arrived < OVERFLOWS {
            match self.lab.run_under(limit) {
                Stop::Interrupted => {}
                Stop::TimeUp => break,
                other => return Err(Trouble::Stop(other)),
            }
            let target = u64::from(seen.arrived + 1) * PERIOD;
            // A signal of somebody else comes early.
            if let Some(late) = self.count()?.checked_sub(target) {
                seen.arrived += 1;
                seen.worst_skid = seen.worst_skid.max(late);
            }
        }
        Ok(seen)
    }

    /// Stops `margin` short of a branch, steps to it, and looks where the guest is.
    fn landings(&mut self, margin: u64) -> Result<Landings, Trouble> {
        let mut landings = Landings { tried: 0, landed: 0 };
        let limit = self.lab.limit(LONG_PATIENCE);
        while landings.tried < LANDINGS && !limit.is_over() {
            let target = margin + 20_000 + 97 * u64::from(landings.tried);
            let Some(landed) = self.land(margin, target, &limit)? else { break };
            landings.tried += 1;
            landings.landed += u32::from(landed);
        }
        Ok(landings)
    }

    /// Whether it landed; `None` if the time was over before it could.
    fn land(&mut self, margin: u64, target: u64, limit: &Limit) -> Result<Option<bool>, Trouble> {
        let start = u32::MAX;
        Branches::plain(start).load(self.lab, Level::Kernel)?;
        self.clock.reset()?;
        self.timer.arm_once(target - margin)?;
        while self.count()? < target - margin {
            match self.lab.run_under(limit) {
                Stop::Interrupted => {}
                Stop::TimeUp => return Ok(None),
                other => return Err(Trouble::Stop(other)),
            }
        }
        while self.count()? < target {
            match self.lab.step_under(limit) {
                Stop::Trap { .. } | Stop::Interrupted => {}
                Stop::TimeUp => return Ok(None),
                other => return Err(Trouble::Stop(other)),
            }
        }
        let registers = self.lab.registers()?;
        let left = u64::from(start).checked_sub(target);
        self.lab.stop_stepping()?;
        Ok(Some(self.count()? == target && registers.rip == CODE && Some(registers.rcx) == left))
    }
}

/// Runs a loaded guest to its end, through its port writes and everybody's signals.
fn run_to_end(lab: &mut Lab) -> Result<(), Trouble> {
    let limit = lab.limit(PATIENCE);
    loop {
        match lab.run_under(&limit) {
            Stop::Out(END_PORT) => return Ok(()),
            Stop::Out(_) | Stop::Interrupted => {}
            other => return Err(Trouble::Stop(other)),
        }
    }
}

/// Does `work` on this thread while another thread disturbs it.
fn disturbed<T>(disturbance: Disturbance, work: impl FnOnce() -> T) -> T {
    let target = this_thread();
    let over = AtomicBool::new(false);
    let disturb = || {
        while !over.load(Ordering::Relaxed) {
            if disturbance == Disturbance::Kicks {
                std::thread::park_timeout(KICK_EVERY);
                kick(target);
            }
        }
    };
    std::thread::scope(|scope| {
        if disturbance != Disturbance::None {
            scope.spawn(disturb);
        }
        let result = work();
        over.store(true, Ordering::Relaxed);
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::has_kvm;
    use crate::trust::facts::KvmKind;
    use crate::trust::lab::Program;
    use crate::trust::{DEVICE, device, host};
    use std::path::Path;

    /// Runs every counted guest to its end, at both levels, disturbed in every way; at CPL 0
    /// without SSE only those that do without.
    fn guests_run_to_their_end(lab: &mut Lab, sse_at_kernel: bool) {
        for level in [Level::Kernel, Level::User] {
            let needs_sse = |program: &Branches| program.what == Branches::mixture(1).what;
            let runs =
                |program: &Branches| sse_at_kernel || level == Level::User || !needs_sse(program);
            for program in all(2000).into_iter().filter(runs) {
                for disturbance in [Disturbance::None, Disturbance::Kicks, Disturbance::Neighbour] {
                    program.load(lab, level).unwrap();
                    let end = disturbed(disturbance, || run_to_end(lab));
                    assert!(end.is_ok(), "{} at {level}: {end:?}", program.what);
                    let registers = lab.registers().unwrap();
                    let counters = [registers.rcx, registers.rdx, registers.r8];
                    assert!(counters.contains(&0), "{} at {level}: {registers:?}", program.what);
                }
            }
        }
    }

    #[test]
    fn a_guest_that_never_ends_is_brought_back_and_counted_guests_end() {
        if !has_kvm() {
            return;
        }
        let kvm = device::open(Path::new(DEVICE)).1.expect("KVM opens");
        let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        let mut lab = Lab::open(&kvm, &cpuid).unwrap();
        for level in [Level::Kernel, Level::User] {
            // `jmp $`
            lab.load(&Program::new(level, &[0xEB, 0xFE])).unwrap();
            assert_eq!(lab.run(), Stop::TimeUp);
        }
        let software = host::kind(Path::new("/sys/module")) == KvmKind::Pvm;
        guests_run_to_their_end(&mut lab, !software);
    }
}
