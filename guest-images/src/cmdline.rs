//! The kernel command line of the default guest.

use crate::workload::Workload;

/// What Debian's cloud kernel is started with on this board, which has no firmware but ACPI's tables, no
/// I/O APIC, and with one CPU no local APIC either. Every parameter is here for a reason:
///
/// | parameter | reason |
/// |---|---|
/// | `console=ttyS0` | the console is the serial port |
/// | `noapic` | there is no I/O APIC: without that word a kernel that has several CPUs takes it that interrupts come from one, and waits for its timer for ever; with one CPU it changes nothing |
/// | `pci=conf1` | configuration ports are the only access to PCI; nothing else is probed |
/// | `reboot=k` | reset is the keyboard controller's; other ways are tried for seconds |
/// | `panic=-1` | a panic resets at once, so that whoever watches the machine sees it end |
/// | `mitigations=off` | an interpreter has no speculation to defend against, but would pay for separate page tables at every system call |
/// | `cryptomgr.notests` | self-tests of the kernel's ciphers: 870 of the 1,270 million instructions to init |
/// | `tsc=reliable` | there is no second clock to compare with, and none is needed |
/// | `tsc_early_khz=1000000` | the counter ticks in nanoseconds of guest time; measuring it against the timer can fail when guest time is corrected meanwhile, and then the kernel does without it |
/// | `nowatchdog` | the machine may rightly stand still while a side waits for its peer |
/// | `rcupdate.rcu_cpu_stall_suppress=1` | likewise |
pub const DEFAULT: &str = "console=ttyS0 noapic pci=conf1 reboot=k panic=-1 \
    mitigations=off cryptomgr.notests tsc=reliable tsc_early_khz=1000000 \
    nowatchdog rcupdate.rcu_cpu_stall_suppress=1";

/// What the lockstep kernel is started with: what [`DEFAULT`] says of the board, and nothing of what it
/// was built without (ACPI, the time stamp counter, watchdogs).
pub const LOCKSTEP: &str = "console=ttyS0 pci=conf1 reboot=k panic=-1";

/// `own`, for a guest that runs freely on its host's CPU and knows that: it defends itself.
pub fn for_the_hosts_cpu(own: &str) -> String {
    own.replace("mitigations=off ", "")
}

/// [`DEFAULT`], and the words that make the guest's init run `workload`.
pub fn with_workload(workload: Workload) -> String {
    format!("{DEFAULT} {}", workload.cmdline())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Bench;

    /// `COMMAND_LINE_SIZE` of x86 less the final zero.
    const KERNEL_LIMIT: usize = 2047;

    #[test]
    fn a_guest_on_its_hosts_cpu_keeps_its_defences() {
        let words = for_the_hosts_cpu(DEFAULT);
        assert!(!words.contains("mitigations"), "{words}");
        assert_eq!(words.split(' ').count() + 1, DEFAULT.split(' ').count());
    }

    #[test]
    fn the_longest_command_line_fits_and_has_single_spaces() {
        let bench = Workload::Bench { bench: Bench::Compute, count: u32::MAX };
        let demo = Workload::Demo { lines: u32::MAX, pause_ms: u32::MAX };
        for workload in [bench, demo, Workload::Idle, Workload::Shell] {
            let cmdline = with_workload(workload);
            assert!(cmdline.len() < KERNEL_LIMIT);
            assert!(cmdline.split(' ').all(|word| !word.is_empty()), "{cmdline}");
        }
    }
}
