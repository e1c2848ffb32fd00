//! What both ends of a session share: its identity and the small messages both understand.

use crate::time::MonotonicTime;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;
use vmft_log::control::ControlMessage;
use vmft_log::entry::{EntrySequence, Generation};
use vmft_log::foreign::ForeignText;
use vmft_log::point::ExecutionPoint;
use vmft_log::wire::{DecodeError, check_count};
use xxhash_rust::xxh3::xxh3_64;

/// Longest text in a message, in bytes: a line that a person reads.
pub const MAX_TEXT: usize = 1024;

/// Names one session in every frame header, so that frames of another one are refused.
///
/// It guards against accidents (a stale peer, a spliced file); against an enemy on the wire
/// only TLS does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionId(pub(crate) u32);

impl SessionId {
    /// What frames carry before a session is agreed on.
    pub const HANDSHAKE: Self = Self(0);

    /// The session named by `bytes`, which both ends know; never [`Self::HANDSHAKE`].
    pub fn derive(bytes: &[u8]) -> Self {
        let hash = xxh3_64(bytes);
        Self(((hash >> 32) as u32 ^ hash as u32).max(1))
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

/// How a side leaves a session on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum GoodbyeReason {
    /// The machine was stopped on purpose; nothing goes live.
    #[error("the machine was stopped")]
    Stopped,
    /// The sender leaves the pair; the other side may go on alone.
    #[error("the peer left the pair")]
    Leaving,
    /// The sender cannot go on with this session.
    #[error("the peer ended the session: {0}")]
    Fault(ForeignText),
    /// A backup whose state is not what the log says: it joins again, from a checkpoint.
    #[error("it diverged, and has to join again: {}", .0.text)]
    Diverged(DivergenceNotice),
    /// A primary whose machine has come to something that the program cannot do or does wrong, and
    /// that runs no more. Whoever follows it may go on, and comes to the same if that is the guest's
    /// doing.
    #[error("the peer's machine failed: {0}")]
    Failed(ForeignText),
    /// A primary whose operator hands the guest over: everything it had to let out is out, and its machine
    /// rests. Whoever follows it goes on.
    #[error("the peer hands the guest over")]
    HandedOver,
    /// A primary whose storage fails, and that hands the guest over: nothing of it leaves any more, and none
    /// of its writes is under way. Whoever follows it, and reaches the storage by a way of its own, goes on.
    #[error("the peer's storage fails, and it hands the guest over: {0}")]
    StorageFailed(ForeignText),
}

/// What a backup that diverged tells its primary.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DivergenceNotice {
    /// The last point at which the two agreed, and the first at which they were seen to differ; nothing
    /// for a difference that no comparison found.
    pub window: Option<(ExecutionPoint, ExecutionPoint)>,
    /// The first address of the page of memory that differs, if it is known to be one alone.
    pub page: Option<u64>,
    /// The whole report, for people.
    pub text: ForeignText,
}

impl GoodbyeReason {
    /// The same, its text cut to what a message may carry.
    pub(crate) fn clipped(self) -> Self {
        match self {
            Self::Fault(text) => Self::Fault(text.clipped(MAX_TEXT)),
            Self::Failed(text) => Self::Failed(text.clipped(MAX_TEXT)),
            Self::StorageFailed(text) => Self::StorageFailed(text.clipped(MAX_TEXT)),
            Self::Diverged(notice) => {
                Self::Diverged(DivergenceNotice { text: notice.text.clipped(MAX_TEXT), ..notice })
            }
            other => other,
        }
    }
}

/// A sign of life, sent by both sides at a steady pace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Counts the sender's heartbeats of this session from 1, without gaps.
    pub number: u64,
    /// When it was sent, on the sender's clock.
    pub sent_at: MonotonicTime,
    /// The newest heartbeat received from the other side, if any.
    pub echo: Option<HeartbeatEcho>,
    /// The last entry sent (by a primary) or received (by a backup).
    pub last: EntrySequence,
}

/// A heartbeat given back, from which its sender learns the round-trip time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatEcho {
    /// [`Heartbeat::sent_at`] of the heartbeat given back.
    pub sent_at: MonotonicTime,
    /// How long it was held before this echo, in nanoseconds.
    pub held_ns: u64,
}

/// What the backup has received, how far it has got, and how much more it can take.
///
/// The first one of a session also says that the checkpoint arrived whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledge {
    /// Every entry up to this one is in the backup's memory.
    pub received: EntrySequence,
    /// The last entry the backup has replayed; not after `received`.
    pub applied: EntrySequence,
    /// Where the backup's guest was when it had.
    pub applied_point: ExecutionPoint,
    /// The total cost (see [`vmft_log::codec::ENTRY_OVERHEAD`]) of entries since the start of the
    /// session that the backup is prepared to receive. Never shrinks.
    pub window: u64,
}

/// The primary has won a later generation, and goes on with this session in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reign {
    /// The generation.
    pub generation: Generation,
}

/// How far a join is, said by whoever works on it while it works: limits are on silence, since the work
/// grows with the guest's memory and the host's load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Pieces of the checkpoint that the primary has sent, or the backup has taken.
    pub pieces: u64,
}

/// Why a heartbeat is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeartbeatError {
    /// One is missing or came twice.
    #[error("heartbeat {found} came after {previous}")]
    OutOfOrder {
        /// The number before.
        previous: u64,
        /// The number found.
        found: u64,
    },
}

/// Both sides' half of the heartbeat exchange: when to send, what to echo, round-trip time.
/// Most intervals without a heartbeat while other frames are sent.
const MAX_QUIET_INTERVALS: u32 = 10;

#[derive(Debug)]
pub(crate) struct HeartbeatExchange {
    interval: Duration,
    next_due: MonotonicTime,
    /// When the last one was sent.
    last_sent: MonotonicTime,
    sent: u64,
    heard: u64,
    newest: Option<(MonotonicTime, MonotonicTime)>,
    round_trip: Option<Duration>,
}

impl HeartbeatExchange {
    pub(crate) const fn new(now: MonotonicTime, interval: Duration) -> Self {
        Self {
            interval,
            next_due: now,
            last_sent: now,
            sent: 0,
            heard: 0,
            newest: None,
            round_trip: None,
        }
    }

    pub(crate) const fn next_due(&self) -> MonotonicTime {
        self.next_due
    }

    pub(crate) const fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }

    /// The heartbeat to send now, if one is due.
    pub(crate) fn poll(&mut self, now: MonotonicTime, last: EntrySequence) -> Option<Heartbeat> {
        if now < self.next_due {
            return None;
        }
        self.next_due = now.after(self.interval);
        self.last_sent = now;
        self.sent += 1;
        let echo = self.newest.map(|(sent_at, heard_at)| HeartbeatEcho {
            sent_at,
            held_ns: now.as_ns().saturating_sub(heard_at.as_ns()),
        });
        Some(Heartbeat { number: self.sent, sent_at: now, echo, last })
    }

    /// Another frame was sent: that is as good a sign of life, so the next heartbeat has time. One
    /// goes out now and then all the same, because it checks the count and measures the round trip.
    pub(crate) fn frame_sent(&mut self, now: MonotonicTime) {
        let latest = self.last_sent.after(self.interval * MAX_QUIET_INTERVALS);
        self.next_due = now.after(self.interval).min(latest).max(self.next_due);
    }

    /// Takes in the peer's heartbeat. Refused ones change nothing.
    pub(crate) fn handle(
        &mut self,
        now: MonotonicTime,
        heartbeat: &Heartbeat,
    ) -> Result<(), HeartbeatError> {
        if heartbeat.number != self.heard + 1 {
            return Err(HeartbeatError::OutOfOrder {
                previous: self.heard,
                found: heartbeat.number,
            });
        }
        self.heard = heartbeat.number;
        self.newest = Some((heartbeat.sent_at, now));
        if let Some(echo) = heartbeat.echo {
            let held = Duration::from_nanos(echo.held_ns);
            self.round_trip = Some(now.since(echo.sent_at).saturating_sub(held));
        }
        Ok(())
    }
}

/// Makes sure that `text` is no longer than [`MAX_TEXT`].
pub(crate) fn check_text(what: &'static str, text: &ForeignText) -> Result<(), DecodeError> {
    let found = text.len() as u64;
    if text.len() > MAX_TEXT {
        return Err(DecodeError::Limit { what, found, limit: MAX_TEXT as u64 });
    }
    Ok(())
}

impl ControlMessage for Heartbeat {
    fn validate(&self) -> Result<(), DecodeError> {
        Ok(())
    }
}
impl ControlMessage for Reign {
    fn validate(&self) -> Result<(), DecodeError> {
        check_count("generation", self.generation.0)
    }
}
impl ControlMessage for Progress {
    fn validate(&self) -> Result<(), DecodeError> {
        Ok(())
    }
}
impl ControlMessage for Acknowledge {
    fn validate(&self) -> Result<(), DecodeError> {
        if self.applied > self.received {
            return Err(DecodeError::Rule("more entries applied than received"));
        }
        Ok(())
    }
}
impl ControlMessage for GoodbyeReason {
    fn validate(&self) -> Result<(), DecodeError> {
        match self {
            Self::Fault(text) | Self::Failed(text) | Self::StorageFailed(text) => {
                check_text("goodbye text", text)
            }
            Self::Diverged(notice) => check_text("divergence", &notice.text),
            Self::Stopped | Self::Leaving | Self::HandedOver => Ok(()),
        }
    }
}
