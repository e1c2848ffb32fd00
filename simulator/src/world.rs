//! The world of one schedule: time, hosts, links, the arbiter, the disk, and what goes wrong.

mod healing;

use crate::coverage::Coverage;
use crate::disk::{Job, Sent};
use crate::models::{Arbiter, Connection, End, Message, Storage};
use crate::oracle::Oracle;
use crate::plan::{Fault, MS, Plan};
use crate::side::{Answer, Clock, Join, Joining, Live, Process, Side};
use std::collections::BTreeMap;
use vmft_backup::arbiter::Verdict;
use vmft_backup::reign::{FollowEvent, LiveEvent};
use vmft_fuzzing::Random;
use vmft_log::entry::{EntrySequence, Generation, RequestId};
use vmft_logging_channel::fingerprint::{Fingerprint, Identity};
use vmft_logging_channel::frame::FrameDecoder;
use vmft_logging_channel::session::SessionId;
use vmft_logging_channel::time::MonotonicTime;

/// More events than any schedule has.
const MOST_EVENTS: u64 = 200_000;

/// A fault that is planted into the machinery, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// Nobody asks whether a write is still of the right generation, and the storage takes anyone's.
    NoFence,
    /// Outputs leave when they are marked.
    ReleaseEarly,
    /// A side that goes live does not let out what its predecessor may have left.
    KeptDropped,
    /// A side that goes live does not ask again for the writes its predecessor may have left.
    NoReissue,
    /// A side that goes live does not write again what its predecessor completed, and no flush covered.
    NoRewrite,
    /// A backup that joins is not told of a generation won meanwhile.
    GenerationNotTold,
    /// A backup that joins does not get the outputs that wait for another.
    JoinedShort,
    /// In checkpoint mode, outputs leave when the first piece of their epoch is acknowledged.
    EpochMarkedEarly,
    /// In checkpoint mode, pages are sent as changes of what a backup that has just joined never had.
    EncoderKept,
    /// In checkpoint mode, a backup joins while an epoch is under way.
    JoinedWithin,
    /// A side that has lost its generation goes on as if it had won.
    VerdictIgnored,
}

/// What happens at a moment.
#[derive(Debug)]
pub(crate) enum Event {
    Deliver(usize),
    Wake(usize),
    /// The guest of a live side runs a little.
    Guest(usize, u32),
    /// The epochs of a live side do their next step.
    Epoch(usize, u32),
    /// A backup replays a little.
    Replay(usize, u32),
    /// A question reaches the arbiter.
    Ask(usize, u32, Question),
    /// Its answer comes back.
    Answer(usize, u32, Answer),
    /// A request is about to be sent to the storage.
    Request(usize, u32, RequestId, Job),
    /// It arrives there, or in its host's cache.
    Land(Sent, RequestId, Job),
    /// A host writes the oldest of its cache to the storage, unless it has died so often by now.
    WriteBack(usize, u32),
    Begin(usize),
    Fault(usize),
    Thaw(usize),
    Unstall(usize),
    Healed,
}

/// What a side asks the arbiter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Question {
    Live(Generation),
    Ask(Generation),
    Announce(Generation, EntrySequence),
    Look(Generation),
}

/// How far the end of a schedule is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Chaos,
    /// Waits, after `from`, for a moment at which a side says that it is protected.
    Waiting {
        from: u64,
        until: u64,
    },
    /// Somebody has to go on until then, from so many outputs.
    Demand {
        until: u64,
        from: usize,
    },
    /// The machine has been stopped: nobody goes on.
    Stopped {
        until: u64,
    },
    Over,
}

/// The world.
#[derive(Debug)]
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) plant: Option<Plant>,
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    events: u64,
    pub(crate) random: Random,
    pub(crate) sides: Vec<Side>,
    pub(crate) connections: Vec<Connection>,
    /// Until when nothing gets from one side to another.
    cut_until: Vec<u64>,
    pub(crate) arbiter: Arbiter,
    pub(crate) storage: Storage,
    pub(crate) oracle: Oracle,
    pub(crate) coverage: Coverage,
    stage: Stage,
    trace: Option<Vec<String>>,
}

/// How a schedule ended.
#[derive(Debug)]
pub struct Outcome {
    /// What was wrong.
    pub failure: Option<String>,
    /// Which faults struck which step of a join.
    pub coverage: Coverage,
    /// Events that happened.
    pub events: u64,
    /// What happened, if that was wanted.
    pub trace: Vec<String>,
}

/// Runs one schedule.
pub fn run(seed: u64, plan: Plan, plant: Option<Plant>, traced: bool) -> Outcome {
    let mut world = World::new(seed, plan, plant, traced);
    world.run();
    let failure = world.oracle.failure.take();
    let trace = world.trace.take().unwrap_or_default();
    Outcome { failure, coverage: world.coverage, events: world.events, trace }
}

impl World {
    fn new(seed: u64, plan: Plan, plant: Option<Plant>, traced: bool) -> Self {
        let mut random = Random::new(seed);
        let side = |_| Side {
            incarnation: 1,
            process: Process::Off,
            deaths: 0,
            cache: Vec::new(),
            refused: None,
            clock: Clock::new(random.below(1_000) * MS),
            frozen_until: None,
            arbiter_cut_until: 0,
            standby: false,
            wake_at: None,
            answers: Vec::new(),
            connections: Vec::new(),
        };
        let sides: Vec<_> = (0..plan.sides).map(side).collect();
        let mut world = Self {
            cut_until: vec![0; plan.sides * plan.sides],
            plant,
            now: 0,
            queue: BTreeMap::new(),
            events: 0,
            random,
            sides,
            connections: Vec::new(),
            arbiter: Arbiter::default(),
            storage: Storage::default(),
            oracle: Oracle::default(),
            coverage: Coverage::default(),
            stage: Stage::Chaos,
            trace: traced.then(Vec::new),
            plan,
        };
        let first = world.sides[0].candidate(0);
        world.arbiter.try_win(Generation(1), &first);
        let live = Live::new(Generation(1), world.new_guest(seed), &world.identity(Generation(1)));
        world.go_live(0, live);
        for (side, (at, standby)) in (1..).zip(world.plan.begin.clone()) {
            world.sides[side].standby = standby;
            world.schedule(at, Event::Begin(side));
        }
        for (index, planned) in world.plan.faults.clone().iter().enumerate() {
            world.schedule(planned.at, Event::Fault(index));
        }
        world.schedule(world.plan.chaos_end, Event::Healed);
        world
    }

    fn run(&mut self) {
        while self.oracle.failure.is_none() && self.stage != Stage::Over {
            let Some(((at, _), event)) = self.queue.pop_first() else { break };
            self.now = at;
            self.events += 1;
            self.handle(event);
            self.look_at_stage();
            if self.events > MOST_EVENTS {
                self.oracle.fail("somebody is busy without end".to_owned());
            }
        }
    }

    /// Says what happens, if that is wanted.
    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:8.3} ms  {}", self.now as f64 / MS as f64, text()));
        }
    }

    pub(crate) fn schedule(&mut self, at: u64, event: Event) {
        self.events += 1;
        self.queue.insert((at.max(self.now), self.events), event);
    }

    pub(crate) fn identity(&self, generation: Generation) -> Identity {
        let pair = "pair".parse().expect("a good name");
        Identity { pair, generation, fingerprint: Fingerprint::new() }
    }

    /// What a side's clock shows.
    pub(crate) fn local(&self, side: usize) -> MonotonicTime {
        self.sides[side].clock.read(self.now)
    }

    fn is_current(&self, side: usize, incarnation: u32) -> bool {
        self.sides[side].incarnation == incarnation
    }

    pub(crate) fn is_frozen(&self, side: usize) -> bool {
        self.sides[side].frozen_until.is_some()
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Deliver(side) | Event::Wake(side) => {
                self.sides[side].wake_at = None;
                self.run_side(side);
            }
            Event::Guest(side, incarnation) if self.is_current(side, incarnation) => {
                self.run_guest_of(side);
                if !matches!(self.sides[side].process, Process::Live(_)) {
                    return;
                }
                let pause = self.random.between(2, 14) * MS;
                self.schedule(self.now + pause, Event::Guest(side, incarnation));
            }
            Event::Epoch(side, incarnation) if self.is_current(side, incarnation) => {
                self.step_epochs(side);
                if matches!(self.sides[side].process, Process::Live(_)) {
                    self.schedule_epochs(side, incarnation);
                }
            }
            Event::Replay(side, incarnation) if self.is_current(side, incarnation) => {
                self.replay_of(side);
                if !matches!(self.sides[side].process, Process::Following(_)) {
                    return;
                }
                let pause = self.random.between(1, 9) * MS;
                self.schedule(self.now + pause, Event::Replay(side, incarnation));
            }
            Event::Ask(side, incarnation, question) => self.asked(side, incarnation, question),
            Event::Answer(side, incarnation, answer) if self.is_current(side, incarnation) => {
                self.sides[side].answers.push(answer);
                self.run_side(side);
            }
            Event::Request(side, incarnation, request, job) => {
                self.request(side, incarnation, request, job);
            }
            Event::Land(sent, request, job) => self.land(sent, request, &job),
            Event::WriteBack(side, deaths) => self.write_back(side, deaths),
            Event::Begin(side) => self.begin_joining(side, Generation(0)),
            Event::Fault(index) => self.strike(self.plan.faults[index].fault),
            Event::Thaw(side) => {
                if self.sides[side].frozen_until.is_some_and(|until| until <= self.now) {
                    self.sides[side].frozen_until = None;
                    self.note(|| format!("host {side} goes on"));
                    self.run_side(side);
                }
            }
            Event::Unstall(side) => {
                self.sides[side].clock.change(self.now, 0, true);
                self.run_side(side);
            }
            Event::Healed => self.healed(),
            Event::Guest(..) | Event::Epoch(..) | Event::Replay(..) | Event::Answer(..) => {}
        }
    }

    /// Sends a message from one end of a connection.
    pub(crate) fn send(&mut self, connection: usize, from: End, message: Message) {
        let (source, to) = (self.connections[connection].side(from), from.other());
        let target = self.connections[connection].side(to);
        let way = self.random.between(50, 2_500) * 1_000;
        let open = self.cut_until[source * self.plan.sides + target].max(self.now);
        let at = self.connections[connection].send(to, open + way, message);
        self.schedule(at, Event::Deliver(target));
    }

    /// What has arrived at an end of a connection.
    pub(crate) fn receive(&mut self, connection: usize, end: End) -> Option<Message> {
        self.connections[connection].receive(end, self.now)
    }

    /// Asks the arbiter.
    pub(crate) fn ask(&mut self, side: usize, question: Question) {
        let way = self.random.between(100, 3_000) * 1_000;
        let incarnation = self.sides[side].incarnation;
        self.schedule(self.now + way, Event::Ask(side, incarnation, question));
    }

    pub(crate) fn reaches_arbiter(&self, side: usize) -> bool {
        self.sides[side].arbiter_cut_until <= self.now
    }

    fn asked(&mut self, side: usize, incarnation: u32, question: Question) {
        if !self.is_current(side, incarnation) {
            return;
        }
        let who = self.sides[side].candidate(side);
        let reached = self.reaches_arbiter(side);
        // The answer can be lost although the question has arrived.
        let lost = !reached || (self.stage == Stage::Chaos && self.random.chance(5));
        let why = || "the arbiter cannot be reached".to_owned();
        let answer = match question {
            Question::Live(generation) | Question::Ask(generation) => {
                let verdict = reached.then(|| self.arbiter.try_win(generation, &who));
                let ignored = self.plant == Some(Plant::VerdictIgnored);
                let verdict = verdict.map(|v| if ignored { Verdict::Won } else { v });
                self.note(|| format!("side {side} asks for {generation:?}: {verdict:?}"));
                let verdict = verdict.filter(|_| !lost);
                match question {
                    Question::Live(_) => Answer::Live(
                        verdict.map_or_else(|| LiveEvent::Unreachable(why()), LiveEvent::Verdict),
                    ),
                    _ => Answer::Follow(
                        verdict
                            .map_or_else(|| FollowEvent::Unreachable(why()), FollowEvent::Verdict),
                    ),
                }
            }
            Question::Announce(generation, last) => {
                let ahead = reached && self.arbiter.announce(generation, &who, last) && !lost;
                Answer::Follow(FollowEvent::Announced { ahead })
            }
            Question::Look(generation) => {
                let free = !lost && self.arbiter.winner(generation).is_none();
                Answer::Follow(FollowEvent::Looked { free })
            }
        };
        let way = self.random.between(100, 3_000) * 1_000;
        self.schedule(self.now + way, Event::Answer(side, incarnation, answer));
    }

    /// A side begins to look for whoever is live.
    pub(crate) fn begin_joining(&mut self, side: usize, known: Generation) {
        if !matches!(self.sides[side].process, Process::Off | Process::Over) {
            return;
        }
        let known = known.max(self.arbiter.latest().0);
        let joining = self.joining(side, known);
        self.note(|| format!("side {side} looks for a live one, and knows of {known:?}"));
        self.sides[side].process = joining;
        self.run_side(side);
    }

    /// A process that joins.
    pub(crate) fn joining(&self, side: usize, known: Generation) -> Process {
        let now = self.local(side);
        Process::Joining(Box::new(Joining {
            known,
            next: 0,
            join: Join::Idle(now),
            connection: usize::MAX,
            decoder: FrameDecoder::new(SessionId::HANDSHAKE),
            deadline: now,
            since: now,
        }))
    }

    /// A side's process is over.
    pub(crate) fn end_process(&mut self, side: usize, why: String, says_so: bool) {
        self.note(|| format!("side {side} is over: {why}"));
        let connections = std::mem::take(&mut self.sides[side].connections);
        for (connection, end) in connections {
            if says_so {
                self.send(connection, end, Message::Closed);
            } else {
                self.connections[connection].drop_from(end);
            }
        }
        self.sides[side].incarnation += 1;
        self.sides[side].answers.clear();
        self.sides[side].process = Process::Over;
    }

    fn strike(&mut self, fault: Fault) {
        self.note(|| format!("FAULT {fault:?}"));
        if let Some(kind) = fault.kind() {
            for side in &self.sides {
                if let Process::Live(live) = &side.process {
                    live.peers.iter().for_each(|peer| self.coverage.add(peer.phase.index(), kind));
                }
            }
        }
        let now = self.now;
        match fault {
            Fault::Crash(side) => self.crash(side),
            Fault::Kill(side) => self.end_process(side, "it was killed".to_owned(), true),
            Fault::Restart(side) => {
                if matches!(self.sides[side].process, Process::Over) {
                    self.sides[side].standby = true;
                    self.begin_joining(side, Generation(0));
                }
            }
            Fault::Freeze(side, long) => {
                let until = now + long;
                let frozen = &mut self.sides[side].frozen_until;
                *frozen = Some(frozen.map_or(until, |known| known.max(until)));
                self.schedule(until, Event::Thaw(side));
            }
            Fault::Cut(from, to, long) => self.cut(from, to, now + long),
            Fault::Isolate(side, long) => {
                for other in 0..self.plan.sides {
                    self.cut(side, other, now + long);
                    self.cut(other, side, now + long);
                }
            }
            Fault::CutArbiter(side, long) => self.sides[side].arbiter_cut_until = now + long,
            Fault::Jump(side, long) => {
                self.sides[side].clock.change(now, long, true);
                self.run_side(side);
            }
            Fault::Stall(side, long) => {
                self.sides[side].clock.change(now, 0, false);
                self.schedule(now + long, Event::Unstall(side));
            }
            Fault::Leave(side) => self.leave(side),
        }
    }

    /// A host dies, with its processes and its cache.
    pub(crate) fn crash(&mut self, side: usize) {
        self.end_process(side, "its host has died".to_owned(), false);
        self.sides[side].deaths += 1;
        self.sides[side].cache.clear();
    }

    fn cut(&mut self, from: usize, to: usize, until: u64) {
        let cut = &mut self.cut_until[from * self.plan.sides + to];
        *cut = (*cut).max(until);
    }

    /// When a side has to be looked at next, by its own clock.
    pub(crate) fn wake_at(&mut self, side: usize, local: Option<MonotonicTime>) {
        let Some(at) = local.and_then(|local| self.sides[side].clock.when(local)) else { return };
        // A clock that stands still is read again when it runs.
        let at = at.max(self.now + 1);
        if self.sides[side].wake_at.is_none_or(|known| at < known || known <= self.now) {
            self.sides[side].wake_at = Some(at);
            self.schedule(at, Event::Wake(side));
        }
    }
}
