//! The doctor: runs probe guests on this host's KVM and says what the host can do.
//!
//! ```text
//! host, device, probes, counter ──► Facts ──► Findings (measured, expected, what follows)
//!        (measure)               (values) └─► Verdict  (which engine, which points, why not)
//! ```
//!
//! Left of [`Facts`] everything touches the host and nothing judges; right of it everything is a
//! pure function. The probes run on a minimal KVM loop of their own ([`lab`]), not on the engine,
//! so that the doctor can say what is wrong with a KVM on which the engine would not even start.

mod clock;
pub(crate) mod counter;
mod device;
pub mod facts;
pub mod findings;
mod host;
mod lab;
mod layout;
mod probes;
pub mod verdict;
mod watchdog;

#[cfg(test)]
mod synthetic;
#[cfg(test)]
mod tests;

use facts::{CounterFacts, DeviceFacts, Facts};
use findings::Finding;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use verdict::Verdict;

/// Where KVM is.
pub const DEVICE: &str = "/dev/kvm";

/// What to examine.
#[derive(Debug, Clone)]
pub struct Examination {
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
        Self { device: device.to_owned(), modules: PathBuf::from("/sys/module") }
    }

    /// Measures everything. Takes some seconds on a slow KVM; `step` is told what is going on.
    ///
    /// It always comes to an end, and it always comes to a report: what KVM refuses, and what a
    /// guest does instead of what it should, are facts too.
    pub fn examine(&self, mut step: impl FnMut(&str)) -> Report {
        step("looking at the host");
        let host = host::examine();
        let (access, kvm) = device::open(&self.device);
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
            step("counting the branches of guests");
            facts.counter = counter::examine(&kvm, &facts.host);
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
