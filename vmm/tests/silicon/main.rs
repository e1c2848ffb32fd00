//! The `soft` engine against real silicon.
//!
//! Random instructions and short sequences over random registers, flags and memory run natively
//! on the host CPU and on the engine, and everything architecturally defined is compared: general
//! registers, flags, instruction pointer, memory, x87 and SSE with their control and status, and
//! of an exception its vector, error code and address. Every instruction form the engine says it
//! executes is run, or stands in [`corpus`] with the reason why not.
//!
//! ```text
//! seed, number ─ generate ─▶ Case ─┬─ native (forked child) ─▶ Outcome ─┬─ compare ─▶ shrink, report
//!                                  └─ guest  (page tables, IDT) ▶ Outcome ─┘
//! ```
//!
//! Environment: `VMFT_SILICON_SEED` and `VMFT_SILICON_CASES` choose what runs (both are printed),
//! `VMFT_SILICON_CASE` runs one case alone, `VMFT_SILICON_ONLY` takes only the forms whose name
//! contains it, `VMFT_SILICON_FAILURES` says how many forms may fail before the run gives up.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod breakpoints;
mod case;
mod compare;
mod corpus;
mod definedness;
mod extended;
mod generate;
mod guest;
mod inexact;
mod layout;
mod native;
mod operands;
mod report;
mod rng;
mod special;
mod trampoline;
mod values;
mod vendor;

use case::{Bits, Case, Outcome, Ready, Stop};
use compare::Difference;
use corpus::{Corpus, Policy};
use guest::Guest;
use iced_x86::{Code, CpuidFeature};
use native::{BATCH, Lost, Native};
use report::Failure;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use vmft_cpu::soft::{self, CacheLimits};

/// Cases of an ordinary test run.
const DEFAULT_CASES: u64 = 150_000;
/// The same, of 32-bit code.
const DEFAULT_CASES_32: u64 = 50_000;
const DEFAULT_SEED: u64 = 0x5111_C0DE;
/// Retries to make a failure smaller; each costs a fork.
const SHRINK_ATTEMPTS: u32 = 600;

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Both sides, and what they have done so far.
struct Bench {
    seed: u64,
    template: Vec<u8>,
    native: Native,
    guest: Guest,
    limits: CacheLimits,
    /// How often each form ran to completion on both sides.
    completed: BTreeMap<Code, u64>,
    /// How often a case made for the form ran at all.
    ran: BTreeMap<Code, u64>,
}

impl Bench {
    fn new(seed: u64, limits: CacheLimits) -> Self {
        Self {
            seed,
            template: generate::template(seed),
            native: Native::new().expect("the host maps a few pages"),
            guest: Guest::new(&Native::exit_page(), limits),
            limits,
            completed: BTreeMap::new(),
            ran: BTreeMap::new(),
        }
    }

    /// Runs cases on both sides; those that differ come back.
    fn run(&mut self, cases: Vec<Case>) -> Vec<Failure> {
        let ready: Vec<Ready> = cases
            .iter()
            .map(|case| case.ready(&self.template).expect("it was assembled before"))
            .collect();
        let batch: Vec<(&Ready, u64)> =
            ready.iter().zip(&cases).map(|(ready, case)| (ready, case.origin)).collect();
        let outcomes = self.native.run(&batch).expect("the host runs a child process");
        let mut failures = Vec::new();
        for ((case, ready), host) in cases.into_iter().zip(ready).zip(outcomes) {
            if let Some(failure) = self.check(case, ready, host) {
                failures.push(failure);
            }
        }
        failures
    }

    fn check(&mut self, case: Case, ready: Ready, host: Result<Outcome, Lost>) -> Option<Failure> {
        let engine = self.run_guest(&ready, &case);
        let single = |what: &str, host: String, engine: String| {
            vec![Difference { what: what.to_owned(), host, engine }]
        };
        let (host, differences) = match (host, engine) {
            (Err(lost), engine) => {
                let engine = engine.map(|outcome| outcome.stop);
                (
                    None,
                    single("outcome", format!("died, {:#x}", lost.status), format!("{engine:?}")),
                )
            }
            (Ok(host), Err(stuck)) => {
                let stop = format!("{:?}", host.stop);
                (Some(host), single("the engine stopped", stop, stuck))
            }
            (Ok(host), Ok(engine)) => {
                self.count(&case, &ready, &host);
                let retired = self.guest.retired();
                let differences = compare::compare(&case, &ready, &host, &engine, retired);
                (Some(host), differences)
            }
        };
        (!differences.is_empty()).then_some(Failure { case, ready, host, differences })
    }

    /// Runs the engine; if it panics the guest is built anew.
    fn run_guest(&mut self, ready: &Ready, case: &Case) -> Result<Outcome, String> {
        let run = || self.guest.run(ready, case.origin, case.stride);
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(outcome) => outcome.map_err(|stuck| format!("{stuck:?}")),
            Err(_) => {
                self.guest = Guest::new(&Native::exit_page(), self.limits);
                Err("panicked".to_owned())
            }
        }
    }

    fn count(&mut self, case: &Case, ready: &Ready, host: &Outcome) {
        *self.ran.entry(case.focus).or_default() += 1;
        let at = ready.starts[case.focus_step];
        // A first instruction that is left behind has completed, wherever it went.
        let past = host.rip > at || case.focus_step == 0 && host.rip != at;
        if host.stop == Stop::End || past {
            *self.completed.entry(case.focus).or_default() += 1;
        }
    }

    fn shrink(&mut self, failure: Failure) -> Failure {
        // A child that ran out of time would do so at every attempt.
        let attempts = if failure.host.is_some() { SHRINK_ATTEMPTS } else { 10 };
        report::shrink(failure, attempts, |case| {
            case.ready(&self.template).ok()?;
            self.run(vec![case.clone()]).pop()
        })
    }
}

/// True if the host CPU has what `code` needs; without it there is nothing to compare with.
fn host_has(code: Code) -> bool {
    code.cpuid_features().iter().all(|feature| match feature {
        CpuidFeature::SSE3 => is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        _ => true,
    })
}

/// Runs the cases numbered `numbers`; the failures come back shrunk, at most one a form.
fn run(bench: &mut Bench, corpus: &Corpus, numbers: &[u64], limit: usize) -> Vec<Failure> {
    let mut failures = Vec::new();
    let mut failed = BTreeSet::new();
    for batch in numbers.chunks(BATCH) {
        let cases = batch.iter().map(|&n| generate::case(bench.seed, n, corpus)).collect();
        for failure in bench.run(cases) {
            if failed.insert(failure.case.focus) {
                failures.push(bench.shrink(failure));
            }
            if failures.len() >= limit {
                return failures;
            }
        }
    }
    failures
}

#[test]
fn the_engine_does_what_the_processor_does() {
    agree(Bits::Long, DEFAULT_CASES, CacheLimits::default());
}

#[test]
fn compiled_code_does_what_the_processor_does() {
    agree(Bits::Long, DEFAULT_CASES, CacheLimits::default().compiled(1 << 20, 0));
}

#[test]
fn the_engine_does_what_the_processor_does_in_32_bit_code() {
    agree(Bits::Short, DEFAULT_CASES_32, CacheLimits::default());
}

fn agree(bits: Bits, default_cases: u64, limits: CacheLimits) {
    let seed = from_environment("VMFT_SILICON_SEED").unwrap_or(DEFAULT_SEED);
    let cases = from_environment("VMFT_SILICON_CASES").unwrap_or(default_cases);
    let limit = from_environment("VMFT_SILICON_FAILURES").unwrap_or(5) as usize;
    let only = std::env::var("VMFT_SILICON_ONLY").unwrap_or_default();
    let corpus = Corpus::of(bits, |code| soft::supports(code) && host_has(code));
    let forms = corpus.focus.len() as u64;
    println!("{}-bit code, seed {seed}, {cases} cases over {forms} forms", bits.number());
    let numbers: Vec<u64> = match from_environment("VMFT_SILICON_CASE") {
        Some(number) => vec![number],
        None => (0..cases).collect(),
    };
    let wanted = |n: &u64| {
        let (focus, _) = corpus.focus[(n % forms) as usize];
        only.is_empty() || format!("{focus:?}").contains(&only)
    };
    let numbers: Vec<u64> = numbers.into_iter().filter(wanted).collect();
    let mut bench = Bench::new(seed, limits);
    let failures = run(&mut bench, &corpus, &numbers, limit);
    for failure in &failures {
        println!("{}", report::describe(failure, seed));
    }
    assert!(failures.is_empty(), "{} forms differ (seed {seed})", failures.len());
    if numbers.len() as u64 >= 10 * forms {
        every_form_ran(&bench, &corpus);
    }
}

/// Every form ran, and every form that can complete in user mode completed.
fn every_form_ran(bench: &Bench, corpus: &Corpus) {
    for &(code, policy) in &corpus.focus {
        assert!(bench.ran.contains_key(&code), "{code:?} never ran");
        let faults = policy == Policy::First && corpus::always_faults(code);
        assert!(
            faults || bench.completed.contains_key(&code),
            "{code:?} never completed in {} runs",
            bench.ran[&code]
        );
    }
}
