//! One side: its process, its clock, its host.

use crate::disk::{Cached, Job};
use crate::epochs::{Copy, Epochs};
use crate::guest::Guest;
use crate::models::{End, JoinContent, ProcessName};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use vmft_backup::arbiter::Candidate;
use vmft_backup::reign::{FollowEvent, FollowReign, LiveEvent, LiveReign};
use vmft_backup::status::Role;
use vmft_log::entry::{
    Arrival, EntrySequence, Generation, LogPosition, OutputSequence, RequestId, StopReason,
};
use vmft_logging_channel::backups::{BackupKey, Backups};
use vmft_logging_channel::detector::Detector;
use vmft_logging_channel::frame::FrameDecoder;
use vmft_logging_channel::handshake::{Answered, Offered, SessionTerms};
use vmft_logging_channel::receiver::Receiver;
use vmft_logging_channel::session::SessionId;
use vmft_logging_channel::time::MonotonicTime;
use vmft_logging_channel::transport::EndCause;
use vmft_vmm::outputs::{Assurance, HeldOutputs, KeptOutputs, Output, Outside};

/// A host's clock: it may stand still, and jump ahead.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    since: u64,
    local: u64,
    runs: bool,
}

impl Clock {
    /// One with an origin of its own.
    pub const fn new(local: u64) -> Self {
        Self { since: 0, local, runs: true }
    }

    /// What it shows at `now`.
    pub const fn read(&self, now: u64) -> MonotonicTime {
        let ran = if self.runs { now - self.since } else { 0 };
        MonotonicTime::from_ns(self.local + ran)
    }

    /// When it shows `local`; `None` while it stands still.
    pub const fn when(&self, local: MonotonicTime) -> Option<u64> {
        if self.runs { Some(self.since + local.as_ns().saturating_sub(self.local)) } else { None }
    }

    /// From `now` on it runs, or does not, after a jump.
    pub const fn change(&mut self, now: u64, jump: u64, runs: bool) {
        *self = Self { since: now, local: self.read(now).as_ns() + jump, runs };
    }
}

/// What leaves a live side.
#[derive(Debug, Default)]
pub struct Outbox(Mutex<VecDeque<Output>>);

impl Outbox {
    /// The next output that has been let out.
    pub fn take(&self) -> Option<Output> {
        self.0.lock().expect("one thread only").pop_front()
    }
}

impl Outside for Outbox {
    fn let_out(&self, output: Output, _: Assurance) {
        self.0.lock().expect("one thread only").push_back(output);
    }

    fn backlog(&self) -> usize {
        0
    }

    fn not_out(&self) -> Vec<Output> {
        Vec::new()
    }

    fn all_let_out(&self) {}
}

/// How far a live side is with one who has connected.
#[derive(Debug)]
pub enum Phase {
    /// Its hello is awaited.
    Hello,
    /// Its confirmation is awaited.
    Confirm(Box<Answered>),
    /// Its checkpoint is sent while the guest runs; its log begins after this moment.
    Sending(MonotonicTime),
    /// Its log has begun; the rest is sent until this moment.
    Rest(MonotonicTime, Box<JoinContent>, LogPosition),
    /// It has to say that it has it all.
    Accepting,
    /// It follows.
    Session(Box<Detector>),
}

impl Phase {
    /// The steps of a join, for the table of coverage.
    pub const NAMES: [&str; 6] = ["hello", "confirm", "sending", "begun", "accepting", "following"];

    /// Its place in [`Self::NAMES`].
    pub const fn index(&self) -> usize {
        match self {
            Self::Hello => 0,
            Self::Confirm(_) => 1,
            Self::Sending(_) => 2,
            Self::Rest(..) => 3,
            Self::Accepting => 4,
            Self::Session(_) => 5,
        }
    }
}

/// One who has connected to a live side.
#[derive(Debug)]
pub struct Peer {
    /// The connection.
    pub connection: usize,
    /// Finds the frames.
    pub decoder: FrameDecoder,
    /// How far.
    pub phase: Phase,
    /// When the step under way is given up.
    pub deadline: MonotonicTime,
    /// From the handshake on.
    pub key: Option<BackupKey>,
    /// The session's name, from then on.
    pub session: SessionId,
    /// It takes a place.
    pub has_place: bool,
    /// This side has said goodbye.
    pub left_at: Option<MonotonicTime>,
}

impl Peer {
    /// One who has just connected.
    pub fn new(connection: usize, deadline: MonotonicTime) -> Self {
        Self {
            connection,
            decoder: FrameDecoder::new(SessionId::HANDSHAKE),
            phase: Phase::Hello,
            deadline,
            key: None,
            session: SessionId::HANDSHAKE,
            has_place: false,
            left_at: None,
        }
    }
}

/// A side that runs the guest.
#[derive(Debug)]
pub struct Live {
    /// The judge.
    pub reign: LiveReign,
    /// The channel's backups.
    pub backups: Backups<()>,
    /// The gate.
    pub gate: HeldOutputs,
    /// What the gate lets out.
    pub outbox: Arc<Outbox>,
    /// The guest.
    pub guest: Guest,
    /// Whoever has connected.
    pub peers: Vec<Peer>,
    /// What waits for the guest.
    pub arrivals: VecDeque<Arrival>,
    /// In checkpoint mode, while somebody follows.
    pub epochs: Option<Epochs>,
    /// Which entry marks outputs up to which.
    pub marks: BTreeMap<OutputSequence, EntrySequence>,
    /// The generation disk writes are of.
    pub generation: Generation,
    /// Requests of its guest that wait until what was completed before it is written again.
    pub waiting: Option<Vec<(RequestId, Job)>>,
    /// No write is begun any more.
    pub shut: bool,
    /// The machine halts.
    pub halted: bool,
    /// What `vmft status` says.
    pub role: Role,
    /// The machine has been stopped on purpose.
    pub stopped: bool,
    /// It has said goodbye.
    pub left: bool,
}

/// How far a side is with joining.
#[derive(Debug)]
pub enum Join {
    /// It tries again at this moment.
    Idle(MonotonicTime),
    /// The answer to its hello is awaited.
    Hello(Box<Offered>),
    /// The checkpoint is awaited.
    Checkpoint(Box<SessionTerms>),
}

/// A side that looks for a live one.
#[derive(Debug)]
pub struct Joining {
    /// The last generation it knows of.
    pub known: Generation,
    /// Which side it tries next.
    pub next: usize,
    /// How far it is.
    pub join: Join,
    /// The connection, while there is one.
    pub connection: usize,
    /// Finds the frames.
    pub decoder: FrameDecoder,
    /// When the step under way is given up.
    pub deadline: MonotonicTime,
    /// When it began to look.
    pub since: MonotonicTime,
}

/// A side that follows.
#[derive(Debug)]
pub struct Following {
    /// The judge.
    pub reign: FollowReign,
    /// The session.
    pub receiver: Receiver,
    /// Watches the primary.
    pub detector: Detector,
    /// The connection.
    pub connection: usize,
    /// Finds the frames.
    pub decoder: FrameDecoder,
    /// Outputs that may not be out.
    pub kept: KeptOutputs,
    /// The guest.
    pub guest: Guest,
    /// Its memory, in checkpoint mode.
    pub copy: Option<Copy>,
    /// How the session ended.
    pub over: Option<EndCause>,
    /// The judge knows how.
    pub told: bool,
    /// The primary has said something in this session.
    pub heard: bool,
    /// It has been told that the log is at its end.
    pub log_ended: bool,
    /// The log says that the machine stops.
    pub stopped: Option<StopReason>,
    /// The operator stops it.
    pub leaving: bool,
}

/// What runs on a side's host.
#[derive(Debug)]
pub enum Process {
    /// Nothing yet.
    Off,
    /// A live side.
    Live(Box<Live>),
    /// One that joins.
    Joining(Box<Joining>),
    /// One that follows.
    Following(Box<Following>),
    /// Its process is over.
    Over,
}

/// An answer that has come back from the arbiter.
#[derive(Debug)]
pub enum Answer {
    /// For a live side.
    Live(LiveEvent),
    /// For one that follows.
    Follow(FollowEvent),
}

/// One side.
#[derive(Debug)]
pub struct Side {
    /// Counts its processes.
    pub incarnation: u32,
    /// What runs.
    pub process: Process,
    /// Counts its host's deaths.
    pub deaths: u32,
    /// What its host's cache has for the storage, oldest first.
    pub cache: Vec<Cached>,
    /// The last process here of which the storage has refused a write.
    pub refused: Option<ProcessName>,
    /// Its host's clock.
    pub clock: Clock,
    /// Its host stands still until then.
    pub frozen_until: Option<u64>,
    /// It cannot reach the arbiter until then.
    pub arbiter_cut_until: u64,
    /// It joins again instead of halting.
    pub standby: bool,
    /// When it is to be looked at.
    pub wake_at: Option<u64>,
    /// Answers that wait for a host that stands still.
    pub answers: Vec<Answer>,
    /// Its ends of connections.
    pub connections: Vec<(usize, End)>,
}

impl Side {
    /// True if its session is over, and it may be asking for the next generation.
    pub const fn is_racing(&self) -> bool {
        matches!(&self.process, Process::Following(following) if following.over.is_some())
    }

    /// Who it is to the arbiter.
    pub fn candidate(&self, index: usize) -> Candidate {
        Candidate {
            id: format!("{index}.{}", self.incarnation),
            host: format!("host {index}").into(),
            pid: self.incarnation,
            role: "side".into(),
        }
    }
}
