//! What goes wrong when, decided by the seed.

use std::fmt;
use vmft_fuzzing::Random;

/// A millisecond, in the simulator's nanoseconds.
pub const MS: u64 = 1_000_000;

/// Something that goes wrong, or that an operator does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A host dies, with everything in it.
    Crash(usize),
    /// A process is killed; its host says so to its peers.
    Kill(usize),
    /// A side whose process is over begins anew, as a standby.
    Restart(usize),
    /// A host stands still for so long.
    Freeze(usize, u64),
    /// Nothing gets from one side to another for so long.
    Cut(usize, usize, u64),
    /// Nothing gets to a side or from it for so long.
    Isolate(usize, u64),
    /// A side cannot reach the arbiter for so long.
    CutArbiter(usize, u64),
    /// A clock jumps ahead by so much.
    Jump(usize, u64),
    /// A clock stands still for so long.
    Stall(usize, u64),
    /// The operator stops a side that follows.
    Leave(usize),
}

/// Kinds of faults, for the table of coverage.
pub const FAULT_KINDS: [&str; 9] =
    ["crash", "kill", "freeze", "cut", "isolate", "arbiter", "clock", "leave", "generation"];

impl Fault {
    /// Whom it strikes.
    pub const fn side(self) -> usize {
        match self {
            Self::Crash(side)
            | Self::Kill(side)
            | Self::Restart(side)
            | Self::Freeze(side, _)
            | Self::Cut(side, ..)
            | Self::Isolate(side, _)
            | Self::CutArbiter(side, _)
            | Self::Jump(side, _)
            | Self::Stall(side, _)
            | Self::Leave(side) => side,
        }
    }

    /// Its place in [`FAULT_KINDS`]; none for what mends.
    pub const fn kind(self) -> Option<usize> {
        Some(match self {
            Self::Crash(_) => 0,
            Self::Kill(_) => 1,
            Self::Freeze(..) => 2,
            Self::Cut(..) => 3,
            Self::Isolate(..) => 4,
            Self::CutArbiter(..) => 5,
            Self::Jump(..) | Self::Stall(..) => 6,
            Self::Leave(_) => 7,
            Self::Restart(_) => return None,
        })
    }
}

/// A fault and its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// When.
    pub at: u64,
    /// What.
    pub fault: Fault,
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:7.3} ms  {:?}", self.at as f64 / MS as f64, self.fault)
    }
}

/// How the guest is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Backups replay.
    Lockstep,
    /// Backups are kept by epochs.
    Checkpoint,
}

/// Where a write is when it is completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// On the storage.
    None,
    /// In a cache that dies with the host that wrote; on the storage some time later, or with a flush.
    OfHost,
}

/// What happens when the time of faults is over and the world is healed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Nothing more.
    Heal,
    /// The live side dies at a moment at which it says that it is protected.
    LoseProtected,
    /// The only side that protects dies at such a moment.
    LoseProtector,
    /// The operator stops the machine.
    Stop,
}

/// One schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// How many sides there are; side 0 is the primary.
    pub sides: usize,
    /// How many may follow at a time.
    pub backups: usize,
    /// How the guest is protected.
    pub mode: Mode,
    /// What completed writes are worth.
    pub cache: Cache,
    /// When the others begin, and whether each is a standby.
    pub begin: Vec<(u64, bool)>,
    /// What goes wrong, in order.
    pub faults: Vec<Planned>,
    /// When that is over.
    pub chaos_end: u64,
    /// And then.
    pub ending: Ending,
}

impl Plan {
    /// The schedule of `seed`.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x706C_616E);
        let sides = [2, 2, 3, 3, 3, 4][random.below(6) as usize];
        let backups = if sides > 2 && random.chance(70) { 2 } else { 1 };
        let chaos_end = random.between(60, 320) * MS;
        let begin = |_| (random.below(120) * MS, random.chance(75));
        let begin: Vec<_> = (1..sides).map(begin).collect();
        let count = random.below(6);
        let fault = |_| {
            let at = random.below(chaos_end);
            Planned { at, fault: fault(&mut random, sides) }
        };
        let mut faults: Vec<_> = (0..count).map(fault).collect();
        faults.sort_by_key(|planned| planned.at);
        let ending = match random.below(100) {
            0..40 => Ending::LoseProtected,
            40..55 => Ending::LoseProtector,
            55..65 => Ending::Stop,
            _ => Ending::Heal,
        };
        // Drawn apart, so that schedules are what they were before there was a choice.
        let mode = match Random::new(seed ^ 0x6D6F_6465).chance(40) {
            true => Mode::Checkpoint,
            false => Mode::Lockstep,
        };
        let cache = match Random::new(seed ^ 0x6361_6368).chance(50) {
            true => Cache::OfHost,
            false => Cache::None,
        };
        Self { sides, backups, mode, cache, begin, faults, chaos_end, ending }
    }
}

fn fault(random: &mut Random, sides: usize) -> Fault {
    let side = random.below(sides as u64) as usize;
    let other = (side + 1 + random.below(sides as u64 - 1) as usize) % sides;
    let long = random.between(5, 200) * MS;
    match random.below(100) {
        0..16 => Fault::Crash(side),
        16..30 => Fault::Kill(side),
        30..42 => Fault::Restart(side),
        42..56 => Fault::Freeze(side, long),
        56..70 => Fault::Cut(side, other, long),
        70..78 => Fault::Isolate(side, long),
        78..88 => Fault::CutArbiter(side, long),
        88..92 => Fault::Jump(side, long),
        92..96 => Fault::Stall(side, long),
        _ => Fault::Leave(side),
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sides, backups, mode, cache, .. } = self;
        writeln!(f, "{sides} sides, --backups {backups}, {mode:?}, host's cache {cache:?}")?;
        for (side, (at, standby)) in (1..).zip(&self.begin) {
            let what = if *standby { "standby" } else { "backup" };
            writeln!(f, "{:7.3} ms  side {side} begins as a {what}", *at as f64 / MS as f64)?;
        }
        for planned in &self.faults {
            writeln!(f, "{planned}")?;
        }
        writeln!(f, "{:7.3} ms  healed; then {:?}", self.chaos_end as f64 / MS as f64, self.ending)
    }
}
