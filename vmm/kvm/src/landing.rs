//! Coming to rest behind a chosen branch.
//!
//! A point between two exits is *branch-aligned*: the first boundary at which so many branches have
//! retired since the last exit. There is only one such place, so the number alone names it. The way there:
//!
//! ```text
//!  far ──── run, with the counter armed a margin short of the target ────▶ near
//!  near ─── step, instruction by instruction ──▶ the target's branch retires: landed
//!   │                                      ▲
//!   └─ run, with a breakpoint on a branch ─┘ that is said to be the target's
//!  behind the target ── overshot: on to the next branch, which is no place anybody asked for
//! ```
//!
//! A counter may come back early, late or not at all; the guest may exit on the way, or the host may
//! kick. Each time the distance is measured anew. Coming late by more than the margin is an
//! *overshoot*: it is reported, the guest is brought to rest behind the next branch, and the number of
//! that place is told. To a primary this is as good as any other; a backup is past the place that the log
//! names, which is a divergence. That a counter is *wrong* cannot be seen here: the exit stream has the
//! branches of every exit, and the two sides differ in them.
//!
//! **The hint.** Whoever has been at the place may have said where its branch is. A breakpoint stops the guest
//! *in front* of that branch, each time it is met; the branch itself is stepped as ever. So a place is still
//! taken for the target only if the last instruction was seen to make the count what it is: a hint that is
//! wrong never makes another place of it. What it can do is to lead past the target, within which nothing but a
//! breakpoint stops a guest exactly. The counter, armed all the same, brings it back then, and it has overshot.

use super::counter::CounterLost;
use vmft_log::point::{Branches, CodeAddress};

/// Shorter ways are stepped: kernels round small periods up, to 128 at most.
const SHORTEST_RUN: u64 = 128;

/// What has to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    /// Run, without a target.
    RunFree,
    /// Run, and have the counter bring the guest back after so many branches.
    RunFor(Branches),
    /// Run to the branch that is said to be the target's, and have the counter bring the guest back after
    /// so many branches if it is not met.
    RunToBranch(CodeAddress, Branches),
    Step,
    /// This is the place.
    Landed,
    /// The place lies behind.
    Overshot {
        by: u64,
    },
}

/// What there is of a hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HintState {
    /// Nothing: every instruction must be looked at.
    None,
    /// The branch that is said to be the target's.
    Ahead(CodeAddress),
    /// The guest stands in front of it.
    Met(CodeAddress),
}

impl HintState {
    /// After a step that the count went up `by` with. A step from the branch that leaves it as it is was no
    /// branch's: it faulted, or the host wanted the thread. The rest is stepped then, so that the guest
    /// meets the branch at most once for each count.
    fn after_step(self, by: u64) -> Self {
        match self {
            Self::Met(branch) if by == 1 => Self::Ahead(branch),
            Self::Met(_) => Self::None,
            Self::None | Self::Ahead(_) => self,
        }
    }
}

/// `aligned`: the last instruction was the branch that made the count what it is.
fn next_move(
    since: Branches,
    target: Option<Branches>,
    margin: Branches,
    aligned: bool,
    hint_state: HintState,
) -> Move {
    let Some(target) = target else { return Move::RunFree };
    match target.0.checked_sub(since.0) {
        Some(0) if aligned => Move::Landed,
        None | Some(0) => Move::Overshot { by: since.0 - target.0 },
        Some(left) if left > margin.0.saturating_add(SHORTEST_RUN) => {
            // One more than the margin: coming back behind the target's branch itself would be too late,
            // because nobody would have seen that it was the last instruction.
            Move::RunFor(Branches(left - margin.0 - 1))
        }
        Some(left) => match hint_state {
            HintState::Ahead(branch) => Move::RunToBranch(branch, Branches(left.max(SHORTEST_RUN))),
            HintState::None | HintState::Met(_) => Move::Step,
        },
    }
}

/// How far a run with a breakpoint has led.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reached {
    /// In front of the branch.
    Branch,
    /// Somewhere else.
    Elsewhere,
    /// Nowhere: there can be no breakpoint, and the guest did not run.
    Nowhere,
}

/// The guest, as far as landing moves it.
pub(crate) trait Ground {
    /// What ends the approach early.
    type Exit;
    /// Branches since the last deterministic exit.
    fn since_exit(&mut self) -> Result<Branches, CounterLost>;
    /// Arms the counter, or disarms it.
    fn arm(&mut self, after: Option<Branches>) -> Result<(), CounterLost>;
    /// Lets the guest run until something stops it.
    fn run(&mut self) -> Option<Self::Exit>;
    /// The same, until it comes to `branch` at the latest, where it may be already.
    fn run_to(&mut self, branch: CodeAddress) -> Result<Reached, Self::Exit>;
    /// One instruction, or an iteration of a string instruction.
    fn step(&mut self) -> Option<Self::Exit>;
    /// The hint has led past the target.
    fn misled(&mut self);
}

/// How an approach ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Approached<E> {
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

/// Brings the guest to `target`, or runs it without one. `hint` may say which branch the target lies behind.
pub(crate) fn approach<G: Ground>(
    ground: &mut G,
    target: Option<Branches>,
    margin: Branches,
    hint: Option<CodeAddress>,
) -> Result<Approached<G::Exit>, CounterLost> {
    let mut target = target;
    let mut hint_state = hint.map_or(HintState::None, HintState::Ahead);
    let mut led = false;
    let mut overshot_by = None;
    let mut aligned = false;
    let mut since = ground.since_exit()?;
    loop {
        let next = next_move(since, target, margin, aligned, hint_state);
        let ended = match next {
            Move::Landed => return Ok(Approached::Landed { at: since, overshot_by }),
            Move::Overshot { by } => {
                overshot_by = overshot_by.or(Some(by));
                target = Some(Branches(since.0 + 1));
                if led {
                    ground.misled();
                }
                // It is not for the place that is looked for now.
                hint_state = HintState::None;
                continue;
            }
            Move::RunFree => ground.run(),
            Move::RunFor(after) => {
                ground.arm(Some(after))?;
                let ended = ground.run();
                ground.arm(None)?;
                ended
            }
            Move::RunToBranch(branch, after) => {
                ground.arm(Some(after))?;
                let reached = ground.run_to(branch);
                ground.arm(None)?;
                hint_state = match reached {
                    Ok(Reached::Branch) => HintState::Met(branch),
                    Ok(Reached::Nowhere) => HintState::None,
                    Ok(Reached::Elsewhere) | Err(_) => hint_state,
                };
                reached.err()
            }
            Move::Step => ground.step(),
        };
        if let Some(exit) = ended {
            return Ok(Approached::Ended(exit));
        }
        let before = since;
        since = ground.since_exit()?;
        let by = since.0.saturating_sub(before.0);
        aligned = next == Move::Step && by == 1;
        led = matches!(next, Move::RunToBranch(..));
        if next == Move::Step {
            hint_state = hint_state.after_step(by);
        }
    }
}

#[cfg(test)]
#[path = "landing_tests.rs"]
mod tests;
