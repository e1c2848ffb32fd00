//! A hardware counter through `perf_event_open`: guest only, pinned, on the thread that opens it.

use super::facts::BranchCounter;
pub use crate::trust::watchdog::this_thread;
use perf_event_open_sys as sys;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use sys::bindings::{PERF_FORMAT_TOTAL_TIME_ENABLED, PERF_FORMAT_TOTAL_TIME_RUNNING};

/// A period that is never reached.
const NEVER: u64 = 1 << 60;

/// `fcntl` commands of `linux/fcntl.h` that the libc crate does not have for every target.
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

/// `struct f_owner_ex`.
#[repr(C)]
struct Owner {
    kind: libc::c_int,
    pid: libc::pid_t,
}

/// What a counter says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Events since the last reset.
    pub count: u64,
    /// Whether it has been on the CPU whenever it was enabled.
    pub always_ran: bool,
}

/// One counter.
#[derive(Debug)]
pub struct Counter {
    file: File,
}

impl Counter {
    /// A counter that only counts.
    ///
    /// # Errors
    /// What `perf_event_open` answers.
    pub fn clock(event: BranchCounter) -> io::Result<Self> {
        Self::open(event, None)
    }

    /// A counter that sends `signal` to this thread when armed; disabled until then.
    ///
    /// # Errors
    /// What `perf_event_open` and `fcntl` answer.
    pub fn timer(event: BranchCounter, signal: libc::c_int) -> io::Result<Self> {
        let timer = Self::open(event, Some(NEVER))?;
        timer.signal_this_thread(signal)?;
        Ok(timer)
    }

    fn open(event: BranchCounter, period: Option<u64>) -> io::Result<Self> {
        let mut attributes = sys::bindings::perf_event_attr::default();
        attributes.type_ = event.kind;
        attributes.config = event.raw;
        attributes.size = size_of::<sys::bindings::perf_event_attr>() as u32;
        attributes.read_format =
            u64::from(PERF_FORMAT_TOTAL_TIME_ENABLED) | u64::from(PERF_FORMAT_TOTAL_TIME_RUNNING);
        attributes.set_exclude_host(1);
        attributes.set_exclude_hv(1);
        attributes.set_pinned(1);
        if let Some(period) = period {
            attributes.sample_period = period;
            attributes.wakeup_events = 1;
            attributes.set_disabled(1);
        }
        let flags = u64::from(sys::bindings::PERF_FLAG_FD_CLOEXEC);
        // SAFETY: the attributes are a whole, initialised structure of the size it names; a
        // guest-only counter of this thread touches no memory.
        let fd = unsafe { sys::perf_event_open(&mut attributes, 0, -1, -1, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self { file: unsafe { File::from_raw_fd(fd) } })
    }

    fn signal_this_thread(&self, signal: libc::c_int) -> io::Result<()> {
        let fd = self.file.as_raw_fd();
        let owner = Owner { kind: F_OWNER_TID, pid: this_thread() };
        // SAFETY: F_SETOWN_EX reads one `struct f_owner_ex`, which `owner` is; the others take numbers.
        let failed = unsafe {
            libc::fcntl(fd, F_SETOWN_EX, &raw const owner) < 0
                || libc::fcntl(fd, F_SETSIG, signal) < 0
                || libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK) < 0
        };
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The count.
    ///
    /// # Errors
    /// The counter is not on the CPU: somebody else has it.
    pub fn read(&mut self) -> io::Result<Reading> {
        let mut bytes = [0; 24];
        let size = self.file.read(&mut bytes)?;
        if size != bytes.len() {
            return Err(io::Error::other("the counter is taken by somebody else"));
        }
        let mut words = [0; 3];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("chunks of 8"));
        }
        let [count, enabled, running] = words;
        Ok(Reading { count, always_ran: enabled == running })
    }

    /// Sets the count to zero.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn reset(&self) -> io::Result<()> {
        // SAFETY: RESET takes a number.
        done(unsafe { sys::ioctls::RESET(self.file.as_raw_fd(), 0) })
    }

    /// Signals after every `period` events from now on.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn arm_repeatedly(&self, period: u64) -> io::Result<()> {
        self.set_period(period)?;
        // SAFETY: ENABLE takes a number.
        done(unsafe { sys::ioctls::ENABLE(self.file.as_raw_fd(), 0) })
    }

    /// Signals once, after `period` events.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn arm_once(&self, period: u64) -> io::Result<()> {
        self.reset()?;
        self.set_period(period)?;
        // SAFETY: REFRESH takes a number.
        done(unsafe { sys::ioctls::REFRESH(self.file.as_raw_fd(), 1) })
    }

    /// Signals no more.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn disarm(&self) -> io::Result<()> {
        // SAFETY: DISABLE takes a number.
        done(unsafe { sys::ioctls::DISABLE(self.file.as_raw_fd(), 0) })
    }

    fn set_period(&self, period: u64) -> io::Result<()> {
        let pointer = &raw const period;
        // SAFETY: despite the wrapper's type the kernel wants a pointer to the period, which
        // lives until the call is over.
        done(unsafe { sys::ioctls::PERIOD(self.file.as_raw_fd(), pointer as u64) })
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Why a counter could not be opened, for people.
pub fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP) => {
            format!("the host has no performance counter for it ({error})")
        }
        Some(libc::EACCES | libc::EPERM) => format!(
            "this user may not count in guests ({error}); \
             `sysctl kernel.perf_event_paranoid=1` or CAP_PERFMON allows it"
        ),
        Some(libc::EBUSY) => format!("every performance counter is taken ({error})"),
        _ => error.to_string(),
    }
}
