//! What a host can be used for: which engine and which execution points, and why not better
//! ones. Pure: a function of the facts.

use super::facts::{
    API_VERSION, Access, CounterFacts, Facts, KvmKind, Level, Need, Outcome, ProbeFacts, Stepping,
    Syscall, TimeStamp,
};
use serde::{Deserialize, Serialize};
use std::fmt;
use vmft_kvm::trust::counter::distrust;

/// What a guest is to be run for; what is asked of the engine differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Any Linux kernel, unprotected: nothing is replayed.
    Unprotected,
    /// A distribution's kernel, protected or recorded.
    StockKernel,
    /// The lockstep kernel, protected or recorded.
    LockstepKernel,
    /// A guest that stays at CPL 0 and reads no clock of the CPU, protected or recorded.
    Probe,
}

impl Purpose {
    /// All of them, in the order of reports.
    pub const ALL: [Self; 4] =
        [Self::Unprotected, Self::StockKernel, Self::LockstepKernel, Self::Probe];
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unprotected => "any kernel, unprotected",
            Self::StockKernel => "stock kernel, protected",
            Self::LockstepKernel => "lockstep kernel, protected",
            Self::Probe => "probe guest, protected",
        })
    }
}

/// An engine, and what its execution points are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// `kvm` without points: nothing can be replayed.
    Free,
    /// `kvm`, points by retired conditional branches.
    Pmu,
    /// `kvm`, points at deterministic exits.
    Exit,
    /// `kvm`, points by single-stepped instructions.
    Step,
    /// `soft`, points by retired instructions.
    Soft,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Free => "kvm",
            Self::Pmu => "kvm, pmu points",
            Self::Exit => "kvm, exit points",
            Self::Step => "kvm, step points",
            Self::Soft => "soft",
        })
    }
}

/// A choice that this host does not allow, or that is not made without being asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// Which.
    pub choice: Choice,
    /// True if it can be had by asking for it.
    pub possible: bool,
    /// Why, in one sentence.
    pub why: String,
}

/// What `--engine auto` takes for one purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// For what.
    pub purpose: Purpose,
    /// What is taken.
    pub choice: Choice,
    /// What that means, in one sentence.
    pub meaning: String,
    /// The others.
    pub rejected: Vec<Rejected>,
}

/// What a host can be used for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// One decision a purpose, in the order of [`Purpose::ALL`].
    pub decisions: Vec<Decision>,
}

/// An engine somebody asks for by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// For what.
    pub purpose: Purpose,
    /// What is asked for.
    pub choice: Choice,
}

impl Verdict {
    /// The verdict on these facts.
    pub fn of(facts: &Facts) -> Self {
        let decide = |purpose| decide(facts, purpose);
        Self { decisions: Purpose::ALL.map(decide).to_vec() }
    }

    /// What `--engine auto` takes for `purpose`.
    pub fn auto(&self, purpose: Purpose) -> Choice {
        self.decision(purpose).map_or(Choice::Soft, |decision| decision.choice)
    }

    /// The decision for `purpose`; there is one unless the verdict comes from a damaged file.
    pub fn decision(&self, purpose: Purpose) -> Option<&Decision> {
        self.decisions.iter().find(|decision| decision.purpose == purpose)
    }

    /// Why this host does not do what is asked for, in one sentence; `None` if it does.
    pub fn refusal(&self, wanted: Wanted) -> Option<String> {
        let Some(decision) = self.decision(wanted.purpose) else {
            return Some("the verdict says nothing on this purpose".to_owned());
        };
        if decision.choice == wanted.choice {
            return None;
        }
        match decision.rejected.iter().find(|rejected| rejected.choice == wanted.choice) {
            Some(rejected) if rejected.possible => None,
            Some(rejected) => Some(rejected.why.clone()),
            None if wanted.choice == Choice::Soft => None,
            None => Some(format!("`{}` is not for this: {}", wanted.choice, wanted.purpose)),
        }
    }
}

fn decide(facts: &Facts, purpose: Purpose) -> Decision {
    let mut rejected = Vec::new();
    let mut choice: Option<Choice> = None;
    for candidate in candidates(purpose) {
        let obstacle = obstacle(facts, purpose, *candidate);
        let by_itself = reluctance(facts, *candidate);
        match (obstacle, by_itself, choice) {
            (Some(why), _, _) => {
                rejected.push(Rejected { choice: *candidate, possible: false, why });
            }
            (None, Some(why), _) => {
                rejected.push(Rejected { choice: *candidate, possible: true, why });
            }
            (None, None, Some(better)) => {
                let why = format!("`{better}` is possible and better");
                rejected.push(Rejected { choice: *candidate, possible: true, why });
            }
            (None, None, None) => choice = Some(*candidate),
        }
    }
    let choice = choice.unwrap_or(Choice::Soft);
    Decision { purpose, choice, meaning: meaning(facts, purpose, choice), rejected }
}

/// Best first; `soft` is always possible and not among them.
fn candidates(purpose: Purpose) -> &'static [Choice] {
    match purpose {
        Purpose::Unprotected => &[Choice::Free],
        _ => &[Choice::Pmu, Choice::Exit, Choice::Step],
    }
}

/// Why `auto` leaves alone what would be possible.
fn reluctance(facts: &Facts, choice: Choice) -> Option<String> {
    if choice != Choice::Step {
        return None;
    }
    let cost = facts.probes.as_ref().and_then(|probes| probes.costs.step_kernel.measured());
    let each = cost.map_or_else(String::new, |cost| format!(" at {cost} each"));
    Some(format!("single-stepping every instruction{each} is for short runs and tests"))
}

/// Why a choice is impossible for a purpose.
fn obstacle(facts: &Facts, purpose: Purpose, choice: Choice) -> Option<String> {
    let probes = match usable(facts) {
        Ok(probes) => probes,
        Err(why) => return Some(why),
    };
    if purpose != Purpose::Probe
        && let Some(why) = no_linux(facts.device.kind, probes)
    {
        return Some(why);
    }
    match choice {
        Choice::Soft | Choice::Free => None,
        _ => not_replayable(purpose, probes).or_else(|| match choice {
            Choice::Pmu => no_counter(facts),
            Choice::Step => no_stepping(facts, purpose, probes),
            _ => None,
        }),
    }
}

/// KVM in a state in which the engine starts at all.
fn usable(facts: &Facts) -> Result<&ProbeFacts, String> {
    let path = facts.device.path.display();
    match &facts.device.access {
        Access::Absent => {
            return Err(format!(
                "there is no {path}: no KVM module is loaded, or virtualisation is off in the \
                 firmware"
            ));
        }
        Access::Denied => {
            return Err(format!(
                "this user may not open {path}; being in its group (often `kvm`) allows it"
            ));
        }
        Access::Failed(why) => return Err(format!("{path} does not open: {why}")),
        Access::Open { api_version } if *api_version != API_VERSION => {
            return Err(format!(
                "{path} answers as version {api_version} of KVM's interface, not {API_VERSION}"
            ));
        }
        Access::Open { .. } => {}
    }
    let missing = missing(facts, Need::Engine);
    if !missing.is_empty() {
        return Err(format!("this KVM lacks {missing}, which the engine needs"));
    }
    let Some(probes) = &facts.probes else {
        let why = facts.trouble.as_deref().unwrap_or("for no reason it gave");
        return Err(format!("this KVM does not let a guest be made: {why}"));
    };
    if !probes.msr_filter.is(|filter| filter.works()) {
        return Err("this KVM has an MSR filter that does not filter".to_owned());
    }
    Ok(probes)
}

/// Names of the missing capabilities.
fn missing(facts: &Facts, need: Need) -> String {
    let names = facts.capabilities.iter().filter(|each| each.need == need && !each.is_there());
    names.map(|each| each.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// Why no Linux runs here, whatever for.
fn no_linux(kind: KvmKind, probes: &ProbeFacts) -> Option<String> {
    let this = format!("KVM here ({kind})");
    match &probes.syscall {
        Outcome::Measured(Syscall::Works) => {}
        Outcome::Measured(Syscall::StaysAtUser) => {
            return Some(format!(
                "{this} leaves SYSCALL at CPL 3, so no Linux program can call its kernel"
            ));
        }
        Outcome::Measured(Syscall::WrongRegisters { .. }) => {
            return Some(format!("{this} gives SYSCALL the wrong registers"));
        }
        Outcome::Odd(what) => return Some(format!("SYSCALL does not work on {this}: {what}")),
    }
    if let Some(fact) = probes.exceptions.iter().find(|fact| !fact.delivered.is(|right| *right)) {
        return Some(format!("{} at {} is not delivered by {this}", fact.name, fact.level));
    }
    let wrong = probes.instructions.iter().filter(|fact| !fact.is_right());
    let wrong = wrong.map(|fact| fact.name.as_str()).collect::<Vec<_>>();
    (!wrong.is_empty())
        .then(|| format!("{this} cannot execute {} at CPL 0, which kernels use", wrong.join(", ")))
}

/// Why a run for this purpose could not be replayed exactly.
fn not_replayable(purpose: Purpose, probes: &ProbeFacts) -> Option<String> {
    match purpose {
        Purpose::StockKernel if !probes.time_stamp.is(|read| *read == TimeStamp::Exits) => Some(
            "KVM cannot trap RDTSC, and a stock kernel executes it: protect it on `soft`, or take \
             the lockstep kernel"
                .to_owned(),
        ),
        Purpose::LockstepKernel
            if !probes.time_stamp_disable.is(|read| *read == TimeStamp::Faults) =>
        {
            Some(
                "CR4.TSD does not stop RDTSC at CPL 3 on this KVM, so programs see the host's time"
                    .to_owned(),
            )
        }
        Purpose::StockKernel | Purpose::LockstepKernel => {
            let lies = probes.cpuid.iter().find(|fact| !fact.is_obeyed())?;
            Some(format!("the guest sees the host's CPUID ({}), whatever it is given", lies.what))
        }
        Purpose::Unprotected | Purpose::Probe => None,
    }
}

fn no_counter(facts: &Facts) -> Option<String> {
    if let CounterFacts::Tested { .. } = &facts.counter {
        let missing = missing(facts, Need::Counter);
        if !missing.is_empty() {
            return Some(format!("this KVM lacks {missing}, which landing needs"));
        }
    }
    distrust(&facts.counter)
}

fn no_stepping(facts: &Facts, purpose: Purpose, probes: &ProbeFacts) -> Option<String> {
    let missing = missing(facts, Need::Step);
    if !missing.is_empty() {
        return Some(format!("this KVM lacks {missing}, which stepping needs"));
    }
    let levels = [(Level::Kernel, &probes.step.kernel), (Level::User, &probes.step.user)];
    let needed = if purpose == Purpose::Probe { &levels[..1] } else { &levels[..] };
    let (level, stepping) =
        needed.iter().find(|(_, stepping)| !stepping.is(|step| *step == Stepping::Exact))?;
    Some(match stepping {
        Outcome::Measured(Stepping::IntoGuest) => {
            format!("single-steps at {level} end in the guest's debug handler on this KVM")
        }
        Outcome::Measured(_) => format!("single-steps at {level} get lost on this KVM"),
        Outcome::Odd(what) => format!("single-stepping at {level} does not work: {what}"),
    })
}

/// What a choice means for whoever gets it.
fn meaning(facts: &Facts, purpose: Purpose, choice: Choice) -> String {
    match choice {
        Choice::Free => "at hardware speed".to_owned(),
        Choice::Pmu => match &facts.counter {
            CounterFacts::Tested { event, checks } => format!(
                "arrivals at any branch, stopping {} short of it and stepping",
                checks.margin(*event)
            ),
            CounterFacts::Absent(_) => "arrivals at any branch".to_owned(),
        },
        Choice::Exit if purpose == Purpose::Probe => {
            "arrivals wait for the next exit that both sides reach".to_owned()
        }
        Choice::Exit => {
            "arrivals wait for the next exit that both sides reach; where none comes for \
                         10 ms, a checkpoint names the place"
                .to_owned()
        }
        Choice::Step => "arrivals at any instruction, slowly".to_owned(),
        Choice::Soft => "the CPU in user space: exact on every host, slower".to_owned(),
    }
}
