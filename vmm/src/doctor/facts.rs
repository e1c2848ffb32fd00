//! What the doctor found out, as plain values.
//!
//! Nothing here measures, and nothing here judges: the probes fill these types,
//! [`super::findings`] and [`super::verdict`] read them. All of it goes to JSON and back.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

pub use vmft_kvm::trust::facts::{
    API_VERSION, Access, BranchCounter, Breaking, BreakpointFacts, CounterChecks, CounterFacts,
    Exactness, HostFacts, KvmKind, Landings, Level, Outcome, Overflows,
};

/// Everything that was found out about a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The host's CPU and kernel.
    pub host: HostFacts,
    /// The device node of KVM.
    pub device: DeviceFacts,
    /// What KVM says it can do; empty if it could not be asked.
    pub capabilities: Vec<CapabilityFact>,
    /// What the probe guests did; `None` if none could be run.
    pub probes: Option<ProbeFacts>,
    /// Why none could be run, where KVM opened and did not let a guest be made.
    pub trouble: Option<String>,
    /// The counter of guest branches.
    pub counter: CounterFacts,
}

/// The device node of KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// Where it was looked for.
    pub path: PathBuf,
    /// How far opening it came.
    pub access: Access,
    /// Which module serves it.
    pub kind: KvmKind,
    /// True if the host itself is a virtual machine.
    pub nested: bool,
}

/// What a capability is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// Every use of the `kvm` engine.
    Engine,
    /// Guests of several CPUs.
    Cpus,
    /// Stopping between any two instructions.
    Step,
    /// Stopping at a count of branches.
    Counter,
    /// Nothing; it would help.
    Helps,
}

/// One capability of KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilityFact {
    /// Its name in `linux/kvm.h`.
    pub name: String,
    /// What `KVM_CHECK_EXTENSION` answers; zero and less mean that it is not there.
    pub value: i32,
    /// What it is needed for.
    pub need: Need,
    /// What it is, in a few words.
    pub what: String,
}

impl CapabilityFact {
    /// True if KVM has it.
    pub fn is_there(&self) -> bool {
        self.value > 0
    }
}

/// What the probe guests did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeFacts {
    /// `SYSCALL` at CPL 3.
    pub syscall: Outcome<Syscall>,
    /// Delivery of exceptions.
    pub exceptions: Vec<ExceptionFact>,
    /// Single-stepping.
    pub step: StepFacts,
    /// Hardware breakpoints.
    pub breakpoint: BreakpointFacts,
    /// Instructions at CPL 0.
    pub instructions: Vec<InstructionFact>,
    /// Bits of CPUID that were set or cleared, and what the guest saw.
    pub cpuid: Vec<CpuidFact>,
    /// `RDTSC` at CPL 0.
    pub time_stamp: Outcome<TimeStamp>,
    /// `RDTSC` at CPL 3 with CR4.TSD set.
    pub time_stamp_disable: Outcome<TimeStamp>,
    /// Instructions hidden from the guest by CPUID, executed anyway.
    pub hidden: Vec<HiddenFact>,
    /// The MSR filter.
    pub msr_filter: Outcome<MsrFilter>,
    /// The dirty log.
    pub dirty_log: Outcome<DirtyLog>,
    /// What exits cost.
    pub costs: Costs,
}

/// Where `SYSCALL` leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Syscall {
    /// To LSTAR at CPL 0 with the kernel's selectors and the return address in RCX.
    Works,
    /// To LSTAR, still at CPL 3.
    StaysAtUser,
    /// To CPL 0, with registers that are not those the manual says.
    WrongRegisters {
        /// CS there.
        cs: u16,
        /// SS there.
        ss: u16,
        /// RCX there.
        rcx: u64,
    },
}

/// How an exception came to its handler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExceptionFact {
    /// `#UD`, `#PF`.
    pub name: String,
    /// Where it was raised.
    pub level: Level,
    /// Whether vector, error code, address and saved registers are those of the manual.
    pub delivered: Outcome<bool>,
}

/// What `KVM_GUESTDBG_SINGLESTEP` does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepFacts {
    /// At CPL 0.
    pub kernel: Outcome<Stepping>,
    /// At CPL 3.
    pub user: Outcome<Stepping>,
    /// Whether `PUSHF` shows the debugger's trap flag to the guest.
    pub pushf_shows_trap_flag: Outcome<bool>,
    /// Whether the step survives `SYSCALL`; nothing to measure where that does not work.
    pub survives_syscall: Outcome<bool>,
}

/// How steps end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stepping {
    /// After every instruction, at its successor.
    Exact,
    /// In the guest's own debug handler.
    IntoGuest,
    /// Not: the guest ran on after so many good steps.
    Lost {
        /// Steps that ended where they should.
        after: u32,
    },
}

/// What became of an instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Execution {
    /// It executed.
    Executes,
    /// It raised this exception.
    Faults(u8),
    /// KVM gave up on it (`KVM_EXIT_INTERNAL_ERROR`).
    InternalError {
        /// KVM's suberror; 1 is an instruction its emulator does not know.
        suberror: u32,
    },
    /// Something else.
    Odd(String),
}

impl fmt::Display for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Executes => f.write_str("executes"),
            Self::Faults(vector) => write!(f, "exception {vector}"),
            Self::InternalError { suberror } => write!(f, "internal error {suberror}"),
            Self::Odd(what) => f.write_str(what),
        }
    }
}

/// One instruction at CPL 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstructionFact {
    /// Its mnemonic.
    pub name: String,
    /// What it should do on this CPU.
    pub expected: Execution,
    /// What it did.
    pub measured: Execution,
}

impl InstructionFact {
    /// True if it did what it should.
    pub fn is_right(&self) -> bool {
        self.measured == self.expected
    }
}

/// Part of a CPUID register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidFact {
    /// Which part, in words.
    pub what: String,
    /// Where the guest asked.
    pub level: Level,
    /// What was set with `KVM_SET_CPUID2`, of the bits that matter.
    pub set: u32,
    /// What the guest saw of them.
    pub seen: Outcome<u32>,
}

impl CpuidFact {
    /// True if the guest saw what was set.
    pub fn is_obeyed(&self) -> bool {
        self.seen.is(|seen| *seen == self.set)
    }
}

/// What reading the time-stamp counter does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeStamp {
    /// It gives the real counter, and nobody is asked.
    Native,
    /// It faults in the guest.
    Faults,
    /// It exits to us.
    Exits,
}

/// An instruction that CPUID hides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HiddenFact {
    /// Its mnemonic.
    pub name: String,
    /// Where it was tried.
    pub level: Level,
    /// What it did although it is hidden.
    pub measured: Execution,
}

/// How far the MSR filter works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MsrFilter {
    /// A read of a denied MSR comes to us, and our answer reaches the guest.
    pub reads: bool,
    /// A write of a denied MSR comes to us.
    pub writes: bool,
    /// An allowed MSR does not.
    pub allows: bool,
}

impl MsrFilter {
    /// True if all of it works.
    pub fn works(self) -> bool {
        self.reads && self.writes && self.allows
    }
}

/// The dirty log after known writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyLog {
    /// Pages the guest wrote.
    pub written: Vec<u32>,
    /// Pages the log named.
    pub reported: Vec<u32>,
    /// Pages the log named when asked again, with nothing written in between.
    pub again: Vec<u32>,
    /// Pages the log named after one more write to the first of `written`.
    pub rewritten: Vec<u32>,
}

impl DirtyLog {
    /// True if the log named what was written each time, and nothing else.
    pub fn is_exact(&self) -> bool {
        self.reported == self.written
            && self.again.is_empty()
            && self.rewritten.first() == self.written.first()
            && self.rewritten.len() == 1
    }
}

/// Nanoseconds of host time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Nanoseconds(pub u64);

impl fmt::Display for Nanoseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} µs", self.0 / 1_000, self.0 % 1_000 / 100)
    }
}

/// Medians of some hundred round trips.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Costs {
    /// `OUT` at CPL 0, to us and back.
    pub port_exit_kernel: Outcome<Nanoseconds>,
    /// `OUT` at CPL 3, to us and back.
    pub port_exit_user: Outcome<Nanoseconds>,
    /// One instruction at CPL 0, single-stepped.
    pub step_kernel: Outcome<Nanoseconds>,
}
