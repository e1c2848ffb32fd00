//! Wakes a channel's thread from others.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::Notify;

/// Wakes one task of the channel's thread, by an `eventfd(2)`: the runtime's own ways have a lock inside, which
/// the waking thread could hold while it waits for a CPU, and the heartbeat with it.
#[derive(Debug)]
pub(super) struct ThreadWaker(EventFd);

impl ThreadWaker {
    /// Wakes the task, once for all calls since it woke last.
    pub(super) fn wake(&self) {
        // It can only fail when the count of calls is full.
        let _ = self.0.write(1);
    }
}

/// What comes from a [`ThreadWaker`], and from the task's own thread, which needs none.
#[derive(Debug)]
pub(super) struct WakeUps {
    others: Receiver,
    own: Notify,
}

impl WakeUps {
    /// For a task of the calling thread's runtime, and the waker for other threads. Nobody is to be woken yet.
    ///
    /// # Errors
    /// The host's, for instance that no more files can be open.
    pub(super) fn new() -> io::Result<(Arc<ThreadWaker>, Self)> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let waker = ThreadWaker(EventFd::from_value_and_flags(0, flags)?);
        let file = waker.0.as_fd().try_clone_to_owned()?;
        // It is none; but it is read like one, and the runtime knows no file more like it.
        let others = Receiver::from_owned_fd_unchecked(file)?;
        Ok((Arc::new(waker), Self { others, own: Notify::new() }))
    }

    /// Wakes the task from its own thread.
    pub(super) fn again(&self) {
        self.own.notify_one();
    }

    /// Waits to be woken; returns at once after a call since the last time.
    pub(super) async fn next(&self) {
        tokio::select! {
            () = self.called() => {}
            () = self.own.notified() => {}
        }
    }

    async fn called(&self) {
        let mut count = [0; 8];
        loop {
            self.others.readable().await.expect("the runtime lasts as long as its tasks");
            if self.others.try_read(&mut count).is_ok() {
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
            let (waker, wake_ups) = WakeUps::new().expect("a file");
            waker.wake();
            waker.wake();
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
