//! Views of sides that are made up: what they say, and how it looks.

use super::draw::{Colours, draw};
use super::model::{Flow, Key, Line, Model, Sample, Series, Stamp, View};
use crate::check::Level;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::Color;
use std::time::Duration;
use vmft_backup::status::{
    ChannelStatus, DiskState, DiskTroubleStatus, DivergenceReport, EpochReport, FailoverReport,
    JoinReport, Role, SideStatus,
};

const INTERVAL: Duration = Duration::from_millis(500);

/// So many milliseconds after the view began, at noon.
fn at(ms: u64) -> Stamp {
    Stamp { at: Duration::from_millis(ms), unix_s: 1_796_040_000 + ms / 1000 }
}

fn primary(log_bytes: u64, lag_ms: f64) -> SideStatus {
    SideStatus {
        role: Role::Primary,
        generation: 1,
        listening: Some("127.0.0.1:7000".to_owned()),
        guest_time_ms: 12_345,
        followers: 1,
        lag_bound_ms: Some(120),
        outputs_waiting: 2,
        channel: Some(ChannelStatus {
            log_bytes,
            execution_lag_ms: lag_ms,
            acknowledgement_us: 180.0,
            ..ChannelStatus::default()
        }),
        ..SideStatus::default()
    }
}

fn backup(log_bytes: u64) -> SideStatus {
    SideStatus {
        role: Role::Backup,
        generation: 1,
        channel: Some(ChannelStatus { log_bytes, ..ChannelStatus::default() }),
        ..SideStatus::default()
    }
}

/// The backup, after it has taken over.
fn survivor() -> SideStatus {
    let failover = FailoverReport {
        generation: 2,
        suspicion: "connection closed".into(),
        detection_ms: 0.4,
        arbiter_ms: 0.8,
        first_output_ms: Some(101.2),
        ..FailoverReport::default()
    };
    SideStatus {
        role: Role::Alone,
        generation: 2,
        unprotected_ms: Some(1500),
        guest_time_ms: 14_000,
        guest_idle: true,
        failover: Some(failover),
        ..SideStatus::default()
    }
}

fn tell(model: &mut Model, side: usize, ms: u64, answer: Result<SideStatus, &str>) {
    let answer = answer.map(Box::new).map_err(str::to_owned);
    assert_eq!(model.handle_sample(Sample { side, at: at(ms), answer }), Flow::GoOn);
}

/// A pair that has been looked at for ten seconds.
fn pair() -> Model {
    let mut model = Model::new(vec!["a.api".to_owned(), "b.api".to_owned()], INTERVAL);
    for step in 0..20 {
        let bytes = 10_000 * step * step;
        tell(&mut model, 0, step * 500, Ok(primary(bytes, (step % 5) as f64)));
        tell(&mut model, 1, step * 500 + 10, Ok(backup(bytes)));
    }
    model
}

/// The pair after the loss of its primary.
fn failed_over() -> Model {
    let mut model = pair();
    tell(&mut model, 0, 10_000, Err("No such file or directory (os error 2)"));
    tell(&mut model, 1, 10_010, Ok(survivor()));
    model
}

fn picture(view: &View, width: u16, height: u16, colours: Colours) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    terminal.draw(|frame| draw(frame, view, colours)).expect("it is drawn");
    terminal.backend().buffer().clone()
}

/// A picture's rows, without the spaces at their ends.
fn rows(view: &View, width: u16, height: u16) -> Vec<String> {
    let buffer = picture(view, width, height, Colours::Off);
    let row = |y| -> String { (0..width).map(|x| buffer[(x, y)].symbol()).collect() };
    (0..height).map(|y| row(y).trim_end().to_owned()).collect()
}

/// Several empty rows are one, with their number.
fn assert_picture(view: &View, (width, height): (u16, u16), wanted: &str) {
    let mut shown = String::new();
    for group in rows(view, width, height).chunk_by(|row, next| row.is_empty() && next.is_empty()) {
        let row = match group.len() {
            1 => group[0].clone(),
            empty => format!("~{empty}"),
        };
        shown.push_str(&row);
        shown.push('\n');
    }
    assert_eq!(shown, wanted.trim_start_matches('\n'), "it shows\n{shown}\n");
}

#[test]
fn a_pair_fits_a_small_terminal() {
    assert_picture(
        &pair().view(at(10_000)),
        (40, 10),
        r"
─ a.api ─ primary, generation 1 ────────
 pair    protected by 1 backup
 guest   running, at 12.3 s
 lag     4.0 of 120 ms   ·············██
─ b.api ─ backup, generation 1 ─────────
 pair    protects its primary
 guest   replayed here
─ events (UTC) ─────────────────────────
 12:00:00 b.api backup, generation 1;
 q end  space pause  ? keys
",
    );
}

#[test]
fn a_pair_has_its_sides_beside_each_other() {
    assert_picture(
        &pair().view(at(10_000)),
        (80, 24),
        r"
─ a.api ─ primary, generation 1 ───────│─ b.api ─ backup, generation 1 ─────────
 pair    protected by 1 backup         │ pair    protects its primary
 guest   running, at 12.3 s            │ guest   replayed here
 lag     4.0 of 120 ms   ············██│ log     5.92 Mbit/s     ·············▆█
 log     5.92 Mbit/s     ············▇█│
 ack     180 µs          ············██│
 outputs 2 waiting       ············██│
─ events (UTC) ─────────────────────────────────────────────────────────────────
 12:00:00 a.api primary, generation 1; protected by 1 backup
 12:00:00 b.api backup, generation 1; protects its primary
~13
 q end  space pause  ? keys                                        every 500 ms
",
    );
}

#[test]
fn a_wide_terminal_has_everything() {
    assert_picture(
        &failed_over().view(at(12_300)),
        (160, 50),
        r"
─ a.api ─ does not answer ─────────────────────────────────────────────────────│─ b.api ─ alone, generation 2 ──────────────────────────────────────────────────
 gone    for 2.3 s                                                             │ pair    UNPROTECTED, for 1.5 s
 why     No such file or directory (os error 2)                                │ guest   idle, at 14.0 s
 was     primary, generation 1                                                 │ outputs 0 waiting       ····················································· ·
─ events (UTC) ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
 12:00:00 a.api primary, generation 1; protected by 1 backup
 12:00:00 b.api backup, generation 1; protects its primary
 12:00:10 a.api does not answer: No such file or directory (os error 2)
 12:00:10 b.api took generation 2: connection closed; detection 0.4 ms, arbiter 0.8 ms, replay 0.0 ms
 12:00:10 b.api alone, generation 2
 12:00:10 b.api its first output came 101.2 ms after the peer's last sign
~38
 q end  space pause  ? keys                                                                                                                        every 500 ms
",
    );
}

#[test]
fn the_keys_are_shown_over_a_view_that_stands_still() {
    let mut model = failed_over();
    for key in [Key::Pause, Key::Help] {
        assert_eq!(model.handle_key(key, at(12_300)), Flow::GoOn);
    }
    assert_picture(
        &model.view(at(12_300)),
        (40, 10),
        r"
─ a.api ─ does not answer ──────────────
┌ keys ────────────────────────────────┐
│ q Esc Ctrl-C  end                    │
│ Space         stand still, or go on  │
│ Up Down       older and newer events │
│ PgUp PgDn     the same, by pages     │
│ Home End      the oldest, the newest │
│ ?             these keys             │
└──────────────────────────────────────┘
 q end  space pause  ? keys      PAUSED
",
    );
}

#[test]
fn a_picture_has_any_size() {
    let mut model = failed_over();
    for keys in [false, true] {
        if keys {
            assert_eq!(model.handle_key(Key::Help, at(12_300)), Flow::GoOn);
        }
        let view = model.view(at(12_300));
        for width in (0..50).chain([79, 80, 300]) {
            for height in (0..16).chain([60]) {
                picture(&view, width, height, Colours::On);
            }
        }
    }
}

#[test]
fn sides_that_do_not_all_fit_are_cut_and_events_keep_their_part() {
    let names = (0..6).map(|number| format!("{number}.api")).collect();
    let mut model = Model::new(names, INTERVAL);
    for side in 0..6 {
        tell(&mut model, side, 0, Ok(primary(0, 0.0)));
    }
    let shown = rows(&model.view(at(0)), 40, 16);
    let titles = shown.iter().filter(|row| row.contains(".api ─ ") && row.starts_with("─"));
    assert_eq!(titles.count(), 6, "{shown:#?}");
    assert!(shown.iter().any(|row| row.contains("events")), "{shown:#?}");
}

#[test]
fn without_colours_there_are_none_and_with_them_trouble_is_seen() {
    let view = failed_over().view(at(12_300));
    let colours = |colours| {
        let buffer = picture(&view, 80, 24, colours);
        let mut found: Vec<Color> = buffer.content().iter().map(|cell| cell.fg).collect();
        found.sort_by_key(|colour| format!("{colour:?}"));
        found.dedup();
        found
    };
    assert_eq!(colours(Colours::Off), [Color::Reset]);
    let found = colours(Colours::On);
    assert!(found.contains(&Color::Red) && found.contains(&Color::Yellow), "{found:?}");
}

/// A side whose every text is of somebody who means ill.
fn hostile() -> SideStatus {
    const EVIL: &str = "\x1b[2J\x1b]0;x\x07\n\u{202e}\u{9b}31mz";
    let disk = DiskTroubleStatus {
        disk: 0,
        path: EVIL.into(),
        state: DiskState::Stopped,
        what: EVIL.to_owned(),
        error: Some(EVIL.into()),
        is_full: false,
        requests: u64::MAX,
        for_ms: u64::MAX,
    };
    let unreachable = DiskTroubleStatus { disk: 1, state: DiskState::Unreachable, ..disk.clone() };
    SideStatus {
        role: Role::Alone,
        generation: u64::MAX,
        listening: Some(EVIL.to_owned()),
        guest_time_ms: u64::MAX,
        guest_waits_for: Some(EVIL.to_owned()),
        disk_troubles: vec![disk, unreachable],
        console_trouble: Some(EVIL.to_owned()),
        outputs_waiting: u64::MAX,
        unprotected_ms: Some(u64::MAX),
        events_lost: u64::MAX,
        lag_bound_ms: Some(u64::MAX),
        channel: Some(ChannelStatus {
            log_bytes: u64::MAX,
            execution_lag_ms: f64::MAX,
            acknowledgement_us: f64::MAX,
            ..ChannelStatus::default()
        }),
        failover: Some(FailoverReport { suspicion: EVIL.into(), ..FailoverReport::default() }),
        join: Some(JoinReport { total_ms: f64::MAX, ..JoinReport::default() }),
        epochs: Some(EpochReport { epochs: u64::MAX, ..EpochReport::default() }),
        divergences: u64::MAX,
        divergence: Some(DivergenceReport { text: EVIL.into(), ..DivergenceReport::default() }),
        reason: Some(EVIL.into()),
        ..SideStatus::default()
    }
}

#[test]
fn foreign_text_is_shown_and_not_obeyed() {
    let mut model = Model::new(vec!["a".to_owned()], INTERVAL);
    tell(&mut model, 0, 0, Ok(SideStatus::default()));
    tell(&mut model, 0, 500, Ok(hostile()));
    let halted = SideStatus { role: Role::Halted, ..hostile() };
    tell(&mut model, 0, 1000, Ok(hostile()));
    let shown = rows(&model.view(at(1000)), 120, 60).concat();
    tell(&mut model, 0, 1500, Ok(halted));
    let shown = shown + &rows(&model.view(at(1500)), 120, 60).concat();
    let obeyed = |c: char| c.is_control() || ['\u{202e}', '\u{9b}'].contains(&c);
    assert!(!shown.contains(obeyed), "{shown:?}");
    let lines: Vec<&str> = ["disk 0", "disk 1", "console", "differs", "halted"].into();
    assert!(lines.iter().all(|line| shown.contains(line)), "{shown}");
    assert!(shown.contains(r"\u{1b}[2J") && shown.contains(r"\u{202e}"), "{shown}");
}

#[test]
fn a_side_that_is_not_there_yet_comes_goes_and_comes_back() {
    let mut model = Model::new(vec!["a".to_owned()], INTERVAL);
    let head = |model: &Model, ms| model.view(at(ms)).sides[0].head.clone();
    assert_eq!(head(&model, 0), "has not answered yet");
    tell(&mut model, 0, 0, Err("connection refused"));
    tell(&mut model, 0, 500, Err("no such file"));
    let view = model.view(at(90_000));
    let text = format!("{:?}", view.sides[0].lines);
    assert!(text.contains("for 1 min 30 s") && text.contains("no such file"), "{text}");
    tell(&mut model, 0, 91_000, Ok(primary(0, 0.0)));
    assert_eq!(head(&model, 91_000), "primary, generation 1");
    // One that is asked and does not answer is not gone yet, but does not look well either.
    let silent = model.view(at(96_000));
    let text = format!("{:?}", silent.sides[0].lines);
    assert!(
        silent.sides[0].level == Level::Warning && text.contains("no answer for 5.0 s"),
        "{text}"
    );
    tell(&mut model, 0, 97_000, Err("timed out"));
    assert_eq!(head(&model, 97_000), "does not answer");
    tell(&mut model, 0, 99_000, Ok(primary(0, 0.0)));
    let view = model.view(at(99_000));
    let events: Vec<&str> = view.events.iter().map(|event| event.text.as_str()).collect();
    let wanted = [
        "does not answer: connection refused",
        "primary, generation 1; protected by 1 backup",
        "does not answer: timed out",
        "answers again after 2.0 s: primary, generation 1; protected by 1 backup",
    ];
    assert_eq!(events, wanted);
    assert_eq!(view.events[0].time, "12:00:00");
}

#[test]
fn what_happened_between_two_answers_is_told_once() {
    let mut model = Model::new(vec!["a".to_owned()], INTERVAL);
    let joined = |total_ms| Some(JoinReport { total_ms, pause_ms: 3.0, ..JoinReport::default() });
    let trouble = DiskTroubleStatus {
        disk: 0,
        path: "/a.img".into(),
        state: DiskState::Stopped,
        what: "writing 512 bytes at byte 0".to_owned(),
        error: Some("no room".into()),
        is_full: true,
        requests: 1,
        for_ms: 100,
    };
    let steps = [
        primary(0, 0.0),
        SideStatus { guest_slowed: true, ..primary(0, 90.0) },
        primary(0, 0.0),
        SideStatus {
            guest_waits_for: Some("it is resumed".to_owned()),
            disk_troubles: vec![trouble.clone()],
            ..primary(0, 0.0)
        },
        // It is another moment of the same.
        SideStatus {
            guest_waits_for: Some("it is resumed!".to_owned()),
            disk_troubles: vec![DiskTroubleStatus { for_ms: 2100, ..trouble }],
            ..primary(0, 0.0)
        },
        primary(0, 0.0),
        SideStatus { role: Role::Alone, followers: 0, generation: 2, ..primary(0, 0.0) },
        SideStatus { generation: 2, join: joined(200.0), ..primary(0, 0.0) },
        SideStatus {
            generation: 2,
            join: joined(200.0),
            divergences: 1,
            events_lost: 3,
            ..primary(0, 0.0)
        },
        SideStatus {
            generation: 2,
            divergences: 1,
            divergences_mended: 1,
            events_lost: 3,
            join: joined(300.0),
            ..primary(0, 0.0)
        },
    ];
    let mut ms = 0;
    for step in steps {
        // Each is seen more than once.
        for _ in 0..2 {
            tell(&mut model, 0, ms, Ok(step.clone()));
            ms += 500;
        }
    }
    let view = model.view(at(ms));
    let events: Vec<&str> = view.events.iter().map(|event| event.text.as_str()).collect();
    let wanted = [
        "primary, generation 1; protected by 1 backup",
        "the guest is slowed, because its backup is behind",
        "the guest is not slowed any more",
        "the guest is stopped until it is resumed",
        "disk /a.img: writing 512 bytes at byte 0: no room",
        "the guest goes on",
        "disk /a.img is well again, after 2.1 s",
        "alone, generation 2",
        "UNPROTECTED",
        "primary, generation 2",
        "a backup has joined in 200 ms; the guest rested for 3.0 ms",
        "protected by 1 backup",
        "3 events are not in the event log",
        "a backup has joined in 300 ms; the guest rested for 3.0 ms",
        "mended: a backup has joined from a checkpoint",
    ];
    assert_eq!(events, wanted);
}

#[test]
fn a_guest_that_is_slowed_now_and_then_is_told_of_once_with_how_often() {
    let mut model = Model::new(vec!["a".to_owned(), "b".to_owned()], INTERVAL);
    let told = |model: &Model, ms| -> Vec<String> {
        let view = model.view(at(ms));
        view.events.iter().map(|event| format!("{} {}", event.side, event.text)).collect()
    };
    tell(&mut model, 1, 0, Ok(backup(0)));
    for step in 0..10 {
        let status = SideStatus { guest_slowed: step % 2 == 1, ..primary(0, 0.0) };
        tell(&mut model, 0, step * 500, Ok(status));
    }
    let wanted = [
        "b backup, generation 1; protects its primary",
        "a primary, generation 1; protected by 1 backup",
        "a the guest is slowed, because its backup is behind (5 times)",
    ];
    assert_eq!(told(&model, 5000), wanted);
    assert_eq!(model.handle_key(Key::Up, at(5000)), Flow::GoOn);
    tell(&mut model, 0, 5000, Ok(primary(0, 0.0)));
    assert_eq!(model.view(at(5000)).newer, 2);
    assert_eq!(told(&model, 5000)[3], "a the guest is not slowed any more (5 times)");
    // Whoever reads what was before all that still does.
    tell(&mut model, 0, 5500, Ok(SideStatus { guest_slowed: true, ..primary(0, 0.0) }));
    assert_eq!(model.view(at(5500)).newer, 1);
    assert_eq!(
        told(&model, 5500)[2..],
        ["a the guest is slowed, because its backup is behind (6 times)"]
    );
    // After something else it counts anew.
    tell(&mut model, 0, 6000, Err("gone"));
    tell(&mut model, 0, 6500, Ok(primary(0, 0.0)));
    tell(&mut model, 0, 7000, Ok(SideStatus { guest_slowed: true, ..primary(0, 0.0) }));
    let last = told(&model, 7000).pop().expect("an event");
    assert_eq!(last, "a the guest is slowed, because its backup is behind");
}

#[test]
fn a_paused_view_stands_still_and_events_are_read_in_it() {
    let mut model = pair();
    assert_eq!(model.handle_key(Key::Pause, at(10_000)), Flow::GoOn);
    let paused = model.view(at(10_000));
    assert!(paused.is_paused);
    tell(&mut model, 0, 10_500, Err("gone"));
    assert_eq!(model.view(at(60_000)), paused);
    assert_eq!(model.handle_key(Key::Up, at(60_000)), Flow::GoOn);
    assert_eq!(model.view(at(60_000)), View { newer: 1, ..paused.clone() });
    assert_eq!(model.handle_key(Key::Newest, at(60_000)), Flow::GoOn);
    assert_eq!(model.handle_key(Key::Pause, at(60_000)), Flow::GoOn);
    let view = model.view(at(60_000));
    assert!(!view.is_paused && view.events.len() == paused.events.len() + 1);
    assert_eq!(view.sides[0].head, "does not answer");
}

#[test]
fn events_are_scrolled_through_and_stay_where_their_reader_is() {
    let mut model = Model::new(vec!["a".to_owned()], INTERVAL);
    for step in 0..20 {
        let status = SideStatus { generation: step, ..primary(0, 0.0) };
        tell(&mut model, 0, step * 500, Ok(status));
    }
    let press = |model: &mut Model, key| {
        assert_eq!(model.handle_key(key, at(10_000)), Flow::GoOn);
        model.view(at(10_000)).newer
    };
    assert_eq!(press(&mut model, Key::Down), 0);
    assert_eq!(press(&mut model, Key::Up), 1);
    assert_eq!(press(&mut model, Key::PageUp), 6);
    tell(&mut model, 0, 10_000, Ok(SideStatus { generation: 99, ..primary(0, 0.0) }));
    let view = model.view(at(10_000));
    assert_eq!(view.newer, 7);
    let shown = rows(&view, 80, 24).join("\n");
    assert!(shown.contains("7 newer below") && !shown.contains("generation 99;"), "{shown}");
    assert!(shown.contains("primary, generation 13") && !shown.contains("primary, generation 14"));
    assert_eq!(press(&mut model, Key::Oldest), 20);
    assert_eq!(press(&mut model, Key::PageDown), 15);
    assert_eq!(press(&mut model, Key::Newest), 0);
    assert_eq!(model.handle_key(Key::Quit, at(10_000)), Flow::End);
}

#[test]
fn a_history_has_its_largest_values_and_gaps_where_nothing_was_measured() {
    let points = |points: &[(u64, f64)]| {
        points.iter().map(|(ms, value)| (Duration::from_millis(*ms), *value)).collect()
    };
    let now = Duration::from_secs(120);
    let series = |found: &[(u64, f64)], interval| Series { points: points(found), now, interval };
    // Twelve columns of ten seconds, of which the last has just begun.
    let shown = series(
        &[(500, 9.0), (10_000, 1.0), (100_500, 2.0), (101_000, 8.0), (120_000, 0.0)],
        INTERVAL,
    );
    let mut wanted = [None; 12];
    (wanted[9], wanted[11]) = (Some(1000), Some(0));
    let columns = shown.columns(12);
    assert_eq!(columns[9..], wanted[9..], "{columns:?}");
    assert_eq!(columns[0], Some(125));
    // A minute between two of them: they are side by side all the same.
    let rare = series(&[(0, 1.0), (60_000, 1.0), (120_000, 2.0)], Duration::from_secs(60));
    let mut wanted = [None; 100];
    (wanted[97], wanted[98], wanted[99]) = (Some(500), Some(500), Some(1000));
    assert_eq!(rare.columns(100), wanted);
    assert_eq!(series(&[], INTERVAL).columns(3), [None; 3]);
    assert!(series(&[(0, 1.0)], INTERVAL).columns(0).is_empty());
}

#[test]
fn the_rate_of_a_log_is_that_between_two_answers_and_not_of_another_session() {
    let mut model = Model::new(vec!["a".to_owned()], INTERVAL);
    let rate = |model: &Model, ms| {
        let view = model.view(at(ms));
        let log = view.sides[0].lines.iter().find_map(|line| match line {
            Line::Measure { label: "log", value, .. } => Some(value.clone()),
            _ => None,
        });
        log.expect("it has a log")
    };
    tell(&mut model, 0, 0, Ok(backup(1_000_000)));
    assert_eq!(rate(&model, 0), "-");
    tell(&mut model, 0, 500, Ok(backup(1_500_000)));
    assert_eq!(rate(&model, 500), "8.00 Mbit/s");
    tell(&mut model, 0, 1000, Ok(backup(10)));
    assert_eq!(rate(&model, 1000), "-");
}
