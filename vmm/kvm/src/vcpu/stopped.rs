//! What can be read and changed of a CPU that does not run.

use super::super::{host_cpu, state};
use super::{
    DEBUG_EXCEPTION, DR6_BREAKPOINTS, DR7_ALWAYS_SET, DR7_GLOBAL_0, Exited, KVM_INTERRUPT, Outcome,
    Rest, Stopped,
};
use kvm_bindings::{
    CpuId, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_STI, Msrs, kvm_debug_exit_arch, kvm_debugregs,
    kvm_guest_debug, kvm_interrupt, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events,
};
use vmft_cpu::group::CpuidLeaf;
use vmft_cpu::kvm_state::KvmState;
use vmft_cpu::msr;
use vmft_log::point::CodeAddress;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;

impl Stopped<'_> {
    /// Has KVM say anew what it says when it comes back, without entering the guest.
    pub(crate) fn refresh(&mut self) {
        self.0.kicks.set_immediate_exit();
        let exited = self.0.kvm_run();
        debug_assert_eq!(exited, Exited::Other(Outcome::Interrupted), "nothing was pending");
    }

    /// Queues an interrupt; it is delivered when the guest is entered.
    pub(crate) fn interrupt(&mut self, vector: u8) -> Result<(), errno::Error> {
        let interrupt = kvm_interrupt { irq: vector.into() };
        // SAFETY: the descriptor is a CPU's, and the structure is the one this request takes.
        let done = unsafe { ioctl_with_ref(&self.0.fd, KVM_INTERRUPT(), &interrupt) };
        if done == 0 { Ok(()) } else { Err(errno::Error::last()) }
    }

    /// Turns single-stepping on or off. KVM forgets it at many an instruction, so this comes
    /// before every entry of a step.
    pub(crate) fn set_stepping(&mut self, on: bool) -> Result<(), errno::Error> {
        let control = if on { KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP } else { 0 };
        self.0.fd.set_guest_debug(&kvm_guest_debug { control, ..kvm_guest_debug::default() })
    }

    /// Has the guest stop in front of the instruction at `address` each time, if there is one: DR0,
    /// enabled in DR7 for every task, for execution (SDM 3B, section 19.2.4). The guest's own debug
    /// registers are put aside meanwhile.
    pub(crate) fn set_breakpoint(
        &mut self,
        address: Option<CodeAddress>,
    ) -> Result<(), errno::Error> {
        let mut debug = kvm_guest_debug::default();
        if let Some(address) = address {
            debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[0] = address.get();
            debug.arch.debugreg[7] = DR7_ALWAYS_SET | DR7_GLOBAL_0;
        }
        self.0.fd.set_guest_debug(&debug)
    }

    /// What the last [`Outcome::Stepped`] was for.
    pub(crate) fn take_trap(&mut self) -> Option<kvm_debug_exit_arch> {
        self.0.trap.take()
    }

    pub(crate) fn debug_registers(&self) -> Result<kvm_debugregs, errno::Error> {
        self.0.fd.get_debug_regs()
    }

    /// Raises the debug exception that the guest has caused itself, and of which KVM told us instead:
    /// a single step of its own, say. `status` is what DR6 says of it.
    pub(crate) fn raise_debug_exception(&mut self, status: u64) -> Result<(), errno::Error> {
        let mut registers = self.debug_registers()?;
        registers.dr6 = (registers.dr6 & !DR6_BREAKPOINTS) | status;
        self.0.fd.set_debug_regs(&registers)?;
        let mut events = self.events()?;
        events.exception.injected = 1;
        events.exception.nr = DEBUG_EXCEPTION;
        events.exception.has_error_code = 0;
        self.set_events(&events)
    }

    pub(crate) fn regs(&self) -> Result<kvm_regs, errno::Error> {
        self.0.fd.get_regs()
    }

    pub(crate) fn sregs(&self) -> Result<kvm_sregs, errno::Error> {
        self.0.fd.get_sregs()
    }

    pub(crate) fn events(&self) -> Result<kvm_vcpu_events, errno::Error> {
        self.0.fd.get_vcpu_events()
    }

    pub(crate) fn set_events(&mut self, events: &kvm_vcpu_events) -> Result<(), errno::Error> {
        self.0.fd.set_vcpu_events(events)
    }

    /// Takes the interrupt shadow from KVM: true if there was one.
    pub(crate) fn take_shadow(&mut self) -> Result<bool, errno::Error> {
        let shadow = self.events()?.interrupt.shadow != 0;
        if shadow {
            self.put_shadow(false)?;
        }
        Ok(shadow)
    }

    /// Gives KVM an interrupt shadow, or none.
    pub(crate) fn put_shadow(&mut self, shadow: bool) -> Result<(), errno::Error> {
        let mut events = self.events()?;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        // Which of the two instructions made it does not matter: no interrupt at this boundary.
        events.interrupt.shadow = if shadow { KVM_X86_SHADOW_INT_STI as u8 } else { 0 };
        self.set_events(&events)
    }

    /// Has `CPUID` say this to a CPU that has never run. `defences`: registers that belong to its state
    /// where KVM has them.
    pub(crate) fn offer(
        &mut self,
        table: Vec<CpuidLeaf>,
        defences: &[u32],
    ) -> Result<(), errno::Error> {
        self.show(&table)?;
        if !defences.is_empty() && host_cpu::is_intels(&table) {
            // What every CPU of Intel's starts with; without it a kernel makes no use of fast string instructions.
            const FAST_STRINGS: u64 = 1;
            if let Ok(found) = self.msr(msr::MISC_ENABLE) {
                let _ = self.set_msr(msr::MISC_ENABLE, found | FAST_STRINGS);
            }
        }
        let is_there = |number: &u32| self.msr(*number).is_ok();
        self.0.defences = defences.iter().copied().filter(is_there).collect();
        self.0.offered = table;
        Ok(())
    }

    /// What `CPUID` can say to the guest on this host.
    pub(crate) fn offered(&self) -> &[CpuidLeaf] {
        &self.0.offered
    }

    /// What it says.
    pub(crate) fn shown(&self) -> &[CpuidLeaf] {
        &self.0.shown
    }

    /// Has it say something else, which KVM does not allow once the CPU has run.
    pub(crate) fn show(&mut self, table: &[CpuidLeaf]) -> Result<(), errno::Error> {
        if self.0.shown != table {
            let entries = CpuId::from_entries(&host_cpu::entries(table))
                .map_err(|_| errno::Error::new(libc::E2BIG))?;
            self.0.fd.set_cpuid2(&entries)?;
            self.0.shown = table.to_vec();
        }
        Ok(())
    }

    fn msr(&self, index: u32) -> Result<u64, errno::Error> {
        let entry = kvm_msr_entry { index, ..kvm_msr_entry::default() };
        let mut msrs = Msrs::from_entries(&[entry]).expect("fewer than KVM takes");
        match self.0.fd.get_msrs(&mut msrs)? {
            1 => Ok(msrs.as_slice()[0].data),
            _ => Err(errno::Error::new(libc::EINVAL)),
        }
    }

    fn set_msr(&mut self, index: u32, data: u64) -> Result<(), errno::Error> {
        let entry = kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
        let msrs = Msrs::from_entries(&[entry]).expect("fewer than KVM takes");
        match self.0.fd.set_msrs(&msrs)? {
            1 => Ok(()),
            _ => Err(errno::Error::new(libc::EINVAL)),
        }
    }

    /// `IA32_TSC`, the counter that `RDTSC` reads.
    pub(crate) fn time_stamp(&self) -> Result<u64, errno::Error> {
        self.msr(msr::TSC)
    }

    /// Sets it, for a CPU whose counter was set by [`Self::begin_time_stamp`] or that is to run like one
    /// whose was: KVM takes what is within a second of a counter's value for an attempt to have
    /// counters run alike, and then has them do that exactly.
    pub(crate) fn set_time_stamp(&mut self, data: u64) -> Result<(), errno::Error> {
        self.set_msr(msr::TSC, data)
    }

    /// Sets it to what it never was near, so that the value is taken as it is. If it were near to the
    /// last that was set, the counter would go on from that one, and might go back for its guest.
    pub(crate) fn begin_time_stamp(&mut self, data: u64) -> Result<(), errno::Error> {
        const FAR: u64 = 1 << 62;
        self.set_time_stamp(data ^ FAR)?;
        self.set_time_stamp(data)
    }

    pub(crate) fn state(&self) -> Result<KvmState, errno::Error> {
        state::read(&self.0.fd, &self.0.defences)
    }

    pub(crate) fn mp_state(&self) -> Result<u32, errno::Error> {
        self.0.fd.get_mp_state().map(|state| state.mp_state)
    }

    pub(crate) fn set_mp_state(&mut self, mp_state: u32) -> Result<(), errno::Error> {
        self.0.fd.set_mp_state(kvm_mp_state { mp_state })
    }

    pub(crate) fn lapic(&self) -> Result<kvm_lapic_state, errno::Error> {
        self.0.fd.get_lapic()
    }

    pub(crate) fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<(), errno::Error> {
        self.0.fd.set_lapic(lapic)
    }

    pub(crate) fn set_state(&mut self, state: &KvmState) -> Result<(), errno::Error> {
        state::write(state, &self.0.fd)?;
        self.0.rest = Rest::Done;
        // KVM loads CR8 from here at every entry, as there is no interrupt controller of its own.
        self.0.fd.get_kvm_run().cr8 = state.cr8();
        Ok(())
    }
}
