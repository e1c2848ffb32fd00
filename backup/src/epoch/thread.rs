//! The thread that asks a running machine for its epochs.

use super::pace::Cost;
use super::sender::{EpochSender, NoBackup, Round, Sent, SentSoFar, take};
use crate::bounds::Bounds;
use crate::checkpoint::RamPages;
use crate::copied::{CopiedPages, MOST_COPIED};
use crate::requests::{Requests, SideGone};
use crate::rounds::{Brake, Rounds};
use crate::status::{EpochReport, StatusBoard, ms};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmft_cpu::memory::{GuestRam, WriteView};
use vmft_log::entry::StopReason;
use vmft_logging_channel::transport::PrimaryChannel;
use vmft_sandbox::Task;
use vmft_threads::{Condvar, Mutex, MutexGuard};
use vmft_vmm::machine::Machine;
use vmft_vmm::outputs::HeldOutputs;
use vmft_vmm::world::Mailbox;

/// How long epochs stand back for whoever wants a place between two of them.
const STAND_BACK: Duration = Duration::from_millis(100);

/// What the machine's thread and the epochs' agree on.
#[derive(Debug, Default)]
struct Turn {
    /// An epoch was taken and its end is not in the log yet.
    under_way: AtomicBool,
    /// Somebody waits for a place between two epochs: a backup that joins, or who hands the guest over.
    wanted: Mutex<bool>,
    changed: Condvar,
    /// Another backup has joined since the last epoch.
    joined: AtomicBool,
    /// No more epochs.
    over: AtomicBool,
}

impl Turn {
    fn wanted(&self) -> MutexGuard<'_, bool> {
        self.wanted.lock()
    }

    fn want(&self, wanted: bool) {
        *self.wanted() = wanted;
        self.changed.notify_all();
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Waits for `time`, unless it is over.
    fn wait(&self, time: Duration) {
        let on = |_: &mut bool| !self.is_over();
        drop(self.changed.wait_timeout_while(self.wanted(), time, on));
    }

    /// Lets whoever waits for a place between two epochs go first. Who does not come in time asks again.
    fn give_way(&self) {
        let wanted = |wanted: &mut bool| *wanted && !self.is_over();
        let (mut wanted, _) = self.changed.wait_timeout_while(self.wanted(), STAND_BACK, wanted);
        *wanted = false;
    }

    fn end(&self) {
        self.over.store(true, Ordering::Release);
        drop(self.wanted());
        self.changed.notify_all();
    }
}

/// The epochs of a machine, from the first backup's join to the loss of the last.
#[derive(Debug)]
pub(crate) struct Epochs {
    turn: Arc<Turn>,
    view: Arc<WriteView>,
    /// Locked while an epoch is taken and sent. The machine's thread, which that may wait for, only tries.
    sender: Arc<Mutex<EpochSender>>,
    thread: Option<JoinHandle<()>>,
}

/// What epochs need of their side.
#[derive(Debug)]
pub(crate) struct EpochSide {
    pub(crate) channel: Arc<PrimaryChannel>,
    pub(crate) gate: Arc<HeldOutputs>,
    pub(crate) requests: Arc<Requests>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) status: Arc<StatusBoard>,
    pub(crate) bounds: Arc<Bounds>,
}

impl Epochs {
    /// Begins with the machine as it is, at rest: a backup is being given it.
    pub(crate) fn begin(machine: &mut Machine, side: EpochSide) -> Self {
        let view = Arc::new(machine.watch_writes());
        let turn = Arc::new(Turn::default());
        let EpochSide { channel, gate, requests, mailbox, status, bounds } = side;
        let sender = Arc::new(Mutex::new(EpochSender::new(channel, Arc::clone(&gate), machine)));
        let pacer = Pacer {
            turn: Arc::clone(&turn),
            view: Arc::clone(&view),
            sender: Arc::clone(&sender),
            gate,
            requests,
            mailbox,
            status,
            bounds,
        };
        let thread = vmft_sandbox::spawn(Task::Worker, "epochs", move || pacer.run());
        let thread = thread.expect("a host that cannot start a thread cannot run a machine");
        Self { turn, view, sender, thread: Some(thread) }
    }

    /// Another backup wants the machine as it is here: true if that is between two epochs, of which
    /// nothing is under way. If it is not, epochs stand back for a moment.
    pub(crate) fn make_room(&self, gate: &HeldOutputs) -> bool {
        let clear = self.is_between(gate);
        if clear {
            self.turn.joined.store(true, Ordering::Release);
        }
        self.turn.want(!clear);
        clear
    }

    /// Between two epochs: of none is anything under way.
    fn is_between(&self, gate: &HeldOutputs) -> bool {
        !self.turn.under_way.load(Ordering::Acquire) && gate.marks_waiting() == 0
    }

    /// Ends an epoch with the machine as it is here, at rest, and puts it into the log. False while another
    /// is under way, with nothing done; epochs stand back for a moment then.
    pub(crate) fn end_here(
        &self,
        machine: &mut Machine,
        gate: &HeldOutputs,
    ) -> Result<bool, NoBackup> {
        let sender = self.sender.try_lock().filter(|_| self.is_between(gate));
        self.turn.want(sender.is_none());
        let Some(mut sender) = sender else { return Ok(false) };
        if self.turn.joined.swap(false, Ordering::AcqRel) {
            sender.forget();
        }
        sender.end_at_rest(machine, &self.view)?;
        Ok(true)
    }

    /// Nobody follows any more: true when the thread has noticed.
    pub(crate) fn is_over(&self) -> bool {
        self.turn.end();
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// The machine has stopped for good, and takes no more requests: sends its last epoch and the stop
    /// to whoever follows.
    pub(crate) fn finish(mut self, machine: &mut Machine, reason: StopReason) {
        let Some(thread) = self.thread.take() else { return };
        if thread.join().is_ok() {
            // Without a backup there is nobody who must know.
            let _ = self.sender.lock().finish(machine, &self.view, reason);
        }
    }
}

impl Drop for Epochs {
    fn drop(&mut self) {
        self.turn.end();
    }
}

/// The thread.
struct Pacer {
    turn: Arc<Turn>,
    view: Arc<WriteView>,
    sender: Arc<Mutex<EpochSender>>,
    gate: Arc<HeldOutputs>,
    requests: Arc<Requests>,
    mailbox: Arc<Mailbox>,
    status: Arc<StatusBoard>,
    bounds: Arc<Bounds>,
}

impl Pacer {
    /// Until the machine stops, or nobody follows.
    fn run(self) {
        let mut cost = Cost::default();
        let mut began = Instant::now();
        let mut report = EpochReport::default();
        let mut room = CopiedPages::default();
        while self.wait_due(began, cost) {
            self.turn.give_way();
            let interval = began.elapsed();
            began = Instant::now();
            let epoch = self.epoch(&mut self.sender.lock(), room);
            self.turn.under_way.store(false, Ordering::Release);
            let Ok((done, sent, left)) = epoch else { break };
            room = left;
            cost = Cost { rest: done.rest, sending: sent.sending, pages: sent.pages };
            report.add(&done, &sent, (report.epochs > 0).then_some(interval));
            let now = report.clone();
            self.status.update(|status| status.epochs = Some(now));
        }
    }

    /// Takes an epoch and sends it. What the guest has written is copied in one rest, if it is not too
    /// much; else it is sent while the guest runs, in rounds, until what is left can be copied.
    fn epoch(
        &self,
        sender: &mut EpochSender,
        room: CopiedPages,
    ) -> Result<(Rests, Sent, CopiedPages), Over> {
        let told = sender.told().clone();
        let mut rounds = Rounds::new(MOST_COPIED, 0);
        let (mut brake, mut rests) = (None, Rests::default());
        let Rested { mut round, joined, ram } =
            self.rest(&told, rounds.limit(), room, &mut rests)?;
        if joined {
            sender.forget();
        }
        let mut epoch = sender.begin(&ram)?;
        loop {
            match round {
                Round::Written(pages, room) => {
                    let slowing = rounds.next(pages.len());
                    Brake::apply(&mut brake, slowing, &self.requests, &self.mailbox);
                    epoch.send_running(RamPages::some(&ram, pages))?;
                    round = self.rest(&told, rounds.limit(), room, &mut rests)?.round;
                }
                Round::Taken(taken) => {
                    rests.slowed = brake.take().map_or(Duration::ZERO, |brake| brake.slowed());
                    rests.rounds = rounds.count() + 1;
                    let (sent, room) = epoch.finish(taken)?;
                    return Ok((rests, sent, room));
                }
            }
        }
    }

    /// Has the machine rest for a round.
    fn rest(
        &self,
        told: &SentSoFar,
        limit: usize,
        room: CopiedPages,
        rests: &mut Rests,
    ) -> Result<Rested, Over> {
        let (turn, view) = (Arc::clone(&self.turn), Arc::clone(&self.view));
        let (told, gate) = (told.clone(), Arc::clone(&self.gate));
        let (rested, rest) = self.requests.at_rest(&self.mailbox, move |machine| {
            let began = Instant::now();
            turn.under_way.store(true, Ordering::Release);
            let round = take(machine, &view, &gate, &told, limit, room);
            let joined = turn.joined.swap(false, Ordering::AcqRel);
            (Rested { round, joined, ram: machine.ram().clone() }, began.elapsed())
        })?;
        rests.add(rest);
        Ok(rested)
    }

    /// Waits until the next epoch is due; false when there is none.
    fn wait_due(&self, began: Instant, cost: Cost) -> bool {
        let due = self.bounds.interval().after(cost);
        let told = self.sender.lock().told().outputs;
        self.turn.wait(due.with_outputs.saturating_sub(began.elapsed()));
        // An output's thread cannot tell this one that it is over; so that is looked at now and then.
        while !self.turn.is_over() {
            let left = due.without.saturating_sub(began.elapsed());
            if left.is_zero() || self.gate.wait_after(told, left.min(LOOK)) {
                return true;
            }
        }
        false
    }
}

/// What one rest has brought.
struct Rested {
    round: Round,
    /// Another backup has joined since the last epoch.
    joined: bool,
    ram: GuestRam,
}

/// How the guest has rested for an epoch.
#[derive(Debug, Clone, Copy, Default)]
struct Rests {
    /// In all.
    rest: Duration,
    longest: Duration,
    /// Beside, because it wrote faster than it was sent.
    slowed: Duration,
    rounds: u32,
}

impl Rests {
    fn add(&mut self, rest: Duration) {
        self.rest += rest;
        self.longest = self.longest.max(rest);
    }
}

/// There will be no more epochs: the machine is over, or nobody follows it.
struct Over;

impl From<SideGone> for Over {
    fn from(_: SideGone) -> Self {
        Self
    }
}

impl From<NoBackup> for Over {
    fn from(_: NoBackup) -> Self {
        Self
    }
}

/// How long one wait for an output may take.
const LOOK: Duration = Duration::from_millis(50);

impl EpochReport {
    fn add(&mut self, done: &Rests, sent: &Sent, interval: Option<Duration>) {
        let Sent { sending, pages: _, dirty_bytes, sent_bytes } = sent;
        self.epochs += 1;
        self.pause_ms = ms(done.longest);
        self.worst_pause_ms = self.worst_pause_ms.max(self.pause_ms);
        self.rounds = done.rounds;
        self.slowed_ms += ms(done.slowed);
        self.sending_ms = ms(*sending);
        self.interval_ms = interval.map(ms);
        (self.last_dirty_bytes, self.last_sent_bytes) = (*dirty_bytes, *sent_bytes);
        self.dirty_bytes += dirty_bytes;
        self.sent_bytes += sent_bytes;
    }
}
