//! Making the virtual machine: capabilities, memory, the CPU model, which registers KVM answers.
//!
//! With one CPU, nothing that would act by itself is asked for: no interrupt controller, timer or clock of
//! the kernel's. Several CPUs have the kernel's local APICs, and nothing else of it.

use super::error::KvmError;
use super::host_cpu;
use super::kick::Kicks;
use super::vcpu::Vcpu;
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN, KVM_SYNC_X86_REGS, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_memory::GuestAddress;
use vmft_cpu::CpuCount;
use vmft_cpu::memory::GuestRam;
use vmft_cpu::msr;
use vmm_sys_util::errno;

/// The only version of the interface there is.
const API_VERSION: i32 = 12;
/// Three pages KVM on Intel CPUs may need for itself, in the device hole, where no device is.
const TSS_ADDRESS: usize = 0xFFFB_D000;

/// What the engine cannot do without.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG"),
    (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
];

/// What several CPUs need beyond that.
const NEEDED_BY_SEVERAL: [(Cap, &str); 2] =
    [(Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"), (Cap::MpState, "KVM_CAP_MP_STATE")];

/// The bitmap of a run of registers that are all allowed: so many as the longest has, in whole words of the host, which is
/// what the kernel copies of it.
const ALLOWED: [u8; size_of::<libc::c_ulong>()] = [0xFF; _];

/// Registers that KVM itself must own, as runs of consecutive numbers: the first, and how many.
/// Every other is denied to the guest and answered by the engine.
const OWNED_BY_KVM: [(u32, u32); 4] = [
    (msr::SYSENTER_CS, 3),
    (msr::PAT, 1),
    // EFER, STAR, LSTAR, CSTAR, SFMASK.
    (msr::EFER, 5),
    // The bases of FS and GS, and the other one of GS.
    (msr::FS_BASE, 3),
];

/// The same beside a local APIC of KVM's: where that is.
const OWNED_WITH_APIC: [(u32, u32); 1] = [(msr::APIC_BASE, 1)];

const _: () = {
    let mut at = 0;
    while at < OWNED_BY_KVM.len() {
        assert!(OWNED_BY_KVM[at].1 as usize <= 8 * ALLOWED.len(), "a bitmap of one word");
        at += 1;
    }
};

/// True for a register of which the engine does not hear.
pub(crate) fn is_owned_by_kvm(register: u32) -> bool {
    OWNED_BY_KVM.iter().any(|(first, count)| (*first..first + count).contains(&register))
}

/// Which CPU the guest sees.
#[derive(Debug)]
enum Shown {
    /// The model that all engines share.
    Model,
    /// The host's, as far as [`host_cpu`] goes, of which its KVM can show this.
    Host(Vec<kvm_cpuid_entry2>),
}

impl Shown {
    fn host(kvm: &Kvm) -> Result<Self, KvmError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::refused("say what its CPU has"))?;
        Ok(Self::Host(supported.as_slice().to_vec()))
    }
}

/// A virtual machine.
#[derive(Debug)]
pub(crate) struct Vm {
    fd: VmFd,
    /// Keeps the memory in its slots mapped.
    ram: GuestRam,
}

impl Vm {
    /// A machine of one CPU, of the model that all engines share, that runs in `ram`.
    pub(crate) fn open(ram: GuestRam) -> Result<(Self, Vcpu), KvmError> {
        let kvm = open_device()?;
        let vm = Self::create(&kvm, ram)?;
        vm.set_up_msrs(&[])?;
        let vcpu = vm.open_cpu(&kvm, 0, CpuCount::ONE, &Shown::Model)?;
        Ok((vm, vcpu))
    }

    /// A machine of one CPU of the host's, that runs freely in `ram`.
    pub(crate) fn open_free(ram: GuestRam) -> Result<(Self, Vcpu), KvmError> {
        let kvm = open_device()?;
        let vm = Self::create(&kvm, ram)?;
        vm.set_up_msrs(&[&host_cpu::OWNED_FOR_DEFENCE])?;
        let vcpu = vm.open_cpu(&kvm, 0, CpuCount::ONE, &Shown::host(&kvm)?)?;
        Ok((vm, vcpu))
    }

    /// A machine of several CPUs of the host's with local APICs, that run freely in `ram`.
    pub(crate) fn open_several(
        ram: GuestRam,
        cpus: CpuCount,
    ) -> Result<(Self, Vec<Vcpu>), KvmError> {
        let kvm = open_device()?;
        for (capability, name) in NEEDED_BY_SEVERAL {
            if !kvm.check_extension(capability) {
                return Err(KvmError::Capability { capability: name });
            }
        }
        let vm = Self::create(&kvm, ram)?;
        // No pins are reserved for an I/O APIC, which the board does not have.
        let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..kvm_enable_cap::default() };
        vm.fd.enable_cap(&split).map_err(KvmError::refused("keep local APICs"))?;
        vm.set_up_msrs(&[&OWNED_WITH_APIC, &host_cpu::OWNED_FOR_DEFENCE])?;
        let shown = Shown::host(&kvm)?;
        let open = |number| vm.open_cpu(&kvm, number, cpus, &shown);
        let vcpus = cpus.numbers().map(open).collect::<Result<_, _>>()?;
        Ok((vm, vcpus))
    }

    /// A machine without CPUs.
    fn create(kvm: &Kvm, ram: GuestRam) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(KvmError::refused("create a virtual machine"))?;
        let vm = Self { fd, ram };
        vm.set_up_memory()?;
        // Only Intel CPUs have it.
        if kvm.check_extension(Cap::SetTssAddr) {
            vm.fd
                .set_tss_address(TSS_ADDRESS)
                .map_err(KvmError::refused("set aside memory for itself"))?;
        }
        Ok(vm)
    }

    fn open_cpu(
        &self,
        kvm: &Kvm,
        number: u8,
        cpus: CpuCount,
        shown: &Shown,
    ) -> Result<Vcpu, KvmError> {
        let vcpu = self.fd.create_vcpu(number.into()).map_err(KvmError::refused("create a CPU"))?;
        // SAFETY: the descriptor is open, and outlives this borrow of it.
        let descriptor = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let kicks = Kicks::new(descriptor)?;
        let shared = kvm.check_extension_int(Cap::SyncRegs);
        let shares_registers = shared > 0 && shared as u32 & KVM_SYNC_X86_REGS != 0;
        let mut vcpu = Vcpu::new(vcpu, kicks, shares_registers);
        let apic = cpus.is_several().then_some(number);
        let mut stopped = vcpu.stop();
        match shown {
            Shown::Model => stopped.offer(host_cpu::model(apic), &[]),
            Shown::Host(supported) => {
                stopped.offer(host_cpu::table(supported, apic), &host_cpu::DEFENCES)
            }
        }
        .map_err(KvmError::refused("show the CPU model"))?;
        Ok(vcpu)
    }

    /// The guest's memory.
    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The slots: number, first address, bytes, and where they are in this process.
    fn slots(&self) -> impl Iterator<Item = (u32, u64, u64, u64)> {
        let places = self.ram.ranges().into_iter().zip(self.ram.host_ranges());
        (0..)
            .zip(places)
            .map(|(slot, ((GuestAddress(start), len), host))| (slot, start, len, host.start as u64))
    }

    fn set_up_memory(&self) -> Result<(), KvmError> {
        for (slot, guest_phys_addr, memory_size, userspace_addr) in self.slots() {
            let region = kvm_userspace_memory_region {
                slot,
                flags: KVM_MEM_LOG_DIRTY_PAGES,
                guest_phys_addr,
                memory_size,
                userspace_addr,
            };
            // SAFETY: the range is a mapping of `ram`, which this value keeps for as long as the
            // machine lives; the guest's writes to it are what it is for, and this process reads
            // it only through `vm-memory`'s volatile accesses.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(KvmError::refused("take guest memory"))?;
        }
        Ok(())
    }

    /// `more`: registers that are KVM's beside the usual ones.
    fn set_up_msrs(&self, more: &[&[(u32, u32)]]) -> Result<(), KvmError> {
        let reasons =
            KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;
        let capability = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            args: [reasons.into(), 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        self.fd
            .enable_cap(&capability)
            .map_err(KvmError::refused("hand out accesses to model-specific registers"))?;
        let range = |(base, msr_count): &(u32, u32)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: *base,
            msr_count: *msr_count,
            bitmap: &ALLOWED,
        };
        let ranges: Vec<_> =
            OWNED_BY_KVM.iter().chain(more.iter().copied().flatten()).map(range).collect();
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
            .map_err(KvmError::refused("filter model-specific registers"))
    }

    /// Records the pages written since the last call in the memory's write tracker.
    pub(crate) fn collect_written(&self) -> Result<(), errno::Error> {
        use vmft_cpu::memory::{PAGE_SIZE, PageNumber};
        for (slot, start, len, _) in self.slots() {
            let bytes = usize::try_from(len).expect("memory that is mapped has a size");
            let log = self.fd.get_dirty_log(slot, bytes)?;
            for (index, word) in (0u64..).zip(log) {
                let mut bits = word;
                while bits != 0 {
                    let page = start / PAGE_SIZE + index * 64 + u64::from(bits.trailing_zeros());
                    self.ram.tracker().mark_page(PageNumber(page));
                    bits &= bits - 1;
                }
            }
        }
        Ok(())
    }
}

fn open_device() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        _ => KvmError::Open(error),
    })?;
    let found = kvm.get_api_version();
    if found != API_VERSION {
        return Err(KvmError::Version { found });
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(capability) {
            return Err(KvmError::Capability { capability: name });
        }
    }
    Ok(kvm)
}
