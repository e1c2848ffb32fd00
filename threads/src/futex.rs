//! The kernel's side of locks: `futex(2)`, between threads of one process.

use std::sync::atomic::AtomicU32;
use std::time::Duration;
use std::{io, ptr};

/// What the word of a lock that inherits priority looks like is the kernel's business as well:
/// `futex(2)`, "Priority-inheritance futexes".
fn futex(
    word: &AtomicU32,
    operation: libc::c_int,
    value: u32,
    limit: Option<libc::timespec>,
) -> io::Result<()> {
    let limit = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
    let operation = operation | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word lives as long as its reference; the kernel reads and writes it atomically. The
    // limit is null or valid for the call. None of the operations used has a second word.
    let done = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, limit) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits for the lock `word`; whoever holds it has at least the caller's priority until then.
pub(crate) fn lock_inheriting(word: &AtomicU32) {
    loop {
        let Err(error) = futex(word, libc::FUTEX_LOCK_PI, 0, None) else { return };
        match error.raw_os_error() {
            // A signal came, or the holder is just ending.
            Some(libc::EINTR | libc::EAGAIN) => {}
            // Locked by the caller himself (EDEADLK), or by a thread that has ended (ESRCH).
            _ => panic!("a lock cannot be taken: {error}"),
        }
    }
}

/// Gives the lock `word`, which the calling thread holds, to whoever waits for it.
pub(crate) fn unlock_inheriting(word: &AtomicU32) {
    let given = futex(word, libc::FUTEX_UNLOCK_PI, 0, None);
    given.expect("the lock's owner can give it back");
}

/// Waits until woken, unless `word` is no longer `seen`, for at most `limit`. May return early.
pub(crate) fn wait(word: &AtomicU32, seen: u32, limit: Option<Duration>) {
    let limit = limit.map(|limit| libc::timespec {
        // More than anybody waits.
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    });
    // Woken, too late, interrupted or out of time: the caller looks for himself.
    let _ = futex(word, libc::FUTEX_WAIT, seen, limit);
}

/// Wakes up to `count` of those who wait.
pub(crate) fn wake(word: &AtomicU32, count: u32) {
    let _ = futex(word, libc::FUTEX_WAKE, count, None);
}
