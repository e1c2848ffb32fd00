//! Pictures of sides that are made up.

use super::acts::{Act, Power, ProcessState};
use super::model::{Model, Picture, Place};
use super::short_names;
use super::timeline::{Part, Timeline};
use crate::check::Level;
use crate::watch::model::{Sample, Stamp};
use std::path::PathBuf;
use std::time::Duration;
use vmft_backup::status::{
    ChannelStatus, DiskState, DiskTroubleStatus, FailoverReport, Role, SideStatus,
};

const INTERVAL: Duration = Duration::from_millis(500);

/// So many milliseconds after the model began, at noon.
fn at(ms: u64) -> Stamp {
    Stamp { at: Duration::from_millis(ms), unix_s: 1_796_040_000 + ms / 1000 }
}

fn side(role: Role, generation: u64) -> SideStatus {
    SideStatus { role, generation, ..SideStatus::default() }
}

fn primary(generation: u64, log_bytes: u64) -> SideStatus {
    let channel =
        ChannelStatus { log_bytes, acknowledgement_us: 180.0, ..ChannelStatus::default() };
    SideStatus { followers: 1, channel: Some(channel), ..side(Role::Primary, generation) }
}

/// What a side says that has taken generation 2, and what came of it.
fn survivor(first_output_ms: Option<f64>) -> SideStatus {
    let failover = FailoverReport {
        generation: 2,
        suspicion: "connection closed".into(),
        detection_ms: 1.5,
        arbiter_ms: 0.5,
        replay_ms: 8.0,
        first_output_ms,
        ..FailoverReport::default()
    };
    SideStatus { failover: Some(failover), ..side(Role::Alone, 2) }
}

fn tell(model: &mut Model, side: usize, ms: u64, answer: Result<SideStatus, &str>) {
    let answer = answer.map(Box::new).map_err(str::to_owned);
    model.handle_sample(Sample { side, at: at(ms), answer });
}

fn shown(model: &Model, ms: u64) -> Picture {
    model.picture(at(ms), &[])
}

fn three() -> Model {
    let mut model = Model::new(["a", "b", "c"].map(str::to_owned).into(), INTERVAL);
    for step in 0..4 {
        tell(&mut model, 0, step * 500, Ok(primary(1, step * 125_000)));
        tell(&mut model, 1, step * 500, Ok(side(Role::Backup, 1)));
        tell(&mut model, 2, step * 500, Ok(side(Role::Joining, 1)));
    }
    model
}

fn places(picture: &Picture) -> Vec<Place> {
    picture.sides.iter().map(|side| side.place).collect()
}

#[test]
fn a_protected_guest_is_shown_where_it_lives_with_its_log_on_the_way() {
    let model = Model::new(vec!["a".to_owned()], INTERVAL);
    assert_eq!(shown(&model, 0).headline.text, "No side has answered yet");
    let picture = shown(&three(), 1500);
    assert_eq!(picture.headline.text, "The guest runs on a, protected by 1 backup");
    assert_eq!(picture.headline.level, Level::Ok);
    assert_eq!(places(&picture), [Place::Here, Place::Kept, Place::Elsewhere]);
    let [link] = &picture.links[..] else { panic!("one backup: {:?}", picture.links) };
    assert_eq!((link.from, link.to, link.flows), (0, 1, true));
    assert_eq!((&*link.log, &*link.acknowledged), ("2.00 Mbit/s", "180 µs"));
    let plots: Vec<_> =
        picture.sides[0].plots.iter().map(|plot| (plot.label, &*plot.most)).collect();
    let wanted = [
        ("lag", "0.0 ms"),
        ("log", "2.00 Mbit/s"),
        ("acknowledgement", "180 µs"),
        ("outputs", "0"),
    ];
    assert_eq!(plots, wanted);
    assert_eq!(picture.generations.len(), 1);
    assert!(picture.failover.is_none() && picture.sides.iter().all(|side| side.buttons.is_empty()));
}

#[test]
fn a_failover_moves_the_guest_and_is_shown_in_its_parts() {
    let mut model = three();
    tell(&mut model, 0, 2000, Err("connection refused"));
    tell(&mut model, 1, 2000, Ok(side(Role::Deciding, 1)));
    let picture = shown(&model, 2000);
    assert_eq!(picture.headline.level, Level::Warning);
    assert!(picture.headline.text.contains("the arbiter is asked"), "{:?}", picture.headline);
    assert!(picture.links.is_empty());

    tell(&mut model, 1, 2500, Ok(survivor(None)));
    let picture = shown(&model, 2500);
    assert_eq!(picture.headline.text, "The guest runs on b, UNPROTECTED");
    assert_eq!(places(&picture), [Place::Gone, Place::Here, Place::Elsewhere]);
    let reigns: Vec<_> = picture
        .generations
        .iter()
        .map(|reign| (reign.generation, &*reign.side, &*reign.how))
        .collect();
    assert_eq!(reigns, [(2, "b", "connection closed"), (1, "a", "")]);
    let failover = picture.failover.expect("it was told");
    assert!(failover.is_open && failover.title == "b takes generation 2: connection closed");
    assert_eq!(failover.total_ms, 10.0);

    tell(&mut model, 1, 3000, Ok(survivor(Some(110.0))));
    let failover = shown(&model, 3000).failover.expect("it was told");
    let parts: Vec<_> =
        failover.parts.iter().map(|part| (part.name, part.begin_ms, part.ms)).collect();
    let wanted = [
        ("detection", 0.0, 1.5),
        ("test-and-set", 1.5, 0.5),
        ("replay", 2.0, 8.0),
        ("first output", 10.0, 100.0),
    ];
    assert_eq!(parts, wanted);
    assert!(!failover.is_open && failover.total_ms == 110.0);
    // Somebody follows again.
    tell(
        &mut model,
        1,
        3500,
        Ok(SideStatus { failover: survivor(None).failover, ..primary(2, 0) }),
    );
    tell(&mut model, 2, 3500, Ok(side(Role::Backup, 2)));
    let picture = shown(&model, 3500);
    assert_eq!(picture.headline.level, Level::Ok);
    assert_eq!((picture.links[0].from, picture.links[0].to), (1, 2));
    assert_eq!(picture.generations.len(), 2);
    assert_eq!(picture.failover.expect("it stays").total_ms, 110.0);
}

#[test]
fn event_logs_tell_more_of_the_same_failover_and_of_no_other() {
    let told = |generation, is_open| Timeline {
        title: "standby (17) takes over".to_owned(),
        generation,
        parts: vec![Part { name: "go-live", begin_ms: 0.0, ms: 3.0 }],
        steps: Vec::new(),
        total_ms: 3.0,
        is_open,
        source: "the event logs",
    };
    let mut model = three();
    model.handle_story(told(2, false));
    assert!(shown(&model, 1500).failover.is_none());
    tell(&mut model, 1, 2000, Ok(survivor(Some(110.0))));
    assert_eq!(model.last_failover(), Some((2, true)));
    for other in [told(3, false), told(2, true)] {
        model.handle_story(other);
        assert_eq!(shown(&model, 2000).failover.expect("known").total_ms, 110.0);
    }
    model.handle_story(told(2, false));
    let failover = shown(&model, 2000).failover.expect("known");
    assert_eq!((failover.total_ms, failover.parts[0].name), (3.0, "go-live"));
    assert_eq!(failover.title, "b takes generation 2: connection closed");
}

#[test]
fn of_two_sides_that_say_they_have_the_guest_the_later_reign_has_it() {
    let mut model = three();
    // The first stands still: what it has said last is not true any more, and it cannot say so.
    tell(&mut model, 1, 2000, Ok(survivor(Some(110.0))));
    let owned = |state| [Power::Owns(state), Power::Looks, Power::Looks];
    for state in [ProcessState::Runs, ProcessState::Frozen] {
        let picture = model.picture(at(2000), &owned(state));
        assert_eq!(places(&picture), [Place::Gone, Place::Here, Place::Elsewhere]);
        let old = &picture.sides[0];
        assert_eq!(old.level, Level::Warning);
        assert_eq!(old.guest, "runs on another side by now");
        let says = old.facts.iter().any(|fact| fact.text.contains("SIGSTOP"));
        assert_eq!(says, state == ProcessState::Frozen);
    }
    // An old reign that is heard of late is no new one.
    tell(&mut model, 0, 2500, Ok(primary(1, 0)));
    assert_eq!(shown(&model, 2500).generations[0].generation, 2);
}

#[test]
fn sides_come_and_go_and_it_is_said_when_none_is_left() {
    let mut model = three();
    for gone in 0..3 {
        tell(&mut model, gone, 2000, Err("gone"));
    }
    let picture = shown(&model, 2000);
    assert_eq!(picture.headline.text, "No side answers any more");
    assert_eq!(places(&picture), [Place::Gone; 3]);
    tell(&mut model, 2, 2500, Ok(side(Role::Joining, 1)));
    assert_eq!(shown(&model, 2500).headline.text, "None of the sides that answer runs the guest");
    tell(&mut model, 0, 3000, Ok(SideStatus { is_paused: true, ..primary(1, 0) }));
    let text = shown(&model, 3000).headline.text;
    assert_eq!(text, "The guest is paused on a, protected by 1 backup");
    tell(&mut model, 0, 3500, Ok(side(Role::Stopped, 1)));
    assert_eq!(shown(&model, 3500).headline.text, "The guest is over");
}

#[test]
fn a_side_that_nobody_has_asked_for_a_while_is_not_called_silent() {
    let mut model = three();
    let is_silent = |model: &Model, ms| {
        shown(model, ms).sides[0].facts.iter().any(|fact| fact.label == "silent")
    };
    assert!(is_silent(&model, 3_600_000));
    model.ask_again(at(3_600_000));
    assert!(!is_silent(&model, 3_600_100));
    assert!(is_silent(&model, 3_605_000));
}

#[test]
fn there_are_buttons_for_what_may_be_done_and_no_others() {
    let acts = |status: SideStatus, power| {
        let mut model = Model::new(vec!["a".to_owned()], INTERVAL);
        tell(&mut model, 0, 0, Ok(status));
        let picture = model.picture(at(0), &[power]);
        picture.sides[0].buttons.iter().map(|button| button.act).collect::<Vec<_>>()
    };
    let runs = Power::Owns(ProcessState::Runs);
    use Act::*;
    assert_eq!(acts(primary(1, 0), Power::Looks), []);
    assert_eq!(acts(primary(1, 0), Power::Asks), [Switch, Pause, Stop]);
    assert_eq!(acts(primary(1, 0), runs), [Switch, Pause, Kill, Freeze, Stop]);
    assert_eq!(acts(side(Role::Alone, 2), Power::Asks), [Pause, Stop]);
    let paused = SideStatus { is_paused: true, ..primary(1, 0) };
    assert_eq!(acts(paused, Power::Asks), [Switch, Resume, Stop]);
    let disk = DiskTroubleStatus {
        disk: 0,
        path: "/a.img".into(),
        state: DiskState::Stopped,
        what: "writing".to_owned(),
        error: None,
        is_full: true,
        requests: 1,
        for_ms: 1,
    };
    let stopped = SideStatus { disk_troubles: vec![disk], ..side(Role::Alone, 2) };
    assert_eq!(acts(stopped, Power::Asks), [Pause, Resume, Stop]);
    assert_eq!(acts(side(Role::Backup, 1), Power::Asks), []);
    assert_eq!(acts(side(Role::Backup, 1), runs), [FlipBit, Kill, Freeze]);
    assert_eq!(acts(side(Role::Halted, 1), Power::Asks), []);
    assert_eq!(acts(primary(1, 0), Power::Owns(ProcessState::Frozen)), [Kill, Thaw]);
    assert_eq!(acts(primary(1, 0), Power::Owns(ProcessState::Gone)), [Start]);
    // One that has never answered can be killed, but not asked.
    let model = Model::new(vec!["a".to_owned()], INTERVAL);
    assert_eq!(model.picture(at(0), &[runs]).sides[0].buttons.len(), 2);
    assert!(model.picture(at(0), &[Power::Asks]).sides[0].buttons.is_empty());
}

#[test]
fn foreign_text_is_shown_and_not_obeyed() {
    const EVIL: &str = "</script>\x1b[2J\u{202e}\u{9b}31m\n";
    let report = FailoverReport {
        generation: u64::MAX,
        suspicion: EVIL.into(),
        detection_ms: f64::MAX,
        arbiter_ms: -1.0,
        replay_ms: f64::MAX,
        first_output_ms: Some(f64::MAX),
        ..FailoverReport::default()
    };
    let evil = SideStatus {
        listening: Some(EVIL.to_owned()),
        guest_waits_for: Some(EVIL.to_owned()),
        console_trouble: Some(EVIL.to_owned()),
        reason: Some(EVIL.into()),
        failover: Some(report),
        ..side(Role::Alone, u64::MAX)
    };
    let mut model = three();
    tell(&mut model, 1, 2000, Ok(evil));
    model.handle_console_line(EVIL);
    let picture = shown(&model, 2000);
    let json = serde_json::to_string(&picture).expect("texts and numbers");
    let obeyed = |c: char| c.is_control() || ['\u{202e}', '\u{9b}'].contains(&c);
    assert!(!json.contains(obeyed) && json.contains("</script>"), "{json}");
    let failover = picture.failover.expect("it was told");
    assert!(failover.total_ms.is_finite() && failover.parts.iter().all(|part| part.ms >= 0.0));
}

#[test]
fn what_a_page_keeps_has_a_bound() {
    let mut model = Model::new(vec!["a".to_owned()], INTERVAL);
    for generation in 0..2000 {
        tell(&mut model, 0, generation * 500, Ok(side(Role::Alone, generation)));
        model.handle_console_line("a line");
    }
    let picture = shown(&model, 1_000_000);
    let counts = [picture.events.len(), picture.generations.len(), picture.console.len()];
    assert_eq!(counts, [100, 20, 12]);
    assert_eq!(picture.generations[0].generation, 1999);
}

#[test]
fn sides_are_called_by_their_sockets_without_what_these_end_with() {
    let names = |paths: &[&str]| short_names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
    assert_eq!(names(&["/run/a.api", "/run/b.sock", "c"]), ["a", "b", "c"]);
    assert_eq!(names(&["/run/a.api", "/run/a.sock"]), ["a.api", "a.sock"]);
    assert_eq!(names(&["/x/vm.api", "/y/vm.api"]), ["/x/vm", "/y/vm"]);
    assert_eq!(names(&["/run/.api"]), [".api"]);
}
