//! A guest of one CPU that runs freely: nothing is replayed, so the host may stop it anywhere.
//!
//! It is a group of one. Whatever the host's CPU can be in, it may be in: its state is carried as KVM gives it
//! ([`carried`](super::carried)), events that are half delivered included, and no other engine is asked for anything. Without
//! other CPUs there is no local APIC, and `HLT` comes to us.

use super::carried::{self, TimeStamp};
use super::error::KvmError;
use super::open::Vm;
use super::power_on::PowerOn;
use super::vcpu::{ExitContext, Outcome, Vcpu};
use super::{Halted, REGISTERS};
use std::borrow::Cow;
use std::sync::Arc;
use vmft_cpu::group::{Activity, Cpus};
use vmft_cpu::kick::{Kicker, PeriodicKicks};
use vmft_cpu::kvm_state;
use vmft_cpu::kvm_state::OwnRegisters;
use vmft_cpu::memory::GuestRam;
use vmft_cpu::soft::CompilerGauge;
use vmft_cpu::{BranchPoints, Bus, CpuState, Engine, Exit, ExitStream, InvalidState, Vector};
use vmft_log::point::ExecutionPoint;

/// A CPU of the host that runs freely.
#[derive(Debug)]
pub struct FreeEngine {
    /// From the first run on. Stops before the CPU it kicks is closed.
    kicks: Option<PeriodicKicks>,
    vcpu: Vcpu,
    vm: Vm,
    power_on: PowerOn,
    point: ExecutionPoint,
    registers: OwnRegisters,
    halted: Halted,
    shut_down: bool,
    /// An interrupt is on its way into the guest.
    queued: bool,
}

impl FreeEngine {
    /// Opens `/dev/kvm` and makes a virtual machine of one CPU that runs in `ram`. It has no valid state yet: call
    /// [`Engine::restore`] or [`Engine::restore_cpus`] first.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn open(ram: GuestRam) -> Result<Self, KvmError> {
        let (vm, mut vcpu) = Vm::open_free(ram)?;
        let power_on =
            PowerOn::of(&mut vcpu).map_err(KvmError::refused("show the state of a CPU"))?;
        Ok(Self {
            kicks: None,
            vcpu,
            vm,
            power_on,
            point: ExecutionPoint::START,
            registers: OwnRegisters::default(),
            halted: Halted::No,
            shut_down: false,
            queued: false,
        })
    }

    fn start_kicks(&mut self) -> Result<(), KvmError> {
        if self.kicks.is_none() {
            self.kicks = Some(self.vcpu.kicks.periodically()?);
        }
        Ok(())
    }

    fn fatal(&mut self, what: impl Into<Cow<'static, str>>) -> Exit {
        Exit::Fatal(self.vcpu.stop().fault(what, self.vm.ram(), self.point))
    }

    /// What ends the run at this boundary, if anything does.
    fn at_boundary(&mut self, bound: ExecutionPoint, want: bool) -> Option<Exit> {
        if self.shut_down {
            return Some(Exit::Shutdown);
        }
        if let Halted::Waiting { interruptible } = self.halted {
            return Some(Exit::Halted { interruptible });
        }
        if self.point >= bound {
            return Some(Exit::Bound);
        }
        (want && self.can_take_interrupt()).then_some(Exit::InterruptWindow)
    }

    fn can_take_interrupt(&mut self) -> bool {
        !self.shut_down && !self.queued && self.vcpu.can_take_interrupt()
    }

    fn reach_point(&mut self) {
        self.point = self.point.after(1);
    }

    /// Has `set` set the CPU's state, or leaves it as it was.
    fn set_state(
        &mut self,
        set: impl FnOnce(&mut Vcpu) -> Result<OwnRegisters, InvalidState>,
    ) -> Result<(), InvalidState> {
        let stopped = self.vcpu.stop();
        let (before, shown) = (stopped.state().expect(REGISTERS), stopped.shown().to_vec());
        match set(&mut self.vcpu) {
            Ok(registers) => self.registers = registers,
            Err(error) => {
                let mut stopped = self.vcpu.stop();
                stopped.show(&shown).expect("it said so before");
                stopped.set_state(&before).expect("it was this state before");
                stopped.refresh();
                return Err(error);
            }
        }
        let mut stopped = self.vcpu.stop();
        stopped.refresh();
        self.queued = stopped.events().expect(REGISTERS).interrupt.injected != 0;
        self.shut_down = false;
        Ok(())
    }

    fn set_halted(&mut self, halted: bool) {
        let interruptible = self.vcpu.interrupt_flag();
        self.halted = if halted { Halted::Waiting { interruptible } } else { Halted::No };
    }
}

impl Engine for FreeEngine {
    fn run(&mut self, bound: ExecutionPoint, want_interrupt: bool, bus: &mut dyn Bus) -> Exit {
        if let Err(error) = self.start_kicks() {
            return self.fatal(format!("its timers would not fire: {error}"));
        }
        let _running = self.vcpu.kicks.enter();
        loop {
            if let Some(exit) = self.at_boundary(bound, want_interrupt) {
                return exit;
            }
            if self.vcpu.kicks.take() {
                self.reach_point();
                return Exit::Bound;
            }
            self.vcpu.request_window(want_interrupt);
            let mut around = ExitContext {
                at: self.point,
                bus: &mut *bus,
                registers: &mut self.registers,
                ram: self.vm.ram(),
            };
            let outcome = self.vcpu.enter().serve(&mut around);
            if outcome != Outcome::Interrupted {
                self.queued = false;
            }
            match outcome {
                Outcome::Access => {
                    self.reach_point();
                    return Exit::BusAccess;
                }
                Outcome::Register { faulted: false } => self.reach_point(),
                Outcome::Halted => {
                    self.reach_point();
                    self.set_halted(true);
                }
                Outcome::Shutdown => self.shut_down = true,
                Outcome::Failed(what) => {
                    return self.fatal(what);
                }
                Outcome::Register { faulted: true }
                | Outcome::Interrupted
                | Outcome::Window
                | Outcome::Stepped => {}
            }
        }
    }

    fn point(&self) -> ExecutionPoint {
        self.point
    }

    fn inject(&mut self, Vector(vector): Vector) {
        assert!(self.can_take_interrupt(), "interrupt {vector} injected where none can be taken");
        self.halted = Halted::No;
        self.vcpu.stop().interrupt(vector).expect("there is no interrupt controller but ours");
        self.queued = true;
    }

    /// The registers as far as the CPU model has them.
    fn save(&mut self) -> CpuState {
        let state = self.vcpu.stop().state().expect(REGISTERS);
        let halted = self.halted != Halted::No;
        CpuState { halted, ..kvm_state::view(&state, &self.registers) }
    }

    fn restore(&mut self, state: &CpuState, point: ExecutionPoint) -> Result<(), InvalidState> {
        let Self { power_on, .. } = self;
        let power_on = power_on.clone();
        self.set_state(|vcpu| {
            power_on.set(vcpu, Some(state)).map_err(carried::refused)?;
            Ok(OwnRegisters::of(state))
        })?;
        self.set_halted(state.halted);
        self.point = point;
        Ok(())
    }

    fn save_cpus(&mut self) -> Cpus {
        let activity = if self.is_halted() { Activity::Halted } else { Activity::Running };
        let cpu = carried::save(&mut self.vcpu, &self.registers, Some(activity));
        Cpus::Kvm(vec![cpu.expect(REGISTERS)])
    }

    fn restore_cpus(&mut self, cpus: &Cpus, point: ExecutionPoint) -> Result<(), InvalidState> {
        let cpu = match cpus {
            Cpus::Model(state) => return self.restore(state, point),
            Cpus::Kvm(cpus) => match &cpus[..] {
                [cpu] => cpu,
                _ => {
                    return Err(InvalidState(format!(
                        "it has {} CPUs, this machine 1",
                        cpus.len()
                    )));
                }
            },
        };
        let halted = match cpu.activity {
            Activity::Running => false,
            Activity::Halted => true,
            Activity::Unstarted | Activity::Initialised => {
                return Err(InvalidState("its one CPU was never started".to_owned()));
            }
        };
        let (power_on, time_stamp) = (self.power_on.clone(), TimeStamp::At(cpu.time_stamp));
        self.set_state(|vcpu| carried::restore(vcpu, cpu, &power_on, time_stamp))?;
        self.set_halted(halted);
        self.point = point;
        Ok(())
    }

    fn exit_stream(&mut self) -> Option<&mut dyn ExitStream> {
        None
    }

    fn branch_points(&mut self) -> Option<&mut dyn BranchPoints> {
        None
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

    /// The host's caches are invisible to a guest that keeps its page tables in order.
    fn flush_caches(&mut self) {}

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
