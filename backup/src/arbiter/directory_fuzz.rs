//! The directory of an arbiter, with anything in it that whoever shares the storage can put there:
//! every answer comes, and never two sides have won.

use super::*;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use vmft_fuzzing::{Random, damage, large_cases, peak_of};

/// Cases of a quick run.
const CASES: u64 = 100;
/// So many ordinary cases one of these takes as long as: it waits for the storage.
const WORTH: u64 = 20;
/// What is done to the directory, before everything is asked.
const CHANGES: u64 = 4;

fn candidate(id: &str) -> Candidate {
    Candidate { id: id.to_owned(), host: "there".into(), pid: 1, role: "backup".into() }
}

/// What is in the directory, in order: its own order is the file system's.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("there");
    let mut entries: Vec<_> = entries.map(|entry| entry.expect("there").path()).collect();
    entries.sort();
    entries
}

/// Names that mean something, and some that nearly do.
fn name(random: &mut Random) -> String {
    let number = match random.below(4) {
        0 => random.next(),
        1 => u64::MAX >> random.below(64),
        _ => random.below(6),
    };
    match random.below(8) {
        0 => format!("generation-{number}"),
        1 => format!("generation-+{number:09}"),
        2 => format!("candidate-{}-x", random.below(5)),
        3 => "pair".to_owned(),
        4 => "lock".to_owned(),
        5 => format!("claim-{}", random.pick(&["a", "b", "c"])),
        _ => format!("generation-{number:010}"),
    }
}

fn remove(path: &Path) {
    let removed = if path.is_dir() && !path.is_symlink() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    // There may have been nothing.
    let _ = removed;
}

fn change(random: &mut Random, directory: &Path) {
    let there = entries(directory);
    let path = match random.below(2) {
        0 if !there.is_empty() => random.pick(&there).clone(),
        _ => directory.join(name(random)),
    };
    match random.below(8) {
        0 => remove(&path),
        1 => {
            remove(&path);
            fs::create_dir(&path).expect("nothing is there");
        }
        2 => {
            remove(&path);
            symlink(&path, &path).expect("nothing is there");
        }
        3 => {
            remove(&path);
            mkfifo(&path, Mode::S_IRWXU).expect("nothing is there");
        }
        4 => {
            remove(&path);
            File::create(&path).expect("nothing is there").set_len(1 << 30).expect("sparse");
        }
        5 if !there.is_empty() => {
            // A file of another name.
            let from = random.pick(&there);
            if from.is_file() && from.exists() {
                remove(&path);
                let _ = fs::hard_link(from, &path);
            }
        }
        _ if path.is_file() => {
            let others: Vec<Vec<u8>> =
                there.iter().filter_map(|other| read_small(other).ok()).collect();
            let mut bytes = read_small(&path).unwrap_or_default();
            damage(random, &mut bytes, &others);
            // In its place: a file that is linked elsewhere stays as it is.
            remove(&path);
            fs::write(&path, bytes).expect("nothing is there");
        }
        _ => {
            remove(&path);
            fs::write(&path, random.bytes(30)).expect("nothing is there");
        }
    }
}

/// A pair's directory in its second generation.
fn pair(directory: &Path) -> DirectoryArbiter {
    let arbiter = DirectoryArbiter::create(directory).expect("made");
    arbiter.pair("pair").expect("reachable");
    for id in ["a", "b"] {
        arbiter.share(&candidate(id)).expect("reachable");
    }
    for generation in [1, 2] {
        arbiter.try_win(Generation(generation), &candidate("a")).expect("reachable");
    }
    arbiter
}

/// Everything that a side asks; the number of those that have won.
fn ask(arbiter: &DirectoryArbiter, random: &mut Random) -> usize {
    let latest = arbiter.latest().unwrap_or(Generation(2));
    assert!(latest.0 <= MAX_COUNT, "{latest:?} cannot be counted on from");
    let next = Generation(latest.0 + 1);
    for generation in [latest, next] {
        let known = [arbiter.winner(generation), arbiter.known_winner(generation)];
        for winner in known.into_iter().flatten().flatten() {
            assert!(winner.to_string().len() < 4096);
        }
    }
    // A name that is not there, or cannot be read, is an error like others.
    let _ = arbiter.pair_name();
    let _ = arbiter.announce(next, &candidate("b"), EntrySequence(random.below(100)));
    let _ = arbiter.finds(&"0".repeat(TOKEN_DIGITS));
    if let Ok(token) = arbiter.leave_token(&candidate("b")) {
        arbiter.take_token(&token);
    }
    let sides = ["b", "c"].iter().map(|id| arbiter.try_win(next, &candidate(id)));
    sides.filter(|verdict| matches!(verdict, Ok(Verdict::Won))).count()
}

#[test]
fn whatever_is_in_its_directory_an_arbiter_answers_and_never_twice_with_yes() {
    let mut won = 0u64;
    large_cases(CASES, WORTH, |mut random| {
        let place = tempfile::tempdir().expect("temporary directory");
        let directory = place.path().join("arbiter");
        let arbiter = pair(&directory);
        for _ in 0..=random.below(CHANGES) {
            change(&mut random, &directory);
        }
        let (count, peak) = peak_of(|| ask(&arbiter, &mut random));
        assert!(count <= 1, "two sides have won");
        assert!(peak < 1 << 20, "{peak} bytes");
        won += count as u64;
        drop(arbiter);
        // Somebody who comes to it as it is.
        if let Ok(late) = DirectoryArbiter::open(&directory) {
            assert!(ask(&late, &mut random) <= 1);
        }
        if let Ok(new) = DirectoryArbiter::create(&directory) {
            assert!(ask(&new, &mut random) <= 1);
        }
    });
    println!("{won} won");
}

#[test]
fn a_generation_beyond_all_counting_is_nobodys() {
    let place = tempfile::tempdir().expect("temporary directory");
    let arbiter = pair(place.path());
    for name in ["generation-18446744073709551615", "generation-+000000009", "generation-9"] {
        fs::write(place.path().join(name), "").expect("written");
    }
    assert_eq!(arbiter.latest().expect("reachable"), Generation(2));
}

#[test]
fn a_pipe_in_the_place_of_a_file_keeps_nobody_waiting() {
    let place = tempfile::tempdir().expect("temporary directory");
    let arbiter = pair(place.path());
    mkfifo(&place.path().join("generation-0000000003"), Mode::S_IRWXU).expect("made");
    arbiter.known_winner(Generation(3)).expect_err("a pipe names no winner");
    arbiter.try_win(Generation(3), &candidate("b")).expect_err("nobody knows");
}

#[test]
fn a_candidate_who_says_no_number_hides_nobody_else() {
    let place = tempfile::tempdir().expect("temporary directory");
    let arbiter = pair(place.path());
    fs::write(place.path().join("candidate-3-x"), [0xFF]).expect("written");
    fs::write(place.path().join("candidate-3-y"), u64::MAX.to_string()).expect("written");
    mkfifo(&place.path().join("candidate-3-z"), Mode::S_IRWXU).expect("made");
    let announce = |id, last| arbiter.announce(Generation(3), &candidate(id), EntrySequence(last));
    announce("a", 7).expect("reachable");
    assert_eq!(announce("b", 6).expect("reachable"), [EntrySequence(7)]);
}
