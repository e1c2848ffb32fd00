//! The `soft` engine: an x86-64 system CPU in user space.
//!
//! It is always in long mode, where it executes 64-bit code, and 32-bit and 16-bit code beside it
//! (`compat`). What it is, `CPUID` says (`cpuid`); an instruction that is
//! not offered is undefined, and one that is offered but missing ends the run with its bytes.
//!
//! ```text
//! run loop (mod, step) ── asks ──▶ block cache (block) ── decodes ──▶ ops (op, fast, generic)
//!        │ executes ops on                                            │
//!        ▼                                                            ▼
//!   register file (cpu) ── loads, stores ──▶ TLB fast path (access, tlb) ──▶ memory
//!        │                                        │ slow path (linear), walks (mmu)
//!        └── events (event): faults, bus, writes to code ◀────────────┘
//! ```
//!
//! **Determinism.** The state at a point is a function of the state before and the inputs, not
//! of how the run was divided by bounds. What the TLB holds depends on the instruction history
//! alone; whether and how code is decoded is visible nowhere.

mod access;
mod block;
mod code_map;
mod compat;
mod compiler;
mod cpu;
mod decoded;
mod event;
mod exception;
mod fast;
mod flags;
mod gauge;
mod generic;
mod limits;
mod linear;
mod mmu;
mod op;
mod op_store;
mod operand;
mod ops;
mod step;
mod system;
mod tlb;
mod trial;
pub(crate) mod vector;
mod vector_context;

#[cfg(test)]
mod tests;

use super::cpu_model::{self as cpuid, TimeStamp};
use super::group::{Cpus, Pending};
use super::{
    BranchPoints, Bus, CpuState, Engine, Exit, ExitStream, InvalidState, Kicker, Vector, kvm_state,
};
use crate::memory::GuestRam;
use block::BlockCache;
pub use compiler::{Difference, Miscompiled};
use cpu::{ARMED, CHECKED_CODE, Cpu, HALTED, SHADOW, SHUT_DOWN};
pub use gauge::CompilerGauge;
pub use limits::{CacheLimits, CompilerMode, set_compiler};
use std::sync::Arc;
use system::interrupts::Source;
use vmft_log::point::ExecutionPoint;

/// True if the engine executes instructions of this form.
pub fn supports(code: iced_x86::Code) -> bool {
    generic::select(code).is_some()
}

/// Counts what this engine does where manuals leave the choice to it (undefined flags, results of
/// undefined operands): programs that choose otherwise compute something else from one log.
const CHOICES_REVISION: u32 = 2;

/// What identifies the CPU: a digest of what `CPUID` says, and the revision of what manuals leave
/// open. Engines that differ in it do not replay each other's logs.
pub fn cpu_model_digest() -> String {
    format!("{}, choices {CHOICES_REVISION}", cpuid::digest(TimeStamp::Shown))
}

/// Why engines compile nothing on this host, if it cannot be otherwise.
pub fn compiler_obstacle() -> Option<String> {
    compiler::obstacle()
}

/// What the compiler of an engine does that this process makes now, here.
pub fn compiler_mode() -> CompilerMode {
    match limits::compiler_wanted() {
        wanted if compiler_obstacle().is_none() => wanted,
        _ => CompilerMode::Off,
    }
}

/// Where a delivered event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The interrupt line.
    Line,
    /// A fault of the instruction at RIP.
    Instruction,
    /// A trap after an instruction.
    Trap,
}

/// The software CPU.
#[derive(Debug)]
pub struct SoftEngine {
    cpu: Cpu,
    cache: BlockCache,
    gauge: Arc<CompilerGauge>,
}

impl SoftEngine {
    /// A CPU that runs in `ram`. It has no valid state yet: call [`Engine::restore`] first.
    pub fn new(ram: GuestRam) -> Self {
        Self::with_limits(ram, CacheLimits::default())
    }

    /// The same with other limits of its caches, which show nowhere.
    pub fn with_limits(ram: GuestRam, limits: CacheLimits) -> Self {
        let cache = BlockCache::new(&ram, limits);
        let mode = match &cache.compiler {
            None => CompilerMode::Off,
            Some(compiler) if compiler.checks() => CompilerMode::Check,
            Some(_) => CompilerMode::On,
        };
        Self { cpu: Cpu::new(ram, limits), cache, gauge: Arc::new(CompilerGauge::new(mode)) }
    }

    /// An engine that checks its compiler, and whose compiler has this fault.
    ///
    /// # Panics
    /// Where the host does not let memory be executed.
    #[cfg(feature = "planted-faults")]
    pub fn with_fault(ram: GuestRam, fault: fn(&mut iced_x86::Instruction)) -> Self {
        let mut engine =
            Self::with_limits(ram, CacheLimits::default().compiled(1 << 20, 0).checked());
        let compiler = engine.cache.compiler.as_mut();
        compiler.expect("this host lets memory be executed").planted = Some(fault);
        engine
    }

    /// An engine whose `CPUID` says what that of the `kvm` engine says, which hides the time-stamp counter:
    /// what both execute can be compared.
    pub fn with_cpu_model_of_kvm(ram: GuestRam) -> Self {
        let mut engine = Self::new(ram);
        engine.cpu.time_stamp_counter = TimeStamp::Hidden;
        engine
    }

    /// The state is one of a CPU of this model.
    ///
    /// # Errors
    /// [`InvalidState`], with what is not.
    pub fn check(state: &CpuState) -> Result<(), InvalidState> {
        cpu::validate(state)
    }

    /// Delivers an event here, for the engine that borrows this one for it; a fault in the delivery
    /// is delivered in its turn.
    pub fn deliver(&mut self, vector: Vector, error: Option<u16>, from: Origin) {
        self.cpu.system_flags &= !HALTED;
        let source = match from {
            Origin::Line => Source::External,
            Origin::Instruction => Source::Fault,
            Origin::Trap => Source::Trap,
        };
        if self.cpu.deliver(vector.0, error, source).is_err() {
            let exception = self.cpu.take_exception();
            self.cpu.deliver_exception(exception);
        }
    }

    /// True after a triple fault.
    pub fn is_shut_down(&self) -> bool {
        self.cpu.system_flags & SHUT_DOWN != 0
    }

    /// Forgets decoded instructions that were overwritten: by devices, and by the guest.
    fn forget_stale(&mut self) {
        for page in self.cpu.ram.guest().tracker().take_stale_code() {
            self.cache.forget_page(&mut self.cpu, page);
        }
        while let Some(page) = self.cpu.stale.pop() {
            self.cache.forget_page(&mut self.cpu, page);
        }
    }
}

impl Engine for SoftEngine {
    fn run(&mut self, bound: ExecutionPoint, want_interrupt: bool, bus: &mut dyn Bus) -> Exit {
        self.forget_stale();
        let before = self.cpu.retired;
        let exit = self.run_loop(bound.get(), want_interrupt, bus);
        let compiled = self.cache.compiler.as_ref().map_or(0, |compiler| compiler.executed);
        self.gauge.add(self.cpu.retired - before, compiled);
        exit
    }

    fn point(&self) -> ExecutionPoint {
        ExecutionPoint::new(self.cpu.retired)
    }

    fn inject(&mut self, vector: Vector) {
        assert!(
            self.cpu.can_take_interrupt(),
            "interrupt {} injected where none can be taken",
            vector.0
        );
        self.cpu.system_flags &= !HALTED;
        self.cpu.deliver_event(vector.0, Source::External);
    }

    fn save(&mut self) -> CpuState {
        self.cpu.save()
    }

    fn restore(&mut self, state: &CpuState, point: ExecutionPoint) -> Result<(), InvalidState> {
        self.cpu.restore(state)?;
        self.cpu.retired = point.get();
        self.flush_caches();
        Ok(())
    }

    fn save_cpus(&mut self) -> Cpus {
        Cpus::Model(Box::new(self.save()))
    }

    fn restore_cpus(&mut self, cpus: &Cpus, point: ExecutionPoint) -> Result<(), InvalidState> {
        let (state, pending) = match cpus {
            Cpus::Model(state) => return self.restore(state, point),
            Cpus::Kvm(cpus) => kvm_state::in_the_model(cpus)?,
        };
        self.restore(&state, point)?;
        if let Some(Pending { vector, error, from }) = pending {
            self.deliver(vector, error, from);
        }
        Ok(())
    }

    fn rest(&mut self, _: &mut dyn Bus) -> bool {
        false
    }

    /// The engine records writes as it makes them.
    fn collect_written(&mut self) {}

    fn exit_stream(&mut self) -> Option<&mut dyn ExitStream> {
        None
    }

    fn branch_points(&mut self) -> Option<&mut dyn BranchPoints> {
        None
    }

    /// Its bounds are points, and it comes back at each.
    fn kicker(&self) -> Option<Kicker> {
        None
    }

    fn renew_write_tracking(&mut self) {
        self.cpu.tlb.forbid_all_fast_writes();
    }

    fn flush_caches(&mut self) {
        self.cpu.tlb.flush();
        self.cpu.deliveries = 0;
        self.cpu.stale.clear();
        self.cpu.ram.guest().tracker().take_stale_code();
        self.cache.clear(&mut self.cpu);
    }

    fn compiler(&self) -> Option<Arc<CompilerGauge>> {
        Some(Arc::clone(&self.gauge))
    }

    fn code_here(&mut self, most: usize) -> Option<(u64, Vec<u8>)> {
        let offset = self.cpu.executing.unwrap_or_default();
        let rip = self.cpu.rip().wrapping_add(offset.into());
        Some((rip, self.cpu.code_bytes(rip, most)))
    }

    fn is_halted(&self) -> bool {
        self.cpu.system_flags & HALTED != 0
    }

    fn is_off(&self) -> bool {
        self.cpu.system_flags & (HALTED | flags::IF) == HALTED
    }

    fn ram(&self) -> &GuestRam {
        self.cpu.ram.guest()
    }
}

/// The internal bits that keep the run loop from simply going on.
const ATTENTION: u64 = SHADOW | HALTED | SHUT_DOWN | ARMED | CHECKED_CODE | flags::TF | flags::RF;
