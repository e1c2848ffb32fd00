//! Kicks: how other threads make a running vCPU come back.
//!
//! A kick sets a flag, sets `immediate_exit` in the page shared with KVM, and sends a signal to the
//! thread inside [`run`](vmft_cpu::Engine::run), in this order. The runner clears
//! `immediate_exit` first and looks at the flag afterwards. So a kick that comes before the guest is
//! entered finds it still in front of `KVM_RUN`, which then returns at once; one that comes later
//! interrupts it. None is lost, and what is left of a late signal is an `EINTR` without a flag,
//! which is ignored.

use super::error::KvmError;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;
use vmft_cpu::kick::{Kick, Kicker, PeriodicKicks};
use vmft_threads::{Mutex, MutexGuard};

/// Offset of `immediate_exit` in `struct kvm_run`.
const IMMEDIATE_EXIT: usize = std::mem::offset_of!(kvm_bindings::kvm_run, immediate_exit);
/// What of `struct kvm_run` is mapped here: the page with `immediate_exit`.
const MAPPED: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// How often a guest is interrupted that can be stopped between two exits, so that its timers fire while
/// it computes.
pub(crate) const PERIOD: Duration = Duration::from_millis(1);

/// The signal: the fourth of those no library claims.
pub(crate) fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

extern "C" fn ignore(_: libc::c_int) {}

/// Installs the handler, which does nothing: that it runs is enough to end `KVM_RUN`.
fn install_handler() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        // SAFETY: all zero is a valid value of this structure: no flags (so no SA_RESTART), an
        // empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the action is initialised, and its handler touches nothing.
        if unsafe { libc::sigaction(signal_number(), &action, std::ptr::null_mut()) } != 0 {
            result = Err(io::Error::last_os_error());
        }
    });
    result
}

/// A second mapping of the page the vCPU shares with KVM.
struct SharedPage(NonNull<libc::c_void>);

// SAFETY: the mapping belongs to the process, not to a thread, and only its one byte is accessed,
// atomically.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    fn map(vcpu: impl AsFd) -> io::Result<Self> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address the host chooses; nothing is replaced.
        let page = unsafe { mmap(None, MAPPED, protection, MapFlags::MAP_SHARED, vcpu, 0) };
        page.map(Self).map_err(io::Error::from)
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the mapping, which lives as long as `self`; a byte is always
        // aligned, and in this process it is accessed as an atomic only.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr().cast::<u8>().add(IMMEDIATE_EXIT)) }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody holds a reference into it any more.
        let unmapped = unsafe { munmap(self.0, MAPPED.get()) };
        debug_assert!(unmapped.is_ok(), "the mapping was there");
    }
}

impl fmt::Debug for SharedPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedPage")
    }
}

#[derive(Debug)]
struct Shared {
    wanted: AtomicBool,
    page: SharedPage,
    /// The thread inside `run`. The lock is held while it is signalled, so that the signal never
    /// reaches a thread that has left.
    runner: Mutex<Option<libc::pthread_t>>,
}

impl Shared {
    fn runner(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        self.runner.lock()
    }

    fn signal(&self, idle_too: bool) {
        let runner = self.runner();
        if runner.is_none() && !idle_too {
            return;
        }
        self.wanted.store(true, Ordering::SeqCst);
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        if let Some(thread) = *runner {
            // SAFETY: the thread is inside `run`, because the lock is held.
            let sent = unsafe { libc::pthread_kill(thread, signal_number()) };
            debug_assert_eq!(sent, 0, "the thread is there and the signal is valid");
        }
    }
}

impl Kick for Shared {
    fn kick(&self) {
        self.signal(true);
    }
}

/// The engine's side of the kicks.
#[derive(Debug)]
pub(crate) struct Kicks {
    shared: Arc<Shared>,
}

/// While this lives, kicks signal the thread that made it.
#[derive(Debug)]
pub(crate) struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        *self.0.runner() = None;
    }
}

impl Kicks {
    pub(crate) fn new(vcpu: impl AsFd) -> Result<Self, KvmError> {
        install_handler().map_err(KvmError::Kicks)?;
        let page = SharedPage::map(vcpu).map_err(KvmError::Kicks)?;
        let shared = Shared { wanted: AtomicBool::new(false), page, runner: Mutex::new(None) };
        Ok(Self { shared: Arc::new(shared) })
    }

    pub(crate) fn kicker(&self) -> Kicker {
        Kicker::of(Arc::<Shared>::clone(&self.shared))
    }

    /// Announces that this thread runs the vCPU.
    pub(crate) fn enter(&self) -> Running {
        // SAFETY: the call has no preconditions.
        *self.shared.runner() = Some(unsafe { libc::pthread_self() });
        Running(Arc::clone(&self.shared))
    }

    /// Takes a kick, if there was one.
    pub(crate) fn take(&self) -> bool {
        // First the byte, then the flag: see the module's text.
        self.shared.page.immediate_exit().store(0, Ordering::SeqCst);
        self.shared.wanted.swap(false, Ordering::SeqCst)
    }

    /// Makes `KVM_RUN` finish what is pending and return without entering the guest.
    pub(crate) fn set_immediate_exit(&self) {
        self.shared.page.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Kicks whoever runs, every [`PERIOD`], until the result is dropped.
    pub(crate) fn periodically(&self) -> Result<PeriodicKicks, KvmError> {
        let shared = Arc::clone(&self.shared);
        PeriodicKicks::begin(PERIOD, move || shared.signal(false)).map_err(KvmError::Kicks)
    }
}
