//! The counter of retired conditional branches, guest only: whether there is one, and whether
//! it counts what it should.
//!
//! Here are the event of each CPU, the port to the kernel's performance counters, guests whose
//! branches are known, and the self-test that compares. What follows from it is said elsewhere.

pub mod event;
pub mod facts;
pub mod perf;
pub mod programs;
pub mod self_test;

use super::facts::HostFacts;
use super::lab::Lab;
use super::{device, host};
use facts::{BranchCounter, CounterFacts};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use std::path::Path;
use std::sync::OnceLock;

/// Where the kernel keeps its kinds of counters.
const DEVICES: &str = "/sys/devices";

/// Tests the counter of this host, on a thread of its own that stays on one CPU.
pub fn examine(kvm: &Kvm, host: &HostFacts) -> CounterFacts {
    let Some(event) = event::branches(host) else {
        return CounterFacts::Absent(format!(
            "no exact counter of branches is known for {} family {} model {:#x}",
            host.vendor, host.family, host.model
        ));
    };
    let tested = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("doctor-counter".to_owned());
        match thread.spawn_scoped(scope, || on_one_cpu(kvm, event)) {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err("its test panicked".to_owned())),
            Err(error) => Err(format!("no thread to test it on: {error}")),
        }
    });
    tested.unwrap_or_else(CounterFacts::Absent)
}

/// A counter that has passed its test on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trusted {
    /// Which event.
    pub event: BranchCounter,
    /// Branches to stop short of a target.
    pub margin: u64,
}

/// The counter of this host, if execution points may be named by it. It is tested when this is first
/// called, which takes some seconds where there is one.
///
/// # Errors
/// Why not: the sentence of the doctor's report.
pub fn trusted() -> Result<Trusted, String> {
    static TESTED: OnceLock<Result<Trusted, String>> = OnceLock::new();
    let test = || {
        let (_, kvm) = device::open(Path::new(super::DEVICE));
        let kvm = kvm.ok_or("no counter of guest branches: KVM cannot be used")?;
        judge(&examine(&kvm, &host::examine()))
    };
    TESTED.get_or_init(test).clone()
}

/// Whether points may be named by a counter of which this is known.
fn judge(facts: &CounterFacts) -> Result<Trusted, String> {
    if let Some(why) = distrust(facts) {
        return Err(why);
    }
    match facts {
        CounterFacts::Absent(why) => Err(why.clone()),
        CounterFacts::Tested { event, checks } => {
            Ok(Trusted { event: *event, margin: checks.margin(*event) })
        }
    }
}

fn on_one_cpu(kvm: &Kvm, mut event: BranchCounter) -> Result<CounterFacts, String> {
    let core = core_counter(Path::new(DEVICES));
    if let Some(core) = &core {
        event.kind = core.kind;
    }
    stay(core.as_ref().map(|core| core.first_cpu)).map_err(|error| error.to_string())?;
    // Before any guest is made: most hosts without a counter end here.
    perf::Counter::clock(event).map_err(|error| perf::reason(&error))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| format!("KVM_GET_SUPPORTED_CPUID: {error}"))?;
    let mut lab = Lab::open(kvm, &cpuid).map_err(|error| error.to_string())?;
    let checks = self_test::run(&mut lab, event, freeze_on_smi(), core.is_some())
        .map_err(|error| perf::reason(&error))?;
    Ok(CounterFacts::Tested { event, checks })
}

/// The counters of the performance cores, on a host that has other cores too.
#[derive(Debug, PartialEq, Eq)]
struct CoreCounter {
    kind: u32,
    first_cpu: usize,
}

fn core_counter(devices: &Path) -> Option<CoreCounter> {
    let read = |file: &str| std::fs::read_to_string(devices.join("cpu_core").join(file)).ok();
    let kind = read("type")?.trim().parse().ok()?;
    let cpus = read("cpus")?;
    let first = cpus.trim().split(['-', ',']).next()?;
    Some(CoreCounter { kind, first_cpu: first.parse().ok()? })
}

/// Keeps this thread on `cpu`, or on the one it is on.
fn stay(cpu: Option<usize>) -> nix::Result<()> {
    let cpu = match cpu {
        Some(cpu) => cpu,
        None => sched_getcpu()?,
    };
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)
}

fn freeze_on_smi() -> Option<bool> {
    let switch = |device: &str| {
        std::fs::read_to_string(Path::new(DEVICES).join(device).join("freeze_on_smi")).ok()
    };
    let value = switch("cpu_core").or_else(|| switch("cpu"))?;
    Some(value.trim() != "0")
}

/// Why points must not be named by a counter of which this is known; `None` if they may.
pub fn distrust(counter: &CounterFacts) -> Option<String> {
    match counter {
        CounterFacts::Absent(why) => Some(format!("no counter of guest branches: {why}")),
        CounterFacts::Tested { checks, .. } => {
            let faults = checks.faults();
            let first = faults.first()?;
            Some(match faults.len() {
                1 => format!("the counter of guest branches fails its test: {first}"),
                all => format!(
                    "the counter of guest branches fails its test: {first}, and {} more",
                    all - 1
                ),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_two_kinds_of_cores_is_tested_on_the_first_performance_core() {
        let devices = tempfile::tempdir().unwrap();
        assert_eq!(core_counter(devices.path()), None);
        let core = devices.path().join("cpu_core");
        std::fs::create_dir(&core).unwrap();
        std::fs::write(core.join("type"), "4\n").unwrap();
        std::fs::write(core.join("cpus"), "2-15\n").unwrap();
        let found = core_counter(devices.path());
        assert_eq!(found, Some(CoreCounter { kind: 4, first_cpu: 2 }));
    }
}
