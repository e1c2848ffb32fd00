//! A hardware breakpoint on an instruction, and what the guest can see of it.

use crate::trust::device;
use crate::trust::facts::{Breaking, BreakpointFacts, Level, Outcome};
use crate::trust::lab::{END_PORT, Lab, LabError, PATIENCE, Program, RFLAGS_RF, RFLAGS_TF, Stop};
use crate::trust::layout;
use crate::trust::watchdog::Limit;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use std::path::Path;
use std::sync::OnceLock;

/// `mov ecx, 3`, then three times `inc eax`, `pushfq`, `pop rdx`, `or ebx, edx`, `dec ecx`, `jnz`; then
/// the end.
const LOOP: [u8; 17] =
    [0xB9, 3, 0, 0, 0, 0xFF, 0xC0, 0x9C, 0x5A, 0x09, 0xD3, 0xFF, 0xC9, 0x75, 0xF6, 0xE6, 0xF0];
/// Where the branch is.
const BRANCH: u64 = layout::CODE + 13;
/// How often it is met.
const TURNS: u64 = 3;
const DB: u8 = 1;

/// At both levels.
pub fn run(lab: &mut Lab) -> BreakpointFacts {
    let mut at = |level| Outcome::of(stops(lab, level));
    BreakpointFacts { kernel: at(Level::Kernel), user: at(Level::User) }
}

/// Where breakpoints can be relied upon on this host. It is tested when this is first called.
pub fn trusted() -> Trusted {
    static TESTED: OnceLock<Trusted> = OnceLock::new();
    let test = || {
        let (_, kvm) = device::open(Path::new(crate::trust::DEVICE));
        let facts = kvm.and_then(|kvm| examine(&kvm).ok());
        let exact = |breaking: &Breaking| *breaking == Breaking::Exact;
        facts.map_or(Trusted::NOWHERE, |facts| Trusted {
            kernel: facts.kernel.is(exact),
            user: facts.user.is(exact),
        })
    };
    *TESTED.get_or_init(test)
}

/// The privilege levels at which breakpoints stop a guest, once each time, and leave no trace in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trusted {
    /// CPL 0.
    pub kernel: bool,
    /// CPL 3.
    pub user: bool,
}

impl Trusted {
    /// At no level.
    pub const NOWHERE: Self = Self { kernel: false, user: false };
}

fn examine(kvm: &Kvm) -> Result<BreakpointFacts, LabError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(LabError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(run(&mut Lab::open(kvm, &supported)?))
}

/// Runs the loop from hit to hit, and over each by a single step.
fn stops(lab: &mut Lab, level: Level) -> Result<Outcome<Breaking>, LabError> {
    lab.load(&Program::new(level, &LOOP))?;
    let limit = lab.limit(PATIENCE);
    for turn in 1..=TURNS {
        match again(&limit, || lab.break_under(BRANCH, &limit)) {
            Stop::Trap { pc: BRANCH } => {}
            Stop::Exception { vector: DB, .. } => {
                return Ok(Outcome::Measured(Breaking::IntoGuest));
            }
            Stop::Out(END_PORT) => return Ok(Outcome::Measured(Breaking::Missed)),
            other => return Ok(Outcome::Odd(other.to_string())),
        }
        let registers = lab.registers()?;
        if (registers.rip, registers.rax) != (BRANCH, turn) {
            return Ok(Outcome::Measured(Breaking::Late));
        }
        // Where single-stepping does not work there is no use in breakpoints.
        match again(&limit, || lab.step_under(&limit)) {
            Stop::Trap { .. } => {}
            other => return Ok(Outcome::Odd(format!("a step from it: {other}"))),
        }
    }
    lab.stop_stepping()?;
    let seen = match again(&limit, || lab.run_under(&limit)) {
        Stop::Out(END_PORT) => lab.registers()?.rbx & (RFLAGS_TF | RFLAGS_RF),
        other => return Ok(Outcome::Odd(other.to_string())),
    };
    Ok(Outcome::Measured(if seen == 0 { Breaking::Exact } else { Breaking::Seen }))
}

/// Until it is not for a signal that the guest has stopped.
fn again(limit: &Limit, mut enter: impl FnMut() -> Stop) -> Stop {
    loop {
        match enter() {
            Stop::Interrupted if !limit.is_over() => {}
            stop => return stop,
        }
    }
}
