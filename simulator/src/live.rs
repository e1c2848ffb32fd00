//! The thin shell of a live side, as the simulator has it: executes what the judge says.

use crate::coverage::GENERATION;
use crate::disk::Job;
use crate::epochs::Epochs;
use crate::guest::Guest;
use crate::models::{End, JoinContent, Message};
use crate::plan::{MS, Mode};
use crate::side::{Answer, Live, Outbox, Phase, Process};
use crate::world::{Event, Plant, Question, World};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use vmft_backup::reign::{LiveAction, LiveEvent, LiveReign, Standing};
use vmft_backup::status::Role;
use vmft_log::entry::{Arrival, Entry, EntrySequence, Generation, OutputSequence, StopReason};
use vmft_logging_channel::backups::Backups;
use vmft_logging_channel::detector::DetectorConfig;
use vmft_logging_channel::fingerprint::Identity;
use vmft_logging_channel::frame::FrameKind;
use vmft_logging_channel::sender::SenderConfig;
use vmft_logging_channel::session::GoodbyeReason;
use vmft_logging_channel::transport::EndCause;
use vmft_vmm::outputs::{HeldOutputs, Output, OutputGate, OutputKind, Outside};

/// How long each step before the session may take.
pub(crate) const SETUP: Duration = Duration::from_millis(120);
/// When a side is suspected.
pub(crate) const DETECTOR: DetectorConfig = DetectorConfig {
    heartbeat_interval: Duration::from_millis(20),
    suspect_after: Duration::from_millis(60),
};
const SENDER: SenderConfig = SenderConfig {
    capacity: 16 << 20,
    batch_delay: Duration::from_millis(1),
    heartbeat_interval: DETECTOR.heartbeat_interval,
    stall_timeout: Duration::from_millis(400),
};
/// How long a peer that was said goodbye to may take to close.
pub(crate) const LINGER: Duration = Duration::from_millis(60);

impl Live {
    /// A side that goes live with this guest.
    pub(crate) fn new(generation: Generation, guest: Guest, identity: &Identity) -> Self {
        let outbox = Arc::new(Outbox::default());
        Self {
            reign: LiveReign::new(generation),
            backups: Backups::new(identity.clone(), EntrySequence(0)),
            gate: HeldOutputs::open(Arc::clone(&outbox) as Arc<dyn Outside>),
            outbox,
            guest,
            peers: Vec::new(),
            arrivals: VecDeque::new(),
            epochs: None,
            marks: BTreeMap::new(),
            generation,
            waiting: None,
            shut: false,
            halted: false,
            role: Role::Alone,
            stopped: false,
            left: false,
        }
    }

    /// True if `vmft status` says that a backup could go live in this side's place.
    pub(crate) fn says_protected(&self) -> bool {
        self.role == Role::Primary && !self.halted && !self.stopped
    }
}

impl World {
    /// A side is live from now on: lets out what its predecessor may have left, and its guest runs.
    pub(crate) fn go_live(&mut self, side: usize, mut live: Live) {
        self.oracle.goes_live(side, live.generation, &live.guest);
        let name = (side, self.sides[side].incarnation);
        self.storage.register(name);
        self.take_over_disk(side, &mut live);
        let incarnation = self.sides[side].incarnation;
        self.sides[side].process = Process::Live(Box::new(live));
        self.schedule(self.now + MS, Event::Guest(side, incarnation));
        if self.plan.mode == Mode::Checkpoint {
            self.schedule_epochs(side, incarnation);
        }
        self.run_side(side);
    }

    /// Looks at a side: what has come, what is to be sent, what the clock says.
    pub(crate) fn run_side(&mut self, side: usize) {
        if self.is_frozen(side) {
            return;
        }
        let mut process = std::mem::replace(&mut self.sides[side].process, Process::Off);
        let next = match &mut process {
            Process::Live(live) => {
                self.run_live(side, live);
                let halted = live.halted;
                halted.then(|| "it has halted".to_owned())
            }
            Process::Joining(joining) => {
                let next = self.run_joining(side, joining);
                if let Some(next) = next {
                    self.sides[side].process = next;
                    return self.run_side(side);
                }
                None
            }
            Process::Following(following) => {
                self.run_following(side, following);
                None
            }
            Process::Off | Process::Over => None,
        };
        self.sides[side].process = process;
        if let Some(why) = next {
            self.end_process(side, why, true);
        }
    }

    fn run_live(&mut self, side: usize, live: &mut Live) {
        for answer in std::mem::take(&mut self.sides[side].answers) {
            if let Answer::Live(event) = answer {
                self.judge(side, live, event);
            }
        }
        let mut index = 0;
        while index < live.peers.len() {
            match self.run_peer(side, live, index) {
                None => index += 1,
                Some(cause) => self.end_peer(side, live, index, cause),
            }
        }
        let now = self.local(side);
        live.reign.handle_timeout(now);
        self.execute(side, live);
        self.release(side, live);
        self.leave_when_stopped(live);
        self.transmit_live(side, live);
        let mut next = live.reign.poll_timeout();
        for peer in &live.peers {
            let wakes = match &peer.phase {
                Phase::Rest(until, ..) if *until > now => [Some(*until), None, None],
                Phase::Session(detector) => {
                    let session = peer.key.and_then(|key| live.backups.session(key));
                    let left = peer.left_at.map(|at| at.after(LINGER));
                    [session.and_then(|s| s.sender().poll_timeout()), detector.poll_timeout(), left]
                }
                _ => [Some(peer.deadline), None, None],
            };
            next = wakes.into_iter().flatten().chain(next).min();
        }
        self.wake_at(side, next);
    }

    pub(crate) fn judge(&mut self, side: usize, live: &mut Live, event: LiveEvent) -> bool {
        self.note(|| format!("side {side}: {event:?}"));
        let now = self.local(side);
        live.reign.handle_event(now, event);
        self.execute(side, live)
    }

    /// Does what the judge says. False if a backup was turned away.
    fn execute(&mut self, side: usize, live: &mut Live) -> bool {
        let mut admitted = true;
        while let Some(action) = live.reign.poll_action() {
            self.note(|| format!("side {side}:   {action:?}"));
            match action {
                LiveAction::Admit(_) | LiveAction::Tell(_) => {}
                LiveAction::TurnAway(_) => admitted = false,
                LiveAction::Protect => live.gate.protect(),
                LiveAction::Hold => live.gate.hold(),
                LiveAction::Release => live.gate.acknowledged(live.backups.acknowledged()),
                LiveAction::Resume => live.gate.resume(live.backups.acknowledged()),
                LiveAction::Unprotect => live.gate.unprotect(),
                LiveAction::Shut => {
                    live.gate.shut();
                    live.shut = true;
                }
                LiveAction::Ask(generation) => self.ask(side, Question::Live(generation)),
                LiveAction::Advance(generation) => {
                    live.generation = generation;
                    self.oracle.goes_on(side, generation);
                }
                LiveAction::Reopen(generation) => {
                    for peer in &live.peers {
                        self.coverage.add(peer.phase.index(), GENERATION);
                    }
                    live.backups.reopen(generation);
                }
                LiveAction::Halt(_) => live.halted = true,
                LiveAction::Show(role) => live.role = role,
            }
            self.release(side, live);
        }
        admitted
    }

    /// What the gate has let out gets out.
    pub(crate) fn release(&mut self, side: usize, live: &mut Live) {
        let mut last = None;
        while let Some(output) = live.outbox.take() {
            self.check_marked(side, live, output.sequence);
            let said = live.guest.said(output.sequence);
            match output.kind {
                OutputKind::Disk { request, .. } => {
                    if let Some(job) = Job::of(&live.guest, request) {
                        self.begin_job(side, live, request, job);
                    }
                }
                OutputKind::Console { .. } | OutputKind::Packet(_) => {
                    let (from, said) = ((side, self.sides[side].incarnation), said.unwrap_or(0));
                    self.oracle.sees(from, live.generation, output.sequence, said);
                }
            }
            last = Some(output.sequence);
        }
        if let Some(output) = last {
            // Without a backup there is nobody who must know.
            let _ = live.backups.push(self.local(side), &Entry::Released { output });
        }
    }

    /// While somebody protects, nothing gets out before all of them have acknowledged its mark.
    fn check_marked(&mut self, side: usize, live: &mut Live, output: OutputSequence) {
        if *live.reign.standing() != Standing::Protected || live.reign.protected_by() == 0 {
            return;
        }
        let mark = live.marks.range(output..).next().map(|(_, entry)| *entry);
        let acknowledged = live.backups.acknowledged();
        if mark.is_none_or(|mark| mark > acknowledged) {
            self.oracle.fail(format!(
                "side {side} lets {output:?} out, marked by {mark:?}, with {acknowledged:?} acknowledged"
            ));
        }
    }

    /// The guest of a live side runs a little: logs begin, inputs arrive, outputs come.
    pub(crate) fn run_guest_of(&mut self, side: usize) {
        self.with_running(side, |world, live| {
            world.begin_logs(side, live);
            live.guest.run_to(live.guest.point().after(1_000));
            let mut arrivals = std::mem::take(&mut live.arrivals);
            if world.random.chance(80) {
                let bytes = world.random.next().to_le_bytes()[..3].to_vec();
                arrivals.push_back(Arrival::ConsoleInput(bytes));
            }
            for arrival in arrivals {
                world.arrive(side, live, arrival);
            }
        });
    }

    /// Does something with a live side whose guest runs, and looks at the side then; with another, only that;
    /// nothing on a host that stands still.
    pub(crate) fn with_running(&mut self, side: usize, step: impl FnOnce(&mut Self, &mut Live)) {
        if self.is_frozen(side) {
            return;
        }
        let mut process = std::mem::replace(&mut self.sides[side].process, Process::Off);
        if let Process::Live(live) = &mut process
            && !live.stopped
            && !live.halted
        {
            step(self, live);
        }
        self.sides[side].process = process;
        self.run_side(side);
    }

    fn arrive(&mut self, side: usize, live: &mut Live, arrival: Arrival) {
        let (now, point) = (self.local(side), live.guest.point());
        let outputs: Vec<Output> = live.guest.arrive(&arrival);
        if self.plan.mode == Mode::Lockstep {
            // An entry that nobody takes is one that nobody needs.
            let _ = live.backups.push(now, &Entry::Arrival { point, arrival });
        }
        if outputs.is_empty() {
            return;
        }
        for output in outputs {
            live.gate.emit(output);
        }
        if self.plan.mode == Mode::Checkpoint {
            // The end of their epoch marks them.
            self.release(side, live);
            return;
        }
        let (begun, output) = (live.gate.begin_mark(), live.guest.outputs());
        if let Ok(entry) = live.backups.push(now, &Entry::OutputMark { point, output }) {
            live.marks.insert(output, entry);
            live.gate.mark(begun, entry, output);
            if self.plant == Some(Plant::ReleaseEarly) {
                live.gate.acknowledged(entry);
            }
        }
        self.release(side, live);
    }

    /// With the machine at rest, logs of backups begin.
    fn begin_logs(&mut self, side: usize, live: &mut Live) {
        let now = self.local(side);
        let mut index = 0;
        while index < live.peers.len() {
            let due = matches!(live.peers[index].phase, Phase::Sending(at) if at <= now);
            let Some(key) = live.peers[index].key.filter(|_| due) else {
                index += 1;
                continue;
            };
            if !self.make_room(live) {
                index += 1;
                continue;
            }
            let point = live.guest.point();
            if !self.judge(side, live, LiveEvent::LogBegins(key)) {
                self.end_peer(side, live, index, EndCause::NotBegun("turned away".to_owned()));
                continue;
            }
            match live.backups.begin(key, SENDER, point, now) {
                Ok(begun) => {
                    if self.plan.mode == Mode::Checkpoint {
                        live.epochs.get_or_insert_with(|| Epochs::new(&live.guest));
                    }
                    let until = now.after(Duration::from_millis(self.random.between(1, 40)));
                    let mut content =
                        JoinContent { guest: live.guest.clone(), not_out: live.gate.not_out() };
                    if self.plant == Some(Plant::JoinedShort) {
                        content.not_out.clear();
                    }
                    live.peers[index].phase = Phase::Rest(until, Box::new(content), begun.position);
                    index += 1;
                }
                Err(error) => {
                    self.judge(side, live, LiveEvent::NotBegun(key));
                    self.end_peer(side, live, index, EndCause::NotBegun(error.to_string()));
                }
            }
        }
    }

    /// True if another log may begin here, for the sake of the epochs under way.
    fn make_room(&self, live: &mut Live) -> bool {
        let (followed, marks) = (live.backups.followers() > 0, live.gate.marks_waiting());
        match &mut live.epochs {
            None => true,
            Some(_) if self.plant == Some(Plant::JoinedWithin) => true,
            Some(epochs) if followed => epochs.make_room(marks),
            // They are over as soon as they have noticed.
            Some(_) => false,
        }
    }

    fn transmit_live(&mut self, side: usize, live: &mut Live) {
        let now = self.local(side);
        let mut index = 0;
        while index < live.peers.len() {
            let peer = &mut live.peers[index];
            let (connection, mut cause) = (peer.connection, None);
            if let (Phase::Session(_), Some(key)) = (&peer.phase, peer.key) {
                let sender = live.backups.session(key).expect("it has begun").sender();
                if let Err(error) = sender.handle_timeout(now) {
                    cause = Some(EndCause::Violation(error.into()));
                }
                while cause.is_none()
                    && let Some(frame) = sender.poll_transmit(now)
                {
                    let untold = self.plant == Some(Plant::GenerationNotTold);
                    if !(untold && frame.kind() == FrameKind::Reign) {
                        self.send(connection, End::Primary, Message::Frame(frame.seal()));
                    }
                }
                if sender.has_ended() {
                    peer.left_at.get_or_insert(now);
                }
            }
            match cause {
                None => index += 1,
                Some(cause) => self.end_peer(side, live, index, cause),
            }
        }
    }

    /// The operator stops the machine of a live side.
    pub(crate) fn stop(&mut self, side: usize) {
        let now = self.local(side);
        let mut process = std::mem::replace(&mut self.sides[side].process, Process::Off);
        if let Process::Live(live) = &mut process {
            live.stopped = true;
            live.backups.close_admission("the machine has stopped");
            if self.plan.mode == Mode::Checkpoint {
                self.finish_epochs(side, live, StopReason::Operator);
            } else {
                let stop = Entry::Stop { point: live.guest.point(), reason: StopReason::Operator };
                // Without a backup there is nobody who must know.
                let _ = live.backups.push(now, &stop);
            }
        }
        self.sides[side].process = process;
        self.run_side(side);
    }

    /// A machine that was stopped says goodbye once its last outputs are out.
    fn leave_when_stopped(&mut self, live: &mut Live) {
        let out = match live.reign.standing() {
            Standing::Alone => true,
            Standing::Protected => live.backups.acknowledged() >= live.backups.last(),
            Standing::Deciding | Standing::Fenced(_) => false,
        };
        if live.stopped && !live.left && out {
            live.left = true;
            self.oracle.stopped = true;
            live.backups.leave(&GoodbyeReason::Stopped);
        }
    }
}
