//! The backup's end of a session: frames in, entries and acknowledgements out.
//!
//! Pure, like the sender. Entries are taken in strict order, acknowledged when they are in memory
//! (not when they are replayed), and kept until the replaying side asks for them. The window the
//! backup grants is a promise of memory, so the reader of the connection never has to pause, and
//! signs of life always get through.

use crate::frame::{Frame, FrameKind, UnsealedFrame};
use crate::session::{
    Acknowledge, GoodbyeReason, Heartbeat, HeartbeatError, HeartbeatExchange, Reign, SessionId,
};
use crate::time::MonotonicTime;
use crate::waiting_checkpoints::WaitingCheckpoints;
use std::collections::VecDeque;
use std::time::Duration;
use vmft_log::codec::{BATCH_COST_LIMIT, CostedEntry, EntryBatch};
use vmft_log::entry::{Entry, EntrySequence, Generation, LogPosition, StopReason};
use vmft_log::point::ExecutionPoint;

/// The least a receiver may hold: room for the largest batch, several times, or the session
/// could not go on.
pub const MIN_RECEIVER_CAPACITY: u64 = 4 << 20;
const _: () = assert!(MIN_RECEIVER_CAPACITY >= 2 * BATCH_COST_LIMIT);

/// How much a receiver holds and how it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceiverConfig {
    /// Cost of entries it holds, at least [`MIN_RECEIVER_CAPACITY`].
    pub capacity: u64,
    /// How often to send a heartbeat.
    pub heartbeat_interval: Duration,
    /// How long to withhold every acknowledgement: zero, but for tests of the output rule.
    pub acknowledge_delay: Duration,
}

impl Default for ReceiverConfig {
    /// 32 MiB, heartbeats every 20 ms, acknowledgements at once.
    fn default() -> Self {
        Self {
            capacity: 32 << 20,
            heartbeat_interval: Duration::from_millis(20),
            acknowledge_delay: Duration::ZERO,
        }
    }
}

/// What the primary did wrong. Nothing was taken; the session should end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// Entries are missing.
    #[error("entry {} arrived after {}", found.0, received.0)]
    Gap {
        /// The last entry received.
        received: EntrySequence,
        /// The entry that came.
        found: EntrySequence,
    },
    /// Entries came again.
    #[error("entry {} arrived again, {} is the last one received", found.0, received.0)]
    Repeated {
        /// The last entry received.
        received: EntrySequence,
        /// The entry that came.
        found: EntrySequence,
    },
    /// Entries were sent that never came.
    #[error("entries up to {} were sent, but only {} came", sent.0, received.0)]
    Missing {
        /// The last entry received.
        received: EntrySequence,
        /// The last entry the primary says it has sent.
        sent: EntrySequence,
    },
    /// The log does not go on at the point where it was.
    #[error("log goes on at point {found} after point {last}")]
    Point {
        /// The last point received.
        last: ExecutionPoint,
        /// Where the new entries begin.
        found: ExecutionPoint,
    },
    /// More was sent than the window admits.
    #[error("entries of {cost} bytes came into a window of {room}")]
    Overrun {
        /// What came.
        cost: u64,
        /// What was left of the window.
        room: u64,
    },
    /// A heartbeat out of order.
    #[error(transparent)]
    Heartbeat(#[from] HeartbeatError),
    /// A frame that a primary does not send here.
    #[error("{0} frame from a primary")]
    Unexpected(FrameKind),
    /// Something came after the goodbye.
    #[error("{0} frame after the goodbye")]
    AfterGoodbye(FrameKind),
}

/// What a frame from the primary brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReceiverEvent {
    /// A sign of life.
    Heartbeat,
    /// Entries, the last of which is this one. If the log says that the machine stops, why.
    Entries {
        /// The last entry.
        last: EntrySequence,
        /// The reason in a `Stop` among them.
        stop: Option<StopReason>,
    },
    /// The primary has won this generation.
    Reign(Generation),
    /// The primary leaves.
    Departed(GoodbyeReason),
}

/// What a receiver has done so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReceiverStats {
    /// Entries received.
    pub received: EntrySequence,
    /// Where the last of them says the primary's guest was.
    pub received_point: ExecutionPoint,
    /// Entries handed out.
    pub delivered: EntrySequence,
    /// The last entry reported as replayed.
    pub applied: EntrySequence,
    /// Cost of entries held.
    pub buffered: u64,
    /// Bytes of log received, as the window counts them without overhead.
    pub log_bytes: u64,
    /// Newest round-trip time of heartbeats.
    pub round_trip: Option<Duration>,
}

/// The backup's end of a session.
#[derive(Debug)]
pub struct Receiver {
    config: ReceiverConfig,
    session: SessionId,
    received: EntrySequence,
    received_point: ExecutionPoint,
    delivered: EntrySequence,
    applied: (EntrySequence, ExecutionPoint),
    queue: VecDeque<CostedEntry>,
    checkpoints: WaitingCheckpoints,
    /// Total cost received, and taken out again.
    cost_received: u64,
    cost_taken: u64,
    log_bytes: u64,
    /// The last acknowledgement sent.
    announced: Acknowledge,
    /// What may be acknowledged when.
    withheld: VecDeque<(MonotonicTime, EntrySequence)>,
    acknowledge_now: bool,
    heartbeats: HeartbeatExchange,
    goodbye: Option<GoodbyeReason>,
    /// A goodbye came in.
    departed: bool,
    /// A goodbye went out.
    left: bool,
}

impl Receiver {
    /// A session whose log goes on from `start`, where the checkpoint is complete: the first
    /// frame it sends says so.
    ///
    /// # Panics
    /// If the capacity is below [`MIN_RECEIVER_CAPACITY`].
    pub fn new(
        config: ReceiverConfig,
        session: SessionId,
        start: LogPosition,
        now: MonotonicTime,
    ) -> Self {
        assert!(config.capacity >= MIN_RECEIVER_CAPACITY, "a receiver has room for any batch");
        Self {
            config,
            session,
            received: start.entry,
            received_point: start.point,
            delivered: start.entry,
            applied: (start.entry, start.point),
            queue: VecDeque::new(),
            checkpoints: WaitingCheckpoints::default(),
            cost_received: 0,
            cost_taken: 0,
            log_bytes: 0,
            announced: Acknowledge {
                received: start.entry,
                applied: start.entry,
                applied_point: start.point,
                window: config.capacity,
            },
            withheld: VecDeque::new(),
            acknowledge_now: true,
            heartbeats: HeartbeatExchange::new(now, config.heartbeat_interval),
            goodbye: None,
            departed: false,
            left: false,
        }
    }

    /// Takes a frame from the primary.
    ///
    /// # Errors
    /// [`ReceiveError`]; the receiver is unchanged.
    pub fn handle_frame(
        &mut self,
        now: MonotonicTime,
        frame: Frame,
    ) -> Result<ReceiverEvent, ReceiveError> {
        if self.departed {
            return Err(ReceiveError::AfterGoodbye(frame.kind()));
        }
        match frame {
            Frame::Entries(batch) => self.handle_entries(now, batch),
            Frame::Heartbeat(heartbeat) => self.handle_heartbeat(now, &heartbeat),
            Frame::Reign(Reign { generation }) => Ok(ReceiverEvent::Reign(generation)),
            Frame::Goodbye(reason) => {
                self.departed = true;
                Ok(ReceiverEvent::Departed(reason))
            }
            other => Err(ReceiveError::Unexpected(other.kind())),
        }
    }

    fn handle_heartbeat(
        &mut self,
        now: MonotonicTime,
        heartbeat: &Heartbeat,
    ) -> Result<ReceiverEvent, ReceiveError> {
        if heartbeat.last != self.received {
            return Err(ReceiveError::Missing { received: self.received, sent: heartbeat.last });
        }
        self.heartbeats.handle(now, heartbeat)?;
        Ok(ReceiverEvent::Heartbeat)
    }

    fn check_batch(&self, batch: &EntryBatch) -> Result<u64, ReceiveError> {
        let (received, found) = (self.received, batch.first);
        if found <= received {
            return Err(ReceiveError::Repeated { received, found });
        }
        if found.0 != received.0 + 1 {
            return Err(ReceiveError::Gap { received, found });
        }
        if batch.base != self.received_point {
            let (last, found) = (self.received_point, batch.base);
            return Err(ReceiveError::Point { last, found });
        }
        let (cost, room) = (batch.cost(), self.room());
        if cost > room {
            return Err(ReceiveError::Overrun { cost, room });
        }
        Ok(cost)
    }

    fn handle_entries(
        &mut self,
        now: MonotonicTime,
        batch: EntryBatch,
    ) -> Result<ReceiverEvent, ReceiveError> {
        let cost = self.check_batch(&batch)?;
        let last = batch.last();
        self.received = last;
        self.received_point = batch.last_point();
        self.cost_received += cost;
        self.log_bytes += cost - batch.entries.len() as u64 * vmft_log::codec::ENTRY_OVERHEAD;
        let stop = batch.entries.iter().find_map(|costed| match costed.entry {
            Entry::Stop { reason, .. } => Some(reason),
            _ => None,
        });
        for (sequence, costed) in (batch.first.0..).map(EntrySequence).zip(&batch.entries) {
            self.checkpoints.add(sequence, &costed.entry);
        }
        self.queue.extend(batch.entries);
        self.withheld.push_back((now.after(self.config.acknowledge_delay), last));
        Ok(ReceiverEvent::Entries { last, stop })
    }

    /// The next entry to replay, in order.
    pub fn poll_entry(&mut self) -> Option<(EntrySequence, Entry)> {
        let CostedEntry { entry, cost } = self.queue.pop_front()?;
        self.cost_taken += cost;
        self.delivered.0 += 1;
        let ungranted = self.cost_taken + self.config.capacity - self.announced.window;
        // Small grants would only make traffic: an eighth at a time keeps the primary going.
        self.acknowledge_now |= ungranted >= self.config.capacity / 8;
        Some((self.delivered, entry))
    }

    /// Goes on with the first whole checkpoint that waits, if `may` says so of its fixed part: the next
    /// entry is its first piece. What was passed over comes back; it counts as handed out.
    pub fn skip_to_checkpoint(&mut self, may: impl FnOnce(&[u8]) -> bool) -> Option<Vec<Entry>> {
        let checkpoint = self.checkpoints.after(self.delivered)?;
        if !may(&checkpoint.fixed) {
            return None;
        }
        let before = checkpoint.first.0 - 1;
        let mut skipped = Vec::new();
        while self.delivered.0 < before {
            let (_, entry) = self.poll_entry().expect("the checkpoint was received after it");
            skipped.push(entry);
        }
        Some(skipped)
    }

    /// Says that every entry up to `entry` was replayed, and where the guest is. Reported to the
    /// primary with the next acknowledgement or heartbeat.
    ///
    /// # Panics
    /// If `entry` was not handed out yet, or `entry` or `point` lies before what was said earlier.
    pub fn report_applied(&mut self, entry: EntrySequence, point: ExecutionPoint) {
        assert!(entry <= self.delivered, "only what was delivered can be applied");
        assert!((entry, point) >= self.applied && point >= self.applied.1, "replay goes forwards");
        self.applied = (entry, point);
    }

    /// What the primary may still send: the cost of entries.
    pub const fn room(&self) -> u64 {
        self.announced.window - self.cost_received
    }

    /// The last entry in memory.
    pub const fn received(&self) -> EntrySequence {
        self.received
    }

    /// The last point in memory.
    pub const fn received_point(&self) -> ExecutionPoint {
        self.received_point
    }

    /// The last entry handed out.
    pub const fn delivered(&self) -> EntrySequence {
        self.delivered
    }

    /// The last entry the primary has been told of.
    pub const fn acknowledged(&self) -> EntrySequence {
        self.announced.received
    }

    /// Leaves the session; nothing is acknowledged any more.
    pub fn leave(&mut self, reason: GoodbyeReason) {
        self.goodbye.get_or_insert(reason.clipped());
    }

    /// True when the primary has said goodbye: it owes nothing any more.
    pub const fn peer_has_left(&self) -> bool {
        self.departed
    }

    /// True when a goodbye was handed out or came in.
    pub const fn has_ended(&self) -> bool {
        self.departed || self.left
    }

    /// True when an acknowledgement should go out for reasons other than the clock.
    pub fn has_due_acknowledgement(&self) -> bool {
        let undelayed = self.config.acknowledge_delay.is_zero() && !self.withheld.is_empty();
        undelayed || self.acknowledge_now || self.goodbye.is_some()
    }

    /// The next frame to send at `now`, if any. To be asked until it says `None`.
    pub fn poll_transmit(&mut self, now: MonotonicTime) -> Option<UnsealedFrame> {
        if self.left || self.departed {
            return None;
        }
        if let Some(reason) = self.goodbye.take() {
            self.left = true;
            return Some(self.control(&Frame::Goodbye(reason)));
        }
        if let Some(heartbeat) = self.heartbeats.poll(now, self.announced.received) {
            // Progress of the replay rides along with the heartbeats.
            self.acknowledge_now |= self.applied.0 != self.announced.applied;
            return Some(self.control(&Frame::Heartbeat(heartbeat)));
        }
        while let Some((_, entry)) = self.withheld.front().filter(|(due, _)| *due <= now) {
            self.announced.received = *entry;
            self.acknowledge_now = true;
            self.withheld.pop_front();
        }
        if !std::mem::take(&mut self.acknowledge_now) {
            return None;
        }
        self.announced.window = self.cost_taken + self.config.capacity;
        if self.applied.0 <= self.announced.received {
            (self.announced.applied, self.announced.applied_point) = self.applied;
        }
        self.heartbeats.frame_sent(now);
        Some(self.control(&Frame::Acknowledge(self.announced)))
    }

    fn control(&self, frame: &Frame) -> UnsealedFrame {
        frame.encode(self.session).expect("control frames are small")
    }

    /// When to call [`Self::poll_transmit`] next; `None` when the session has ended.
    pub fn poll_timeout(&self) -> Option<MonotonicTime> {
        if self.has_ended() {
            return None;
        }
        let withheld = self.withheld.front().map(|(due, _)| *due);
        [withheld, Some(self.heartbeats.next_due())].into_iter().flatten().min()
    }

    /// What has happened so far.
    pub fn stats(&self) -> ReceiverStats {
        ReceiverStats {
            received: self.received,
            received_point: self.received_point,
            delivered: self.delivered,
            applied: self.applied.0,
            buffered: self.cost_received - self.cost_taken,
            log_bytes: self.log_bytes,
            round_trip: self.heartbeats.round_trip(),
        }
    }
}

#[cfg(test)]
#[path = "receiver_tests.rs"]
mod tests;
