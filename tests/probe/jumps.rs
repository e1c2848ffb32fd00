//! Checkpoints in a log bound how far it has to be replayed: a replay that goes on from them comes to the same
//! state, with the same outputs, as one that leaves nothing out.

use crate::guest::TICKS;
use crate::recording::{Outcome, open, record, record_into, replay};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use vmft_backup::recorded::FileLog;
use vmft_log::checkpoint::PieceKind;
use vmft_log::entry::{Entry, EntrySequence, OutputSequence, StopReason};
use vmft_log::point::ExecutionPoint;
use vmft_vmm::inputs::{Gauges, InputError, LogEnd, LogSink, LogSource, Replaying};
use vmft_vmm::machine::{Machine, MachineError, RunEnd};
use vmft_vmm::outputs::{KeptOutputs, OutputKind};

/// A log whose reader is far behind: it asks for a checkpoint at every so many points at which it may.
#[derive(Debug)]
struct Wanting {
    log: FileLog,
    every: u32,
    asked: u32,
    /// Also where a digest might be a new base.
    far_behind: bool,
}

impl LogSink for Wanting {
    fn append(&mut self, entry: &Entry) -> std::io::Result<Option<EntrySequence>> {
        self.log.append(entry)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.log.flush()
    }

    fn wants_checkpoint(&mut self) -> bool {
        self.asked += 1;
        self.asked.is_multiple_of(self.every)
    }

    fn is_far_behind(&self) -> bool {
        self.far_behind
    }

    fn hold_back(&mut self) -> bool {
        true
    }

    fn is_closed(&self) -> bool {
        false
    }
}

/// Records the probe guest with checkpoints in its log.
fn record_wanting(log: &Path, every: u32, far_behind: bool) -> Outcome {
    let sink = |log| Wanting { log, every, asked: 0, far_behind };
    record_into(log, None, |_| {}, sink, true)
}

/// A log that has come whole, of which a reader may pass over as much as it can between two points.
#[derive(Debug)]
struct Backlog {
    entries: VecDeque<Entry>,
    at: ExecutionPoint,
    from: ExecutionPoint,
    until: ExecutionPoint,
    /// Takes the last checkpoint, whatever is said of its base.
    heedless: bool,
    /// This word has come before anything else: up to here all is out.
    released: OutputSequence,
}

impl LogSource for Backlog {
    fn next(&mut self, at: ExecutionPoint) -> Result<Entry, LogEnd> {
        self.at = at;
        self.entries.pop_front().ok_or(LogEnd::Ended)
    }

    fn skip_to_checkpoint(&mut self, may: &dyn Fn(&[u8]) -> bool) -> Option<Vec<Entry>> {
        let is_header =
            |entry: &Entry| matches!(entry, Entry::CheckpointPart { piece: PieceKind::Header, .. });
        if std::mem::take(&mut self.heedless) {
            let last = self.entries.iter().rposition(is_header)?;
            return Some(self.entries.drain(..last).collect());
        }
        let header = self.entries.iter().position(is_header)?;
        let Entry::CheckpointPart { bytes: fixed, .. } = &self.entries[header + 1] else {
            panic!("a header is not followed by its fixed part");
        };
        if self.at < self.from || self.at > self.until || !may(fixed) {
            return None;
        }
        let mut skipped: Vec<Entry> = self.entries.drain(..header).collect();
        skipped.push(Entry::Released { output: self.released });
        Some(skipped)
    }
}

/// What a replay with jumps came to.
#[derive(Debug)]
struct Jumped {
    outcome: Outcome,
    skipped: u64,
    digests: u64,
    /// The console as its outputs tell it, and where they begin.
    console: Vec<u8>,
    first: u64,
}

/// A machine at the beginning of a log, and all the log, of which nothing may be passed over.
fn backlog(log: &Path) -> (Machine, Backlog) {
    let (machine, mut file) = open(log);
    let mut entries = VecDeque::new();
    while let Ok(entry) = file.next(ExecutionPoint::START) {
        entries.push_back(entry);
    }
    let (at, from, until) = (machine.point(), ExecutionPoint::NEVER, ExecutionPoint::NEVER);
    let released = OutputSequence(0);
    let backlog = Backlog { entries, at, from, until, heedless: false, released };
    (machine, backlog)
}

fn jump(log: &Path, from: ExecutionPoint, until: ExecutionPoint, released: u64) -> Jumped {
    let released = OutputSequence(released);
    let (mut machine, all) = backlog(log);
    let backlog = Backlog { from, until, released, ..all };
    let (kept, gauges) = (Arc::new(KeptOutputs::default()), Arc::new(Gauges::default()));
    let mut inputs =
        Replaying::new(backlog, Arc::clone(&kept), machine.point(), machine.ram().size())
            .watched(Arc::clone(&gauges));
    let end = machine.run(&mut inputs, &*kept).unwrap();
    assert_eq!(end, RunEnd::Stopped(StopReason::GuestPowerOff));
    let (point, outputs) = (machine.point(), machine.outputs());
    assert_eq!(inputs.stopped(point, outputs, StopReason::GuestPowerOff).unwrap(), Ok(()));
    let outcome = Outcome { state: machine.full_digest(), point };
    let (mut console, mut first) = (Vec::new(), u64::MAX);
    for output in kept.take() {
        assert!(output.sequence > released, "it is out: {output:?}");
        let OutputKind::Console { offset, bytes } = output.kind else { panic!("no such device") };
        first = first.min(offset);
        let at = usize::try_from(offset - first).unwrap();
        assert!(at <= console.len(), "a gap before {offset}");
        console.truncate(at.max(console.len()));
        let known = console.len() - at;
        console.extend_from_slice(bytes.get(known..).unwrap_or_default());
    }
    let (skipped, digests) = (gauges.points_skipped(), inputs.digests());
    Jumped { outcome, skipped, digests, console, first }
}

#[test]
fn a_log_with_checkpoints_is_replayed_like_any_other() {
    let directory = tempfile::tempdir().unwrap();
    let (plain, log) = (directory.path().join("plain"), directory.path().join("log"));
    let (plain, recorded) = (record(&plain), record_wanting(&log, 50, true));
    assert_eq!(plain.point, recorded.point, "checkpoints change nothing");
    for step in [u64::MAX, 1_000_003] {
        let (replayed, digests) = replay(&log, step);
        assert_eq!(replayed, recorded, "in slices of {step}");
        assert!(digests >= 3, "{digests} digests");
    }
}

#[test]
fn a_replay_that_goes_on_from_checkpoints_comes_to_the_same_state_with_the_same_outputs() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    for (every, far_behind) in [(30, true), (250, true), (70, false)] {
        let recorded = record_wanting(&log, every, far_behind);
        let (start, end) = (open(&log).0.point(), recorded.point);
        let whole = jump(&log, ExecutionPoint::NEVER, ExecutionPoint::NEVER, 0);
        assert_eq!((whole.skipped, whole.first, &whole.outcome), (0, 0, &recorded));
        assert_eq!(whole.console.len(), TICKS + b"vmft!.".len());
        let length = end.since(start);
        let mut digests = 0;
        for (from, until) in [(0, 100), (0, 1), (17, 18), (40, 80), (63, 64), (90, 100)] {
            let place = |percent: u64| start.after(length / 100 * percent);
            let jumped = jump(&log, place(from), place(until), 0);
            println!("{every} {far_behind} from {from} %: {} of {length} skipped", jumped.skipped);
            assert_eq!(jumped.outcome, recorded, "from {from} to {until} %");
            assert_eq!((jumped.first, &jumped.console), (0, &whole.console), "from {from} %");
            // Where checkpoints are rare there may be none in reach.
            assert!(jumped.skipped > 0 || every == 250, "from {from} to {until} %");
            assert!(jumped.skipped < length, "from {from} to {until} %");
            digests = digests.max(jumped.digests);
        }
        assert!(digests > 0, "after some checkpoints a digest was compared");
        if far_behind {
            // One base after the other, from the first on: hardly anything is left to replay.
            let jumped = jump(&log, start, end, 0);
            assert!(jumped.skipped > length / 10 * 8, "{} of {length}", jumped.skipped);
        }
    }
}

#[test]
fn a_checkpoint_laid_over_a_machine_that_has_not_passed_its_base_makes_another_machine() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let recorded = record_wanting(&log, 250, true);
    let (mut machine, all) = backlog(&log);
    let kept = Arc::new(KeptOutputs::default());
    let heedless = Backlog { heedless: true, ..all };
    let mut inputs =
        Replaying::new(heedless, Arc::clone(&kept), machine.point(), machine.ram().size());
    match machine.run(&mut inputs, &*kept) {
        Err(MachineError::Input(InputError::Divergence(found))) => println!("{found}"),
        Ok(_) => assert_ne!(machine.full_digest(), recorded.state),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn what_is_known_to_be_out_is_not_kept_although_it_comes_with_a_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let recorded = record_wanting(&log, 100, true);
    let whole = jump(&log, ExecutionPoint::NEVER, ExecutionPoint::NEVER, 0);
    for released in [1, 20, 40] {
        let jumped = jump(&log, ExecutionPoint::START, recorded.point, released);
        assert_eq!(jumped.outcome, recorded);
        // A run of bytes of which a part is out comes whole; never is one missing.
        let first = usize::try_from(jumped.first).unwrap();
        assert!(jumped.first <= released, "{released} are out, and it begins at {first}");
        assert_eq!(jumped.console, whole.console[first..]);
    }
}
