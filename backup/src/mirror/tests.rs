//! A primary's end and a backup's, with a guest that writes meanwhile.

use super::record::path_of;
use super::*;
use crate::mirror::fill::Said;
use vmft_fuzzing::Random;
use vmft_log::checkpoint::SinkRefusal;
use vmft_log::disk_copy::{DiskCopyHeader, DiskDigest, DiskDigests, DiskPiece};
use vmft_logging_channel::transport::TakesDigests;
use vmft_vmm::world::{HostCache, Permit, Storage};

const SIZE: u64 = 3 << 20;

struct Side {
    _directory: tempfile::TempDir,
    path: PathBuf,
    mirrors: Arc<Mirrors>,
    status: Arc<StatusBoard>,
}

impl Side {
    fn copy(&self) -> &OwnCopy {
        &self.mirrors.mirrors[0].copy
    }

    /// The same file again, as the next process sees it.
    fn again(&self) -> Arc<Mirrors> {
        open(&self.path).1
    }
}

fn open(path: &Path) -> (PathBuf, Arc<Mirrors>) {
    let (copy, is_new) = OwnCopy::open(path, HostCache::WriteBack, Some(SIZE)).expect("opened");
    let mirror = Mirror::new(0, copy, is_new, false).expect("its record can be read");
    (path.to_owned(), Arc::new(Mirrors::new(vec![mirror])))
}

fn side() -> Side {
    let directory = tempfile::tempdir().expect("temporary directory");
    let (path, mirrors) = open(&directory.path().join("copy.img"));
    Side { _directory: directory, path, mirrors, status: Arc::default() }
}

fn who(id: &str) -> Candidate {
    Candidate { id: id.into(), host: "h".into(), pid: 1, role: "primary".into() }
}

/// A live side's, in generation 1.
fn primary() -> Side {
    let side = side();
    side.mirrors.begin_live("pair", Generation(0), &who("a")).expect("written");
    side
}

fn taker(side: &Side) -> Taker {
    let taker = Taker::begin(&side.mirrors, "pair", "b", &side.status);
    taker.expect("random numbers").expect("it has copies")
}

/// Somebody writes some sectors somewhere.
fn scribble(random: &mut Random, write: impl FnOnce(u64, &[u8])) {
    let sectors = 1 + random.below(300);
    let offset = random.below(SIZE / 512 - sectors) * 512;
    let zeroes = random.below(4) == 0;
    let fill = if zeroes { 0 } else { random.below(255) as u8 + 1 };
    write(offset, &vec![fill; usize::try_from(sectors * 512).expect("small")]);
}

/// Hands over what the backup says, until it has said everything.
fn tell_digests(taker: &Taker, said: &dyn TakesDigests) {
    loop {
        let progress = taker.poll().expect("its storage works");
        match progress.digests {
            Some(digests) => said.take(digests).expect("good"),
            None if progress.is_settled => return,
            None => std::thread::yield_now(),
        }
    }
}

/// Sends the disk with `guest` writing in between; pieces that carried data.
fn send(primary: &Side, backup: &Side, random: &mut Random, writes: u64) -> u64 {
    let mut fill = DiskFill::begin(&primary.mirrors, Generation(1), &primary.status);
    let said = fill.digests().expect("there is a copy");
    let mut taker = taker(backup);
    let mut left = writes;
    let mut guest = |random: &mut Random| {
        if left > 0 && random.below(2) == 0 {
            left -= 1;
            scribble(random, |offset, data| {
                primary.copy().write(Permit(Some(1)), offset, data).expect("written");
            });
        }
    };
    while let Some(piece) = fill.next_piece().expect("it goes on") {
        let begins = matches!(piece, DiskPiece::Begin(_));
        let piece = DiskPiece::decode(&piece.encode(Vec::new())).expect("it is one");
        taker.take(piece).expect("good");
        if begins {
            tell_digests(&taker, &*said);
        }
        guest(random);
    }
    // The log begins; what is written from here on, the backup hears of by itself.
    fill.ends().iter().for_each(vmft_vmm::world::TapEnd::close);
    while let Some(piece) = fill.next_piece().expect("it goes on") {
        taker.take(piece).expect("good");
    }
    taker.check_whole().expect("all of it");
    backup.mirrors.follow(&taker, Generation(1), &backup.status);
    drop(taker);
    fill.sent()
}

#[test]
fn a_copy_is_its_disk_whatever_it_was_and_whatever_is_written_meanwhile() {
    vmft_fuzzing::large_cases(24, 1, |mut random| {
        let (primary, backup) = (primary(), side());
        for _ in 0..random.below(12) {
            scribble(&mut random, |offset, data| {
                primary.copy().put(offset, data).expect("written")
            });
        }
        // Twice: into nothing, and over what has become of that.
        for round in 0..2 {
            let writes = random.below(12);
            send(&primary, &backup, &mut random, writes);
            backup.mirrors.take_over(Generation(2)).expect("written");
            let copies = [&primary, &backup].map(|side| std::fs::read(&side.path).expect("there"));
            assert!(copies[0] == copies[1], "the copies differ in round {round}");
            for _ in 0..random.below(5) {
                scribble(&mut random, |at, data| backup.copy().put(at, data).expect("written"));
            }
            // It was left behind, and follows again.
            backup.mirrors.begin_live("pair", Generation(0), &who("b")).expect("written");
        }
    });
}

#[test]
fn of_a_copy_that_is_right_already_nothing_is_sent() {
    let mut random = Random::new(7);
    let (primary, backup) = (primary(), side());
    primary.copy().put(0, &vec![0x5A; SIZE as usize]).expect("written");
    assert_eq!(send(&primary, &backup, &mut random, 0), SIZE);
    backup.mirrors.stop_following(Vec::new(), Generation(1)).expect("written");
    assert_eq!(send(&primary, &backup, &mut random, 0), 0);
}

#[test]
fn a_copy_says_what_it_is_before_it_is_changed_and_follows_once_it_is_whole() {
    let (primary, backup) = (primary(), side());
    let state = || record::RecordFile::look(&backup.path).expect("there").map(|it| it.state);
    let mut random = Random::new(1);
    let mut fill = DiskFill::begin(&primary.mirrors, Generation(1), &primary.status);
    let mut taker = taker(&backup);
    assert_eq!(state(), None);
    let begin = fill.next_piece().expect("it goes on").expect("it begins");
    taker.take(begin).expect("good");
    assert_eq!(
        taker.check_whole(),
        Err(SinkRefusal("disk 0 did not come: say mirror=on on both sides".into()))
    );
    tell_digests(&taker, &*fill.digests().expect("there is a copy"));
    assert_eq!(state(), Some(CopyState::Filling));
    drop((taker, fill));
    // Interrupted: it is no disk, and can be filled.
    let again = backup.again();
    let winner = who("a");
    assert!(again.check("pair", Generation(1), Some(&winner)).is_err());
    drop(again);
    send(&primary, &backup, &mut random, 3);
    backup.mirrors.writer().expect("it follows").wait_done().expect("written");
    assert_eq!(state(), Some(CopyState::Following));
    assert_eq!(backup.status.status().disk_copies[0].role, CopyRole::Following);
    assert!(backup.again().check("pair", Generation(1), Some(&winner)).is_err());
    backup.mirrors.take_over(Generation(2)).expect("written");
    assert_eq!(state(), Some(CopyState::Live));
    backup.again().check("pair", Generation(2), Some(&who("b"))).expect("its own");
}

#[test]
fn what_a_replay_completes_is_on_the_copy_in_its_order_when_it_goes_live() {
    use vmft_log::entry::{Arrival, RequestId};
    let (primary, backup) = (primary(), side());
    send(&primary, &backup, &mut Random::new(3), 0);
    let write = |byte| DiskOperation::Write { offset: 512, data: vec![byte; 512] };
    let ask = |request, byte| Effect::Disk {
        disk: 0,
        request: RequestId(request),
        operation: write(byte),
    };
    let feed = Feed::begin(&backup.mirrors, vec![ask(1, 1)]).expect("it has copies");
    for request in 2..=40 {
        feed.asked(0, RequestId(request), &write(request as u8));
    }
    let done = |request, status| {
        let request = RequestId(request);
        feed.completed(&Arrival::DiskCompletion { disk: 0, request, status, data: Vec::new() });
    };
    (1..=38).for_each(|request| done(request, 0));
    // One failed, one is on its way; one is nobody's.
    done(39, 1);
    done(99, 0);
    backup.mirrors.take_over(Generation(2)).expect("written");
    let mut sector = [0; 512];
    backup.copy().get(512, &mut sector).expect("read");
    assert_eq!(sector, [38; 512]);
}

fn refused(primary: &Side, backup: &Side) -> String {
    let mut fill = DiskFill::begin(&primary.mirrors, Generation(1), &primary.status);
    let begin = fill.next_piece().expect("it goes on").expect("it begins");
    taker(backup).take(begin).expect_err("not to be written").0
}

#[test]
fn a_file_that_is_no_copy_of_this_pair_is_not_written() {
    let primary = primary();
    let foreign = side();
    foreign.copy().put(65536, &[1; 512]).expect("written");
    // Known to be made just now by who opened it, and not by the next one.
    let foreign = Side { mirrors: foreign.again(), ..foreign };
    let why = refused(&primary, &foreign);
    assert!(why.contains("something is in it"), "{why}");

    let other = side();
    other.mirrors.begin_live("another pair", Generation(0), &who("x")).expect("written");
    let why = refused(&primary, &other);
    assert!(why.contains("copy of another pair (another pair)"), "{why}");

    let newer = side();
    newer.mirrors.begin_live("pair", Generation(2), &who("x")).expect("written");
    let why = refused(&primary, &newer);
    assert!(why.contains("of generation 2, and the primary of 1"), "{why}");

    let twin = side();
    std::fs::copy(path_of(&primary.path), path_of(&twin.path)).expect("copied");
    let twin = Side { mirrors: twin.again(), ..twin };
    let why = refused(&primary, &twin);
    assert!(why.contains("copied with its record"), "{why}");
}

#[test]
fn pieces_that_are_not_of_a_disk_that_has_begun_are_refused() {
    let backup = side();
    let mut taker = taker(&backup);
    let data = |disk, offset| DiskPiece::Data { disk, offset, data: vec![1; 512] };
    assert!(taker.take(data(0, 0)).is_err(), "not begun");
    let chunk = DiskCopyHeader::chunk_for(SIZE);
    let (generation, copy) = (Generation(1), CopyId([9; 16]));
    let header = DiskCopyHeader { disk: 0, size: SIZE, chunk, generation, copy };
    let other = DiskCopyHeader { size: SIZE * 2, ..header };
    assert!(taker.take(DiskPiece::Begin(other)).is_err(), "of another size");
    assert!(taker.take(DiskPiece::Begin(DiskCopyHeader { disk: 1, ..header })).is_err());
    taker.take(DiskPiece::Begin(header)).expect("good");
    assert!(taker.take(DiskPiece::Begin(header)).is_err(), "twice");
    taker.take(data(0, SIZE - 512)).expect("the last sector");
    for piece in [data(0, SIZE), data(1, 0), DiskPiece::Zeroes { disk: 0, offset: 512, len: SIZE }]
    {
        assert!(taker.take(piece).is_err());
    }
    let reached = |offset| DiskPiece::Reached { disk: 0, offset };
    taker.take(reached(1 << 20)).expect("good");
    assert!(taker.take(reached(512)).is_err(), "back");
}

#[test]
fn digests_that_cannot_be_are_refused() {
    let said = Said::default();
    let digests = |disk, seed, first, count| DiskDigests {
        disk,
        seed,
        first,
        digests: vec![DiskDigest::ZEROES; count],
    };
    assert!(said.take(digests(0, 1, 0, 1)).is_err(), "of a disk that has not begun");
    let fill = DiskFill::begin(&primary().mirrors, Generation(1), &Arc::default());
    let said = Said::default();
    said.expect(fill.header());
    let chunks = SIZE as usize / (64 << 10);
    said.take(digests(0, 1, 0, 2)).expect("good");
    assert!(said.take(digests(0, 2, 2, 1)).is_err(), "another seed");
    assert!(said.take(digests(0, 1, 1, 1)).is_err(), "again");
    assert!(said.take(digests(0, 1, 3, 1)).is_err(), "a gap");
    assert!(said.take(digests(0, 1, 2, chunks - 1)).is_err(), "more than there are");
    said.take(digests(0, 1, 2, chunks - 2)).expect("the rest");
}
