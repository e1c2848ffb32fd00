//! The failovers of a life: what each part of one took.

use super::{Clock, Life, Moment};
use vmft_backup::arbiter::Verdict;
use vmft_backup::events::{Event, Peer};
use vmft_log::foreign::ForeignText;

/// A part of a failover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// From the peer's last sign to the suspicion.
    Detection,
    /// From there to the arbiter's answer.
    TestAndSet,
    /// From the answer to the end of the log.
    Replay,
    /// From there until the guest runs.
    GoLive,
    /// From there to the first output.
    FirstOutput,
}

impl Phase {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Detection => "detection",
            Self::TestAndSet => "test-and-set",
            Self::Replay => "replay",
            Self::GoLive => "go-live",
            Self::FirstOutput => "first output",
        }
    }
}

/// The answer of an arbiter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// When.
    pub at: Moment,
    /// What.
    pub verdict: Verdict,
}

/// A peer lost, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failover {
    /// Whose, as an index of the story's lives.
    pub life: usize,
    /// Who was lost.
    pub peer: Peer,
    /// What made the side suspect it.
    pub why: ForeignText,
    /// Its last sign.
    pub last_sign: Moment,
    /// When it was suspected.
    pub suspected: Moment,
    /// The generation that was asked for.
    pub generation: Option<u64>,
    /// When the arbiter was asked first.
    pub asked: Option<Moment>,
    /// How often it could not be reached.
    pub unreachable: u64,
    /// What it said in the end.
    pub answer: Option<Answer>,
    /// When everything was replayed; at which point.
    pub replayed: Option<(Moment, u64)>,
    /// The last output of the guest then, and how many were not known to be out.
    pub outputs: Option<(u64, u64)>,
    /// When the guest ran here; how many requests were issued again.
    pub live: Option<(Moment, u64)>,
    /// When its first output was out; which.
    pub first_output: Option<(Moment, u64)>,
}

impl Failover {
    /// True if the side that saw it goes on.
    pub fn is_won(&self) -> bool {
        self.answer.as_ref().is_some_and(|answer| answer.verdict == Verdict::Won)
    }

    /// Its parts that are known, in order, each with its beginning and its end.
    pub fn phases(&self) -> Vec<(Phase, Moment, Moment)> {
        let ends = [
            (Phase::Detection, Some(self.suspected)),
            (Phase::TestAndSet, self.answer.as_ref().map(|answer| answer.at)),
            (Phase::Replay, self.replayed.map(|(at, _)| at)),
            (Phase::GoLive, self.live.map(|(at, _)| at)),
            (Phase::FirstOutput, self.first_output.map(|(at, _)| at)),
        ];
        // What was kept is let out before the guest runs, so the first output can come before that.
        let mut ends: Vec<(Phase, Moment)> =
            ends.into_iter().filter_map(|(phase, end)| Some((phase, end?))).collect();
        ends.sort_by_key(|(_, end)| *end);
        let mut phases = Vec::new();
        let mut begin = self.last_sign;
        for (phase, end) in ends {
            let end = end.max(begin);
            phases.push((phase, begin, end));
            begin = end;
        }
        phases
    }

    /// The end of its last part that is known.
    pub fn end(&self) -> Moment {
        self.phases().last().map_or(self.suspected, |(_, _, end)| *end)
    }
}

/// The failovers that a life saw.
pub(super) fn failovers(index: usize, life: &Life, clock: Clock) -> Vec<Failover> {
    let mut done = Vec::new();
    let mut open: Option<Failover> = None;
    for (_, record) in &life.records {
        let at = clock.moment(record.boot_ns);
        if let Event::PeerLost { peer, why, last_sign, suspected } = &record.event {
            // Others that are lost while this is being decided are covered by the same generation.
            if open.as_ref().is_some_and(|open| open.asked.is_some() && open.answer.is_none()) {
                continue;
            }
            done.extend(open.take());
            open = Some(Failover {
                life: index,
                peer: *peer,
                why: why.clone(),
                last_sign: clock.moment_of(*last_sign),
                suspected: clock.moment_of(*suspected),
                generation: None,
                asked: None,
                unreachable: 0,
                answer: None,
                replayed: None,
                outputs: None,
                live: None,
                first_output: None,
            });
            continue;
        }
        let Some(failover) = &mut open else { continue };
        match &record.event {
            Event::ArbiterAsked { generation } => {
                failover.asked.get_or_insert(at);
                failover.generation.get_or_insert(generation.0);
            }
            Event::ArbiterUnreachable { .. } => failover.unreachable += 1,
            Event::ArbiterAnswered { verdict, .. } => {
                failover.answer.get_or_insert_with(|| Answer { at, verdict: verdict.clone() });
            }
            Event::ReplayDone { point, marked, not_out } => {
                failover.replayed = Some((at, *point));
                failover.outputs = Some((marked.0, *not_out));
            }
            Event::Live { requests_again, .. } => failover.live = Some((at, *requests_again)),
            Event::FirstOutput { output } => {
                failover.first_output.get_or_insert((at, output.0));
            }
            _ => {}
        }
    }
    done.extend(open);
    done
}
