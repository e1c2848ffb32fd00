//! The channel as a log: where a primary records to, and a backup replays from.

use crate::bounds::Bounds;
use crate::events::{self, Event};
use crate::lag::{GRACE, LagBound, LagPolicy, Slowness};
use crate::periodic_kicks;
use crate::reign::Ruling;
use crate::status::{StatusBoard, ms};
use crate::succession::FollowPolicy;
use crate::tell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_cpu::PeriodicKicks;
use vmft_log::entry::{Entry, EntrySequence};
use vmft_log::point::ExecutionPoint;
use vmft_logging_channel::sender::PushError;
use vmft_logging_channel::transport::{
    BackupChannel, Delivery, PrimaryChannel, PrimaryPushError, Room,
};
use vmft_vmm::inputs::{LogEnd, LogSink, LogSource};
use vmft_vmm::machine::Machine;

/// How long one wait for room may take before the session is looked at again.
const ROOM_WAIT: Duration = Duration::from_millis(50);
/// How long one wait for an entry may take before the session is looked at again.
const ENTRY_WAIT: Duration = Duration::from_millis(500);

/// With more than so many bytes of log that cannot be sent, no checkpoint is added to them: the buffer would
/// soon be full of them, and stop the guest.
const MAX_UNSENT: u64 = 2 << 20;

/// How often the lag is looked at.
const LAG_CHECK: Duration = Duration::from_millis(5);

/// The log of a protected primary.
#[derive(Debug)]
pub struct ChannelLog {
    channel: Arc<PrimaryChannel>,
    closed: bool,
    last_check: Instant,
    bounds: Arc<Bounds>,
    /// Of the bounds; it is the same for the whole log.
    replay_bound: Option<Duration>,
    slowness: Slowness,
    status: Arc<StatusBoard>,
    /// Since when the backup has been beyond the bound.
    beyond: Option<Instant>,
    /// It was so far behind, when that was last looked at, that checkpoints are to help it.
    far_behind: bool,
    last_checkpoint: Option<Instant>,
    /// While the machine is recorded.
    _kicks: Option<PeriodicKicks>,
}

impl ChannelLog {
    /// The log of the session that has just begun.
    pub fn new(
        channel: Arc<PrimaryChannel>,
        bounds: Arc<Bounds>,
        machine: &Machine,
        status: Arc<StatusBoard>,
    ) -> Self {
        let _kicks = periodic_kicks::begin(machine);
        let replay_bound = bounds.max_lag().replay_bound();
        Self {
            channel,
            closed: false,
            last_check: Instant::now(),
            bounds,
            replay_bound,
            slowness: Slowness::default(),
            status,
            beyond: None,
            far_behind: false,
            last_checkpoint: None,
            _kicks,
        }
    }

    /// Nobody reads it any more, and so nobody is behind.
    fn close(&mut self) {
        self.closed = true;
        self.status.update(|status| status.guest_slowed = false);
    }

    /// The backup is behind by `lag`: what is to be done beyond slowing. True if the guest may run on.
    fn mind_bound(&mut self, bound: LagBound, lag: Duration) -> bool {
        let (limit, policy) = (bound.limit(), bound.policy());
        if lag <= limit {
            if self.beyond.take().is_some_and(|since| since.elapsed() > GRACE) {
                tell!("the backup is within {} ms of its primary again", limit.as_millis());
            }
            return true;
        }
        let is_first = self.beyond.is_none();
        let since = *self.beyond.get_or_insert_with(Instant::now);
        match policy {
            LagPolicy::Slow => true,
            LagPolicy::Stop => {
                if is_first {
                    tracing::warn!(?lag, "the guest waits for its backup");
                }
                self.channel.wait_lag(limit, ROOM_WAIT)
            }
            LagPolicy::Unprotect => {
                if since.elapsed() > GRACE {
                    let why = format!(
                        "it was more than {} ms behind for a second, and its primary is to go on \
                         without it then",
                        limit.as_millis()
                    );
                    self.channel.give_up_behind(limit, &why);
                    self.beyond = None;
                }
                true
            }
        }
    }
}

impl Drop for ChannelLog {
    fn drop(&mut self) {
        self.close();
    }
}

impl LogSink for ChannelLog {
    fn append(&mut self, entry: &Entry) -> io::Result<Option<EntrySequence>> {
        while !self.closed {
            match self.channel.push(entry) {
                Ok(sequence) => return Ok(Some(sequence)),
                Err(PrimaryPushError::Push(PushError::Full { .. })) => {
                    // A full buffer stops the guest (§2.4 of the paper).
                    if self.channel.wait_room(ROOM_WAIT) == Room::NoBackup {
                        self.close();
                    }
                }
                Err(PrimaryPushError::NoBackup | PrimaryPushError::Push(PushError::Ended)) => {
                    self.close();
                }
                Err(error @ PrimaryPushError::Push(PushError::Encode(_))) => {
                    return Err(io::Error::other(error));
                }
            }
        }
        // Nobody gets it: the peer is lost, and its loss is being dealt with.
        Ok(None)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.channel.flush();
        Ok(())
    }

    fn hold_back(&mut self) -> bool {
        let ran = self.last_check.elapsed();
        if ran < LAG_CHECK {
            return true;
        }
        if self.channel.wait_room(ROOM_WAIT) == Room::Full {
            return false;
        }
        let (bound, lag) = (self.bounds.max_lag(), self.channel.execution_lag());
        self.far_behind = self.replay_bound.is_some_and(|bound| lag > bound);
        let percent = bound.held_back_percent(lag);
        if let Some(is_slowed) = self.slowness.look(percent > 0, self.last_check) {
            self.status.update(|status| status.guest_slowed = is_slowed);
            events::note(|| match is_slowed {
                true => Event::Slowed { lag_ms: ms(lag) },
                false => Event::FullSpeed,
            });
        }
        if percent > 0 {
            std::thread::sleep(ran.min(LAG_CHECK * 4) * percent / (100 - percent));
        }
        if !self.mind_bound(bound, lag) {
            return false;
        }
        self.last_check = Instant::now();
        true
    }

    fn wants_checkpoint(&mut self) -> bool {
        let Some(every) = self.replay_bound.filter(|_| self.far_behind) else {
            return false;
        };
        if self.last_checkpoint.is_some_and(|last| last.elapsed() < every)
            || self.channel.stats().buffered > MAX_UNSENT
        {
            return false;
        }
        self.last_checkpoint = Some(Instant::now());
        true
    }

    fn is_far_behind(&self) -> bool {
        self.far_behind
    }

    fn is_closed(&self) -> bool {
        self.closed
    }
}

/// The log a backup follows.
#[derive(Debug)]
pub(crate) struct ChannelSource {
    channel: Arc<BackupChannel>,
    policy: Arc<FollowPolicy>,
    last: EntrySequence,
}

impl ChannelSource {
    /// The log of a session. What was received is handed out to the end, unless the policy says that it
    /// is for another side.
    pub(crate) const fn new(channel: Arc<BackupChannel>, policy: Arc<FollowPolicy>) -> Self {
        Self { channel, policy, last: EntrySequence(0) }
    }
}

impl LogSource for ChannelSource {
    fn skip_to_checkpoint(&mut self, may: &dyn Fn(&[u8]) -> bool) -> Option<Vec<Entry>> {
        if self.policy.ruling() == Ruling::Stop {
            return None;
        }
        let (last, skipped) = self.channel.skip_to_checkpoint(may)?;
        self.last = last;
        Some(skipped)
    }

    fn next(&mut self, at: ExecutionPoint) -> Result<Entry, LogEnd> {
        if self.last > EntrySequence(0) {
            self.channel.report_applied(self.last, at);
        }
        loop {
            self.policy.look(&self.channel);
            let ruling = self.policy.ruling();
            if ruling == Ruling::Stop {
                return Err(LogEnd::Ended);
            }
            match self.channel.recv(ENTRY_WAIT) {
                Delivery::Entry(sequence, entry) => {
                    self.last = sequence;
                    return Ok(entry);
                }
                Delivery::Ended(_) if ruling == Ruling::Wait => self.policy.wait_ruled(ENTRY_WAIT),
                // The judge is to hear of the loss first.
                Delivery::Ended(end)
                    if ruling == Ruling::Follow
                        && end.is_failure()
                        && !self.policy.knows_the_end() => {}
                Delivery::Ended(_) => return Err(LogEnd::Ended),
                Delivery::TimedOut => {}
            }
        }
    }
}
