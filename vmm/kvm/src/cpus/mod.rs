//! Guests of several CPUs: they run freely, at the same time.
//!
//! Each CPU has a thread of the host's that executes it, and does nothing else. Whatever a CPU stops for comes
//! to the thread inside [`Engine::run`], with the CPU itself: so there is one place where the bus is used and
//! interrupts are injected, and the board never learns that there are several.
//!
//! ```text
//!  thread of CPU 0 ◀─ lends the CPU ─┐
//!     KVM_RUN                         GroupEngine::run ──▶ Bus
//!                  ─ gives it back ─▶ │  interrupts of the board, for CPU 0
//!  thread of CPU 1 ◀─ lends ──────────┘
//!                  ─ gives it back ─▶
//! ```
//! **Local APICs** are the kernel's (a "split" interrupt controller), and with them `HLT`, start-up messages, and
//! the interrupts that CPUs send each other. The 8259s stay the board's; what they ask for is injected into
//! the CPU that boots, when it can take it, as if its first local line were wired to them.
//!
//! **Rest.** CPUs run on while the machine's loop is busy elsewhere. [`Engine::rest`] stops them all: each is
//! kicked, its last instruction is finished, and it stays with the engine until the next `run`. Only then can
//! states be saved or set, and only then is what has been written all that will have been.
//!
//! **Switched off.** A CPU that waits for ever does so inside the kernel. When nothing has happened for a while, all
//! are brought to rest and looked at.

mod events;
mod thread;

use super::carried::{self, TimeStamp};
use super::error::KvmError;
use super::kick::PERIOD;
use super::open::Vm;
use super::power_on::PowerOn;
use super::vcpu::{ExitContext, Exited, Outcome, Vcpu};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use thread::{CpuThread, Event, GroupKick, RunUntil};
use vmft_cpu::group::{Activity, Cpus};
use vmft_cpu::kick::Kicker;
use vmft_cpu::kvm_state;
use vmft_cpu::kvm_state::OwnRegisters;
use vmft_cpu::memory::GuestRam;
use vmft_cpu::soft::CompilerGauge;
use vmft_cpu::{
    BranchPoints, Bus, CpuCount, CpuState, Engine, Exit, ExitStream, InvalidState, Vector,
};
use vmft_log::point::ExecutionPoint;

/// After so many periods without an access the CPUs are looked at: a quarter of a second.
const QUIET_PERIODS: u32 = 250;
/// Why a CPU is with the engine.
const AT_REST: &str = "the CPUs are at rest";
/// Why requests to a CPU at rest succeed.
const REGISTERS: &str = "KVM reads and writes the state of a CPU that is at rest";

/// One CPU.
#[derive(Debug)]
struct Cpu {
    /// `None` while its thread has it.
    home: Option<Box<Vcpu>>,
    thread: CpuThread,
    kicker: Kicker,
    own: OwnRegisters,
    power_on: PowerOn,
    /// At home, in the middle of an instruction.
    unfinished: bool,
    /// At home, where it can take an interrupt.
    ready: bool,
    /// Away, to come back when it can take an interrupt.
    offers: bool,
    /// Away, and kicked.
    called: bool,
}

impl Cpu {
    fn call(&mut self) {
        if self.home.is_none() && !self.called {
            self.kicker.kick();
            self.called = true;
        }
    }

    /// Lets it run, if it is at home. `window`: until it can take an interrupt.
    fn let_go(&mut self, window: bool, until: RunUntil) {
        if let Some(mut vcpu) = self.home.take() {
            vcpu.request_window(window);
            vcpu.kicks.take();
            self.unfinished = false;
            self.ready = false;
            self.offers = window;
            self.called = false;
            self.thread.lend(vcpu, until);
        }
    }

    fn at_rest(&mut self) -> &mut Vcpu {
        assert!(!self.unfinished, "{AT_REST}");
        self.home.as_mut().expect(AT_REST)
    }
}

/// CPUs of the host.
#[derive(Debug)]
pub struct GroupEngine {
    /// By their numbers; the first boots.
    cpus: Vec<Cpu>,
    events: Receiver<Event>,
    kick: Arc<GroupKick>,
    vm: Vm,
    point: ExecutionPoint,
    /// It cannot go on.
    ended: Option<Exit>,
    off: bool,
    quiet: u32,
}

impl GroupEngine {
    /// Opens `/dev/kvm` and makes a virtual machine of several CPUs that runs in `ram`. It has no valid state
    /// yet: call [`Engine::restore`] first.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn open(ram: GuestRam, cpus: CpuCount) -> Result<Self, KvmError> {
        let (vm, vcpus) = Vm::open_several(ram, cpus)?;
        let (sender, events) = mpsc::channel();
        let open = |(number, mut vcpu): (u8, Vcpu)| {
            Ok(Cpu {
                kicker: vcpu.kicks.kicker(),
                own: OwnRegisters::default(),
                power_on: PowerOn::with_apic(&mut vcpu)
                    .map_err(KvmError::refused("show the state of a CPU"))?,
                home: Some(Box::new(vcpu)),
                thread: CpuThread::start(number, sender.clone())?,
                unfinished: false,
                ready: false,
                offers: false,
                called: false,
            })
        };
        let cpus = (0..).zip(vcpus).map(open).collect::<Result<_, KvmError>>()?;
        Ok(Self {
            cpus,
            events,
            kick: GroupKick::new(sender),
            vm,
            point: ExecutionPoint::START,
            ended: None,
            off: false,
            quiet: 0,
        })
    }

    /// Takes a CPU back and serves what it stopped for.
    fn take_back(
        &mut self,
        number: u8,
        mut vcpu: Box<Vcpu>,
        exited: Exited,
        bus: &mut dyn Bus,
    ) -> Outcome {
        let Self { cpus, vm, point, .. } = self;
        let cpu = &mut cpus[usize::from(number)];
        let mut around = ExitContext { at: *point, bus, registers: &mut cpu.own, ram: vm.ram() };
        let outcome = vcpu.serve_one(exited, &mut around);
        cpu.unfinished = matches!(outcome, Outcome::Access | Outcome::Register { .. });
        cpu.ready = !cpu.unfinished && vcpu.was_ready();
        cpu.home = Some(vcpu);
        match outcome {
            Outcome::Shutdown => self.ended = Some(Exit::Shutdown),
            Outcome::Failed(what) => self.ended = Some(self.fault(number, what)),
            _ => {}
        }
        outcome
    }

    /// A CPU cannot go on from here.
    fn fault(&mut self, number: u8, what: &'static str) -> Exit {
        let Self { cpus, vm, point, .. } = self;
        let mut stopped = cpus[usize::from(number)].at_rest().stop();
        Exit::Fatal(stopped.fault(what, vm.ram(), *point))
    }

    /// All CPUs are as after power-on; the one that boots, with the registers of `boot`.
    fn start_over(
        &mut self,
        point: ExecutionPoint,
        boot: Option<&CpuState>,
    ) -> Result<(), InvalidState> {
        for (number, each) in (0u8..).zip(&mut self.cpus) {
            let loaded = boot.filter(|_| number == 0);
            each.own = loaded.map_or_else(OwnRegisters::default, OwnRegisters::of);
            each.unfinished = false;
            each.ready = false;
            let Cpu { home, power_on, .. } = each;
            let vcpu = home.as_mut().expect(AT_REST);
            power_on.set(vcpu, loaded).map_err(carried::refused)?;
        }
        self.point = point;
        self.ended = None;
        self.off = false;
        self.quiet = 0;
        Ok(())
    }

    /// Nothing happened at the bus. After a while of that the CPUs are looked at.
    fn be_quiet(&mut self, bus: &mut dyn Bus) -> Exit {
        self.point = self.point.after(1);
        self.quiet += 1;
        if self.quiet >= QUIET_PERIODS {
            self.quiet = 0;
            self.rest(bus);
            let is_off = |cpu: &mut Cpu| events::is_off(cpu.at_rest()).expect(REGISTERS);
            self.off = self.cpus.iter_mut().all(is_off);
        }
        Exit::Bound
    }
}

impl Engine for GroupEngine {
    fn run(&mut self, bound: ExecutionPoint, want_interrupt: bool, bus: &mut dyn Bus) -> Exit {
        loop {
            if let Some(ended) = &self.ended {
                return ended.clone();
            }
            if self.point >= bound {
                return Exit::Bound;
            }
            let [boot, others @ ..] = &mut self.cpus[..] else { unreachable!("one boots") };
            if want_interrupt && boot.ready {
                return Exit::InterruptWindow;
            }
            boot.let_go(want_interrupt, RunUntil::Stopped);
            if want_interrupt && !boot.offers {
                boot.call();
            }
            others.iter_mut().for_each(|cpu| cpu.let_go(false, RunUntil::Stopped));
            let (number, vcpu, exited) = match self.events.recv_timeout(PERIOD) {
                Ok(Event::Back { number, vcpu, exited }) => (number, vcpu, exited),
                Ok(Event::Kicked) => {
                    self.kick.met();
                    return self.be_quiet(bus);
                }
                Err(_) => return self.be_quiet(bus),
            };
            match self.take_back(number, vcpu, exited, bus) {
                Outcome::Access | Outcome::Register { .. } => {
                    self.point = self.point.after(1);
                    self.quiet = 0;
                    return Exit::BusAccess;
                }
                _ => {}
            }
        }
    }

    fn point(&self) -> ExecutionPoint {
        self.point
    }

    fn inject(&mut self, Vector(vector): Vector) {
        let boot = &mut self.cpus[0];
        assert!(boot.ready, "interrupt {vector} injected where none can be taken");
        events::inject(boot.at_rest(), vector).expect(REGISTERS);
        boot.ready = false;
    }

    /// The CPU that boots, as far as the CPU model has its registers.
    fn save(&mut self) -> CpuState {
        let boot = &mut self.cpus[0];
        let own = boot.own;
        let stopped = boot.at_rest().stop();
        let activity = carried::activity_of(&stopped).expect(REGISTERS);
        let state = stopped.state().expect(REGISTERS);
        CpuState { halted: activity == Activity::Halted, ..kvm_state::view(&state, &own) }
    }

    fn restore(&mut self, cpu: &CpuState, point: ExecutionPoint) -> Result<(), InvalidState> {
        self.start_over(point, Some(cpu))
    }

    fn rest(&mut self, bus: &mut dyn Bus) -> bool {
        let mut used = false;
        loop {
            let mut under_way = false;
            for cpu in &mut self.cpus {
                if cpu.unfinished {
                    cpu.let_go(false, RunUntil::InstructionEnd);
                    cpu.called = true;
                }
                cpu.call();
                under_way |= cpu.home.is_none();
            }
            if !under_way {
                return used;
            }
            match self.events.recv() {
                Ok(Event::Back { number, vcpu, exited }) => {
                    let outcome = self.take_back(number, vcpu, exited, bus);
                    used |= matches!(outcome, Outcome::Access | Outcome::Register { .. });
                }
                // Whoever has kicked is looked at before the CPUs run on.
                Ok(Event::Kicked) => self.kick.met(),
                Err(_) => unreachable!("the engine itself can send events"),
            }
        }
    }

    fn save_cpus(&mut self) -> Cpus {
        let save = |cpu: &mut Cpu| {
            let own = cpu.own;
            carried::save(cpu.at_rest(), &own, None).expect(REGISTERS)
        };
        Cpus::Kvm(self.cpus.iter_mut().map(save).collect())
    }

    fn restore_cpus(&mut self, cpus: &Cpus, point: ExecutionPoint) -> Result<(), InvalidState> {
        let saved = match cpus {
            Cpus::Kvm(saved) if saved.len() == self.cpus.len() => saved,
            _ => {
                let found = if let Cpus::Kvm(saved) = cpus { saved.len() } else { 1 };
                let wanted = self.cpus.len();
                return Err(InvalidState(format!("it has {found} CPUs, this machine {wanted}")));
            }
        };
        self.start_over(point, None)?;
        // They run alike, and were asked one after the other: none may go back.
        let last = saved.iter().map(|cpu| cpu.time_stamp).max().unwrap_or_default();
        let others = std::iter::repeat(TimeStamp::Like(last));
        let time_stamps = std::iter::once(TimeStamp::At(last)).chain(others);
        for ((each, saved), time_stamp) in self.cpus.iter_mut().zip(saved).zip(time_stamps) {
            let Cpu { home, power_on, .. } = each;
            let vcpu = home.as_mut().expect(AT_REST);
            each.own = carried::restore(vcpu, saved, power_on, time_stamp)?;
        }
        Ok(())
    }

    fn exit_stream(&mut self) -> Option<&mut dyn ExitStream> {
        None
    }

    fn branch_points(&mut self) -> Option<&mut dyn BranchPoints> {
        None
    }

    fn collect_written(&mut self) {
        assert!(self.cpus.iter().all(|cpu| cpu.home.is_some()), "{AT_REST}");
        self.vm.collect_written().expect("KVM keeps the log of dirty pages it was asked to keep");
    }

    fn kicker(&self) -> Option<Kicker> {
        Some(self.kick.kicker())
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

    /// One CPU that waits says nothing about the others.
    fn is_halted(&self) -> bool {
        false
    }

    fn is_off(&self) -> bool {
        self.off
    }

    fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }
}

impl Drop for GroupEngine {
    fn drop(&mut self) {
        for cpu in &mut self.cpus {
            cpu.thread.close();
            cpu.kicker.kick();
        }
        self.cpus.iter_mut().for_each(|cpu| cpu.thread.join());
    }
}
