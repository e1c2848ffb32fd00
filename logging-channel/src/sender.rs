//! The primary's end of a session: entries in, frames out, acknowledgements back.
//!
//! Pure: it is told the time and handed frames, and asked what to send and when to look again.
//! Entries are encoded as they are pushed, into the batch that will carry them, so that pushing
//! is cheap; checksums are left to whoever sends. A stop, a clock correction or a few packets make
//! their batch due at once, and so does [`Sender::flush`]; other entries wait a little for company.
//!
//! Bounded at both ends: the backup's window says how much may be sent, and what it does not
//! admit waits here up to the capacity; then [`Sender::is_full`] and the guest has to wait.

use crate::frame::{Frame, FrameKind, HEADER_LEN, UnsealedFrame};
use crate::generation_news::GenerationNews;
use crate::latency::{LatencySummary, LatencyWindow};
use crate::session::{
    Acknowledge, GoodbyeReason, Heartbeat, HeartbeatError, HeartbeatExchange, Reign, SessionId,
};
use crate::time::MonotonicTime;
use std::collections::VecDeque;
use std::time::Duration;
use vmft_log::checkpoint::PieceKind;
use vmft_log::codec::{BATCH_COST, BatchEncoder, EncodeError, MAX_BATCH_ENTRIES};
use vmft_log::entry::{Arrival, Entry, EntrySequence, Generation, LogPosition, Packet};
use vmft_log::point::ExecutionPoint;

/// Most batches of which the sender remembers when they began, to tell the lag of execution. Older
/// ones keep their times; newer ones share the newest.
const MAX_LAG_MARKS: usize = 16 << 10;

/// Packets of so many bytes together are part of a stream, whose receiver answers within microseconds: they
/// go with the mark of that answer, or after the batch delay. Sent by themselves they would cost a write,
/// a read and an acknowledgement more, on both hosts.
const STREAM_BYTES: usize = 16 << 10;

/// Buffers kept for reuse.
const SPARE_BUFFERS: usize = 4;

/// Buffers larger than this are not kept.
const MAX_SPARE_BYTES: usize = 2 << 20;

/// How a sender batches and how long it is patient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SenderConfig {
    /// Cost of unsent entries at which the sender is full. Up to twice as much is taken.
    pub capacity: u64,
    /// How long an entry that nobody waits for may wait for company.
    pub batch_delay: Duration,
    /// How often to send a heartbeat.
    pub heartbeat_interval: Duration,
    /// How long entries may stay unacknowledged while the peer shows signs of life.
    pub stall_timeout: Duration,
}

impl Default for SenderConfig {
    /// 16 MiB of buffer, a millisecond of batching, heartbeats every 20 ms, and 2 s before a
    /// backup that lives but does not acknowledge is given up.
    fn default() -> Self {
        Self {
            capacity: 16 << 20,
            batch_delay: Duration::from_millis(1),
            heartbeat_interval: Duration::from_millis(20),
            stall_timeout: Duration::from_secs(2),
        }
    }
}

/// Why an entry was not taken. The session is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// The buffer holds twice its capacity: the caller did not heed [`Sender::is_full`].
    #[error("log buffer is full: {buffered} bytes")]
    Full {
        /// Cost of unsent entries.
        buffered: u64,
    },
    /// The entry is not fit for the log.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The session is over.
    #[error("the session has ended")]
    Ended,
}

/// What the peer did wrong. The session is unchanged, and should end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// An acknowledgement of what was never sent.
    #[error("entry {} acknowledged, but {} is the last one sent", received.0, sent.0)]
    AcknowledgedUnsent {
        /// The entry acknowledged.
        received: EntrySequence,
        /// The last entry sent.
        sent: EntrySequence,
    },
    /// An acknowledgement, window or progress report that takes back an earlier one.
    #[error("acknowledgement takes back an earlier one: {found:?} after {previous:?}")]
    Retracted {
        /// The one before.
        previous: Acknowledge,
        /// The one refused.
        found: Acknowledge,
    },
    /// A heartbeat out of order.
    #[error(transparent)]
    Heartbeat(#[from] HeartbeatError),
    /// A frame that a backup does not send.
    #[error("{0} frame from a backup")]
    Unexpected(FrameKind),
    /// What it says of its disks cannot be.
    #[error("digests of a disk's chunks {0}")]
    Digests(&'static str),
    /// The backup lives, but does not acknowledge.
    #[error("entry {} not acknowledged for {} ms", entry.0, waited.as_millis())]
    Stalled {
        /// The last entry of the oldest unacknowledged batch.
        entry: EntrySequence,
        /// How long ago it was sent.
        waited: Duration,
    },
}

/// What a frame from the backup brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SenderEvent {
    /// A sign of life.
    Heartbeat,
    /// Entries were received or applied, or the window grew.
    Acknowledged(Acknowledge),
    /// The backup leaves.
    Departed(GoodbyeReason),
}

#[derive(Debug)]
struct OpenBatch {
    encoder: BatchEncoder,
    first_at: MonotonicTime,
    /// When the first entry came that an output waits for.
    urgent_at: Option<MonotonicTime>,
    /// An entry came that the backup waits for.
    is_due: bool,
}

impl OpenBatch {
    /// True if it goes out without waiting for company.
    const fn is_due(&self) -> bool {
        self.is_due
    }
}

#[derive(Debug)]
struct ClosedBatch {
    bytes: Vec<u8>,
    last: EntrySequence,
    cost: u64,
    first_at: MonotonicTime,
    urgent_at: Option<MonotonicTime>,
}

#[derive(Debug)]
struct InFlight {
    last: EntrySequence,
    sent_at: MonotonicTime,
    urgent_at: Option<MonotonicTime>,
}

/// What a sender has done so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SenderStats {
    /// Entries pushed in this session.
    pub entries: u64,
    /// Bytes of `Entries` frames handed out: the log.
    pub log_bytes: u64,
    /// Bytes of other frames handed out.
    pub other_bytes: u64,
    /// Cost of entries not yet handed out.
    pub buffered: u64,
    /// The last entry handed out.
    pub sent: EntrySequence,
    /// The last entry acknowledged.
    pub acknowledged: EntrySequence,
    /// The last entry the backup has replayed.
    pub applied: EntrySequence,
    /// Where the backup's guest was then.
    pub applied_point: ExecutionPoint,
    /// Age of the oldest entry that the backup has not replayed, to within a batch.
    pub execution_lag: Duration,
    /// Time from the push of an entry somebody waits for (an output mark) to its acknowledgement.
    pub acknowledge_latency: Option<LatencySummary>,
    /// Newest round-trip time of heartbeats.
    pub round_trip: Option<Duration>,
}

/// The primary's end of a session.
#[derive(Debug)]
pub struct Sender {
    config: SenderConfig,
    session: SessionId,
    /// The last entry before the session.
    start: EntrySequence,
    next: EntrySequence,
    last_point: ExecutionPoint,
    open: Option<OpenBatch>,
    closed: VecDeque<ClosedBatch>,
    buffered: u64,
    /// Total cost handed out.
    spent: u64,
    sent: EntrySequence,
    acknowledged: Acknowledge,
    in_flight: VecDeque<InFlight>,
    unapplied: VecDeque<(EntrySequence, MonotonicTime)>,
    heartbeats: HeartbeatExchange,
    generation: GenerationNews,
    goodbye: Option<GoodbyeReason>,
    ended: bool,
    latency: LatencyWindow,
    log_bytes: u64,
    other_bytes: u64,
    spare: Vec<Vec<u8>>,
}

impl Sender {
    /// A session whose log goes on from `start`. Nothing may be sent until the first acknowledgement
    /// opens the window.
    pub fn new(
        config: SenderConfig,
        session: SessionId,
        start: LogPosition,
        now: MonotonicTime,
    ) -> Self {
        Self {
            config,
            session,
            start: start.entry,
            next: EntrySequence(start.entry.0 + 1),
            last_point: start.point,
            open: None,
            closed: VecDeque::new(),
            buffered: 0,
            spent: 0,
            sent: start.entry,
            acknowledged: Acknowledge {
                received: start.entry,
                applied: start.entry,
                applied_point: ExecutionPoint::START,
                window: 0,
            },
            in_flight: VecDeque::new(),
            unapplied: VecDeque::new(),
            heartbeats: HeartbeatExchange::new(now, config.heartbeat_interval),
            generation: GenerationNews::default(),
            goodbye: None,
            ended: false,
            latency: LatencyWindow::default(),
            log_bytes: 0,
            other_bytes: 0,
            spare: Vec::new(),
        }
    }

    /// Puts an entry into the log and returns its place. An output mark or a stop is due at once.
    ///
    /// # Errors
    /// [`PushError`]; the session is unchanged.
    pub fn push(&mut self, now: MonotonicTime, entry: &Entry) -> Result<EntrySequence, PushError> {
        if self.ended || self.goodbye.is_some() {
            return Err(PushError::Ended);
        }
        if let Some(buffered) = self.overfull() {
            return Err(PushError::Full { buffered });
        }
        let mut batch = match self.open.take() {
            Some(batch) => batch,
            None => self.open_batch(now),
        };
        let before = batch.encoder.cost();
        let pushed = batch.encoder.push(entry);
        if pushed.is_ok() {
            self.buffered += batch.encoder.cost() - before;
            self.next.0 += 1;
            self.last_point = entry.point().unwrap_or(self.last_point);
            match entry {
                Entry::OutputMark { .. } => {
                    batch.urgent_at.get_or_insert(now);
                }
                Entry::Stop { .. } | Entry::CheckpointPart { piece: PieceKind::End, .. } => {
                    batch.urgent_at.get_or_insert(now);
                    batch.is_due = true;
                }
                // Of a guest that computes it is all that tells the backup how far it may run.
                Entry::Arrival { arrival: Arrival::ClockSync { .. }, .. } => batch.is_due = true,
                // Its sender will not hear of it if this side dies first, and waits long to send it
                // again.
                Entry::Arrival { arrival: Arrival::Packets(packets), .. } => {
                    batch.is_due |= !is_stream(packets);
                }
                _ => {}
            }
        }
        let encoder = &batch.encoder;
        if encoder.cost() >= BATCH_COST || encoder.count() == MAX_BATCH_ENTRIES {
            self.close(batch);
        } else if encoder.count() > 0 {
            self.open = Some(batch);
        }
        Ok(pushed?)
    }

    fn open_batch(&mut self, now: MonotonicTime) -> OpenBatch {
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.resize(HEADER_LEN, 0);
        let encoder = BatchEncoder::new(bytes, self.next, self.last_point);
        OpenBatch { encoder, first_at: now, urgent_at: None, is_due: false }
    }

    fn close(&mut self, batch: OpenBatch) {
        let OpenBatch { encoder, first_at, urgent_at, is_due: _ } = batch;
        let (cost, last) = (encoder.cost(), EntrySequence(self.next.0 - 1));
        self.closed.push_back(ClosedBatch {
            bytes: encoder.finish(),
            last,
            cost,
            first_at,
            urgent_at,
        });
    }

    /// Makes everything pushed so far due at once.
    pub fn flush(&mut self) {
        if let Some(batch) = self.open.take() {
            self.close(batch);
        }
    }

    /// Leaves the session: everything pushed is sent, then a goodbye. Nothing more can be pushed.
    pub fn leave(&mut self, reason: GoodbyeReason) {
        self.flush();
        if !self.ended {
            self.goodbye.get_or_insert(reason.clipped());
        }
    }

    /// Leaves the session without sending what is left: the goodbye is next, and nothing more can be
    /// pushed.
    pub fn leave_at_once(&mut self, reason: GoodbyeReason) {
        self.open = None;
        self.closed.clear();
        self.buffered = 0;
        self.leave(reason);
    }

    /// The primary has won `generation`: the backup is told at once.
    pub const fn reign(&mut self, generation: Generation) {
        self.generation.tell(generation);
    }

    /// True if the backup is known to have heard of every generation that this side has won.
    pub const fn knows_generation(&self) -> bool {
        self.generation.is_known()
    }

    /// True when a goodbye was handed out or came in: nothing follows.
    pub const fn has_ended(&self) -> bool {
        self.ended
    }

    /// Cost of unsent entries, if it is so high that no more is taken.
    pub const fn overfull(&self) -> Option<u64> {
        if self.buffered >= self.config.capacity.saturating_mul(2) {
            Some(self.buffered)
        } else {
            None
        }
    }

    /// True when the guest should wait: unsent entries have reached the capacity.
    pub const fn is_full(&self) -> bool {
        self.buffered >= self.config.capacity
    }

    /// True when [`Self::poll_transmit`] has something for reasons other than the clock.
    pub fn has_due_entries(&self) -> bool {
        self.generation.is_due()
            || !self.closed.is_empty()
            || self.open.as_ref().is_some_and(OpenBatch::is_due)
    }

    /// True when nothing waits to be sent.
    pub fn is_empty(&self) -> bool {
        self.buffered == 0
    }

    /// The last entry the backup has received. Outputs it covers may be released.
    pub const fn acknowledged(&self) -> EntrySequence {
        self.acknowledged.received
    }

    /// The last entry pushed.
    pub const fn pushed(&self) -> EntrySequence {
        EntrySequence(self.next.0 - 1)
    }

    /// The next frame to send at `now`, if any. To be asked until it says `None`.
    pub fn poll_transmit(&mut self, now: MonotonicTime) -> Option<UnsealedFrame> {
        if self.ended {
            return None;
        }
        if let Some(heartbeat) = self.heartbeats.poll(now, self.sent) {
            self.generation.heartbeat_sent(now);
            return Some(self.control(&Frame::Heartbeat(heartbeat)));
        }
        if let Some(generation) = self.generation.poll(self.sent) {
            return Some(self.control(&Frame::Reign(Reign { generation })));
        }
        self.close_if_due(now);
        if let Some(batch) = self.next_admitted() {
            return Some(self.transmit(now, batch));
        }
        if self.closed.is_empty()
            && let Some(reason) = self.goodbye.take()
        {
            self.ended = true;
            return Some(self.control(&Frame::Goodbye(reason)));
        }
        None
    }

    fn close_if_due(&mut self, now: MonotonicTime) {
        let due = self.open.as_ref().is_some_and(|batch| {
            batch.is_due() || now >= batch.first_at.after(self.config.batch_delay)
        });
        if due {
            self.flush();
        }
    }

    /// Takes the oldest closed batch, if the window admits it.
    fn next_admitted(&mut self) -> Option<ClosedBatch> {
        let cost = self.closed.front()?.cost;
        if self.spent + cost > self.acknowledged.window {
            return None;
        }
        self.closed.pop_front()
    }

    fn transmit(&mut self, now: MonotonicTime, batch: ClosedBatch) -> UnsealedFrame {
        let ClosedBatch { bytes, last, cost, first_at, urgent_at } = batch;
        self.heartbeats.frame_sent(now);
        self.buffered -= cost;
        self.spent += cost;
        self.sent = last;
        self.in_flight.push_back(InFlight { last, sent_at: now, urgent_at });
        let crowded = self.unapplied.len() >= MAX_LAG_MARKS;
        match self.unapplied.back_mut() {
            Some(newest) if crowded => newest.0 = last,
            _ => self.unapplied.push_back((last, first_at)),
        }
        self.log_bytes += bytes.len() as u64;
        UnsealedFrame::new(FrameKind::Entries, self.session, bytes)
            .expect("a batch is closed before it exceeds the limit of a frame")
    }

    fn control(&mut self, frame: &Frame) -> UnsealedFrame {
        let frame = frame.encode(self.session).expect("control frames are small");
        self.other_bytes += frame.len() as u64;
        frame
    }

    /// Gives a buffer back that was sent, to be used again.
    pub fn recycle(&mut self, bytes: Vec<u8>) {
        if self.spare.len() < SPARE_BUFFERS && bytes.capacity() <= MAX_SPARE_BYTES {
            self.spare.push(bytes);
        }
    }

    /// Takes a frame from the backup.
    ///
    /// # Errors
    /// [`SendError`]; the session is unchanged.
    pub fn handle_frame(
        &mut self,
        now: MonotonicTime,
        frame: &Frame,
    ) -> Result<SenderEvent, SendError> {
        match frame {
            Frame::Acknowledge(found) => self.handle_acknowledge(now, found),
            Frame::Heartbeat(heartbeat) => self.handle_heartbeat(now, heartbeat),
            Frame::Goodbye(reason) => {
                self.ended = true;
                Ok(SenderEvent::Departed(reason.clone()))
            }
            other => Err(SendError::Unexpected(other.kind())),
        }
    }

    fn check_received(&self, received: EntrySequence) -> Result<(), SendError> {
        if received > self.sent {
            return Err(SendError::AcknowledgedUnsent { received, sent: self.sent });
        }
        Ok(())
    }

    fn handle_heartbeat(
        &mut self,
        now: MonotonicTime,
        heartbeat: &Heartbeat,
    ) -> Result<SenderEvent, SendError> {
        self.check_received(heartbeat.last)?;
        self.heartbeats.handle(now, heartbeat)?;
        self.generation.heartbeat(heartbeat);
        Ok(SenderEvent::Heartbeat)
    }

    fn handle_acknowledge(
        &mut self,
        now: MonotonicTime,
        found: &Acknowledge,
    ) -> Result<SenderEvent, SendError> {
        self.check_received(found.received)?;
        let previous = self.acknowledged;
        if found.received < previous.received
            || found.applied < previous.applied
            || found.applied_point < previous.applied_point
            || found.window < previous.window
        {
            return Err(SendError::Retracted { previous, found: *found });
        }
        self.acknowledged = *found;
        self.generation.acknowledged(found.received);
        while self.in_flight.front().is_some_and(|batch| batch.last <= found.received) {
            let batch = self.in_flight.pop_front();
            if let Some(urgent_at) = batch.and_then(|batch| batch.urgent_at) {
                self.latency.add(now.since(urgent_at));
            }
        }
        while self.unapplied.front().is_some_and(|(last, _)| *last <= found.applied) {
            self.unapplied.pop_front();
        }
        Ok(SenderEvent::Acknowledged(*found))
    }

    /// Looks at the clock.
    ///
    /// # Errors
    /// [`SendError::Stalled`] if the backup has not acknowledged for too long.
    pub fn handle_timeout(&mut self, now: MonotonicTime) -> Result<(), SendError> {
        let Some(oldest) = self.in_flight.front() else { return Ok(()) };
        let waited = now.since(oldest.sent_at);
        if waited >= self.config.stall_timeout {
            return Err(SendError::Stalled { entry: oldest.last, waited });
        }
        Ok(())
    }

    /// When to call [`Self::handle_timeout`] and [`Self::poll_transmit`] next; `None` when the
    /// session has ended.
    pub fn poll_timeout(&self) -> Option<MonotonicTime> {
        if self.ended {
            return None;
        }
        let batch = self.open.as_ref().map(|batch| batch.first_at.after(self.config.batch_delay));
        let stall =
            self.in_flight.front().map(|sent| sent.sent_at.after(self.config.stall_timeout));
        [batch, stall, Some(self.heartbeats.next_due())].into_iter().flatten().min()
    }

    /// Age of the oldest entry that the backup has not replayed, to within a batch.
    pub fn execution_lag(&self, now: MonotonicTime) -> Duration {
        let unsent = self.closed.front().map(|batch| batch.first_at);
        let unsent = unsent.or(self.open.as_ref().map(|batch| batch.first_at));
        let oldest = self.unapplied.front().map(|(_, first_at)| *first_at).or(unsent);
        oldest.map_or(Duration::ZERO, |oldest| now.since(oldest))
    }

    /// What has happened so far.
    pub fn stats(&self, now: MonotonicTime) -> SenderStats {
        SenderStats {
            entries: self.next.0 - 1 - self.start.0,
            log_bytes: self.log_bytes,
            other_bytes: self.other_bytes,
            buffered: self.buffered,
            sent: self.sent,
            acknowledged: self.acknowledged.received,
            applied: self.acknowledged.applied,
            applied_point: self.acknowledged.applied_point,
            execution_lag: self.execution_lag(now),
            acknowledge_latency: self.latency.summary(),
            round_trip: self.heartbeats.round_trip(),
        }
    }
}

fn is_stream(packets: &[Packet]) -> bool {
    packets.iter().map(|packet| packet.frame.len()).sum::<usize>() >= STREAM_BYTES
}

#[cfg(test)]
#[path = "sender_tests.rs"]
mod tests;
