//! Logs that were cut or damaged say where they stop being good.

use crate::harness::{Place, altered, assert_refused, run, strings};
use nix::sys::signal::Signal;
use std::fs;
use vmft_fuzzing::Random;

/// Bytes of a frame's header, and of the field in it that says how many follow.
const HEADER: usize = 20;
const LENGTH: std::ops::Range<usize> = 5..8;
/// Offsets cut and flipped beside the frames' boundaries.
const CUTS: usize = 200;
const FLIPS: usize = 100;
const SEED: u64 = 0x0BAD_1065;

/// A log of a few ticks of the probe.
fn recorded(place: &Place) -> Vec<u8> {
    let log = place.file("--log", "", "log");
    let console = place.file("--serial", "file=", "console");
    let recorder = place.start("record", &[strings(&["record"]), place.machine(), console, log]);
    place.wait_console_grows("console");
    recorder.assert_stops_cleanly(Signal::SIGINT);
    fs::read(place.path("log")).unwrap()
}

/// Where frames begin, the end of the log among them.
fn boundaries(log: &[u8]) -> Vec<usize> {
    let mut boundaries = vec![0];
    let mut at = 0;
    while at < log.len() {
        let length = &log[at + LENGTH.start..at + LENGTH.end];
        at += HEADER
            + usize::from(length[0])
            + (usize::from(length[1]) << 8)
            + (usize::from(length[2]) << 16);
        boundaries.push(at);
    }
    assert_eq!(boundaries.last(), Some(&log.len()), "a log ends with a whole frame");
    boundaries
}

#[test]
fn a_whole_log_replays_and_every_cut_or_damaged_one_says_where_it_stops_being_good() {
    let place = Place::new();
    let log = recorded(&place);
    let whole = run([strings(&["replay"]), vec![place.text("log")]].concat());
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));

    let copy = place.path("copy");
    let arguments = [strings(&["replay"]), vec![place.text("copy")]].concat();
    let boundaries = boundaries(&log);
    let frame_of = |offset: usize| boundaries.iter().rev().find(|begin| **begin <= offset).unwrap();
    let mut seeded = Random::new(SEED);
    let mut cuts: Vec<usize> = boundaries
        .iter()
        .flat_map(|&at| [at.saturating_sub(1), at, at + 1])
        .chain((0..CUTS).map(|_| seeded.index(log.len())))
        .filter(|&cut| cut < log.len())
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    for cut in cuts {
        altered(&log, &copy, |bytes| bytes.truncate(cut));
        let good = format!("good up to byte {}", frame_of(cut));
        assert_refused(&run(&arguments), &[&good, "the file is cut", &place.text("copy")]);
    }
    for _ in 0..FLIPS {
        let (at, bit) = (seeded.index(log.len()), seeded.index(8));
        altered(&log, &copy, |bytes| bytes[at] ^= 1 << bit);
        let good = format!("good up to byte {}", frame_of(at));
        assert_refused(&run(&arguments), &[&good, &place.text("copy")]);
    }
    altered(&log, &copy, |bytes| bytes.extend(b"more"));
    assert_refused(&run(&arguments), &["goes on after its end"]);
    let twice = boundaries[boundaries.len() - 3]..boundaries[boundaries.len() - 2];
    altered(&log, &copy, |bytes| {
        let frame = bytes[twice.clone()].to_vec();
        bytes.splice(twice.end..twice.end, frame);
    });
    assert_refused(&run(&arguments), &[&format!("good up to byte {}", twice.end)]);
    place.assert_disk_unchanged();
}

#[test]
fn what_is_no_log_is_refused() {
    let place = Place::new();
    let replay = |name: &str| run([strings(&["replay"]), vec![place.text(name)]].concat());
    assert_refused(&replay("missing"), &["missing", "No such file", "vmft record --log"]);
    assert_refused(&replay("kernel"), &["the file is no log", "kernel"]);
    assert_refused(&replay("."), &["Is a directory"]);
    fs::write(place.path("empty"), b"").unwrap();
    assert_refused(&replay("empty"), &["good up to byte 0", "the file is cut"]);
}
