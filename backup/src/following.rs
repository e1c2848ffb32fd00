//! The backup: joins a primary, replays it, and takes over when it is lost.

use crate::arbiter::{Arbiter, RETRY};
use crate::channel_log::ChannelSource;
use crate::checkpoint::{MachineSink, NotReady};
use crate::epoch::Protection;
use crate::events::{self, Event};
use crate::fault::Faulty;
use crate::follower::ReplayGate;
use crate::identity::{fingerprint, protecting};
use crate::join_content::JoinContent;
use crate::live::{LiveDuties, Succession};
use crate::mending::Divergences;
use crate::mirror::report::CopyRole;
use crate::mirror::{Feed, Feeding, Taker};
use crate::refusals::Refusals;
use crate::reign::{Fate, FollowEvent, FollowReign};
use crate::side::{Side, SideEnd, SideError};
use crate::status::{ChannelStatus, Role, ms};
use crate::storage::{self, Token};
use crate::storage_look::StorageLook;
use crate::succession::FollowPolicy;
use crate::tell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use vmft_cpu::memory::GuestRam;
use vmft_log::entry::{Generation, StopReason};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::session::GoodbyeReason;
use vmft_logging_channel::transport::{
    BackupChannel, BackupConfig, Joined, PeerAddress, PrimaryConfig, TransportError,
};
use vmft_sandbox::Task;
use vmft_threads::Mutex;
use vmft_threads::make_thread_urgent;
use vmft_vmm::inputs::Replaying;
use vmft_vmm::machine::{Machine, MachineError, RunEnd};
use vmft_vmm::outputs::{KeptOutputs, OutputGate};
use vmft_vmm::world::{DiskFile, error_text};

/// How long an orderly goodbye may take.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);
/// How long to try to reach the primary without a word about it.
const QUIET_CONNECT: Duration = Duration::from_secs(1);

/// What a backup is to do.
#[derive(Debug)]
pub struct BackupDuties {
    /// Who decides generations.
    pub arbiter: Arc<dyn Arbiter>,
    /// What a session with the primary is to be; the address in it is not used.
    pub channel: BackupConfig,
    /// Where the live side may be: tried in turn.
    pub primaries: Vec<PeerAddress>,
    /// How long to try to reach it.
    pub patience: Patience,
    /// Most bytes of memory that the primary's machine may have.
    pub memory: u64,
    /// How the pair protects its guest.
    pub protection: Protection,
    /// Where the next backup may join after a go-live; without it this side stays alone.
    pub listen: Option<PrimaryConfig>,
}

/// How a side that is to follow deals with a primary that cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// A backup: tries for so long, and ends when another side goes on without it.
    For(Duration),
    /// A standby: waits for as long as it takes, and joins whoever goes on.
    Standby,
}

/// Ends a backup from another thread.
#[derive(Debug, Default)]
pub struct BackupControl {
    leaving: AtomicBool,
    channel: Mutex<Option<Arc<BackupChannel>>>,
}

impl BackupControl {
    /// The operator stops this side: it leaves the pair, and the primary goes on alone.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
        let channel = self.channel.lock().clone();
        if let Some(channel) = channel {
            channel.leave(GoodbyeReason::Leaving, LEAVE_PATIENCE);
        }
    }

    /// True once the operator has stopped this side.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// From now on this channel is left when the operator says so, or at once if that was before.
    pub(crate) fn attend(&self, channel: &Arc<BackupChannel>) {
        self.set(Some(Arc::clone(channel)));
        if self.is_leaving() {
            self.leave();
        }
    }

    pub(crate) fn set(&self, channel: Option<Arc<BackupChannel>>) {
        *self.channel.lock() = channel;
    }
}

/// How following ended.
pub(crate) enum Followed {
    End(SideEnd),
    /// This side diverged, or the primary wants another session: join again, whoever is of this
    /// generation or a later one.
    Again(Generation),
    /// The primary is lost, and this side has won.
    Won(Box<(Machine, Succession)>),
}

/// What a session that is followed has, whatever its log is made of.
pub(crate) struct Following {
    pub(crate) policy: Arc<FollowPolicy>,
    pub(crate) kept: Arc<KeptOutputs>,
    pub(crate) gate: ReplayGate,
    pub(crate) source: ChannelSource,
}

impl Side {
    /// Follows the primary until the machine stops; takes over if the primary is lost.
    ///
    /// # Errors
    /// See [`SideError`].
    pub fn follow(
        &self,
        mut duties: BackupDuties,
        control: &Arc<BackupControl>,
    ) -> Result<SideEnd, SideError> {
        let mut divergences = Divergences::default();
        loop {
            let Some(joined) = self.join(&duties, control)? else {
                return Ok(SideEnd::Stopped(StopReason::Operator));
            };
            if divergences.joined() {
                self.mended(joined.checkpoint.position.point);
            }
            let known = &mut duties.channel.identity.generation;
            *known = joined.terms.generation.max(*known);
            let followed = match duties.protection {
                Protection::Lockstep => {
                    self.follow_session(joined, &duties, control, &mut divergences)
                }
                Protection::Checkpoint(_) => {
                    self.follow_epochs(joined, &duties, control, &mut divergences)
                }
            };
            let followed = followed?;
            if let Some(error) = self.mirrors.failure() {
                return Err(error.into());
            }
            match followed {
                Followed::End(end) => return Ok(end),
                Followed::Again(known) => {
                    let generation = &mut duties.channel.identity.generation;
                    *generation = known.max(*generation);
                    if let Some(why) = divergences.give_up() {
                        return Ok(SideEnd::Halted(why));
                    }
                }
                Followed::Won(won) => {
                    let (machine, succession) = *won;
                    let generation = Generation(succession.report.generation);
                    // From here on the copies are the guest's disks, and say so.
                    self.mirrors.take_over(generation)?;
                    self.mirrors.show(&self.status, CopyRole::Live);
                    let mut listen = duties.listen;
                    if let Some(config) = &mut listen {
                        let machine = machine.config();
                        config.identity.generation = generation;
                        let fingerprint = fingerprint(machine.engine, &machine.board);
                        let fingerprint = protecting(fingerprint, duties.protection);
                        let known = &duties.channel.identity.fingerprint;
                        config.identity.fingerprint = storage::same_as(fingerprint, known);
                    }
                    let live = LiveDuties {
                        arbiter: duties.arbiter,
                        generation,
                        listen,
                        wait_for_backups: 0,
                        protection: duties.protection,
                    };
                    return self.run_live_from(machine, live, Some(succession));
                }
            }
        }
    }

    /// Joins, trying for as long as the duties say. `None` if the operator stops the side first.
    fn join(
        &self,
        duties: &BackupDuties,
        control: &BackupControl,
    ) -> Result<Option<Joined<MachineSink>>, SideError> {
        let mut started = Instant::now();
        let mut told = false;
        self.status.set_role(Role::Joining, duties.channel.identity.generation);
        let mut next = 0;
        let mut token: Option<Token> = None;
        let mut refused = Refusals::default();
        loop {
            let identity = &duties.channel.identity;
            let identity = match Token::renew(&mut token, &duties.arbiter, &self.who) {
                Ok(token) => token.said_by(identity),
                Err(error) if duties.patience.is_over(started.elapsed()) => {
                    return Err(error.into());
                }
                Err(_) if control.is_leaving() => return Ok(None),
                // The storage may come back; a primary asks it as well.
                Err(error) => {
                    if !std::mem::replace(&mut told, true) {
                        tell!("{}; {}", error_text(&error), duties.patience);
                    }
                    std::thread::sleep(RETRY * 5);
                    continue;
                }
            };
            let primary = duties.primaries[next % duties.primaries.len()].clone();
            next += 1;
            let round_is_over = next.is_multiple_of(duties.primaries.len());
            let on_session = make_thread_urgent;
            let with = primary.to_string();
            let on_late = events::note_late_heartbeat;
            let config =
                BackupConfig { primary, identity, on_session, on_late, ..duties.channel.clone() };
            let attempt = Instant::now();
            let joined = self.join_once(&config, duties, control)?;
            if attempt.elapsed() > config.setup_timeout {
                // Longer than a greeting may take: it was had, and has sent a part of its checkpoint.
                started = Instant::now();
            }
            if let Some(Err(error)) = &joined {
                // A standby is told the same many times a second.
                refused.note(with, error_text(error));
            }
            match joined {
                None => return Ok(None),
                Some(Ok(joined)) => {
                    // Only now this side belongs to the pair, and no new machine may start.
                    duties.arbiter.share(&self.who)?;
                    for disk in &self.disks {
                        disk.share()?;
                    }
                    return Ok(Some(joined));
                }
                Some(Err(error)) if duties.patience.bears(&error, started.elapsed()) => {
                    if !told && started.elapsed() > QUIET_CONNECT {
                        tell!("{}; {}", error_text(&error), duties.patience);
                        told = true;
                    }
                    if round_is_over {
                        std::thread::sleep(RETRY * 5);
                    }
                }
                Some(Err(error)) => return Err(error.into()),
            }
        }
    }

    /// Tries to join once. `None` if the operator stops the side meanwhile; the attempt then ends by
    /// itself.
    fn join_once(
        &self,
        config: &BackupConfig,
        duties: &BackupDuties,
        control: &BackupControl,
    ) -> Result<Option<Result<Joined<MachineSink>, TransportError>>, SideError> {
        let (sender, outcome) = mpsc::channel();
        let config = config.clone();
        let not_ready = NotReady::default();
        let sink = match duties.protection {
            // One that replays has to run at once, and is lost if it cannot.
            Protection::Lockstep => MachineSink::within(duties.memory),
            Protection::Checkpoint(_) => MachineSink::standing_by(duties.memory, &not_ready),
        };
        let pair = config.identity.pair.to_string();
        let taker = Taker::begin(&self.mirrors, &pair, &self.who.id, &self.status)?;
        let sink = sink.with_disks(taker);
        let join = move || {
            // A side that has left meanwhile does not listen.
            let _ = sender.send(BackupChannel::join(config, sink));
        };
        vmft_sandbox::spawn(Task::Channel, "join", join).map_err(SideError::Host)?;
        loop {
            if control.is_leaving() {
                return Ok(None);
            }
            match outcome.recv_timeout(RETRY) {
                Ok(outcome) => {
                    let why = not_ready.lock().take();
                    return why.map_or(Ok(Some(outcome)), |why| Err(why.into()));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the thread always answers"),
            }
        }
    }

    fn follow_session(
        &self,
        joined: Joined<MachineSink>,
        duties: &BackupDuties,
        control: &Arc<BackupControl>,
        divergences: &mut Divergences,
    ) -> Result<Followed, SideError> {
        let Joined { channel, terms, mut checkpoint, mut sink } = joined;
        let channel = Arc::new(channel);
        let not_out = JoinContent::unpack(&mut checkpoint)?;
        self.follow_disks(sink.take_disks(), terms.generation, control);
        let mut machine = sink.into_machine(&checkpoint)?;
        drop(checkpoint);
        let following = self.begin_following(
            &channel,
            machine.console_offset(),
            machine.ram(),
            duties,
            control,
        )?;
        self.status.set_machine(&machine);
        self.status.set_role(Role::Backup, terms.generation);
        self.note_joined(machine.point());
        tell!("following the primary from point {}", machine.point());

        let Following { policy, kept, gate, source } = following;
        not_out.into_iter().for_each(|output| gate.emit(output));
        let memory = machine.ram().size();
        let inputs = Replaying::new(source, Arc::clone(&kept), machine.point(), memory)
            .watched(Arc::clone(self.status.gauges()));
        let feed = Feed::begin(&self.mirrors, machine.outstanding());
        let (inputs, gate) = (Feeding::new(inputs, feed.clone()), gate.feeding(feed));
        let open = self.faults.lockstep();
        let mut faulty = Faulty::new(inputs, &self.faults, machine.ram().clone(), &channel);
        let watched = self.status.liveness().begin();
        let end = machine.run(&mut faulty, &gate);
        drop(watched);
        drop(open);
        let inputs = faulty.inputs().inputs();
        let end = match end {
            Ok(RunEnd::Stopped(reason)) => inputs
                .stopped(machine.point(), machine.outputs(), reason)
                .map_err(MachineError::from)
                .map(|ended| match ended {
                    Ok(()) => RunEnd::Stopped(reason),
                    Err(_) => RunEnd::LogEnded,
                }),
            other => other,
        };
        control.set(None);
        match end {
            Ok(RunEnd::Stopped(reason)) => {
                self.finish_stopped(machine, duties, reason, &channel, &kept, &policy)
            }
            Ok(_) => match policy.decide(&channel, FollowEvent::LogEnded) {
                Fate::GoLive(_) => Ok(won(machine, &policy, &kept)),
                fate => Ok(self.concluded(fate)),
            },
            Err(error) => self.diverged(error, &channel, &policy, divergences, inputs.digests()),
        }
    }

    /// Begins a session that is followed, whatever its log is made of, from a console that has shown so
    /// much.
    ///
    /// # Errors
    /// The host's, without a thread for what goes with it.
    pub(crate) fn begin_following(
        &self,
        channel: &Arc<BackupChannel>,
        shown: u64,
        ram: &GuestRam,
        duties: &BackupDuties,
        control: &Arc<BackupControl>,
    ) -> Result<Following, SideError> {
        let disks = self.disks.iter().map(DiskFile::reader).collect();
        let look = StorageLook::begin(disks, &self.status).map_err(SideError::Host)?;
        // What this side remembers of an earlier session ends before what was shown since: its console
        // begins anew here, without a gap.
        self.console.remember(shown, &[]);
        control.attend(channel);
        self.status.set_guest_memory(ram.host_ranges());
        self.watch_channel(channel);
        let several = duties.listen.as_ref().is_some_and(|listen| listen.backups > 1);
        let standby = duties.patience == Patience::Standby;
        let policy = Arc::new(FollowPolicy::new(
            FollowReign::new(channel.generation(), several, standby),
            Arc::clone(&duties.arbiter),
            self.who.clone(),
            Arc::clone(&self.status),
            Arc::clone(control),
            look,
        ));
        let kept = Arc::new(KeptOutputs::default());
        let gate = ReplayGate::keeping(Arc::clone(&kept), Arc::clone(&self.console));
        let source = ChannelSource::new(Arc::clone(channel), Arc::clone(&policy));
        Ok(Following { policy, kept, gate, source })
    }

    /// The disks that a join has brought follow, from here on, a primary of this generation; where they
    /// cannot, this side leaves.
    pub(crate) fn follow_disks(
        &self,
        taker: Option<Taker>,
        generation: Generation,
        control: &Arc<BackupControl>,
    ) {
        let Some(taker) = taker else { return };
        self.mirrors.follow(&taker, generation, &self.status);
        let control = Arc::clone(control);
        self.mirrors.on_failure(move |error| {
            tell!("{}; this side leaves, and its primary goes on without it", error_text(error));
            control.leave();
        });
    }

    /// This side has joined a primary, at this point of its guest.
    pub(crate) fn note_joined(&self, point: ExecutionPoint) {
        events::note(|| Event::JoinComplete { backup: None, point: Some(point.get()) });
    }

    fn watch_channel(&self, channel: &Arc<BackupChannel>) {
        let watched = Arc::downgrade(channel);
        let since = Instant::now();
        self.status.set_channel(Some(Arc::new(move || {
            let stats = watched.upgrade()?.stats();
            Some(ChannelStatus {
                log_bytes: stats.log_bytes,
                log_entries: stats.received.0,
                log_mbit_s: stats.log_bytes as f64 * 8.0 / since.elapsed().as_secs_f64() / 1e6,
                buffered_bytes: stats.buffered,
                ..ChannelStatus::default()
            })
        })));
    }

    /// What the judge says, of a side that does not go live.
    pub(crate) fn concluded(&self, fate: Fate) -> Followed {
        match fate {
            Fate::JoinAgain(known) => Followed::Again(known),
            Fate::Stop(reason) => Followed::End(SideEnd::Stopped(reason)),
            Fate::Halt(why) => {
                self.status.update(|status| status.reason = Some(why.as_str().into()));
                Followed::End(SideEnd::Halted(why))
            }
            Fate::GoLive(_) | Fate::FinishOutputs(..) => {
                unreachable!("handled where the machine is")
            }
        }
    }

    /// The machine has stopped on purpose. Waits for the primary's goodbye; if the primary dies
    /// before it, lets out what it may have left.
    pub(crate) fn finish_stopped(
        &self,
        machine: Machine,
        duties: &BackupDuties,
        reason: StopReason,
        channel: &BackupChannel,
        kept: &KeptOutputs,
        policy: &Arc<FollowPolicy>,
    ) -> Result<Followed, SideError> {
        use vmft_log::entry::Entry;
        use vmft_logging_channel::transport::Delivery;
        loop {
            match channel.recv(Duration::from_secs(1)) {
                Delivery::Entry(_, Entry::Released { output }) => kept.released(output),
                Delivery::Entry(..) | Delivery::TimedOut => {}
                Delivery::Ended(_) => break,
            }
        }
        self.status.set_role(Role::Stopped, channel.generation());
        let left = kept.take();
        // A goodbye comes after everything is out, also what this side cannot know to be out: a disk
        // write whose completion came too late for the log.
        let is_durable = machine.completed_writes().iter().all(|disk| disk.writes.is_empty());
        let nothing_left = left.is_empty() && machine.outstanding().is_empty() && is_durable;
        let owes = !channel.peer_has_left() && !nothing_left;
        match policy.decide(channel, FollowEvent::MachineStopped { reason, owes }) {
            Fate::FinishOutputs(generation, _) => {
                self.mirrors.take_over(generation)?;
                self.finish_outputs(&machine, &duties.arbiter, generation, left)?;
                self.mirrors.stopped(generation)?;
            }
            _ if owes => {}
            _ => {
                self.mirrors.stop_following(machine.outstanding(), channel.generation())?;
                self.console.close();
            }
        }
        Ok(Followed::End(SideEnd::Stopped(reason)))
    }
}

/// This side goes on from the machine as it is.
pub(crate) fn won(machine: Machine, policy: &FollowPolicy, kept: &KeptOutputs) -> Followed {
    let race = policy.race();
    let mut report = race.report;
    report.replay_ms = race.decided.map_or(0.0, |decided| ms(decided.elapsed()));
    report.point = machine.point().get();
    let last_contact = race.last_contact.unwrap_or_else(Instant::now);
    let (point, marked, kept) = (report.point, machine.outputs(), kept.take());
    let not_out = kept.len() as u64;
    events::note(|| Event::ReplayDone { point, marked, not_out });
    let storage_failed = race.storage_failed;
    let succession = Succession { report, last_contact, kept, storage_failed };
    Followed::Won(Box::new((machine, succession)))
}

impl Patience {
    /// True if it has been tried for long enough.
    pub fn is_over(self, tried: Duration) -> bool {
        matches!(self, Self::For(limit) if tried >= limit)
    }

    /// True if it is worth trying again after `error`, when it has been tried for so long.
    fn bears(self, error: &TransportError, tried: Duration) -> bool {
        match self {
            Self::For(_) => is_temporary(error) && !self.is_over(tried),
            Self::Standby => is_temporary(error) || is_of_a_standby(error),
        }
    }
}

impl fmt::Display for Patience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::For(limit) => write!(f, "trying for {} s", limit.as_secs()),
            Self::Standby => f.write_str("standing by"),
        }
    }
}

/// True for errors that a standby meets while others lose and win: a side that does not know yet that
/// it has lost, a machine that stopped while it was being sent.
fn is_of_a_standby(error: &TransportError) -> bool {
    use vmft_logging_channel::handshake::{HandshakeError, Refusal};
    match error {
        TransportError::Departed(_) | TransportError::TlsHandshake(_) => true,
        TransportError::Certificate(refusal) => refusal.is_of_the_peer(),
        TransportError::Handshake(
            HandshakeError::Refused(refusal) | HandshakeError::RefusedByPeer(refusal),
        ) => matches!(refusal, Refusal::WrongGeneration { .. }),
        TransportError::Connect { source, .. } => is_of_a_standby(source),
        _ => false,
    }
}

/// True for errors that a primary which is still starting, or busy, may cause.
fn is_temporary(error: &TransportError) -> bool {
    use vmft_logging_channel::handshake::{HandshakeError, Refusal};
    match error {
        TransportError::Connect { source, .. } => is_temporary(source),
        TransportError::Closed { .. } | TransportError::TimedOut { .. } | TransportError::Io(_) => {
            true
        }
        TransportError::Handshake(HandshakeError::RefusedByPeer(refusal)) => {
            matches!(refusal, Refusal::HasBackup | Refusal::NotAccepting(_))
        }
        _ => false,
    }
}
