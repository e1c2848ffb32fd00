//! The state of several CPUs, as far as it is more than that of one.

use super::state::CpuState;
use serde::{Deserialize, Serialize};

/// Registers of a local APIC, one in each sixteen bytes of its page's first kilobyte.
pub const APIC_REGISTERS: usize = 64;

/// What a CPU among several does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// It executes instructions.
    Running,
    /// It waits in `HLT`.
    Halted,
    /// It waits for `INIT`, as after power-on.
    Unstarted,
    /// It has had `INIT` and waits for a start-up message.
    Initialised,
}

/// A local APIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalApic {
    /// `IA32_APIC_BASE`.
    pub base: u64,
    /// Its registers, by their number: APIC_REGISTERS of them.
    pub registers: Vec<u32>,
}

/// An exception or interrupt that is being delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// Its vector.
    pub vector: u8,
    /// The error code, of an exception that has one.
    pub error: Option<u32>,
    /// An interrupt of an `INT` instruction.
    pub soft: bool,
}

/// Events on their way into a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PendingEvents {
    /// An exception.
    pub exception: Option<Delivery>,
    /// An interrupt.
    pub interrupt: Option<Delivery>,
    /// An NMI is being delivered.
    pub nmi_injected: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs wait until the end of the last one.
    pub nmi_masked: bool,
    /// What keeps interrupts away for one instruction, as KVM says it.
    pub shadow: u8,
}

/// What a CPU among several has beside its registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Companion {
    /// What it does.
    pub activity: Activity,
    /// Its local APIC.
    pub apic: LocalApic,
    /// What is on its way into it.
    pub pending: PendingEvents,
}

/// The state of several CPUs, without the registers of the one that boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuGroup {
    /// The CPU that boots.
    pub boot: Companion,
    /// The others, in the order of their numbers.
    pub others: Vec<(CpuState, Companion)>,
}
