//! Coming to rest behind a chosen branch.
//!
//! A point between two exits is *branch-aligned*: the first boundary at which so many branches have
//! retired since the last exit. There is only one such place, so the number alone names it. The way there:
//!
//! ```text
//!  far ──── run, with the counter armed a margin short of the target ────▶ near
//!  near ─── step, instruction by instruction ──▶ the target's branch retires: landed
//!  behind the target ── overshot: on to the next branch, which is no place anybody asked for
//! ```
//!
//! A counter may come back early, late or not at all; the guest may exit on the way, or the host may
//! kick. Each time the distance is measured anew. Coming late by more than the margin is an
//! *overshoot*: it is reported, the guest is brought to rest behind the next branch, and the number of
//! that place is told. To a primary this is as good as any other; a backup is past the place that the log
//! names, which is a divergence. That a counter is *wrong* cannot be seen here: the exit stream has the
//! branches of every exit, and the two sides differ in them.

use super::counter::CounterLost;
use vmft_logging_channel::point::Branches;

/// Shorter ways are stepped: kernels round small periods up, to 128 at most.
const SHORTEST_RUN: u64 = 128;

/// What has to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    /// Run, without a target.
    RunFree,
    /// Run, and have the counter bring the guest back after so many branches.
    RunFor(Branches),
    Step,
    /// This is the place.
    Landed,
    /// The place lies behind.
    Overshot {
        by: u64,
    },
}

/// `aligned`: the last instruction was the branch that made the count what it is.
fn next_move(since: Branches, target: Option<Branches>, margin: Branches, aligned: bool) -> Move {
    let Some(target) = target else { return Move::RunFree };
    match target.0.checked_sub(since.0) {
        Some(0) if aligned => Move::Landed,
        None | Some(0) => Move::Overshot { by: since.0 - target.0 },
        Some(left) if left > margin.0.saturating_add(SHORTEST_RUN) => {
            // One more than the margin: coming back behind the target's branch itself would be too late,
            // because nobody would have seen that it was the last instruction.
            Move::RunFor(Branches(left - margin.0 - 1))
        }
        Some(_) => Move::Step,
    }
}

/// The guest, as far as landing moves it.
pub(super) trait Ground {
    /// What ends the approach early.
    type Exit;
    /// Branches since the last deterministic exit.
    fn since_exit(&mut self) -> Result<Branches, CounterLost>;
    /// Arms the counter, or disarms it.
    fn arm(&mut self, after: Option<Branches>) -> Result<(), CounterLost>;
    /// Lets the guest run until something stops it.
    fn run(&mut self) -> Option<Self::Exit>;
    /// One instruction, or an iteration of a string instruction.
    fn step(&mut self) -> Option<Self::Exit>;
}

/// How an approach ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Approached<E> {
    /// At a branch-aligned place: the wanted one if nothing was overshot.
    Landed {
        /// Its number.
        at: Branches,
        /// Branches by which the guest was behind the target when that was noticed; a place of the
        /// right number whose first instructions have retired already is overshot by 0.
        overshot_by: Option<u64>,
    },
    /// Something else happened on the way.
    Ended(E),
}

/// Brings the guest to `target`, or runs it without one.
pub(super) fn approach<G: Ground>(
    ground: &mut G,
    target: Option<Branches>,
    margin: Branches,
) -> Result<Approached<G::Exit>, CounterLost> {
    let mut target = target;
    let mut overshot_by = None;
    let mut aligned = false;
    let mut since = ground.since_exit()?;
    loop {
        let step = match next_move(since, target, margin, aligned) {
            Move::Landed => return Ok(Approached::Landed { at: since, overshot_by }),
            Move::Overshot { by } => {
                overshot_by = overshot_by.or(Some(by));
                target = Some(Branches(since.0 + 1));
                continue;
            }
            Move::RunFree => false,
            Move::RunFor(after) => {
                ground.arm(Some(after))?;
                false
            }
            Move::Step => true,
        };
        let ended = if step { ground.step() } else { ground.run() };
        if !step && target.is_some() {
            ground.arm(None)?;
        }
        if let Some(exit) = ended {
            return Ok(Approached::Ended(exit));
        }
        let before = since;
        since = ground.since_exit()?;
        aligned = step && since.0 == before.0 + 1;
    }
}

#[cfg(test)]
#[path = "landing_tests.rs"]
mod tests;
