//! The device node of KVM, and what KVM says it can do.

use super::facts::{CapabilityFact, Need};
use kvm_bindings::{
    KVM_CAP_DEBUGREGS, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_EXT_CPUID, KVM_CAP_IMMEDIATE_EXIT,
    KVM_CAP_INTERNAL_ERROR_DATA, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_MP_STATE,
    KVM_CAP_PMU_CAPABILITY, KVM_CAP_READONLY_MEM, KVM_CAP_SET_GUEST_DEBUG,
    KVM_CAP_SET_GUEST_DEBUG2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_SYNC_MMU, KVM_CAP_SYNC_REGS,
    KVM_CAP_TSC_CONTROL, KVM_CAP_USER_MEMORY, KVM_CAP_VCPU_EVENTS, KVM_CAP_X86_MSR_FILTER,
    KVM_CAP_X86_ROBUST_SINGLESTEP, KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_XCRS, KVM_CAP_XSAVE,
};
use kvm_ioctls::Kvm;

/// Number, name, need, and what it is.
const CAPABILITIES: &[(u32, &str, Need, &str)] = &[
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", Need::Engine, "guest memory is ours"),
    (KVM_CAP_SYNC_MMU, "KVM_CAP_SYNC_MMU", Need::Engine, "guest memory may move in the host"),
    (KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID", Need::Engine, "CPUID is ours"),
    (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE", Need::Engine, "a halted CPU can be saved"),
    (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS", Need::Engine, "pending events can be saved"),
    (KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS", Need::Engine, "so can debug registers"),
    (KVM_CAP_XSAVE, "KVM_CAP_XSAVE", Need::Engine, "so can the FPU"),
    (KVM_CAP_XCRS, "KVM_CAP_XCRS", Need::Engine, "so can XCR0"),
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", Need::Engine, "I/O can be completed"),
    (KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR", Need::Engine, "MSRs are ours"),
    (KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER", Need::Engine, "all of them"),
    (
        KVM_CAP_SPLIT_IRQCHIP,
        "KVM_CAP_SPLIT_IRQCHIP",
        Need::Cpus,
        "local APICs without the rest of a board",
    ),
    (KVM_CAP_SET_GUEST_DEBUG, "KVM_CAP_SET_GUEST_DEBUG", Need::Step, "single-stepping"),
    (
        KVM_CAP_X86_ROBUST_SINGLESTEP,
        "KVM_CAP_X86_ROBUST_SINGLESTEP",
        Need::Step,
        "the trap flag is hidden from us",
    ),
    (
        KVM_CAP_SET_GUEST_DEBUG2,
        "KVM_CAP_SET_GUEST_DEBUG2",
        Need::Helps,
        "mask of what a debugger may ask for",
    ),
    (KVM_CAP_PMU_CAPABILITY, "KVM_CAP_PMU_CAPABILITY", Need::Helps, "the guest's counters go"),
    (KVM_CAP_INTERNAL_ERROR_DATA, "KVM_CAP_INTERNAL_ERROR_DATA", Need::Helps, "errors explained"),
    (KVM_CAP_SYNC_REGS, "KVM_CAP_SYNC_REGS", Need::Helps, "registers come with the exit"),
    (KVM_CAP_READONLY_MEM, "KVM_CAP_READONLY_MEM", Need::Helps, "read-only guest memory"),
    (
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
        Need::Helps,
        "a dirty log cleared in pieces",
    ),
    (
        KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        "KVM_CAP_ENFORCE_PV_FEATURE_CPUID",
        Need::Helps,
        "hidden paravirtual features stay off",
    ),
    (KVM_CAP_TSC_CONTROL, "KVM_CAP_TSC_CONTROL", Need::Helps, "the guest's counter is scaled"),
];

/// Asks for every capability of the list.
pub fn capabilities(kvm: &Kvm) -> Vec<CapabilityFact> {
    let ask = |(number, name, need, what): &(u32, &str, Need, &str)| CapabilityFact {
        name: (*name).to_owned(),
        value: kvm.check_extension_raw(libc::c_ulong::from(*number)),
        need: *need,
        what: (*what).to_owned(),
    };
    CAPABILITIES.iter().map(ask).collect()
}
