//! Wakes a channel's thread from others.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::net::unix::pipe::Receiver;

/// Wakes one task of the channel's thread, by an `eventfd(2)`: the runtime's own ways have a lock inside, which
/// the waking thread could hold while it waits for a CPU, and the heartbeat with it.
#[derive(Debug)]
pub(super) struct ThreadWaker(EventFd);

impl ThreadWaker {
    /// Nobody is to be woken yet.
    ///
    /// # Errors
    /// The host's, for instance that no more files can be open.
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Arc::new(Self(EventFd::from_value_and_flags(0, flags)?)))
    }

    /// Wakes the task, once for all calls since it woke last.
    pub(super) fn wake(&self) {
        // It can only fail when the count of calls is full.
        let _ = self.0.write(1);
    }

    /// The other end, for a task of the calling thread's runtime.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn wake_ups(&self) -> io::Result<WakeUps> {
        let file = self.0.as_fd().try_clone_to_owned()?;
        // It is none; but it is read like one, and the runtime knows no file more like it.
        Ok(WakeUps(Receiver::from_owned_fd_unchecked(file)?))
    }
}

/// What comes from a [`ThreadWaker`].
#[derive(Debug)]
pub(super) struct WakeUps(Receiver);

impl WakeUps {
    /// Waits to be woken; returns at once after a call since the last time.
    pub(super) async fn next(&self) {
        let mut count = [0; 8];
        loop {
            self.0.readable().await.expect("the runtime lasts as long as its tasks");
            if self.0.try_read(&mut count).is_ok() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_wakes_once_whether_called_before_or_while_it_is_waited_for() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
        runtime.block_on(async {
            let waker = ThreadWaker::new().expect("a file");
            waker.wake();
            waker.wake();
            let wake_ups = waker.wake_ups().expect("registered");
            wake_ups.next().await;
            let quiet = tokio::select! {
                biased;
                () = wake_ups.next() => false,
                () = tokio::task::yield_now() => true,
            };
            assert!(quiet, "both calls have woken it");
            for _ in 0..1000 {
                let caller = Arc::clone(&waker);
                let calls = std::thread::spawn(move || caller.wake());
                wake_ups.next().await;
                calls.join().expect("no panic");
            }
        });
    }
}
