//! Threads whose lateness others would take for the death of this side, and the locks that they share
//! with the other threads.
//!
//! A heartbeat is on time only if its thread waits for nobody who may have to wait for a CPU. So that
//! thread is urgent ([`make_thread_urgent`]), and whoever holds a lock that it wants is as urgent until he
//! gives it back: [`Mutex`] inherits priority. In the crates whose code runs on such a thread no other
//! lock is allowed (`clippy.toml`).

mod condvar;
mod futex;
mod mutex;
mod urgent;

pub use condvar::Condvar;
pub use mutex::{Mutex, MutexGuard, RawMutex};
pub use urgent::make_thread_urgent;
