//! A backup's looks at its storage: whether it could go on with the guest where its primary cannot.

use crate::status::{DiskState, DiskTroubleStatus, StatusBoard};
use crate::tell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_sandbox::Task;
use vmft_threads::{Condvar, Mutex, MutexGuard};
use vmft_vmm::world::DiskReader;

/// How often it looks.
const EVERY: Duration = Duration::from_secs(5);
/// A look that takes longer has not succeeded: far more than a busy disk takes for a sector.
const LONG: Duration = Duration::from_secs(2);

/// A disk that cannot be read.
#[derive(Debug, Clone)]
struct Failing {
    disk: u8,
    path: String,
    why: String,
    since: Instant,
}

#[derive(Debug, Default)]
struct State {
    is_over: bool,
    /// The disk that is being read, and since when.
    looking: Option<(u8, String, Instant)>,
    failing: Option<Failing>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Looks now and then, on a thread of its own, until it is dropped.
#[derive(Debug)]
pub(crate) struct StorageLook(Arc<Shared>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    fn failing(&self) -> Option<Failing> {
        let state = self.lock();
        let slow = state.looking.as_ref().filter(|(_, _, since)| since.elapsed() > LONG);
        let slow = slow.map(|(disk, path, since)| {
            let why = "it does not answer".to_owned();
            Failing { disk: *disk, path: path.clone(), why, since: *since }
        });
        slow.or_else(|| state.failing.clone())
    }

    /// Looks at each disk; the first that cannot be read.
    fn look(&self, disks: &[DiskReader]) -> Option<Failing> {
        (0u8..).zip(disks).find_map(|(index, disk)| {
            let path = disk.name().display().to_string();
            let began = Instant::now();
            self.lock().looking = Some((index, path.clone(), began));
            let looked = disk.look();
            self.lock().looking = None;
            let why = looked.err()?.to_string();
            Some(Failing { disk: index, path, why, since: began })
        })
    }

    fn run(&self, disks: &[DiskReader]) {
        loop {
            let found = self.look(disks);
            let mut state = self.lock();
            match (&state.failing, &found) {
                (None, Some(Failing { path, why, .. })) => tell!(
                    "disk {path} cannot be read here: {why}; a primary whose storage fails is not \
                     relieved by this side"
                ),
                (Some(Failing { path, .. }), None) => tell!("disk {path} can be read here again"),
                _ => {}
            }
            let since = state.failing.take().map(|before| before.since);
            state.failing = found;
            if let (Some(failing), Some(since)) = (&mut state.failing, since) {
                failing.since = since;
            }
            let on = |state: &mut State| !state.is_over;
            let (state, _) = self.changed.wait_timeout_while(state, EVERY, on);
            if state.is_over {
                return;
            }
        }
    }
}

impl StorageLook {
    /// Begins to look at these disks, and to show on the board what is wrong with them.
    ///
    /// # Errors
    /// The host's, without a thread for it.
    pub(crate) fn begin(disks: Vec<DiskReader>, status: &Arc<StatusBoard>) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        if !disks.is_empty() {
            let looks = Arc::clone(&shared);
            vmft_sandbox::spawn(Task::Disk, "storage-look", move || looks.run(&disks))?;
        }
        // A side that goes live, or joins again, has another.
        let shown = Arc::downgrade(&shared);
        status.set_disks(Some(Arc::new(move || {
            let status = |failing: Failing| DiskTroubleStatus {
                disk: failing.disk,
                path: failing.path.into(),
                state: DiskState::Unreachable,
                what: "reading its beginning".to_owned(),
                error: Some(failing.why.into()),
                is_full: false,
                requests: 0,
                for_ms: u64::try_from(failing.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            };
            let failing = shown.upgrade().and_then(|looks| looks.failing());
            failing.map(status).into_iter().collect()
        })));
        Ok(Self(shared))
    }

    /// Why this side could not go on with its disks, as far as it knows: of the last look, or of the one under
    /// way.
    pub(crate) fn failing(&self) -> Option<String> {
        self.0.failing().map(|Failing { path, why, .. }| format!("disk {path}: {why}"))
    }
}

impl Drop for StorageLook {
    fn drop(&mut self) {
        self.0.lock().is_over = true;
        self.0.changed.notify_all();
    }
}
