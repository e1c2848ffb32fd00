//! The `kvm` engine: the guest's instructions run on the host's CPU.
//!
//! It owns the virtual machine and its one CPU, and knows nothing of devices: ports and device
//! addresses go to the bus. The kernel's interrupt controller, timers and clock are not used, for
//! they would act at moments nobody can name. Which places can be named, [`PointKind`] says.
//!
//! ```text
//! run (Exit) ───────┐                       ┌─ serves ports, devices, registers ──▶ Bus
//! branches (Pmu) ───┤
//! step (Step) ──────┴─▶ Vcpu::enter ─▶ Entered ─▶ Outcome;  Vcpu::stop ─▶ Stopped, whose state is consistent
//!        │ what a trap flag cannot step, and events that must be in before the guest goes on
//!        ▼
//!  the `soft` engine, on the same memory and the same CPU state
//! ```
//!
//! Here is the engine of guests whose points are named. Those that run freely have engines of their own, which need none
//! of this: `free` for one CPU, `cpus` for several.
//!
//! **What is lent to `soft`** must be a CPU of the model that both have. A guest that is elsewhere (with bits
//! in MXCSR that the model does not have, say) is stopped with a report where that would be needed, and where the
//! host looks at it between two points.
//!
//! **Determinism.** The host's kicks and signals are never points. An interrupt is injected only where the guest can take it: at once after a point, or at the
//! first boundary after it that can.

mod branches;
mod breakpoint;
mod carried;
mod counter;
mod cpus;
mod error;
mod fault;
mod free;
mod host_cpu;
mod kick;
mod landing;
mod open;
mod points;
mod power_on;
mod registers;
mod run;
mod state;
mod step;
pub mod trust;
mod vcpu;
mod walk;
mod watch;

pub use branches::LandingStats;
pub use counter::{BranchCounter, CounterLost};
pub use cpus::GroupEngine;
pub use error::KvmError;
pub use free::FreeEngine;
pub use points::PointKind;

use branches::Counting;
use counter::HardwareCounter;
use kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW;
use open::Vm;
use std::borrow::Cow;
use std::sync::Arc;
use vcpu::Vcpu;
use vmft_cpu::cpu_model::{self, TimeStamp};
use vmft_cpu::group::{Cpus, Pending};
use vmft_cpu::kick::{Kicker, PeriodicKicks};
use vmft_cpu::kvm_state::{OwnRegisters, in_the_model};
use vmft_cpu::memory::GuestRam;
use vmft_cpu::soft::{CacheLimits, CompilerGauge, Origin, SoftEngine};
use vmft_cpu::{
    BranchPoints, Bus, CpuState, Engine, Exit, ExitLog, ExitRecord, ExitStream, InvalidState,
    Vector,
};
use vmft_log::point::{CodeAddress, ExecutionPoint};
use walk::LinearView;

/// Why requests to a CPU that exists succeed.
const REGISTERS: &str = "KVM reads and writes the registers of a stopped CPU";

/// A digest of what `CPUID` says on this engine: sides that differ in it do not replay each
/// other's logs.
pub fn cpu_model_digest() -> String {
    cpu_model::digest(TimeStamp::Hidden)
}

/// A CPU of the host whose points are named.
#[derive(Debug)]
pub struct KvmEngine {
    /// Stops before the CPU it kicks is closed.
    _kicks: Option<PeriodicKicks>,
    vcpu: Vcpu,
    vm: Vm,
    points: PointKind,
    point: ExecutionPoint,
    registers: OwnRegisters,
    /// Executes single instructions and delivers events, on the same memory.
    helper: SoftEngine,
    halted: Halted,
    shut_down: bool,
    /// The run is over: the next one says why.
    ended: Option<Exit>,
    /// An interrupt is on its way into the guest.
    queued: bool,
    /// The guest has run on since the last point. With [`PointKind::Exit`], no interrupt is taken then.
    between: bool,
    /// While the guest is stepped: no interrupt at this boundary. Otherwise KVM keeps it.
    shadow: bool,
    /// With [`PointKind::Pmu`].
    counting: Option<Counting>,
    exits: ExitLog,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Halted {
    No,
    /// In `HLT`, with RFLAGS.IF.
    Waiting {
        interruptible: bool,
    },
}

impl KvmEngine {
    /// Opens `/dev/kvm` and makes a virtual machine of one CPU that runs in `ram`. It has no
    /// valid state yet: call [`Engine::restore`] first.
    ///
    /// # Errors
    /// See [`KvmError`].
    ///
    /// # Panics
    /// With [`PointKind::Free`], for which there is [`FreeEngine`].
    pub fn open(ram: GuestRam, points: PointKind) -> Result<Self, KvmError> {
        match points {
            PointKind::Pmu => {
                let trusted = crate::trust::counter::trusted().map_err(KvmError::Counter)?;
                let counter = HardwareCounter::new(trusted);
                let mut engine = Self::open_with(ram, points, Some(Box::new(counter)))?;
                engine._kicks = Some(engine.vcpu.kicks.periodically()?);
                Ok(engine)
            }
            PointKind::Exit | PointKind::Step => Self::open_with(ram, points, None),
            PointKind::Free => panic!("a guest that runs freely has an engine of its own"),
        }
    }

    /// The same with points at branches, which `counter` counts. It comes back by itself for exits
    /// only; whoever wants it to look at the world while the guest computes kicks it.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn open_counting(ram: GuestRam, counter: Box<dyn BranchCounter>) -> Result<Self, KvmError> {
        Self::open_with(ram, PointKind::Pmu, Some(counter))
    }

    fn open_with(
        ram: GuestRam,
        points: PointKind,
        counter: Option<Box<dyn BranchCounter>>,
    ) -> Result<Self, KvmError> {
        let helper = SoftEngine::with_limits(ram.clone(), CacheLimits::default().compiled(0, 0));
        let (vm, vcpu) = Vm::open(ram)?;
        Ok(Self {
            _kicks: None,
            vcpu,
            vm,
            points,
            point: ExecutionPoint::START,
            registers: OwnRegisters::default(),
            helper,
            halted: Halted::No,
            shut_down: false,
            ended: None,
            queued: false,
            between: false,
            shadow: false,
            counting: counter.map(Counting::new),
            exits: ExitLog::default(),
        })
    }

    /// With points at branches: what landing has met.
    pub fn landing_stats(&self) -> Option<LandingStats> {
        self.counting.as_ref().map(|counting| counting.stats)
    }

    /// What counts as a point.
    pub fn points(&self) -> PointKind {
        self.points
    }

    fn view(&self, cr3: u64) -> LinearView<'_> {
        LinearView { ram: self.vm.ram(), cr3 }
    }

    /// The run ends here, with the instruction at RIP.
    fn fatal(&mut self, what: impl Into<Cow<'static, str>>) -> Exit {
        Exit::Fatal(self.vcpu.stop().fault(what, self.vm.ram(), self.point))
    }

    /// Sets the registers, all of them; the engine's own part too.
    fn apply(&mut self, state: &CpuState) -> Result<(), vmm_sys_util::errno::Error> {
        let keeps_shadow = self.keeps_shadow();
        let mut stopped = self.vcpu.stop();
        let before = stopped.state()?;
        let mut state = state.clone();
        let shadow = state.interrupt_shadow;
        if keeps_shadow {
            // Kept here: with it, the host would run two instructions in one step.
            state.interrupt_shadow = false;
        }
        if let Err(error) = stopped.set_state(&before.with(&state)) {
            stopped.set_state(&before).expect("it was this state before");
            return Err(error);
        }
        stopped.refresh();
        self.registers = OwnRegisters::of(&state);
        self.shadow = shadow;
        let interruptible = state.rflags & run::INTERRUPT_FLAG != 0;
        self.halted = if state.halted { Halted::Waiting { interruptible } } else { Halted::No };
        self.shut_down = false;
        self.queued = false;
        Ok(())
    }

    /// The run ends here if the CPU is in a state that the CPU model does not have: nothing can be named, stepped or
    /// compared there.
    fn check_model(&mut self) -> Result<(), Exit> {
        let state = self.save();
        SoftEngine::check(&state).map_err(|InvalidState(why)| self.outside_the_model(&why))
    }

    fn outside_the_model(&mut self, why: &str) -> Exit {
        self.fatal(format!(
            "execution points are named for guests of the CPU model only, and here {why}; such a guest runs \
             unprotected or with --protect checkpoint"
        ))
    }

    /// Has `soft` do something to the CPU in its present state.
    ///
    /// # Errors
    /// The end of the run, if `soft` has no such state.
    fn borrow_helper<T>(&mut self, f: impl FnOnce(&mut SoftEngine) -> T) -> Result<T, Exit> {
        self.borrow_helper_at(self.point, f)
    }

    /// The same, which is at the point `at` to `soft`.
    fn borrow_helper_at<T>(
        &mut self,
        at: ExecutionPoint,
        f: impl FnOnce(&mut SoftEngine) -> T,
    ) -> Result<T, Exit> {
        let state = self.save();
        if let Err(InvalidState(why)) = self.helper.restore(&state, at) {
            return Err(self.outside_the_model(&why));
        }
        let result = f(&mut self.helper);
        let after = self.helper.save();
        let shut_down = self.helper.is_shut_down();
        if let Err(error) = self.apply(&after) {
            return Err(self.fatal(format!("this host's KVM refuses a state of its CPU: {error}")));
        }
        self.shut_down = shut_down;
        Ok(result)
    }

    /// Has `soft` deliver an event here.
    fn deliver(&mut self, Pending { vector, error, from }: Pending) -> Result<(), Exit> {
        self.borrow_helper(|helper| helper.deliver(vector, error, from))
    }

    /// Delivers what is on its way into the guest, so that the state is complete. False if that
    /// cannot be done here: the guest must be entered first.
    ///
    /// # Errors
    /// The end of the run, if the guest is where nothing can be delivered at all.
    fn settle(&mut self) -> Result<bool, Exit> {
        let stopped = self.vcpu.stop();
        let mut events = stopped.events().expect(REGISTERS);
        let exception = events.exception;
        let raised = exception.injected != 0 || exception.pending != 0;
        let error = (exception.has_error_code != 0).then_some(exception.error_code as u16);
        let event = if raised {
            match exception.nr {
                // The return address of these two is only KVM's to know.
                3 | 4 => return Ok(false),
                1 => Some(Pending { vector: Vector(1), error: None, from: Origin::Trap }),
                vector => {
                    Some(Pending { vector: Vector(vector), error, from: Origin::Instruction })
                }
            }
        } else if events.interrupt.injected != 0 {
            let vector = Vector(events.interrupt.nr);
            Some(Pending { vector, error: None, from: Origin::Line })
        } else {
            None
        };
        let Some(event) = event else {
            self.queued = false;
            return Ok(true);
        };
        if events.interrupt.soft != 0 {
            return Ok(false);
        }
        self.check_model()?;
        self.queued = false;
        events.exception = Default::default();
        events.interrupt.injected = 0;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        self.vcpu.stop().set_events(&events).expect(REGISTERS);
        self.deliver(event)?;
        Ok(true)
    }
}

impl Engine for KvmEngine {
    fn run(&mut self, bound: ExecutionPoint, want_interrupt: bool, bus: &mut dyn Bus) -> Exit {
        if let Some(ended) = &self.ended {
            return ended.clone();
        }
        match self.points {
            PointKind::Exit | PointKind::Free => self.run_exits(bound, want_interrupt, bus),
            PointKind::Step => self.run_steps(bound, want_interrupt, bus),
            PointKind::Pmu => self.run_branches(bound, want_interrupt, bus),
        }
    }

    fn point(&self) -> ExecutionPoint {
        self.point
    }

    fn inject(&mut self, vector: Vector) {
        assert!(
            self.can_take_interrupt() && !self.queued,
            "interrupt {} injected where none can be taken",
            vector.0
        );
        self.halted = Halted::No;
        if self.keeps_shadow() {
            // The guest would see the trap flag in the frame.
            let event = Pending { vector, error: None, from: Origin::Line };
            self.ended = self.deliver(event).err();
        } else {
            self.vcpu
                .stop()
                .interrupt(vector.0)
                .expect("there is no interrupt controller but ours");
            self.queued = true;
        }
    }

    fn save(&mut self) -> CpuState {
        let mut state = self.vcpu.stop().state().expect(REGISTERS).plain();
        state.msrs.tsc_adjust = self.registers.tsc_adjust;
        state.msrs.tsc_aux = self.registers.tsc_aux;
        state.halted = self.halted != Halted::No;
        if self.keeps_shadow() {
            state.interrupt_shadow = self.shadow;
        }
        state
    }

    fn restore(&mut self, state: &CpuState, point: ExecutionPoint) -> Result<(), InvalidState> {
        // The two engines have the same CPU, and `soft` says what states it has.
        self.helper.restore(state, point)?;
        self.apply(state)
            .map_err(|error| InvalidState(format!("this host's KVM refuses it: {error}")))?;
        self.point = point;
        self.ended = None;
        self.between = false;
        if let Some(counting) = &mut self.counting {
            counting.restart(point);
        }
        Ok(())
    }

    fn save_cpus(&mut self) -> Cpus {
        Cpus::Model(Box::new(self.save()))
    }

    fn restore_cpus(&mut self, cpus: &Cpus, point: ExecutionPoint) -> Result<(), InvalidState> {
        let (state, pending) = match cpus {
            Cpus::Model(state) => return self.restore(state, point),
            Cpus::Kvm(cpus) => in_the_model(cpus)?,
        };
        self.restore(&state, point)?;
        self.ended = pending.and_then(|event| self.deliver(event).err());
        Ok(())
    }

    fn exit_stream(&mut self) -> Option<&mut dyn ExitStream> {
        Some(self)
    }

    fn branch_points(&mut self) -> Option<&mut dyn BranchPoints> {
        self.counting.is_some().then_some(self as &mut dyn BranchPoints)
    }

    fn rest(&mut self, _: &mut dyn Bus) -> bool {
        false
    }

    fn collect_written(&mut self) {
        // What is left of an instruction may write to memory.
        self.vcpu.finish();
        self.vm.collect_written().expect("KVM keeps the log of dirty pages it was asked to keep");
    }

    fn kicker(&self) -> Option<Kicker> {
        Some(self.vcpu.kicks.kicker())
    }

    fn compiler(&self) -> Option<Arc<CompilerGauge>> {
        None
    }

    fn code_here(&mut self, _: usize) -> Option<(u64, Vec<u8>)> {
        None
    }

    /// Taking the log of dirty pages has renewed it.
    fn renew_write_tracking(&mut self) {}

    /// The host's caches are invisible to a guest that keeps its page tables in order. But a side that
    /// is restored from a checkpoint between two points is at a place that it takes for a point, and
    /// so does this one.
    fn flush_caches(&mut self) {
        self.between = false;
        if let Some(counting) = &mut self.counting {
            counting.restart(self.point);
        }
    }

    fn is_halted(&self) -> bool {
        self.halted != Halted::No
    }

    fn is_off(&self) -> bool {
        self.halted == Halted::Waiting { interruptible: false }
    }

    fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }
}

impl ExitStream for KvmEngine {
    fn watch_exits(&mut self, wanted: bool) {
        self.exits.want(wanted);
    }

    fn take_exits(&mut self, into: &mut Vec<ExitRecord>) {
        self.exits.take(into);
    }
}

impl BranchPoints for KvmEngine {
    fn nearest_point(&self) -> Option<ExecutionPoint> {
        self.counting.as_ref().and_then(|counting| counting.nearest)
    }

    fn branch_before(&self) -> Option<CodeAddress> {
        self.landed_behind()
    }

    fn expect_branch(&mut self, point: ExecutionPoint, branch: CodeAddress) {
        self.set_hint(point, branch);
    }
}

#[cfg(test)]
mod tests {
    /// False, with a word to the reader, where the environment says that there is no `/dev/kvm`.
    pub(crate) fn has_kvm() -> bool {
        let without = std::env::var("VMFT_NO_KVM").is_ok_and(|value| value == "1");
        if without {
            println!("VMFT_NO_KVM=1: this host has no /dev/kvm, nothing is tested");
        }
        !without
    }
}
