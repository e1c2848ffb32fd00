//! What is done to a side's copies, one thing after the other, on a thread of its own.

use super::{Mirror, MirrorError};
use crate::mirror::record::CopyState;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use vmft_log::entry::Generation;
use vmft_sandbox::Task;
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// Bytes that may wait to be written. A replay that is ahead by so much waits, and slows its primary as any
/// replay does that is behind.
const WAITING_BYTES: usize = 16 << 20;
/// What a change takes beside its bytes.
const OVERHEAD: usize = 64;

/// A change of a copy.
#[derive(Debug)]
pub(super) enum Change {
    /// These bytes.
    Write { offset: u64, data: Vec<u8> },
    /// Zeroes.
    Zero { offset: u64, len: u64 },
    /// Everything before is made durable.
    Settle,
    /// It is made durable, and then its record says this.
    Say { state: CopyState, generation: Generation, pair: String, side: String },
}

impl Change {
    fn cost(&self) -> usize {
        match self {
            Self::Write { data, .. } => data.len() + OVERHEAD,
            Self::Zero { .. } | Self::Settle | Self::Say { .. } => OVERHEAD,
        }
    }

    fn make(&self, mirror: &Mirror) -> Result<(), MirrorError> {
        let copy = &mirror.copy;
        let failed = |what: &'static str, source: io::Error| MirrorError::Failed {
            path: copy.path().to_owned(),
            what,
            source,
        };
        match self {
            Self::Write { offset, data } => {
                copy.put(*offset, data).map_err(|error| failed("writing to it", error))
            }
            Self::Zero { offset, len } => {
                copy.zero(*offset, *len).map_err(|error| failed("zeroing parts of it", error))
            }
            Self::Settle => copy.settle().map_err(|error| failed("making it durable", error)),
            Self::Say { state, generation, pair, side } => {
                copy.settle().map_err(|error| failed("making it durable", error))?;
                mirror.say(*state, *generation, pair, side)
            }
        }
    }
}

#[derive(Debug, Default)]
struct State {
    changes: VecDeque<(usize, Change)>,
    bytes: usize,
    is_busy: bool,
    is_over: bool,
    failure: Option<Arc<MirrorError>>,
    on_failure: Option<OnFailure>,
}

/// Who is told that a copy has failed.
struct OnFailure(Box<dyn FnOnce(&MirrorError) + Send>);

impl fmt::Debug for OnFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnFailure")
    }
}

#[derive(Debug)]
struct Shared {
    mirrors: Vec<Arc<Mirror>>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Writes a side's copies until it is dropped; what waits then is not done.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            let nothing = |state: &mut State| !state.is_over && state.changes.is_empty();
            state = self.changed.wait_while(state, nothing);
            if state.is_over {
                return;
            }
            let Some((index, change)) = state.changes.pop_front() else { continue };
            state.is_busy = true;
            drop(state);
            let made = change.make(&self.mirrors[index]);
            state = self.lock();
            state.is_busy = false;
            state.bytes -= change.cost();
            if let Err(error) = made {
                // What follows would be on a copy that is not what it should be.
                let error = Arc::new(error);
                state.failure = Some(Arc::clone(&error));
                state.changes.clear();
                state.bytes = 0;
                let on_failure = state.on_failure.take();
                drop(state);
                self.changed.notify_all();
                if let Some(OnFailure(tell)) = on_failure {
                    tell(&error);
                }
                return;
            }
            self.changed.notify_all();
        }
    }
}

impl Writer {
    /// Begins.
    pub(super) fn begin(mirrors: &[Arc<Mirror>]) -> io::Result<Self> {
        let (mirrors, state, changed) = (mirrors.to_vec(), Mutex::default(), Condvar::default());
        let shared = Arc::new(Shared { mirrors, state, changed });
        let works = Arc::clone(&shared);
        let thread = vmft_sandbox::spawn(Task::Disk, "mirror", move || works.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Has a copy changed, after all before. Waits while too much waits. What comes after a failure is not
    /// done.
    pub(super) fn change(&self, index: usize, change: Change) {
        let is_full = |state: &mut State| state.failure.is_none() && state.bytes >= WAITING_BYTES;
        let mut state = self.shared.changed.wait_while(self.shared.lock(), is_full);
        if state.failure.is_none() {
            state.bytes += change.cost();
            state.changes.push_back((index, change));
            self.shared.changed.notify_all();
        }
    }

    /// Has `tell` told once, from another thread or from this, when a change fails.
    pub(super) fn on_failure(&self, tell: Box<dyn FnOnce(&MirrorError) + Send>) {
        let mut state = self.shared.lock();
        match state.failure.clone() {
            None => state.on_failure = Some(OnFailure(tell)),
            Some(error) => {
                drop(state);
                tell(&error);
            }
        }
    }

    /// True if a change would not have to wait.
    pub(super) fn has_room(&self) -> bool {
        self.shared.lock().bytes < WAITING_BYTES
    }

    /// True if all is done.
    ///
    /// # Errors
    /// Why it never will be.
    pub(super) fn is_done(&self) -> Result<bool, Arc<MirrorError>> {
        let state = self.shared.lock();
        match &state.failure {
            Some(error) => Err(Arc::clone(error)),
            None => Ok(state.changes.is_empty() && !state.is_busy),
        }
    }

    /// Waits until all is done.
    ///
    /// # Errors
    /// Why it never will be.
    pub(super) fn wait_done(&self) -> Result<(), Arc<MirrorError>> {
        let waits = |state: &mut State| {
            state.failure.is_none() && (state.is_busy || !state.changes.is_empty())
        };
        let state = self.shared.changed.wait_while(self.shared.lock(), waits);
        state.failure.clone().map_or(Ok(()), Err)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // Its panic would have ended the process.
            let _ = thread.join();
        }
    }
}
