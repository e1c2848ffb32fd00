//! The system calls that a thread may make, by what it does. Lists of what is allowed, so that what nobody
//! thought of is refused.
//!
//! The lists were taken from `strace` of sides under every engine, mode and kind of connection, and from
//! what glibc and tokio call for the same purposes with other versions.

use crate::Task;
use libc::c_long;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use std::collections::BTreeMap;

/// One argument's condition: its number, the bits looked at, and what they must be.
type Bits = (u8, u64, u64);

/// What threads of any task need: memory, locks, time, the end, and the files that are open.
const BASE: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    // Answered by `without_clone3`; glibc then takes `clone`, whose flags can be looked at.
    libc::SYS_clone3,
    libc::SYS_dup,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getcpu,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Looking at files.
const LOOK: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fstatfs,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_statfs,
    libc::SYS_statx,
];

/// Writing to files that are open, at places.
const PLACED_WRITES: &[c_long] = &[
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sync_file_range,
];

/// Making, opening, naming and removing files.
const FILES: &[c_long] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fchmod,
    libc::SYS_flock,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_syncfs,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// Sockets that are open.
const SOCKET_IO: &[c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// New sockets.
const SOCKETS: &[c_long] =
    &[libc::SYS_bind, libc::SYS_connect, libc::SYS_listen, libc::SYS_socket, libc::SYS_socketpair];

/// Waiting for many things at once.
const EVENTS: &[c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

/// Where and when the host runs a thread, and what of its memory stays.
const SCHEDULING: &[c_long] = &[
    libc::SYS_mbind,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_msync,
    libc::SYS_munlock,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setscheduler,
    libc::SYS_setpriority,
];

/// A side's start, until its main thread runs the guest: this sandbox itself, and the doctor's probes.
const START: &[c_long] = &[
    libc::SYS_arch_prctl,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_getegid,
    libc::SYS_getgid,
    libc::SYS_getrusage,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_seccomp,
    libc::SYS_signalfd4,
    libc::SYS_sysinfo,
    libc::SYS_timer_create,
    libc::SYS_timer_delete,
    libc::SYS_timer_settime,
    libc::SYS_umask,
    libc::SYS_uname,
];

/// Bits of a request to `ioctl` that say whose it is, and one bit of its number.
const IOCTL_KIND: u64 = 0xFF80;
/// The requests of KVM, of performance counters, of block devices, and of TAP devices.
const KVM: &[Bits] = &[(1, 0xFF00, 0xAE00)];
const COUNTERS: &[Bits] = &[(1, 0xFF00, 0x2400)];
const BLOCK: &[Bits] = &[(1, 0xFF00, 0x1200)];
const TAP: &[Bits] = &[(1, IOCTL_KIND, 0x5480)];
/// Those of terminals that set and tell modes. TIOCSTI, which types, is none of them.
const TERMINAL: [u64; 6] =
    [libc::TCGETS, libc::TCSETS, libc::TCSETSW, libc::TCSETSF, libc::TIOCGWINSZ, libc::TIOCGPGRP];
/// Those that make a file wait or not.
const WAITING: [u64; 3] = [libc::FIONBIO, libc::FIOCLEX, libc::FIONREAD];
/// What an interface is: its number, its flags.
const INTERFACES: [u64; 2] = [libc::SIOCGIFFLAGS, libc::SIOCGIFINDEX];

/// Flags of `openat` that do more than read.
const OPENS_TO_WRITE: u64 =
    (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND) as u64;
/// Flags of `clone` that matter: a thread and nothing else.
const CLONE_KIND: u64 = (libc::CLONE_THREAD
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;
const WRITE: u64 = libc::PROT_WRITE as u64;
const EXECUTE: u64 = libc::PROT_EXEC as u64;
/// `prctl`'s word for naming memory, which glibc does.
const PR_SET_VMA: u64 = 0x5356_4D41;
const NAMES: [u64; 3] = [libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64, PR_SET_VMA];
/// Families of sockets: those of hosts, of this host, and the one by which glibc asks for addresses.
const FAMILIES: [u64; 4] =
    [libc::AF_UNIX as u64, libc::AF_INET as u64, libc::AF_INET6 as u64, libc::AF_NETLINK as u64];

/// A list in the making.
#[derive(Default)]
struct List(BTreeMap<i64, Vec<SeccompRule>>);

impl List {
    fn allow(&mut self, calls: &[c_long]) {
        for call in calls {
            // No rule: whatever the arguments are.
            self.0.insert(*call, Vec::new());
        }
    }

    /// Allows a call with arguments like these; several times: with either.
    fn allow_with(&mut self, call: c_long, bits: &[Bits]) -> Result<(), BackendError> {
        let condition = |&(number, mask, value): &Bits| {
            // The kernel looks at 32 bits of a request, of protections and of flags, whatever is above.
            let length = if mask > u64::from(u32::MAX) { Qword } else { Dword };
            SeccompCondition::new(number, length, MaskedEq(mask), value)
        };
        let conditions = bits.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
        self.add(call, conditions)
    }

    fn allow_values(
        &mut self,
        call: c_long,
        number: u8,
        values: &[u64],
    ) -> Result<(), BackendError> {
        values.iter().try_for_each(|value| {
            let condition = SeccompCondition::new(number, Dword, Eq, *value)?;
            self.add(call, vec![condition])
        })
    }

    fn add(&mut self, call: c_long, conditions: Vec<SeccompCondition>) -> Result<(), BackendError> {
        let rule = SeccompRule::new(conditions)?;
        let rules = self.0.entry(call).or_default();
        rules.push(rule);
        Ok(())
    }

    fn base(&mut self) -> Result<(), BackendError> {
        self.allow(BASE);
        // Memory is written or executed, never both.
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            self.allow_with(call, &[(2, WRITE, 0)])?;
            self.allow_with(call, &[(2, EXECUTE, 0)])?;
        }
        self.allow_with(libc::SYS_openat, &[(2, OPENS_TO_WRITE, 0)])?;
        let thread = libc::CLONE_THREAD as u64;
        self.allow_with(libc::SYS_clone, &[(0, CLONE_KIND, thread)])?;
        self.allow_values(libc::SYS_prctl, 0, &NAMES)?;
        // Signals to this process alone: kicks, and its own abort.
        self.allow_values(libc::SYS_tgkill, 0, &[u64::from(std::process::id())])
    }

    fn sockets(&mut self) -> Result<(), BackendError> {
        self.allow(SOCKETS);
        self.0.remove(&libc::SYS_socket);
        self.allow_values(libc::SYS_socket, 0, &FAMILIES)
    }

    fn files(&mut self) {
        self.allow(LOOK);
        self.allow(PLACED_WRITES);
        self.allow(FILES);
    }

    fn kvm(&mut self) -> Result<(), BackendError> {
        self.allow_with(libc::SYS_ioctl, KVM)?;
        self.allow_with(libc::SYS_ioctl, COUNTERS)?;
        self.allow(&[libc::SYS_perf_event_open]);
        self.allow(SCHEDULING);
        Ok(())
    }

    fn link(&mut self) -> Result<(), BackendError> {
        self.allow_with(libc::SYS_ioctl, TAP)?;
        self.allow_values(libc::SYS_ioctl, 1, &INTERFACES)?;
        self.allow_values(libc::SYS_ioctl, 1, &WAITING)
    }

    fn guest(&mut self) -> Result<(), BackendError> {
        self.files();
        self.allow(SOCKET_IO);
        self.allow(EVENTS);
        self.allow_values(libc::SYS_ioctl, 1, &TERMINAL)?;
        self.allow_values(libc::SYS_ioctl, 1, &WAITING)?;
        self.kvm()
    }

    fn channel(&mut self) -> Result<(), BackendError> {
        self.files();
        self.sockets()?;
        self.allow(SOCKET_IO);
        self.allow(EVENTS);
        self.allow(&[libc::SYS_uname]);
        self.allow_values(libc::SYS_ioctl, 1, &WAITING)?;
        // A backup that joins tries whether its engine can take the guest.
        self.kvm()
    }

    fn of(task: Task) -> Result<Self, BackendError> {
        let mut list = Self::default();
        list.base()?;
        match task {
            Task::Guest => list.guest()?,
            Task::Cpu => list.kvm()?,
            Task::Disk => {
                list.allow(LOOK);
                list.allow(PLACED_WRITES);
                list.allow_with(libc::SYS_ioctl, BLOCK)?;
            }
            Task::Network => {
                list.allow(LOOK);
                list.allow(SOCKET_IO);
            }
            Task::Link => {
                list.allow(&[libc::SYS_openat]);
                list.sockets()?;
                list.allow(SOCKET_IO);
                list.link()?;
            }
            Task::Console => {
                list.allow(LOOK);
                list.allow(PLACED_WRITES);
                list.allow(SOCKET_IO);
            }
            Task::Channel => list.channel()?,
            Task::Arbiter => {
                list.files();
                // What it decides lets outputs go.
                list.allow(SOCKET_IO);
            }
            Task::Outside => list.files(),
            Task::Api => {
                list.allow(LOOK);
                list.allow(SOCKET_IO);
                list.allow(EVENTS);
                list.allow_values(libc::SYS_ioctl, 1, &WAITING)?;
            }
            Task::Worker | Task::Messages => {}
        }
        Ok(list)
    }

    /// What every thread of a side may do at most: all tasks, and the start.
    fn of_all() -> Result<Self, BackendError> {
        let mut list = Self::default();
        list.base()?;
        list.guest()?;
        list.channel()?;
        list.allow(START);
        list.allow_with(libc::SYS_ioctl, BLOCK)?;
        list.link()?;
        Ok(list)
    }

    fn compile(self) -> Result<BpfProgram, BackendError> {
        let (refused, allowed) = (SeccompAction::KillProcess, SeccompAction::Allow);
        SeccompFilter::new(self.0, refused, allowed, TargetArch::x86_64)?.try_into()
    }
}

/// The filter of a thread with this task.
pub(crate) fn of_task(task: Task) -> Result<BpfProgram, BackendError> {
    List::of(task)?.compile()
}

/// The filter of the whole process.
pub(crate) fn of_process() -> Result<BpfProgram, BackendError> {
    List::of_all()?.compile()
}

/// Answers `clone3` as a kernel that has none: its flags are in memory, where a filter cannot look.
pub(crate) fn without_clone3() -> Result<BpfProgram, BackendError> {
    let calls = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let none = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(calls, SeccompAction::Allow, none, TargetArch::x86_64)?.try_into()
}
