//! What a running side says of itself.

use crate::events::{self, Event};
use crate::liveness::Liveness;
use crate::mirror::report::CopyReport;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use vmft_cpu::soft::{CompilerGauge, CompilerMode};
use vmft_log::entry::Generation;
use vmft_log::foreign::ForeignText;
use vmft_logging_channel::session::DivergenceNotice;
use vmft_logging_channel::time::MonotonicTime;
use vmft_logging_channel::transport::now;
use vmft_threads::{Condvar, Mutex, MutexGuard};
use vmft_vmm::inputs::Gauges;
use vmft_vmm::machine::Machine;
use vmft_vmm::outputs::{HeldOutputs, WaitingBytes, WaitsFor};
use vmft_vmm::world::console::ConsoleHub;
use vmft_vmm::world::net::{NetCounts, NetPort};

/// What a side is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Getting ready.
    #[default]
    Starting,
    /// Looks for a live side to join.
    Joining,
    /// Live, nobody follows, nobody is asked for.
    Unprotected,
    /// A primary that waits for its first backup before it runs.
    WaitingForBackup,
    /// Live and followed.
    Primary,
    /// Replaying.
    Backup,
    /// The peer is lost; the arbiter is asked.
    Deciding,
    /// Live, after the peer was lost.
    Alone,
    /// Lost its generation: it runs no more.
    Halted,
    /// The guest is over.
    Stopped,
}

/// The channel, as seen from this side.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ChannelStatus {
    /// Bytes of log sent or received.
    pub log_bytes: u64,
    /// Entries sent or received.
    pub log_entries: u64,
    /// The log's rate over the last second or so, in megabits a second.
    pub log_mbit_s: f64,
    /// Time from sending an output mark to its acknowledgement, median, in microseconds.
    pub acknowledgement_us: f64,
    /// The same, worst.
    pub acknowledgement_worst_us: f64,
    /// Bytes in the log's buffer.
    pub buffered_bytes: u64,
    /// How far the backup's guest is behind the primary's, in milliseconds of host time.
    pub execution_lag_ms: f64,
}

/// How the last join went, on the side that was joined.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JoinReport {
    /// How long the guest rested, in milliseconds.
    pub pause_ms: f64,
    /// From the backup's request to the end of its checkpoint, in milliseconds.
    pub total_ms: f64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Passes over what was to be sent, the last one included.
    pub rounds: u32,
    /// Pages sent, in all rounds.
    pub pages: u64,
    /// Of these, in the last round.
    pub last_pages: u64,
    /// How long the guest rested beside, because it wrote faster than it was sent, in milliseconds.
    #[serde(default)]
    pub slowed_ms: f64,
    /// What the pages came to, packed, in bytes.
    pub packed_bytes: u64,
    /// Bytes of disks sent, where the backup has copies of its own.
    #[serde(default)]
    pub disk_bytes: u64,
}

/// The epochs of checkpoint mode, since the last join; on a backup, those applied, and nothing else.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EpochReport {
    /// How many there were.
    pub epochs: u64,
    /// How long the guest rested for the last one, in milliseconds.
    pub pause_ms: f64,
    /// The longest it has rested for one.
    pub worst_pause_ms: f64,
    /// In how many rounds the last one was sent: one, unless the guest had written too much to be
    /// copied in one rest.
    #[serde(default)]
    pub rounds: u32,
    /// How long the guest rested beside, in all epochs, because it wrote faster than it was sent, in
    /// milliseconds.
    #[serde(default)]
    pub slowed_ms: f64,
    /// How long packing and sending the last one took, in milliseconds.
    pub sending_ms: f64,
    /// From the beginning of the one before to that of the last, in milliseconds.
    #[serde(default)]
    pub interval_ms: Option<f64>,
    /// Bytes of the pages written in the last one.
    #[serde(default)]
    pub last_dirty_bytes: u64,
    /// What it came to in the log, with the machine's state, in bytes.
    #[serde(default)]
    pub last_sent_bytes: u64,
    /// Bytes of the pages written, in all epochs.
    pub dirty_bytes: u64,
    /// What they came to in the log, with the machine's state, in bytes.
    pub sent_bytes: u64,
}

/// How a failover went.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FailoverReport {
    /// The generation won.
    pub generation: u64,
    /// What made this side suspect its peer.
    pub suspicion: ForeignText,
    /// From the last sign of the peer to the suspicion, in milliseconds.
    pub detection_ms: f64,
    /// The arbiter's test-and-set.
    pub arbiter_ms: f64,
    /// From the verdict to the end of the log.
    pub replay_ms: f64,
    /// From the last sign of the peer to the first output of this side; none has come while absent.
    pub first_output_ms: Option<f64>,
    /// The instruction at which this side went live.
    pub point: u64,
}

/// A divergence, as the side says that found it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DivergenceReport {
    /// The last point at which the two sides agreed, if a comparison found it.
    pub agreed: Option<u64>,
    /// The point at which they were seen to differ.
    pub found: Option<u64>,
    /// The first address of the page of memory that differs, if it is known to be one alone.
    pub page: Option<u64>,
    /// The whole report.
    pub text: ForeignText,
}

/// What is wrong with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// A request has failed and is kept: the guest stands still.
    Stopped,
    /// A request has been under way for too long.
    Hangs,
    /// A backup cannot read it: it takes no guest over from a primary whose storage fails.
    Unreachable,
}

/// A disk with which something is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskTroubleStatus {
    /// Its number on the board.
    pub disk: u8,
    /// As its operator knows it.
    pub path: ForeignText,
    /// What is wrong.
    pub state: DiskState,
    /// What could not be done, or is not done.
    pub what: String,
    /// The storage's reason, if it has said one.
    pub error: Option<ForeignText>,
    /// The reason is that there is no room.
    pub is_full: bool,
    /// Requests that are kept, or hang.
    pub requests: u64,
    /// Since when, in milliseconds.
    pub for_ms: u64,
}

impl DiskTroubleStatus {
    /// What is wrong, for people.
    pub fn text(&self) -> String {
        let (path, what) = (&self.path, &self.what);
        match &self.error {
            Some(error) => format!("disk {path}: {what}: {error}"),
            None => format!("disk {path}: {what} takes longer than it should"),
        }
    }

    /// What an operator can do about it.
    pub const fn remedy(&self) -> &'static str {
        match self.state {
            DiskState::Stopped if self.is_full => "make room on its storage, then `vmft resume`",
            DiskState::Stopped => "see to its storage, then `vmft resume`",
            DiskState::Hangs | DiskState::Unreachable => "see to its storage",
        }
    }
}

/// A side, for `vmft status`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SideStatus {
    /// What it is doing.
    pub role: Role,
    /// Its generation.
    pub generation: u64,
    /// Where a backup may join, if one may.
    pub listening: Option<String>,
    /// Guest instructions retired.
    pub point: u64,
    /// Guest time in milliseconds.
    pub guest_time_ms: u64,
    /// True if the guest waits for an interrupt.
    pub guest_idle: bool,
    /// What the engine's compiler does, where the engine may have one.
    #[serde(default)]
    pub compiler: Option<CompilerStatus>,
    /// Console bytes let out.
    pub console_bytes: u64,
    /// Outputs that wait for an acknowledgement.
    pub outputs_waiting: u64,
    /// Memory taken by outputs that are not out: those that wait, and those that nobody outside takes.
    #[serde(default)]
    pub outputs_waiting_bytes: u64,
    /// What the guest is stopped for, if it is: until outputs have left, or it is resumed.
    #[serde(default)]
    pub guest_waits_for: Option<String>,
    /// True while an operator has paused it.
    #[serde(default)]
    pub is_paused: bool,
    /// True while a live side slows its guest, because its backup is behind.
    #[serde(default)]
    pub guest_slowed: bool,
    /// How far a backup that replays may be behind, in milliseconds, on a live side of a pair.
    #[serde(default)]
    pub lag_bound_ms: Option<u64>,
    /// How far apart checkpoints are at most, in milliseconds, on a live side of a pair in checkpoint mode.
    #[serde(default)]
    pub interval_bound_ms: Option<u64>,
    /// Disks with which something is wrong now.
    #[serde(default)]
    pub disk_troubles: Vec<DiskTroubleStatus>,
    /// This side's own copies of disks, where disks are not shared.
    #[serde(default)]
    pub disk_copies: Vec<CopyReport>,
    /// Why the console's sink takes nothing, if it says so.
    #[serde(default)]
    pub console_trouble: Option<String>,
    /// Time an output waits between its mark and its release, median, in microseconds.
    pub output_delay_us: f64,
    /// The same, worst.
    pub output_delay_worst_us: f64,
    /// Outputs' marks released so far.
    pub outputs_marked: u64,
    /// The channel, if there is one.
    pub channel: Option<ChannelStatus>,
    /// The guest's network, if this side is attached to one.
    pub network: Option<NetworkStatus>,
    /// For how long a live side of a pair has had no backup that could take its place, in milliseconds.
    #[serde(default)]
    pub unprotected_ms: Option<u64>,
    /// Events that the event log did not take.
    #[serde(default)]
    pub events_lost: u64,
    /// Backups that follow.
    pub followers: u64,
    /// The last join, if there was one.
    pub join: Option<JoinReport>,
    /// The epochs, in checkpoint mode.
    #[serde(default)]
    pub epochs: Option<EpochReport>,
    /// The last failover, if there was one.
    pub failover: Option<FailoverReport>,
    /// Digests that agreed, on a backup.
    pub digests_agreed: u64,
    /// Exits that agreed, on a backup whose engine has its points there.
    pub exits_agreed: u64,
    /// How often a backup went on from a checkpoint in the log instead of replaying up to it.
    #[serde(default)]
    pub replay_skips: u64,
    /// Points it has spared itself by that.
    #[serde(default)]
    pub points_skipped: u64,
    /// Divergences: of this side, or told of by its backups.
    #[serde(default)]
    pub divergences: u64,
    /// Of these, those after which a backup has joined from a checkpoint.
    #[serde(default)]
    pub divergences_mended: u64,
    /// The last divergence, if there was one.
    pub divergence: Option<DivergenceReport>,
    /// Memory of this process beyond the guest's, in bytes, if the host says.
    pub overhead_bytes: Option<u64>,
    /// Why it halted or stopped.
    pub reason: Option<ForeignText>,
}

/// Packets of the guest since this side was attached to its network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// Sent.
    pub sent: u64,
    /// Received.
    pub received: u64,
    /// Not sent: there was no link, or it did not take them.
    pub lost: u64,
}

/// How a guest on the `soft` engine is executed in this process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompilerStatus {
    /// What its compiler does.
    pub mode: CompilerMode,
    /// Instructions executed.
    pub retired: u64,
    /// Those of them that were compiled.
    pub compiled: u64,
}

type ChannelProbe = Arc<dyn Fn() -> Option<ChannelStatus> + Send + Sync>;
type DiskProbe = Arc<dyn Fn() -> Vec<DiskTroubleStatus> + Send + Sync>;

#[derive(Default)]
struct Board {
    status: SideStatus,
    probe: Option<ChannelProbe>,
    disks: Option<DiskProbe>,
    gate: Option<Arc<HeldOutputs>>,
    console: Option<Arc<ConsoleHub>>,
    network: Option<Arc<NetPort>>,
    guest_memory: Vec<Range<usize>>,
    compiler: Option<Arc<CompilerGauge>>,
    /// Since when this side has been live and unprotected.
    unprotected_since: Option<MonotonicTime>,
}

/// Where a side's parts write what they know, and `vmft status` reads it.
#[derive(Default)]
pub struct StatusBoard {
    board: Mutex<Board>,
    changed: Condvar,
    gauges: Arc<Gauges>,
    liveness: Liveness,
}

impl std::fmt::Debug for StatusBoard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StatusBoard").field("status", &self.lock().status).finish_non_exhaustive()
    }
}

/// Milliseconds, with fractions.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl StatusBoard {
    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock()
    }

    /// Where the guest is.
    pub fn gauges(&self) -> &Arc<Gauges> {
        &self.gauges
    }

    /// Whether the thread that runs the guest comes by.
    pub fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// Changes what the side says of itself.
    pub fn update(&self, change: impl FnOnce(&mut SideStatus)) {
        change(&mut self.lock().status);
        self.changed.notify_all();
    }

    /// Waits, for at most `limit`, until the side has another role, generation or number of backups than in
    /// `known`.
    pub fn wait_changed(&self, known: &SideStatus, limit: Duration) {
        let place = |status: &SideStatus| (status.role, status.generation, status.followers);
        let is_same = |board: &mut Board| place(&board.status) == place(known);
        drop(self.changed.wait_timeout_while(self.lock(), limit, is_same));
    }

    /// Sets the role and the generation, and says so in the log.
    pub fn set_role(&self, role: Role, generation: Generation) {
        let mut board = self.lock();
        board.status.role = role;
        board.status.generation = generation.0;
        match role {
            // A side that decides is live or is about to be.
            Role::WaitingForBackup | Role::Alone | Role::Deciding => {
                board.unprotected_since.get_or_insert_with(now);
            }
            Role::Starting
            | Role::Joining
            | Role::Unprotected
            | Role::Primary
            | Role::Backup
            | Role::Halted
            | Role::Stopped => board.unprotected_since = None,
        }
        drop(board);
        self.changed.notify_all();
        events::note_role(role, generation);
        tracing::info!(?role, generation = generation.0, "role");
    }

    /// A divergence of this side, or of its backup.
    pub(crate) fn diverged(&self, notice: &DivergenceNotice) {
        self.update(|status| {
            status.divergences += 1;
            status.divergence = Some(notice.into());
        });
        events::note(|| Event::Diverged(notice.into()));
    }

    /// A backup has joined from a checkpoint after a divergence.
    pub(crate) fn mended(&self) {
        self.update(|status| status.divergences_mended += 1);
        events::note(|| Event::Mended);
    }

    /// From now on the channel is asked through `probe`.
    pub fn set_channel(&self, probe: Option<ChannelProbe>) {
        self.lock().probe = probe;
    }

    /// From now on `probe` says what is wrong with the disks.
    pub(crate) fn set_disks(&self, probe: Option<DiskProbe>) {
        self.lock().disks = probe;
    }

    /// The gate whose delays are shown.
    pub fn set_gate(&self, gate: Arc<HeldOutputs>) {
        self.lock().gate = Some(gate);
    }

    /// The console this side lets its guest's bytes out to.
    pub fn set_console(&self, console: Arc<ConsoleHub>) {
        self.lock().console = Some(console);
    }

    /// The network this side is attached to.
    pub fn set_network(&self, network: Arc<NetPort>) {
        self.lock().network = Some(network);
    }

    /// Where the guest's memory is in this process. No machine runs in it yet.
    pub fn set_guest_memory(&self, ranges: Vec<Range<usize>>) {
        let mut board = self.lock();
        board.guest_memory = ranges;
        board.compiler = None;
    }

    /// The machine that runs here: where its memory is in this process, and how it is executed.
    pub fn set_machine(&self, machine: &Machine) {
        self.set_guest_memory(machine.ram().host_ranges());
        self.lock().compiler = machine.compiler();
    }

    /// Where the guest's memory is in this process.
    pub fn guest_memory(&self) -> Vec<Range<usize>> {
        self.lock().guest_memory.clone()
    }

    /// The side now.
    pub fn status(&self) -> SideStatus {
        // The gate and the channel have locks of their own, and whoever holds those may be about to
        // write here: they are asked without the board's lock.
        let board = self.lock();
        let (mut status, probe, gate) =
            (board.status.clone(), board.probe.clone(), board.gate.clone());
        let (network, console) = (board.network.clone(), board.console.clone());
        let (since, disks) = (board.unprotected_since, board.disks.clone());
        let compiler = board.compiler.clone();
        drop(board);
        status.compiler = compiler.map(|gauge| CompilerStatus {
            mode: gauge.mode(),
            retired: gauge.retired(),
            compiled: gauge.compiled(),
        });
        status.unprotected_ms =
            since.map(|since| u64::try_from(now().since(since).as_millis()).unwrap_or(u64::MAX));
        status.events_lost = events::lost();
        if let Some(console) = console {
            status.console_bytes = console.visible();
            status.console_trouble = console.trouble();
        }
        status.network = network.map(|network| {
            let NetCounts { sent, received, lost } = network.counts();
            NetworkStatus { sent, received, lost }
        });
        status.point = self.gauges.point();
        status.guest_time_ms = self.gauges.guest_time_ns() / 1_000_000;
        status.guest_idle = self.gauges.is_idle();
        status.digests_agreed = self.gauges.digests_agreed();
        status.exits_agreed = self.gauges.exits_agreed();
        status.replay_skips = self.gauges.skips();
        status.points_skipped = self.gauges.points_skipped();
        status.channel = probe.and_then(|probe| probe());
        if let Some(gate) = gate {
            let delays = gate.delays();
            status.outputs_waiting = gate.waiting() as u64;
            let WaitingBytes { held, outside, guest_waits_for } = gate.waiting_bytes();
            status.outputs_waiting_bytes = (held + outside) as u64;
            status.guest_waits_for = guest_waits_for.map(|what| {
                let why = match what {
                    WaitsFor::Acknowledgement => "its backup acknowledges what it puts out",
                    WaitsFor::Arbiter => "the arbiter says who goes on",
                    WaitsFor::Outside => "its console is read",
                };
                match status.console_trouble.as_ref().filter(|_| what == WaitsFor::Outside) {
                    Some(trouble) => format!("{why}: {trouble}"),
                    None => why.to_owned(),
                }
            });
            status.output_delay_us = Duration::from_nanos(delays.median_ns).as_secs_f64() * 1e6;
            status.output_delay_worst_us =
                Duration::from_nanos(delays.worst_ns).as_secs_f64() * 1e6;
            status.outputs_marked = delays.marks;
        }
        status.disk_troubles = disks.map_or_else(Vec::new, |disks| disks());
        if status.is_paused {
            let why = "it is resumed: an operator has paused it; `vmft resume`";
            status.guest_waits_for = Some(why.to_owned());
        }
        let stopped = status.disk_troubles.iter().find(|disk| disk.state == DiskState::Stopped);
        if let Some(disk) = stopped {
            let why = format!("it is resumed: {}; {}", disk.text(), disk.remedy());
            status.guest_waits_for = Some(why);
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_asked_for_a_status_may_write_to_the_board() {
        let board = Arc::new(StatusBoard::default());
        let asked = Arc::clone(&board);
        board.set_channel(Some(Arc::new(move || {
            if asked.board.try_lock().is_some() {
                asked.update(|status| status.followers += 1);
            }
            None
        })));
        board.status();
        assert_eq!(board.status().followers, 1);
    }
}
