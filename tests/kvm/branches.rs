//! A whole machine whose points are branches, recorded and replayed on the host's KVM: what arrives while
//! the guest computes lands between two exits. The counters are such that need no hardware; those of
//! the two sides are late by different amounts.

use crate::engines::{kvm_is_here, probe, take_turn};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use vmft_cpu::CpuCount;
use vmft_cpu::Kicker;
use vmft_cpu::memory::GuestRam;
use vmft_kvm::{BranchCounter, CounterLost};
use vmft_kvm::{KvmEngine, PointKind};
use vmft_log::entry::{Arrival, Entry, EntrySequence, OutputSequence, StopReason};
use vmft_log::point::{Branches, CodeAddress, ExecutionPoint};
use vmft_vmm::board::{BoardConfig, Bytes, UnixSeconds};
use vmft_vmm::engine::EngineKind;
use vmft_vmm::inputs::{
    Asked, Boundary, ClockControl, DeviceRequest, HostTime, InputError, InputSource, Live, LogEnd,
    LogSink, LogSource, PointScale, Recording, Replaying, Room,
};
use vmft_vmm::machine::{BootSource, Machine, MachineConfig, MachineError, RunEnd};
use vmft_vmm::outputs::{Assurance, HeldOutputs, KeptOutputs, Output, OutputKind, Outside};

const MEMORY: u64 = 64 << 20;
const LINES: u32 = 5;
/// Host time of a point. Guest time follows, and with it what is taken for the 200 µs that an arrival
/// waits for an exit: fewer branches than the guest computes for a line.
const POINT_NS: u64 = 600_000;

/// Hears of every instruction.
#[derive(Debug)]
struct Stepped {
    count: u64,
    armed: Option<u64>,
    late: u64,
    /// Misses this branch.
    blind_at: Option<u64>,
}

impl BranchCounter for Stepped {
    fn count(&mut self) -> Result<Branches, CounterLost> {
        Ok(Branches(self.count))
    }
    fn arm(&mut self, after: Branches) -> Result<(), CounterLost> {
        self.armed = Some(self.count + after.0 + self.late);
        Ok(())
    }
    fn disarm(&mut self) -> Result<(), CounterLost> {
        self.armed = None;
        Ok(())
    }
    fn margin(&self) -> Branches {
        Branches(32)
    }
    fn needs_steps(&self) -> bool {
        true
    }
    fn stepped(&mut self, branched: bool) -> bool {
        if branched && self.blind_at == Some(self.count) {
            self.blind_at = None;
        } else {
            self.count += u64::from(branched);
        }
        self.armed.is_some_and(|armed| self.count >= armed)
    }
}

fn machine(late: u64, blind_at: Option<u64>) -> Machine {
    let config = MachineConfig {
        board: BoardConfig {
            memory: Bytes(MEMORY),
            clock_base: UnixSeconds(1_288_000_000),
            disks: Vec::new(),
            entropy: false,
            net: None,
            cpus: CpuCount::ONE,
        },
        engine: EngineKind::Kvm { points: PointKind::Pmu },
    };
    let kernel = Arc::from(probe(LINES, 2_000).image());
    let source = BootSource { kernel, initramfs: None, cmdline: String::new(), disk: None };
    let counter = Stepped { count: 0, armed: None, late, blind_at };
    let engine = KvmEngine::open_counting(GuestRam::new(MEMORY).unwrap(), Box::new(counter))
        .expect("/dev/kvm opens (VMFT_NO_KVM=1 says that there is none)");
    Machine::on_engine(config, source, Box::new(engine)).unwrap()
}

/// A host on which a point takes a while, whatever it is, and where somebody keeps typing, and kicks
/// the machine at each.
#[derive(Debug)]
struct Typist {
    ns: u64,
    looked: u64,
    at: ExecutionPoint,
    kicker: Kicker,
}

impl InputSource for Typist {
    fn now(&mut self) -> HostTime {
        HostTime(self.ns)
    }
    fn take_asked(&mut self) -> Option<Asked> {
        None
    }
    fn take_arrival(&mut self, room: Room) -> Option<Arrival> {
        self.looked += 1;
        (room.console > 0 && self.looked.is_multiple_of(5))
            .then(|| Arrival::ConsoleInput(b"k".to_vec()))
    }
    fn wait(&mut self, deadline: Option<HostTime>, _: Room) -> bool {
        let deadline = deadline.map_or(self.ns + 1_000_000, |deadline| deadline.0);
        self.ns = self.ns.max(deadline);
        // At a place between two exits: something is there.
        deadline == 0
    }
    fn start(&mut self, wish: DeviceRequest) -> Result<(), InputError> {
        panic!("the probe guest has no device for {wish:?}");
    }
    fn take_boot(&mut self) -> Option<Result<BootSource, String>> {
        None
    }
    fn at(&mut self, boundary: &Boundary) {
        // The next run ends at its start; then the machine is let go.
        if boundary.here().is_some() && boundary.point > self.at {
            self.at = boundary.point;
            self.ns += POINT_NS;
            self.kicker.kick();
        }
    }

    fn wall_clock(&mut self) -> Option<vmft_log::point::WallTime> {
        None
    }

    fn hold_back(&mut self) -> bool {
        true
    }
}

#[derive(Debug, Default)]
struct Screen(Mutex<Vec<u8>>);

impl Outside for Screen {
    fn let_out(&self, output: Output, _: Assurance) {
        if let OutputKind::Console { bytes, .. } = output.kind {
            self.0.lock().unwrap().extend(bytes);
        }
    }

    fn backlog(&self) -> usize {
        0
    }

    fn not_out(&self) -> Vec<Output> {
        Vec::new()
    }

    fn all_let_out(&self) {}
}

#[derive(Debug, Default, Clone)]
struct Entries(Arc<Mutex<VecDeque<Entry>>>);

impl LogSink for Entries {
    fn append(&mut self, entry: &Entry) -> Result<Option<EntrySequence>, std::io::Error> {
        let mut entries = self.0.lock().unwrap();
        entries.push_back(entry.clone());
        Ok(Some(EntrySequence(entries.len() as u64)))
    }
    fn flush(&mut self) -> Result<(), std::io::Error> {
        Ok(())
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

    fn is_closed(&self) -> bool {
        false
    }
}

impl LogSource for Entries {
    fn next(&mut self, _: ExecutionPoint) -> Result<Entry, LogEnd> {
        self.0.lock().unwrap().pop_front().ok_or(LogEnd::Ended)
    }

    fn skip_to_checkpoint(&mut self, _: &dyn Fn(&[u8]) -> bool) -> Option<Vec<Entry>> {
        None
    }
}

/// The log of a run, and what the guest came to.
fn record() -> (VecDeque<Entry>, ExecutionPoint, u64) {
    let mut machine = machine(0, None);
    let screen = Arc::new(Screen::default());
    let gate = Arc::new(HeldOutputs::open(Arc::clone(&screen) as Arc<dyn Outside>));
    // A few points say how fast the guest is.
    let scale = PointScale { sample_points: 1, ..machine.scale() };
    let clock = ClockControl::new(&machine.clock(), machine.point(), scale);
    let log = Entries::default();
    let live = Live::new(
        Typist { ns: 0, looked: 0, at: ExecutionPoint::START, kicker: machine.kicker().unwrap() },
        clock,
    );
    let point = machine.point();
    let mut inputs = Recording::new(live, log.clone(), Arc::clone(&gate), point, OutputSequence(0));
    let end = machine.run(&mut inputs, &*gate).unwrap();
    assert_eq!(end, RunEnd::Stopped(StopReason::GuestPowerOff));
    inputs.stopped(machine.point(), machine.outputs(), StopReason::GuestPowerOff).unwrap();
    let shown = String::from_utf8(screen.0.lock().unwrap().clone()).unwrap();
    assert_eq!(shown, crate::engines::expected(LINES));
    let entries = log.0.lock().unwrap().clone();
    (entries, machine.point(), machine.full_digest())
}

/// Replays a log; the exits that agreed, and what the guest came to.
fn replay(
    log: &VecDeque<Entry>,
    late: u64,
    blind_at: Option<u64>,
) -> Result<(u64, ExecutionPoint, u64), MachineError> {
    let mut machine = machine(late, blind_at);
    let kept = Arc::new(KeptOutputs::default());
    let log = Entries(Arc::new(Mutex::new(log.clone())));
    let mut inputs = Replaying::new(log, Arc::clone(&kept), machine.point(), machine.ram().size());
    let end = machine.run(&mut inputs, &*kept)?;
    assert_eq!(end, RunEnd::Stopped(StopReason::GuestPowerOff));
    let (point, outputs) = (machine.point(), machine.outputs());
    assert_eq!(inputs.stopped(point, outputs, StopReason::GuestPowerOff)?, Ok(()));
    Ok((inputs.exits_agreed(), point, machine.full_digest()))
}

#[test]
fn a_guest_recorded_with_points_at_branches_replays_to_its_end() {
    if !kvm_is_here() {
        return;
    }
    let _turn = take_turn();
    let (mut log, point, state) = record();
    let between = |entry: &&Entry| {
        matches!(entry, Entry::Arrival { point, .. }
            if !point.get().is_multiple_of(ExecutionPoint::EXIT_STRIDE))
    };
    let landed = log.iter().filter(between).count();
    // Each is behind a branch that the log names; the first entry at a point is the hint.
    let hints = log.iter().filter(|entry| matches!(entry, Entry::Landing { .. })).count();
    assert!((1..=landed).contains(&hints), "{hints} hints for {landed} arrivals");
    for pair in log.make_contiguous().windows(2) {
        if let Entry::Landing { point, .. } = pair[1] {
            assert!(pair[0].point().is_none_or(|before| before < point), "{pair:?}");
            assert!(!point.get().is_multiple_of(ExecutionPoint::EXIT_STRIDE), "{pair:?}");
        }
    }
    println!("{} entries, {landed} arrivals between two exits, up to {point}", log.len());
    assert!(landed > 3, "{landed} arrivals between two exits");
    for late in [0, 20] {
        let (agreed, end, replayed) = replay(&log, late, None).unwrap();
        assert_eq!((end, replayed), (point, state), "{late} late");
        assert!(agreed > 50, "{agreed} exits");
    }
    // A log without hints, as it was written before there were any, and one with hints of no use.
    let mut plain = log.clone();
    plain.retain(|entry| !matches!(entry, Entry::Landing { .. }));
    assert_eq!(
        replay(&plain, 20, None).map(|(_, end, state)| (end, state)).unwrap(),
        (point, state)
    );
    for entry in &mut log {
        if let Entry::Landing { branch, .. } = entry {
            // Nothing is there.
            *branch = CodeAddress::try_from(branch.get() | 1 << 46).unwrap();
        }
    }
    let (_, end, replayed) = replay(&log, 20, None).unwrap();
    assert_eq!((end, replayed), (point, state));
    // A counter on the backup that misses one branch does not go unnoticed.
    let error = replay(&log, 0, Some(700)).expect_err("a miscount");
    assert!(matches!(error, MachineError::Input(InputError::Divergence(_))), "{error}");
    println!("{error}");
}
