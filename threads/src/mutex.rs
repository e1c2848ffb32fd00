//! A lock whose holder inherits the priority of whoever waits for it.

use crate::futex;
use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};

/// Data that one thread at a time may touch. As `std`'s, but the kernel lets whoever holds it run at the
/// highest priority among those who wait, and a panic does not spoil it: what a thread leaves behind is
/// as its last statement left it.
pub type Mutex<T> = lock_api::Mutex<RawMutex, T>;

/// Access to what a [`Mutex`] guards; gives the lock back when dropped.
pub type MutexGuard<'a, T> = lock_api::MutexGuard<'a, RawMutex, T>;

/// The lock itself: zero, or the number of the thread that holds it, to which the kernel adds that
/// others wait.
#[derive(Debug)]
pub struct RawMutex {
    owner: AtomicU32,
}

/// The number of the calling thread. It is asked for once: no process of ours goes on as a copy (`fork(2)`),
/// whose thread would have another.
fn own_number() -> u32 {
    thread_local! {
        static NUMBER: Cell<u32> = const { Cell::new(0) };
    }
    let known = NUMBER.get();
    if known != 0 {
        return known;
    }
    // SAFETY: takes nothing and cannot fail.
    let number = unsafe { libc::gettid() };
    let number = u32::try_from(number).expect("a thread's number is positive");
    NUMBER.set(number);
    number
}

// SAFETY: the word is set from zero to the number of a thread by that thread only, here or by the kernel
// in its name, and only then is the lock taken; so no two threads hold it.
unsafe impl lock_api::RawMutex for RawMutex {
    const INIT: Self = Self { owner: AtomicU32::new(0) };

    // Whoever waits does so for the thread that holds it.
    type GuardMarker = lock_api::GuardNoSend;

    fn lock(&self) {
        if !self.try_lock() {
            futex::lock_inheriting(&self.owner);
        }
    }

    fn try_lock(&self) -> bool {
        let taken =
            self.owner.compare_exchange(0, own_number(), Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok()
    }

    unsafe fn unlock(&self) {
        let given =
            self.owner.compare_exchange(own_number(), 0, Ordering::Release, Ordering::Relaxed);
        if given.is_err() {
            futex::unlock_inheriting(&self.owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::make_thread_urgent;
    use std::fs;
    use std::sync::mpsc;

    /// The fields of a thread's `stat` from its state on (`proc(5)`: the third one).
    fn stat(thread: u32) -> Vec<String> {
        let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
        let (_, fields) = stat.rsplit_once(") ").expect("the thread's name is in brackets");
        fields.split(' ').map(str::to_owned).collect()
    }

    /// The kernel's priority: negative for real-time ones (field 18).
    fn priority(thread: u32) -> i32 {
        stat(thread)[15].parse().unwrap()
    }

    #[test]
    fn whoever_holds_a_lock_is_as_urgent_as_those_who_wait_for_it() {
        let mutex = Mutex::new(0);
        let (tell, told) = mpsc::channel();
        let own = own_number();
        std::thread::scope(|scope| {
            let held = mutex.lock();
            let before = priority(own);
            assert!(before >= 0, "an ordinary thread: {before}");
            scope.spawn(|| {
                make_thread_urgent();
                tell.send(own_number()).unwrap();
                *mutex.lock() += 1;
            });
            let urgent = told.recv().unwrap();
            if priority(urgent) >= 0 {
                eprintln!("no real-time priority here: nothing to inherit");
                return;
            }
            // Asleep ('S'): it has nothing to wait for but the lock.
            while stat(urgent)[0] != "S" {
                std::thread::yield_now();
            }
            assert_eq!(priority(own), priority(urgent), "inherited");
            drop(held);
            assert_eq!(priority(own), before, "given back with the lock");
        });
        assert_eq!(*mutex.lock(), 1);
    }

    #[test]
    fn one_thread_at_a_time() {
        let mutex = Mutex::new(0_u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let mut sum = mutex.lock();
                        let seen = std::hint::black_box(*sum);
                        *sum = seen + 1;
                    }
                });
            }
        });
        assert_eq!(mutex.into_inner(), 80_000);
    }

    #[test]
    fn a_panic_gives_the_lock_back() {
        let mutex = Mutex::new(1);
        let panicked = std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                let _held = mutex.lock();
                panic!("with the lock");
            });
            holder.join()
        });
        assert!(panicked.is_err());
        assert_eq!(mutex.try_lock().as_deref(), Some(&1));
    }

    #[test]
    #[should_panic(expected = "a lock cannot be taken")]
    fn a_thread_that_would_wait_for_itself_is_told() {
        let mutex = Mutex::new(());
        let _held = mutex.lock();
        drop(mutex.lock());
    }
}
