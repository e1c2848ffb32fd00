//! Facts of hosts that are not at hand, for tests.

use super::facts::{
    API_VERSION, Access, BranchCounter, Breaking, BreakpointFacts, CapabilityFact, Costs,
    CounterChecks, CounterFacts, CpuidFact, DeviceFacts, DirtyLog, Exactness, ExceptionFact,
    Execution, Facts, HiddenFact, HostFacts, InstructionFact, KvmKind, Landings, Level, MsrFilter,
    Nanoseconds, Need, Outcome, Overflows, ProbeFacts, StepFacts, Stepping, Syscall, TimeStamp,
};
use vmft_cpu::soft::CompilerMode;

const LEVELS: [Level; 2] = [Level::Kernel, Level::User];

fn host(vendor: &str) -> HostFacts {
    HostFacts {
        vendor: vendor.to_owned(),
        family: 6,
        model: 0x55,
        stepping: 7,
        name: "a CPU".to_owned(),
        microcode: "0x5003605".to_owned(),
        flags: vec!["popcnt".to_owned()],
        kernel: "6.1.0".to_owned(),
        compiler_obstacle: None,
        compiler: CompilerMode::On,
    }
}

fn device(access: Access, kind: KvmKind) -> DeviceFacts {
    DeviceFacts { path: "/dev/kvm".into(), access, kind, nested: false }
}

fn probes() -> ProbeFacts {
    let cost = |ns| Outcome::Measured(Nanoseconds(ns));
    ProbeFacts {
        syscall: Outcome::Measured(Syscall::Works),
        exceptions: LEVELS
            .map(|level| ExceptionFact {
                name: "#UD".to_owned(),
                level,
                delivered: Outcome::Measured(true),
            })
            .to_vec(),
        step: StepFacts {
            kernel: Outcome::Measured(Stepping::Exact),
            user: Outcome::Measured(Stepping::Exact),
            pushf_shows_trap_flag: Outcome::Measured(true),
            survives_syscall: Outcome::Measured(false),
        },
        breakpoint: BreakpointFacts {
            kernel: Outcome::Measured(Breaking::Exact),
            user: Outcome::Measured(Breaking::Exact),
        },
        instructions: vec![InstructionFact {
            name: "popcnt eax, ecx".to_owned(),
            expected: Execution::Executes,
            measured: Execution::Executes,
        }],
        cpuid: vec![CpuidFact {
            what: "leaf 7, all of EBX".to_owned(),
            level: Level::Kernel,
            set: 0,
            seen: Outcome::Measured(0),
        }],
        time_stamp: Outcome::Measured(TimeStamp::Native),
        time_stamp_disable: Outcome::Measured(TimeStamp::Faults),
        hidden: vec![HiddenFact {
            name: "rdrand eax".to_owned(),
            level: Level::Kernel,
            measured: Execution::Faults(6),
        }],
        msr_filter: Outcome::Measured(MsrFilter { reads: true, writes: true, allows: true }),
        dirty_log: Outcome::Measured(DirtyLog {
            written: vec![1, 5],
            reported: vec![1, 5],
            again: vec![],
            rewritten: vec![1],
        }),
        costs: Costs {
            port_exit_kernel: cost(1_000),
            port_exit_user: cost(1_100),
            step_kernel: cost(1_500),
        },
    }
}

fn good_counter() -> CounterFacts {
    CounterFacts::Tested {
        event: BranchCounter { kind: 4, raw: 0x1C4, skid: 100 },
        checks: CounterChecks {
            exact: vec![Exactness {
                what: "a loop".to_owned(),
                level: Level::Kernel,
                expected: 20_000_003,
                counted: Outcome::Measured(20_000_003),
            }],
            host_branches: Outcome::Measured(0),
            always_running: true,
            overflows: Outcome::Measured(Overflows { wanted: 10, arrived: 10, worst_skid: 60 }),
            landings: Outcome::Measured(Landings { tried: 100, landed: 100 }),
            freeze_on_smi: Some(true),
            hybrid: false,
        },
    }
}

/// Intel hardware under a stock kernel, with its counters.
pub fn stock_intel() -> Facts {
    let capability = |name: &str, need| CapabilityFact {
        name: name.to_owned(),
        value: 1,
        need,
        what: "something".to_owned(),
    };
    Facts {
        host: host("GenuineIntel"),
        device: device(Access::Open { api_version: API_VERSION }, KvmKind::Intel),
        capabilities: vec![
            capability("KVM_CAP_IMMEDIATE_EXIT", Need::Engine),
            capability("KVM_CAP_SET_GUEST_DEBUG", Need::Step),
            capability("KVM_CAP_READONLY_MEM", Need::Helps),
        ],
        probes: Some(probes()),
        trouble: None,
        counter: good_counter(),
    }
}

/// AMD under a stock kernel: RDRAND cannot be hidden, and the counter is late without bound.
pub fn stock_amd() -> Facts {
    let mut facts = stock_intel();
    facts.host = host("AuthenticAMD");
    facts.device.kind = KvmKind::Amd;
    let probes = facts.probes.as_mut().expect("they were run");
    probes.hidden[0].measured = Execution::Executes;
    if let CounterFacts::Tested { event, .. } = &mut facts.counter {
        *event = BranchCounter { kind: 4, raw: 0xD1, skid: 10_000 };
    }
    facts
}

/// A KVM in software inside a virtual machine, without counters.
pub fn kvm_pvm() -> Facts {
    let mut facts = stock_intel();
    facts.device.kind = KvmKind::Pvm;
    facts.device.nested = true;
    facts.counter = CounterFacts::Absent("the host has no performance counter for it".to_owned());
    let probes = facts.probes.as_mut().expect("they were run");
    probes.syscall = Outcome::Measured(Syscall::StaysAtUser);
    probes.step.user = Outcome::Measured(Stepping::IntoGuest);
    probes.breakpoint.user = Outcome::Measured(Breaking::Missed);
    probes.instructions[0].measured = Execution::InternalError { suberror: 1 };
    probes.cpuid[0].seen = Outcome::Measured(0xFF);
    probes.time_stamp_disable = Outcome::Measured(TimeStamp::Native);
    facts
}

/// A host whose device does not open.
pub fn closed(access: Access) -> Facts {
    Facts {
        host: host("GenuineIntel"),
        device: device(access, KvmKind::Unknown),
        capabilities: Vec::new(),
        probes: None,
        trouble: None,
        counter: CounterFacts::Absent("KVM cannot be used".to_owned()),
    }
}
