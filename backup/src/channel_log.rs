//! The channel as a log: where a primary records to, and a backup replays from.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmft_logging_channel::entry::{Entry, EntrySequence};
use vmft_logging_channel::point::ExecutionPoint;
use vmft_logging_channel::sender::PushError;
use vmft_logging_channel::transport::{
    BackupChannel, Delivery, PrimaryChannel, PrimaryPushError, Room, SessionEnd,
};
use vmft_vmm::inputs::{LogEnd, LogSink, LogSource};

/// How long one wait for room may take before the session is looked at again.
const ROOM_WAIT: Duration = Duration::from_millis(50);
/// How long one wait for an entry may take before the session is looked at again.
const ENTRY_WAIT: Duration = Duration::from_millis(500);

/// Execution lag up to which the primary runs freely, and at which it runs at half speed. The lag is
/// what a failover has to replay, so it is kept well below the 100 ms that §2.4 of the paper finds
/// typical; a backup slower than its primary by a few percent settles a little above the first.
const FREE_LAG: Duration = Duration::from_millis(18);
const HALF_SPEED_LAG: Duration = Duration::from_millis(120);
/// How often the lag is looked at.
const LAG_CHECK: Duration = Duration::from_millis(5);

/// The share of its time, in percent, that a primary waits for a backup behind by `lag`.
fn held_back_percent(lag: Duration) -> u32 {
    let over = lag.saturating_sub(FREE_LAG).as_millis();
    let range = HALF_SPEED_LAG.saturating_sub(FREE_LAG).as_millis();
    u32::try_from((over * 50 / range).min(90)).expect("at most 90")
}

/// The log of a protected primary.
#[derive(Debug)]
pub struct ChannelLog {
    channel: Arc<PrimaryChannel>,
    closed: bool,
    last_check: Instant,
}

impl ChannelLog {
    /// The log of the session that has just begun.
    pub fn new(channel: Arc<PrimaryChannel>) -> Self {
        Self { channel, closed: false, last_check: Instant::now() }
    }
}

impl LogSink for ChannelLog {
    fn append(&mut self, entry: Entry) -> io::Result<Option<EntrySequence>> {
        while !self.closed {
            match self.channel.push(&entry) {
                Ok(sequence) => return Ok(Some(sequence)),
                Err(PrimaryPushError::Push(PushError::Full { .. })) => {
                    // A full buffer stops the guest (§2.4 of the paper).
                    if self.channel.wait_room(ROOM_WAIT) == Room::NoBackup {
                        self.closed = true;
                    }
                }
                Err(PrimaryPushError::NoBackup | PrimaryPushError::Push(PushError::Ended)) => {
                    self.closed = true;
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

    fn hold_back(&mut self) {
        let ran = self.last_check.elapsed();
        if ran < LAG_CHECK {
            return;
        }
        while self.channel.wait_room(ROOM_WAIT) == Room::Full {}
        let lag = self.channel.execution_lag();
        let percent = held_back_percent(lag);
        if percent > 0 {
            std::thread::sleep(ran.min(LAG_CHECK * 4) * percent / (100 - percent));
        }
        self.last_check = Instant::now();
    }

    fn is_closed(&self) -> bool {
        self.closed
    }
}

/// Called once, when the peer is lost: may this side replay to the end and go live?
pub type OnLost = Box<dyn FnMut(&SessionEnd) -> bool + Send>;

/// The log a backup follows.
pub struct ChannelSource {
    channel: Arc<BackupChannel>,
    on_lost: OnLost,
    /// The answer of `on_lost`.
    may_go_live: Option<bool>,
    last: EntrySequence,
}

impl std::fmt::Debug for ChannelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChannelSource").field("last", &self.last).finish_non_exhaustive()
    }
}

impl ChannelSource {
    /// The log of a session. When it ends in a failure, `on_lost` asks the arbiter, while what was
    /// received is still to be replayed.
    pub fn new(channel: Arc<BackupChannel>, on_lost: OnLost) -> Self {
        Self { channel, on_lost, may_go_live: None, last: EntrySequence(0) }
    }

    /// True if the peer was lost and this side won.
    pub fn won(&self) -> bool {
        self.may_go_live == Some(true)
    }
}

impl LogSource for ChannelSource {
    fn next(&mut self, at: ExecutionPoint) -> Result<Entry, LogEnd> {
        if self.last > EntrySequence(0) {
            self.channel.report_applied(self.last, at);
        }
        loop {
            if self.may_go_live.is_none()
                && let Some(end) = self.channel.end().filter(SessionEnd::is_failure)
            {
                self.may_go_live = Some((self.on_lost)(&end));
            }
            if self.may_go_live == Some(false) {
                return Err(LogEnd::Ended);
            }
            match self.channel.recv(ENTRY_WAIT) {
                Delivery::Entry(sequence, entry) => {
                    self.last = sequence;
                    return Ok(entry);
                }
                Delivery::Ended(end) if end.is_failure() && self.may_go_live.is_none() => {}
                Delivery::Ended(_) => return Err(LogEnd::Ended),
                Delivery::TimedOut => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_primary_is_slowed_gradually_and_never_quite_stopped_by_lag() {
        let percent = |ms| held_back_percent(Duration::from_millis(ms));
        assert_eq!(percent(0), 0);
        assert_eq!(percent(18), 0);
        assert_eq!(percent(69), 25);
        assert_eq!(percent(120), 50);
        assert_eq!(percent(60_000), 90);
    }
}
