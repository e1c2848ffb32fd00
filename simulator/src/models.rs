//! What the sides share: the arbiter and the disk, and the network between them.

use crate::guest::{Guest, Write};
use std::collections::{BTreeMap, VecDeque};
use vmft_backup::arbiter::{Candidate, Verdict};
use vmft_log::entry::{EntrySequence, Generation, LogPosition};
use vmft_vmm::outputs::Output;

/// The directory on shared storage: one winner for each generation.
#[derive(Debug, Default)]
pub struct Arbiter {
    winners: BTreeMap<Generation, Candidate>,
    announced: BTreeMap<(Generation, String), EntrySequence>,
}

impl Arbiter {
    /// The test-and-set.
    pub fn try_win(&mut self, generation: Generation, who: &Candidate) -> Verdict {
        let winner = self.winners.entry(generation).or_insert_with(|| who.clone());
        if winner.id == who.id { Verdict::Won } else { Verdict::Lost { winner: winner.clone() } }
    }

    /// Says how far a candidate is, and returns whether another has said that it is further.
    pub fn announce(
        &mut self,
        generation: Generation,
        who: &Candidate,
        last: EntrySequence,
    ) -> bool {
        self.announced.insert((generation, who.id.clone()), last);
        let others =
            self.announced.iter().filter(|((of, id), _)| *of == generation && *id != who.id);
        others.into_iter().any(|(_, other)| *other > last)
    }

    /// Who has won a generation.
    pub fn winner(&self, generation: Generation) -> Option<&Candidate> {
        self.winners.get(&generation)
    }

    /// The last generation anyone has won, and who has.
    pub fn latest(&self) -> (Generation, &Candidate) {
        let latest = self.winners.last_key_value();
        latest.map(|(generation, who)| (*generation, who)).expect("a pair has begun")
    }
}

/// Names one process of one side.
pub type ProcessName = (usize, u32);

/// The shared disk. It takes writes of the side that has registered last.
#[derive(Debug, Default)]
pub struct Storage {
    registered: Option<ProcessName>,
    sectors: BTreeMap<u64, u64>,
}

impl Storage {
    /// From now on writes of others are refused.
    pub const fn register(&mut self, side: ProcessName) {
        self.registered = Some(side);
    }

    /// True if this side has registered last: nobody has written over what it has flushed.
    pub fn is_of(&self, side: ProcessName) -> bool {
        self.registered == Some(side)
    }

    /// A write arrives. False if it is refused. `fenced`: whether the storage looks at who sends it.
    pub fn write(&mut self, side: ProcessName, write: Write, fenced: bool) -> bool {
        if fenced && self.registered != Some(side) {
            return false;
        }
        self.sectors.insert(write.sector, write.value);
        true
    }

    /// What a sector holds.
    pub fn sector(&self, sector: u64) -> Option<u64> {
        self.sectors.get(&sector).copied()
    }
}

/// What a backup joins with: the guest, and what it has put out that is not known to be out.
#[derive(Debug, Clone)]
pub struct JoinContent {
    /// The guest, where the backup's log begins.
    pub guest: Guest,
    /// Outputs from before, in order.
    pub not_out: Vec<Output>,
}

/// What goes over a connection.
#[derive(Debug)]
pub enum Message {
    /// A sealed frame.
    Frame(Vec<u8>),
    /// The end of a checkpoint, with what it stands for.
    Checkpoint(Box<JoinContent>, LogPosition),
    /// The peer has closed.
    Closed,
}

/// Which end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// The backup's, which has connected.
    Backup,
    /// The primary's.
    Primary,
}

impl End {
    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::Backup => Self::Primary,
            Self::Primary => Self::Backup,
        }
    }

    const fn index(self) -> usize {
        match self {
            Self::Backup => 0,
            Self::Primary => 1,
        }
    }
}

/// One connection: two pipes that keep the order of what is sent.
#[derive(Debug)]
pub struct Connection {
    sides: [usize; 2],
    /// Towards each end, with the time of arrival.
    pipes: [VecDeque<(u64, Message)>; 2],
}

impl Connection {
    /// Between the side of a backup and that of a primary.
    pub const fn new(backup: usize, primary: usize) -> Self {
        Self { sides: [backup, primary], pipes: [VecDeque::new(), VecDeque::new()] }
    }

    /// The side at one end.
    pub const fn side(&self, end: End) -> usize {
        self.sides[end.index()]
    }

    /// Sends a message towards `end`, to be there at `at` at the earliest. When it will be there.
    pub fn send(&mut self, end: End, at: u64, message: Message) -> u64 {
        let pipe = &mut self.pipes[end.index()];
        let at = pipe.back().map_or(at, |(last, _)| at.max(*last));
        pipe.push_back((at, message));
        at
    }

    /// What has arrived at `end` by `now`.
    pub fn receive(&mut self, end: End, now: u64) -> Option<Message> {
        let pipe = &mut self.pipes[end.index()];
        pipe.front().is_some_and(|(at, _)| *at <= now).then(|| pipe.pop_front())?.map(|(_, m)| m)
    }

    /// Nothing that is on its way arrives any more: a host has died, with what it had to send.
    pub fn drop_from(&mut self, end: End) {
        self.pipes[end.other().index()].clear();
    }
}
