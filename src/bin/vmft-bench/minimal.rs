//! The least a program must do to run a guest that makes port exits: what the engine is measured
//! against.

use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::time::{ClockId, clock_gettime};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vmft_cpu::memory::{GuestRam, MIN_MEMORY};

/// Where the guest's code is, here and in [`super::kvm`].
pub const CODE: u64 = 0x10_0000;
/// `out 0x80, al; jmp` back to it, for ever.
pub const EXITS: [u8; 4] = [0xE6, 0x80, 0xEB, 0xFC];
const TABLES: u64 = 0x1000;

/// CPU time of this thread, KVM's work for it included: what others do on a busy host is not counted,
/// and nothing here waits.
pub fn cpu_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// A guest that does nothing but exit.
pub struct Minimal {
    vcpu: VcpuFd,
    // Closed after the CPU, and its memory after both.
    _vm: VmFd,
    _ram: GuestRam,
}

impl Minimal {
    /// Makes it, in 64-bit mode at privilege level 0, as the engine's guests are.
    pub fn new() -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let vm = kvm.create_vm()?;
        let ram = GuestRam::new(MIN_MEMORY)?;
        let memory = ram.memory();
        // One entry a level; the last is a page of two megabytes.
        memory.write_obj((TABLES + 0x1000) | 3, GuestAddress(TABLES))?;
        memory.write_obj((TABLES + 0x2000) | 3, GuestAddress(TABLES + 0x1000))?;
        memory.write_obj(0x83u64, GuestAddress(TABLES + 0x2000))?;
        memory.write_slice(&EXITS, GuestAddress(CODE))?;
        let host = ram.host_ranges();
        let [range] = host.as_slice() else { bail!("the smallest memory is one range") };
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MIN_MEMORY,
            userspace_addr: range.start as u64,
        };
        // SAFETY: the range is a mapping of `ram`, which is kept for as long as the machine.
        unsafe { vm.set_user_memory_region(region) }?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        let mut sregs = vcpu.get_sregs()?;
        sregs.cr0 = 0x8005_0033;
        sregs.cr3 = TABLES;
        sregs.cr4 = 0x20;
        sregs.efer = 0x500;
        let data = kvm_segment {
            limit: u32::MAX,
            selector: 16,
            type_: 3,
            present: 1,
            s: 1,
            g: 1,
            db: 1,
            ..kvm_segment::default()
        };
        sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, db: 0, ..data };
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *segment = data;
        }
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        (regs.rip, regs.rflags) = (CODE, 2);
        vcpu.set_regs(&regs)?;
        Ok(Self { vcpu, _vm: vm, _ram: ram })
    }

    /// CPU time of so many exits.
    pub fn run(&mut self, exits: u64) -> Result<Duration> {
        let started = cpu_time()?;
        for _ in 0..exits {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(0x80, _)) => {}
                Ok(other) => bail!("the guest stopped for {other:?}"),
                Err(error) => return Err(error).context("KVM_RUN"),
            }
        }
        Ok(cpu_time()? - started)
    }
}
