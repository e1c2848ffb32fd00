//! Brings a probe guest back that does not come back by itself.
//!
//! A thread waits for the time a probe may take; when that is over it sends the probe's thread
//! a signal, again and again until the probe has noticed, so that a signal which comes just
//! before the guest is entered is not the only one.

use super::clock;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// Interrupts `KVM_RUN`. Its handler does nothing, and nothing else in this program uses it.
pub const KICK: Signal = Signal::SIGURG;
/// How often a late probe is kicked.
const AGAIN: Duration = Duration::from_millis(2);

#[derive(Debug, Default)]
struct Watch {
    /// The thread to kick, and since when.
    armed: Option<(libc::pid_t, Instant)>,
    expired: bool,
    quit: bool,
}

#[derive(Debug, Default)]
struct Shared {
    watch: Mutex<Watch>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Watch> {
        // A watch is a few plain values: whole at every moment.
        self.watch.lock()
    }
}

/// The thread that kicks.
#[derive(Debug)]
pub struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A time limit on what the current thread does while this is held.
#[derive(Debug)]
pub struct Limit {
    shared: Arc<Shared>,
}

extern "C" fn ignore(_signal: libc::c_int) {}

/// Makes [`KICK`] interrupt system calls and do nothing else.
///
/// # Errors
/// That of `sigaction`.
pub fn install_handler() -> io::Result<()> {
    let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler touches nothing, so it may run at any place of any thread.
    unsafe { nix::sys::signal::sigaction(KICK, &action) }?;
    Ok(())
}

/// Sends [`KICK`] to a thread of this process.
pub fn kick(thread: libc::pid_t) {
    // SAFETY: tgkill takes three numbers and touches no memory of ours. A thread that is gone
    // gives ESRCH, which is as good.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, KICK as libc::c_int) };
}

/// The current thread's number.
pub fn this_thread() -> libc::pid_t {
    nix::unistd::gettid().as_raw()
}

impl Watchdog {
    /// Starts the thread.
    ///
    /// # Errors
    /// No handler for the signal, or no thread.
    pub fn start() -> io::Result<Self> {
        install_handler()?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("doctor-watchdog".to_owned())
            .spawn(move || watch(&theirs))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// From now on, and until the answer is dropped, the current thread may take `time`.
    pub fn limit(&self, time: Duration) -> Limit {
        let mut watch = self.shared.lock();
        watch.armed = Some((this_thread(), clock::now() + time));
        watch.expired = false;
        self.shared.changed.notify_one();
        Limit { shared: Arc::clone(&self.shared) }
    }
}

impl Limit {
    /// True once the time is over.
    pub fn is_over(&self) -> bool {
        self.shared.lock().expired
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        self.shared.lock().armed = None;
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and nothing could be done about it.
            let _ = thread.join();
        }
    }
}

fn watch(shared: &Shared) {
    let mut watch = shared.lock();
    while !watch.quit {
        let wait = match watch.armed {
            None => None,
            Some((thread, deadline)) => {
                let left = deadline.saturating_duration_since(clock::now());
                if left.is_zero() {
                    watch.expired = true;
                    kick(thread);
                }
                Some(left.max(AGAIN))
            }
        };
        watch = match wait {
            None => shared.changed.wait(watch),
            Some(time) => shared.changed.wait_timeout(watch, time),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_thread_is_interrupted_until_it_notices() {
        let watchdog = Watchdog::start().unwrap();
        let limit = watchdog.limit(Duration::from_millis(1));
        while !limit.is_over() {
            // A call that only a signal ends.
            let error = nix::poll::poll(&mut [], nix::poll::PollTimeout::NONE);
            assert_eq!(error, Err(nix::errno::Errno::EINTR));
        }
    }
}
