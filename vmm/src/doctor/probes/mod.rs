//! The probes: each loads a few dozen bytes into a [`Lab`], runs them, and says what became of
//! them. None judges.

pub mod cost;
pub mod cpuid;
pub mod instructions;
pub mod memory;
pub mod msr;
pub mod privilege;
pub mod step;
pub mod time_stamp;

use super::facts::{Execution, HostFacts, Outcome, ProbeFacts, StepFacts};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use vmft_kvm::trust::breakpoint;
use vmft_kvm::trust::lab::{Lab, LabError, Stop};
use vmft_kvm::trust::layout::CODE;

/// The exception of `INT3`.
const BREAKPOINT: u8 = 3;

/// Runs all probes.
///
/// # Errors
/// No probe guest can be made at all.
pub fn run(kvm: &Kvm, host: &HostFacts) -> Result<ProbeFacts, LabError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(LabError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let mut lab = Lab::open(kvm, &supported)?;
    let syscall = privilege::syscall(&mut lab);
    let step = StepFacts {
        kernel: step::plain(&mut lab, super::facts::Level::Kernel),
        user: step::plain(&mut lab, super::facts::Level::User),
        pushf_shows_trap_flag: step::pushf(&mut lab),
        survives_syscall: step::syscall(&mut lab, &syscall),
    };
    let hidden = cpuid::hide(&supported);
    let mut blind = Lab::open(kvm, &hidden)?;
    Ok(ProbeFacts {
        syscall,
        exceptions: privilege::exceptions(&mut lab),
        step,
        breakpoint: breakpoint::run(&mut lab),
        instructions: instructions::run(&mut lab, host),
        cpuid: cpuid::obeyed(&mut blind, &hidden),
        time_stamp: time_stamp::read(&mut lab),
        time_stamp_disable: time_stamp::disabled(&mut lab),
        hidden: instructions::hidden(&mut blind),
        dirty_log: memory::dirty_log(&mut lab),
        costs: cost::run(&mut lab),
        msr_filter: Lab::open(kvm, &supported).map_or_else(
            |error| Outcome::Odd(error.to_string()),
            |mut filtered| msr::filter(&mut filtered),
        ),
    })
}

/// What `stop` says of the first instruction of a guest that stops with `end` if it executes.
fn execution(stop: &Stop, end: &Stop) -> Execution {
    match stop {
        stop if stop == end => Execution::Executes,
        // A breakpoint is a trap: what is saved is the address behind it.
        Stop::Exception { vector, frame } if frame.rip == CODE || *vector == BREAKPOINT => {
            Execution::Faults(*vector)
        }
        Stop::InternalError { suberror } => Execution::InternalError { suberror: *suberror },
        other => Execution::Odd(other.to_string()),
    }
}
