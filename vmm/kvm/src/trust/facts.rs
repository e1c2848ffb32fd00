//! What is measured of a host before the engine relies on it, as plain values.

use super::lab::LabError;
use serde::{Deserialize, Serialize};
use std::fmt;
use vmft_cpu::soft::CompilerMode;

pub use super::counter::facts::{
    BranchCounter, CounterChecks, CounterFacts, Exactness, Landings, Overflows,
};

/// The host's CPU and kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// CPUID's vendor, `GenuineIntel` or the like.
    pub vendor: String,
    /// CPU family, with the extended family added.
    pub family: u32,
    /// CPU model, with the extended model added.
    pub model: u32,
    /// CPU stepping.
    pub stepping: u32,
    /// The name CPUID gives the CPU.
    pub name: String,
    /// Microcode revision, as the kernel prints it.
    pub microcode: String,
    /// The feature words of `/proc/cpuinfo`.
    pub flags: Vec<String>,
    /// The kernel's release.
    pub kernel: String,
    /// Why the `soft` engine cannot compile here, if it cannot.
    pub compiler_obstacle: Option<String>,
    /// What its compiler does here.
    #[serde(default)]
    pub compiler: CompilerMode,
}

impl HostFacts {
    /// True if the CPU has the feature that `/proc/cpuinfo` calls `name`.
    pub fn has(&self, name: &str) -> bool {
        self.flags.iter().any(|flag| flag == name)
    }
}

/// Which kind of KVM this is, by its kernel module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmKind {
    /// `kvm_intel`: Intel VMX.
    Intel,
    /// `kvm_amd`: AMD SVM.
    Amd,
    /// `kvm_pvm`: virtualised in software, inside a virtual machine.
    Pvm,
    /// None of these modules is there.
    Unknown,
}

impl fmt::Display for KvmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intel => "kvm_intel",
            Self::Amd => "kvm_amd",
            Self::Pvm => "kvm_pvm",
            Self::Unknown => "of no known kind",
        })
    }
}

/// How far opening the device came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// There is no such file.
    Absent,
    /// This user may not open it.
    Denied,
    /// It did not open for another reason.
    Failed(String),
    /// It opened and answers with this version of the interface.
    Open {
        /// `KVM_GET_API_VERSION`.
        api_version: i32,
    },
}

/// The only version of the KVM interface there has been since Linux 2.6.22.
pub const API_VERSION: i32 = 12;

/// What a probe found, or why it found nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome<T> {
    /// The probe ran to its end.
    Measured(T),
    /// The probe came to no result: what happened instead.
    Odd(String),
}

impl<T> Outcome<T> {
    /// Of a probe that may have been refused something.
    pub fn of(result: Result<Self, LabError>) -> Self {
        result.unwrap_or_else(|error| Self::Odd(error.to_string()))
    }

    /// The result, if there is one.
    pub fn measured(&self) -> Option<&T> {
        match self {
            Self::Measured(value) => Some(value),
            Self::Odd(_) => None,
        }
    }

    /// True if there is a result for which `holds` is true.
    pub fn is(&self, holds: impl FnOnce(&T) -> bool) -> bool {
        self.measured().is_some_and(holds)
    }
}

/// A privilege level of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// CPL 0.
    Kernel,
    /// CPL 3.
    User,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "CPL 0",
            Self::User => "CPL 3",
        })
    }
}

/// What `KVM_GUESTDBG_USE_HW_BP` does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BreakpointFacts {
    /// At CPL 0.
    pub kernel: Outcome<Breaking>,
    /// At CPL 3.
    pub user: Outcome<Breaking>,
}

/// How a hardware breakpoint stops a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Breaking {
    /// In front of the instruction each time, and the guest sees nothing of it.
    Exact,
    /// Not there, but somewhere behind.
    Late,
    /// In the guest's own debug handler.
    IntoGuest,
    /// Not at all.
    Missed,
    /// In front of the instruction, but the guest sees a flag of it.
    Seen,
}
