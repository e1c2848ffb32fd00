//! At exit points, a guest that computes without exiting: what waits for it is let in where it is, and
//! the log names that place by the guest's state.

use crate::engines::{Engine, expected, probe, succeed, take_turn, write_probe};
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use vmft::pair::prefixed;
use vmft_log::checkpoint::{
    CheckpointHeader, CheckpointSink, Page, PageNumber, PieceKind, SinkRefusal,
};
use vmft_log::entry::Entry;
use vmft_logging_channel::log_file::LogReader;

/// Few lines, each after so much computing that a timer comes due many times.
const LINES: u32 = 3;
const ROUNDS: u32 = 15_000;

/// Takes pages and keeps none.
struct Nowhere;

impl CheckpointSink for Nowhere {
    fn begin(&mut self, _: &CheckpointHeader) -> Result<(), SinkRefusal> {
        Ok(())
    }
    fn page(&mut self, _: PageNumber, _: &Page) -> Result<(), SinkRefusal> {
        Ok(())
    }
    fn read(&self, _: PageNumber, data: &mut Page) -> Result<(), SinkRefusal> {
        data.fill(0);
        Ok(())
    }
}

/// Checkpoints among the entries of a log, and their bytes.
fn checkpoints(log: &Path) -> (usize, usize) {
    let reader = LogReader::open(File::open(log).unwrap()).unwrap();
    let (_, mut entries) = reader.read_checkpoint(&mut Nowhere).unwrap();
    let (mut count, mut sum) = (0, 0);
    while let Some((_, entry)) = entries.next_entry().unwrap() {
        if let Entry::CheckpointPart { piece, bytes } = entry {
            count += usize::from(piece == PieceKind::End);
            sum += bytes.len();
        }
    }
    (count, sum)
}

#[test]
fn timers_fire_in_a_guest_that_never_exits_and_the_log_replays_to_the_same_end() {
    if !Engine::KvmExit.is_here() {
        return;
    }
    let _turn = take_turn();
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name);
    let kernel = write_probe(directory.path(), &probe(LINES, ROUNDS));
    let mut words: Vec<OsString> = vec!["record".into(), "--log".into(), place("log").into()];
    words.extend(["--memory", "size=64M", "--kernel"].map(OsString::from));
    words.extend([kernel.into(), "--serial".into(), prefixed("file=", &place("console"))]);
    words.extend(Engine::KvmExit.options().iter().map(OsString::from));
    succeed(words);
    assert_eq!(std::fs::read_to_string(place("console")).unwrap(), expected(LINES));

    let (count, bytes) = checkpoints(&place("log"));
    println!("{count} checkpoints of {bytes} bytes in all");
    assert!(count >= 3, "nothing was let in while the guest computed: {count}");

    let mut states = Vec::new();
    for _ in 0..2 {
        let replayed = succeed([
            "replay".into(),
            place("log").into_os_string(),
            "--serial".into(),
            "null".into(),
        ]);
        assert!(replayed.contains("the guest stopped: GuestPowerOff"), "{replayed}");
        states.push(replayed.lines().find(|line| line.starts_with("state ")).map(str::to_owned));
    }
    assert!(states[0].is_some() && states[0] == states[1], "{states:?}");
}
