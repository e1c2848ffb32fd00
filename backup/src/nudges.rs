//! Makes a machine come back now and then that would run on until its guest exits, so that what waits for
//! the guest is seen.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use vmft_sandbox::Task;
use vmft_vmm::engine::{EngineKind, PointKind};
use vmft_vmm::machine::Machine;

/// How often: half of what something waits before the guest's place is named by its state.
const PERIOD: Duration = Duration::from_millis(5);

/// Kicks a machine until it is dropped.
#[derive(Debug)]
pub(crate) struct Nudges {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Nudges {
    /// For a machine that comes back at exits only; others need none.
    pub(crate) fn begin(machine: &Machine) -> Option<Self> {
        let needs = matches!(machine.config().engine, EngineKind::Kvm { points: PointKind::Exit });
        let kicker = machine.kicker().filter(|_| needs)?;
        let (stop, stopped) = channel();
        let nudge = move || {
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                kicker.kick();
            }
        };
        let thread = vmft_sandbox::spawn(Task::Worker, "nudges", nudge);
        let thread = thread.expect("a host that cannot start a thread cannot run a machine");
        Some(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Nudges {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // One that panicked has stopped as well.
            let _ = thread.join();
        }
    }
}
