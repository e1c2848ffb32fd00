//! What a page shows: the sides' answers in, a picture out. It has no clock, and the page's program only draws.

use super::acts::{Act, Power, ProcessState, has_guest, is_offered};
use super::timeline::{Timeline, of_report};
use crate::check::Level;
use crate::watch::facts;
use crate::watch::model::{Line, Sample, Series, Stamp};
use crate::watch::model::{Model as Watched, SideView};
use serde::{Serialize, Serializer};
use std::collections::VecDeque;
use std::time::Duration;
use vmft_backup::status::{Role, SideStatus};

/// Columns of a plot.
const COLUMNS: usize = 60;
/// Events on a page; older ones are forgotten.
const EVENTS: usize = 100;
/// Generations on a page.
const GENERATIONS: usize = 20;
/// Lines of the console on a page.
const CONSOLE_LINES: usize = 12;

fn level_name<S: Serializer>(level: &Level, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match level {
        Level::Ok => "ok",
        Level::Warning => "warning",
        Level::Critical => "critical",
        Level::Unknown => "unknown",
    })
}

/// Where the guest is, seen from a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Place {
    /// It runs here.
    Here,
    /// It is kept here, by replay or by checkpoints.
    Kept,
    /// It is not here, and may come.
    Elsewhere,
    /// The side is not there.
    Gone,
}

/// A word about a side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Fact {
    pub(super) label: String,
    #[serde(serialize_with = "level_name")]
    pub(super) level: Level,
    pub(super) text: String,
}

/// A number of a side, and what it was before.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Plot {
    pub(super) label: &'static str,
    pub(super) value: String,
    /// The largest that is drawn.
    pub(super) most: String,
    /// Thousandths of that, oldest first; nothing where nothing was measured.
    pub(super) columns: Vec<Option<u64>>,
}

/// A button.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Button {
    pub(super) act: Act,
    pub(super) label: &'static str,
    pub(super) hint: &'static str,
}

/// A side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Side {
    pub(super) name: String,
    #[serde(serialize_with = "level_name")]
    pub(super) level: Level,
    /// What it is.
    pub(super) head: String,
    pub(super) place: Place,
    /// The guest here, in a few words.
    pub(super) guest: String,
    pub(super) facts: Vec<Fact>,
    pub(super) plots: Vec<Plot>,
    pub(super) buttons: Vec<Button>,
}

/// The log on its way from one side to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Link {
    pub(super) from: usize,
    pub(super) to: usize,
    /// How much of it there is.
    pub(super) log: String,
    /// How long acknowledgements take.
    pub(super) acknowledged: String,
    pub(super) flows: bool,
}

/// A reign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Reign {
    pub(super) generation: u64,
    /// Who has it.
    pub(super) side: String,
    /// Since when it has been seen.
    pub(super) since: String,
    /// How it came by it.
    pub(super) how: String,
}

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Event {
    pub(super) time: String,
    pub(super) side: String,
    #[serde(serialize_with = "level_name")]
    pub(super) level: Level,
    pub(super) text: String,
}

/// The pair in one sentence. It changes with the pair, and not with time: it is read aloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Headline {
    #[serde(serialize_with = "level_name")]
    pub(super) level: Level,
    pub(super) text: String,
}

/// Everything that a page shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Picture {
    /// The time of day, UTC.
    pub(super) time: String,
    pub(super) headline: Headline,
    pub(super) sides: Vec<Side>,
    pub(super) links: Vec<Link>,
    /// The newest first.
    pub(super) generations: Vec<Reign>,
    /// The last one.
    pub(super) failover: Option<Timeline>,
    /// The newest first.
    pub(super) events: Vec<Event>,
    /// The last lines of the guest's console, where it is known.
    pub(super) console: Vec<String>,
}

/// The sides, as far as they have told.
#[derive(Debug)]
pub(super) struct Model {
    watched: Watched,
    names: Vec<String>,
    reigns: VecDeque<Reign>,
    failover: Option<Timeline>,
    console: VecDeque<String>,
}

impl Model {
    /// Nothing is known yet of sides with these names, which are asked so often.
    pub(super) fn new(names: Vec<String>, interval: Duration) -> Self {
        Self {
            watched: Watched::new(names.clone(), interval),
            names,
            reigns: VecDeque::new(),
            failover: None,
            console: VecDeque::new(),
        }
    }

    /// Nobody was asked for a while; from now on, all are again.
    pub(super) fn ask_again(&mut self, now: Stamp) {
        self.watched.ask_again(now);
    }

    /// A side was asked.
    pub(super) fn handle_sample(&mut self, sample: Sample) {
        let (side, at) = (sample.side, sample.at);
        let _ = self.watched.handle_sample(sample);
        let (Some(status), true) = self.watched.last(side) else { return };
        let report = status.failover.as_ref();
        if let Some(report) = report {
            let known = self.failover.as_ref();
            let is_new = known.is_none_or(|known| known.generation < report.generation);
            let has_grown = known.is_some_and(|known| {
                known.generation == report.generation
                    && known.is_open
                    && report.first_output_ms.is_some()
            });
            if is_new || has_grown {
                self.failover = Some(of_report(&self.names[side], report));
            }
        }
        let last = self.reigns.back().map_or(0, |reign| reign.generation);
        if has_guest(status.role) && (status.generation > last || self.reigns.is_empty()) {
            let how = report.filter(|report| report.generation == status.generation);
            self.reigns.push_back(Reign {
                generation: status.generation,
                side: self.names[side].clone(),
                since: at.time_of_day(),
                how: how.map_or_else(String::new, |report| report.suspicion.to_string()),
            });
            if self.reigns.len() > GENERATIONS {
                self.reigns.pop_front();
            }
        }
    }

    /// The generation of the last failover, and whether its first output has come.
    pub(super) fn last_failover(&self) -> Option<(u64, bool)> {
        self.failover.as_ref().map(|failover| (failover.generation, !failover.is_open))
    }

    /// Event logs tell of the last failover.
    pub(super) fn handle_story(&mut self, told: Timeline) {
        if let Some(known) = self
            .failover
            .as_mut()
            .filter(|known| known.generation == told.generation && (known.is_open || !told.is_open))
        {
            // The logs' sides may be called otherwise.
            let title = std::mem::take(&mut known.title);
            *known = Timeline { title, ..told };
        }
    }

    /// The guest has printed a line.
    pub(super) fn handle_console_line(&mut self, line: &str) {
        self.console.push_back(facts::shown(line));
        if self.console.len() > CONSOLE_LINES {
            self.console.pop_front();
        }
    }

    /// What is to be shown, with buttons for what may be done to each side.
    pub(super) fn picture(&self, now: Stamp, powers: &[Power]) -> Picture {
        let view = self.watched.view(now);
        let guest = self.guest_at();
        let mut sides: Vec<Side> = Vec::new();
        for (number, shown) in view.sides.into_iter().enumerate() {
            let power = powers.get(number).copied().unwrap_or(Power::Looks);
            sides.push(self.side(number, shown, guest, power));
        }
        let links = self.links(guest, &sides);
        let events = view.events.into_iter().rev().take(EVENTS).map(|event| Event {
            time: event.time,
            side: event.side,
            level: event.level,
            text: event.text,
        });
        Picture {
            time: now.time_of_day(),
            headline: self.headline(guest),
            sides,
            links,
            generations: self.reigns.iter().rev().cloned().collect(),
            failover: self.failover.clone(),
            events: events.collect(),
            console: self.console.iter().cloned().collect(),
        }
    }

    /// What a side says, if it answers.
    fn status(&self, side: usize) -> Option<&SideStatus> {
        let (status, answers) = self.watched.last(side);
        status.filter(|_| answers)
    }

    fn statuses(&self) -> impl Iterator<Item = (usize, &SideStatus)> {
        (0..self.names.len()).filter_map(|side| Some((side, self.status(side)?)))
    }

    /// The side that has the guest: of several that say so, which are asked one after the other, the one whose
    /// reign is the latest.
    fn guest_at(&self) -> Option<usize> {
        let live = self.statuses().filter(|(_, status)| has_guest(status.role));
        live.max_by_key(|(_, status)| status.generation).map(|(side, _)| side)
    }

    fn headline(&self, guest: Option<usize>) -> Headline {
        let say = |level, text: String| Headline { level, text };
        if let Some((name, status)) =
            guest.and_then(|side| Some((&self.names[side], self.status(side)?)))
        {
            let level = facts::level(status);
            let what = match (status.role, status.is_paused) {
                (Role::WaitingForBackup, _) => "rests",
                (_, true) => "is paused",
                (_, false) if status.guest_waits_for.is_some() => "is stopped",
                (_, false) => "runs",
            };
            let protection = match status.role {
                Role::Unprotected => "without a pair".to_owned(),
                _ => facts::protection(status),
            };
            return say(level, format!("The guest {what} on {name}, {protection}"));
        }
        if self.statuses().any(|(_, status)| status.role == Role::Deciding) {
            let text = "A side is lost, and the arbiter is asked who goes on";
            return say(Level::Warning, text.to_owned());
        }
        let known = (0..self.names.len()).filter(|side| self.watched.last(*side).0.is_some());
        let (known, there) = (known.count(), self.statuses().count());
        let is_over = self.statuses().any(|(_, status)| status.role == Role::Stopped);
        match (known, there) {
            (0, _) => say(Level::Unknown, "No side has answered yet".to_owned()),
            (_, 0) => say(Level::Critical, "No side answers any more".to_owned()),
            _ if is_over => say(Level::Critical, "The guest is over".to_owned()),
            _ => say(Level::Critical, "None of the sides that answer runs the guest".to_owned()),
        }
    }

    fn side(&self, number: usize, shown: SideView, guest: Option<usize>, power: Power) -> Side {
        let status = self.status(number);
        let is_frozen = power == Power::Owns(ProcessState::Frozen);
        // What it said before another side took its guest, and has not taken back yet.
        let is_past = guest != Some(number) && status.is_some_and(|status| has_guest(status.role));
        let place = match status.map(|status| status.role) {
            None => Place::Gone,
            Some(_) if guest == Some(number) => Place::Here,
            Some(_) if is_frozen || is_past => Place::Gone,
            Some(Role::Backup) => Place::Kept,
            Some(Role::Halted | Role::Stopped) => Place::Gone,
            Some(_) => Place::Elsewhere,
        };
        let (mut facts, mut plots) = (Vec::new(), Vec::new());
        let mut guest_text = String::new();
        let SideView { name, mut level, head, lines } = shown;
        if is_frozen {
            level = level.max(Level::Warning);
            let (label, text) = ("process".to_owned(), "stands still: SIGSTOP".to_owned());
            facts.push(Fact { label, level: Level::Warning, text });
        }
        for line in lines {
            match line {
                Line::Text { label, text, .. } if label == "guest" => guest_text = text,
                Line::Text { label, level, text } => facts.push(Fact { label, level, text }),
                Line::Measure { label, value, history } => {
                    plots.push(plot(label, value, &history));
                }
            }
        }
        if place == Place::Elsewhere {
            // That it is not here is said by the place.
            guest_text.clear();
        }
        if is_past {
            level = level.max(Level::Warning);
            guest_text = "runs on another side by now".to_owned();
        }
        let offered = Act::ALL.into_iter().filter(|act| is_offered(*act, power, status));
        let buttons =
            offered.map(|act| Button { act, label: act.label(), hint: act.hint() }).collect();
        Side { name, level, head, place, guest: guest_text, facts, plots, buttons }
    }

    /// The log goes from the side that has the guest to all that follow it.
    fn links(&self, guest: Option<usize>, sides: &[Side]) -> Vec<Link> {
        let Some(from) = guest else { return Vec::new() };
        let value = |label: &str| {
            let found = sides[from].plots.iter().find(|plot| plot.label == label);
            found.map_or_else(String::new, |plot| plot.value.clone())
        };
        let generation = self.status(from).map(|status| status.generation);
        let of_pair = self.statuses().filter(|(_, status)| {
            status.role == Role::Backup && Some(status.generation) == generation
        });
        let has_followers = self.status(from).is_some_and(|status| status.followers > 0);
        of_pair
            .filter(|_| has_followers)
            .map(|(to, _)| {
                let (log, acknowledged) = (value("log"), value("acknowledgement"));
                let flows = !log.starts_with("0.00 ") && log != "-" && !log.is_empty();
                Link { from, to, log, acknowledged, flows }
            })
            .collect()
    }
}

/// A measure as a page has it.
fn plot(short: &str, value: String, history: &Series) -> Plot {
    let most = history.points.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    let (label, most) = match short {
        "lag" => ("lag", format!("{most:.1} ms")),
        "log" => ("log", format!("{most:.2} Mbit/s")),
        "ack" => ("acknowledgement", format!("{most:.0} µs")),
        _ => ("outputs", format!("{most:.0}")),
    };
    Plot { label, value, most, columns: history.columns(COLUMNS) }
}
