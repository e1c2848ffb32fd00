//! A guest that was reset waits for what its disks boot.

use super::live::{InputSource, Live};
use super::{Asked, Boundary, HostTime, Room, Step};
use vmft_log::entry::StopReason;
use vmft_log::foreign::Printable;

/// What a guest's reset leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnReboot {
    /// The guest starts again.
    #[default]
    Restart,
    /// The machine stops.
    Exit,
}

/// So many resets within a minute of guest time, without a write to a disk, and the guest is given up.
const FRUITLESS: u32 = 5;

/// How long one wait takes before it is looked whether the disks have been read, in host nanoseconds: little
/// beside reading a kernel.
const STEP_NS: u64 = 2_000_000;

impl<S: InputSource> Live<S> {
    /// The step of a guest that was reset, if it is not to start again.
    pub(super) fn after_resets(&mut self, boundary: &Boundary) -> Option<Step> {
        let resets = boundary.resets;
        let seen = *self.resets_seen.get_or_insert(resets.total);
        if seen == resets.total {
            return None;
        }
        self.resets_seen = Some(resets.total);
        if self.on_reboot == OnReboot::Exit {
            return Some(Step::Stop(StopReason::Reboot));
        }
        if resets.fruitless < FRUITLESS {
            return None;
        }
        tracing::error!(
            "the guest was reset {FRUITLESS} times within a minute and wrote to no disk: it is stopped"
        );
        Some(Step::Stop(StopReason::CannotBoot))
    }

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
                    tracing::error!("the guest cannot start again: {}", Printable(&why));
                    return Step::Stop(StopReason::CannotBoot);
                }
                None => {}
            }
            self.source.wait(Some(HostTime(now + STEP_NS)), Room::default());
        }
    }
}

pub(super) fn asked_step(asked: Asked) -> Step {
    match asked {
        Asked::Pause => Step::Pause,
        Asked::Stop(reason) => Step::Stop(reason),
        Asked::Halt => Step::Halt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::live::tests::{Clocks, boundary};
    use crate::inputs::{ClockControl, PointScale, Resets};

    /// What becomes of a guest that is seen at these counts of resets, the first of which is where it began.
    fn steps(on_reboot: OnReboot, seen: &[(u64, u32)]) -> Vec<Option<Step>> {
        let here = boundary(true);
        let clock = ClockControl::new(&here.clock, here.point, PointScale::EXITS);
        let live = Live::new(Clocks::default(), clock);
        let mut live = live.with_on_reboot(on_reboot);
        let at = |(total, fruitless): &(u64, u32)| {
            let resets = Resets { total: *total, fruitless: *fruitless };
            live.after_resets(&Boundary { resets, ..here })
        };
        seen.iter().map(at).collect()
    }

    #[test]
    fn a_guest_is_given_up_at_its_fifth_reset_without_a_write() {
        let stop = Some(Step::Stop(StopReason::CannotBoot));
        let seen = [(7, 4), (7, 4), (8, 4), (9, 1), (10, 5)];
        assert_eq!(steps(OnReboot::Restart, &seen), [None, None, None, None, stop]);
        // What another side has seen is not this one's.
        assert_eq!(steps(OnReboot::Restart, &[(5, 5), (5, 5)]), [None, None]);
    }

    #[test]
    fn a_guest_that_is_not_to_start_again_stops_at_its_first_reset() {
        let stop = Some(Step::Stop(StopReason::Reboot));
        assert_eq!(steps(OnReboot::Exit, &[(3, 0), (3, 0), (4, 1)]), [None, None, stop]);
    }
}
