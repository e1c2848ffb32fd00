//! The doctor: runs probe guests on this host's KVM and says what the host can do.
//!
//! ```text
//! host, device, probes, counter ──► Facts ──► Findings (measured, expected, what follows)
//!        (measure)               (values) └─► Verdict  (which engine, which points, why not)
//! ```
//!
//! Left of [`Facts`] everything touches the host and nothing judges; right of it everything is a
//! pure function. The probes run on a minimal KVM loop of their own ([`vmft_kvm::trust::lab`]), not on the engine,
//! so that the doctor can say what is wrong with a KVM on which the engine would not even start.

mod device;
pub mod facts;
pub mod findings;
mod probes;
pub mod verdict;

#[cfg(test)]
mod synthetic;
#[cfg(test)]
mod tests;

use facts::{CounterFacts, DeviceFacts, Facts};
use findings::Finding;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use verdict::Verdict;
use vmft_kvm::trust::device::open;
use vmft_kvm::trust::{DEVICE, counter, host};

/// Where the kernel lists its modules.
const MODULES: &str = "/sys/module";

/// Which KVM this host has: both sides of a pair on the `kvm` engine have the same.
pub fn kvm_of_this_host() -> facts::KvmKind {
    host::kind(Path::new(MODULES))
}

/// Whether the counter of branches is put to its test, which takes longer than all else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    /// It is.
    Tested,
    /// Whatever it can do: there is none in the report.
    Ignored,
}

/// What to examine.
#[derive(Debug, Clone)]
pub struct Examination {
    counter: Counter,
    /// The device node.
    device: PathBuf,
    /// Where the kernel lists its modules.
    modules: PathBuf,
}

impl Examination {
    /// Of this host.
    pub fn of_this_host() -> Self {
        Self::of_device(Path::new(DEVICE))
    }

    /// Of this host, with KVM at `device`.
    pub fn of_device(device: &Path) -> Self {
        let modules = PathBuf::from(MODULES);
        Self { counter: Counter::Tested, device: device.to_owned(), modules }
    }

    /// The same, with the counter tested or not.
    #[must_use]
    pub fn counter(self, counter: Counter) -> Self {
        Self { counter, ..self }
    }

    /// Measures everything. Takes some seconds on a slow KVM; `step` is told what is going on.
    ///
    /// It always comes to an end, and it always comes to a report: what KVM refuses, and what a
    /// guest does instead of what it should, are facts too.
    pub fn examine(&self, mut step: impl FnMut(&str)) -> Report {
        step("looking at the host");
        let host = host::examine();
        let (access, kvm) = open(&self.device);
        let device = DeviceFacts {
            path: self.device.clone(),
            access,
            kind: host::kind(&self.modules),
            nested: host.has("hypervisor"),
        };
        let mut facts = Facts {
            host,
            device,
            capabilities: Vec::new(),
            probes: None,
            counter: CounterFacts::Absent("KVM cannot be used".to_owned()),
            trouble: None,
        };
        if let Some(kvm) = kvm {
            facts.capabilities = device::capabilities(&kvm);
            step("running probe guests");
            match probes::run(&kvm, &facts.host) {
                Ok(probes) => facts.probes = Some(probes),
                Err(error) => facts.trouble = Some(error.to_string()),
            }
            facts.counter = match self.counter {
                Counter::Tested => {
                    step("counting the branches of guests");
                    counter::examine(&kvm, &facts.host)
                }
                Counter::Ignored => CounterFacts::Absent("it was not looked for".to_owned()),
            };
        }
        Report::of(facts)
    }
}

/// What the doctor has to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What was measured.
    pub facts: Facts,
    /// The same, with what was expected and what follows.
    pub findings: Vec<Finding>,
    /// What the host can be used for.
    pub verdict: Verdict,
}

impl Report {
    /// The report on these facts; a pure function.
    pub fn of(facts: Facts) -> Self {
        let findings = findings::findings(&facts);
        let verdict = Verdict::of(&facts);
        Self { facts, findings, verdict }
    }

    /// What the host can be used for, and why not for more.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }
}
