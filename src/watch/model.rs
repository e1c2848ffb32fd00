//! What the answers of sides come to: samples and keys in, a view out. It has no clock: whoever tells it
//! something tells it the time.

use super::changes;
use super::facts;
use crate::check::Level;
use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vmft_backup::status::{ChannelStatus, SideStatus};

/// How far back a history goes, where sides are asked often.
const SPAN: Duration = Duration::from_secs(120);
/// The least that it has, where they are not.
const LEAST_SAMPLES: u32 = 60;
/// Events that are kept; older ones are forgotten.
const EVENTS: usize = 1000;
/// A side that is asked and does not answer is said to be silent after so long.
const SILENCE: Duration = Duration::from_secs(2);
/// How far a page goes.
const PAGE: usize = 5;

/// A moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Since the view began.
    pub(crate) at: Duration,
    /// Seconds since 1970.
    pub(crate) unix_s: u64,
}

impl Stamp {
    /// Now, of a view that began then.
    pub(crate) fn now(began: Instant) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { at: began.elapsed(), unix_s: wall.as_secs() }
    }

    /// Hours, minutes and seconds of the day, UTC.
    pub(crate) fn time_of_day(self) -> String {
        let of_day = self.unix_s % 86_400;
        format!("{:02}:{:02}:{:02}", of_day / 3600, of_day / 60 % 60, of_day % 60)
    }
}

/// What a side has answered, or why it has not: one line, which a terminal may be shown.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) side: usize,
    pub(crate) at: Stamp,
    pub(crate) answer: Result<Box<SideStatus>, String>,
}

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// The end.
    Quit,
    /// The view stands still, or goes on.
    Pause,
    /// The keys are shown, or not any more.
    Help,
    /// Older events, a line.
    Up,
    /// Newer ones.
    Down,
    /// A page of older ones.
    PageUp,
    /// A page of newer ones.
    PageDown,
    /// The oldest.
    Oldest,
    /// The newest.
    Newest,
}

/// Whether there is more to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) enum Flow {
    GoOn,
    End,
}

/// What is measured of a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measured {
    /// Milliseconds that the backup is behind.
    Lag,
    /// Megabits of log a second.
    Log,
    /// Microseconds until an acknowledgement.
    Acknowledgement,
    /// Outputs that wait.
    Outputs,
}

impl Measured {
    const ALL: [Self; 4] = [Self::Lag, Self::Log, Self::Acknowledgement, Self::Outputs];

    const fn label(self) -> &'static str {
        match self {
            Self::Lag => "lag",
            Self::Log => "log",
            Self::Acknowledgement => "ack",
            Self::Outputs => "outputs",
        }
    }
}

/// Values of the last minutes, oldest first.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Series {
    pub(crate) points: Vec<(Duration, f64)>,
    /// When the newest of them may have been.
    pub(crate) now: Duration,
    /// From one to the next.
    pub(crate) interval: Duration,
}

/// How far back histories go.
fn span(interval: Duration) -> Duration {
    SPAN.max(interval * LEAST_SAMPLES)
}

impl Series {
    /// As so many columns, each with the largest value of its time, as a share of the largest of all in
    /// thousandths; `None` where nothing was measured. The columns' times do not move with the present, so a
    /// value stays in its column.
    pub(crate) fn columns(&self, width: usize) -> Vec<Option<u64>> {
        if width == 0 {
            return Vec::new();
        }
        let columns = u32::try_from(width).unwrap_or(u32::MAX);
        // A column that is shorter than the interval would be empty every now and then.
        let each = (span(self.interval) / columns).max(self.interval).max(Duration::from_nanos(1));
        let number = |at: Duration| at.as_nanos() / each.as_nanos();
        let last = number(self.now);
        let mut columns = vec![None; width];
        for (at, value) in &self.points {
            let age = usize::try_from(last.saturating_sub(number(*at))).unwrap_or(usize::MAX);
            if let Some(place) = width.checked_sub(age.saturating_add(1)) {
                let column: &mut Option<f64> = &mut columns[place];
                *column = Some(column.map_or(*value, |other| other.max(*value)));
            }
        }
        let largest = columns.iter().flatten().copied().fold(0.0, f64::max);
        let share = |value: f64| {
            if largest > 0.0 { (value / largest * 1000.0).round() as u64 } else { 0 }
        };
        columns.into_iter().map(|column| column.map(share)).collect()
    }
}

/// A line of a side.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Line {
    /// Words.
    Text { label: String, level: Level, text: String },
    /// A number, and what it was before.
    Measure { label: &'static str, value: String, history: Series },
}

/// A side, as it is shown.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SideView {
    pub(crate) name: String,
    pub(crate) level: Level,
    /// What it is.
    pub(crate) head: String,
    /// The most important first.
    pub(crate) lines: Vec<Line>,
}

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EventLine {
    pub(crate) time: String,
    pub(crate) side: String,
    pub(crate) level: Level,
    pub(crate) text: String,
    /// Of what comes and goes: how often it has come. Only the last time is told.
    pub(crate) times: u32,
}

/// Everything that is shown.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct View {
    pub(crate) sides: Vec<SideView>,
    /// Oldest first.
    pub(crate) events: Vec<EventLine>,
    /// How many of the newest are below the last that is shown.
    pub(crate) newer: usize,
    pub(crate) is_paused: bool,
    pub(crate) shows_keys: bool,
    pub(crate) interval: Duration,
}

/// A side, as it is known.
#[derive(Debug)]
struct Known {
    name: String,
    /// The last answer.
    status: Option<(Stamp, Box<SideStatus>)>,
    /// Since when there has been none, and why not.
    away: Option<(Stamp, String)>,
    points: VecDeque<(Duration, [Option<f64>; 4])>,
}

/// The sides, as far as they have told, and how they are looked at.
#[derive(Debug)]
pub(crate) struct Model {
    sides: Vec<Known>,
    events: VecDeque<EventLine>,
    interval: Duration,
    /// Since when they are asked without a break.
    asked_since: Duration,
    newer: usize,
    shows_keys: bool,
    /// The view that stands still.
    paused: Option<View>,
}

impl Model {
    /// Nothing is known yet of sides with these names, which are asked so often.
    pub(crate) fn new(names: Vec<String>, interval: Duration) -> Self {
        let known = |name| Known { name, status: None, away: None, points: VecDeque::new() };
        Self {
            sides: names.into_iter().map(known).collect(),
            events: VecDeque::new(),
            interval,
            asked_since: Duration::ZERO,
            newer: 0,
            shows_keys: false,
            paused: None,
        }
    }

    /// Nobody was asked for a while; from now on, all are again.
    pub(crate) fn ask_again(&mut self, now: Stamp) {
        self.asked_since = now.at;
    }

    /// What a side has said last, if it has; and whether it was there when it was asked last.
    pub(crate) fn last(&self, side: usize) -> (Option<&SideStatus>, bool) {
        let side = &self.sides[side];
        let status = side.status.as_ref().map(|(_, status)| &**status);
        (status, status.is_some() && side.away.is_none())
    }

    /// A side was asked.
    pub(crate) fn handle_sample(&mut self, sample: Sample) -> Flow {
        let Sample { side, at, answer } = sample;
        let changes = self.sides[side].learn(at, answer, span(self.interval));
        for change in changes {
            self.add_event(side, at, change);
        }
        while self.events.len() > EVENTS {
            self.events.pop_front();
        }
        self.scroll_to(self.newer);
        Flow::GoOn
    }

    fn add_event(&mut self, side: usize, at: Stamp, change: changes::Change) {
        let changes::Change { level, text, swings } = change;
        let (side, time) = (self.sides[side].name.clone(), at.time_of_day());
        let (mut times, reads_older) = (0, self.newer > 0);
        if swings {
            let mut last: Vec<usize> = (0..self.events.len()).rev().collect();
            last.retain(|place| self.events[*place].side == side);
            let of = |nth: usize| last.get(nth).map_or(0, |place| self.events[*place].times);
            times = of(0).max(1);
            if of(0) > 0 && of(1) > 0 {
                // It has come and gone, and comes again.
                times += 1;
                for place in &last[..2] {
                    self.events.remove(*place);
                    self.newer -= usize::from(self.newer > self.events.len() - place);
                }
            }
        }
        let text = if times > 1 { format!("{text} ({times} times)") } else { text };
        self.events.push_back(EventLine { time, side, level, text, times });
        if reads_older {
            // Whoever reads older ones goes on with them.
            self.newer += 1;
        }
    }

    /// A key was pressed.
    pub(crate) fn handle_key(&mut self, key: Key, now: Stamp) -> Flow {
        match key {
            Key::Quit => return Flow::End,
            Key::Pause => {
                self.paused = match self.paused.take() {
                    Some(_) => None,
                    None => Some(View { is_paused: true, ..self.view(now) }),
                };
                self.scroll_to(self.newer);
            }
            Key::Help => self.shows_keys = !self.shows_keys,
            Key::Up => self.scroll_to(self.newer + 1),
            Key::Down => self.scroll_to(self.newer.saturating_sub(1)),
            Key::PageUp => self.scroll_to(self.newer + PAGE),
            Key::PageDown => self.scroll_to(self.newer.saturating_sub(PAGE)),
            Key::Oldest => self.scroll_to(usize::MAX),
            Key::Newest => self.scroll_to(0),
        }
        Flow::GoOn
    }

    /// One event at least stays to be seen.
    fn scroll_to(&mut self, newer: usize) {
        let shown = self.paused.as_ref().map_or(self.events.len(), |view| view.events.len());
        self.newer = newer.min(shown.saturating_sub(1));
    }

    /// What is to be shown.
    pub(crate) fn view(&self, now: Stamp) -> View {
        let (newer, shows_keys) = (self.newer, self.shows_keys);
        if let Some(view) = &self.paused {
            return View { newer, shows_keys, ..view.clone() };
        }
        View {
            sides: self.sides.iter().map(|side| side.view(now, self)).collect(),
            events: self.events.iter().cloned().collect(),
            newer,
            is_paused: false,
            shows_keys,
            interval: self.interval,
        }
    }
}

/// For how long, as people read it.
fn time_between(from: Stamp, to: Stamp) -> String {
    let time = to.at.saturating_sub(from.at);
    facts::seconds(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// Megabits a second between two looks at a session's bytes; `None` where another session has begun.
fn log_rate(before: Option<(Stamp, u64)>, at: Stamp, bytes: u64) -> Option<f64> {
    let (then, before) = before?;
    let time = at.at.checked_sub(then.at).filter(|time| !time.is_zero())?;
    Some(bytes.checked_sub(before)? as f64 * 8.0 / time.as_secs_f64() / 1e6)
}

impl Known {
    /// What there is to tell of an answer, or of none.
    fn learn(
        &mut self,
        at: Stamp,
        answer: Result<Box<SideStatus>, String>,
        span: Duration,
    ) -> Vec<changes::Change> {
        let status = match answer {
            Ok(status) => status,
            Err(why) => return self.miss(at, why),
        };
        self.measure(at, &status);
        while self.points.front().is_some_and(|(then, _)| *then + span < at.at) {
            self.points.pop_front();
        }
        let mut told = Vec::new();
        let away = self.away.take();
        match &self.status {
            None => told.push(changes::first(&status)),
            Some((_, before)) => match away {
                Some((since, _)) => {
                    let time = time_between(since, at);
                    told.extend(changes::again(before, &status, &time));
                }
                None => told.extend(changes::between(before, &status)),
            },
        }
        self.status = Some((at, status));
        told
    }

    fn miss(&mut self, at: Stamp, why: String) -> Vec<changes::Change> {
        match &mut self.away {
            // It is gone in another way: nobody need be told again.
            Some((_, known)) => {
                *known = why;
                Vec::new()
            }
            None => {
                let text = format!("does not answer: {why}");
                self.away = Some((at, why));
                vec![changes::Change { level: Level::Critical, text, swings: false }]
            }
        }
    }

    fn measure(&mut self, at: Stamp, status: &SideStatus) {
        let channel = status.channel.as_ref();
        let bytes = |status: &SideStatus| status.channel.as_ref().map(|channel| channel.log_bytes);
        let before = self.status.as_ref().and_then(|(then, before)| Some((*then, bytes(before)?)));
        let is_live = is_live(status);
        let of_live = |value: fn(&ChannelStatus) -> f64| channel.filter(|_| is_live).map(value);
        let values = Measured::ALL.map(|what| match what {
            Measured::Lag => of_live(|channel| channel.execution_lag_ms),
            Measured::Log => bytes(status).and_then(|bytes| log_rate(before, at, bytes)),
            Measured::Acknowledgement => of_live(|channel| channel.acknowledgement_us),
            Measured::Outputs => is_live.then_some(status.outputs_waiting as f64),
        });
        self.points.push_back((at.at, values));
    }

    fn view(&self, now: Stamp, model: &Model) -> SideView {
        let interval = model.interval;
        let name = self.name.clone();
        let text =
            |label: &str, level, text: String| Line::Text { label: label.to_owned(), level, text };
        let Some((answered, status)) = &self.status else {
            let (level, lines) = match &self.away {
                None => (Level::Unknown, vec![]),
                Some((since, why)) => {
                    let so_long =
                        format!("for {}, asked again and again", time_between(*since, now));
                    let lines = vec![
                        text("away", Level::Warning, so_long),
                        text("why", Level::Warning, why.clone()),
                    ];
                    (Level::Warning, lines)
                }
            };
            return SideView { name, level, head: "has not answered yet".to_owned(), lines };
        };
        if let Some((since, why)) = &self.away {
            let lines = vec![
                text("gone", Level::Critical, format!("for {}", time_between(*since, now))),
                text("why", Level::Critical, why.clone()),
                text("was", Level::Ok, facts::role_and_generation(status)),
            ];
            return SideView {
                name,
                level: Level::Critical,
                head: "does not answer".to_owned(),
                lines,
            };
        }
        let mut lines = Vec::new();
        let mut level = facts::level(status);
        let waits_since = answered.at.max(model.asked_since);
        if now.at.saturating_sub(waits_since) > SILENCE + interval * 2 {
            level = level.max(Level::Warning);
            let so_long = format!("no answer for {}", time_between(*answered, now));
            lines.push(text("silent", Level::Warning, so_long));
        }
        lines.push(text("pair", facts::level(status), facts::protection_now(status)));
        let (guest_level, guest) = facts::guest(status);
        lines.push(text("guest", guest_level, guest));
        for (label, level, trouble) in facts::troubles(status) {
            lines.push(text(&label, level, trouble));
        }
        for (number, what) in Measured::ALL.into_iter().enumerate() {
            if let Some(value) = self.value(what, number, status) {
                let points =
                    self.points.iter().filter_map(|(at, values)| Some((*at, values[number]?)));
                let history = Series { points: points.collect(), now: now.at, interval };
                lines.push(Line::Measure { label: what.label(), value, history });
            }
        }
        if let Some(epochs) = &status.epochs {
            let pause = format!("pause {:.1} ms", epochs.pause_ms);
            lines.push(text("epochs", Level::Ok, format!("{}, {pause}", epochs.epochs)));
        }
        if let Some(address) = facts::joined_at(status) {
            lines.push(text("joins", Level::Ok, address));
        }
        SideView { name, level, head: facts::role_and_generation(status), lines }
    }

    /// A measure in figures; `None` if this side has it not.
    fn value(&self, what: Measured, number: usize, status: &SideStatus) -> Option<String> {
        let is_live = is_live(status);
        let channel = status.channel.as_ref();
        match what {
            Measured::Lag => channel.filter(|_| is_live).map(|channel| match status.lag_bound_ms {
                Some(bound) => format!("{:.1} of {bound} ms", channel.execution_lag_ms),
                None => format!("{:.1} ms", channel.execution_lag_ms),
            }),
            Measured::Log => channel.map(|_| {
                let rate = self.points.back().and_then(|(_, values)| values[number]);
                rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.2} Mbit/s"))
            }),
            Measured::Acknowledgement => channel
                .filter(|_| is_live)
                .map(|channel| format!("{:.0} µs", channel.acknowledgement_us)),
            Measured::Outputs => is_live.then(|| format!("{} waiting", status.outputs_waiting)),
        }
    }
}

/// True for a side whose guest runs here.
fn is_live(status: &SideStatus) -> bool {
    use vmft_backup::status::Role;
    match status.role {
        Role::Unprotected
        | Role::WaitingForBackup
        | Role::Primary
        | Role::Deciding
        | Role::Alone => true,
        Role::Starting | Role::Joining | Role::Backup | Role::Halted | Role::Stopped => false,
    }
}
