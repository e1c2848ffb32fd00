//! What an exit costs: in the engine's run loop, in the least loop there is, and recorded.

use crate::figure::{Figure, Goal, median};
use crate::measure::Effort;
use crate::minimal::{CODE, EXITS, Minimal, cpu_time};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_backup::identity::{fingerprint, nonce};
use vmft_backup::recorded::FileLog;
use vmft_cpu::CpuCount;
use vmft_cpu::memory::MIN_MEMORY;
use vmft_kvm::PointKind;
use vmft_log::entry::{Arrival, Generation, StopReason};
use vmft_logging_channel::fingerprint::Identity;
use vmft_logging_channel::log_file::LogHeader;
use vmft_vmm::board::{BoardConfig, Bytes, UnixSeconds};
use vmft_vmm::engine::EngineKind;
use vmft_vmm::inputs::{
    Asked, Boundary, ClockControl, DeviceRequest, HostTime, InputError, InputSource, Inputs, Live,
    Recording, Room,
};
use vmft_vmm::machine::{BootSource, Machine, MachineConfig, RunEnd};
use vmft_vmm::outputs::{Assurance, HeldOutputs, Output, Outside};

/// Exits of one run.
const COUNT: u64 = 20_000;
const ENGINE: EngineKind = EngineKind::Kvm { points: PointKind::Exit };

/// A world with a clock and nothing else, that pauses the machine after so many exits.
#[derive(Debug)]
struct Quiet {
    since: Instant,
    point: u64,
    until: u64,
}

impl InputSource for Quiet {
    fn now(&mut self) -> HostTime {
        HostTime(u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
    fn take_asked(&mut self) -> Option<Asked> {
        (self.point >= self.until).then_some(Asked::Stop(StopReason::Operator))
    }
    fn take_arrival(&mut self, _: Room) -> Option<Arrival> {
        None
    }
    fn wait(&mut self, _: Option<HostTime>, _: Room) -> bool {
        false
    }
    fn start(&mut self, _: DeviceRequest) -> Result<(), InputError> {
        Ok(())
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

/// Nobody sees what the guest puts out, which is nothing.
#[derive(Debug)]
struct Nowhere;

impl Outside for Nowhere {
    fn let_out(&self, _: Output, _: Assurance) {}

    fn backlog(&self) -> usize {
        0
    }

    fn not_out(&self) -> Vec<Output> {
        Vec::new()
    }

    fn all_let_out(&self) {}
}

/// An ELF file of one segment: [`EXITS`].
fn kernel() -> Vec<u8> {
    let mut file = vec![0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let words = |file: &mut Vec<u8>, words: &[u64]| {
        file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    // Executable, x86-64, version 1; the entry; program headers behind this one; their number.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    words(&mut file, &[CODE, 64, 0]);
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let len = EXITS.len() as u64;
    words(&mut file, &[0x80, CODE, CODE, len, len, 0x1000]);
    file.resize(0x80, 0);
    file.extend(EXITS);
    file
}

fn machine() -> Result<Machine> {
    let config = MachineConfig {
        board: BoardConfig {
            memory: Bytes(MIN_MEMORY),
            clock_base: UnixSeconds(0),
            disks: Vec::new(),
            entropy: false,
            net: None,
            cpus: CpuCount::ONE,
        },
        engine: ENGINE,
    };
    let source =
        BootSource { kernel: kernel().into(), initramfs: None, cmdline: String::new(), disk: None };
    Ok(Machine::new(config, source)?)
}

/// CPU time of the first [`COUNT`] exits of a fresh machine.
fn run<I: Inputs>(
    recorded: impl FnOnce(&mut Machine, Live<Quiet>, &Arc<HeldOutputs>) -> Result<I>,
) -> Result<Duration> {
    let mut machine = machine()?;
    let gate = Arc::new(HeldOutputs::open(Arc::new(Nowhere) as Arc<dyn Outside>));
    let quiet = Quiet { since: Instant::now(), point: 0, until: COUNT };
    let clock = ClockControl::new(&machine.clock(), machine.point(), machine.scale());
    let mut inputs = recorded(&mut machine, Live::new(quiet, clock), &gate)?;
    let started = cpu_time()?;
    match machine.run(&mut inputs, &*gate)? {
        RunEnd::Stopped(StopReason::Operator) => Ok(cpu_time()? - started),
        end => bail!("the machine ended otherwise: {end:?}"),
    }
}

fn live() -> Result<Duration> {
    run(|_, live, _| Ok(live))
}

fn recorded() -> Result<Duration> {
    let directory = tempfile::tempdir()?;
    let file = File::create_new(directory.path().join("log"))?;
    run(|machine, live, gate| {
        let header = LogHeader {
            identity: Identity {
                pair: "bench".parse()?,
                generation: Generation(0),
                fingerprint: fingerprint(ENGINE, &machine.config().board),
            },
            metadata: BTreeMap::new(),
            nonce: nonce()?,
        };
        let log = FileLog::create(file, header, machine).context("the log")?;
        let (point, outputs) = (machine.point(), machine.outputs());
        Ok(Recording::new(live, log, Arc::clone(gate), point, outputs))
    })
}

/// The run loop against the least loop, and what recording adds, in turn.
pub fn exits(effort: &Effort) -> Result<Vec<Figure>> {
    let mut minimal = Minimal::new()?;
    // The first runs of each find the host's caches cold.
    minimal.run(COUNT)?;
    live()?;
    recorded()?;
    let each = |time: Duration| time.as_secs_f64() * 1e6 / COUNT as f64;
    let (mut least, mut ratios, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        let bare = each(minimal.run(COUNT)?);
        let alone = each(live()?);
        let logged = each(recorded()?);
        least.push(bare);
        ratios.push(alone / bare);
        added.push(logged - alone);
    }
    let note = format!("by CPU time; an exit of the least loop takes {:.2} µs", median(&least));
    Ok(vec![
        Figure::new("kvm-exit-cost", "ratio", Goal::AtMost(1.10), ratios, note),
        Figure::new("kvm-recording", "µs an exit", Goal::AtMost(1.0), added, String::new()),
    ])
}
