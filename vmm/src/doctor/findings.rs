//! The facts, one line each: measured, expected, what follows. Pure.

use super::facts::{
    API_VERSION, Access, Breaking, CounterChecks, CounterFacts, Execution, Facts, HiddenFact, Need,
    Outcome, ProbeFacts, Stepping, Syscall, TimeStamp,
};
use super::verdict;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How a finding is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grade {
    /// As it should be.
    Good,
    /// Good to know; nothing fails because of it.
    Note,
    /// Something cannot be done on this host because of it.
    Bad,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at.
    pub fact: String,
    /// How to take it.
    pub grade: Grade,
    /// What was found.
    pub measured: String,
    /// What a good host has; empty where nothing in particular is expected.
    pub expected: String,
    /// What follows; empty where nothing does.
    pub follows: String,
}

impl Finding {
    /// A line.
    pub fn new(
        fact: impl Into<String>,
        grade: Grade,
        measured: &str,
        expected: &str,
        follows: &str,
    ) -> Self {
        let [measured, expected, follows] = [measured, expected, follows].map(str::to_owned);
        Self { fact: fact.into(), grade, measured, expected, follows }
    }

    fn note(fact: impl Into<String>, measured: impl fmt::Display) -> Self {
        Self::new(fact, Grade::Note, &measured.to_string(), "", "")
    }

    fn judged(
        fact: impl Into<String>,
        measured: impl fmt::Display,
        expected: &str,
        good: bool,
        follows: &str,
    ) -> Self {
        let (grade, follows) = if good { (Grade::Good, "") } else { (Grade::Bad, follows) };
        Self::new(fact, grade, &measured.to_string(), expected, follows)
    }

    /// The same, as something that only is good to know.
    fn into_note(self) -> Self {
        let grade = if self.grade == Grade::Bad { Grade::Note } else { self.grade };
        Self { grade, ..self }
    }
}

/// All lines of the report.
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings = host(facts);
    if matches!(facts.device.access, Access::Open { .. }) {
        findings.extend(capabilities(facts));
    }
    if let Some(trouble) = &facts.trouble {
        findings.push(Finding::judged("probe guests", trouble, "made", false, "no `kvm` engine"));
    }
    if let Some(probes) = &facts.probes {
        findings.extend(privilege(probes));
        findings.extend(stepping(probes));
        findings.extend(breakpoints(probes));
        findings.extend(instructions(probes));
        findings.extend(cpuid(probes));
        findings.extend(clocks_and_msrs(probes));
        findings.extend(memory_and_costs(probes));
    }
    findings.extend(counter(&facts.counter));
    findings
}

fn host(facts: &Facts) -> Vec<Finding> {
    let host = &facts.host;
    let device = &facts.device;
    let (measured, good) = match &device.access {
        Access::Absent => ("absent".to_owned(), false),
        Access::Denied => ("permission denied".to_owned(), false),
        Access::Failed(why) => (why.clone(), false),
        Access::Open { api_version } => {
            (format!("opens, version {api_version}"), *api_version == API_VERSION)
        }
    };
    let model = format!(
        "{} family {} model {:#x} stepping {}",
        host.vendor, host.family, host.model, host.stepping
    );
    let kind = if device.nested {
        format!("{}, in a virtual machine", device.kind)
    } else {
        device.kind.to_string()
    };
    vec![
        Finding::note("host CPU", &host.name),
        Finding::note("CPU model", model),
        Finding::note("microcode", &host.microcode),
        Finding::note("host kernel", &host.kernel),
        Finding::judged(
            "compiler of `soft`",
            match &host.compiler_obstacle {
                Some(why) => format!("{}: {why}", host.compiler.name()),
                None => host.compiler.name().to_owned(),
            },
            "on",
            host.compiler_obstacle.is_none(),
            "`soft` interprets: several times slower",
        ),
        Finding::judged(
            device.path.display().to_string(),
            measured,
            "opens, version 12",
            good,
            "no `kvm` engine",
        ),
        Finding::note("kind of KVM", kind),
    ]
}

fn capabilities(facts: &Facts) -> Vec<Finding> {
    let line = |capability: &super::facts::CapabilityFact| {
        let (expected, follows) = match capability.need {
            Need::Engine => ("there", "no `kvm` engine"),
            Need::Cpus => ("there", "no `--cpus boot=2`"),
            Need::Step => ("there", "no `step` points"),
            Need::Counter => ("there", "no `pmu` points"),
            Need::Helps => ("", ""),
        };
        let measured = match capability.value {
            ..=0 => "absent".to_owned(),
            1 => "there".to_owned(),
            value => format!("there ({value:#x})"),
        };
        let fact = capability.name.trim_start_matches("KVM_").to_owned();
        let finding = Finding::judged(fact, measured, expected, capability.is_there(), follows);
        if capability.need == Need::Helps { finding.into_note() } else { finding }
    };
    facts.capabilities.iter().map(line).collect()
}

fn privilege(probes: &ProbeFacts) -> Vec<Finding> {
    let measured = match &probes.syscall {
        Outcome::Measured(Syscall::Works) => "CPL 0, at LSTAR".to_owned(),
        Outcome::Measured(Syscall::StaysAtUser) => "at LSTAR, still CPL 3".to_owned(),
        Outcome::Measured(Syscall::WrongRegisters { cs, ss, rcx }) => {
            format!("CS {cs:#x}, SS {ss:#x}, RCX {rcx:#x}")
        }
        Outcome::Odd(what) => what.clone(),
    };
    let works = probes.syscall.is(|syscall| *syscall == Syscall::Works);
    let mut lines = vec![Finding::judged(
        "SYSCALL from CPL 3",
        measured,
        "CPL 0, at LSTAR",
        works,
        "no Linux program runs on `kvm`",
    )];
    for fact in &probes.exceptions {
        let (measured, good) = match &fact.delivered {
            Outcome::Measured(true) => ("delivered", true),
            Outcome::Measured(false) => ("delivered wrongly", false),
            Outcome::Odd(what) => (what.as_str(), false),
        };
        let name = format!("{} at {}", fact.name, fact.level);
        lines.push(Finding::judged(name, measured, "delivered", good, "no Linux on `kvm`"));
    }
    lines
}

fn stepping(probes: &ProbeFacts) -> Vec<Finding> {
    let step = &probes.step;
    let plain = |name: &str, stepping: &Outcome<Stepping>, follows: &str| {
        let (measured, good) = match stepping {
            Outcome::Measured(Stepping::Exact) => ("each instruction".to_owned(), true),
            Outcome::Measured(Stepping::IntoGuest) => ("#DB goes to the guest".to_owned(), false),
            Outcome::Measured(Stepping::Lost { after }) => {
                (format!("lost after {after} steps"), false)
            }
            Outcome::Odd(what) => (what.clone(), false),
        };
        Finding::judged(name, measured, "each instruction", good, follows)
    };
    let pushf = match &step.pushf_shows_trap_flag {
        Outcome::Measured(false) => ("not seen".to_owned(), true),
        Outcome::Measured(true) => ("seen".to_owned(), false),
        Outcome::Odd(what) => (what.clone(), false),
    };
    let syscall = match &step.survives_syscall {
        Outcome::Measured(true) => ("goes on".to_owned(), true),
        Outcome::Measured(false) => ("lost".to_owned(), false),
        Outcome::Odd(what) => (what.clone(), false),
    };
    vec![
        plain("single-step at CPL 0", &step.kernel, "no `step` points, no landing"),
        plain("single-step at CPL 3", &step.user, "no `step` points for Linux"),
        Finding::judged(
            "trap flag in PUSHF's image",
            pushf.0,
            "not seen",
            pushf.1,
            "images are mended after steps",
        )
        .into_note(),
        Finding::judged(
            "single-step over SYSCALL",
            syscall.0,
            "goes on",
            syscall.1,
            "a breakpoint at its target instead",
        )
        .into_note(),
    ]
}

fn breakpoints(probes: &ProbeFacts) -> [Finding; 2] {
    let line = |name: &str, breaking: &Outcome<Breaking>| {
        let measured = match breaking {
            Outcome::Measured(Breaking::Exact) => "stops, unseen",
            Outcome::Measured(Breaking::Late) => "stops elsewhere",
            Outcome::Measured(Breaking::IntoGuest) => "#DB goes to the guest",
            Outcome::Measured(Breaking::Missed) => "never stops",
            Outcome::Measured(Breaking::Seen) => "stops, seen by the guest",
            Outcome::Odd(what) => what,
        };
        let good = breaking.is(|breaking| *breaking == Breaking::Exact);
        Finding::judged(name, measured, "stops, unseen", good, "landing takes steps alone")
            .into_note()
    };
    [
        line("hardware breakpoint at CPL 0", &probes.breakpoint.kernel),
        line("hardware breakpoint at CPL 3", &probes.breakpoint.user),
    ]
}

fn instructions(probes: &ProbeFacts) -> Vec<Finding> {
    let line = |fact: &super::facts::InstructionFact| {
        Finding::judged(
            format!("{} at CPL 0", fact.name),
            &fact.measured,
            &fact.expected.to_string(),
            fact.is_right(),
            "no Linux kernel on `kvm`",
        )
    };
    probes.instructions.iter().map(line).collect()
}

fn cpuid(probes: &ProbeFacts) -> Vec<Finding> {
    let line = |fact: &super::facts::CpuidFact| {
        let measured = match &fact.seen {
            Outcome::Measured(seen) => format!("{seen:#x}"),
            Outcome::Odd(what) => what.clone(),
        };
        Finding::judged(
            format!("CPUID {} ({})", fact.what, fact.level),
            measured,
            &format!("{:#x}", fact.set),
            fact.is_obeyed(),
            "both hosts need the same CPU",
        )
    };
    let hidden = |fact: &HiddenFact| {
        Finding::judged(
            format!("{} hidden, at {}", fact.name, fact.level),
            &fact.measured,
            "exception 6",
            matches!(fact.measured, Execution::Faults(6)),
            "guest code must not contain it",
        )
        .into_note()
    };
    probes.cpuid.iter().map(line).chain(probes.hidden.iter().map(hidden)).collect()
}

fn clocks_and_msrs(probes: &ProbeFacts) -> Vec<Finding> {
    let text = |read: &Outcome<TimeStamp>| match read {
        Outcome::Measured(TimeStamp::Native) => "the real counter".to_owned(),
        Outcome::Measured(TimeStamp::Faults) => "faults".to_owned(),
        Outcome::Measured(TimeStamp::Exits) => "exits".to_owned(),
        Outcome::Odd(what) => what.clone(),
    };
    let filter = match &probes.msr_filter {
        Outcome::Measured(filter) if filter.works() => "all of it works".to_owned(),
        Outcome::Measured(filter) => {
            let word = |good: bool| if good { "right" } else { "wrong" };
            format!(
                "read {}, write {}, allowed {}",
                word(filter.reads),
                word(filter.writes),
                word(filter.allows)
            )
        }
        Outcome::Odd(what) => what.clone(),
    };
    vec![
        Finding::judged(
            "RDTSC at CPL 0",
            text(&probes.time_stamp),
            "exits",
            probes.time_stamp.is(|read| *read == TimeStamp::Exits),
            "stock kernels cannot be replayed on `kvm`",
        ),
        Finding::judged(
            "RDTSC at CPL 3 with CR4.TSD",
            text(&probes.time_stamp_disable),
            "faults",
            probes.time_stamp_disable.is(|read| *read == TimeStamp::Faults),
            "nor can the lockstep kernel",
        ),
        Finding::judged(
            "MSR filter",
            filter,
            "all of it works",
            probes.msr_filter.is(|filter| filter.works()),
            "no `kvm` engine",
        ),
    ]
}

fn memory_and_costs(probes: &ProbeFacts) -> Vec<Finding> {
    let log = match &probes.dirty_log {
        Outcome::Measured(log) if log.is_exact() => format!("pages {:?}", log.reported),
        Outcome::Measured(log) => {
            format!("{:?}, {:?}, {:?}", log.reported, log.again, log.rewritten)
        }
        Outcome::Odd(what) => what.clone(),
    };
    let expected = match &probes.dirty_log {
        Outcome::Measured(log) => format!("pages {:?}", log.written),
        Outcome::Odd(_) => "the pages written".to_owned(),
    };
    let cost = |name: &str, cost: &Outcome<super::facts::Nanoseconds>| match cost {
        Outcome::Measured(cost) => Finding::note(name, cost),
        Outcome::Odd(what) => Finding::note(name, what),
    };
    vec![
        Finding::judged(
            "dirty log",
            log,
            &expected,
            probes.dirty_log.is(super::facts::DirtyLog::is_exact),
            "checkpoints must compare all of memory",
        ),
        cost("port I/O exit at CPL 0", &probes.costs.port_exit_kernel),
        cost("port I/O exit at CPL 3", &probes.costs.port_exit_user),
        cost("single step at CPL 0", &probes.costs.step_kernel),
    ]
}

fn counter(counter: &CounterFacts) -> Vec<Finding> {
    match counter {
        CounterFacts::Absent(why) => {
            vec![Finding::judged("counter of branches", why, "there", false, "no `pmu` points")]
        }
        CounterFacts::Tested { event, checks } => {
            let mut lines =
                vec![Finding::note("counter of branches", format!("event {:#x}", event.raw))];
            lines.extend(counter_checks(checks));
            lines.push(Finding::note("branches to stop short of a target", checks.margin(*event)));
            lines
        }
    }
}

fn counter_checks(checks: &CounterChecks) -> Vec<Finding> {
    let follows = "no `pmu` points";
    let mut lines = Vec::new();
    for run in &checks.exact {
        let measured = match &run.counted {
            Outcome::Measured(counted) => counted.to_string(),
            Outcome::Odd(what) => what.clone(),
        };
        lines.push(Finding::judged(
            format!("counted: {} at {}", run.what, run.level),
            measured,
            &run.expected.to_string(),
            run.counted.is(|counted| *counted == run.expected),
            follows,
        ));
    }
    let host = match &checks.host_branches {
        Outcome::Measured(count) => count.to_string(),
        Outcome::Odd(what) => what.clone(),
    };
    let none = checks.host_branches.is(|count| *count == 0);
    lines.push(Finding::judged("counted: the host's own", host, "0", none, follows));
    let running = if checks.always_running { "always" } else { "not always" };
    lines.push(Finding::judged("counter runs", running, "always", checks.always_running, follows));
    let (measured, good) = match &checks.overflows {
        Outcome::Measured(all) => (
            format!("{} of {}, late by {} at most", all.arrived, all.wanted, all.worst_skid),
            all.arrived == all.wanted,
        ),
        Outcome::Odd(what) => (what.clone(), false),
    };
    lines.push(Finding::judged("overflows", measured, "all arrive", good, follows));
    let (measured, good) = match &checks.landings {
        Outcome::Measured(all) => {
            (format!("{} of {}", all.landed, all.tried), all.landed == all.tried)
        }
        Outcome::Odd(what) => (what.clone(), false),
    };
    lines.push(Finding::judged("landings", measured, "all exact", good, follows));
    if let Some(frozen) = checks.freeze_on_smi {
        let measured = if frozen { "on" } else { "off" };
        lines.push(Finding::judged("freeze_on_smi", measured, "on", frozen, follows));
    }
    if checks.hybrid {
        let mut hybrid = Finding::note("kinds of cores", "several");
        hybrid.follows = "the guest stays on performance cores".to_owned();
        lines.push(hybrid);
    }
    lines
}

/// A decision in one line: what `--engine auto` takes, and what that means.
pub fn summary(decision: &verdict::Decision) -> String {
    format!("{}: {} ({})", decision.purpose, decision.choice, decision.meaning)
}
