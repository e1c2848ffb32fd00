//! Asking KVM for a CPU's state, and setting it.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_xsave};
use kvm_ioctls::VcpuFd;
use vmft_cpu::kvm_state::{KvmState, MSRS};
use vmm_sys_util::errno;

/// Asks KVM for the state of a stopped CPU.
///
/// Ordering requirements: the events come first, because KVM puts what an exception on its way says into CR2
/// and DR6 when it is asked for them.
pub(crate) fn read(vcpu: &VcpuFd, defences: &[u32]) -> Result<KvmState, errno::Error> {
    let events = vcpu.get_vcpu_events()?;
    let numbers = MSRS.iter().chain(defences);
    let entries: Vec<_> =
        numbers.map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).expect("fewer than KVM takes");
    if vcpu.get_msrs(&mut msrs)? != entries.len() {
        return Err(errno::Error::new(libc::EINVAL));
    }
    let (usual, defences) = msrs.as_slice().split_at(MSRS.len());
    let mut values = [0; MSRS.len()];
    for (value, entry) in values.iter_mut().zip(usual) {
        *value = entry.data;
    }
    Ok(KvmState {
        events,
        regs: vcpu.get_regs()?,
        sregs: vcpu.get_sregs()?,
        msrs: values,
        defences: defences.iter().map(|entry| (entry.index, entry.data)).collect(),
        xsave: vcpu.get_xsave()?.region,
        xcrs: vcpu.get_xcrs().ok().filter(|xcrs| xcrs.nr_xcrs > 0),
        debug: vcpu.get_debug_regs()?,
    })
}

/// Sets the state of a stopped CPU.
///
/// Ordering requirements: the special registers come first, because they decide the mode the
/// others are checked in; the events last, because setting registers drops pending exceptions
/// and the shadow.
pub(crate) fn write(state: &KvmState, vcpu: &VcpuFd) -> Result<(), errno::Error> {
    vcpu.set_sregs(&state.sregs)?;
    vcpu.set_regs(&state.regs)?;
    let entries: Vec<_> = MSRS
        .into_iter()
        .zip(state.msrs)
        .chain(state.defences.iter().copied())
        .map(|(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() })
        .collect();
    let msrs = Msrs::from_entries(&entries).expect("fewer than KVM takes");
    if vcpu.set_msrs(&msrs)? != entries.len() {
        return Err(errno::Error::new(libc::EINVAL));
    }
    let xsave = kvm_xsave { region: state.xsave, ..kvm_xsave::default() };
    // SAFETY: the guest's area is larger than this page only with features that a process has
    // to ask the host for, which this one never does.
    unsafe { vcpu.set_xsave(&xsave) }?;
    if let Some(xcrs) = &state.xcrs {
        vcpu.set_xcrs(xcrs)?;
    }
    vcpu.set_debug_regs(&state.debug)?;
    vcpu.set_vcpu_events(&state.events)
}
