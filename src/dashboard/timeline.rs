//! A failover in its parts: from the status of the side that took over, or from the sides' event logs.

use crate::explain::{Failover, Story, text};
use crate::watch::facts::shown;
use serde::Serialize;
use vmft_backup::status::FailoverReport;

/// A part of a failover.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Part {
    pub(super) name: &'static str,
    /// From the last sign of the peer to its beginning, in milliseconds.
    pub(super) begin_ms: f64,
    /// Its length.
    pub(super) ms: f64,
}

/// What happened at a moment of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Step {
    /// Since the last sign of the peer, in milliseconds.
    pub(super) at_ms: f64,
    pub(super) text: String,
}

/// A failover.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Timeline {
    pub(super) title: String,
    pub(super) generation: u64,
    /// Its parts, in order, each beginning where the one before ends.
    pub(super) parts: Vec<Part>,
    /// What happened, as far as that is known.
    pub(super) steps: Vec<Step>,
    pub(super) total_ms: f64,
    /// No output has come yet.
    pub(super) is_open: bool,
    /// Where all this is from.
    pub(super) source: &'static str,
}

/// A time that somebody else has measured, as one can be drawn.
fn time(ms: f64) -> f64 {
    if ms.is_finite() { ms.clamp(0.0, 1e9) } else { 0.0 }
}

/// Parts of these lengths, one after the other.
fn parts(lengths: impl IntoIterator<Item = (&'static str, f64)>) -> Vec<Part> {
    let mut begin_ms = 0.0;
    let mut parts = Vec::new();
    for (name, ms) in lengths {
        parts.push(Part { name, begin_ms, ms });
        begin_ms += ms;
    }
    parts
}

/// What the side `name` tells of its last failover.
pub(super) fn of_report(name: &str, report: &FailoverReport) -> Timeline {
    let known = [
        ("detection", time(report.detection_ms)),
        ("test-and-set", time(report.arbiter_ms)),
        ("replay", time(report.replay_ms)),
    ];
    let until_live: f64 = known.iter().map(|(_, ms)| ms).sum();
    let first_output = report.first_output_ms.map(time);
    // What was kept may be let out before the replay has ended.
    let rest = first_output.map(|ms| ("first output", (ms - until_live).max(0.0)));
    let parts = parts(known.into_iter().chain(rest));
    let total_ms = parts.last().map_or(0.0, |part| part.begin_ms + part.ms);
    Timeline {
        title: format!("{name} takes generation {}: {}", report.generation, report.suspicion),
        generation: report.generation,
        parts,
        steps: Vec::new(),
        total_ms,
        is_open: first_output.is_none(),
        source: "the status of the side that took over",
    }
}

/// What event logs tell of a failover.
fn of_failover(story: &Story<'_>, failover: &Failover) -> Timeline {
    let since = |moment: crate::explain::Moment| time(moment.ms_since(failover.last_sign));
    let parts = failover.phases().into_iter().map(|(phase, begin, end)| Part {
        name: phase.name(),
        begin_ms: since(begin),
        ms: time(end.ms_since(begin)),
    });
    let steps = text::steps(failover).into_iter();
    let steps = steps.map(|step| Step { at_ms: since(step.at), text: shown(&step.text) });
    Timeline {
        title: shown(&text::title(story, failover)),
        generation: failover.generation.unwrap_or(0),
        parts: parts.collect(),
        steps: steps.collect(),
        total_ms: since(failover.end()),
        is_open: failover.first_output.is_none(),
        source: "the event logs",
    }
}

/// What event logs tell of the failover that won a generation, if they have it.
pub(super) fn of_story(story: &Story<'_>, generation: u64) -> Option<Timeline> {
    let mut found = story.failovers.iter().rev();
    let found = found.find(|failover| failover.is_won() && failover.generation == Some(generation));
    found.map(|failover| of_failover(story, failover))
}
