//! A guest that was reset waits for what its disks boot.

use super::live::{InputSource, Live, asked_step};
use super::{Boundary, HostTime, Room, Step};
use vmft_logging_channel::entry::StopReason;

/// How long one wait takes before it is looked whether the disks have been read, in host nanoseconds: little
/// beside reading a kernel.
const STEP_NS: u64 = 2_000_000;

impl<S: InputSource> Live<S> {
    /// The next step of a guest that waits to be started. Operators are served as always: a disk may be away.
    pub(super) fn next_boot(&mut self, boundary: &Boundary) -> Step {
        loop {
            if let Some(asked) = self.source.take_asked() {
                return asked_step(asked);
            }
            let HostTime(now) = self.source.now();
            match self.source.take_boot() {
                Some(Ok(source)) => {
                    // For the guest that was as long as it was.
                    self.clock.waited(HostTime(now), boundary.point);
                    self.must_sync = true;
                    return Step::Boot(Box::new(source));
                }
                Some(Err(why)) => {
                    tracing::error!("the guest cannot start again: {why}");
                    return Step::Stop(StopReason::CannotBoot);
                }
                None => {}
            }
            self.source.wait(Some(HostTime(now + STEP_NS)), Room::default());
        }
    }
}
