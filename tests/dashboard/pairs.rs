//! Real pairs of a small guest on the page.

use crate::reader::{LIMIT, Page, program};
use std::ffi::OsString;
use std::path::Path;
use vmft::pair::{SideProcess, Which, prefixed};
use vmft_backup::status::SideStatus;
use vmft_guest_images::ProbeGuest;

/// A side of this name, with these words beside those of all sides.
fn start(
    directory: &Path,
    command: &str,
    (which, name): (Which, &str),
    words: &[OsString],
) -> SideProcess {
    let arbiter = ["--arbiter".into(), prefixed("dir=", &directory.join("arbiter"))];
    let words: Vec<OsString> = words.iter().cloned().chain(arbiter).collect();
    SideProcess::start_named(program(), command, (which, name), directory, &words).unwrap()
}

fn peer(directory: &Path, name: &str) -> OsString {
    prefixed("unix:", &directory.join(format!("{name}.peer")))
}

fn primary(directory: &Path) -> SideProcess {
    let guest = ProbeGuest { lines: 1_000_000.try_into().unwrap(), ..ProbeGuest::default() };
    let kernel = directory.join("probe.elf");
    std::fs::write(&kernel, guest.image()).unwrap();
    let words = ["--kernel".into(), kernel.into(), "--memory".into(), "size=64M".into()];
    let listen = ["--listen".into(), peer(directory, "a")];
    let words: Vec<OsString> = words.into_iter().chain(listen).collect();
    let mut side = start(directory, "primary", (Which::Primary, "a"), &words);
    side.wait_status(LIMIT, |status| status.listening.is_some()).unwrap();
    side
}

fn standby(directory: &Path, name: &str, others: [&str; 2]) -> SideProcess {
    let mut words = vec!["--join".into()];
    words.extend(others.map(|other| peer(directory, other)));
    words.extend(["--listen".into(), peer(directory, name)]);
    start(directory, "standby", (Which::Backup, name), &words)
}

fn page(directory: &Path, more: &[&str]) -> Page {
    let sides = ["a.api", "b.api", "c.api"].map(|name| directory.join(name));
    let words = ["dashboard", "--listen", "127.0.0.1:0", "--interval", "100ms"];
    let words = words.into_iter().chain(more.iter().copied()).map(OsString::from);
    Page::start(&words.chain(sides.map(OsString::from)).collect::<Vec<_>>())
}

#[test]
fn a_failover_is_seen_where_it_happens_and_sides_come_and_go() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path();
    let logs = ["a.events", "b.events"].map(|name| directory.join(name).display().to_string());
    let page = page(directory, &["--event-log", &logs[0], "--event-log", &logs[1]]);
    let mut pictures = page.pictures();
    pictures.wait_headline("No side has answered yet");
    let mut a = primary(directory);
    pictures.wait_headline("The guest rests on a, waits for its backup");
    let _b = standby(directory, "b", ["a", "c"]);
    let picture = pictures.wait(|picture| picture["links"][0]["flows"] == true);
    assert_eq!(picture["headline"]["text"], "The guest runs on a, protected by 1 backup");
    assert_eq!((&picture["links"][0]["from"], &picture["links"][0]["to"]), (&0.into(), &1.into()));
    assert_eq!(picture["sides"][0]["place"], "here");
    assert_eq!(picture["sides"][1]["place"], "kept");
    assert_eq!(picture["sides"][2]["place"], "gone");
    assert_eq!(picture["sides"][0]["buttons"], serde_json::json!([]));
    // The page has it in itself, for whoever has no stream yet.
    assert!(page.get("/").1.contains("The guest runs on a, protected by 1 backup"));

    a.kill().unwrap();
    let picture = pictures.wait_headline("The guest runs on b, UNPROTECTED");
    assert_eq!(picture["sides"][0]["place"], "gone");
    assert_eq!(picture["sides"][1]["place"], "here");
    assert_eq!(picture["generations"][0]["generation"], 2);
    assert_eq!(picture["generations"][0]["side"], "b");
    let told = |picture: &serde_json::Value| {
        let failover = &picture["failover"];
        failover["source"] == "the event logs" && failover["is_open"] == false
    };
    let picture = pictures.wait(told);
    let failover = &picture["failover"];
    assert!(
        failover["title"].as_str().unwrap().starts_with("b takes generation 2: "),
        "{failover}"
    );
    let names: Vec<_> =
        failover["parts"].as_array().unwrap().iter().map(|part| &part["name"]).collect();
    for name in ["detection", "test-and-set", "replay", "go-live", "first output"] {
        assert!(names.iter().any(|found| **found == name), "{failover}");
    }
    let sum: f64 =
        failover["parts"].as_array().unwrap().iter().filter_map(|part| part["ms"].as_f64()).sum();
    let total = failover["total_ms"].as_f64().unwrap();
    assert!((sum - total).abs() < 0.01 && total > 0.0, "{failover}");

    let _c = standby(directory, "c", ["a", "b"]);
    let picture = pictures.wait(|picture| picture["links"][0]["to"] == 2);
    assert_eq!(picture["headline"]["text"], "The guest runs on b, protected by 1 backup");
    assert_eq!(picture["sides"][2]["place"], "kept");
}

#[test]
fn the_buttons_of_control_are_orders_of_an_operator() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path();
    let page = page(directory, &["--control"]);
    let mut pictures = page.pictures();
    let (a, _b) = (primary(directory), standby(directory, "b", ["a", "c"]));
    let picture = pictures.wait_headline("The guest runs on a, protected by 1 backup");
    let acts = |picture: &serde_json::Value, side: usize| -> Vec<String> {
        let buttons = picture["sides"][side]["buttons"].as_array().unwrap();
        buttons.iter().map(|button| button["act"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(acts(&picture, 0), ["switch", "pause", "stop"]);
    assert!(acts(&picture, 1).is_empty());
    let is_paused = |status: &SideStatus| status.is_paused;
    assert!(page.press(0, "pause").0.starts_with("HTTP/1.1 200 "));
    assert!(is_paused(&a.status().unwrap()));
    let picture = pictures.wait_headline("The guest is paused on a, protected by 1 backup");
    assert_eq!(acts(&picture, 0), ["switch", "resume", "stop"]);
    let (head, body) = page.press(1, "pause");
    assert!(head.starts_with("HTTP/1.1 409 ") && body.contains("does not run the guest"), "{body}");
    assert!(page.press(0, "resume").0.starts_with("HTTP/1.1 200 "));
    assert!(!is_paused(&a.status().unwrap()));
    assert!(page.press(0, "switch").0.starts_with("HTTP/1.1 200 "));
    let picture = pictures.wait_headline("The guest runs on b, UNPROTECTED");
    assert!(picture["failover"]["title"].as_str().unwrap().contains("hands the guest over"));
    assert!(page.press(1, "stop").0.starts_with("HTTP/1.1 200 "));
    pictures.wait_headline("No side answers any more");
}

#[test]
fn the_demo_on_a_page_loses_nothing_whatever_its_buttons_do() {
    let words = ["demo", "--web=127.0.0.1:0", "--guest", "probe", "--pause", "10"];
    let page = Page::start(&words);
    let mut pictures = page.pictures();
    let press = |side, act| {
        let (head, body) = page.press(side, act);
        assert!(head.starts_with("HTTP/1.1 200 "), "{act}: {head} {body}");
    };
    let protected = |picture: &serde_json::Value, side: &str| {
        picture["headline"]["text"] == format!("The guest runs on {side}, protected by 1 backup")
    };
    let waits = |picture: &serde_json::Value, side: usize| {
        let head = picture["sides"][side]["head"].as_str().unwrap();
        head.starts_with("joining, ")
    };
    pictures.wait(|picture| protected(picture, "a") && waits(picture, 2));
    press(0, "kill");
    pictures.wait(|picture| protected(picture, "b"));
    press(0, "start");
    pictures.wait(|picture| waits(picture, 0));
    // Its host hangs, and comes back when another has its guest.
    press(1, "freeze");
    pictures.wait(|picture| protected(picture, "c"));
    press(1, "thaw");
    pictures.wait(|picture| picture["sides"][1]["buttons"][0]["act"] == "start");
    press(2, "switch");
    let picture = pictures.wait(|picture| {
        picture["headline"]["text"].as_str().unwrap().starts_with("The guest runs on a, ")
    });
    assert!(!picture["console"].as_array().unwrap().is_empty());
    // It has halted, and waits in its turn.
    pictures.wait(|picture| picture["sides"][2]["buttons"][0]["act"] == "start");
    press(2, "start");
    pictures.wait(|picture| protected(picture, "a"));
    press(2, "flip-bit");
    for (side, act, why) in [(0, "thaw", "does not stand still"), (0, "flip-bit", "runs the guest")]
    {
        let (head, body) = page.press(side, act);
        assert!(head.starts_with("HTTP/1.1 409 ") && body.contains(why), "{head} {body}");
    }
    let (exit, said) = page.end();
    assert!(exit.success() && said.contains(": 0 missing, 0 repeated"), "{said}");
}
