//! A story as text.

use super::{Failover, Happening, Judged, Life, Moment, Story, judge_again};
use std::fmt::{self, Write};
use time::OffsetDateTime;
use vmft_backup::arbiter::Verdict;
use vmft_backup::bounds::BoundChange;
use vmft_backup::events::{Ending, Event, Peer, Record};
use vmft_backup::status::Role;
use vmft_log::foreign::Printable;

/// Where the part's time stands in a line.
const PART_COLUMN: usize = 72;

/// A role as the event log calls it.
pub fn role_name(role: Role) -> String {
    let name = serde_json::to_value(role).ok();
    name.as_ref().and_then(|name| name.as_str()).unwrap_or("unknown").to_owned()
}

/// A moment as a date, to the millisecond.
pub fn date(moment: Moment) -> String {
    OffsetDateTime::from_unix_timestamp_nanos(moment.0).map_or_else(
        |_| "an unknown date".to_owned(),
        |date| {
            format!(
                "{}-{:02}-{:02} {:02}:{:02}:{:02}.{:03} UTC",
                date.year(),
                u8::from(date.month()),
                date.day(),
                date.hour(),
                date.minute(),
                date.second(),
                date.millisecond()
            )
        },
    )
}

/// A life's name; with its process where several have the same.
pub fn name(story: &Story<'_>, life: usize) -> String {
    let one = &story.lives[life];
    let is_alone = story.lives.iter().filter(|other| other.side == one.side).count() == 1;
    if is_alone { one.side.to_string() } else { format!("{} ({})", one.side, one.pid) }
}

/// Who was lost.
pub fn peer_name(peer: Peer) -> String {
    match peer {
        Peer::Primary => "the primary".to_owned(),
        Peer::Backup(backup) => backup.to_string(),
    }
}

/// A failover in a few words.
pub fn title(story: &Story<'_>, failover: &Failover) -> String {
    let (side, peer) = (name(story, failover.life), peer_name(failover.peer));
    let generation =
        failover.generation.map_or_else(String::new, |number| format!(" in generation {number}"));
    match (&failover.answer, failover.peer) {
        (None, _) => format!("{side} loses {peer}; nothing was decided"),
        (Some(answer), _) if answer.verdict != Verdict::Won => {
            format!("{side} loses {peer}, and another side goes on{generation}")
        }
        (Some(_), Peer::Primary) => format!("{side} takes over from {peer}{generation}"),
        (Some(_), Peer::Backup(_)) => format!("{side} goes on without {peer}{generation}"),
    }
}

/// What happened at one place of a failover; when; and how long its part took.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// When.
    pub at: Moment,
    /// What.
    pub text: String,
    /// The name of the part that ends here, with its time in milliseconds.
    pub part: Option<(&'static str, f64)>,
}

/// The steps of a failover.
pub fn steps(failover: &Failover) -> Vec<Step> {
    let parts = failover.phases();
    let part = |name: &str| {
        let found = parts.iter().find(|(phase, _, _)| phase.name() == name);
        found.map(|(phase, begin, end)| (phase.name(), end.ms_since(*begin)))
    };
    let step = |at, text, part| Step { at, text, part };
    let peer = peer_name(failover.peer);
    let mut steps = vec![
        step(failover.last_sign, format!("last sign of {peer}"), None),
        step(failover.suspected, format!("suspicion: {}", failover.why), part("detection")),
    ];
    if let (Some(asked), Some(generation)) = (failover.asked, failover.generation) {
        steps.push(step(asked, format!("the arbiter is asked for generation {generation}"), None));
    }
    if let Some(answer) = &failover.answer {
        let away = match failover.unreachable {
            0 => String::new(),
            times => format!(", after {times} times without an answer"),
        };
        let text = match &answer.verdict {
            Verdict::Won => format!("the arbiter answers: won{away}"),
            Verdict::Lost { winner } => format!("the arbiter answers: {winner} has it{away}"),
        };
        steps.push(step(answer.at, text, part("test-and-set")));
    } else if failover.unreachable > 0 {
        let text = format!("the arbiter is away, {} times", failover.unreachable);
        steps.push(step(failover.suspected, text, None));
    }
    if let Some((at, point)) = failover.replayed {
        let outputs = failover.outputs.map_or_else(String::new, |(marked, not_out)| {
            format!("; {marked} outputs, {not_out} let out again")
        });
        steps.push(step(at, format!("replayed to point {point}{outputs}"), part("replay")));
    }
    if let Some((at, again)) = failover.live {
        let text = match again {
            0 => "the guest runs here".to_owned(),
            again => format!("the guest runs here; requests issued again: {again}"),
        };
        steps.push(step(at, text, part("go-live")));
    }
    if let Some((at, output)) = failover.first_output {
        steps.push(step(at, format!("first output: number {output}"), part("first output")));
    }
    steps.sort_by_key(|step| step.at);
    steps
}

fn write_failover(text: &mut String, story: &Story<'_>, failover: &Failover) -> fmt::Result {
    writeln!(text, "{}", title(story, failover))?;
    writeln!(text, "  last sign at {}", date(failover.last_sign))?;
    for Step { at, text: what, part } in steps(failover) {
        let line = format!("  {:10.1} ms  {what}", at.ms_since(failover.last_sign));
        match part {
            Some((name, ms)) => writeln!(text, "{line:PART_COLUMN$}  {name:13}{ms:8.1} ms")?,
            None => writeln!(text, "{line}")?,
        }
    }
    let total = failover.end().ms_since(failover.last_sign);
    writeln!(text, "{:PART_COLUMN$}  {:13}{total:8.1} ms", "", "total")
}

/// What a record tells, in a few words; nothing for a judge's.
pub fn describe(record: &Record) -> Option<String> {
    let Record { role, generation, .. } = record;
    Some(match &record.event {
        Event::Begin { program, host, pid, .. } => {
            format!("begins: {program}, process {pid} on {host}")
        }
        Event::Role { from } => {
            let (from, to) = (role_name(*from), role_name(*role));
            format!("{from} -> {to}, generation {generation}")
        }
        Event::JoinBegun { backup } => format!("{backup} is being sent the machine"),
        Event::JoinComplete { backup: Some(backup), .. } => {
            format!("{backup} has joined, and protects")
        }
        Event::JoinComplete { point: Some(point), .. } => format!("joined, at point {point}"),
        Event::JoinComplete { .. } => "joined".to_owned(),
        Event::JoinRefused { with, why, untold } => match untold {
            0 => format!("no join with {with}: {why}"),
            untold => format!("no join with {with}: {why} (and {untold} others before)"),
        },
        Event::PeerLost { peer, why, .. } => format!("{} is lost: {why}", peer_name(*peer)),
        Event::PeerLeft { peer, why } => format!("{} has left: {why}", peer_name(*peer)),
        Event::ArbiterAsked { generation } => {
            format!("the arbiter is asked for generation {}", generation.0)
        }
        Event::ArbiterAnswered { generation, verdict: Verdict::Won } => {
            format!("the arbiter answers: generation {} is won", generation.0)
        }
        Event::ArbiterAnswered { generation, verdict: Verdict::Lost { winner } } => {
            format!("the arbiter answers: generation {} is that of {winner}", generation.0)
        }
        Event::ArbiterUnreachable { why } => format!("the arbiter is away: {why}"),
        Event::ReplayDone { point, marked, not_out } => {
            format!(
                "replayed to point {point}: {} outputs, {not_out} not known to be out",
                marked.0
            )
        }
        Event::Live { point, requests_again } => {
            format!("runs the guest from point {point}; requests issued again: {requests_again}")
        }
        Event::FirstOutput { output } => format!("first output: number {}", output.0),
        Event::Diverged(report) => format!("divergence: {}", report.text),
        Event::Mended => "the divergence is mended".to_owned(),
        Event::Slowed { lag_ms } => format!("slowed: the backup is {lag_ms:.1} ms behind"),
        Event::BoundChanged(BoundChange::MaxLag { ms, .. }) => {
            format!("its operator lets a backup be {ms} ms behind")
        }
        Event::BoundChanged(BoundChange::Interval { ms }) => {
            format!("its operator has checkpoints {ms} ms apart")
        }
        Event::FullSpeed => "at full speed again".to_owned(),
        Event::HeartbeatLate { late_ms } => {
            format!("this side's heartbeat was {late_ms:.1} ms late: its host did not let it run")
        }
        Event::DiskFailed { disk, what, error } => format!("disk {disk}: {what} fails: {error}"),
        Event::DiskHangs { disk, what } => format!("disk {disk}: {what} hangs"),
        Event::DiskAnswers { disk, after_ms } => {
            format!("disk {disk}: what hung has ended, after {:.1} s", after_ms / 1e3)
        }
        Event::GuestStopped { why } => format!("the guest stands still: {why}"),
        Event::GuestResumed { after_ms } => {
            format!("the guest goes on, after {:.1} s", after_ms / 1e3)
        }
        Event::Trouble { text, .. } => text.to_string(),
        Event::FaultPlanted { fault, point } => format!("fault planted at point {point}: {fault}"),
        Event::EventsLost { count } => format!("{count} events are lost here"),
        Event::End { how: Ending::Stopped(reason) } => format!("stopped: {reason:?}"),
        Event::End { how: Ending::Halted(why) } => format!("halted: {why}"),
        Event::End { how: Ending::Failed(why) } => format!("failed: {why}"),
        Event::JudgeBegins { .. } | Event::Heard { .. } | Event::Ordered { .. } => return None,
    })
}

/// A judge's record, in the words of the program.
fn describe_judge(record: &Record) -> Option<String> {
    let text = match &record.event {
        Event::JudgeBegins { number, judge } => format!("judge {number} begins: {judge:?}"),
        Event::Heard { judge, input, .. } => format!("judge {judge} hears {input:?}"),
        Event::Ordered { judge, order } => format!("judge {judge} orders {order:?}"),
        _ => return None,
    };
    Some(Printable(&text).to_string())
}

fn write_judged(text: &mut String, name: &str, life: &Life) -> fmt::Result {
    match judge_again(life) {
        Judged::Agreed { inputs: 0, .. } => Ok(()),
        Judged::Agreed { inputs, orders } => {
            writeln!(
                text,
                "{name}: judged again by this program: {inputs} inputs, all {orders} orders agree"
            )
        }
        Judged::Incomplete => writeln!(text, "{name}: not judged again: records are missing"),
        Judged::Differ { line, mismatch } => {
            let mismatch = mismatch.to_string();
            writeln!(text, "{name}: JUDGED OTHERWISE, line {line}: {}", Printable(&mismatch))
        }
    }
}

/// A whole story; with what the judges heard and ordered, if `all`.
///
/// # Errors
/// None that a text has.
pub fn write(story: &Story<'_>, all: bool) -> Result<String, fmt::Error> {
    let mut text = String::new();
    for failover in &story.failovers {
        write_failover(&mut text, story, failover)?;
        writeln!(text)?;
    }
    if story.failovers.is_empty() {
        writeln!(text, "No peer was lost.\n")?;
    }
    let Some((begin, _)) = story.span() else { return Ok(text) };
    writeln!(text, "Seconds since {}", date(begin))?;
    if !story.has_one_clock {
        writeln!(
            text,
            "(several hosts or boots: put together by their wall clocks, which may differ)"
        )?;
    }
    for Happening { moment, life, record } in &story.happenings {
        let told = describe(record).or_else(|| describe_judge(record).filter(|_| all));
        if let Some(what) = told {
            let seconds = moment.ms_since(begin) / 1e3;
            writeln!(text, "{seconds:10.4}  {:10}  {what}", name(story, *life))?;
        }
    }
    writeln!(text)?;
    for (index, life) in story.lives.iter().enumerate() {
        let name = name(story, index);
        write_judged(&mut text, &name, life)?;
        if life.is_cut {
            writeln!(text, "{name}: the last line is cut: the process died while it wrote")?;
        }
    }
    Ok(text)
}
