//! The doctor on synthetic hosts, and on the host at hand.

use super::facts::{
    Access, Breaking, CounterFacts, Facts, KvmKind, MsrFilter, Outcome, Stepping, Syscall,
};
use super::findings::Grade;
use super::synthetic::{closed, kvm_pvm, stock_amd, stock_intel};
use super::verdict::{Choice, Purpose, Verdict, Wanted};
use super::{DEVICE, Examination, Report};
use std::path::Path;

fn choices(facts: &Facts) -> [Choice; 4] {
    let verdict = Verdict::of(facts);
    Purpose::ALL.map(|purpose| verdict.auto(purpose))
}

fn refusal(facts: &Facts, purpose: Purpose, choice: Choice) -> Option<String> {
    Verdict::of(facts).refusal(Wanted { purpose, choice })
}

fn why_not(facts: &Facts, purpose: Purpose, choice: Choice) -> String {
    refusal(facts, purpose, choice).expect("a refusal")
}

#[test]
fn stock_intel_with_a_good_counter_protects_the_lockstep_kernel_at_any_branch() {
    let facts = stock_intel();
    assert_eq!(choices(&facts), [Choice::Free, Choice::Soft, Choice::Pmu, Choice::Pmu]);
    assert_eq!(refusal(&facts, Purpose::LockstepKernel, Choice::Exit), None);
    assert_eq!(refusal(&facts, Purpose::LockstepKernel, Choice::Step), None);
    assert!(why_not(&facts, Purpose::StockKernel, Choice::Exit).contains("RDTSC"));
}

#[test]
fn stock_amd_can_do_the_same_with_a_wider_margin() {
    let facts = stock_amd();
    assert_eq!(choices(&facts), choices(&stock_intel()));
    let verdict = Verdict::of(&facts);
    let decision = verdict.decision(Purpose::LockstepKernel).unwrap();
    assert!(decision.meaning.contains("10000"), "{}", decision.meaning);
}

#[test]
fn a_counter_that_fails_leaves_exit_points() {
    let mut facts = stock_intel();
    if let CounterFacts::Tested { checks, .. } = &mut facts.counter {
        checks.exact[0].counted = Outcome::Measured(20_000_004);
    }
    assert_eq!(choices(&facts), [Choice::Free, Choice::Soft, Choice::Exit, Choice::Exit]);
    assert!(why_not(&facts, Purpose::Probe, Choice::Pmu).contains("20000004"));
}

#[test]
fn kvm_pvm_runs_probe_guests_at_exit_points_and_no_linux() {
    let facts = kvm_pvm();
    assert_eq!(choices(&facts), [Choice::Soft, Choice::Soft, Choice::Soft, Choice::Exit]);
    assert!(why_not(&facts, Purpose::Unprotected, Choice::Free).contains("SYSCALL"));
    assert!(why_not(&facts, Purpose::LockstepKernel, Choice::Step).contains("SYSCALL"));
    assert!(why_not(&facts, Purpose::Probe, Choice::Pmu).contains("no counter"));
    assert_eq!(refusal(&facts, Purpose::Probe, Choice::Step), None);
}

#[test]
fn without_a_device_only_soft_is_left_and_every_refusal_says_so() {
    for (access, word) in [
        (Access::Absent, "no /dev/kvm"),
        (Access::Denied, "may not open /dev/kvm"),
        (Access::Failed("No such device".to_owned()), "No such device"),
        (Access::Open { api_version: 11 }, "version 11"),
    ] {
        let facts = closed(access);
        assert_eq!(choices(&facts), [Choice::Soft; 4]);
        for purpose in Purpose::ALL {
            assert_eq!(refusal(&facts, purpose, Choice::Soft), None);
        }
        assert!(why_not(&facts, Purpose::Probe, Choice::Exit).contains(word), "{word}");
        assert!(why_not(&facts, Purpose::Unprotected, Choice::Free).contains(word), "{word}");
        assert!(Report::of(facts).findings.iter().any(|finding| finding.grade == Grade::Bad));
    }
}

#[test]
fn a_missing_capability_is_named() {
    let mut facts = stock_intel();
    facts.capabilities[0].value = 0;
    assert_eq!(choices(&facts), [Choice::Soft; 4]);
    assert!(why_not(&facts, Purpose::Probe, Choice::Exit).contains("KVM_CAP_IMMEDIATE_EXIT"));

    let mut facts = stock_intel();
    facts.capabilities[1].value = 0;
    assert_eq!(choices(&facts), choices(&stock_intel()));
    assert!(why_not(&facts, Purpose::Probe, Choice::Step).contains("KVM_CAP_SET_GUEST_DEBUG"));

    let mut facts = stock_intel();
    facts.capabilities[2].value = 0;
    assert_eq!(Verdict::of(&facts), Verdict::of(&stock_intel()));
}

#[test]
fn each_obstacle_alone_takes_away_what_depends_on_it() {
    type Harm = fn(&mut super::facts::ProbeFacts);
    let all = [Choice::Free, Choice::Soft, Choice::Pmu, Choice::Pmu];
    let no_linux = [Choice::Soft, Choice::Soft, Choice::Soft, Choice::Pmu];
    let no_kvm = [Choice::Soft; 4];
    let no_lockstep = [Choice::Free, Choice::Soft, Choice::Soft, Choice::Pmu];
    let cases: [(Harm, [Choice; 4]); 9] = [
        (|_| {}, all),
        (|probes| probes.syscall = Outcome::Odd("triple fault".to_owned()), no_linux),
        (
            |probes| {
                let wrong = Syscall::WrongRegisters { cs: 8, ss: 0, rcx: 0 };
                probes.syscall = Outcome::Measured(wrong);
            },
            no_linux,
        ),
        (|probes| probes.exceptions[1].delivered = Outcome::Measured(false), no_linux),
        (|probes| probes.exceptions[0].delivered = Outcome::Measured(false), no_linux),
        (
            |probes| {
                let broken = MsrFilter { reads: true, writes: false, allows: true };
                probes.msr_filter = Outcome::Measured(broken);
            },
            no_kvm,
        ),
        (|probes| probes.cpuid[0].seen = Outcome::Measured(1), no_lockstep),
        (
            |probes| probes.time_stamp_disable = Outcome::Measured(super::facts::TimeStamp::Native),
            no_lockstep,
        ),
        (
            |probes| {
                let what = "internal error 1 of KVM".to_owned();
                probes.instructions[0].measured = super::facts::Execution::Odd(what);
            },
            no_linux,
        ),
    ];
    for (at, (harm, expected)) in cases.into_iter().enumerate() {
        let mut facts = stock_intel();
        harm(facts.probes.as_mut().unwrap());
        assert_eq!(choices(&facts), expected, "case {at}");
    }
}

#[test]
fn steps_that_get_lost_at_cpl_3_are_refused_for_linux_only() {
    let mut facts = stock_intel();
    facts.probes.as_mut().unwrap().step.user = Outcome::Measured(Stepping::Lost { after: 2 });
    assert!(why_not(&facts, Purpose::LockstepKernel, Choice::Step).contains("CPL 3"));
    assert_eq!(refusal(&facts, Purpose::Probe, Choice::Step), None);
}

#[test]
fn a_host_without_breakpoints_says_so_and_has_the_same_points() {
    for breaking in [Breaking::Late, Breaking::IntoGuest, Breaking::Missed, Breaking::Seen] {
        let mut facts = stock_intel();
        facts.probes.as_mut().unwrap().breakpoint.kernel = Outcome::Measured(breaking);
        assert_eq!(choices(&facts), choices(&stock_intel()));
        let report = Report::of(facts);
        let told =
            |finding: &&super::findings::Finding| finding.fact.contains("breakpoint at CPL 0");
        let finding = report.findings.iter().find(told).expect("it is in the report");
        assert_eq!(finding.grade, Grade::Note, "{finding:?}");
        assert!(finding.follows.contains("steps alone"), "{finding:?}");
    }
}

#[test]
fn what_is_for_another_purpose_is_refused() {
    let facts = stock_intel();
    assert!(refusal(&facts, Purpose::LockstepKernel, Choice::Free).is_some());
    assert!(refusal(&facts, Purpose::Unprotected, Choice::Exit).is_some());
}

#[test]
fn every_report_survives_json() {
    for facts in [stock_intel(), stock_amd(), kvm_pvm(), closed(Access::Denied)] {
        let report = Report::of(facts);
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}

#[test]
fn a_host_without_kvm_gets_a_report_that_says_so() {
    let report = Examination::of_device(Path::new("/nonexistent/kvm")).examine(|_| {});
    assert_eq!(report.facts.device.access, Access::Absent);
    assert!(report.facts.probes.is_none());
    let refused = Wanted { purpose: Purpose::Probe, choice: Choice::Exit };
    let sentence = report.verdict().refusal(refused).unwrap();
    assert!(sentence.contains("there is no /nonexistent/kvm"), "{sentence}");
}

/// True where a test must do without KVM, because whoever runs it says so.
fn no_kvm() -> bool {
    let without = std::env::var_os("VMFT_NO_KVM").is_some_and(|value| value == "1");
    if without {
        eprintln!("VMFT_NO_KVM=1: not run on {DEVICE}");
    }
    without
}

#[test]
fn the_host_at_hand_is_examined_to_the_end() {
    if no_kvm() {
        return;
    }
    let report = Examination::of_this_host().examine(|_| {});
    let text = serde_json::to_string_pretty(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    let facts = &report.facts;
    assert!(matches!(facts.device.access, Access::Open { .. }), "{:?}", facts.device);
    let probes = facts.probes.as_ref().expect("probe guests run");
    assert!(probes.msr_filter.is(|filter| filter.works()), "{:?}", probes.msr_filter);
    assert!(probes.dirty_log.is(|log| log.is_exact()), "{:?}", probes.dirty_log);
    assert_eq!(probes.step.kernel, Outcome::Measured(Stepping::Exact));
    assert!(probes.costs.port_exit_kernel.is(|cost| cost.0 > 0));
    assert_eq!(
        report.verdict().refusal(Wanted { purpose: Purpose::Probe, choice: Choice::Exit }),
        None
    );
    if facts.device.kind == KvmKind::Pvm {
        assert_eq!(probes.syscall, Outcome::Measured(Syscall::StaysAtUser));
        assert_eq!(probes.step.user, Outcome::Measured(Stepping::IntoGuest));
        assert_eq!(report.verdict().auto(Purpose::LockstepKernel), Choice::Soft);
    } else {
        assert_eq!(probes.syscall, Outcome::Measured(Syscall::Works));
    }
}
