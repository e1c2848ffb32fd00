//! Making a running engine come back soon, from other threads.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;
use vmft_sandbox::Task;

/// Makes a running [`run`](crate::Engine::run) come back soon, from any thread. A kick
/// while nothing runs ends the next run at its start.
#[derive(Debug, Clone)]
pub struct Kicker(Arc<dyn Kick>);

/// Whatever can be kicked.
pub trait Kick: fmt::Debug + Send + Sync {
    /// Makes the engine come back soon.
    fn kick(&self);
}

impl Kicker {
    /// Kicks. Several kicks before the engine has come back count as one.
    pub fn kick(&self) {
        self.0.kick();
    }

    /// Kicks every `period`, until the result is dropped: for a machine that comes back at its guest's exits
    /// only, so that what waits for the guest is seen.
    ///
    /// # Errors
    /// The host's, without a thread for it.
    pub fn periodically(&self, period: Duration) -> io::Result<PeriodicKicks> {
        let kicked = self.clone();
        PeriodicKicks::begin(period, move || kicked.kick())
    }

    /// For what can be kicked.
    pub fn of(kicked: Arc<dyn Kick>) -> Self {
        Self(kicked)
    }
}

/// Kicks at a steady pace, on a thread of their own, until this is dropped.
#[derive(Debug)]
pub struct PeriodicKicks {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PeriodicKicks {
    /// Calls `kick` every `period`.
    ///
    /// # Errors
    /// The host's, without a thread for it.
    pub fn begin(period: Duration, kick: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let run = move || {
            while stopped.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
                kick();
            }
        };
        let thread = vmft_sandbox::spawn(Task::Worker, "kicks", run)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for PeriodicKicks {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has stopped as well.
            let _ = thread.join();
        }
    }
}
