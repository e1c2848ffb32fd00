//! A story as a picture: who did what over time, and each failover with its parts.

use super::text::{date, name, role_name, steps, title};
use super::{Failover, Happening, Moment, Phase, Story};
use std::fmt::{self, Write};
use vmft_backup::events::Event;
use vmft_backup::status::Role;

/// The picture's width, and where its plots begin and end, in its units.
const WIDTH: f64 = 960.0;
const LEFT: f64 = 120.0;
const RIGHT: f64 = 930.0;
/// A side's height, and that of a line of text.
const LANE: f64 = 34.0;
const LINE: f64 = 18.0;
/// Roles narrower than this are not named.
const NAMED: f64 = 60.0;

/// Text as XML takes it.
struct Xml<'a>(&'a str);

impl fmt::Display for Xml<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            c if c.is_control() => f.write_char('\u{fffd}'),
            c => f.write_char(c),
        })
    }
}

const fn colour_of_role(role: Role) -> &'static str {
    match role {
        Role::Primary => "#2e7d32",
        Role::Alone | Role::Unprotected => "#ef9a1a",
        Role::WaitingForBackup | Role::Starting | Role::Joining => "#90a4ae",
        Role::Backup => "#1565c0",
        Role::Deciding => "#c62828",
        Role::Halted | Role::Stopped => "#bdbdbd",
    }
}

const fn colour_of_phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Detection => "#c62828",
        Phase::TestAndSet => "#6a1b9a",
        Phase::Replay => "#1565c0",
        Phase::GoLive => "#2e7d32",
        Phase::FirstOutput => "#ef9a1a",
    }
}

/// A scale from moments to places.
struct Scale {
    begin: Moment,
    ms: f64,
}

impl Scale {
    fn new(begin: Moment, end: Moment) -> Self {
        // A story of one moment has a place, too.
        Self { begin, ms: end.ms_since(begin).max(0.001) }
    }

    fn place(&self, at: Moment) -> f64 {
        let part = (at.ms_since(self.begin) / self.ms).clamp(0.0, 1.0);
        LEFT + part * (RIGHT - LEFT)
    }

    /// Round distances between marks, five to twelve of them.
    fn step(&self) -> f64 {
        let rough = self.ms / 6.0;
        let power = 10f64.powf(rough.log10().floor());
        let round = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough);
        round.unwrap_or(10.0) * power
    }

    fn axis(&self, svg: &mut String, top: f64) -> fmt::Result {
        let step = self.step();
        let (unit, per_unit) = if self.ms >= 10_000.0 { ("s", 1000.0) } else { ("ms", 1.0) };
        let mut at = 0.0;
        while at <= self.ms {
            let x = LEFT + at / self.ms * (RIGHT - LEFT);
            writeln!(
                svg,
                "<line x1='{x:.1}' y1='{top:.1}' x2='{x:.1}' y2='{:.1}' class='tick'/><text x='{x:.1}' \
                 y='{:.1}' class='small' text-anchor='middle'>{} {unit}</text>",
                top + 5.0,
                top + 18.0,
                (at / per_unit * 1000.0).round() / 1000.0
            )?;
            at += step;
        }
        Ok(())
    }
}

/// When a life ended: one that was killed does not say so, and lived to its last sign, if a peer has lost it.
fn end_of(story: &Story<'_>, life: usize, last: &Happening<'_>) -> Moment {
    if matches!(last.record.event, Event::End { .. }) {
        return last.moment;
    }
    let lost = story.failovers.iter().filter(|failover| failover.life != life);
    let lost = lost.map(|failover| failover.last_sign).find(|sign| *sign >= last.moment);
    lost.or_else(|| Some(story.span()?.1)).unwrap_or(last.moment)
}

/// The roles of a life over time.
fn lane(svg: &mut String, story: &Story<'_>, life: usize, scale: &Scale, top: f64) -> fmt::Result {
    let own = || story.happenings.iter().filter(|happening| happening.life == life);
    writeln!(
        svg,
        "<text x='{:.1}' y='{:.1}' text-anchor='end'>{}</text>",
        LEFT - 8.0,
        top + 20.0,
        Xml(&name(story, life))
    )?;
    let Some(last) = own().next_back() else { return Ok(()) };
    let end = end_of(story, life, last);
    let mut since: Option<(Moment, Role, u64)> = None;
    let changes = own().filter(|happening| {
        matches!(happening.record.event, Event::Begin { .. } | Event::Role { .. })
    });
    let bars = changes.map(|change| (change.moment, Some(change.record)));
    for (moment, record) in bars.chain([(end, None)]) {
        if let Some((from, role, generation)) = since {
            let (x, end) = (scale.place(from), scale.place(moment));
            let width = (end - x).max(1.0);
            let role_text = role_name(role);
            writeln!(
                svg,
                "<rect x='{x:.1}' y='{top:.1}' width='{width:.1}' height='26' fill='{}'><title>{}, \
                 generation {generation}, from {}</title></rect>",
                colour_of_role(role),
                Xml(&role_text),
                date(from)
            )?;
            if width >= NAMED {
                let (x, y) = (x + 5.0, top + 17.0);
                writeln!(
                    svg,
                    "<text x='{x:.1}' y='{y:.1}' class='inside'>{} {generation}</text>",
                    Xml(&role_text)
                )?;
            }
        }
        if let Some(record) = record {
            since = Some((moment, record.role, record.generation));
        }
    }
    Ok(())
}

/// A failover, its parts to scale and in words. Returns where it ends.
fn panel(
    svg: &mut String,
    story: &Story<'_>,
    failover: &Failover,
    top: f64,
) -> Result<f64, fmt::Error> {
    let scale = Scale::new(failover.last_sign, failover.end());
    writeln!(
        svg,
        "<text x='20' y='{:.1}' class='title'>{}</text>",
        top + 14.0,
        Xml(&title(story, failover))
    )?;
    let bar = top + 26.0;
    for (phase, begin, end) in failover.phases() {
        let (x, end_x) = (scale.place(begin), scale.place(end));
        writeln!(
            svg,
            "<rect x='{x:.1}' y='{bar:.1}' width='{:.1}' height='22' fill='{}'><title>{}: {:.1} ms\
             </title></rect>",
            (end_x - x).max(0.5),
            colour_of_phase(phase),
            phase.name(),
            end.ms_since(begin)
        )?;
    }
    scale.axis(svg, bar + 22.0)?;
    let mut y = bar + 66.0;
    for step in steps(failover) {
        let ms = step.at.ms_since(failover.last_sign);
        writeln!(
            svg,
            "<text x='{LEFT:.1}' y='{y:.1}' text-anchor='end'>{ms:.1} ms</text><text x='{:.1}' \
             y='{y:.1}'>{}</text>",
            LEFT + 14.0,
            Xml(&step.text)
        )?;
        if let Some((part, ms)) = step.part {
            let phase = failover.phases().into_iter().find(|(phase, _, _)| phase.name() == part);
            let colour = phase.map_or("#000", |(phase, _, _)| colour_of_phase(phase));
            writeln!(
                svg,
                "<rect x='{:.1}' y='{:.1}' width='10' height='10' fill='{colour}'/><text x='{RIGHT:.1}' \
                 y='{y:.1}' text-anchor='end'>{part} {ms:.1} ms</text>",
                RIGHT - 190.0,
                y - 9.0
            )?;
        }
        y += LINE;
    }
    let total = failover.end().ms_since(failover.last_sign);
    writeln!(
        svg,
        "<text x='{RIGHT:.1}' y='{y:.1}' class='title' text-anchor='end'>total {total:.1} ms</text>"
    )?;
    Ok(y + LINE)
}

/// The picture.
///
/// # Errors
/// None that a text has.
pub fn draw(story: &Story<'_>) -> Result<String, fmt::Error> {
    let mut inner = String::new();
    let mut top = 50.0;
    if let Some((begin, end)) = story.span() {
        let scale = Scale::new(begin, end);
        writeln!(
            inner,
            "<text x='20' y='28' class='title'>What happened from {} on</text>",
            date(begin)
        )?;
        for failover in &story.failovers {
            let x = scale.place(failover.suspected);
            let bottom = top + LANE * story.lives.len() as f64;
            writeln!(
                inner,
                "<line x1='{x:.1}' y1='{:.1}' x2='{x:.1}' y2='{bottom:.1}' class='lost'/>",
                top - 8.0
            )?;
        }
        for life in 0..story.lives.len() {
            lane(&mut inner, story, life, &scale, top)?;
            top += LANE;
        }
        scale.axis(&mut inner, top)?;
        top += 50.0;
    }
    for failover in &story.failovers {
        top = panel(&mut inner, story, failover, top)? + 20.0;
    }
    Ok(format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH:.0} {top:.0}' \
         font-family='sans-serif' font-size='13'>\n<style>.title{{font-weight:bold;font-size:15px}}\
         .small{{font-size:11px;fill:#555}}.inside{{fill:#fff;font-size:12px}}.tick{{stroke:#555}}\
         .lost{{stroke:#c62828;stroke-dasharray:4 3}}</style>\n\
         <rect width='100%' height='100%' fill='#fff'/>\n{inner}</svg>\n"
    ))
}
