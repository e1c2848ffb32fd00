//! After the time of faults: the world is healed, perhaps after one last fault, and somebody has to go on.

use super::{Stage, World};
use crate::models::End;
use crate::plan::{Ending, MS};
use crate::side::{Process, Side};

/// How long everybody may take, once the world is healed, to go on.
const PATIENCE: u64 = 1_500 * MS;
/// Outputs that show that the guest goes on.
const PROGRESS: usize = 4;
/// How long it is waited, beyond the time of faults, for a moment at which a pair says it is protected.
const PROTECTED_WAIT: u64 = 300 * MS;
/// How long a machine that is to be stopped runs in a healed world before that.
const CALM: u64 = 150 * MS;

impl World {
    /// Everything is mended, but for what is dead.
    fn heal(&mut self) {
        self.note(|| "healed".to_owned());
        self.cut_until.fill(0);
        for side in 0..self.plan.sides {
            self.sides[side].arbiter_cut_until = 0;
            self.sides[side].clock.change(self.now, 0, true);
            self.sides[side].frozen_until = None;
        }
        for side in 0..self.plan.sides {
            self.run_side(side);
        }
    }

    pub(super) fn healed(&mut self) {
        match self.plan.ending {
            Ending::Heal => self.demand_progress(),
            Ending::Stop => {
                self.heal();
                let from = self.now + CALM;
                self.stage = Stage::Waiting { from, until: from + PROTECTED_WAIT };
            }
            Ending::LoseProtected | Ending::LoseProtector => {
                // What is wrong just now stays so until the next fault, which is the last.
                let from = self.now;
                self.stage = Stage::Waiting { from, until: from + PROTECTED_WAIT };
            }
        }
    }

    /// If the side that was last allowed to reign can, somebody has to.
    fn demand_progress(&mut self) {
        self.heal();
        let (generation, winner) = self.arbiter.latest();
        let winner = winner.id.clone();
        let can = (0..self.plan.sides).any(|side| {
            self.sides[side].candidate(side).id == winner
                && match &self.sides[side].process {
                    Process::Live(live) => !live.halted && live.generation.0 + 1 >= generation.0,
                    Process::Following(following) => {
                        following.reign.next() == generation && !following.leaving
                    }
                    _ => false,
                }
        });
        if can { self.demand() } else { self.stage = Stage::Over }
    }

    fn demand(&mut self) {
        let from = self.oracle.released();
        self.stage = Stage::Demand { until: self.now + PATIENCE, from };
    }

    pub(super) fn look_at_stage(&mut self) {
        match self.stage {
            Stage::Chaos | Stage::Over => {}
            Stage::Waiting { until, .. } if self.now > until => self.demand_progress(),
            Stage::Waiting { from, .. } if self.now >= from => self.try_last_fault(),
            Stage::Waiting { .. } => {}
            Stage::Demand { from, .. } if self.has_gone_on(from) => {
                self.check_end();
                self.stage = Stage::Over;
            }
            Stage::Demand { until, from } if self.now > until => {
                let text = if self.oracle.released() < from + PROGRESS {
                    "nobody runs the guest, although somebody could"
                } else {
                    "a write that a predecessor had begun is never done"
                };
                self.oracle.fail(text.to_owned());
            }
            Stage::Demand { .. } => {}
            Stage::Stopped { until } if self.now > until => self.stage = Stage::Over,
            Stage::Stopped { .. } => {}
        }
    }

    /// Somebody runs the guest, and owes it nothing from before.
    fn has_gone_on(&self, from: usize) -> bool {
        let done = self.oracle.reigning.is_some_and(|(side, _)| {
            let Process::Live(live) = &self.sides[side].process else { return false };
            live.waiting.is_none() && self.oracle.is_all_done(&live.guest)
        });
        done && self.oracle.released() >= from + PROGRESS
    }

    /// A live side that says that it is protected, and the sides that protect it.
    fn protected(&self) -> Option<(usize, Vec<usize>)> {
        let (latest, _) = self.arbiter.latest();
        (0..self.plan.sides).find_map(|side| {
            let Process::Live(live) = &self.sides[side].process else { return None };
            // The word of one that was overtaken, and does not know yet, is of the past.
            if !live.says_protected() || self.is_frozen(side) || live.generation != latest {
                return None;
            }
            let protecting = live.peers.iter().filter_map(|peer| {
                let follower = self.connections[peer.connection].side(End::Backup);
                let Process::Following(following) = &self.sides[follower].process else {
                    return None;
                };
                let follows = following.connection == peer.connection
                    && following.over.is_none()
                    && !following.leaving;
                let counts = peer.key.is_some_and(|key| live.reign.is_protecting(key));
                (follows && counts).then_some(follower)
            });
            let protecting: Vec<_> = protecting.collect();
            (!protecting.is_empty()).then_some((side, protecting))
        })
    }

    /// The last fault strikes at a moment at which a pair says that it is protected, with those alive
    /// who protect it; then the world is healed.
    fn try_last_fault(&mut self) {
        let Some((live, protecting)) = self.protected() else { return };
        match self.plan.ending {
            Ending::LoseProtected => {
                self.note(|| format!("LAST FAULT: side {live} is lost, {protecting:?} protect it"));
                self.crash(live);
            }
            Ending::LoseProtector => {
                self.note(|| format!("LAST FAULT: {protecting:?} are lost, which protect {live}"));
                for side in protecting {
                    self.crash(side);
                }
            }
            Ending::Stop if self.sides.iter().any(Side::is_racing) => return,
            Ending::Stop => {
                self.note(|| format!("the operator stops side {live}"));
                self.stop(live);
                self.stage = Stage::Stopped { until: self.now + PATIENCE / 2 };
                return;
            }
            Ending::Heal => unreachable!("nothing is waited for"),
        }
        self.heal();
        self.demand();
    }

    /// What must be so when everything has gone on.
    fn check_end(&mut self) {
        let Some((side, _)) = self.oracle.reigning else { return };
        if let Process::Live(live) = &self.sides[side].process {
            self.oracle.check_nothing_is_missing(&live.guest);
        }
        self.check_disk(side);
    }
}
