//! The run loop for points that are exits and branches.
//!
//! A point is the ordinal of the last deterministic exit and the branches retired since, in one number
//! ([`ExecutionPoint::next_exit`], [`ExecutionPoint::plus_branches`]). At an exit the number is known
//! without anybody's help; the count there is only compared. Between two exits the guest is brought to a
//! number by [`landing`](super::landing).
//!
//! **Interrupts** are taken at a point, or at the first boundary behind it that can take one if the
//! point itself cannot (`CLI`, the shadows of `STI` and `MOV SS`): both sides want it from the same
//! point on, so they find the same boundary.
//!
//! **Stepping and running.** While the guest is stepped, the interrupt shadow is kept here (see
//! [`step`](super::step)); while it runs, KVM keeps it. What is on its way into the guest is delivered
//! before the first step.

use super::counter::{BranchCounter, CounterLost};
use super::landing::{Approached, Ground, Reached, approach};
use super::run::FAULT_IS_DELIVERED;
use super::step::Stepped;
use super::vcpu::{ExitContext, Outcome};
use super::{Halted, KvmEngine};
use crate::trust::breakpoint::{self, Trusted as Breakpoints};
use vmft_cpu::{Access, Bus, Exit, WatchedBus};
use vmft_log::point::{Branches, CodeAddress, ExecutionPoint};

/// The bound of the numbers.
const OUT_OF_POINTS: &str =
    "the guest has run for so long that there are no numbers for points left";

/// What landing has met since the engine was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LandingStats {
    /// Points reached between two exits.
    pub landed: u64,
    /// How many of them were not where they should have been, because the guest came back too late.
    pub overshot: u64,
    /// The most branches it came late by.
    pub worst_overshoot: u64,
    /// Instructions stepped.
    pub steps: u64,
    /// How often a breakpoint stopped the guest in front of a branch that a point was said to lie behind.
    pub breakpoint_hits: u64,
}

/// Where the guest is between two exits.
#[derive(Debug)]
pub(crate) struct Counting {
    pub(crate) counter: Box<dyn BranchCounter>,
    /// The point of the last exit, or where the state was restored.
    base: ExecutionPoint,
    /// What the counter said there; `None` until it is asked.
    origin: Option<Branches>,
    /// What it said when it was asked last.
    last: Branches,
    /// Branches since `base` that were executed where the counter does not see them.
    unseen: u64,
    /// The guest is being stepped.
    pub(crate) stepping: bool,
    /// Which branch a point is said to lie behind.
    hint: Option<(ExecutionPoint, CodeAddress)>,
    /// Where the guest can be stopped at one.
    pub(crate) breakpoints: Breakpoints,
    /// The branch that was stepped last, if that was the last step, and whoever comes this way meets it.
    branch: Option<CodeAddress>,
    /// The last instruction was stepped by the host's CPU.
    plain: bool,
    /// The point that was landed on last, and the branch it lies behind.
    landed: Option<(ExecutionPoint, CodeAddress)>,
    /// Where a kicked guest could come to rest.
    pub(crate) nearest: Option<ExecutionPoint>,
    pub(crate) stats: LandingStats,
}

impl Counting {
    pub(crate) fn new(counter: Box<dyn BranchCounter>) -> Self {
        // Where every instruction is stepped, one that stands at an address needs nothing of the host.
        let breakpoints = match counter.needs_steps() {
            true => Breakpoints { kernel: true, user: true },
            false => breakpoint::trusted(),
        };
        Self {
            counter,
            base: ExecutionPoint::START,
            origin: None,
            last: Branches(0),
            unseen: 0,
            stepping: false,
            hint: None,
            breakpoints,
            branch: None,
            plain: false,
            landed: None,
            nearest: None,
            stats: LandingStats::default(),
        }
    }

    /// The place the guest is at now is `point`. What is behind it, exits and branches, is in its
    /// number.
    pub(crate) fn restart(&mut self, point: ExecutionPoint) {
        self.base = point;
        self.origin = None;
        self.unseen = 0;
        self.stepped_over(false, None);
        self.landed = None;
    }

    /// A step has led over a branch at `branch`, or over something else. Whoever runs this way meets a
    /// breakpoint there if the instruction before was a plain one: `IRET` and what loads SS keep the next
    /// instruction's from working (SDM 3B, section 19.3.1.1).
    fn stepped_over(&mut self, plain: bool, branch: Option<CodeAddress>) {
        self.branch = branch.filter(|_| self.plain);
        self.plain = plain;
    }

    /// What is hoped to lead to `point`.
    fn hint_for(&self, point: ExecutionPoint) -> Option<CodeAddress> {
        self.hint.and_then(|(hinted, branch)| (hinted == point).then_some(branch))
    }

    /// Branches since `base`.
    fn since_exit(&mut self) -> Result<Branches, CounterLost> {
        self.last = self.counter.count()?;
        let origin = *self.origin.get_or_insert(self.last);
        let seen = self.last.0.checked_sub(origin.0);
        let seen = seen.ok_or_else(|| CounterLost("it ran backwards".to_owned()))?;
        Ok(Branches(seen + self.unseen))
    }

    /// The number of the place `since` branches after `base`, as the moment of an access.
    fn moment(&self, since: Branches) -> ExecutionPoint {
        self.base.plus_branches(since).unwrap_or(self.base)
    }

    /// The guest has exited, `branches` after `base`, which is what the counter said last.
    fn exited(&mut self, branches: Branches) -> Option<ExecutionPoint> {
        let exit = self.base.next_exit(branches)?;
        self.restart(exit);
        self.origin = Some(self.last);
        Some(exit)
    }
}

/// What is known of an exit that records are made of.
struct Watched {
    access: Access,
    registers: Option<[u64; 18]>,
    /// Branches since the exit before.
    since: Branches,
}

/// What ends a move: an exit of the run, or `None` if the run must be looked at anew.
pub(crate) type Ended = Option<Exit>;

/// The engine on its way to a place.
pub(crate) struct Approach<'a> {
    pub(crate) engine: &'a mut KvmEngine,
    pub(crate) bus: &'a mut dyn Bus,
    pub(crate) want: bool,
    pub(crate) kicked: bool,
    /// A counter without hardware wants the guest to come back.
    pub(crate) overflowed: bool,
}

impl KvmEngine {
    pub(crate) fn run_branches(
        &mut self,
        bound: ExecutionPoint,
        want: bool,
        bus: &mut dyn Bus,
    ) -> Exit {
        let _running = self.vcpu.kicks.enter();
        self.counting().nearest = None;
        let mut kicked = false;
        loop {
            if let Some(exit) = self.at_boundary(bound, want) {
                return exit;
            }
            let counting = self.counting();
            let target = bound.since(counting.base);
            let target = (bound != ExecutionPoint::NEVER).then_some(Branches(target));
            let margin = counting.counter.margin();
            let hint = counting.hint_for(bound);
            let mut way =
                Approach { engine: &mut *self, bus: &mut *bus, want, kicked, overflowed: false };
            let approached = approach(&mut way, target, margin, hint);
            kicked = way.kicked;
            if hint.is_some() && self.point > bound {
                // The guest has exited behind the place.
                self.hint_misled();
            }
            match approached {
                Ok(Approached::Ended(Some(exit))) => return exit,
                Ok(Approached::Ended(None)) => {}
                Ok(Approached::Landed { at, overshot_by }) => {
                    if let Err(exit) = self.landed(at, overshot_by, bound) {
                        return exit;
                    }
                }
                Err(lost) => return self.counter_lost(&lost),
            }
        }
    }

    pub(crate) fn counting(&mut self) -> &mut Counting {
        self.counting.as_mut().expect("an engine whose points are branches counts them")
    }

    /// See [`BranchPoints::branch_before`](vmft_cpu::BranchPoints::branch_before).
    pub(crate) fn landed_behind(&self) -> Option<CodeAddress> {
        let (point, branch) = self.counting.as_ref()?.landed?;
        (point == self.point && !self.between).then_some(branch)
    }

    /// See [`BranchPoints::expect_branch`](vmft_cpu::BranchPoints::expect_branch).
    pub(crate) fn set_hint(&mut self, point: ExecutionPoint, branch: CodeAddress) {
        if let Some(counting) = &mut self.counting {
            counting.hint = Some((point, branch));
        }
    }

    /// True if the interrupt shadow is kept by the engine: while the guest is stepped.
    pub(crate) fn keeps_shadow(&self) -> bool {
        self.points == super::PointKind::Step
            || self.counting.as_ref().is_some_and(|counting| counting.stepping)
    }

    fn landed(
        &mut self,
        at: Branches,
        overshot_by: Option<u64>,
        bound: ExecutionPoint,
    ) -> Result<(), Exit> {
        let counting = self.counting();
        counting.stats.landed += 1;
        if let Some(by) = overshot_by {
            counting.stats.overshot += 1;
            counting.stats.worst_overshoot = counting.stats.worst_overshoot.max(by);
        }
        let Some(point) = counting.base.plus_branches(at) else {
            return Err(self.fatal(OUT_OF_POINTS));
        };
        if let Some(by) = overshot_by {
            tracing::warn!(
                %bound, %point, late_by = by,
                "the counter brought the guest back too late: it is behind the place asked for"
            );
        }
        let counting = self.counting();
        counting.landed = counting.branch.map(|branch| (point, branch));
        self.point = point;
        self.between = false;
        Ok(())
    }

    fn counter_lost(&mut self, lost: &CounterLost) -> Exit {
        tracing::error!(%lost, "no point can be named any more");
        self.fatal("the counter of branches is lost, so no point of the guest can be named")
    }

    /// The point of an exit, `since` branches after the one before.
    fn reach_exit(&mut self, since: Branches) -> Result<(), Exit> {
        let Some(point) = self.counting().exited(since) else {
            return Err(self.fatal(OUT_OF_POINTS));
        };
        self.point = point;
        self.between = false;
        Ok(())
    }

    /// Comes back for a kick, with the nearest place ahead that has a number.
    fn kicked_on_the_way(&mut self) -> Exit {
        let counting = self.counting();
        match counting.since_exit() {
            Ok(since) => {
                counting.nearest = counting.base.plus_branches(Branches(since.0 + 1));
                Exit::Kicked
            }
            Err(lost) => self.counter_lost(&lost),
        }
    }

    /// From a run to steps. False if what is on its way into the guest cannot be delivered here.
    fn begin_stepping(&mut self) -> Result<bool, Exit> {
        if self.counting().stepping {
            return Ok(true);
        }
        if !self.settle()? {
            return Ok(false);
        }
        let shadow = self.vcpu.stop().take_shadow().expect(super::REGISTERS);
        self.shadow = shadow;
        let counting = self.counting();
        counting.stepping = true;
        // Nobody saw it.
        counting.plain = false;
        Ok(true)
    }

    /// From steps to a run.
    pub(crate) fn end_stepping(&mut self) {
        if std::mem::take(&mut self.counting().stepping) {
            let shadow = std::mem::take(&mut self.shadow);
            let mut stopped = self.vcpu.stop();
            stopped.set_stepping(false).expect("what was turned on can be turned off");
            stopped.put_shadow(shadow).expect(super::REGISTERS);
        }
    }
}

impl Approach<'_> {
    /// What must be looked at before the guest goes on.
    pub(crate) fn before_moving(&mut self) -> Option<Ended> {
        let engine = &mut *self.engine;
        if engine.shut_down || engine.halted != Halted::No {
            return Some(None);
        }
        if self.want && !engine.queued && engine.can_take_interrupt() {
            return Some(Some(Exit::InterruptWindow));
        }
        self.kicked |= engine.vcpu.kicks.take();
        if !self.kicked {
            return None;
        }
        match engine.settle() {
            Ok(true) => {
                self.kicked = false;
                Some(Some(engine.kicked_on_the_way()))
            }
            Ok(false) => None,
            Err(ended) => Some(Some(ended)),
        }
    }

    /// The guest has come back: what follows for the run.
    fn came_back(&mut self, outcome: Outcome, watched: &Watched) -> Option<Ended> {
        let engine = &mut *self.engine;
        match outcome {
            Outcome::Access | Outcome::Register { faulted: false } | Outcome::Halted => {
                if let Err(fatal) = engine.reach_exit(watched.since) {
                    return Some(Some(fatal));
                }
                engine.note_exit(outcome, watched.access, watched.registers, watched.since);
                if outcome == Outcome::Halted {
                    let interruptible = engine.vcpu.interrupt_flag();
                    engine.halted = Halted::Waiting { interruptible };
                }
                Some((outcome == Outcome::Access).then_some(Exit::BusAccess))
            }
            Outcome::Register { faulted: true } => match engine.settle() {
                Ok(settled) => {
                    debug_assert!(settled, "{FAULT_IS_DELIVERED}");
                    None
                }
                Err(ended) => Some(Some(ended)),
            },
            Outcome::Shutdown => {
                engine.shut_down = true;
                Some(None)
            }
            Outcome::Failed(what) => Some(Some(engine.fatal(what))),
            Outcome::Interrupted | Outcome::Window | Outcome::Stepped => None,
        }
    }

    /// Lets KVM run the guest until it comes back.
    pub(crate) fn enter(&mut self) -> Option<Ended> {
        let engine = &mut *self.engine;
        engine.between = true;
        let entered = engine.vcpu.enter();
        let registers = engine.exits.is_wanted().then(|| entered.registers());
        // The moment of an access is that of the exit, not of the point before.
        let counting = engine.counting.as_mut().expect("branches are counted");
        let since = match counting.since_exit() {
            Ok(since) => since,
            Err(lost) => return Some(Some(engine.counter_lost(&lost))),
        };
        let at = counting.moment(since);
        let mut bus = WatchedBus::new(&mut *self.bus);
        let mut around = ExitContext {
            at,
            bus: &mut bus,
            registers: &mut engine.registers,
            ram: engine.vm.ram(),
        };
        let outcome = entered.serve(&mut around);
        if outcome != Outcome::Interrupted {
            engine.queued = false;
        }
        let watched = Watched { access: bus.access(), registers, since };
        self.came_back(outcome, &watched)
    }

    /// One instruction.
    fn step_once(&mut self) -> Option<Ended> {
        let engine = &mut *self.engine;
        engine.vcpu.request_window(false);
        match engine.begin_stepping() {
            Ok(true) => {}
            // What cannot be delivered here is delivered by entering. How far that leads, the
            // count says.
            Ok(false) => return self.enter(),
            Err(ended) => return Some(Some(ended)),
        }
        engine.between = true;
        let counting = engine.counting();
        counting.stats.steps += 1;
        let since = match counting.since_exit() {
            Ok(since) => since,
            Err(lost) => return Some(Some(engine.counter_lost(&lost))),
        };
        let at = counting.moment(since);
        let mut bus = WatchedBus::new(&mut *self.bus);
        let stepped = engine.step_one(at, &mut bus);
        let access = bus.access();
        let counting = engine.counting();
        let needs_steps = counting.counter.needs_steps();
        let (plain, branch) = match stepped {
            Stepped::Retired { branched, softly: false, address } => {
                (true, branched.then_some(address).and_then(|at| CodeAddress::try_from(at).ok()))
            }
            _ => (false, None),
        };
        counting.stepped_over(plain, branch);
        match stepped {
            Stepped::Retired { branched, .. } if needs_steps => {
                self.overflowed |= counting.counter.stepped(branched);
                None
            }
            Stepped::Retired { branched, softly, .. } => {
                counting.unseen += u64::from(branched && softly);
                None
            }
            Stepped::Unfinished => None,
            // An instruction that exits is no branch.
            Stepped::Exited { outcome, registers } => {
                let registers = Some(registers);
                self.came_back(outcome, &Watched { access, registers, since })
            }
            Stepped::Ended(exit) => Some(Some(exit)),
        }
    }
}

impl Ground for Approach<'_> {
    type Exit = Ended;

    fn since_exit(&mut self) -> Result<Branches, CounterLost> {
        self.engine.counting().since_exit()
    }

    fn arm(&mut self, after: Option<Branches>) -> Result<(), CounterLost> {
        let counter = &mut self.engine.counting().counter;
        match after {
            Some(after) => counter.arm(after),
            None => counter.disarm(),
        }
    }

    fn run(&mut self) -> Option<Ended> {
        if self.engine.counting().counter.needs_steps() {
            self.overflowed = false;
            while !self.overflowed {
                if let Some(ended) = self.step() {
                    return Some(ended);
                }
            }
            return None;
        }
        if let Some(ended) = self.before_moving() {
            return Some(ended);
        }
        self.engine.end_stepping();
        self.engine.vcpu.request_window(self.want);
        self.enter()
    }

    fn run_to(&mut self, branch: CodeAddress) -> Result<Reached, Ended> {
        self.run_to_breakpoint(branch)
    }

    fn step(&mut self) -> Option<Ended> {
        self.before_moving().or_else(|| self.step_once())
    }

    fn misled(&mut self) {
        self.engine.hint_misled();
    }
}
