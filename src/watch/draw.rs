//! A view as a picture, for a terminal of any size, with colours or without.

use super::model::{EventLine, Line, SideView, View};
use crate::check::Level;
use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols;
use ratatui::text::Span;
use ratatui::widgets::{Block, Clear, Sparkline, Widget};

/// The least that a side needs to stand beside another, in columns.
const COLUMN: u16 = 38;
/// Where the text of a line begins.
const LABEL: u16 = 9;
/// Columns of a number in front of its history.
const VALUE: u16 = 16;
/// Rows that events have at least, their title among them.
const fn event_rows(height: u16) -> u16 {
    if height < 12 { 2 } else { 4 }
}
/// What a column shows in whose time nothing was measured.
const ABSENT: &str = "·";

/// The keys, for whoever asks.
const KEYS: [(&str, &str); 6] = [
    ("q Esc Ctrl-C", "end"),
    ("Space", "stand still, or go on"),
    ("Up Down", "older and newer events"),
    ("PgUp PgDn", "the same, by pages"),
    ("Home End", "the oldest, the newest"),
    ("?", "these keys"),
];

/// Whether there are colours. What they say is said by words, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colours {
    On,
    Off,
}

impl Colours {
    fn of(self, level: Level) -> Style {
        let colour = match (self, level) {
            (Self::On, Level::Ok) => Style::new().fg(Color::Green),
            (Self::On, Level::Warning) => Style::new().fg(Color::Yellow),
            (Self::On, Level::Critical) => Style::new().fg(Color::Red),
            (Self::On, Level::Unknown) | (Self::Off, _) => Style::new(),
        };
        match level {
            Level::Warning | Level::Critical => colour.add_modifier(Modifier::BOLD),
            Level::Ok | Level::Unknown => colour,
        }
    }
}

const TITLE: Style = Style::new().add_modifier(Modifier::BOLD);
const QUIET: Style = Style::new().add_modifier(Modifier::DIM);

/// A row of a side.
struct Row<'a> {
    label: &'a str,
    level: Level,
    text: String,
    history: Option<&'a Line>,
}

/// Columns that a text takes.
fn width_of(text: &str) -> usize {
    Span::raw(text).width()
}

/// A text in rows of at most `width` columns, at the spaces where there are any.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let (mut rows, mut row) = (Vec::new(), String::new());
    for word in text.split(' ') {
        let has_room = row.is_empty() || width_of(&row) + 1 + width_of(word) <= width;
        if !has_room {
            rows.push(std::mem::take(&mut row));
        }
        if !row.is_empty() {
            row.push(' ');
        }
        for c in word.chars() {
            let mut bytes = [0; 4];
            if !row.is_empty() && width_of(&row) + width_of(c.encode_utf8(&mut bytes)) > width {
                rows.push(std::mem::take(&mut row));
            }
            row.push(c);
        }
    }
    rows.push(row);
    rows
}

/// Puts text into a row, cut where the area ends.
fn put(buffer: &mut Buffer, area: Rect, x: u16, y: u16, text: &str, style: Style) -> u16 {
    let inside = x < area.right() && y < area.bottom();
    if !inside || text.is_empty() {
        return x;
    }
    buffer.set_stringn(x, y, text, usize::from(area.right() - x), style).0
}

/// `── title ─────`, with a part of it in a style of its own. `area` has one row.
fn rule(buffer: &mut Buffer, area: Rect, title: &str, more: &str, style: Style) {
    put(buffer, area, area.x, area.y, &"─".repeat(usize::from(area.width)), QUIET);
    let x = put(buffer, area, area.x.saturating_add(1), area.y, &format!(" {title} "), TITLE);
    if !more.is_empty() {
        let x = put(buffer, area, x.saturating_add(1), area.y, " ", style);
        put(buffer, area, x, area.y, &format!("{more} "), style);
    }
}

/// The rows of a side in so many columns.
fn rows_of(side: &SideView, width: u16) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for line in &side.lines {
        match line {
            Line::Text { label, level, text } => {
                let wrapped = wrap(text, usize::from(width.saturating_sub(LABEL)));
                let labels = std::iter::once(label.as_str()).chain(std::iter::repeat(""));
                for (label, text) in labels.zip(wrapped) {
                    rows.push(Row { label, level: *level, text, history: None });
                }
            }
            Line::Measure { label, value, .. } => {
                let (text, history) = (value.clone(), Some(line));
                rows.push(Row { label, level: Level::Unknown, text, history });
            }
        }
    }
    rows
}

fn draw_side(buffer: &mut Buffer, area: Rect, side: &SideView, colours: Colours) {
    if area.is_empty() {
        return;
    }
    let title = Rect { height: 1, ..area };
    rule(buffer, title, &side.name, &side.head, colours.of(side.level));
    let rows = rows_of(side, area.width);
    for (y, row) in (area.y + 1..area.bottom()).zip(&rows) {
        put(buffer, area, area.x + 1, y, row.label, QUIET);
        let x = area.x.saturating_add(LABEL);
        put(buffer, area, x, y, &row.text, colours.of(row.level));
        if let Some(Line::Measure { value, history, .. }) = row.history {
            let after = LABEL + VALUE.max(u16::try_from(width_of(value)).unwrap_or(u16::MAX) + 1);
            let width = area.width.saturating_sub(after);
            if width > 0 {
                let place = Rect { x: area.x + after, y, width, height: 1 };
                Sparkline::default()
                    .data(history.columns(usize::from(width)))
                    .max(1000)
                    .absent_value_symbol(ABSENT)
                    .absent_value_style(QUIET)
                    .bar_set(symbols::bar::NINE_LEVELS)
                    .render(place, buffer);
            }
        }
    }
}

/// Splits what there is among those that want something: each gets its part, and what one does not want the
/// others get.
fn shares(wanted: &[u16], mut room: u16) -> Vec<u16> {
    let mut given = vec![0; wanted.len()];
    while room > 0 {
        let hungry: Vec<usize> = (0..wanted.len()).filter(|at| given[*at] < wanted[*at]).collect();
        if hungry.is_empty() {
            break;
        }
        for at in hungry {
            if room > 0 {
                given[at] += 1;
                room -= 1;
            }
        }
    }
    given
}

/// The sides beside each other, or one above the other; returns the rows that they take.
fn draw_sides(buffer: &mut Buffer, area: Rect, view: &View, colours: Colours) -> u16 {
    let Ok(count) = u16::try_from(view.sides.len()) else { return 0 };
    let height_in = |side: &SideView, width| {
        1 + u16::try_from(rows_of(side, width).len()).unwrap_or(u16::MAX - 1)
    };
    // Events keep a part, but no side is left out for their sake.
    let room = area.height.saturating_sub(event_rows(area.height)).max(area.height.min(count));
    let is_beside =
        count > 1 && area.width >= count.saturating_mul(COLUMN).saturating_add(count - 1);
    if is_beside {
        let width = (area.width - (count - 1)) / count;
        let wanted = view.sides.iter().map(|side| height_in(side, width)).max().unwrap_or(0);
        let height =
            wanted.min(area.height.saturating_sub(event_rows(area.height)).max(1)).min(area.height);
        for (number, side) in (0..count).zip(&view.sides) {
            let x = area.x + number * (width + 1);
            // The last one has what is left.
            let width = if number + 1 == count { area.right() - x } else { width };
            draw_side(buffer, Rect { x, width, height, ..area }, side, colours);
            if number > 0 {
                for y in area.y..area.y + height {
                    put(buffer, area, x - 1, y, "│", QUIET);
                }
            }
        }
        return height;
    }
    let wanted: Vec<u16> = view.sides.iter().map(|side| height_in(side, area.width)).collect();
    let heights = shares(&wanted, room);
    let mut y = area.y;
    for (side, height) in view.sides.iter().zip(heights) {
        draw_side(buffer, Rect { y, height, ..area }, side, colours);
        y += height;
    }
    y - area.y
}

/// An event in rows of so many columns, with its level in the first.
fn rows_of_event(event: &EventLine, width: usize, side_width: usize) -> Vec<String> {
    let head = format!("{} {:side_width$} ", event.time, event.side);
    // Where the head leaves little, the text stands below.
    let indent = if width >= 2 * width_of(&head) { width_of(&head) } else { 2 };
    let text = wrap(&event.text, width.saturating_sub(indent));
    if indent == 2 {
        let rows = text.into_iter().map(|row| format!("  {row}"));
        return std::iter::once(head).chain(rows).collect();
    }
    let heads = std::iter::once(head).chain(std::iter::repeat(" ".repeat(indent)));
    heads.zip(text).map(|(head, text)| format!("{head}{text}")).collect()
}

fn draw_events(buffer: &mut Buffer, area: Rect, view: &View, colours: Colours) {
    if area.is_empty() {
        return;
    }
    let more = match view.newer {
        0 => String::new(),
        newer => format!("{newer} newer below"),
    };
    rule(buffer, Rect { height: 1, ..area }, "events (UTC)", &more, TITLE);
    let shown = &view.events[..view.events.len() - view.newer.min(view.events.len())];
    let side_width = view.sides.iter().map(|side| width_of(&side.name)).max().unwrap_or(0);
    let width = usize::from(area.width.saturating_sub(1));
    // From the bottom up, the newest first.
    let mut left = usize::from(area.height - 1);
    let mut bottom_up = Vec::new();
    for event in shown.iter().rev() {
        if left == 0 {
            break;
        }
        let rows = rows_of_event(event, width, side_width);
        // Of one that does not fit, its beginning.
        let fits = rows.len().min(left);
        bottom_up.extend(rows.into_iter().take(fits).rev().map(|row| (row, event.level)));
        left -= fits;
    }
    for (y, (row, level)) in (area.y + 1..area.bottom()).zip(bottom_up.iter().rev()) {
        let style = match level {
            Level::Ok => Style::new(),
            level => colours.of(*level),
        };
        put(buffer, area, area.x + 1, y, row, style);
    }
}

fn draw_foot(buffer: &mut Buffer, area: Rect, view: &View) {
    let keys = " q end  space pause  ? keys";
    put(buffer, area, area.x, area.y, keys, QUIET);
    let (state, style) = match view.is_paused {
        true => ("PAUSED".to_owned(), TITLE.add_modifier(Modifier::REVERSED)),
        false => (format!("every {} ms", view.interval.as_millis()), QUIET),
    };
    let width = u16::try_from(width_of(&state)).unwrap_or(u16::MAX);
    let x = area.right().saturating_sub(width.saturating_add(1)).max(area.x);
    let is_apart = usize::from(x - area.x) > width_of(keys);
    if is_apart || view.is_paused {
        put(buffer, area, x, area.y, &state, style);
    }
}

fn draw_keys(buffer: &mut Buffer, area: Rect) {
    let wide = KEYS.iter().map(|(_, what)| 15 + width_of(what)).max().unwrap_or(0) + 3;
    let width = area.width.min(u16::try_from(wide).unwrap_or(u16::MAX));
    let height = area.height.min(KEYS.len() as u16 + 2);
    let (x, y) = (area.x + (area.width - width) / 2, area.y + (area.height - height) / 2);
    let place = Rect { x, y, width, height };
    Clear.render(place, buffer);
    let block = Block::bordered().title(" keys ");
    let inside = block.inner(place);
    block.render(place, buffer);
    for (y, (keys, what)) in (inside.y..inside.bottom()).zip(KEYS) {
        let x = put(buffer, inside, inside.x + 1, y, &format!("{keys:14}"), TITLE);
        put(buffer, inside, x, y, what, Style::new());
    }
}

/// Draws a view.
pub(super) fn draw(frame: &mut Frame<'_>, view: &View, colours: Colours) {
    let area = frame.area();
    if area.is_empty() {
        return;
    }
    let buffer = frame.buffer_mut();
    let above = Rect { height: area.height - 1, ..area };
    let taken = draw_sides(buffer, above, view, colours);
    let events = Rect { y: above.y + taken, height: above.height - taken, ..above };
    draw_events(buffer, events, view, colours);
    draw_foot(buffer, Rect { y: area.bottom() - 1, height: 1, ..area }, view);
    if view.shows_keys {
        draw_keys(buffer, area);
    }
}
