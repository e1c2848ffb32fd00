//! The MSR filter: what is denied comes to us, what is allowed does not.

use crate::doctor::facts::{Level, MsrFilter, Outcome};
use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_VALID_MASK, kvm_enable_cap, kvm_regs,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags};
use vmft_kvm::trust::lab::{END, END_PORT, Lab, LabError, MSR_ANSWER, Program, Stop};

const TIME_STAMP_COUNTER: u32 = 0x10;
const EFER: u32 = 0xC000_0080;
/// `rdmsr`
const READ: [u8; 2] = [0x0F, 0x32];
/// `wrmsr`
const WRITE: [u8; 2] = [0x0F, 0x30];

/// Denies every MSR but a few, and tries one of each.
pub fn filter(lab: &mut Lab) -> Outcome<MsrFilter> {
    Outcome::of(try_filter(lab))
}

fn try_filter(lab: &mut Lab) -> Result<Outcome<MsrFilter>, LabError> {
    let mut exits = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
    exits.args[0] = u64::from(KVM_MSR_EXIT_REASON_VALID_MASK);
    lab.vm().enable_cap(&exits).map_err(LabError::kvm("KVM_CAP_X86_USER_SPACE_MSR"))?;
    let allowed = MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: EFER,
        msr_count: 8,
        bitmap: &[0xFF],
    };
    lab.vm()
        .set_msr_filter(MsrFilterDefaultAction::DENY, &[allowed])
        .map_err(LabError::kvm("KVM_X86_SET_MSR_FILTER"))?;

    let reads = access(lab, READ, TIME_STAMP_COUNTER)? == Stop::MsrRead(TIME_STAMP_COUNTER)
        && lab.run() == Stop::Out(END_PORT)
        && {
            let registers = lab.registers()?;
            registers.rdx << 32 | registers.rax & 0xFFFF_FFFF == MSR_ANSWER
        };
    let writes = access(lab, WRITE, TIME_STAMP_COUNTER)? == Stop::MsrWrite(TIME_STAMP_COUNTER)
        && lab.run() == Stop::Out(END_PORT);
    let allows = access(lab, READ, EFER)? == Stop::Out(END_PORT);
    Ok(Outcome::Measured(MsrFilter { reads, writes, allows }))
}

fn access(lab: &mut Lab, instruction: [u8; 2], msr: u32) -> Result<Stop, LabError> {
    let code = [&instruction[..], &END].concat();
    let registers = kvm_regs { rcx: u64::from(msr), ..Default::default() };
    lab.load(&Program { registers, ..Program::new(Level::Kernel, &code) })?;
    Ok(lab.run())
}
