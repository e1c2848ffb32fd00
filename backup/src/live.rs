//! A live side of a pair: runs the guest, admits backups, and goes on alone when one is lost.

mod disks;

use crate::arbiter::{Arbiter, FenceState, GenerationFence};
use crate::channel_log::ChannelLog;
use crate::epoch::{EpochSide, Epochs, Protection};
use crate::events::{self, Event};
use crate::hand_over::{HandOver, HandOverError};
use crate::handler::Handler;
use crate::policy::{LiveParts, LossPolicy};
use crate::rate_probe::RateProbe;
use crate::reign::{LiveEvent, Standing};
use crate::requests::{Beginning, JoinHost};
use crate::side::{OutputPath, Side, SideEnd, SideError};
use crate::standstill::Standstill;
use crate::status::{FailoverReport, Role, StatusBoard, ms};
use crate::storage;
use std::sync::mpsc;
use std::sync::{Arc, Once, Weak};
use std::time::{Duration, Instant};
use vmft_log::entry::{Entry, Generation, OutputSequence, StopReason};
use vmft_logging_channel::session::GoodbyeReason;
use vmft_logging_channel::transport::{
    AdmissionCheck, Followers, JoinTicket, PrimaryChannel, PrimaryConfig,
};
use vmft_threads::make_thread_urgent;
use vmft_threads::{Mutex, MutexGuard};
use vmft_vmm::inputs::{Asked, Live, Recording};
use vmft_vmm::machine::{Machine, MachineError, RunEnd};
use vmft_vmm::outputs::OutputGate;
use vmft_vmm::world::error_text;
use vmft_vmm::world::{Fence, HostSource};

/// How long the goodbye may take at a stop.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// How long the goodbye may take when the machine has failed: the guest waits for it.
const FAILED_PATIENCE: Duration = Duration::from_secs(1);
/// How long an operator's stop waits for an arbiter that is away.
const DECIDE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a side that has handed its guest over stays, to say so.
const ANSWER_WAIT: Duration = Duration::from_millis(500);
/// How long one step of waiting at a stop takes before the policy is looked at again.
const STOP_STEP: Duration = Duration::from_millis(50);

/// What a live side of a pair is to do.
#[derive(Debug)]
pub struct LiveDuties {
    /// Who decides generations.
    pub arbiter: Arc<dyn Arbiter>,
    /// The generation this side has won.
    pub generation: Generation,
    /// Where backups may join; without it the side stays alone.
    pub listen: Option<PrimaryConfig>,
    /// How many backups to wait for before the guest runs.
    pub wait_for_backups: usize,
    /// How backups follow.
    pub protection: Protection,
}

/// What a side that has just won its peer's succession brings along.
#[derive(Debug)]
pub(crate) struct Succession {
    /// How it went so far.
    pub(crate) report: FailoverReport,
    /// The last sign of the peer.
    pub(crate) last_contact: Instant,
    /// Outputs replayed but not known to be out.
    pub(crate) kept: Vec<vmft_vmm::outputs::Output>,
    /// The peer's storage failed, and so it handed the guest over.
    pub(crate) storage_failed: bool,
}

/// The machine's inputs, followed or not.
enum Inputs {
    Alone(Box<Live<HostSource>>),
    Recording(Box<Recording<HostSource, ChannelLog>>),
}

impl Inputs {
    fn into_live(self) -> Live<HostSource> {
        match self {
            Self::Alone(live) => *live,
            Self::Recording(recording) => recording.into_parts().0,
        }
    }

    fn as_dyn(&mut self) -> &mut dyn vmft_vmm::inputs::Inputs {
        match self {
            Self::Alone(live) => &mut **live,
            Self::Recording(recording) => &mut **recording,
        }
    }
}

struct LiveSide<'a> {
    side: &'a Side,
    output_path: OutputPath,
    fence: Arc<dyn Fence>,
    policy: Arc<LossPolicy>,
    channel: Option<Arc<PrimaryChannel>>,
    protection: Protection,
    /// In checkpoint mode, while somebody follows.
    epochs: Mutex<Option<Epochs>>,
}

impl Side {
    /// Runs the machine as the live side of a pair until it stops or is fenced.
    ///
    /// # Errors
    /// See [`SideError`].
    pub fn run_live(&self, machine: Machine, duties: LiveDuties) -> Result<SideEnd, SideError> {
        self.run_live_from(machine, duties, None)
    }

    pub(crate) fn run_live_from(
        &self,
        mut machine: Machine,
        duties: LiveDuties,
        succession: Option<Succession>,
    ) -> Result<SideEnd, SideError> {
        if duties.protection == Protection::Lockstep {
            machine.check_lockstep()?;
        }
        if self.bounds.max_lag().replay_bound().is_some() {
            machine.keep_deltas();
        }
        let wait = duties.wait_for_backups;
        let live_side = self.open_live_side(duties)?;
        if succession.is_none() {
            // A successor keeps what its predecessor kept. Here it begins, from a disk that has everything.
            machine.keep_completed_writes();
            live_side.output_path.outside.rewrite(&machine.completed_writes());
        }
        let storage_failed = succession.as_ref().is_some_and(|before| before.storage_failed);
        let mut live = live_side.go_live(&machine, succession)?;
        if storage_failed {
            self.disk_desk.begin_proof();
        }
        if wait > 0 {
            self.status.set_role(Role::WaitingForBackup, live_side.policy.generation());
            match live_side.wait_for_backups(&mut machine, wait)? {
                Some(end) => return Ok(end),
                // The wait is no part of the guest's time.
                None => live = self.live_inputs(&live_side.output_path, &machine)?,
            }
        } else {
            self.status.set_role(Role::Alone, live_side.policy.generation());
        }
        let followed = live_side.channel.as_ref().is_some_and(|channel| channel.followers() > 0);
        let inputs =
            if followed { live_side.follow(live, &machine) } else { Inputs::Alone(Box::new(live)) };
        let ended = live_side.run(&mut machine, inputs);
        self.requests.close();
        if let Err(SideError::Machine(error)) = &ended
            && error.is_of_the_guest()
        {
            live_side.leave(GoodbyeReason::Failed(error_text(error).into()), FAILED_PATIENCE);
        }
        match ended? {
            (SideEnd::Stopped(reason), inputs) => live_side.stop(&mut machine, inputs, reason),
            (halted @ SideEnd::Halted(_), _) => Ok(halted),
        }
    }

    fn open_live_side(&self, duties: LiveDuties) -> Result<LiveSide<'_>, SideError> {
        let (arbiter, storage) = (Arc::clone(&duties.arbiter), duties.arbiter);
        let state = Arc::new(FenceState::new(duties.generation));
        // The way out needs the fence, the judge the gate of the way out, and the fence someone to tell.
        let (told, overtaken) = mpsc::channel();
        let on_fenced = move |generation, winner| {
            // A side that is over needs no telling.
            let _ = told.send((generation, winner));
        };
        let (who, fence_state) = (self.who.clone(), Arc::clone(&state));
        let fence = GenerationFence::new(Arc::clone(&arbiter), who, fence_state, on_fenced);
        let fence: Arc<dyn Fence> = Arc::new(fence);
        let output_path = self.open_output_path(&fence)?;
        let followers = duties.listen.as_ref().map(Followers::new);
        let policy = Arc::new(LossPolicy::new(LiveParts {
            arbiter,
            who: self.who.clone(),
            fence: state,
            gate: Arc::clone(&output_path.gate),
            mailbox: Arc::clone(&self.mailbox),
            status: Arc::clone(&self.status),
            followers: followers.clone(),
        }));
        policy.hear_of_later_generations(overtaken).map_err(SideError::Host)?;
        let check = AdmissionCheck::new(move |peer| storage::check(&*storage, peer));
        let protection = duties.protection;
        let listen = duties.listen.map(|config| PrimaryConfig {
            check: Some(check),
            on_session: make_thread_urgent,
            on_late: events::note_late_heartbeat,
            ..config
        });
        let channel = listen
            .zip(followers)
            .map(|(config, followers)| {
                self.listen(config, followers, &output_path, &policy, protection)
            })
            .transpose()?;
        self.bounds.show(&self.status);
        let epochs = Mutex::default();
        Ok(LiveSide { side: self, output_path, fence, policy, channel, protection, epochs })
    }

    fn listen(
        &self,
        config: PrimaryConfig,
        followers: Followers,
        output_path: &OutputPath,
        policy: &Arc<LossPolicy>,
        protection: Protection,
    ) -> Result<Arc<PrimaryChannel>, SideError> {
        let handler = Handler {
            gate: Arc::clone(&output_path.gate),
            requests: Arc::clone(&self.requests),
            mailbox: Arc::clone(&self.mailbox),
            policy: Arc::clone(policy),
            status: Arc::clone(&self.status),
            followers: followers.clone(),
            protection,
            mirrors: Arc::clone(&self.mirrors),
            unmended: 0,
        };
        let channel = Arc::new(PrimaryChannel::listen_for(followers, config, handler)?);
        let address = channel.local_address().to_string();
        self.status.update(|status| status.listening = Some(address));
        let probe = RateProbe::default();
        let probed = Arc::downgrade(&channel);
        let channel_status = move || probed.upgrade().map(|channel| probe.status(&channel));
        self.status.set_channel(Some(Arc::new(channel_status)));
        Ok(channel)
    }
}

/// Notes when the first output of a new live side is out.
fn report_first_output(status: &StatusBoard, since: Instant, output: OutputSequence) {
    events::note(|| Event::FirstOutput { output });
    status.update(|status| {
        if let Some(failover) = &mut status.failover {
            failover.first_output_ms.get_or_insert_with(|| ms(since.elapsed()));
        }
    });
}

/// Begins the logs of backups, on the machine's thread.
struct LiveHost<'a> {
    live: &'a LiveSide<'a>,
    /// A log has begun where nobody followed before.
    first: bool,
    /// Whoever asked that a backup takes the guest.
    hand_over: Option<mpsc::Sender<Result<(), HandOverError>>>,
}

impl<'a> LiveHost<'a> {
    fn of(live: &'a LiveSide<'a>) -> Self {
        Self { live, first: false, hand_over: None }
    }
}

impl JoinHost for LiveHost<'_> {
    fn begin(&mut self, machine: &mut Machine, ticket: &JoinTicket) -> Beginning {
        let LiveSide { output_path, policy, channel, .. } = self.live;
        let Some(channel) = channel else { return Beginning::Gone };
        let followed = channel.followers() > 0;
        if followed && self.live.is_lockstep() && !machine.is_at_point() {
            return Beginning::Later;
        }
        if !self.live.make_room(followed) {
            return Beginning::Later;
        }
        if !policy.begin(ticket.key()) {
            return Beginning::Gone;
        }
        if followed && self.live.is_lockstep() {
            // What was put out up to here, the backup will not have. So it is marked here, before its
            // log, and the end of its checkpoint waits until it is out.
            let gate = &self.live.output_path.gate;
            let (begun, output) = (gate.begin_mark(), machine.outputs());
            let mark = Entry::OutputMark { point: machine.point(), output };
            if let Ok(entry) = channel.push(&mark) {
                gate.mark(begun, entry, output);
            }
            // Those who follow already flush as this machine does; one that is lost meanwhile needs
            // not.
            let _ = channel.push(&Entry::Flush { point: machine.point() });
        }
        // By epochs, nobody compares digests: nothing need be looked at for one.
        let lockstep = self.live.is_lockstep();
        let state = if lockstep { machine.checkpoint() } else { machine.state() };
        match ticket.begin(machine.point()) {
            Ok(begun) => {
                self.first |= begun.first;
                self.live.begin_epochs(machine);
                // Asked for after the log has begun: what is out from here on, that tells.
                Beginning::Here(begun.position, Box::new(state), output_path.gate.not_out())
            }
            Err(_) => {
                policy.handle(LiveEvent::NotBegun(ticket.key()));
                Beginning::Gone
            }
        }
    }

    fn hand_over(&mut self, reply: mpsc::Sender<Result<(), HandOverError>>) {
        self.hand_over = Some(reply);
    }
}

impl LiveSide<'_> {
    /// Opens this side to the world: console, network, kept outputs, requests that wait for an
    /// answer.
    fn go_live(
        &self,
        machine: &Machine,
        succession: Option<Succession>,
    ) -> Result<Live<HostSource>, SideError> {
        let side = self.side;
        let channel = self.channel.as_ref().map(Arc::downgrade);
        let status = Arc::clone(&side.status);
        let last_contact = succession.as_ref().map(|succession| succession.last_contact);
        let (is_successor, point) = (succession.is_some(), machine.point().get());
        let first = Once::new();
        let gate = Arc::clone(&self.output_path.gate);
        let on_out = move |output: OutputSequence| {
            gate.recent().released(output);
            if let Some(since) = last_contact {
                first.call_once(|| report_first_output(&status, since, output));
            }
            if let Some(channel) = channel.as_ref().and_then(Weak::upgrade) {
                // Without a backup there is nobody who must know.
                let _ = channel.push(&Entry::Released { output });
            }
        };
        self.output_path.outside.go_live(Arc::clone(&side.mailbox), on_out);
        side.attach_network(machine, &self.fence)?;
        if let Some(succession) = succession {
            side.status.update(|status| status.failover = Some(succession.report));
            for output in succession.kept {
                self.output_path.gate.emit(output);
            }
        }
        side.console.reveal(machine.console_offset());
        let mut live = side.live_inputs(&self.output_path, machine)?;
        let again = side.reissue(&self.output_path, &mut live, machine)?;
        if is_successor {
            events::note(|| Event::Live { point, requests_again: again as u64 });
        }
        if again > 0 {
            tracing::info!(again, "requests re-issued");
        }
        Ok(live)
    }

    /// Waits, with the machine at rest before its first instruction, until so many backups have
    /// joined. An end if the operator stops the side instead.
    fn wait_for_backups(
        &self,
        machine: &mut Machine,
        count: usize,
    ) -> Result<Option<SideEnd>, SideError> {
        let channel = self.channel.as_ref().expect("a side that waits for backups listens");
        loop {
            match self.side.mailbox.wait_asked() {
                Asked::Pause => {
                    let mut host = LiveHost::of(self);
                    self.side.requests.serve(machine, &mut host);
                    if channel.protected_by() >= count {
                        return Ok(None);
                    }
                }
                Asked::Stop(reason) => {
                    self.side.requests.close();
                    self.side.finish(&self.output_path);
                    self.leave(GoodbyeReason::Stopped, STOP_PATIENCE);
                    return Ok(Some(SideEnd::Stopped(reason)));
                }
                Asked::Halt => return Ok(Some(self.halted())),
            }
        }
    }

    fn halted(&self) -> SideEnd {
        match self.policy.standing() {
            Standing::Fenced(why) => SideEnd::Halted(why),
            _ => SideEnd::Halted("asked to halt".to_owned()),
        }
    }

    /// Hands the guest over to a backup, with the machine at rest.
    fn hand_over(&self, machine: &mut Machine) -> Result<(), HandOverError> {
        let channel = self.channel.as_ref().ok_or(HandOverError::Nobody)?;
        let (output_path, policy, epochs) = (&self.output_path, &self.policy, self.epochs());
        let epochs = match self.protection {
            Protection::Lockstep => None,
            Protection::Checkpoint(_) => Some(epochs.as_ref().ok_or(HandOverError::Nobody)?),
        };
        HandOver { channel, output_path, policy }.run(machine, epochs)
    }

    fn is_lockstep(&self) -> bool {
        self.protection == Protection::Lockstep
    }

    fn epochs(&self) -> MutexGuard<'_, Option<Epochs>> {
        self.epochs.lock()
    }

    /// True if another log may begin here, for the sake of the epochs under way.
    fn make_room(&self, followed: bool) -> bool {
        let mut epochs = self.epochs();
        match epochs.as_ref() {
            None => true,
            Some(running) if followed => running.make_room(&self.output_path.gate),
            Some(running) => {
                let over = running.is_over();
                if over {
                    *epochs = None;
                }
                over
            }
        }
    }

    /// In checkpoint mode: a backup's log has begun, and goes on by epochs.
    fn begin_epochs(&self, machine: &mut Machine) {
        let Protection::Checkpoint(_) = self.protection else { return };
        let Some(channel) = &self.channel else { return };
        let (side, channel) = (self.side, Arc::clone(channel));
        self.epochs().get_or_insert_with(|| {
            let side = EpochSide {
                channel,
                gate: Arc::clone(&self.output_path.gate),
                requests: Arc::clone(&side.requests),
                mailbox: Arc::clone(&side.mailbox),
                status: Arc::clone(&side.status),
                bounds: Arc::clone(&side.bounds),
            };
            Epochs::begin(machine, side)
        });
    }

    /// The inputs of a machine that somebody follows.
    fn follow(&self, live: Live<HostSource>, machine: &Machine) -> Inputs {
        match self.protection {
            Protection::Lockstep => self.record(live, machine),
            Protection::Checkpoint(_) => Inputs::Alone(Box::new(live)),
        }
    }

    fn record(&self, live: Live<HostSource>, machine: &Machine) -> Inputs {
        let channel = self.channel.as_ref().expect("a backup has joined through it");
        let log = ChannelLog::new(
            Arc::clone(channel),
            Arc::clone(&self.side.bounds),
            machine,
            Arc::clone(&self.side.status),
        );
        let gate = Arc::clone(&self.output_path.gate);
        let recording = Recording::new(live, log, gate, machine.point(), machine.outputs());
        let recording = match self.side.bounds.max_lag().replay_bound() {
            Some(_) => recording.with_jumps(),
            None => recording,
        };
        Inputs::Recording(Box::new(recording))
    }

    /// Runs until the end, and gives the inputs back: there may be a last word to log.
    fn run(
        &self,
        machine: &mut Machine,
        mut inputs: Inputs,
    ) -> Result<(SideEnd, Inputs), SideError> {
        let (mut standstill, mut declined) = (Standstill::default(), false);
        let watched = self.side.status.liveness().begin();
        loop {
            let (gate, standstill) = (&*self.output_path.gate, &mut standstill);
            match self.side.run_or_stand(machine, inputs.as_dyn(), gate, standstill)? {
                RunEnd::Paused => {
                    let mut host = LiveHost::of(self);
                    watched.aside(|| self.side.requests.serve(machine, &mut host));
                    let hand_over = host.hand_over.take();
                    if host.first {
                        inputs = self.follow(inputs.into_live(), machine);
                    }
                    if let Some(reply) = hand_over {
                        let handed = watched.aside(|| self.hand_over(machine));
                        // Whoever asked may have gone.
                        let _ = reply.send(handed);
                        if handed.is_ok() {
                            // Whoever asked is answered before the process ends.
                            std::thread::sleep(ANSWER_WAIT);
                            return Ok((self.halted(), inputs));
                        }
                    }
                    if watched.aside(|| self.mind_disks(&mut declined)) {
                        return Ok((self.halted(), inputs));
                    }
                }
                RunEnd::Stopped(reason) => return Ok((SideEnd::Stopped(reason), inputs)),
                RunEnd::Halted => return Ok((self.halted(), inputs)),
                RunEnd::LogEnded => unreachable!("a live machine follows no log"),
            }
        }
    }

    /// The machine has stopped on purpose: lets its last outputs out by the rule, tells the backup,
    /// and says goodbye.
    fn stop(
        &self,
        machine: &mut Machine,
        inputs: Inputs,
        reason: StopReason,
    ) -> Result<SideEnd, SideError> {
        let Some(channel) = &self.channel else {
            self.side.finish(&self.output_path);
            self.side.mirrors.stopped(self.policy.generation())?;
            return Ok(SideEnd::Stopped(reason));
        };
        channel.close_admission("the machine has stopped");
        if let Inputs::Recording(mut recording) = inputs {
            recording
                .stopped(machine.point(), machine.outputs(), reason)
                .map_err(MachineError::from)?;
        }
        let epochs = self.epochs().take();
        if let Some(epochs) = epochs {
            epochs.finish(machine, reason);
        }
        if let Some(halted) = self.wait_last_outputs(channel, reason) {
            return Ok(halted);
        }
        self.side.finish(&self.output_path);
        self.side.mirrors.stopped(self.policy.generation())?;
        self.leave(GoodbyeReason::Stopped, STOP_PATIENCE);
        self.side.status.set_role(Role::Stopped, self.policy.generation());
        Ok(SideEnd::Stopped(reason))
    }

    /// Waits until the last outputs may leave, however long that takes: a backup that does not
    /// acknowledge is lost sooner or later, and then the arbiter decides. Only an operator's stop
    /// does not wait for an arbiter that is away. How this side ended, if the outputs may not leave.
    fn wait_last_outputs(&self, channel: &PrimaryChannel, reason: StopReason) -> Option<SideEnd> {
        let started = Instant::now();
        let mut operator = reason == StopReason::Operator;
        loop {
            match self.policy.wait_decided(STOP_STEP) {
                Standing::Protected if channel.wait_acknowledged(STOP_STEP) => return None,
                Standing::Protected => {}
                Standing::Deciding => {
                    operator |= matches!(self.side.mailbox.take_asked(), Some(Asked::Stop(_)));
                    if operator && started.elapsed() > DECIDE_PATIENCE {
                        // Whether the last outputs may leave cannot be known, so they do not.
                        let why = "stopped while the arbiter could not be asked; \
                                   its last outputs were not let out";
                        self.policy.handle(LiveEvent::GivenUp(why.to_owned()));
                    }
                }
                Standing::Alone => return None,
                Standing::Fenced(why) => return Some(SideEnd::Halted(why)),
            }
        }
    }

    /// Says goodbye to the backups that follow. One that is still joining is not waited for.
    fn leave(&self, reason: GoodbyeReason, patience: Duration) {
        if let Some(channel) = self.channel.as_ref().filter(|channel| channel.joined() > 0) {
            channel.leave(reason, patience);
        }
    }
}
