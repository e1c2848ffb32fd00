use super::*;
use std::sync::{Arc, Barrier};

fn candidate(id: usize) -> Candidate {
    Candidate { id: format!("id{id}"), host: "here".into(), pid: 1, role: "backup".into() }
}

#[test]
fn of_many_that_ask_at_once_exactly_one_wins() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let pair = DirectoryArbiter::create(dir.path()).expect("made");
    pair.pair("name").expect("reachable");
    for generation in (1..=20).map(Generation) {
        let barrier = Arc::new(Barrier::new(4));
        let threads: Vec<_> = (0..4)
            .map(|id| {
                let arbiter = DirectoryArbiter::open(dir.path()).expect("made");
                let barrier = Arc::clone(&barrier);
                std::thread::spawn(move || {
                    barrier.wait();
                    arbiter.try_win(generation, &candidate(id)).expect("reachable")
                })
            })
            .collect();
        let verdicts: Vec<_> =
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        let winners = verdicts.iter().filter(|verdict| **verdict == Verdict::Won).count();
        assert_eq!(winners, 1, "{verdicts:?}");
    }
}

#[test]
fn a_winner_who_asks_again_has_still_won() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let arbiter = DirectoryArbiter::create(dir.path()).expect("made");
    assert_eq!(arbiter.latest().expect("reachable"), Generation(0));
    let won = |id| arbiter.try_win(Generation(3), &candidate(id)).expect("reachable");
    assert_eq!(won(1), Verdict::Won);
    assert_eq!(won(1), Verdict::Won);
    assert_eq!(won(2), Verdict::Lost { winner: candidate(1) });
    assert_eq!(arbiter.latest().expect("reachable"), Generation(3));
    assert_eq!(arbiter.winner(Generation(3)).expect("reachable"), Some(candidate(1)));
    assert_eq!(arbiter.winner(Generation(4)).expect("reachable"), None);
}

#[test]
fn candidates_learn_how_far_the_others_are_for_the_same_generation() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let arbiter = DirectoryArbiter::create(dir.path()).expect("made");
    let announce = |generation, id, last| {
        let last = EntrySequence(last);
        arbiter.announce(Generation(generation), &candidate(id), last).expect("reachable")
    };
    assert_eq!(announce(2, 1, 70), []);
    assert_eq!(announce(2, 2, 65), [EntrySequence(70)]);
    assert_eq!(announce(2, 1, 71), [EntrySequence(65)]);
    assert_eq!(announce(3, 2, 65), []);
}

#[test]
fn an_unreachable_arbiter_decides_nothing_until_it_returns() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("arbiter");
    let away = dir.path().join("away");
    let arbiter = DirectoryArbiter::create(&path).expect("made");
    fs::rename(&path, &away).expect("renamed");
    assert!(arbiter.winner(Generation(1)).is_err());
    let ask = || arbiter.try_win(Generation(1), &candidate(1));
    assert!(ask().is_err() && ask().is_err());
    fs::rename(&away, &path).expect("renamed");
    assert_eq!(ask().expect("it came back"), Verdict::Won);
}

/// Once, what a fence asks before each write was read from the storage each time all the same.
#[test]
fn what_this_host_knows_is_asked_without_a_look_at_the_storage() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("arbiter");
    let arbiter: Arc<dyn Arbiter> = Arc::new(DirectoryArbiter::create(&path).expect("made"));
    arbiter.try_win(Generation(1), &candidate(1)).expect("reachable");
    let known = |generation| arbiter.known_winner(Generation(generation)).expect("reachable");
    assert_eq!((known(1), known(2)), (Some(candidate(1)), None));
    fs::rename(&path, dir.path().join("away")).expect("renamed");
    assert_eq!(known(2), None);
    assert!(arbiter.winner(Generation(2)).is_err());
}

#[test]
fn a_directory_of_a_living_pair_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let primary = DirectoryArbiter::create(dir.path()).expect("made");
    primary.pair("name").expect("reachable");
    let backup = DirectoryArbiter::open(dir.path()).expect("made");
    backup.share(&candidate(2)).expect("shared");
    let other = DirectoryArbiter::create(dir.path());
    assert!(matches!(other, Err(ArbiterError::InUse { .. })));
    drop((primary, backup));
    DirectoryArbiter::create(dir.path()).expect("free again");
}

#[test]
fn a_backup_that_looks_for_its_pair_changes_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("arbiter");
    let absent = DirectoryArbiter::open(&path);
    assert!(matches!(absent, Err(ArbiterError::Absent { .. })));
    assert!(!path.exists());
    DirectoryArbiter::create(&path).expect("made").pair("name").expect("reachable");
    let waiting = DirectoryArbiter::open(&path).expect("made");
    assert_eq!(waiting.pair_name().expect("reachable"), "name");
    DirectoryArbiter::create(&path).expect("a backup that waits is in nobody's way");
}

#[test]
fn a_side_of_a_pair_whose_directory_was_made_anew_has_lost() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("arbiter");
    let old = DirectoryArbiter::create(&path).expect("made");
    old.pair("old").expect("reachable");
    old.share(&candidate(1)).expect("shared");
    let (first, next) = (Generation(1), Generation(2));
    assert_eq!(old.try_win(first, &candidate(1)).expect("reachable"), Verdict::Won);
    assert_eq!(old.winner(next).expect("reachable"), None);

    fs::remove_dir_all(&path).expect("removed");
    assert!(old.winner(next).is_err(), "nobody decides");
    let new = DirectoryArbiter::create(&path).expect("made anew");
    new.pair("new").expect("reachable");
    assert_eq!(new.try_win(first, &candidate(2)).expect("reachable"), Verdict::Won);

    let winner = old.winner(next).expect("reachable").expect("another pair");
    assert!(winner.to_string().starts_with("another pair"), "{winner}");
    let verdict = old.try_win(next, &candidate(1)).expect("reachable");
    assert_eq!(verdict, Verdict::Lost { winner });
    assert_eq!(new.winner(next).expect("reachable"), None, "nothing was taken from it");
}

#[test]
fn a_directory_that_was_moved_and_came_back_is_still_the_pairs() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (path, copy) = (dir.path().join("arbiter"), dir.path().join("copy"));
    let arbiter = DirectoryArbiter::create(&path).expect("made");
    arbiter.pair("name").expect("reachable");
    assert_eq!(arbiter.winner(Generation(1)).expect("reachable"), None);
    // Another file with the same content, as after another mount.
    fs::create_dir(&copy).expect("made");
    for name in ["lock", "pair"] {
        fs::copy(path.join(name), copy.join(name)).expect("copied");
    }
    fs::remove_dir_all(&path).expect("removed");
    fs::rename(&copy, &path).expect("renamed");
    assert_eq!(arbiter.winner(Generation(1)).expect("reachable"), None);
}

#[test]
fn a_token_is_found_in_the_directory_and_in_no_copy_of_it() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (path, copy) = (dir.path().join("arbiter"), dir.path().join("copy"));
    let primary = DirectoryArbiter::create(&path).expect("made");
    primary.pair("name").expect("reachable");
    fs::create_dir(&copy).expect("made");
    for name in ["lock", "pair"] {
        fs::copy(path.join(name), copy.join(name)).expect("copied");
    }
    let token = |path: &Path| {
        let backup = DirectoryArbiter::open(path).expect("there");
        let token = backup.leave_token(&candidate(2)).expect("reachable");
        let found = primary.finds(&token).expect("reachable");
        backup.take_token(&token);
        assert!(!primary.finds(&token).expect("reachable"));
        found
    };
    assert!(token(&path));
    assert!(!token(&copy));
    for foreign in ["", "../pair", "pair", &"0".repeat(31), &"/".repeat(32)] {
        assert!(!primary.finds(foreign).expect("no token"), "{foreign:?}");
    }
}

#[test]
fn a_generation_is_won_with_what_was_there_before() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let arbiter = DirectoryArbiter::create(dir.path()).expect("made");
    arbiter.pair("name").expect("reachable");
    arbiter.share(&candidate(1)).expect("shared");
    let inode = |path: PathBuf| fs::metadata(path).expect("there").ino();
    let claim = inode(arbiter.claim(&candidate(1)));
    for generation in [Generation(1), Generation(2)] {
        let verdict = arbiter.try_win(generation, &candidate(1)).expect("reachable");
        assert_eq!(verdict, Verdict::Won);
        assert_eq!(inode(arbiter.file(generation)), claim);
        let spares = (0..SPARES).map(|number| inode(arbiter.spare(&candidate(1), number)));
        assert!(spares.into_iter().all(|spare| spare == claim));
    }
    // One with no claim yet, or whose answer was lost, is told the truth.
    let verdict = arbiter.try_win(Generation(2), &candidate(2)).expect("reachable");
    assert_eq!(verdict, Verdict::Lost { winner: candidate(1) });
    // A new pair finds who won, and nothing that is left of those who did.
    drop(arbiter);
    let next = DirectoryArbiter::create(dir.path()).expect("nobody is there");
    assert_eq!(next.winner(Generation(2)).expect("reachable"), Some(candidate(1)));
    assert!(!next.claim(&candidate(1)).exists() && !next.spare(&candidate(1), 0).exists());
}

/// Where this test's second half finds a file system of its own.
const FULL: &str = "VMFT_TEST_FULL_FILE_SYSTEM";

/// Runs `name` again, alone, with a file system of 64 KiB and 24 names that nobody else sees.
fn run_again_in_a_small_file_system(name: &str) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let script = format!(
        "mount -t tmpfs -o size=64k,nr_inodes=24 none \"${FULL}\" && exec \"$0\" --exact {name}"
    );
    let output = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
        .arg(std::env::current_exe().expect("this test"))
        .env(FULL, dir.path())
        .output()
        .expect("unshare runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn a_full_file_system_does_not_keep_a_side_from_winning() {
    let Some(path) = std::env::var_os(FULL) else {
        return run_again_in_a_small_file_system(
            "arbiter::directory::tests::a_full_file_system_does_not_keep_a_side_from_winning",
        );
    };
    let directory = Path::new(&path).join("arbiter");
    let primary = DirectoryArbiter::create(&directory).expect("made");
    primary.pair("name").expect("reachable");
    primary.share(&candidate(1)).expect("shared");
    assert_eq!(primary.try_win(Generation(1), &candidate(1)).expect("room"), Verdict::Won);
    let backup = DirectoryArbiter::open(&directory).expect("there");
    backup.share(&candidate(2)).expect("shared");
    // All blocks, then all names.
    let full = std::io::copy(
        &mut std::io::repeat(1),
        &mut File::create(Path::new(&path).join("disk.img")).expect("made"),
    );
    assert!(is_full(&full.expect_err("it ends")));
    let mut names = (0..).map(|number| Path::new(&path).join(format!("name-{number}")));
    while File::create(names.next().expect("endless")).is_ok() {}

    let verdict = backup.try_win(Generation(2), &candidate(2)).expect("the room was kept");
    assert_eq!(verdict, Verdict::Won);
    let winner = Some(candidate(2));
    assert_eq!(primary.winner(Generation(2)).expect("reachable"), winner);
    // Once more by the same side; one that joins now is told that there is no room.
    let verdict = backup.try_win(Generation(3), &candidate(2)).expect("the room was kept");
    assert_eq!(verdict, Verdict::Won);
    let late = DirectoryArbiter::open(&directory).expect("there");
    assert!(late.share(&candidate(3)).is_err());
    assert!(late.leave_token(&candidate(3)).is_err());
}

#[test]
fn what_others_have_written_there_is_read_within_bounds_and_shown_as_text() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let arbiter = DirectoryArbiter::create(dir.path()).expect("made");
    let mut evil = candidate(1);
    evil.host = "\x1b]0;gone\x07\nvmft: protected".into();
    assert_eq!(arbiter.try_win(Generation(1), &evil).expect("reachable"), Verdict::Won);
    let winner = arbiter.winner(Generation(1)).expect("reachable").expect("there is one");
    assert!(!winner.to_string().contains(|c: char| c.is_control()), "{winner:?}");
    let large = File::create(dir.path().join("pair")).expect("made");
    large.set_len(1 << 40).expect("sparse");
    assert!(matches!(arbiter.pair_name(), Err(ArbiterError::Unreachable { .. })));
}

#[test]
fn a_directory_that_lost_its_lock_file_is_none_of_ours() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let arbiter = DirectoryArbiter::create(dir.path()).expect("made");
    assert_eq!(arbiter.winner(Generation(1)).expect("reachable"), None);
    fs::remove_file(dir.path().join("lock")).expect("removed");
    assert!(arbiter.winner(Generation(1)).is_err());
}

#[test]
fn a_new_directory_is_its_owners_alone() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("arbiter");
    DirectoryArbiter::create(&path).expect("made").pair("name").expect("reachable");
    assert_eq!(fs::metadata(&path).expect("made").mode() & 0o777, 0o700);
}
