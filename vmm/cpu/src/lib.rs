//! The CPU: what executes guest instructions, the guest's memory, and `soft`, the engine that needs
//! nothing of the host.
//!
//! [`Engine`] is the narrow trait that joins the engines; nothing above it knows which one
//! runs. An engine knows the CPU and memory. Everything else is behind [`Bus`].

mod count;
pub mod cpu_model;
mod exit_stream;
pub mod group;
pub mod kick;
pub mod kvm_state;
pub mod memory;
pub mod msr;
pub mod soft;
pub mod state;

use crate::memory::GuestRam;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use vmft_log::point::{CodeAddress, ExecutionPoint};

pub use count::{CpuCount, CpuCountError, MAX_CPUS};
pub use exit_stream::{Access, ExitLog, ExitReason, ExitRecord, ExitStream, WatchedBus};
pub use group::{Cpus, KvmCpu};
pub use kick::{Kicker, PeriodicKicks};
pub use state::CpuState;

/// How many bytes one port access moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortWidth {
    /// One byte.
    Byte,
    /// Two bytes.
    Word,
    /// Four bytes.
    Long,
}

impl PortWidth {
    /// The width in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Long => 4,
        }
    }
}

/// What the CPU is connected to. The engine calls it in the middle of an instruction;
/// `at` is the point before that instruction retires.
pub trait Bus {
    /// `IN`: the value, zero-extended. An absent port reads as all ones.
    fn port_read(&mut self, at: ExecutionPoint, port: u16, width: PortWidth) -> u32;
    /// `OUT`: only the low `width` bytes of `value` count.
    fn port_write(&mut self, at: ExecutionPoint, port: u16, width: PortWidth, value: u32);
    /// A load from an address that is not memory, at most 8 bytes. Absent devices read as all ones.
    fn memory_read(&mut self, at: ExecutionPoint, address: u64, data: &mut [u8]);
    /// A store to an address that is not memory, at most 8 bytes. Absent devices ignore it.
    fn memory_write(&mut self, at: ExecutionPoint, address: u64, data: &[u8]);
    /// The time-stamp counter, before the guest's own offset (`IA32_TSC_ADJUST`).
    fn time_stamp(&mut self, at: ExecutionPoint) -> u64;
}

/// Why [`Engine::run`] came back. The engine is between two instructions in every case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The bound was reached, exactly.
    Bound,
    /// The instruction that just retired used the bus for a port or a device address;
    /// timers, interrupt lines and outputs may have changed.
    BusAccess,
    /// An interrupt was wanted and can be taken at this boundary: call [`Engine::inject`].
    InterruptWindow,
    /// The CPU executed `HLT` and waits for an interrupt, also if one is wanted. With
    /// `interruptible` false nothing can ever wake it: the guest has switched itself off.
    Halted {
        /// RFLAGS.IF.
        interruptible: bool,
    },
    /// A triple fault: the machine resets.
    Shutdown,
    /// Events are delivered one after the other and no instruction retires: the guest is caught in
    /// its own fault handlers, where a real CPU hangs or comes to a triple fault. No bound stops it
    /// there, so the machine resets.
    Caught(EngineFault),
    /// The host asked the engine to come back ([`Kicker::kick`]). This is no point: nothing may be
    /// delivered or injected here and no digest taken; only whoever operates the machine is
    /// served, and then the guest runs on.
    Kicked,
    /// The engine cannot go on; the state is that before the offending instruction.
    Fatal(EngineFault),
}

/// What is wrong at an instruction: the engine cannot execute it faithfully, or the guest is caught there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at {rip:#x} (bytes {bytes:02x?}) at point {point}")]
pub struct EngineFault {
    /// What is wrong.
    pub what: Cow<'static, str>,
    /// Address of the instruction.
    pub rip: u64,
    /// Its bytes, as far as they could be read.
    pub bytes: Vec<u8>,
    /// Where in the instruction stream.
    pub point: ExecutionPoint,
}

/// An interrupt or exception vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vector(pub u8);

/// A state that no CPU of this engine can be in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CPU state is not valid: {0}")]
pub struct InvalidState(pub String);

/// Points that lie behind branches.
pub trait BranchPoints {
    /// At a place without a name: the nearest point ahead at which [`Engine::run`] can stop although the
    /// guest does not exit; `None` if it knows of none.
    fn nearest_point(&self) -> Option<ExecutionPoint>;

    /// At a point that lies behind a branch: where that branch is, if whoever comes this way is sure to
    /// meet it there.
    fn branch_before(&self) -> Option<CodeAddress>;

    /// `point` is said to lie behind the branch at this address. That is a hint, which may be wrong, for
    /// an engine that has to look for the point: which place it is, its number says alone.
    fn expect_branch(&mut self, point: ExecutionPoint, branch: CodeAddress);
}

/// Executes guest instructions, deterministically, up to exact points.
pub trait Engine: fmt::Debug + Send {
    /// Runs until `bound` (at which it stops exactly, before any further instruction), or until
    /// something else needs attention. With `want_interrupt` it stops at the first boundary at
    /// which a maskable interrupt can be taken, which may be at once. At the bound itself the
    /// answer is [`Exit::Bound`], also if an interrupt could be taken there: what arrives at a
    /// point comes before the interrupt taken at it.
    fn run(&mut self, bound: ExecutionPoint, want_interrupt: bool, bus: &mut dyn Bus) -> Exit;

    /// How many instructions have retired.
    fn point(&self) -> ExecutionPoint;

    /// Delivers an external interrupt. Only right after [`Exit::InterruptWindow`], or when
    /// halted with interrupts enabled; wakes a halted CPU. Delivery may itself fault; that is
    /// handled inside, and shows at the next [`Self::run`]. It retires no instruction.
    ///
    /// # Panics
    /// If the CPU cannot take an interrupt at this boundary.
    fn inject(&mut self, vector: Vector);

    /// The registers of the CPU, or of the one that boots, as far as the CPU model has them; on an engine whose
    /// points are named, that is all there is. It may have to finish the last instruction for it, which changes
    /// nothing but the moment.
    fn save(&mut self) -> CpuState;

    /// Sets the registers and the point, and forgets everything cached: as a loader has prepared them. What the CPU model
    /// does not have, and other CPUs, are as after power-on.
    ///
    /// # Errors
    /// [`InvalidState`] if a value could not have come from [`Self::save`]; the engine is unchanged.
    fn restore(&mut self, state: &CpuState, point: ExecutionPoint) -> Result<(), InvalidState>;

    /// The state of all CPUs, complete: a fresh engine given it goes on identically.
    fn save_cpus(&mut self) -> Cpus;

    /// Sets the state of all CPUs and the point, and forgets everything cached. What another engine has saved is taken as
    /// well, if this one has a place for all of it; an event that was on its way into the CPU is delivered then.
    ///
    /// # Errors
    /// [`InvalidState`] if it could not have come from [`Self::save_cpus`], or has what this engine has not: the engine is
    /// unchanged if it has one CPU, and of no use if it has several.
    fn restore_cpus(&mut self, cpus: &Cpus, point: ExecutionPoint) -> Result<(), InvalidState>;

    /// Brings CPUs that run while [`Self::run`] is away to rest between two instructions, until the next
    /// [`Self::run`]; `bus` serves what has to be finished for that. True if it was used. Every other
    /// method that looks at the state is for an engine at rest; one with a single CPU always is.
    fn rest(&mut self, bus: &mut dyn Bus) -> bool;

    /// Records in the memory's write tracker what was written and is not recorded there yet. Done
    /// before [`crate::memory::WriteTracker::take_written`]; an engine that records writes as it
    /// makes them has nothing to do.
    fn collect_written(&mut self);

    /// The records of its exits, of an engine whose points are exits.
    fn exit_stream(&mut self) -> Option<&mut dyn ExitStream>;

    /// How its points lie behind branches, of an engine that counts them.
    fn branch_points(&mut self) -> Option<&mut dyn BranchPoints>;

    /// A handle by which other threads make a running [`Self::run`] come back soon; `None` if the
    /// engine comes back by itself.
    fn kicker(&self) -> Option<Kicker>;

    /// How much of what it executes is compiled, if it is an engine that may compile.
    fn compiler(&self) -> Option<Arc<soft::CompilerGauge>>;

    /// Takes back the write permissions cached for guest memory, so that the next write to each
    /// page is recorded in the memory's write tracker again. Done at the same points on both
    /// sides, because it renews the guest's page-table walks.
    fn renew_write_tracking(&mut self);

    /// Forgets every cached translation and decoded instruction. Done on both sides at the point
    /// of a checkpoint, so that the restored side and the running side walk alike from there.
    fn flush_caches(&mut self);

    /// After a panic in the middle of [`Self::run`]: where the instruction is that was being executed,
    /// or the run of instructions that it belongs to, and up to `most` bytes of the code there; as far
    /// as the engine knows.
    fn code_here(&mut self, most: usize) -> Option<(u64, Vec<u8>)>;

    /// True while the CPU waits in `HLT`.
    fn is_halted(&self) -> bool;

    /// True while the CPU waits in `HLT` with interrupts masked, from which nothing wakes it.
    fn is_off(&self) -> bool;

    /// The memory this CPU runs in.
    fn ram(&self) -> &GuestRam;
}
