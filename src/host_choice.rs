//! Which engine a guest gets on this host: what `--engine auto` takes, and what is refused.
//!
//! The judgement is the doctor's ([`vmft_vmm::doctor`]), by running its probes; here is what is asked
//! of it for a guest at hand, and how its answer becomes an engine.

use crate::engine_options::{ENGINE_REMEDY, EngineChoice, EngineOptions, RunKind};
use anyhow::{Result, anyhow};
use vmft_backup::tell;
use vmft_kvm::PointKind;
use vmft_vmm::boot;
use vmft_vmm::doctor::verdict::{Choice, Purpose, Verdict, Wanted};
use vmft_vmm::doctor::{Counter, Examination};
use vmft_vmm::engine::EngineKind;

/// What is known of a guest before it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GuestKind {
    /// Nothing: it may be any kernel.
    Stock,
    /// Its kernel says that it looks at nothing that differs from host to host.
    Lockstep,
    /// That, and that it never leaves privilege level 0.
    Probe,
}

impl GuestKind {
    fn of(kernel: &[u8]) -> Self {
        match (boot::is_vouched_for(kernel), boot::stays_at_level_zero(kernel)) {
            (false, _) => Self::Stock,
            (true, false) => Self::Lockstep,
            (true, true) => Self::Probe,
        }
    }

    /// What the doctor calls it.
    fn purpose(self, run_kind: RunKind) -> Purpose {
        match (self, run_kind) {
            // Also alone: what it needs of a host is less than a Linux does.
            (Self::Probe, _) => Purpose::Probe,
            (_, RunKind::Free) => Purpose::Unprotected,
            (Self::Stock, RunKind::Replayed) => Purpose::StockKernel,
            (Self::Lockstep, RunKind::Replayed) => Purpose::LockstepKernel,
        }
    }
}

/// The engine for a guest with this kernel, as the options ask for it.
///
/// # Errors
/// What is asked for cannot be had on this host, in the doctor's words.
pub fn choose(options: &EngineOptions, run_kind: RunKind, kernel: &[u8]) -> Result<EngineKind> {
    match options.engine {
        Some(EngineChoice::Auto) => Ok(auto(run_kind, kernel)),
        Some(EngineChoice::Soft | EngineChoice::Kvm) | None => {
            let engine = options.wanted(run_kind)?.unwrap_or_default();
            check(engine, run_kind, kernel)?;
            Ok(engine)
        }
    }
}

/// A guest with this kernel can run on `engine` on this host.
///
/// # Errors
/// The doctor's sentence.
pub fn check(engine: EngineKind, run_kind: RunKind, kernel: &[u8]) -> Result<()> {
    let EngineKind::Kvm { points } = engine else { return Ok(()) };
    let guest = GuestKind::of(kernel);
    if guest == GuestKind::Stock && run_kind == RunKind::Replayed {
        // Refused on every host, for a reason of its own, by `Machine::check_lockstep`.
        return Ok(());
    }
    let counter = if points == PointKind::Pmu { Counter::Tested } else { Counter::Ignored };
    let verdict = examine(counter);
    refusal(&verdict, guest, run_kind, points).map_or(Ok(()), |why| {
        let purpose = guest.purpose(run_kind);
        Err(anyhow!(
            "the kvm engine cannot run this on this host ({purpose}): {why}; {ENGINE_REMEDY}"
        ))
    })
}

/// Why the host cannot do that.
fn refusal(
    verdict: &Verdict,
    guest: GuestKind,
    run_kind: RunKind,
    points: PointKind,
) -> Option<String> {
    let purpose = guest.purpose(run_kind);
    let choice = match points {
        // Whoever stops at exits can let the guest run freely.
        PointKind::Free if purpose == Purpose::Probe => Choice::Exit,
        PointKind::Free => Choice::Free,
        PointKind::Exit | PointKind::Step | PointKind::Pmu if purpose == Purpose::Unprotected => {
            Choice::Free
        }
        PointKind::Exit => Choice::Exit,
        PointKind::Step => Choice::Step,
        PointKind::Pmu => Choice::Pmu,
    };
    verdict.refusal(Wanted { purpose, choice })
}

fn examine(counter: Counter) -> Verdict {
    Examination::of_this_host().counter(counter).examine(|_| {}).verdict
}

/// The engine `auto` takes. Says so, and why, in one line.
fn auto(run_kind: RunKind, kernel: &[u8]) -> EngineKind {
    let guest = GuestKind::of(kernel);
    let counter = match run_kind {
        RunKind::Free => Counter::Ignored,
        RunKind::Replayed => Counter::Tested,
    };
    let (engine, line) = decide(&examine(counter), guest, run_kind);
    tell!("{line}");
    engine
}

/// The engine, and the line that says why.
fn decide(verdict: &Verdict, guest: GuestKind, run_kind: RunKind) -> (EngineKind, String) {
    let asked = guest.purpose(run_kind);
    let engine = match (verdict.auto(asked), run_kind) {
        (Choice::Soft, _) => EngineKind::Soft,
        (Choice::Free | Choice::Pmu | Choice::Exit | Choice::Step, RunKind::Free) => {
            EngineKind::Kvm { points: PointKind::Free }
        }
        (Choice::Step, RunKind::Replayed) => EngineKind::Kvm { points: PointKind::Step },
        (Choice::Pmu, RunKind::Replayed) => EngineKind::Kvm { points: PointKind::Pmu },
        (Choice::Free | Choice::Exit, RunKind::Replayed) => {
            EngineKind::Kvm { points: PointKind::Exit }
        }
    };
    let why = match verdict.decision(asked) {
        Some(decision) if engine == EngineKind::Soft => {
            decision.rejected.iter().find(|rejected| !rejected.possible).map(|best| &best.why)
        }
        Some(decision) => Some(&decision.meaning),
        None => None,
    };
    let why = why.map_or_else(String::new, |why| format!(": {why}"));
    (engine, format!("--engine auto takes {engine} ({asked}){why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmft_vmm::doctor::verdict::{Decision, Rejected};

    /// A host that takes `choice` for everything, and says why not the others.
    fn host(choice: Choice) -> Verdict {
        let reject =
            |other| Rejected { choice: other, possible: false, why: format!("no {other}") };
        let others = [Choice::Free, Choice::Pmu, Choice::Exit, Choice::Step];
        let rejected: Vec<_> =
            others.into_iter().filter(|other| *other != choice).map(reject).collect();
        let decide = |purpose| Decision {
            purpose,
            choice,
            meaning: "so it is".to_owned(),
            rejected: rejected.clone(),
        };
        Verdict { decisions: Purpose::ALL.map(decide).to_vec() }
    }

    #[test]
    fn auto_takes_what_the_host_does_best_for_the_guest_and_says_why() {
        let kvm = |points| EngineKind::Kvm { points };
        let (engine, line) = decide(&host(Choice::Free), GuestKind::Stock, RunKind::Free);
        assert_eq!(engine, kvm(PointKind::Free));
        let wanted = "--engine auto takes kvm, free-running (any kernel, unprotected): so it is";
        assert_eq!(line, wanted);
        let (engine, line) = decide(&host(Choice::Soft), GuestKind::Stock, RunKind::Replayed);
        assert_eq!(engine, EngineKind::Soft);
        assert_eq!(line, "--engine auto takes soft (stock kernel, protected): no kvm");
        let (engine, _) = decide(&host(Choice::Exit), GuestKind::Probe, RunKind::Replayed);
        assert_eq!(engine, kvm(PointKind::Exit));
        let (engine, _) = decide(&host(Choice::Exit), GuestKind::Probe, RunKind::Free);
        assert_eq!(engine, kvm(PointKind::Free));
        let (engine, _) = decide(&host(Choice::Pmu), GuestKind::Lockstep, RunKind::Replayed);
        assert_eq!(engine, kvm(PointKind::Pmu));
    }

    #[test]
    fn what_is_asked_for_by_name_is_refused_with_the_hosts_reason() {
        let exit = host(Choice::Exit);
        let why = |guest, run_kind, points| refusal(&exit, guest, run_kind, points);
        assert_eq!(why(GuestKind::Probe, RunKind::Free, PointKind::Free), None);
        assert_eq!(why(GuestKind::Lockstep, RunKind::Replayed, PointKind::Exit), None);
        let no_kvm = Some("no kvm".to_owned());
        assert_eq!(why(GuestKind::Stock, RunKind::Free, PointKind::Free), no_kvm);
        let steps = why(GuestKind::Lockstep, RunKind::Replayed, PointKind::Step);
        assert_eq!(steps, Some("no kvm, step points".to_owned()));
        let branches = why(GuestKind::Probe, RunKind::Replayed, PointKind::Pmu);
        assert_eq!(branches, Some("no kvm, pmu points".to_owned()));
    }
}
