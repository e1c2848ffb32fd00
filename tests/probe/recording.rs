//! Recording the probe guest from a world that is itself a function of the guest's progress: the
//! same log every time. And replaying it, in slices of any size.

use crate::guest::{self, TICKS};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};
use vmft_backup::identity::fingerprint;
use vmft_backup::recorded::{FileLog, RecordedLog};
use vmft_log::entry::{Arrival, Entry, EntrySequence, Generation, StopReason};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::fingerprint::Identity;
use vmft_logging_channel::handshake::Nonce;
use vmft_logging_channel::log_file::LogHeader;
use vmft_vmm::engine::EngineKind;
use vmft_vmm::inputs::{
    Asked, Boundary, ClockControl, DeviceRequest, HostTime, InputError, InputSource, Live, LogEnd,
    LogSink, LogSource, Recording, Replaying, Room,
};
use vmft_vmm::machine::{BootSource, Machine, RunEnd};
use vmft_vmm::outputs::{Assurance, HeldOutputs, KeptOutputs, Output, OutputKind, Outside};

/// A host on which an instruction takes 3 ns, and where somebody types at set times.
#[derive(Debug)]
struct Script {
    point: u64,
    waited_ns: u64,
    typed: VecDeque<(HostTime, &'static [u8])>,
    /// When the operator stops the machine.
    stop_at: Option<HostTime>,
    /// How often the machine is made to rest.
    rests: Option<u64>,
    next_rest: u64,
}

impl Script {
    fn new() -> Self {
        let typed = [(25_000_000, &b"vm"[..]), (111_111_111, b"f"), (222_222_222, b"t!")];
        let typed = typed.map(|(ns, bytes)| (HostTime(ns), bytes)).into();
        Self { point: 0, waited_ns: 0, typed, stop_at: None, rests: None, next_rest: 0 }
    }
}

impl InputSource for Script {
    fn now(&mut self) -> HostTime {
        HostTime(self.point * 3 + self.waited_ns)
    }

    fn take_asked(&mut self) -> Option<Asked> {
        let now = self.now();
        if let Some(every) = self.rests
            && now.0 >= self.next_rest
        {
            self.next_rest = now.0 + every;
            return Some(Asked::Pause);
        }
        self.stop_at.filter(|at| *at <= now).map(|_| Asked::Stop(StopReason::Operator))
    }

    fn take_arrival(&mut self, room: Room) -> Option<Arrival> {
        let now = self.now();
        self.typed.front().filter(|(due, bytes)| *due <= now && bytes.len() <= room.console)?;
        let (_, bytes) = self.typed.pop_front()?;
        Some(Arrival::ConsoleInput(bytes.to_vec()))
    }

    fn wait(&mut self, deadline: Option<HostTime>, _: Room) -> bool {
        let deadline = deadline.expect("the timer always runs");
        let typed = self.typed.front().map(|(due, _)| *due).filter(|due| *due < deadline);
        let now = self.now();
        self.waited_ns += typed.unwrap_or(deadline).0.saturating_sub(now.0);
        typed.is_some()
    }

    fn start(&mut self, wish: DeviceRequest) -> Result<(), InputError> {
        panic!("the probe guest has no device for {wish:?}");
    }

    fn take_boot(&mut self) -> Option<Result<BootSource, String>> {
        None
    }
    fn at(&mut self, boundary: &Boundary) {
        self.point = boundary.point.get();
    }

    fn wall_clock(&mut self) -> Option<vmft_log::point::WallTime> {
        None
    }

    fn hold_back(&mut self) -> bool {
        true
    }
}

/// The console's bytes.
#[derive(Debug, Default)]
struct Screen(Mutex<Vec<u8>>);

impl Outside for Screen {
    fn let_out(&self, output: Output, _: Assurance) {
        let OutputKind::Console { bytes, .. } = output.kind else {
            panic!("the probe guest has no disk");
        };
        self.0.lock().unwrap().extend(bytes);
    }

    fn backlog(&self) -> usize {
        0
    }

    fn not_out(&self) -> Vec<Output> {
        Vec::new()
    }

    fn all_let_out(&self) {}
}

/// What a run came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Hash of the machine at its end.
    pub state: u64,
    pub point: ExecutionPoint,
}

/// Records the probe guest from its first instruction to its last.
pub fn record(log: &Path) -> Outcome {
    record_resting(log, None, |_| {})
}

/// As [`record`]; the machine rests every so many nanoseconds of its host, and `at_rest` may look.
pub fn record_resting(
    log: &Path,
    rests: Option<u64>,
    at_rest: impl FnMut(&mut Machine),
) -> Outcome {
    record_into(log, rests, at_rest, |log| log, false)
}

/// The same, to whatever `sink` makes of the log file; with `jumps`, what checkpoints it asks for are ones that
/// a replay may go on from.
pub fn record_into<L: LogSink>(
    log: &Path,
    rests: Option<u64>,
    mut at_rest: impl FnMut(&mut Machine),
    sink: impl FnOnce(FileLog) -> L,
    jumps: bool,
) -> Outcome {
    let mut machine = guest::machine();
    if jumps {
        machine.keep_deltas();
    }
    let header = LogHeader {
        identity: Identity {
            pair: "probe".parse().unwrap(),
            generation: Generation(0),
            fingerprint: fingerprint(EngineKind::Soft, &machine.config().board),
        },
        metadata: BTreeMap::new(),
        nonce: Nonce(*b"the probe guest!"),
    };
    let file = FileLog::create(File::create(log).unwrap(), header, &mut machine).unwrap();
    let log = sink(file.clone());
    let screen = Arc::new(Screen::default());
    let gate = Arc::new(HeldOutputs::open(Arc::clone(&screen) as Arc<dyn Outside>));
    let clock = ClockControl::new(&machine.clock(), machine.point(), machine.scale());
    let live = Live::new(Script { rests, ..Script::new() }, clock);
    let (point, outputs) = (machine.point(), machine.outputs());
    let mut inputs = Recording::new(live, log, Arc::clone(&gate), point, outputs);
    if jumps {
        inputs = inputs.with_jumps();
    }
    while machine.run(&mut inputs, &*gate).unwrap() == RunEnd::Paused {
        at_rest(&mut machine);
    }
    at_rest(&mut machine);
    inputs.stopped(machine.point(), machine.outputs(), StopReason::GuestPowerOff).unwrap();
    file.finish().unwrap();
    let shown = screen.0.lock().unwrap();
    let shown = String::from_utf8(shown.clone()).unwrap();
    assert_eq!(shown.len(), TICKS + b"vmft!.".len(), "{shown}");
    assert!(shown.starts_with("bc") && shown.ends_with('.'), "{shown}");
    Outcome { state: machine.full_digest(), point: machine.point() }
}

/// A log with progress entries strewn in, so that the replaying side stops where the recording one
/// did not.
#[derive(Debug)]
struct Chopped {
    log: RecordedLog<File>,
    next: Option<Entry>,
    at: ExecutionPoint,
    step: u64,
}

impl LogSource for Chopped {
    fn next(&mut self, at: ExecutionPoint) -> Result<Entry, LogEnd> {
        let entry = match self.next.take() {
            Some(entry) => entry,
            None => self.log.next(at)?,
        };
        let Some(point) = entry.point() else { return Ok(entry) };
        let stop = self.at.after(self.step);
        if stop < point {
            self.next = Some(entry);
            self.at = stop;
            return Ok(Entry::Progress { point: stop });
        }
        self.at = point;
        Ok(entry)
    }

    fn skip_to_checkpoint(&mut self, _: &dyn Fn(&[u8]) -> bool) -> Option<Vec<Entry>> {
        None
    }
}

/// Opens a log that must be good.
pub fn open(log: &Path) -> (Machine, RecordedLog<File>) {
    let file = File::open(log).unwrap();
    let (_, machine, log) = RecordedLog::open(file, ExecutionPoint::NEVER).unwrap();
    (machine, log)
}

/// Replays a log to its end, in slices of at most `step` instructions; returns what it came to
/// and how many digests agreed.
pub fn replay(log: &Path, step: u64) -> (Outcome, u64) {
    let (mut machine, log) = open(log);
    let start = machine.point();
    let log = Chopped { log, next: None, at: start, step };
    let kept = Arc::new(KeptOutputs::default());
    let mut inputs = Replaying::new(log, Arc::clone(&kept), start, machine.ram().size());
    let end = machine.run(&mut inputs, &*kept).unwrap();
    assert_eq!(end, RunEnd::Stopped(StopReason::GuestPowerOff));
    let (point, outputs) = (machine.point(), machine.outputs());
    assert_eq!(inputs.stopped(point, outputs, StopReason::GuestPowerOff).unwrap(), Ok(()));
    assert!(inputs.log().log.damage().is_none());
    (Outcome { state: machine.full_digest(), point }, inputs.digests())
}

#[test]
fn two_recordings_of_the_same_world_are_the_same_log() {
    let directory = tempfile::tempdir().unwrap();
    let logs = ["one", "two"].map(|name| directory.path().join(name));
    let outcomes = logs.each_ref().map(|log| record(log));
    assert_eq!(outcomes[0], outcomes[1]);
    let bytes = logs.each_ref().map(|log| std::fs::read(log).unwrap());
    assert!(bytes[0] == bytes[1], "the logs differ");
}

#[test]
fn replays_in_slices_of_any_size_end_in_the_recorded_state() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let recorded = record(&log);
    for step in [u64::MAX, 1_000_003, 4_099] {
        let (replayed, digests) = replay(&log, step);
        assert_eq!(replayed, recorded, "in slices of {step}");
        assert!(digests >= 3, "{digests} digests");
    }
}

/// A log whose reader is lost after some entries.
#[derive(Debug)]
struct Lost {
    taken: u64,
    limit: u64,
}

impl LogSink for Lost {
    fn append(&mut self, _: &Entry) -> std::io::Result<Option<EntrySequence>> {
        if self.is_closed() {
            return Ok(None);
        }
        self.taken += 1;
        // The next one finds nobody.
        Ok((self.taken <= self.limit).then_some(EntrySequence(self.taken)))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn is_closed(&self) -> bool {
        self.taken > self.limit
    }

    fn hold_back(&mut self) -> bool {
        true
    }

    fn wants_checkpoint(&mut self) -> bool {
        false
    }

    fn is_far_behind(&self) -> bool {
        false
    }
}

#[test]
fn a_mark_that_nobody_gets_releases_nothing() {
    for limit in 0..40 {
        let mut machine = guest::machine();
        let screen = Arc::new(Screen::default());
        let gate = Arc::new(HeldOutputs::open(Arc::clone(&screen) as Arc<dyn Outside>));
        gate.protect();
        let clock = ClockControl::new(&machine.clock(), machine.point(), machine.scale());
        let script = Script { stop_at: Some(HostTime(60_000_000)), ..Script::new() };
        let log = Lost { taken: 0, limit };
        let (point, outputs) = (machine.point(), machine.outputs());
        let live = Live::new(script, clock);
        let mut inputs = Recording::new(live, log, Arc::clone(&gate), point, outputs);
        let end = machine.run(&mut inputs, &*gate).unwrap();
        assert_eq!(end, RunEnd::Stopped(StopReason::Operator));
        assert!(gate.waiting() >= 4, "the guest has printed");
        assert!(screen.0.lock().unwrap().is_empty(), "bytes leaked with a log of {limit} entries");
        // Won: the side goes on alone.
        gate.unprotect();
        assert_eq!(screen.0.lock().unwrap().len(), usize::try_from(machine.outputs().0).unwrap());
    }
}
