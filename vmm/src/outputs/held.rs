//! The gate of a live side.

use super::queue::OutputQueue;
use super::{OUTPUT_BYTES_LIMIT, OVERHEAD, Output, OutputGate, OutputKind, RecentOutputs};
use crate::evidence::time_with_suspension;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmft_log::entry::{EntrySequence, OutputSequence};
use vmft_threads::{Condvar, Mutex, MutexGuard};

/// How old the evidence is that this side may still speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Assurance {
    /// The backup has heard from this side so recently that it cannot have taken silence for its
    /// end; or nobody else is there.
    Fresh,
    /// What is let out was sent to the backup long ago. It may have gone live since.
    Stale,
}

/// Evidence younger than this is fresh: less than the shortest silence after which a backup may
/// suspect its primary (40 ms), with room for the way from here to the wire.
const FRESH: Duration = Duration::from_millis(25);

/// Bytes of packets held; what comes beyond is lost, as in a network that is too slow. Far more than
/// is on its way within a round trip.
const PACKET_BYTES_LIMIT: usize = 32 << 20;

/// Lets outputs out into the world. Must not block.
pub trait Outside: fmt::Debug + Send + Sync {
    /// The output may be seen from now on.
    fn let_out(&self, output: Output, assurance: Assurance);
    /// Everything that can be let out now was.
    fn all_let_out(&self);
    /// Memory taken by what was let out and is not out yet, in bytes: nobody outside takes it.
    fn backlog(&self) -> usize;
    /// Copies of what was let out and is not known to be out, in order, where it must not be lost.
    fn not_out(&self) -> Vec<Output>;
}

/// What outputs wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitsFor {
    /// The backups' acknowledgement.
    Acknowledgement,
    /// The arbiter's decision who goes on.
    Arbiter,
    /// Somebody outside who takes them.
    Outside,
}

/// The memory of outputs that wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitingBytes {
    /// Of those that may not leave yet.
    pub held: usize,
    /// Of those that nobody outside takes.
    pub outside: usize,
    /// What the guest is stopped for, if there are so many that it is.
    pub guest_waits_for: Option<WaitsFor>,
}

/// How long outputs waited between mark and release, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DelayStatistics {
    /// Marks measured.
    pub marks: u64,
    /// Median of the last 1024 marks.
    pub median_ns: u64,
    /// The longest since the start.
    pub worst_ns: u64,
}

/// Marks kept for the median.
const DELAY_WINDOW: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Unprotected: outputs leave at once.
    Open,
    /// Protected: outputs wait for their mark's acknowledgement.
    Protecting,
    /// Protected, and a backup was lost: nothing leaves before it is known who may go on.
    Holding,
    /// Fenced: nothing leaves any more.
    Shut,
}

#[derive(Debug)]
struct Mark {
    entry: EntrySequence,
    output: OutputSequence,
    begun: MarkBegun,
}

/// When a mark began.
#[derive(Debug, Clone, Copy)]
pub struct MarkBegun(Duration);

impl MarkBegun {
    /// How long ago that was, time included in which the host was suspended: evidence ages then, too.
    fn age(self) -> Duration {
        time_with_suspension().saturating_sub(self.0)
    }
}

#[derive(Debug)]
struct Held {
    mode: Mode,
    waiting: OutputQueue,
    /// Bytes of the packets among them.
    packet_bytes: usize,
    marks: VecDeque<Mark>,
    /// The last entry acknowledged. An acknowledgement can be quicker than its mark.
    acknowledged: EntrySequence,
    delays: VecDeque<u64>,
    measured: u64,
    worst_ns: u64,
}

/// The gate of a live side: the output rule (§2.2 of the paper).
#[derive(Debug)]
pub struct HeldOutputs {
    held: Mutex<Held>,
    outside: Arc<dyn Outside>,
    recent: RecentOutputs,
    urgent: AtomicBool,
    /// An output has begun to wait.
    arrived: Condvar,
    /// Outputs have left.
    left: Condvar,
    /// The guest is stopped beyond so many bytes.
    limit: usize,
}

impl HeldOutputs {
    /// A gate that lets everything out at once.
    pub fn open(outside: Arc<dyn Outside>) -> Self {
        Self::with_limit(outside, OUTPUT_BYTES_LIMIT)
    }

    /// The same, which is full when outputs wait that take more than `limit` bytes.
    pub fn with_limit(outside: Arc<dyn Outside>, limit: usize) -> Self {
        Self {
            held: Mutex::new(Held {
                mode: Mode::Open,
                waiting: OutputQueue::default(),
                packet_bytes: 0,
                marks: VecDeque::new(),
                acknowledged: EntrySequence(0),
                delays: VecDeque::new(),
                measured: 0,
                worst_ns: 0,
            }),
            outside,
            recent: RecentOutputs::default(),
            urgent: AtomicBool::new(false),
            arrived: Condvar::new(),
            left: Condvar::new(),
            limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock()
    }

    /// What was put out since the last checkpoint in the log, where that is remembered.
    pub fn recent(&self) -> &RecentOutputs {
        &self.recent
    }

    /// From now on outputs wait for their acknowledgement, in a log that begins with entry 1.
    pub fn protect(&self) {
        let mut held = self.lock();
        if held.mode == Mode::Open {
            held.mode = Mode::Protecting;
            held.marks.clear();
            held.acknowledged = EntrySequence(0);
        }
    }

    /// A backup is lost, and may be going live: acknowledgements of others release nothing before
    /// [`Self::resume`] or [`Self::unprotect`].
    pub fn hold(&self) {
        let mut held = self.lock();
        if held.mode == Mode::Protecting {
            held.mode = Mode::Holding;
        }
    }

    /// This side goes on with its other backups, which have every entry up to `acknowledged`.
    pub fn resume(&self, acknowledged: EntrySequence) {
        let mut held = self.lock();
        if held.mode == Mode::Holding {
            held.mode = Mode::Protecting;
            held.acknowledged = held.acknowledged.max(acknowledged);
            self.release(&mut held);
        }
    }

    /// Protection is over, and this side goes on alone: lets out everything that waits, and
    /// everything that comes.
    pub fn unprotect(&self) {
        let mut held = self.lock();
        if !matches!(held.mode, Mode::Protecting | Mode::Holding) {
            return;
        }
        held.mode = Mode::Open;
        self.recent.end();
        held.marks.clear();
        self.urgent.store(false, Ordering::Relaxed);
        held.packet_bytes = 0;
        while let Some(output) = held.waiting.pop() {
            self.outside.let_out(output, Assurance::Fresh);
        }
        self.outside.all_let_out();
        self.left.notify_all();
    }

    /// This side has lost its generation: nothing leaves any more.
    pub fn shut(&self) {
        let mut held = self.lock();
        held.mode = Mode::Shut;
        held.waiting.clear();
        held.packet_bytes = 0;
        held.marks.clear();
    }

    /// True if an output waits that somebody waits for (the guest itself for a disk request, a peer for
    /// a packet): it is marked without waiting for company.
    pub fn has_urgent(&self) -> bool {
        self.urgent.load(Ordering::Relaxed)
    }

    /// An entry is about to be logged that marks outputs: their delay counts from here. Its
    /// acknowledgement may be back before [`Self::mark`] is called.
    pub fn begin_mark(&self) -> MarkBegun {
        MarkBegun(time_with_suspension())
    }

    /// The log entry `entry`, begun with [`Self::begin_mark`], marks every output up to `output`.
    pub fn mark(&self, begun: MarkBegun, entry: EntrySequence, output: OutputSequence) {
        self.urgent.store(false, Ordering::Relaxed);
        let mut held = self.lock();
        if matches!(held.mode, Mode::Protecting | Mode::Holding) {
            held.marks.push_back(Mark { entry, output, begun });
            self.release(&mut held);
        }
    }

    /// The backup has every entry up to `entry`: lets out what that covers.
    pub fn acknowledged(&self, entry: EntrySequence) {
        let mut held = self.lock();
        held.acknowledged = held.acknowledged.max(entry);
        self.release(&mut held);
    }

    fn release(&self, held: &mut Held) {
        if held.mode == Mode::Holding {
            return;
        }
        let mut covered = None;
        while held.marks.front().is_some_and(|mark| mark.entry <= held.acknowledged) {
            let mark = held.marks.pop_front().expect("just seen");
            // What this mark covers, the backup had heard of when its time began.
            covered = Some((mark.output, mark.begun));
            let delay = u64::try_from(mark.begun.age().as_nanos()).unwrap_or(u64::MAX);
            held.measured += 1;
            held.worst_ns = held.worst_ns.max(delay);
            if held.delays.len() == DELAY_WINDOW {
                held.delays.pop_front();
            }
            held.delays.push_back(delay);
        }
        let Some((covered, begun)) = covered else { return };
        while let Some(output) = held.waiting.pop_up_to(covered) {
            if let OutputKind::Packet(packet) = &output.kind {
                held.packet_bytes -= packet.frame.len() + OVERHEAD;
            }
            let assurance = if begun.age() < FRESH { Assurance::Fresh } else { Assurance::Stale };
            self.outside.let_out(output, assurance);
        }
        self.outside.all_let_out();
        self.left.notify_all();
    }

    /// The outputs after `after` that wait: those an epoch has to tell of.
    pub fn waiting_after(&self, after: OutputSequence) -> Vec<Output> {
        self.lock().waiting.after(after)
    }

    /// Console outputs and packets that were made and are not known to be out, in order: who begins to
    /// follow here has not made them, and must have them all the same. To be called with the machine at
    /// rest.
    pub fn not_out(&self) -> Vec<Output> {
        let held = self.lock();
        let mut outputs = self.outside.not_out();
        outputs.extend(held.waiting.after(OutputSequence(0)));
        outputs.retain(|output| !matches!(output.kind, OutputKind::Disk { .. }));
        outputs
    }

    fn is_full_with(&self, held: &Held) -> bool {
        // A side that is fenced puts nothing out, and is about to halt.
        held.mode != Mode::Shut && held.waiting.cost() + self.outside.backlog() > self.limit
    }

    /// True if so much waits that the guest must not put out more: it is stopped until some of that has
    /// left. Its state knows nothing of it; and nothing is lost.
    pub fn is_full(&self) -> bool {
        self.is_full_with(&self.lock())
    }

    /// Waits until the gate is not full any more, for at most `limit`; says whether that is so.
    pub fn wait_room(&self, limit: Duration) -> bool {
        let held = self.lock();
        let full = |held: &mut Held| self.is_full_with(held);
        let (held, _) = self.left.wait_timeout_while(held, limit, full);
        // What leaves outside, nobody tells here.
        !self.is_full_with(&held)
    }

    /// What waits, in bytes, and whether the guest waits for that.
    pub fn waiting_bytes(&self) -> WaitingBytes {
        let held = self.lock();
        let (waiting, outside) = (held.waiting.cost(), self.outside.backlog());
        let guest_waits_for = self.is_full_with(&held).then_some(match held.mode {
            _ if outside > waiting => WaitsFor::Outside,
            Mode::Holding => WaitsFor::Arbiter,
            Mode::Open | Mode::Protecting | Mode::Shut => WaitsFor::Acknowledgement,
        });
        WaitingBytes { held: waiting, outside, guest_waits_for }
    }

    /// Waits until an output after `after` waits, for at most `limit`; says whether one does.
    pub fn wait_after(&self, after: OutputSequence, limit: Duration) -> bool {
        let none = |held: &mut Held| held.waiting.last().is_none_or(|last| last <= after);
        let (_, waits_on) = self.arrived.wait_timeout_while(self.lock(), limit, none);
        !waits_on
    }

    /// Marks whose acknowledgement is still to come.
    pub fn marks_waiting(&self) -> usize {
        self.lock().marks.len()
    }

    /// Outputs that wait.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// How long outputs waited.
    pub fn delays(&self) -> DelayStatistics {
        let held = self.lock();
        let mut window: Vec<u64> = held.delays.iter().copied().collect();
        window.sort_unstable();
        DelayStatistics {
            marks: held.measured,
            median_ns: window.get(window.len() / 2).copied().unwrap_or(0),
            worst_ns: held.worst_ns,
        }
    }
}

impl OutputGate for HeldOutputs {
    fn emit(&self, output: Output) {
        self.recent.add(&output);
        let mut held = self.lock();
        match held.mode {
            Mode::Open => {
                self.outside.let_out(output, Assurance::Fresh);
                self.outside.all_let_out();
            }
            Mode::Protecting | Mode::Holding => {
                match &output.kind {
                    OutputKind::Console { .. } => {}
                    OutputKind::Disk { .. } => self.urgent.store(true, Ordering::Relaxed),
                    OutputKind::Packet(packet) => {
                        let bytes = packet.frame.len() + OVERHEAD;
                        if held.packet_bytes + bytes > PACKET_BYTES_LIMIT {
                            return;
                        }
                        held.packet_bytes += bytes;
                        self.urgent.store(true, Ordering::Relaxed);
                    }
                }
                held.waiting.push(output);
                if held.waiting.cost() > self.limit / 2 {
                    // Or the guest would be stopped before they are marked, and nothing would leave.
                    self.urgent.store(true, Ordering::Relaxed);
                }
                self.arrived.notify_all();
            }
            Mode::Shut => {}
        }
    }
}

#[cfg(test)]
#[path = "held_tests.rs"]
mod tests;
