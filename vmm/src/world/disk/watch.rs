//! Notices requests that hang.

use super::desk::DiskDesk;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use vmft_sandbox::Task;
use vmft_threads::{Condvar, Mutex};

/// How often it is looked at most: an operator is in no greater hurry.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Over {
    is_over: Mutex<bool>,
    changed: Condvar,
}

/// Looks at a side's disks now and then, on a thread of its own, until it is dropped.
#[derive(Debug)]
pub(in crate::world) struct Watch(Arc<Over>);

impl Watch {
    /// Begins. `shortest`: the shortest time after which a request of one of them is said to hang.
    ///
    /// # Errors
    /// The host's, without a thread for it.
    pub(in crate::world) fn begin(desk: &Arc<DiskDesk>, shortest: Duration) -> io::Result<Self> {
        let (desk, over) = (Arc::clone(desk), Arc::<Over>::default());
        let step = LOOK.min(shortest / 4);
        let watched = Arc::clone(&over);
        let watch = move || {
            let mut is_over = watched.is_over.lock();
            while !*is_over {
                is_over = watched.changed.wait_timeout(is_over, step);
                desk.queues().iter().for_each(|queue| queue.look(queue.timeout()));
            }
        };
        vmft_sandbox::spawn(Task::Disk, "disk-watch", watch)?;
        Ok(Self(over))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        *self.0.is_over.lock() = true;
        self.0.changed.notify_all();
    }
}
